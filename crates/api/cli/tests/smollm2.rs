//! Commands on a GGUF model without recurrent state: text, perplexity, the tour.

mod common;

use std::fs;

use common::{json, repository, smollm2, stdout, text};
use serde_json::Value;

#[test]
fn generated_text_is_what_a_real_model_says() {
    let Some(model) = smollm2() else { return };
    let prompt = ["--model", &model, "--prompt", "The capital of France is", "-n", "24"];
    let said = stdout("generate --context 512", &prompt);
    assert!(said.contains("Paris"), "{said}");
}

#[test]
fn perplexity_is_that_of_the_golden() {
    let Some(model) = smollm2() else { return };
    let golden = fs::read_to_string(repository("conformance/golden/perplexity/smollm2.json"));
    let golden: Value = serde_json::from_str(&golden.expect("the golden")).expect("JSON");
    // The golden is of one window; its first 600 tokens are enough here.
    let logs = golden["first_log_probabilities"].as_array().expect("a list");
    let ids =
        fs::read_to_string(repository("conformance/golden/perplexity/kjv.ids")).expect("the ids");
    let words = ids.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty());
    let ids: Vec<&str> = words.take(logs.len() + 1).collect();
    let decoded = stdout("detokenize", &["--model", &model, "--tokens", &ids.join(",")]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("text");
    fs::write(&file, decoded.strip_suffix('\n').expect("a line")).expect("a file");
    let value = json("perplexity --context 2048", &["--model", &model, "--file", text(&file)]);
    assert_eq!(value["tokens"].as_u64(), Some(ids.len() as u64));
    assert_eq!(value["scored"].as_u64(), Some(logs.len() as u64));
    let wanted = -logs.iter().filter_map(Value::as_f64).sum::<f64>() / logs.len() as f64;
    let found = value["nll"].as_f64().expect("a number");
    assert!((found - wanted).abs() < 0.03, "{found} is not {wanted}");
    let ppl = value["ppl"].as_f64().expect("a number");
    assert!((ppl - found.exp()).abs() < 1e-9 * ppl);
    // Shorter windows know less.
    let short = json("perplexity --context 8", &["--model", &model, "--file", text(&file)]);
    assert!(short["nll"].as_f64() > value["nll"].as_f64(), "{short}");
    assert!(short["windows"].as_u64() > Some(1));
}

#[test]
fn a_model_without_recurrent_state_says_so() {
    let Some(model) = smollm2() else { return };
    let shown = stdout("ablate --prefix 40", &["--model", &model]);
    assert!(shown.contains("no recurrent state") && shown.contains(" 0 of 48"), "{shown}");
}

#[test]
fn the_demo_holds_on_it() {
    let Some(model) = smollm2() else { return };
    let shown = stdout("demo --fast", &["--model", &model]);
    assert!(shown.contains("every claim held") && !shown.contains('✗'), "{shown}");
}
