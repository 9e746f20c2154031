//! The capsule verbs, beside a plain copy of as many bytes in the same run.

use std::ops::ControlFlow;
use std::time::Instant;

use ampoule::{Ampoule, Capsule, PlainCopy, Residence, SlotId, sample_tokens};
use serde_json::{Value, json};

use super::chart::{Chart, Series};
use super::{Outcome, Times, awaited, delay, evict, pace, step};
use crate::args::BenchArgs;
use crate::hardware::Copier;
use crate::output::{self, Progress, Table, figure, ms};

/// Tokens decoded before a rollback unless --suffix says otherwise.
pub(super) const TOKENS: usize = 8;
/// What copies plainly where state lies.
enum Copies {
    Host(Copier),
    Device { all: PlainCopy, fixed: PlainCopy },
}

/// Tokens over which what a snapshot costs decoding is added up.
const STALLED: usize = 8;

#[derive(Default)]
struct Reps {
    snapshot: Vec<f64>,
    delta: Vec<f64>,
    restore: Vec<f64>,
    rollback: Vec<f64>,
    export: Vec<f64>,
    import: Vec<f64>,
    copy: Vec<f64>,
    copy_fixed: Vec<f64>,
    after_prefill: Vec<f64>,
    awaited: Vec<f64>,
    awaited_fixed: Vec<f64>,
    stall: Vec<f64>,
    stall_of_all: Vec<f64>,
    restore_delay: Vec<f64>,
}

