//! A server that listens, and a client of few lines.
#![allow(dead_code)] // each test program uses some of it

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use ampoule::{Ampoule, Device, EngineOptions, LoadOptions};
use ampoule_server::{Config, Server, serve};
use serde_json::Value;

pub(crate) const TINY: &str = "random:qwen3.5-tiny";
pub(crate) const NANO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../assets/ampoule-nano");

pub(crate) fn config() -> Config {
    Config {
        address: "127.0.0.1:0".parse().unwrap(),
        model_name: Some("tiny".to_owned()),
        slots: 2,
        grace: Duration::from_secs(2),
        faults: true,
        ..Config::default()
    }
}

pub(crate) fn start(config: Config) -> Server {
    start_with(config, 4096, 1 << 30)
}

pub(crate) fn start_with(config: Config, context: usize, capsule_bytes: usize) -> Server {
    start_model(TINY, config, context, capsule_bytes)
}

/// The trained model of the repository: attention and recurrent layers, and a tokenizer of its own.
pub(crate) fn nano(config: Config) -> Server {
    start_model(NANO, config, 4096, 1 << 30)
}

fn start_model(model: &str, config: Config, context: usize, capsule_bytes: usize) -> Server {
    let options = LoadOptions {
        device: Device::Cpu,
        threads: 1,
        context,
        engine: EngineOptions {
            slots: config.slots + 1,
            capsule_bytes,
            ..EngineOptions::default()
        },
        ..LoadOptions::default()
    };
    let model = Ampoule::load(model, &options, &mut |_, _| {}).unwrap();
    serve(model, config, false).unwrap()
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// The data of events, in order.
    pub(crate) fn events(&self) -> Vec<(String, Value)> {
        let text = String::from_utf8(self.body.clone()).unwrap();
        let mut out = Vec::new();
        for block in text.split("\n\n") {
            let mut name = String::new();
            for line in block.lines() {
                if let Some(event) = line.strip_prefix("event: ") {
                    event.clone_into(&mut name);
                } else if let Some(data) = line.strip_prefix("data: ")
                    && data != "[DONE]"
                {
                    out.push((name.clone(), serde_json::from_str(data).unwrap()));
                }
            }
        }
        out
    }
}

pub(crate) fn open(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

pub(crate) fn head(method: &str, path: &str, length: usize, more: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nconnection: close\r\n{more}\r\n"
    )
}

/// Sends bytes as they are and reads the answer.
pub(crate) fn raw(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut stream = open(address);
    // A server that refuses early may close before all is written.
    let _ = stream.write_all(bytes);
    answer(stream)
}

pub(crate) fn answer(stream: TcpStream) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let _ = reader.read_line(&mut line);
    let status = line.split_whitespace().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.trim().split_once(": ") {
            headers.push((name.to_owned(), value.to_owned()));
        }
    }
    let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let mut body = Vec::new();
    if chunked {
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                break;
            }
            let size = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
            if size == 0 {
                break;
            }
            let mut chunk = vec![0; size + 2];
            if reader.read_exact(&mut chunk).is_err() {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        let _ = reader.read_to_end(&mut body);
    }
    Answer { status, headers, body }
}

pub(crate) fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
    more: &str,
) -> Answer {
    let head = head(method, path, body.len(), more);
    raw(address, format!("{head}{body}").as_bytes())
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Answer {
    request(address, "GET", path, "", "")
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    request(address, "POST", path, &body.to_string(), "")
}

/// Posts and expects success.
pub(crate) fn ok(address: SocketAddr, path: &str, body: &Value) -> Value {
    let answer = post(address, path, body);
    let said = String::from_utf8_lossy(&answer.body).into_owned();
    assert!((200..300).contains(&answer.status), "{path} {body}: {} {said}", answer.status);
    answer.json()
}

/// A figure of /metrics.
pub(crate) fn metric(address: SocketAddr, name: &str) -> u64 {
    let answer = get(address, "/metrics");
    let text = String::from_utf8(answer.body).unwrap();
    let line = text.lines().find(|l| l.split_whitespace().next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.split_whitespace().nth(1).and_then(|v| v.parse::<f64>().ok()).unwrap() as u64
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it never came about: {what}");
}
