//! Holds a backend of this machine against Hugging Face transformers' answers, in float32.

use std::path::PathBuf;
use std::process::ExitCode;

use ampoule::{Backend, DType};
use ampoule_conformance::goldens;
use ampoule_cpu::CpuBackend;
use ampoule_cuda::CudaBackend;
use ampoule_reference::ReferenceBackend;

const USAGE: &str = "usage: goldens [--backend cpu|cuda|reference] [--folder DIR]";
/// Largest `max |difference| / max |expected|` in float32.
const TOLERANCE: f64 = 1e-4;

fn run() -> Result<bool, String> {
    let (mut name, mut folder) = ("cpu".to_owned(), goldens::folder());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--backend" => name = value,
            "--folder" => folder = PathBuf::from(value),
            _ => return Err(USAGE.to_owned()),
        }
    }
    let backend: Box<dyn Backend> = match name.as_str() {
        "cpu" => Box::new(CpuBackend::new(0)),
        "cuda" => Box::new(CudaBackend::new(0).map_err(|e| e.to_string())?),
        "reference" => Box::new(ReferenceBackend),
        _ => return Err(USAGE.to_owned()),
    };
    let checkpoints =
        goldens::checkpoints(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut passed = !checkpoints.is_empty();
    println!("checkpoint          rows  max error  frobenius  greedy");
    for checkpoint in checkpoints {
        let r = goldens::run(backend.as_ref(), &checkpoint, Some(DType::F32))?;
        let right = r.greedy - r.greedy_differ;
        println!(
            "{:18} {:5}    {:.1e}    {:.1e}   {right}/{}",
            r.name, r.rows, r.max_error, r.frobenius, r.greedy
        );
        passed &= r.max_error <= TOLERANCE && r.greedy_differ == 0;
    }
    println!("{}", if passed { "all within 1e-4, all greedy tokens equal" } else { "FAILED" });
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
