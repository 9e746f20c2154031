//! Decode: milliseconds per token at each context.

use std::time::Instant;

use ampoule::{Ampoule, sample_tokens};
use serde_json::json;

use super::chart::{Chart, Series};
use super::{Outcome, Times};
use crate::args::BenchArgs;
use crate::output::{Progress, Table, figure, ms};

/// Tokens decoded at each context unless --suffix says otherwise.
pub(super) const TOKENS: usize = 32;

pub(super) fn run(
    model: &mut Ampoule,
    args: &BenchArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let count = args.suffix.unwrap_or(TOKENS);
    let slot = model.engine.create_slot()?;
    let bar = progress.count(args.prefix.len() * args.reps, "decode");
    let mut table = Table::new(&["context", "ms/token", "best", "p99 of a token", "tokens/s"]);
    let (mut points, mut line) = (Vec::new(), Vec::new());
    for &prefix in &args.prefix {
        let tokens = sample_tokens(model, prefix, prefix as u64)?;
        model.engine.reset(slot)?;
        model.append(slot, &tokens)?;
        let capsule = model.engine.snapshot(slot)?;
        model.engine.step(slot)?;
        let (mut reps, mut each) = (Vec::new(), Vec::new());
        for _ in 0..args.reps {
            model.engine.restore(slot, &capsule)?;
            model.engine.synchronize()?;
            let start = Instant::now();
            let mut before = start;
            for token in 0..count {
                model.engine.step(slot)?;
                let now = Instant::now();
                // The first is drawn from logits that were there.
                if token > 0 {
                    each.push(ms(now - before));
                }
                before = now;
            }
            model.engine.synchronize()?;
            reps.push(ms(start.elapsed()) / count as f64);
            bar.inc(1);
        }
        let (times, each) = (Times::from(reps), Times::from(each));
        let speed = 1e3 / times.median_ms;
        table.row([
            prefix.to_string(),
            figure(times.median_ms),
            figure(times.min_ms),
            figure(each.p99_ms),
            figure(speed),
        ]);
        line.push((prefix as f64, times.median_ms));
        points.push(json!({
            "context": prefix, "tokens": count, "ms_per_token": times, "tokens_per_second": speed,
            // From one token to the next, as whoever waits for them sees it.
            "between_tokens": each,
        }));
    }
    bar.finish_and_clear();
    let chart = Chart {
        title: "Decode".to_owned(),
        x: "tokens of context".to_owned(),
        y: "ms per token".to_owned(),
        log: false,
        series: vec![Series { name: "decode".to_owned(), points: line }],
    };
    Ok(Outcome { points, table, chart, text: Vec::new() })
}
