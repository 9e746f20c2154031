//! Time to first token: reading all of a prompt, against restoring its prefix and reading the rest.

use std::time::Instant;

use ampoule::{Ampoule, Capsule, SlotId, sample_tokens};
use anyhow::ensure;
use serde_json::json;

use super::chart::{Chart, Series};
use super::{Outcome, Times, evict};
use crate::args::BenchArgs;
use crate::output::{Progress, Table, figure, ms};

/// Tokens after the prefix unless --suffix says otherwise.
pub(super) const SUFFIX: usize = 24;

pub(super) fn run(
    model: &mut Ampoule,
    args: &BenchArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let suffix = args.suffix.unwrap_or(SUFFIX);
    let slot = model.engine.create_slot()?;
    let bar = progress.count(args.prefix.len() * args.reps, "ttft");
    let mut table = Table::new(&["prefix + suffix", "cold ms", "restored ms", "ratio", "logits"]);
    let (mut points, mut cold_line, mut warm_line) = (Vec::new(), Vec::new(), Vec::new());
    for &prefix in &args.prefix {
        let tokens = sample_tokens(model, prefix + suffix, prefix as u64)?;
        model.engine.reset(slot)?;
        model.append(slot, &tokens[..prefix])?;
        let capsule = model.engine.snapshot(slot)?;
        let equal =
            cold(model, slot, &tokens)?.1 == restored(model, slot, &capsule, &tokens[prefix..])?.1;
        let (mut cold_ms, mut restored_ms) = (Vec::new(), Vec::new());
        for _ in 0..args.reps {
            cold_ms.push(cold(model, slot, &tokens)?.0);
            restored_ms.push(restored(model, slot, &capsule, &tokens[prefix..])?.0);
            bar.inc(1);
        }
        let (cold, warm) = (Times::from(cold_ms), Times::from(restored_ms));
        let ratio = cold.median_ms / warm.median_ms;
        table.row([
            format!("{prefix} + {suffix}"),
            figure(cold.median_ms),
            figure(warm.median_ms),
            format!("{ratio:.1}x"),
            if equal { "equal bits" } else { "DIFFER" }.to_owned(),
        ]);
        cold_line.push((prefix as f64, cold.median_ms));
        warm_line.push((prefix as f64, warm.median_ms));
        points.push(json!({
            "prefix": prefix, "suffix": suffix,
            "cold": cold, "restored": warm, "cold_over_restored": ratio,
            "logits_equal": equal,
            "capsule_bytes": capsule.fixed_bytes() + capsule.row_bytes(),
        }));
        ensure!(
            equal,
            "after a restore at {prefix} tokens the logits differ from a cold prefill's"
        );
    }
    bar.finish_and_clear();
    let chart = Chart {
        title: "Time to first token".to_owned(),
        x: "tokens of the prefix".to_owned(),
        y: "ms to the first token".to_owned(),
        log: true,
        series: vec![
            Series { name: "cold prefill".to_owned(), points: cold_line },
            Series { name: format!("restored, {suffix} tokens read"), points: warm_line },
        ],
    };
    Ok(Outcome { points, table, chart, text: Vec::new() })
}

/// Milliseconds to the first token, and the logits it was drawn from.
fn cold(model: &mut Ampoule, slot: SlotId, tokens: &[u32]) -> anyhow::Result<(f64, Vec<u32>)> {
    evict(model, slot)?;
    let start = Instant::now();
    model.engine.reset(slot)?;
    finish(model, slot, tokens, start)
}

fn restored(
    model: &mut Ampoule,
    slot: SlotId,
    capsule: &Capsule,
    suffix: &[u32],
) -> anyhow::Result<(f64, Vec<u32>)> {
    evict(model, slot)?;
    let start = Instant::now();
    model.engine.restore(slot, capsule)?;
    finish(model, slot, suffix, start)
}

fn finish(
    model: &mut Ampoule,
    slot: SlotId,
    tokens: &[u32],
    start: Instant,
) -> anyhow::Result<(f64, Vec<u32>)> {
    model.append(slot, tokens)?;
    model.engine.step(slot)?;
    let time = ms(start.elapsed());
    // After the first token: they depend on everything before it as well.
    let logits = model.engine.logits(slot)?;
    Ok((time, logits.into_iter().map(f32::to_bits).collect()))
}
