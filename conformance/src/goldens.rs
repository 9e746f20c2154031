//! Hugging Face transformers' answers for tiny Qwen3.5 checkpoints, held against a backend.
//!
//! `docs/goldens.md` says how the files in `golden/qwen35` were made and what each exercises.

use std::path::{Path, PathBuf};

use ampoule::{Ampoule, Backend, DType, LoadOptions};
use safetensors::SafeTensors;

/// What one checkpoint's comparison found.
#[derive(Clone, Debug)]
pub struct GoldenReport {
    /// The checkpoint.
    pub name: String,
    /// Rows of logits compared.
    pub rows: usize,
    /// Largest `max |difference| / max |expected|` over all sequences.
    pub max_error: f64,
    /// Largest relative Frobenius error over all sequences.
    pub frobenius: f64,
    /// Rows whose largest logit is another one than in the expected row.
    pub top1_differ: usize,
    /// Greedy tokens that differ.
    pub greedy_differ: usize,
    /// Greedy tokens compared.
    pub greedy: usize,
}

/// The folder with the checkpoints.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/qwen35")
}

/// The checkpoints' folders, in order of name: those in `folder`, or the folder itself where it is one.
///
/// # Errors
/// If the folder cannot be read, or there is no checkpoint with what is expected of it.
pub fn checkpoints(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |e| format!("{}: {e}", folder.display());
    let is_one = |path: &PathBuf| path.join("expected.safetensors").exists();
    let mut found = vec![folder.to_path_buf()];
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        found.push(entry.map_err(failed)?.path());
    }
    found.retain(is_one);
    if found.is_empty() {
        let folder = folder.display();
        return Err(format!(
            "{folder}: there is no expected.safetensors, neither in it nor in a folder in it; see docs/goldens.md"
        ));
    }
    found.sort();
    Ok(found)
}

fn words<T>(file: &SafeTensors<'_>, name: &str, convert: impl Fn([u8; 4]) -> T) -> Option<Vec<T>> {
    let bytes = file.tensor(name).ok()?.data();
    Some(bytes.chunks_exact(4).map(|b| convert([b[0], b[1], b[2], b[3]])).collect())
}

/// The index of the largest number.
fn largest_of(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]))
}

/// The larger error; one that is no number is larger than all.
fn worse(one: f64, other: f64) -> f64 {
    if one.is_nan() || other.is_nan() { f64::INFINITY } else { one.max(other) }
}

/// Runs one checkpoint.
///
/// # Errors
/// If the files cannot be read or the engine fails, in words.
pub fn run(
    backend: &dyn Backend,
    checkpoint: &Path,
    precision: Option<DType>,
) -> Result<GoldenReport, String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", checkpoint.display());
    let bytes = std::fs::read(checkpoint.join("expected.safetensors")).map_err(|e| text(&e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| text(&e))?;
    let precision = precision.or(Some(DType::F32));
    let longest = file
        .names()
        .into_iter()
        .filter(|n| n.ends_with(".input_ids"))
        .filter_map(|n| file.tensor(n).ok())
        .map(|t| t.data().len() / 4)
        .max();
    let options = LoadOptions {
        context: longest.unwrap_or(0).max(512),
        kv_cache: precision,
        activation: precision,
        ..LoadOptions::default()
    };
    let path = checkpoint.to_str().ok_or("the path is not UTF-8")?;
    let mut model =
        Ampoule::load_on(backend, path, &options, &mut |_, _| {}).map_err(|e| text(&e))?;
    let mut report = GoldenReport {
        // Of `.` the last part is known only once it is resolved.
        name: checkpoint
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_default(),
        rows: 0,
        max_error: 0.0,
        frobenius: 0.0,
        top1_differ: 0,
        greedy_differ: 0,
        greedy: 0,
    };
    let slot = model.engine.create_slot().map_err(|e| text(&e))?;
    let vocabulary = model.engine.vocabulary();
    let mut names: Vec<&str> =
        file.names().into_iter().filter_map(|n| n.strip_suffix(".input_ids")).collect();
    names.sort_unstable();
    for name in names {
        let tokens =
            words(&file, &format!("{name}.input_ids"), u32::from_le_bytes).ok_or("no input_ids")?;
        let positions =
            words(&file, &format!("{name}.positions"), u32::from_le_bytes).ok_or("no positions")?;
        let expected =
            words(&file, &format!("{name}.logits"), f32::from_le_bytes).ok_or("no logits")?;
        let mut rows: Vec<Vec<f32>> = Vec::new();
        model.engine.reset(slot).map_err(|e| text(&e))?;
        let mut sink = |row: &[f32]| {
            rows.push(row.to_vec());
            std::ops::ControlFlow::Continue(())
        };
        model.engine.score(slot, &tokens, &mut sink).map_err(|e| text(&e))?;
        if expected.len() != positions.len() * vocabulary || rows.len() != tokens.len() {
            return Err(text(&format!("'{name}' has logits for other positions than it says")));
        }
        let (mut worst, mut largest, mut difference2, mut expected2) = (0.0_f64, 0.0_f64, 0.0, 0.0);
        for (row, expected) in positions.iter().zip(expected.chunks_exact(vocabulary)) {
            for (got, wanted) in rows[*row as usize].iter().zip(expected) {
                let difference = f64::from(got - wanted);
                worst = worse(worst, difference.abs());
                largest = largest.max(f64::from(wanted.abs()));
                difference2 += difference * difference;
                expected2 += f64::from(*wanted) * f64::from(*wanted);
            }
            report.rows += 1;
            report.top1_differ +=
                usize::from(largest_of(&rows[*row as usize]) != largest_of(expected));
        }
        report.max_error = worse(report.max_error, worst / largest);
        report.frobenius = worse(report.frobenius, (difference2 / expected2).sqrt());
    }
    let prompt = words(&file, "greedy.prompt", u32::from_le_bytes).ok_or("no greedy.prompt")?;
    let ids = words(&file, "greedy.ids", u32::from_le_bytes).ok_or("no greedy.ids")?;
    model.engine.reset(slot).map_err(|e| text(&e))?;
    model.append(slot, &prompt).map_err(|e| text(&e))?;
    for wanted in &ids {
        let got = model.engine.step(slot).map_err(|e| text(&e))?;
        report.greedy += 1;
        report.greedy_differ += usize::from(got != *wanted);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::worse;

    #[test]
    fn what_is_no_number_is_no_small_error() {
        assert_eq!(worse(1.0, 2.0), 2.0);
        assert_eq!(worse(f64::NAN, 2.0), f64::INFINITY);
        assert_eq!(worse(worse(0.0, f64::NAN), 0.0), f64::INFINITY);
    }
}
