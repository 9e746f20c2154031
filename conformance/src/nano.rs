//! Hugging Face transformers' answers for `ampoule-nano`, held against a backend.
//!
//! `scripts/golden_nano.py` made the files in `golden/nano` and says what is in them.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ampoule::{Ampoule, Backend, DType, LoadOptions};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// What one prompt's comparison found.
#[derive(Clone, Debug)]
pub struct PromptReport {
    /// What kind of prompt it is.
    pub kind: String,
    /// Its tokens.
    pub tokens: usize,
    /// Whether the chat template and the tokenizer give the expected text and ids.
    pub same_ids: bool,
    /// Relative Frobenius error of the logits against transformers in float32.
    pub frobenius: f64,
    /// Largest `|difference|` over the largest expected logit.
    pub max_error: f64,
    /// Relative Frobenius error against transformers in bfloat16.
    pub frobenius_bf16: f64,
    /// The same error of transformers' own float32: what its arithmetic in bfloat16 is away from the exact result.
    pub bf16_noise: f64,
    /// Largest difference of a log probability, in nats, over all tokens of the prompt.
    pub log_prob: f64,
    /// Greedy tokens that differ.
    pub greedy_differ: usize,
    /// Greedy tokens compared.
    pub greedy: usize,
    /// Squared sums of the differences from float32 and of what was expected, to sum over prompts.
    pub sums: [f64; 2],
    /// The same for bfloat16.
    pub sums_bf16: [f64; 2],
}

impl fmt::Display for PromptReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:28} {:4} tokens  f32 {:.1e} (max {:.1e}, log p {:.1e})  bf16 {:.2e} (its own noise {:.2e})  greedy {}/{}",
            self.kind,
            self.tokens,
            self.frobenius,
            self.max_error,
            self.log_prob,
            self.frobenius_bf16,
            self.bf16_noise,
            self.greedy - self.greedy_differ,
            self.greedy
        )
    }
}

/// The folder with the goldens.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/nano")
}

/// A list in one of the golden's JSON files.
///
/// # Errors
/// If the file cannot be read or has no such list.
pub fn list(folder: &Path, file: &str, key: &str) -> Result<Vec<Value>, String> {
    let path = folder.join(file);
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut value: Value =
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    match value[key].take() {
        Value::Array(list) => Ok(list),
        _ => Err(format!("{}: there is no list '{key}'", path.display())),
    }
}

/// The ids in a JSON list.
pub fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Result<Vec<f32>, String> {
    let tensor = file.tensor(name).map_err(|e| format!("{name}: {e}"))?;
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => {
            Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::BF16 => Ok(data
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect()),
        other => Err(format!("{name} is {other:?}")),
    }
}

fn rows(file: &SafeTensors<'_>, name: &str) -> Result<Vec<usize>, String> {
    let data = file.tensor(name).map_err(|e| format!("{name}: {e}"))?.data();
    let row = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    Ok(data.chunks_exact(4).filter_map(|b| usize::try_from(row(b)).ok()).collect())
}

/// Squared sums of the differences and of what was expected.
fn sums(got: &[f32], expected: &[f32]) -> [f64; 2] {
    let pairs = got.iter().zip(expected);
    pairs.fold([0.0, 0.0], |[d, e], (&g, &x)| {
        let (g, x) = (f64::from(g), f64::from(x));
        [d + (g - x) * (g - x), e + x * x]
    })
}

fn ratio([difference, expected]: [f64; 2]) -> f64 {
    (difference / expected).sqrt()
}

fn log_probability(row: &[f32], token: u32) -> f64 {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|l| f64::from(l - highest).exp()).sum();
    f64::from(row[token as usize] - highest) - sum.ln()
}

