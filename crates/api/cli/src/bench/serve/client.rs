//! A client of few lines: one connection that is kept, and the times at which bytes of an answer came.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// Until an answer is given up.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) struct Client {
    stream: BufReader<TcpStream>,
}

/// One event of a stream.
pub(super) struct Event {
    /// When its last byte had been read.
    pub at: Instant,
    pub data: Value,
}

impl Client {
    pub(super) fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).context("the server cannot be reached")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    fn send(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<()> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        // In one piece: two writes could become two packets.
        Ok(self.stream.get_mut().write_all(format!("{head}{body}").as_bytes())?)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "the server closed the connection");
        Ok(line)
    }

    /// Status, and bytes of the body; `None` where it comes in chunks.
    fn head(&mut self) -> anyhow::Result<(u16, Option<usize>)> {
        let first = self.line()?;
        let status = first.split_whitespace().nth(1).and_then(|s| s.parse().ok());
        let status = status.with_context(|| format!("no status in '{}'", first.trim()))?;
        let mut length = Some(0);
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = Some(value.trim().parse()?),
                "transfer-encoding" => length = None,
                _ => {}
            }
        }
        Ok((status, length))
    }

    fn chunk(&mut self) -> anyhow::Result<Vec<u8>> {
        let size = usize::from_str_radix(self.line()?.trim(), 16)?;
        let mut bytes = vec![0; size + 2];
        self.stream.read_exact(&mut bytes)?;
        bytes.truncate(size);
        Ok(bytes)
    }

    fn body(&mut self, length: Option<usize>) -> anyhow::Result<Vec<u8>> {
        let mut body = vec![0; length.unwrap_or(0)];
        if length.is_some() {
            self.stream.read_exact(&mut body)?;
            return Ok(body);
        }
        loop {
            let chunk = self.chunk()?;
            if chunk.is_empty() {
                return Ok(body);
            }
            body.extend(chunk);
        }
    }

    /// Asks and expects success.
    pub(super) fn ask(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<Vec<u8>> {
        self.send(method, path, body)?;
        let (status, length) = self.head()?;
        let body = self.body(length)?;
        ensure!(status < 300, "{path}: {status} {}", String::from_utf8_lossy(&body));
        Ok(body)
    }

    pub(super) fn post(&mut self, path: &str, body: &Value) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.ask("POST", path, &body.to_string())?)?)
    }

    /// Posts, and gives every event of the answer to `take` as it comes. Returns when the request was written.
    pub(super) fn stream(
        &mut self,
        path: &str,
        body: &str,
        mut take: impl FnMut(Event),
    ) -> anyhow::Result<Instant> {
        let sent = Instant::now();
        self.send("POST", path, body)?;
        let (status, length) = self.head()?;
        if status >= 300 || length.is_some() {
            let body = self.body(length)?;
            bail!("{path}: {status} {}", String::from_utf8_lossy(&body));
        }
        let mut held = Vec::new();
        loop {
            let chunk = self.chunk()?;
            let at = Instant::now();
            if chunk.is_empty() {
                return Ok(sent);
            }
            held.extend(chunk);
            while let Some(end) = held.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = held.drain(..end + 2).collect();
                let text = String::from_utf8(event)?;
                let data = text.lines().find_map(|l| l.strip_prefix("data: "));
                if let Some(data) = data.filter(|data| *data != "[DONE]") {
                    take(Event { at, data: serde_json::from_str(data)? });
                }
            }
        }
    }
}
