//! SmolLM2-135M-Instruct (Q4_1): perplexity against transformers, and the exactness levels on a real model.

mod splits;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ampoule::{Ampoule, LoadOptions, VerifyOptions};
use ampoule_cpu::CpuBackend;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The model's path; `None` only where somebody asked to skip these tests.
fn model_path() -> Option<PathBuf> {
    let path = std::env::var_os("AMPOULE_SMOLLM2").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(FILE),
        PathBuf::from,
    );
    if path.exists() {
        return Some(path);
    }
    if std::env::var_os("AMPOULE_SKIP_SMOLLM2").is_some() {
        println!("skipped: {} is not there and AMPOULE_SKIP_SMOLLM2 is set", path.display());
        return None;
    }
    panic!(
        "{} is not there: `cargo xtask test` fetches it, AMPOULE_SKIP_SMOLLM2=1 skips these tests",
        path.display()
    );
}

fn load(context: usize) -> Option<Ampoule> {
    let path = model_path()?;
    let options = LoadOptions { context, ..LoadOptions::default() };
    Some(
        Ampoule::load_on(&CpuBackend::new(2), path.to_str().unwrap(), &options, &mut |_, _| {})
            .unwrap(),
    )
}

fn golden(name: &str) -> String {
    std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/perplexity").join(name),
    )
    .unwrap()
}

#[test]
fn perplexity_is_that_of_the_dequantised_model() {
    let Some(mut model) = load(6000) else { return };
    let ids: Vec<u32> = golden("kjv.ids").split(',').map(|id| id.trim().parse().unwrap()).collect();
    assert_eq!(
        model.encode_prompt(&golden("kjv.txt")).unwrap(),
        ids,
        "the tokenizer differs from the reference"
    );
    let expected: serde_json::Value = serde_json::from_str(&golden("smollm2.json")).unwrap();
    let slot = model.engine.create_slot().unwrap();
    let mut scores = Vec::with_capacity(ids.len());
    let mut sink = |logits: &[f32]| {
        if let Some(&next) = ids.get(scores.len() + 1) {
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|l| f64::from(l - highest).exp()).sum();
            scores.push(f64::from(logits[next as usize] - highest) - sum.ln());
        }
        ControlFlow::Continue(())
    };
    model.engine.score(slot, &ids, &mut sink).unwrap();
    assert_eq!(scores.len(), ids.len() - 1);
    let nll = -scores.iter().sum::<f64>() / scores.len() as f64;
    let (perplexity, wanted) = (nll.exp(), expected["perplexity"].as_f64().unwrap());
    println!("{} tokens: perplexity {perplexity:.5}, reference {wanted:.5}", ids.len());
    assert!(
        (perplexity / wanted - 1.0).abs() < 1e-3,
        "perplexity {perplexity}, reference {wanted}"
    );
    let first = expected["first_log_probabilities"].as_array().unwrap();
    assert_eq!(first.len(), 64, "the golden has lost its log probabilities");
    for (got, wanted) in scores.iter().zip(first) {
        let wanted = wanted.as_f64().unwrap();
        assert!((got - wanted).abs() < 0.02, "log probability {got}, reference {wanted}");
    }
}

#[test]
fn exactness_levels() {
    let Some(mut model) = load(512) else { return };
    model.engine.poison_between_replays(true);
    let options = VerifyOptions { trials: 15, max_tokens: 120, decode: 4, seed: 3 };
    let report = model.verify(&options, &mut |_, _| {}).unwrap();
    assert!(report.passed(), "{report:?}");
}

#[test]
fn splits_of_a_text_are_cold() {
    let Some(mut model) = load(512) else { return };
    let tokens = ampoule::sample_tokens(&model, 200, 21).unwrap();
    // Apart by a number that no size of a chunk is a multiple of.
    splits::splits_are_cold(&mut model, &tokens, 7);
}
