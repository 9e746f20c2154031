//! Runs the built binary as a user does.
#![allow(dead_code)] // each test program uses some of it

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// Recurrent and attention layers with random weights; no tokenizer.
pub(crate) const TINY: &str = "random:qwen3.5-tiny";

pub(crate) fn ampoule() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ampoule"));
    command.stdin(Stdio::null());
    command
}

/// Runs with arguments separated by spaces, and `more` after them.
pub(crate) fn run(args: &str, more: &[&str]) -> Output {
    let output = ampoule().args(args.split_whitespace()).args(more).output();
    output.expect("the binary runs")
}

/// Runs, expects success, and gives standard output.
pub(crate) fn stdout(args: &str, more: &[&str]) -> String {
    let output = run(args, more);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args} {more:?}: {:?}\n{said}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs with --json, expects success, and gives what was printed.
pub(crate) fn json(args: &str, more: &[&str]) -> Value {
    let mut more = more.to_vec();
    more.push("--json");
    let text = stdout(args, &more);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args}: {e}\n{text}"))
}

/// Runs, expects the exit code and one clear sentence on standard error, and gives that sentence.
pub(crate) fn error(code: i32, args: &str, more: &[&str]) -> String {
    let output = run(args, more);
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(code), "{args} {more:?}\n{said}");
    assert!(said.starts_with("error: "), "{said}");
    for word in ["panicked", "internal fault", "backtrace"] {
        assert!(!said.contains(word), "{said}");
    }
    if code == 1 {
        assert_eq!(said.trim_end().lines().count(), 1, "one line: {said}");
    }
    said
}

/// Runs with lines on standard input.
pub(crate) fn piped(args: &str, more: &[&str], lines: &str) -> Output {
    let mut command = ampoule();
    command.args(args.split_whitespace()).args(more).stdin(Stdio::piped());
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(lines.as_bytes()).expect("it reads its input");
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

/// Ids from a JSON list.
pub(crate) fn tokens(value: &Value) -> Vec<u64> {
    let list = value.as_array().unwrap_or_else(|| panic!("no list: {value}"));
    list.iter().map(|t| t.as_u64().expect("an id")).collect()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

/// A file of the repository.
pub(crate) fn repository(path: &str) -> String {
    root().join(path).to_str().expect("UTF-8").to_owned()
}

/// The real model's file; `None` only where AMPOULE_SKIP_SMOLLM2=1 says so.
///
/// # Panics
/// If it is not there.
pub(crate) fn smollm2() -> Option<String> {
    if std::env::var_os("AMPOULE_SKIP_SMOLLM2").is_some_and(|v| v == "1") {
        return None;
    }
    let named = std::env::var_os("AMPOULE_SMOLLM2").map(PathBuf::from);
    let path = named.unwrap_or_else(|| root().join("models/SmolLM2-135M-Instruct.Q4_1.gguf"));
    assert!(
        path.is_file(),
        "{} is missing: run 'AMPOULE_MODELS=models ampoule fetch smollm2' in the repository's root, or set \
         AMPOULE_SMOLLM2; AMPOULE_SKIP_SMOLLM2=1 skips these tests",
        path.display()
    );
    Some(path.to_str().expect("UTF-8").to_owned())
}

/// A server, ended with its owner.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) address: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a server on a free port of this machine.
pub(crate) fn serve(model: &str, more: &[&str]) -> Running {
    let mut command = ampoule();
    command.args([
        "serve",
        "--model",
        model,
        "--port",
        "0",
        "--context",
        "2048",
        "--device",
        "cpu",
    ]);
    let mut child = command.args(more).stdout(Stdio::piped()).spawn().expect("it runs");
    let mut line = String::new();
    let out = child.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut line).expect("a line");
    let address = line.trim().strip_prefix("listening on http://").expect("the address").to_owned();
    Running { child, address }
}
