//! `ampoule logits` and `ampoule perplexity`: what the model predicts after every token.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use ampoule::{EncodeOptions, Error, write_atomically};
use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::json;

use super::load;
use crate::args::{GlobalArgs, LogitsArgs, PerplexityArgs, TokenList};
use crate::output::{self, Progress};

pub(crate) fn logits(args: &LogitsArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let text = output::read_text(&args.tokens_file)?;
    let tokens: TokenList = text
        .parse()
        .map_err(anyhow::Error::msg)
        .with_context(|| args.tokens_file.display().to_string())?;
    let tokens = tokens.0;
    let progress = Progress::new(args.json);
    let mut model = load(&args.model.model, global, None, progress)?;
    let slot = model.engine.create_slot()?;
    let vocabulary = model.engine.vocabulary();
    let bar = progress.count(tokens.len(), "scoring");
    let engine = &mut model.engine;
    let bytes = write_atomically(&args.out, |out| {
        out.write_all(&header(tokens.len(), vocabulary)).map_err(|e| io_error(&args.out, e))?;
        let mut failure = None;
        let mut row_bytes = Vec::with_capacity(4 * vocabulary);
        engine.score(slot, &tokens, &mut |row| {
            row_bytes.clear();
            row_bytes.extend(row.iter().flat_map(|l| l.to_le_bytes()));
            bar.inc(1);
            match out.write_all(&row_bytes) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        failure.map_or(Ok(()), |error| Err(io_error(&args.out, error)))
    })?;
    bar.finish_and_clear();
    if args.json {
        let shape = [tokens.len(), vocabulary];
        let path = args.out.display().to_string();
        return output::json(
            &json!({ "path": path, "shape": shape, "dtype": "f32", "bytes": bytes }),
        );
    }
    output::note(format!(
        "wrote {}: logits [{}, {vocabulary}] f32, {}",
        args.out.display(),
        tokens.len(),
        output::bytes(bytes)
    ));
    Ok(())
}

fn io_error(path: &Path, source: io::Error) -> Error {
    Error::Io { path: path.to_owned(), action: "write", source }
}

/// Length and header of a safetensors file with one tensor, padded to 8 bytes.
fn header(rows: usize, cols: usize) -> Vec<u8> {
    let end = 4 * rows as u64 * cols as u64;
    let tensor = json!({ "dtype": "F32", "shape": [rows, cols], "data_offsets": [0, end] });
    let mut text = json!({ "logits": tensor }).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Tokens of a window unless --context says otherwise.
const WINDOW: usize = 1024;

#[derive(Debug, Serialize)]
struct Perplexity {
    model: String,
    /// Tokens of a window.
    context: usize,
    windows: usize,
    /// Tokens of the text.
    tokens: usize,
    /// Tokens that were predicted.
    scored: usize,
    /// Mean negative log-likelihood, in nats.
    nll: f64,
    ppl: f64,
}

pub(crate) fn perplexity(args: &PerplexityArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let text = output::read_text(&args.file)?;
    let progress = Progress::new(args.json);
    let mut model = load(&args.model.model, global, Some(WINDOW), progress)?;
    let context = model.engine.context();
    let tokens = model.tokenizer()?.encode(&text, EncodeOptions::TEXT)?;
    ensure!(tokens.len() > 1, "{} has fewer than two tokens", args.file.display());
    let slot = model.engine.create_slot()?;
    let bar = progress.count(tokens.len(), "scoring");
    let (mut sum, mut scored, mut windows) = (0.0, 0, 0);
    for window in tokens.chunks(context).filter(|w| w.len() > 1) {
        model.engine.reset(slot)?;
        // The row after token i is held against token i + 1; the last row has nothing to predict.
        let mut next = window[1..].iter();
        model.engine.score(slot, window, &mut |row| {
            bar.inc(1);
            if let Some(&token) = next.next() {
                sum += negative_log_likelihood(row, token);
                scored += 1;
            }
            ControlFlow::Continue(())
        })?;
        windows += 1;
    }
    bar.finish_and_clear();
    let nll = sum / f64::from(scored);
    let result = Perplexity {
        model: model.name().to_owned(),
        context,
        windows,
        tokens: tokens.len(),
        scored: scored as usize,
        nll,
        ppl: nll.exp(),
    };
    if args.json {
        return output::json(&result);
    }
    let Perplexity { tokens, scored, ppl, .. } = result;
    output::line(format!(
        "tokens {tokens}  scored {scored}  windows {windows} of {context}  nll {nll:.5}  ppl {ppl:.4}"
    ))
}

/// `log(sum(exp(row))) - row[token]`, in float64.
fn negative_log_likelihood(row: &[f32], token: u32) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() + f64::from(max) - row.get(token as usize).map_or(f64::NEG_INFINITY, |&l| f64::from(l))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihood_of_equal_logits_is_uniform() {
        let nll = negative_log_likelihood(&[3.0; 8], 5);
        assert!((nll - 8_f64.ln()).abs() < 1e-12, "{nll}");
        assert!(negative_log_likelihood(&[0.0, 100.0], 1) < 1e-9);
        assert!((negative_log_likelihood(&[0.0, 100.0], 0) - 100.0).abs() < 1e-9);
    }

    #[test]
    fn header_is_aligned() {
        let bytes = header(3, 7);
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        assert_eq!(bytes.len() as u64, 8 + length);
        assert_eq!(bytes.len() % 8, 0);
        let text: serde_json::Value = serde_json::from_slice(&bytes[8..]).expect("JSON");
        assert_eq!(text["logits"]["data_offsets"], json!([0, 84]));
    }
}
