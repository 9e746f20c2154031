//! From nothing to the first token: a new process each time.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::chart::{Chart, Series};
use super::{Outcome, Times};
use crate::args::{BenchArgs, GlobalArgs};
use crate::output::{Progress, Table, figure, ms};

/// Milliseconds from the start of a process that loads the model, reads `prompt` tokens and draws one, to its answer. What it
/// takes to end the process is not in it.
fn once(args: &BenchArgs, global: &GlobalArgs, prompt: usize) -> anyhow::Result<f64> {
    // Small ids, which every model has.
    let ids: Vec<String> = (0..prompt).map(|i| (3 + i * 7 % 200).to_string()).collect();
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["generate", "--json", "--max-tokens", "1", "--ignore-end", "--tokens"]);
    command.arg(ids.join(",")).arg("--model").arg(&args.model.model.0).args(global.arguments());
    // What it has to say of an error it says itself.
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().context("a process cannot be started")?;
    let mut lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
    let mut text = String::new();
    let mut time = None;
    while let Some(line) = lines.next().transpose()? {
        text.push_str(&line);
        time = Some(ms(start.elapsed()));
    }
    let status = child.wait()?;
    let answer: Option<Value> = serde_json::from_str(&text).ok();
    let drawn = answer.as_ref().and_then(|a| a["tokens"].as_array()).map_or(0, Vec::len);
    ensure!(
        status.success() && drawn == 1,
        "`ampoule generate` with this model and these options gave no token ({status})"
    );
    time.context("no answer")
}

pub(super) fn run(
    args: &BenchArgs,
    global: &GlobalArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let bar = progress.count(args.prefix.len() * (args.reps + 1), "start");
    let mut table = Table::new(&["prompt", "ms to the first token", "best", "the first of all"]);
    let (mut points, mut line) = (Vec::new(), Vec::new());
    for &prompt in &args.prefix {
        // Compiles kernels where they are not in the cache, and brings the model's file to memory.
        let first = once(args, global, prompt)?;
        bar.inc(1);
        let mut reps = Vec::new();
        for _ in 0..args.reps {
            reps.push(once(args, global, prompt)?);
            bar.inc(1);
        }
        let times = Times::from(reps);
        table.row([
            prompt.to_string(),
            figure(times.median_ms),
            figure(times.min_ms),
            figure(first),
        ]);
        line.push((prompt as f64, times.median_ms));
        points.push(json!({ "prompt": prompt, "to_first_token": times, "first_of_all_ms": first }));
    }
    bar.finish_and_clear();
    let chart = Chart {
        title: "From the start of a process to the first token".to_owned(),
        x: "tokens of the prompt".to_owned(),
        y: "ms".to_owned(),
        log: false,
        series: vec![Series { name: "start".to_owned(), points: line }],
    };
    let text = vec!["each in a process of its own, the model loaded anew".to_owned()];
    Ok(Outcome { points, table, chart, text })
}
