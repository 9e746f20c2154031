//! Commands without `--model`: on ampoule-nano, which is part of the program. None of them may need a file or a network.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;

use common::{ampoule, error, json, piped, repository, run, stdout, text, tokens};
use serde_json::Value;

#[test]
fn the_tour_holds_in_an_empty_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    // No home, no models, and no python to fetch one with.
    let output = ampoule()
        .args(["demo", "--fast", "--device", "cpu"])
        .current_dir(folder.path())
        .env_remove("HOME")
        .env_remove("AMPOULE_MODELS")
        .env("PATH", folder.path())
        .output()
        .expect("the binary runs");
    let shown = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}{said}");
    assert!(shown.starts_with("ampoule-nano on "), "{shown}");
    assert!(shown.contains("every claim held") && !shown.contains('✗'), "{shown}");
    assert!(shown.matches('✓').count() >= 18, "{shown}");
    // What a reader can judge: the state before gives the right answer, and without it the model says something else.
    let answer = |label: &str| {
        let line = shown.lines().find(|l| l.trim_start().starts_with(label)).expect(label);
        line.split_once(label).map(|(_, said)| said.trim().to_owned()).expect("an answer")
    };
    assert_eq!(answer("whole capsule:"), "\"The green book is on the shelf in the bedroom.\"");
    assert_ne!(answer("rows alone:"), answer("whole capsule:"));
    assert_eq!(answer("cold:"), answer("restored:"));
    let left = std::fs::read_dir(folder.path()).expect("the folder").count();
    assert_eq!(left, 0, "files are left behind");
}

#[test]
fn text_goes_to_tokens_and_back() {
    for sample in
        ["Hello, world", "  two  spaces\n\ttabs", "Kölle, 東京, 🚆🌧️", "<|im_end|> as text", "a"]
    {
        let value = json("tokenize", &["--text", sample]);
        let ids = tokens(&value["tokens"]);
        assert_eq!(value["count"].as_u64(), Some(ids.len() as u64));
        let list: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let plain = stdout("tokenize", &["--text", sample]);
        assert_eq!(plain.trim_end(), list.join(","));
        let back = json("detokenize", &["--tokens", &list.join(",")]);
        assert_eq!(back["text"], *sample);
    }
    let plain = json("tokenize", &["--text", "<|im_end|>"]);
    let special = json("tokenize", &["--text", "<|im_end|>", "--special"]);
    assert!(plain["count"].as_u64() > special["count"].as_u64(), "{plain} {special}");
}

fn generate(more: &[&str]) -> Value {
    json("generate --context 1024", more)
}

#[test]
fn generated_text_is_streamed_stopped_and_restored() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("state.ampoule");
    let prompt = ["--prompt", "Once upon a time, there was a", "-n", "24"];
    let whole = generate(&prompt);
    assert_eq!(whole["model"], "ampoule-nano");
    let said = whole["text"].as_str().expect("text");
    let shown = stdout("generate --context 1024", &prompt);
    assert_eq!(shown, format!("{said}\n"), "streamed text is the text");

    let stop: String = said.chars().skip(8).take(5).collect();
    let stopped = generate(&[&prompt[..], &["--stop", &stop]].concat());
    assert_eq!(stopped["finish_reason"], "stop");
    let cut = said.find(&stop).expect("it is there");
    assert_eq!(stopped["text"].as_str(), Some(&said[..cut]));

    generate(&["--prompt", "Once upon a time, there was", "-n", "0", "--save", text(&file)]);
    let warm = generate(&["--restore", text(&file), "--prompt", " a", "-n", "24"]);
    assert_eq!(warm["tokens"], whole["tokens"], "restored and cold are the same");
    assert_eq!(warm["text"], whole["text"]);
    assert_eq!(warm["prompt_tokens"], 1);
    // The folder of the repository is the same model: its capsules fit.
    let model = repository("assets/ampoule-nano");
    let other =
        generate(&["--model", &model, "--restore", text(&file), "--prompt", " a", "-n", "24"]);
    assert_eq!(other["tokens"], whole["tokens"]);

    let asked = "The red cup is on the table in the kitchen. Where is the red cup?";
    let end = generate(&["--prompt", asked, "--chat", "-n", "60"]);
    assert_eq!(end["text"], "The red cup is on the table in the kitchen.");
    assert_eq!(end["finish_reason"], "stop");
    let position = end["position"].as_u64().expect("a position");
    assert_eq!(
        position,
        end["prompt_tokens"].as_u64().expect("tokens") + tokens(&end["tokens"]).len() as u64
    );
}

