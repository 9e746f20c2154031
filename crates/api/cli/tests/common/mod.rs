//! Runs the built binary as a user does.
#![allow(dead_code)] // each test program uses some of it

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
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

/// One request on a connection of its own: status and body.
fn exchange(address: &str, method: &str, path: &str, body: &Value) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
    let mut all = String::new();
    stream.read_to_string(&mut all).expect("it answers");
    let (head, body) = all.split_once("\r\n\r\n").expect("a head");
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// As [`exchange`], with a body of JSON.
pub(crate) fn call(address: &str, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let (status, body) = exchange(address, method, path, body);
    (status, serde_json::from_str(&body).unwrap_or(Value::Null))
}

/// Gets a text and expects success.
pub(crate) fn get_text(address: &str, path: &str) -> String {
    let (status, body) = exchange(address, "GET", path, &Value::Null);
    assert_eq!(status, 200, "{path}: {body}");
    body
}

/// A long stream whose first bytes have come.
pub(crate) fn stream_begun(address: &str) -> TcpStream {
    let mut busy = TcpStream::connect(address).expect("it listens");
    let body = serde_json::json!({ "prompt": "x", "max_tokens": 1500, "ignore_eos": true, "stream": true });
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    busy.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
    let mut some = [0; 400];
    busy.read_exact(&mut some).expect("a stream");
    busy
}

/// Posts and expects success.
pub(crate) fn post(address: &str, path: &str, body: &Value) -> Value {
    let (status, value) = call(address, "POST", path, body);
    assert!((200..300).contains(&status), "{path}: {status} {value}");
    value
}