pub(super) fn run(
    model: &mut Ampoule,
    args: &BenchArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let ahead = args.suffix.unwrap_or(TOKENS);
    let slot = model.engine.create_slot()?;
    let bar = progress.count(args.prefix.len() * args.reps, "capsule");
    let mut table = Table::new(&["verb", "prefix", "bytes", "ms", "GB/s", "copy ms", "x copy"]);
    let (mut points, mut lines) = (Vec::new(), vec![Vec::new(); 5]);
    for &prefix in &args.prefix {
        let tokens = sample_tokens(model, prefix, prefix as u64)?;
        let mut reps = Reps::default();
        let (mut capsule, mut file) = take(model, slot, &tokens, &mut Reps::default())?;
        let (fixed, all) = (capsule.fixed_bytes(), capsule.fixed_bytes() + capsule.row_bytes());
        let mut copies = if model.engine.residence() == Residence::Host {
            Copies::Host(Copier::new(all))
        } else {
            Copies::Device { all: Ampoule::gpu_copy(all)?, fixed: Ampoule::gpu_copy(fixed)? }
        };
        for _ in 0..args.reps {
            drop((capsule, file));
            (capsule, file) = take(model, slot, &tokens, &mut reps)?;
            around(model, slot, (&capsule, &file), ahead, &mut copies, &mut reps)?;
            stall(model, slot, &tokens, &copies, &mut reps)?;
            let (whole, part) = match &mut copies {
                Copies::Host(copier) => (copier.copy(all), copier.copy(fixed)),
                Copies::Device { all, fixed } => {
                    // Alone on the device: a step goes on after its token is known.
                    evict(model, slot)?;
                    let whole = all.timed()?;
                    evict(model, slot)?;
                    (whole, fixed.timed()?)
                }
            };
            reps.copy.push(whole);
            reps.copy_fixed.push(part);
            bar.inc(1);
        }
        let (copy, copy_fixed) = (Times::from(reps.copy), Times::from(reps.copy_fixed));
        // Copies that are called and waited for as verbs are: where a prompt has been read, as a first snapshot; where one token
        // of another has been, as a restore; and after steps, as what moves fixed state alone.
        let after_prefill = Times::of_some(reps.after_prefill).unwrap_or_else(|| copy.clone());
        let awaited = Times::of_some(reps.awaited).unwrap_or_else(|| copy.clone());
        let awaited_fixed =
            Times::of_some(reps.awaited_fixed).unwrap_or_else(|| copy_fixed.clone());
        let mut point = json!({
            "prefix": prefix,
            "capsule": { "fixed_bytes": fixed, "row_bytes": all - fixed, "bytes": all, "file_bytes": file.len() },
            "copy": measured(&copy, all, None),
            "copy_fixed": measured(&copy_fixed, fixed, None),
            "copy_awaited_after_prefill": measured(&after_prefill, all, None),
            "copy_awaited": measured(&awaited, all, None),
            "copy_fixed_awaited": measured(&awaited_fixed, fixed, None),
        });
        let row_bytes = all - fixed;
        let delta = fixed + row_bytes / prefix;
        let verbs = [
            ("snapshot", Times::from(reps.snapshot), all, Some(&after_prefill)),
            ("snapshot_of_one_more_token", Times::from(reps.delta), delta, Some(&awaited_fixed)),
            ("restore", Times::from(reps.restore), all, Some(&awaited)),
            ("rollback", Times::from(reps.rollback), fixed, Some(&awaited_fixed)),
            ("export", Times::from(reps.export), file.len(), None),
            ("import", Times::from(reps.import), file.len(), None),
        ];
        for (name, times, bytes, copy) in &verbs {
            let value = measured(times, *bytes, *copy);
            let number = |key: &str, n: Option<f64>| match (n, value[key].as_f64()) {
                (Some(n), _) | (None, Some(n)) => figure(n),
                _ => "-".to_owned(),
            };
            table.row([
                name.replace('_', " "),
                prefix.to_string(),
                output::bytes(*bytes as u64),
                figure(times.median_ms),
                number("gb_per_s", None),
                number("", copy.map(|c| c.median_ms)),
                number("over_copy", None),
            ]);
            point[*name] = value;
        }
        let stalls = [
            ("stall_of_the_next_token", Some(Times::from(reps.stall))),
            ("stall_of_eight_tokens", Some(Times::from(reps.stall_of_all))),
            ("restore_delays_the_next_token", Times::of_some(reps.restore_delay)),
        ];
        for (name, times) in stalls {
            let Some(times) = times else { continue };
            let none = || "-".to_owned();
            let (verb, bytes) = (name.replace('_', " "), output::bytes(all as u64));
            table.row([
                verb,
                prefix.to_string(),
                bytes,
                figure(times.median_ms),
                none(),
                none(),
                none(),
            ]);
            point[name] = json!({ "bytes": all, "ms": times });
        }
        let medians = [&verbs[0].1, &after_prefill, &verbs[2].1, &awaited, &verbs[3].1];
        let medians = medians.map(|t| t.median_ms);
        for (line, median) in lines.iter_mut().zip(medians) {
            line.push((prefix as f64, median));
        }
        points.push(point);
    }
    bar.finish_and_clear();
    let names = [
        "snapshot",
        "plain copy where it is",
        "restore",
        "plain copy where it is called",
        "rollback",
    ];
    let series = names.iter().zip(lines);
    let chart = Chart {
        title: "Capsule verbs".to_owned(),
        x: "tokens of the prefix".to_owned(),
        y: "ms".to_owned(),
        log: true,
        series: series.map(|(name, points)| Series { name: (*name).to_owned(), points }).collect(),
    };
    Ok(Outcome { points, table, chart, text: Vec::new() })
}

fn measured(times: &Times, bytes: usize, copy: Option<&Times>) -> Value {
    let over = copy.map(|c| times.median_ms / c.median_ms);
    json!({
        "bytes": bytes,
        "ms": times,
        "gb_per_s": bytes as f64 / times.median_ms / 1e6,
        "over_copy": over,
    })
}