/// Runs a chat and gives its events.
fn chat(more: &[&str], lines: &str) -> Vec<Value> {
    let all = [&["--json", "-n", "20"], more].concat();
    let output = piped("chat --context 1024", &all, lines);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn a_chat_forks_switches_undoes_and_reads_nothing_twice() {
    let lines = "Tell me a story about a river.\n/fork side\nTell me a story about a king.\n/switch main\n\
                 Tell me about bread.\n/undo\nTell me about bread.\n/switch side\n/undo\nTell me about bread.\n/retry\n\
                 /branches\n/stats\n";
    let events = chat(&["--temperature", "0.8", "--seed", "5"], lines);
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
fn a_chat_remembers_what_was_said_and_forgets_what_was_undone() {
    let lines = "My name is Clara. I live in Oslo.\n/fork x\nWhere do I live?\n/undo\nWhat is my name?\n/switch main\n\
                 /undo\nWhat is my name?\n";
    let events = chat(&["--temperature", "0"], lines);
    let said: Vec<&str> = events.iter().filter_map(|e| e["text"].as_str()).collect();
    assert_eq!(said[1..3], ["You live in Oslo.", "Your name is Clara."]);
    assert!(!said[3].contains("Clara"), "it was taken back: {}", said[3]);
}

#[test]
fn a_chat_is_what_the_template_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("chat.ampoule");
    let path = text(&file);
    let (one, two) = ("Tell me a story about a river.", "And one about a mountain.");
    let lines = format!("{one}\n/save {path}\n{two}\n");
    let events = chat(&["--temperature", "0"], &lines);
    let greedy = ["--chat", "-n", "20"];
    let alone = generate(&[&greedy[..], &["--prompt", one]].concat());
    assert_eq!(events[0]["tokens"], alone["tokens"], "the first turn is generate --chat");

    // The second turn: in a chat that loads the first, and by generate.
    let lines = format!("/load {path}\n{two}\n");
    let loaded = chat(&[], &lines);
    assert_eq!(loaded[0]["position"], events[0]["position"]);
    assert_eq!(
        loaded[1]["tokens"], events[2]["tokens"],
        "a loaded chat goes on as the one that was saved"
    );
    let restored = generate(&[&greedy[..], &["--restore", path, "--prompt", two]].concat());
    assert_eq!(restored["tokens"], events[2]["tokens"]);
    assert_eq!(restored["cached_tokens"], events[0]["position"]);

    // And cold, written out by hand.
    let said = events[0]["text"].as_str().expect("text");
    let by_hand = format!(
        "<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n\
         <|im_start|>user\n{two}<|im_end|>\n<|im_start|>assistant\n"
    );
    let cold = generate(&["--prompt", &by_hand, "-n", "20"]);
    // Its reply tokens were read, not drawn, so only what follows can be compared; the text is the same.
    assert_eq!(cold["text"], events[2]["text"]);
    assert_eq!(cold["prompt_tokens"].as_u64().map(|n| n + 20), events[2]["position"].as_u64());
}

#[test]
fn chat_text_goes_to_standard_output_alone() {
    let args = ["-n", "8", "--temperature", "0"];
    let output = piped("chat --context 512", &args, "Hi\n/fork x\n/nonsense\n");
    assert_eq!(output.status.code(), Some(1), "a line failed");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.lines().count(), 1, "the reply: {said}");
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("error: there is no command '/nonsense'"), "{notes}");
    let long = "This message and the template are too long for it, because thirty-two tokens are not much\n/quit\n";
    let output = piped("chat --context 32", &args, long);
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("error: the context holds 32 tokens"), "{notes}");
}

#[test]
fn without_its_recurrent_state_it_says_something_else() {
    let value = json("ablate --prefix 120", &[]);
    assert_eq!((&value["model"], &value["passed"]), (&"ampoule-nano".into(), &true.into()));
    assert_eq!((&value["tokens"], &value["differ"]["whole"]), (&48.into(), &0.into()));
    assert!(value["differ"]["zeroed"].as_u64().is_some_and(|n| n >= 30), "{value}");
}

#[test]
fn it_is_served_where_no_other_model_is_named() {
    let mut command = ampoule();
    command.args(["serve", "--port", "0", "--context", "512", "--device", "cpu"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it runs");
    let mut line = String::new();
    let out = child.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut line).expect("a line");
    let address = line.trim().strip_prefix("listening on http://").expect("the address").to_owned();
    let mut stream = TcpStream::connect(&address).expect("it listens");
    stream
        .write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .expect("it reads");
    let mut all = String::new();
    stream.read_to_string(&mut all).expect("it answers");
    child.kill().expect("it ends");
    child.wait().expect("it ends");
    assert!(all.contains("\"ampoule-nano\""), "{all}");
}

#[test]
fn a_folder_of_its_name_is_pointed_to() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("ampoule-nano")).expect("a folder");
    let output = ampoule()
        .args(["generate", "--prompt", "Hi", "-n", "1"])
        .current_dir(folder.path())
        .output()
        .expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("./ampoule-nano"), "{said}");
    let said = error(1, "fetch ampoule-nano", &[]);
    assert!(said.contains("part of this program"), "{said}");
    let help = String::from_utf8(run("generate", &["--help"]).stdout).expect("UTF-8");
    assert!(help.contains("[default: ampoule-nano]"), "{help}");
}

#[test]
fn a_context_beyond_the_models_own_is_warned_of() {
    let note = |context: &str| {
        let output = run("generate --prompt Hi -n 1 --context", &[context]);
        assert!(output.status.success());
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    assert!(note("5000").contains("more than the 4096 that ampoule-nano was made for"));
    assert!(!note("4096").contains("made for"));
}
