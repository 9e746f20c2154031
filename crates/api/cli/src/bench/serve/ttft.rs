//! Time to first token of warm turns: over HTTP, from the request's first byte to the first byte of content, and in the
//! engine alone, which restores the same boundary, reads the same tokens and draws one, as the server does: the token is
//! known before it is read. What reading it takes is told beside that.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ampoule::{Ampoule, Capsule, SamplingParams, SlotId, TEXTS};
use ampoule_server::Config;
use anyhow::Context;
use serde_json::{Value, json};

use super::client::Client;
use super::{ServeBenchArgs, Times, measured};
use crate::args::GlobalArgs;
use crate::bench::Outcome;
use crate::bench::chart::{Chart, Series};
use crate::commands::load;
use crate::output::{Progress, Table, figure, ms};

/// Tokens of a reply.
const REPLY: usize = 8;
/// Tokens that a turn may add: enough for every model's way of dividing the texts.
const TURN: usize = 96;

/// Before each turn, on both sides: who talks to a model pauses, and threads and caches are cold then.
const PAUSE: Duration = Duration::from_millis(30);

/// How a client sends its conversation.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Style {
    /// What was sent before, and the new message.
    Append,
    /// The same with a line near the end that is different each time.
    Date,
}

struct Turn {
    /// The prompt's tokens, and how many of them a boundary brought.
    tokens: Vec<u32>,
    cached: usize,
    http_ms: f64,
    /// What the server says of it.
    timings: Value,
}

pub(super) fn run(
    args: &ServeBenchArgs,
    global: &GlobalArgs,
    progress: Progress,
) -> anyhow::Result<(Ampoule, Outcome)> {
    let global = GlobalArgs { slots: 2, ..global.clone() };
    let turns = usize::from(args.turns);
    let enough = Some((turns * TURN + 512).next_multiple_of(256));
    let mut table = Table::new(&[
        "conversation",
        "tokens",
        "read a turn",
        "HTTP ms",
        "p99",
        "engine ms",
        "p99",
        "added ms",
        "median of differences",
    ]);
    let (mut points, mut series) = (Vec::new(), Vec::new());
    let mut last = None;
    for &style in &args.conversation {
        let name = match style {
            Style::Append => "append",
            Style::Date => "date",
        };
        let model = load(&args.model.model, &global, enough, progress)?;
        let config = Config {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            slots: 1,
            ..Config::default()
        };
        let server = ampoule_server::serve(model, config, false)?;
        let model = load(&args.model.model, &global, enough, Progress::new(true))?;
        let mut replay = Replay::new(model)?;
        let bar = progress.count(turns, name);
        // Turn by turn, first the server and then the engine: what else the machine does falls on both.
        let said = talk(server.address(), turns, style, &mut |turn| {
            bar.inc(1);
            replay.turn(turn)
        });
        server.stop()?;
        let said = said?;
        bar.finish_and_clear();
        let Replay { model, times, read, step, .. } = replay;
        let (engine, engine_read, engine_step) =
            (Times::from(times), Times::from(read), Times::from(step));
        let added_each: Vec<f64> = said[1..]
            .iter()
            .zip(&engine.reps_ms)
            .map(|(turn, engine)| turn.http_ms - engine)
            .collect();
        let added_each = Times::from(added_each);
        // The first turn is cold.
        let http = Times::from(said[1..].iter().map(|t| t.http_ms).collect::<Vec<_>>());
        let added = http.median_ms - engine.median_ms;
        let read: usize = said[1..].iter().map(|t| t.tokens.len() - t.cached).sum();
        let read = read as f64 / (turns - 1) as f64;
        let total = said.last().map_or(0, |t| t.tokens.len());
        table.row([
            name.to_owned(),
            total.to_string(),
            figure(read),
            figure(http.median_ms),
            figure(http.p99_ms),
            figure(engine.median_ms),
            figure(engine.p99_ms),
            figure(added),
            figure(added_each.median_ms),
        ]);
        let line = |times: &Times| {
            let positions = said[1..].iter().map(|t| t.tokens.len() as f64);
            positions.zip(times.reps_ms.iter().copied()).collect()
        };
        series.push(Series { name: format!("{name}: HTTP"), points: line(&http) });
        series.push(Series { name: format!("{name}: engine"), points: line(&engine) });
        let part = |part: &str| {
            let times: Vec<f64> =
                said[1..].iter().filter_map(|t| t.timings[part].as_f64()).collect();
            Times::from(times).median_ms
        };
        let names = ["prepare_ms", "queue_ms", "match_ms", "restore_ms", "prefill_ms", "ttft_ms"];
        let mut parts: serde_json::Map<String, Value> =
            names.iter().map(|n| ((*n).to_owned(), json!(part(n)))).collect();
        // What the server's clock does not see: the request's way there, the token's way back.
        let ways =
            said[1..].iter().filter_map(|t| Some(t.http_ms - t.timings["ttft_ms"].as_f64()?));
        parts.insert("ways_ms".to_owned(), json!(Times::from(ways.collect::<Vec<_>>()).median_ms));
        points.push(json!({
            "conversation": name, "turns": turns, "final_tokens": total, "tokens_read_a_turn": read,
            "http": measured(&http), "engine": measured(&engine), "added_median_ms": added,
            "added_each_turn_median_ms": added_each.median_ms, "engine_read_median_ms": engine_read.median_ms,
            "engine_step_median_ms": engine_step.median_ms, "server_medians": parts,
        }));
        last = Some(model);
    }
    let chart = Chart {
        title: "Warm turns: over HTTP and in the engine".to_owned(),
        x: "tokens of the prompt".to_owned(),
        y: "ms to the first token".to_owned(),
        log: false,
        series,
    };
    let model = last.context("there is a model")?;
    Ok((model, Outcome { points, table, chart, text: Vec::new() }))
}

