//! `ampoule bench`: measured on this machine, repeated, with everything needed to read the figures later.

mod capsule;
mod chart;
mod decode;
mod rollback;
pub(crate) mod serve;
mod start;
mod tiers;
mod ttft;
mod turns;

use std::path::Path;
use std::time::Instant;

use ampoule::{Ampoule, Error, PlainCopy, SlotId, write_atomically};
use anyhow::{bail, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::args::{BenchArgs, BenchCommand, GlobalArgs, TurnsArgs};
use crate::commands::load;
use crate::hardware::Hardware;
use crate::output::{self, Progress, Table, ms};
use chart::Chart;

/// Repeated measurements of one thing, in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(clippy::struct_field_names)] // units belong into JSON keys
pub(crate) struct Times {
    pub median_ms: f64,
    pub min_ms: f64,
    pub p99_ms: f64,
    pub reps_ms: Vec<f64>,
}

impl Times {
    /// Of repetitions, if there were any.
    pub(crate) fn of_some(reps: Vec<f64>) -> Option<Self> {
        (!reps.is_empty()).then(|| Self::from(reps))
    }
}

/// Tokens of which [`pace`] takes the median.
const PACE: usize = 8;

/// The value that `share` of all are not above; `sorted` is in order.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(index.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

impl From<Vec<f64>> for Times {
    fn from(reps_ms: Vec<f64>) -> Self {
        let mut sorted = reps_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median_ms = match n {
            0 => 0.0,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        };
        let (min_ms, p99_ms) = (quantile(&sorted, 0.0), quantile(&sorted, 0.99));
        Self { median_ms, min_ms, p99_ms, reps_ms }
    }
}

/// What a bench leaves: the file of `--out`.
#[derive(Debug, Serialize)]
struct Record {
    bench: &'static str,
    version: &'static str,
    command: String,
    model: String,
    device: DeviceRecord,
    hardware: Hardware,
    context: usize,
    reps: usize,
    points: Vec<Value>,
}

#[derive(Debug, Serialize)]
struct DeviceRecord {
    backend: &'static str,
    class: String,
    kernels: String,
    description: String,
}

/// What one kind of bench gives.
pub(crate) struct Outcome {
    points: Vec<Value>,
    table: Table,
    chart: Chart,
    /// What the table does not say, line by line.
    text: Vec<String>,
}

pub(crate) fn run(command: BenchCommand, global: &GlobalArgs) -> anyhow::Result<()> {
    type Run = fn(&mut Ampoule, &BenchArgs, Progress) -> anyhow::Result<Outcome>;
    let (name, args, suffix, run): (_, _, _, Run) = match command {
        BenchCommand::Ttft(args) => ("ttft", args, ttft::SUFFIX, ttft::run),
        BenchCommand::Decode(args) => ("decode", args, decode::TOKENS, decode::run),
        BenchCommand::Capsule(args) => ("capsule", args, capsule::TOKENS, capsule::run),
        BenchCommand::Rollback(args) => ("rollback", args, rollback::TURN.0, rollback::run),
        BenchCommand::Tiers(args) => ("tiers", args, 0, tiers::run),
        BenchCommand::Start(args) => return run_start(&args, global),
        BenchCommand::Turns(args) => return run_turns(&args, global),
        BenchCommand::Serve(args) => return serve::run(&args, global),
    };
    let progress = Progress::new(args.json);
    args.output().check()?;
    let longest = args.prefix.iter().copied().max().unwrap_or(1);
    let needed = longest + args.suffix.unwrap_or(suffix);
    let enough = (needed + 33).next_multiple_of(256);
    let slots = if name == "rollback" { args.prefix.len() } else { 1 };
    let global = GlobalArgs { slots, ..global.clone() };
    let mut model = load(&args.model.model, &global, Some(enough), progress)?;
    let context = model.engine.context();
    ensure!(
        needed <= context,
        "a context of {context} tokens has no room for a prefix of {longest} and {} more; give --context {enough}, or a shorter \
         --prefix",
        needed - longest
    );
    let outcome = run(&mut model, &args, progress)?;
    leave(name, &model, args.reps, outcome, &args.output())
}

fn run_start(args: &BenchArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    args.output().check()?;
    let progress = Progress::new(args.json);
    let longest = args.prefix.iter().copied().max().unwrap_or(1);
    let context = match global.context {
        0 => (longest + 33).next_multiple_of(256),
        context => context,
    };
    let global = GlobalArgs { context, ..global.clone() };
    let outcome = start::run(args, &global, progress)?;
    // Only to say what it was that started.
    let model = load(&args.model.model, &global, None, progress)?;
    leave("start", &model, args.reps, outcome, &args.output())
}

fn run_turns(args: &TurnsArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    args.output().check()?;
    let progress = Progress::new(args.json);
    let global = GlobalArgs { slots: 2, ..global.clone() };
    // Messages of up to 200 tokens (or 600 bytes), replies of up to 72.
    let enough = (args.turns * 300).next_multiple_of(256);
    let mut model = load(&args.model.model, &global, Some(enough), progress)?;
    let outcome = turns::run(&mut model, args, progress)?;
    leave("turns", &model, 1, outcome, &args.output())
}

/// Where results go.
struct Leave<'a> {
    json: bool,
    out: Option<&'a Path>,
    svg: Option<&'a Path>,
}

impl Leave<'_> {
    /// Refuses a folder that is not there before anything is measured.
    fn check(&self) -> anyhow::Result<()> {
        for path in [self.out, self.svg].into_iter().flatten() {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
                bail!(
                    "cannot create '{}': there is no folder '{}'",
                    path.display(),
                    folder.display()
                );
            }
        }
        Ok(())
    }
}

