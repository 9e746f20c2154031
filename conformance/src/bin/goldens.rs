//! Holds a backend of this machine against Hugging Face transformers' answers, which are float32.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ampoule::{Backend, DType};
use ampoule_conformance::{goldens, nano};
use ampoule_cpu::CpuBackend;
use ampoule_cuda::CudaBackend;
use ampoule_reference::ReferenceBackend;

const USAGE: &str = "usage: goldens [--backend cpu|cuda|reference] [--folder DIR] [--precision f32|bf16]

    --folder: conformance/golden/qwen35, conformance/golden/nano for assets/ampoule-nano, or a checkpoint's own folder
    f32: every logit within 1e-4 of the largest, every greedy token equal
    bf16: activations and caches in bfloat16; relative Frobenius error at most 1e-2, the largest logit the same in 99 of 100 rows";
/// Largest `max |difference| / max |expected|` in float32.
const TOLERANCE: f64 = 1e-4;
/// Largest relative Frobenius error in bfloat16, and part of the rows whose largest logit may be another.
const TOLERANCE_BF16: f64 = 1e-2;
const TOP1_BF16: f64 = 0.01;

fn run() -> Result<bool, String> {
    let (mut name, mut folder) = ("cpu".to_owned(), goldens::folder());
    let mut precision = DType::F32;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--help" {
            println!("{USAGE}");
            return Ok(true);
        }
        let value = words.next().ok_or_else(|| format!("'{word}' needs a value\n{USAGE}"))?;
        match word.as_str() {
            "--backend" => name = value,
            "--folder" => folder = PathBuf::from(value),
            "--precision" => {
                precision = match value.as_str() {
                    "f32" => DType::F32,
                    "bf16" => DType::BF16,
                    _ => return Err(format!("unknown precision '{value}'\n{USAGE}")),
                }
            }
            _ => return Err(format!("unknown option '{word}'\n{USAGE}")),
        }
    }
    let backend: Box<dyn Backend> = match name.as_str() {
        "cpu" => Box::new(CpuBackend::new(0)),
        "cuda" => Box::new(CudaBackend::new(0).map_err(|e| e.to_string())?),
        "reference" => Box::new(ReferenceBackend),
        _ => return Err(format!("unknown backend '{name}'\n{USAGE}")),
    };
    if folder.join("prompts.json").exists() {
        return carried(backend.as_ref(), &folder, precision);
    }
    let mut passed = true;
    let checkpoints = goldens::checkpoints(&folder)?;
    println!("checkpoint          rows  max error  frobenius  top-1        greedy");
    for checkpoint in checkpoints {
        let r = goldens::run(backend.as_ref(), &checkpoint, Some(precision))?;
        let right = r.greedy - r.greedy_differ;
        // Nothing compared is nothing held.
        let compared = r.rows > 0 && r.greedy > 0;
        let held = compared
            && if precision == DType::F32 {
                r.max_error <= TOLERANCE && r.greedy_differ == 0
            } else {
                r.frobenius <= TOLERANCE_BF16 && r.top1_differ as f64 <= TOP1_BF16 * r.rows as f64
            };
        passed &= held;
        println!(
            "{:18} {:5}    {:.1e}    {:.1e}   {}/{}    {right}/{}{}",
            r.name,
            r.rows,
            r.max_error,
            r.frobenius,
            r.rows - r.top1_differ,
            r.rows,
            r.greedy,
            if held { "" } else { "    over the limit" }
        );
    }
    println!("{}", if passed { "passed" } else { "FAILED" });
    Ok(passed)
}

/// The prompts of ampoule-nano.
fn carried(backend: &dyn Backend, folder: &Path, precision: DType) -> Result<bool, String> {
    // From its folder, which lies beside the goldens: this binary need not carry it.
    let model = folder.join("../../../assets/ampoule-nano");
    let model = model.to_str().ok_or("the path is not UTF-8")?;
    let reports = nano::run(backend, model, folder, precision, &|_| true)?;
    let mut passed = !reports.is_empty();
    for r in &reports {
        println!("{r}");
        passed &= r.same_ids
            && if precision == DType::F32 {
                r.max_error <= TOLERANCE && r.frobenius <= TOLERANCE && r.greedy_differ == 0
            } else {
                // Some prompts are far from what the model learnt: transformers' own bfloat16 is 1.5e-2 off there.
                r.frobenius <= 2.0 * TOLERANCE_BF16
            };
    }
    if precision != DType::F32 {
        let all = nano::together(reports.iter().map(|r| r.sums));
        println!("all together: {all:.2e} from float32");
        passed &= all <= TOLERANCE_BF16;
    }
    println!("{}", if passed { "passed" } else { "FAILED" });
    Ok(passed)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::from(2)
        }
    }
}
