//! Taking back one turn, at several lengths of context.

use std::time::Instant;

use ampoule::{Ampoule, Capsule, PlainCopy, Residence, SlotId, sample_tokens};
use anyhow::ensure;
use serde_json::json;

use super::chart::{Chart, Series};
use super::{Outcome, Times, awaited, delay, step};
use crate::args::BenchArgs;
use crate::hardware::Copier;
use crate::output::{self, Progress, Table, figure, ms};

/// Tokens of the turn that is taken back: read and decoded.
pub(super) const TURN: (usize, usize) = (24, 8);
/// Tokens between the boundaries of the conversation before it.
const BOUNDARY: usize = 100;
/// A context counts as the same where it takes at most so much longer than the shortest.
const SAME: f64 = 1.2;

/// One context: a conversation of that length in a slot of its own, all its boundaries held.
struct Session {
    prefix: usize,
    slot: SlotId,
    boundaries: Vec<Capsule>,
    logits: Vec<f32>,
    turn: Vec<u32>,
    reps: Vec<f64>,
    /// Of the same at once once more, in every second repetition: caches of host and device then have what it needs.
    again: Vec<f64>,
    /// How much later the next token comes where a rollback goes before it.
    delay: Vec<f64>,
    /// Of the driver's copy of as many bytes, asked for and waited for as the rollback is.
    copy: Vec<f64>,
}

/// What one repetition measured, in ms.
struct Taken {
    time: f64,
    again: Option<f64>,
    delay: Option<f64>,
    copy: Option<f64>,
}

/// What is needed beside a session: on the host, memory to walk over; on a GPU, where the weights that a turn reads have taken the
/// caches over (unless the model is so small that it fits there), the driver's copy of as many bytes.
enum Beside {
    Host(Copier),
    Device(PlainCopy),
}

