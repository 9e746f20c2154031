//! A server process under load: connections that idle, streams that talk, and what that does to errors, /health and memory.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ampoule::{Ampoule, TEXTS};
use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::client::Client;
use super::{ServeBenchArgs, Times};
use crate::args::GlobalArgs;
use crate::bench::Outcome;
use crate::bench::chart::{Chart, Series};
use crate::commands::load;
use crate::output::{Progress, Table, figure, ms};

/// Tokens of a reply, and turns of a conversation before a new one begins.
const REPLY: usize = 32;
const TURNS: usize = 6;
/// Memory for capsules, in MiB: little, so that it is full long before the first minute is over.
const CAPSULES: usize = 32;
const HEALTH_EVERY: Duration = Duration::from_millis(100);

/// A server of its own, so that its memory is its own.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(
    args: &ServeBenchArgs,
    global: &GlobalArgs,
    context: usize,
) -> anyhow::Result<(Served, SocketAddr)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "--port", "0", "--model"]);
    command.arg(&args.model.model.0);
    let slots = args.streams;
    command
        .args(GlobalArgs { slots, context, capsule_mib: CAPSULES, ..global.clone() }.arguments());
    let mut served = Served(command.stdout(Stdio::piped()).spawn()?);
    let out = served.0.stdout.take().context("a pipe")?;
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    let address = line.trim().strip_prefix("listening on http://");
    let address = address.context("the server did not start")?.parse()?;
    Ok((served, address))
}

/// Resident bytes of a process, where the system tells.
fn resident(process: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// What all threads write to.
#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    replies: AtomicU64,
    tokens: AtomicU64,
    errors: Mutex<Vec<String>>,
    first_ms: Mutex<Vec<f64>>,
    health_ms: Mutex<Vec<f64>>,
}

impl Seen {
    fn going(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn note(&self, what: &str, error: &anyhow::Error) {
        let mut all = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(format!("{what}: {error:#}"));
    }

    fn put(list: &Mutex<Vec<f64>>, value: f64) {
        list.lock().unwrap_or_else(PoisonError::into_inner).push(value);
    }
}

/// Conversations one after the other, each reply streamed.
fn talk(address: SocketAddr, number: usize, seen: &Seen) -> anyhow::Result<()> {
    let mut client = Client::new(address)?;
    let mut round = 0;
    while seen.going() {
        round += 1;
        let system = format!("Conversation {round} of client {number}. {}", TEXTS[number % 5]);
        let mut messages = vec![json!({ "role": "system", "content": system })];
        for turn in 0..TURNS {
            if !seen.going() {
                return Ok(());
            }
            let text = TEXTS[(number + turn + round) % TEXTS.len()];
            let words: Vec<&str> = text.split_whitespace().take(20).collect();
            let content = format!("Turn {turn}: {}", words.join(" "));
            messages.push(json!({ "role": "user", "content": content }));
            let body = json!({
                "messages": messages, "max_tokens": REPLY, "temperature": 0.8, "seed": round * TURNS + turn,
                "ignore_eos": true, "stream": true, "stream_options": { "include_usage": true },
            });
            let (mut said, mut first, mut finished, mut usage) =
                (String::new(), None, Value::Null, Value::Null);
            let sent = client.stream("/v1/chat/completions", &body.to_string(), |event| {
                let choice = &event.data["choices"][0];
                if let Some(text) = choice["delta"]["content"].as_str().filter(|t| !t.is_empty()) {
                    first.get_or_insert(event.at);
                    said.push_str(text);
                }
                if !choice["finish_reason"].is_null() {
                    finished = choice["finish_reason"].clone();
                }
                if event.data["usage"].is_object() || event.data["error"].is_object() {
                    usage = event.data;
                }
            })?;
            ensure!(finished == "length", "a stream ended with {finished}: {usage}");
            let tokens = usage["usage"]["completion_tokens"].as_u64();
            ensure!(tokens == Some(REPLY as u64), "a stream of {tokens:?} tokens");
            seen.replies.fetch_add(1, Ordering::Relaxed);
            seen.tokens.fetch_add(REPLY as u64, Ordering::Relaxed);
            if let Some(first) = first {
                Seen::put(&seen.first_ms, ms(first.duration_since(sent)));
            }
            messages.push(json!({ "role": "assistant", "content": said }));
        }
    }
    Ok(())
}

/// Asks /health again and again, each second time on a new connection.
fn look(address: SocketAddr, seen: &Seen) -> anyhow::Result<()> {
    let mut kept = Client::new(address)?;
    let mut even = false;
    while seen.going() {
        let start = Instant::now();
        even = !even;
        if even {
            kept.ask("GET", "/health", "")?;
        } else {
            Client::new(address)?.ask("GET", "/health", "")?;
        }
        Seen::put(&seen.health_ms, ms(start.elapsed()));
        std::thread::sleep(HEALTH_EVERY.saturating_sub(start.elapsed()));
    }
    Ok(())
}

pub(super) fn run(
    args: &ServeBenchArgs,
    global: &GlobalArgs,
    seconds: u64,
    progress: Progress,
) -> anyhow::Result<(Ampoule, Outcome)> {
    let context = if global.context == 0 { 2048 } else { global.context };
    let (served, address) = serve(args, global, context)?;
    let process = served.0.id();
    let seen = Seen::default();
    let mut idle = Vec::with_capacity(args.connections);
    for _ in 0..args.connections {
        let mut client = Client::new(address)?;
        client.ask("GET", "/health", "")?;
        idle.push(client);
    }
    let bar = progress.count(seconds as usize, "load");
    let start = Instant::now();
    let mut memory = Vec::new();
    std::thread::scope(|scope| {
        for number in 0..args.streams {
            let seen = &seen;
            scope.spawn(move || {
                let ended = talk(address, number, seen);
                ended.unwrap_or_else(|error| seen.note("stream", &error));
            });
        }
        scope.spawn(|| look(address, &seen).unwrap_or_else(|error| seen.note("health", &error)));
        while start.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_secs(1));
            bar.inc(1);
            if let Some(bytes) = resident(process) {
                memory.push((start.elapsed().as_secs_f64(), bytes as f64 / MIB));
            }
        }
        seen.stop.store(true, Ordering::Relaxed);
    });
    bar.finish_and_clear();
    // Every connection that idled is still good for a request.
    let mut alive = 0;
    for client in &mut idle {
        match client.ask("GET", "/health", "") {
            Ok(_) => alive += 1,
            Err(error) => seen.note("idle connection", &error),
        }
    }
    let metrics = String::from_utf8(Client::new(address)?.ask("GET", "/metrics", "")?)?;
    drop(served);
    let outcome = report(args, seconds, alive, &memory, &metrics, &seen);
    // Only for what the record says of the device.
    let small = GlobalArgs { slots: 1, ..global.clone() };
    let model = load(&args.model.model, &small, Some(256), Progress::new(true))?;
    let errors = seen.errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(errors.is_empty(), "{} errors; the first: {}", errors.len(), errors[0]);
    Ok((model, outcome))
}

