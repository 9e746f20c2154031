//! Commands on a real model: text, chat, perplexity.

mod common;

use std::fs;

use common::{json, piped, repository, smollm2, stdout, text, tokens};
use serde_json::Value;

#[test]
fn text_goes_to_tokens_and_back() {
    let Some(model) = smollm2() else { return };
    for sample in
        ["Hello, world", "  two  spaces\n\ttabs", "Kölle, 東京, 🚆🌧️", "<|im_end|> as text", "a"]
    {
        let value = json("tokenize", &["--model", &model, "--text", sample]);
        let ids = tokens(&value["tokens"]);
        assert_eq!(value["count"].as_u64(), Some(ids.len() as u64));
        let list: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let plain = stdout("tokenize", &["--model", &model, "--text", sample]);
        assert_eq!(plain.trim_end(), list.join(","));
        let back = json("detokenize", &["--model", &model, "--tokens", &list.join(",")]);
        assert_eq!(back["text"], *sample);
    }
    let plain = json("tokenize", &["--model", &model, "--text", "<|im_end|>"]);
    let special = json("tokenize", &["--model", &model, "--text", "<|im_end|>", "--special"]);
    assert!(plain["count"].as_u64() > special["count"].as_u64(), "{plain} {special}");
}

fn generate(model: &str, more: &[&str]) -> Value {
    json("generate --context 1024 --model", &[&[model], more].concat())
}

#[test]
fn generated_text_is_streamed_stopped_and_restored() {
    let Some(model) = smollm2() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("state.ampoule");
    let prompt = ["--prompt", "The capital of France is", "-n", "24"];
    let whole = generate(&model, &prompt);
    let said = whole["text"].as_str().expect("text");
    assert!(said.contains("Paris"), "{said}");
    let shown = stdout("generate --context 1024 --model", &[&[&model[..]], &prompt[..]].concat());
    assert_eq!(shown, format!("{said}\n"), "streamed text is the text");

    let stop: String = said.chars().skip(8).take(5).collect();
    let stopped = generate(&model, &[&prompt[..], &["--stop", &stop]].concat());
    assert_eq!(stopped["finish_reason"], "stop");
    let cut = said.find(&stop).expect("it is there");
    assert_eq!(stopped["text"].as_str(), Some(&said[..cut]));

    generate(&model, &["--prompt", "The capital of France", "-n", "0", "--save", text(&file)]);
    let warm = generate(&model, &["--restore", text(&file), "--prompt", " is", "-n", "24"]);
    assert_eq!(warm["tokens"], whole["tokens"], "restored and cold are the same");
    assert_eq!(warm["text"], whole["text"]);
    assert_eq!(warm["prompt_tokens"], 1);
    let end = generate(&model, &["--prompt", "Hi", "--chat", "-n", "60", "--temperature", "0.3"]);
    let position = end["position"].as_u64().expect("a position");
    assert_eq!(
        position,
        end["prompt_tokens"].as_u64().expect("tokens") + tokens(&end["tokens"]).len() as u64
    );
}