/// Reads the prefix and freezes all of it; then one token more. Returns the capsule of the prefix and its file.
fn take(
    model: &mut Ampoule,
    slot: SlotId,
    tokens: &[u32],
    reps: &mut Reps,
) -> anyhow::Result<(Capsule, Vec<u8>)> {
    model.engine.reset(slot)?;
    model.append(slot, tokens)?;
    let capsule = timed(model, &mut reps.snapshot, |m| Ok(m.engine.snapshot(slot)?))?;
    model.engine.step(slot)?;
    timed(model, &mut reps.delta, |m| Ok(m.engine.snapshot(slot)?))?;
    let file = timed(model, &mut reps.export, |m| {
        let mut file = Vec::with_capacity(capsule.fixed_bytes() + capsule.row_bytes() + (1 << 20));
        m.engine.export(&capsule, &mut |piece| {
            file.extend_from_slice(piece);
            ControlFlow::Continue(())
        })?;
        Ok(file)
    })?;
    Ok((capsule, file))
}

/// What a first snapshot of a session costs who waits for its tokens: the next one, and the next eight together, beyond the time
/// that tokens take otherwise. And what a plain copy takes where `take` makes that snapshot: when a prompt has been read.
fn stall(
    model: &mut Ampoule,
    slot: SlotId,
    tokens: &[u32],
    copies: &Copies,
    reps: &mut Reps,
) -> anyhow::Result<()> {
    model.engine.reset(slot)?;
    model.append(slot, tokens)?;
    if let Copies::Device { all, .. } = copies {
        reps.after_prefill.push(awaited(model, all)?);
    }
    // Tokens come faster and faster after a prefill, so those before and those after are looked at.
    let before = pace(model, &mut step(slot))?;
    let start = Instant::now();
    let capsule = model.engine.snapshot(slot)?;
    model.engine.step(slot)?;
    let next = ms(start.elapsed());
    for _ in 1..STALLED {
        model.engine.step(slot)?;
    }
    let all = ms(start.elapsed());
    let plain = f64::midpoint(before, pace(model, &mut step(slot))?);
    reps.stall.push(next - plain);
    reps.stall_of_all.push(all - plain * STALLED as f64);
    drop(capsule);
    Ok(())
}

/// Restores into other rows with nothing of the capsule in a cache, goes ahead and back, and imports the file; and restores
/// between two tokens where that can be told from the steps.
fn around(
    model: &mut Ampoule,
    slot: SlotId,
    (capsule, file): (&Capsule, &[u8]),
    ahead: usize,
    copies: &mut Copies,
    reps: &mut Reps,
) -> anyhow::Result<()> {
    evict(model, slot)?;
    match copies {
        Copies::Host(copier) => copier.sweep(),
        Copies::Device { all, .. } => {
            reps.awaited.push(awaited(model, all)?);
            // The weights that are read for it take the GPU's caches over, unless the model is so small that it fits there.
            evict(model, slot)?;
        }
    }
    timed(model, &mut reps.restore, |m| Ok(m.engine.restore(slot, capsule)?))?;
    for _ in 0..ahead {
        model.engine.step(slot)?;
    }
    let position = capsule.position();
    if let Copies::Device { fixed, .. } = copies {
        reps.awaited_fixed.push(awaited(model, fixed)?);
        model.engine.step(slot)?;
    }
    timed(model, &mut reps.rollback, |m| Ok(m.engine.rollback(slot, position)?))?;
    timed(model, &mut reps.import, |m| Ok(m.engine.import(file)?))?;
    if matches!(copies, Copies::Device { .. }) {
        evict(model, slot)?;
        reps.restore_delay
            .push(delay(model, step(slot), |m| Ok(m.engine.restore(slot, capsule)?))?);
    }
    Ok(())
}

fn timed<T>(
    model: &mut Ampoule,
    times: &mut Vec<f64>,
    run: impl FnOnce(&mut Ampoule) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    model.engine.synchronize()?;
    let start = Instant::now();
    let result = run(model)?;
    model.engine.synchronize()?;
    times.push(ms(start.elapsed()));
    Ok(result)
}