const MIB: f64 = (1 << 20) as f64;

fn report(
    args: &ServeBenchArgs,
    seconds: u64,
    alive: usize,
    memory: &[(f64, f64)],
    metrics: &str,
    seen: &Seen,
) -> Outcome {
    let take = |list: &Mutex<Vec<f64>>| {
        Times::from(std::mem::take(&mut *list.lock().unwrap_or_else(PoisonError::into_inner)))
    };
    let (first, health) = (take(&seen.first_ms), take(&seen.health_ms));
    // The first fifth fills caches: five minutes leave four.
    let from = seconds as f64 / 5.0;
    let steady: Vec<(f64, f64)> = memory.iter().copied().filter(|(at, _)| *at >= from).collect();
    let slope = slope(&steady) * 60.0;
    let (early, late) = (steady.first().map_or(0.0, |m| m.1), steady.last().map_or(0.0, |m| m.1));
    let worst = health.reps_ms.iter().copied().fold(0.0, f64::max);
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let errors = seen.errors.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let figure_of = |name: &str| {
        let line = metrics.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().parse::<f64>().ok()
    };
    let mut table = Table::new(&["", ""]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("replies", count(&seen.replies).to_string());
    row("tokens", count(&seen.tokens).to_string());
    row("errors", errors.len().to_string());
    row("idle connections alive at the end", format!("{alive} of {}", args.connections));
    row("first byte of content, ms, median and p99", pair(&first));
    row("/health, ms, median and p99", pair(&health));
    row("/health, ms, worst", figure(worst));
    row("memory after a fifth of the time, MiB", figure(early));
    row("memory at the end, MiB", figure(late));
    row("memory, MiB a minute", format!("{slope:.3}"));
    let point = json!({
        "seconds": seconds, "idle_connections": args.connections, "streams": args.streams,
        "replies": count(&seen.replies), "tokens": count(&seen.tokens), "errors": errors, "idle_alive": alive,
        "ttft": { "median_ms": first.median_ms, "p99_ms": first.p99_ms },
        "health": {
            "asked": health.reps_ms.len(), "median_ms": health.median_ms, "p99_ms": health.p99_ms,
            "max_ms": worst,
        },
        "memory": {
            "early_mib": early, "late_mib": late, "mib_per_minute": slope,
            "mib": memory.iter().step_by(5).map(|(at, mib)| json!([at.round(), mib])).collect::<Vec<_>>(),
        },
        "metrics": {
            "prompt_tokens": figure_of("ampoule_prompt_tokens_total "),
            "prompt_tokens_cached": figure_of("ampoule_prompt_tokens_cached_total "),
            "capsule_evictions": figure_of("ampoule_capsule_evictions_total "),
            "engine_panics": figure_of("ampoule_engine_panics_total "),
            "request_failures": figure_of("ampoule_request_failures_total "),
        },
    });
    let chart = Chart {
        title: "Memory of the server under load".to_owned(),
        x: "seconds".to_owned(),
        y: "MiB".to_owned(),
        log: false,
        series: vec![Series {
            name: "resident".to_owned(),
            points: memory.iter().copied().step_by((memory.len() / 12).max(1)).collect(),
        }],
    };
    Outcome { points: vec![point], table, chart, text: Vec::new() }
}

fn pair(times: &Times) -> String {
    format!("{} / {}", figure(times.median_ms), figure(times.p99_ms))
}

/// Of the line nearest to all points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0 / n, y + p.1 / n));
    let (over, under) = points.iter().fold((0.0, 0.0), |(over, under), p| {
        (over + (p.0 - x) * (p.1 - y), under + (p.0 - x) * (p.0 - x))
    });
    if under > 0.0 { over / under } else { 0.0 }
}

#[cfg(test)]
mod tests {
    #[test]
    fn slopes() {
        let line: Vec<(f64, f64)> =
            (0..10).map(|x| (f64::from(x), 3.0 + 0.5 * f64::from(x))).collect();
        assert!((super::slope(&line) - 0.5).abs() < 1e-12);
        assert_eq!(super::slope(&line[..1]), 0.0);
        assert_eq!(super::slope(&[]), 0.0);
    }
}