/// Runs the prompts of a folder whose number `wanted` picks on `model`, which is ampoule-nano by name or as a folder, with
/// activations and KV cache of the type given.
///
/// # Errors
/// If the files cannot be read or the engine fails, in words.
pub fn run(
    backend: &dyn Backend,
    model: &str,
    folder: &Path,
    precision: DType,
    wanted: &dyn Fn(usize) -> bool,
) -> Result<Vec<PromptReport>, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let bytes = std::fs::read(folder.join("expected.safetensors")).map_err(|e| text(&e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| text(&e))?;
    let options = LoadOptions {
        context: 1024,
        kv_cache: Some(precision),
        activation: Some(precision),
        ..LoadOptions::default()
    };
    let mut model =
        Ampoule::load_on(backend, model, &options, &mut |_, _| {}).map_err(|e| text(&e))?;
    let slot = model.engine.create_slot().map_err(|e| text(&e))?;
    let vocabulary = model.engine.vocabulary();
    let mut reports = Vec::new();
    for (number, prompt) in list(folder, "prompts.json", "prompts")?.iter().enumerate() {
        if !wanted(number) {
            continue;
        }
        let tokens = ids(&prompt["ids"]);
        let own = match prompt["prompt"].as_str() {
            Some(prompt) => model.encode_prompt(prompt),
            None => {
                let tools = Some(&prompt["tools"]).filter(|t| !t.is_null());
                model.encode_chat(&prompt["messages"], tools, true)
            }
        };
        let own = own.map_err(|e| text(&e))?;
        let mut all: Vec<Vec<f32>> = Vec::new();
        model.engine.reset(slot).map_err(|e| text(&e))?;
        let mut sink = |row: &[f32]| {
            all.push(row.to_vec());
            ControlFlow::Continue(())
        };
        model.engine.score(slot, &tokens, &mut sink).map_err(|e| text(&e))?;
        let tensor = |name: &str| floats(&file, &format!("{number:02}.{name}"));
        let (wide, half) = (tensor("logits")?, tensor("logits_bf16")?);
        let kept = rows(&file, &format!("{number:02}.positions"))?;
        let got: Vec<f32> =
            kept.iter().filter_map(|&row| all.get(row)).flatten().copied().collect();
        if got.is_empty() || got.len() != wide.len() || got.len() != kept.len() * vocabulary {
            return Err(format!("prompt {number} has logits for other rows than it says"));
        }
        let log_probs = tensor("log_prob")?;
        if log_probs.len() + 1 != tokens.len() || all.len() != tokens.len() {
            return Err(format!("prompt {number} has log probabilities for other tokens"));
        }
        let difference = |(a, b): (&f32, &f32)| f64::from((a - b).abs());
        let largest = wide.iter().fold(0.0_f64, |m, x| m.max(f64::from(x.abs())));
        // A NaN is larger than all.
        let worst = |m: f64, d: f64| if d.is_nan() { f64::INFINITY } else { m.max(d) };
        let max_error = got.iter().zip(&wide).map(difference).fold(0.0, worst) / largest;
        let log_prob = log_probs
            .iter()
            .zip(all.iter().zip(&tokens[1..]))
            .map(|(&wanted, (row, &token))| (log_probability(row, token) - f64::from(wanted)).abs())
            .fold(0.0, worst);
        let greedy = ids(&prompt["greedy"]);
        model.engine.reset(slot).map_err(|e| text(&e))?;
        model.append(slot, &tokens).map_err(|e| text(&e))?;
        let mut greedy_differ = 0;
        for &wanted in &greedy {
            greedy_differ += usize::from(model.engine.step(slot).map_err(|e| text(&e))? != wanted);
        }
        let (sums_f32, sums_bf16) = (sums(&got, &wide), sums(&got, &half));
        reports.push(PromptReport {
            kind: prompt["kind"].as_str().unwrap_or_default().to_owned(),
            tokens: tokens.len(),
            same_ids: own == tokens,
            frobenius: ratio(sums_f32),
            max_error,
            frobenius_bf16: ratio(sums_bf16),
            bf16_noise: ratio(sums(&wide, &half)),
            log_prob,
            greedy_differ,
            greedy: greedy.len(),
            sums: sums_f32,
            sums_bf16,
        });
    }
    Ok(reports)
}

/// Relative Frobenius error over prompts together, from the squared sums of each.
pub fn together(sums: impl Iterator<Item = [f64; 2]>) -> f64 {
    ratio(sums.fold([0.0, 0.0], |[a, b], [d, e]| [a + d, b + e]))
}