pub(super) fn run(
    model: &mut Ampoule,
    args: &BenchArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let tokens: usize = args.prefix.iter().sum();
    let bar = progress.count(tokens, "reading");
    let mut sessions = Vec::new();
    for &prefix in &args.prefix {
        let slot = model.engine.create_slot()?;
        let tokens = sample_tokens(model, prefix, prefix as u64)?;
        let mut boundaries = Vec::new();
        for chunk in tokens.chunks(BOUNDARY) {
            model.append(slot, chunk)?;
            boundaries.push(model.engine.snapshot(slot)?);
            bar.inc(chunk.len() as u64);
        }
        let logits = model.engine.logits(slot)?;
        let turn = sample_tokens(model, args.suffix.unwrap_or(TURN.0), 7)?;
        let (reps, again, delay, copy) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        sessions.push(Session { prefix, slot, boundaries, logits, turn, reps, again, delay, copy });
    }
    bar.finish_and_clear();
    let bar = progress.count(args.reps * sessions.len(), "rollback");
    let mut beside = if model.engine.residence() == Residence::Host {
        Beside::Host(Copier::new(0))
    } else {
        let fixed = sessions.iter().filter_map(|s| s.boundaries.last()).map(Capsule::fixed_bytes);
        Beside::Device(Ampoule::gpu_copy(fixed.max().unwrap_or(0))?)
    };
    // Once for each, unmeasured; then in turns, so that whatever else the machine does meets all of them.
    for rep in 0..=args.reps {
        let first = rep % sessions.len();
        sessions.rotate_left(first);
        for session in &mut sessions {
            let taken = take_back(model, session, &mut beside, rep % 2 == 1)?;
            if rep > 0 {
                session.reps.push(taken.time);
                session.again.extend(taken.again);
                session.delay.extend(taken.delay);
                session.copy.extend(taken.copy);
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    sessions.sort_by_key(|session| session.prefix);
    Ok(outcome(sessions))
}

/// Reads a turn, decodes a reply and freezes the boundary at its end; then goes back to the boundary before it, and where
/// `twice` is set at once once more; and on a GPU again between two tokens. The logits are compared after either.
fn take_back(
    model: &mut Ampoule,
    session: &Session,
    beside: &mut Beside,
    twice: bool,
) -> anyhow::Result<Taken> {
    let (slot, position) = (session.slot, session.prefix as u32);
    model.append(slot, &session.turn)?;
    model.engine.begin_reply(slot)?;
    for _ in 0..TURN.1 {
        model.engine.step(slot)?;
    }
    let after = model.engine.snapshot(slot)?;
    // Nothing of any session lies in a cache: else the one with the shortest context would keep more of its own.
    if let Beside::Host(copier) = beside {
        copier.sweep();
    }
    model.engine.synchronize()?;
    let mut timed = || -> anyhow::Result<f64> {
        let start = Instant::now();
        model.engine.rollback(slot, position)?;
        model.engine.synchronize()?;
        Ok(ms(start.elapsed()))
    };
    let time = timed()?;
    let again = if twice { Some(timed()?) } else { None };
    drop(after);
    let check = |model: &mut Ampoule| -> anyhow::Result<()> {
        let same = model.engine.logits(slot)? == session.logits;
        ensure!(same, "after a rollback to {position} tokens the logits differ");
        Ok(())
    };
    check(model)?;
    let (mut later, mut copy) = (None, None);
    if let Beside::Device(plain) = beside {
        // Asked for as the rollback was, after a step, a snapshot and a wait for both.
        model.engine.step(slot)?;
        let after = model.engine.snapshot(slot)?;
        copy = Some(awaited(model, plain)?);
        drop(after);
        model.engine.rollback(slot, position)?;
        later = Some(delay(model, step(slot), |m| Ok(m.engine.rollback(slot, position)?))?);
        let read = model.engine.position(slot)?;
        ensure!(read == position + 1, "after a rollback and a token the slot stands at {read}");
        model.engine.rollback(slot, position)?;
        check(model)?;
    }
    Ok(Taken { time, again, delay: later, copy })
}

fn outcome(sessions: Vec<Session>) -> Outcome {
    let mut table = Table::new(&[
        "context",
        "boundaries",
        "fixed state",
        "rollback ms",
        "least ms",
        "again ms",
        "next token later by ms",
        "driver's copy ms",
        "x first",
    ]);
    let (mut points, mut line) = (Vec::new(), Vec::new());
    let (mut first, mut least, mut most) = (None, f64::INFINITY, 0.0_f64);
    for session in sessions {
        let (times, again) = (Times::from(session.reps), Times::from(session.again));
        let (delay, copy) = (Times::of_some(session.delay), Times::of_some(session.copy));
        let cell = |times: &Option<Times>| {
            times.as_ref().map_or_else(|| "-".to_owned(), |times| figure(times.median_ms))
        };
        let boundaries = session.boundaries.len();
        let fixed = session.boundaries.last().map_or(0, Capsule::fixed_bytes);
        let median = times.median_ms;
        let over = median / *first.get_or_insert(median);
        (least, most) = (least.min(median), most.max(median));
        table.row([
            session.prefix.to_string(),
            boundaries.to_string(),
            output::bytes(fixed as u64),
            figure(median),
            figure(times.min_ms),
            figure(again.median_ms),
            cell(&delay),
            cell(&copy),
            format!("{over:.3}"),
        ]);
        line.push((session.prefix as f64, median));
        let mut point = json!({
            "context": session.prefix, "boundaries": boundaries, "fixed_bytes": fixed,
            "turn_tokens": session.turn.len() + TURN.1, "rollback": times, "again": again,
            "over_first": over, "logits_equal": true,
        });
        for (key, times) in [("next_token_later_by", delay), ("copy_awaited", copy)] {
            if let Some(times) = times {
                point[key] = json!(times);
            }
        }
        points.push(point);
    }
    let mut text = Vec::new();
    // Of one context there is nothing to tell apart.
    if points.len() > 1 {
        let spread = most / least;
        let same = spread <= SAME;
        points.push(json!({ "slowest_over_fastest": spread, "within": SAME, "same": same }));
        text.push(format!(
            "the slowest context takes {spread:.3} times as long as the fastest: {}",
            if same { "the same within 20 %" } else { "NOT the same within 20 %" }
        ));
    }
    let chart = Chart {
        title: "Rollback by one turn".to_owned(),
        x: "tokens of context".to_owned(),
        y: "ms".to_owned(),
        log: false,
        series: vec![Series { name: "rollback".to_owned(), points: line }],
    };
    Outcome { points, table, chart, text }
}