/// What the user says in a turn: a few lines of varied text.
fn message(turn: usize) -> String {
    let text = TEXTS[turn % TEXTS.len()];
    let words: Vec<&str> = text.split_whitespace().collect();
    let from = (turn * 7) % words.len().saturating_sub(12).max(1);
    format!("{turn}. What of this? {}", words[from..(from + 12).min(words.len())].join(" "))
}

fn talk(
    address: SocketAddr,
    turns: usize,
    style: Style,
    each: &mut dyn FnMut(&Turn) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Turn>> {
    let mut client = Client::new(address)?;
    let mut history = vec![json!({ "role": "system", "content": TEXTS[0] })];
    let mut out = Vec::with_capacity(turns);
    for turn in 0..turns {
        history.push(json!({ "role": "user", "content": message(turn) }));
        let mut messages = history.clone();
        if matches!(style, Style::Date) {
            let date = format!("It is 10:{:02}:{:02}.", turn / 60, turn % 60);
            messages.push(json!({ "role": "system", "content": date }));
        }
        let ask = json!({
            "messages": messages, "max_tokens": REPLY, "temperature": 0, "ignore_eos": true, "stream": true,
            "stream_options": { "include_usage": true },
        });
        let (mut first, mut text, mut end) = (None, String::new(), Value::Null);
        std::thread::sleep(PAUSE);
        let sent = client.stream("/v1/chat/completions", &ask.to_string(), |event| {
            let delta = &event.data["choices"][0]["delta"];
            for name in ["content", "reasoning_content"] {
                if let Some(said) = delta[name].as_str().filter(|said| !said.is_empty()) {
                    first.get_or_insert(event.at);
                    text.push_str(said);
                }
            }
            if event.data["usage"].is_object() {
                end = event.data;
            }
        })?;
        let tokens = client.post("/tokenize", &json!({ "messages": messages }))?;
        let first = first.with_context(|| format!("turn {turn} has no content"))?;
        let cached = end["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        let now = Turn {
            tokens: serde_json::from_value(tokens["tokens"].clone())?,
            cached: cached.context("no usage")? as usize,
            http_ms: ms(first.duration_since(sent)),
            timings: end["timings"].clone(),
        };
        history.push(json!({ "role": "assistant", "content": text }));
        each(&now)?;
        out.push(now);
    }
    Ok(out)
}

/// The same turns in an engine without a server.
struct Replay {
    model: Ampoule,
    slot: SlotId,
    known: Option<(Capsule, Vec<u32>)>,
    /// Milliseconds of each turn but the first: until the token is known, before it is drawn, and until it is read.
    times: Vec<f64>,
    read: Vec<f64>,
    step: Vec<f64>,
}

impl Replay {
    fn new(mut model: Ampoule) -> anyhow::Result<Self> {
        let slot = model.engine.create_slot()?;
        Ok(Self { model, slot, known: None, times: Vec::new(), read: Vec::new(), step: Vec::new() })
    }

    fn turn(&mut self, turn: &Turn) -> anyhow::Result<()> {
        let (slot, warm) = (self.slot, self.known.is_some());
        let model = &mut self.model;
        let (before, new) = turn.tokens.split_at(turn.cached.min(turn.tokens.len()));
        let capsule = boundary(model, slot, self.known.take(), before)?;
        std::thread::sleep(PAUSE);
        let start = Instant::now();
        if !before.is_empty() {
            model.engine.restore(slot, &capsule)?;
        }
        model.append(slot, new)?;
        let read = start.elapsed();
        let drawn = model.first_draw(slot, &SamplingParams::default(), None)?;
        let known = start.elapsed();
        match drawn {
            Some(token) => model.engine.step_forced(slot, token)?,
            None => {
                model.engine.step(slot)?;
            }
        }
        let all = start.elapsed();
        if warm {
            self.times.push(ms(if drawn.is_some() { known } else { all }));
            self.read.push(ms(read));
            self.step.push(ms(all));
        }
        // As after a reply: the slot holds what it read.
        for _ in 1..REPLY {
            model.engine.step(slot)?;
        }
        self.known = Some((capsule, before.to_vec()));
        Ok(())
    }
}

/// The boundary after these tokens, from the one before it where that is a prefix.
fn boundary(
    model: &mut Ampoule,
    slot: SlotId,
    known: Option<(Capsule, Vec<u32>)>,
    tokens: &[u32],
) -> anyhow::Result<Capsule> {
    let from = known.filter(|(_, before)| tokens.starts_with(before) && !before.is_empty());
    let read = from.as_ref().map_or(0, |(_, before)| before.len());
    match from {
        Some((capsule, _)) => model.engine.restore(slot, &capsule)?,
        None => model.engine.reset(slot)?,
    }
    model.append(slot, &tokens[read..])?;
    Ok(model.engine.snapshot(slot)?)
}