impl BenchArgs {
    fn output(&self) -> Leave<'_> {
        Leave { json: self.json, out: self.out.as_deref(), svg: self.svg.as_deref() }
    }
}

impl TurnsArgs {
    fn output(&self) -> Leave<'_> {
        Leave { json: self.json, out: self.out.as_deref(), svg: self.svg.as_deref() }
    }
}

fn leave(
    name: &'static str,
    model: &Ampoule,
    reps: usize,
    outcome: Outcome,
    to: &Leave<'_>,
) -> anyhow::Result<()> {
    let info = model.engine.device().clone();
    let record = Record {
        bench: name,
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(),
        model: model.name().to_owned(),
        device: DeviceRecord {
            backend: info.backend,
            class: info.class,
            kernels: info.kernels,
            description: info.description,
        },
        hardware: Hardware::here(),
        context: model.engine.context(),
        reps,
        points: outcome.points,
    };
    if to.json {
        output::json(&record)?;
    } else {
        let Hardware { cpu, cores, .. } = &record.hardware;
        output::line(format!(
            "{name}: {} on {} ({cpu}, {cores} cores), medians of {}",
            record.model, record.device.class, record.reps
        ))?;
        output::put(&outcome.table.to_text())?;
        outcome.text.iter().try_for_each(output::line)?;
    }
    if let Some(path) = to.out {
        let text = serde_json::to_string_pretty(&record)?;
        write_file(path, &text)?;
    }
    if let Some(path) = to.svg {
        let under =
            format!("{} on {}, {} cores", record.model, record.hardware.cpu, record.hardware.cores);
        write_file(path, &outcome.chart.to_svg(&under)?)?;
    }
    Ok(())
}

/// As it was typed, without the folder that the program lies in.
pub(crate) fn command_line() -> String {
    let args = std::env::args().skip(1);
    std::iter::once("ampoule".to_owned()).chain(args).collect::<Vec<_>>().join(" ")
}

fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    let io = |source| Error::Io { path: path.to_owned(), action: "write", source };
    write_atomically(path, |out| out.write_all(text.as_bytes()).map_err(io))?;
    output::note(format!("wrote {}", path.display()));
    Ok(())
}

/// Fills a slot with rows of another session, so that a restore has to copy all of its own.
pub(crate) fn evict(model: &mut Ampoule, slot: SlotId) -> anyhow::Result<()> {
    let other = [(model.engine.vocabulary() / 2) as u32];
    model.engine.reset(slot)?;
    model.append(slot, &other)?;
    Ok(model.engine.synchronize()?)
}

/// Draws the session's next token and reads it.
pub(crate) fn step(slot: SlotId) -> impl FnMut(&mut Ampoule) -> anyhow::Result<()> {
    move |model| Ok(model.engine.step(slot).map(drop)?)
}

/// Milliseconds of a copy by the driver from the call until it is done, on a device that is idle: one call and one wait, as a verb's.
pub(crate) fn awaited(model: &mut Ampoule, copy: &PlainCopy) -> anyhow::Result<f64> {
    model.engine.synchronize()?;
    let start = Instant::now();
    copy.run()?;
    Ok(ms(start.elapsed()))
}

/// Inter-token latency in ms: the median of [`PACE`] steps after one that is not counted.
pub(crate) fn pace<M>(
    model: &mut M,
    step: &mut impl FnMut(&mut M) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(PACE);
    for token in 0..=PACE {
        let start = Instant::now();
        step(model)?;
        if token > 0 {
            times.push(ms(start.elapsed()));
        }
    }
    Ok(Times::from(times).median_ms)
}

/// How much later, in ms, the next token comes where `verb` goes before it. Of use where a step does not wait for all that it
/// computes; elsewhere it is the verb's own time, give or take what steps differ by.
pub(crate) fn delay<M>(
    model: &mut M,
    mut step: impl FnMut(&mut M) -> anyhow::Result<()>,
    verb: impl FnOnce(&mut M) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let alone = pace(model, &mut step)?;
    let start = Instant::now();
    verb(model)?;
    step(model)?;
    Ok(ms(start.elapsed()) - alone)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn medians_and_quantiles() {
        assert_eq!(Times::from(vec![3.0, 1.0, 2.0]).median_ms, 2.0);
        assert_eq!(Times::from(vec![4.0, 1.0, 2.0, 3.0]).median_ms, 2.5);
        let times = Times::from((1..=200).rev().map(f64::from).collect::<Vec<_>>());
        assert_eq!((times.min_ms, times.median_ms, times.p99_ms), (1.0, 100.5, 198.0));
        let one = Times::from(vec![7.0]);
        assert_eq!((one.min_ms, one.median_ms, one.p99_ms), (7.0, 7.0, 7.0));
        let none = Times::from(vec![]);
        assert_eq!((none.median_ms, none.p99_ms), (0.0, 0.0));
        assert!(Times::of_some(vec![]).is_none());
    }

    #[test]
    fn a_delay_is_what_the_verb_adds() {
        let sleep = |n: u64| std::thread::sleep(Duration::from_millis(n));
        let mut steps = 0;
        let mut delay_of = |verb: u64| {
            let step = |steps: &mut usize| {
                sleep(20);
                *steps += 1;
                Ok(())
            };
            let delayed = delay(&mut steps, step, |_| {
                sleep(verb);
                Ok(())
            });
            delayed.unwrap()
        };
        // A busy machine may oversleep: not five times.
        assert!((0..5).any(|_| delay_of(0).abs() < 10.0));
        assert!((0..5).any(|_| (50.0..75.0).contains(&delay_of(60))));
        assert_eq!(steps % (1 + PACE + 1), 0);
    }
}