/// Runs a chat and gives its events.
fn chat(model: &str, more: &[&str], lines: &str) -> Vec<Value> {
    let all = [&["--model", model, "--json", "-n", "20"], more].concat();
    let output = piped("chat --context 1024", &all, lines);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn a_chat_forks_switches_undoes_and_reads_nothing_twice() {
    let Some(model) = smollm2() else { return };
    let lines = "Name a river.\n/fork side\nName a color.\n/switch main\nName a fruit.\n/undo\nName a fruit.\n\
                 /switch side\n/undo\nName a fruit.\n/retry\n/branches\n/stats\n";
    let events = chat(&model, &["--temperature", "0.8", "--seed", "5"], lines);
    let kinds: Vec<_> = events.iter().filter_map(|e| e["event"].as_str()).collect();
    assert_eq!(
        kinds,
        [
            "reply", "fork", "reply", "switch", "reply", "undo", "reply", "switch", "undo",
            "reply", "reply", "branches", "stats"
        ]
    );
    let first = events[0]["position"].as_u64().expect("a position");
    // Whatever happened in between, the state before is kept whole, and only the new message is read.
    for index in [2, 4, 6, 9] {
        let event = &events[index];
        assert_eq!(event["cached_tokens"].as_u64(), Some(first), "event {index}: {event}");
        assert!(event["read_tokens"].as_u64().is_some_and(|n| n > 3 && n < 30), "{event}");
    }
    assert_eq!(events[3]["position"], events[0]["position"], "main is where it was");
    assert_eq!(events[5]["position"], events[0]["position"], "undone");
    assert_eq!(events[4]["tokens"], events[6]["tokens"], "the same reply after an undo");
    assert_eq!(events[4]["tokens"], events[9]["tokens"], "and on another branch of the same state");
    assert_ne!(events[2]["tokens"], events[4]["tokens"], "another message gets another reply");
    assert_ne!(events[9]["tokens"], events[10]["tokens"], "another seed gives another reply");
    assert_eq!(events[10]["read_tokens"], 0, "a retry reads nothing");
    assert_eq!(events[11]["branches"].as_array().map(Vec::len), Some(2));
    let stats = &events[12];
    assert_eq!((&stats["branch"], &stats["context"]), (&"side".into(), &1024.into()));
    assert!(stats["capsule"]["shared_row_bytes"].as_u64().is_some_and(|n| n > 0), "{stats}");
}

#[test]
fn a_chat_is_what_the_template_says() {
    let Some(model) = smollm2() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("chat.ampoule");
    let path = text(&file);
    let lines = format!("Name a river.\n/save {path}\nAnd a mountain?\n");
    let events = chat(&model, &["--temperature", "0"], &lines);
    let greedy = ["--chat", "-n", "20"];
    let alone = generate(&model, &[&greedy[..], &["--prompt", "Name a river."]].concat());
    assert_eq!(events[0]["tokens"], alone["tokens"], "the first turn is generate --chat");

    // The second turn: in a chat that loads the first, and by generate.
    let lines = format!("/load {path}\nAnd a mountain?\n");
    let loaded = chat(&model, &[], &lines);
    assert_eq!(loaded[0]["position"], events[0]["position"]);
    assert_eq!(
        loaded[1]["tokens"], events[2]["tokens"],
        "a loaded chat goes on as the one that was saved"
    );
    let next = ["--restore", path, "--prompt", "And a mountain?"];
    let restored = generate(&model, &[&greedy[..], &next].concat());
    assert_eq!(restored["tokens"], events[2]["tokens"]);
    assert_eq!(restored["cached_tokens"], events[0]["position"]);

    // And cold, written out by hand.
    let said = events[0]["text"].as_str().expect("text");
    let ended = events[0]["finish_reason"] == "stop";
    let by_hand = format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n\
         <|im_start|>user\nAnd a mountain?<|im_end|>\n<|im_start|>assistant\n"
    );
    let cold = generate(&model, &["--prompt", &by_hand, "-n", "20"]);
    // Its reply tokens were read, not drawn, so only what follows can be compared; the text is the same.
    assert_eq!(cold["text"], events[2]["text"], "ended: {ended}");
    assert_eq!(cold["prompt_tokens"].as_u64().map(|n| n + 20), events[2]["position"].as_u64());
}

#[test]
fn chat_text_goes_to_standard_output_alone() {
    let Some(model) = smollm2() else { return };
    let args = ["--model", &model[..], "-n", "8", "--temperature", "0"];
    let output = piped("chat --context 512", &args, "Hi\n/fork x\n/nonsense\n");
    assert_eq!(output.status.code(), Some(1), "a line failed");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.lines().count(), 1, "the reply: {said}");
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("error: there is no command '/nonsense'"), "{notes}");
    let output = piped(
        "chat --context 32",
        &args,
        "This message and the template are too long for it\n/quit\n",
    );
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("error: the context holds 32 tokens"), "{notes}");
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
