//! The server against the engine in it: what HTTP adds to the time to first token, and what load does to it.

mod client;
mod load;
mod ttft;

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::{Leave, Times, leave};
use crate::args::{GlobalArgs, ModelArg};
use crate::output::Progress;

#[derive(Debug, Args)]
pub(crate) struct ServeBenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Turns of each conversation; the first is not counted.
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u16).range(2..))]
    pub(crate) turns: u16,
    /// How the client sends its conversation: only appended to (append), or with a line near its end that is different
    /// each time (date).
    #[arg(long, value_name = "STYLE,...", value_delimiter = ',', default_value = "append,date")]
    pub(crate) conversation: Vec<ttft::Style>,
    /// Instead: hold idle connections and active streams for so long, and watch errors, /health and memory.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) load: Option<u64>,
    /// With --load: idle connections, kept alive.
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub(crate) connections: usize,
    /// With --load: streams at a time.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(crate) streams: usize,
    /// Write everything measured to this JSON file.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Draw it to this SVG file.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(super) fn run(args: &ServeBenchArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let progress = Progress::new(args.json);
    let to = Leave { json: args.json, out: args.out.as_deref(), svg: args.svg.as_deref() };
    if let Some(seconds) = args.load {
        let (model, outcome) = load::run(args, global, seconds, progress)?;
        return leave("serve-load", &model, 1, outcome, &to);
    }
    let (model, outcome) = ttft::run(args, global, progress)?;
    leave("serve", &model, usize::from(args.turns) - 1, outcome, &to)
}

fn measured(times: &Times) -> Value {
    serde_json::json!({ "median_ms": times.median_ms, "p99_ms": times.p99_ms, "reps_ms": times.reps_ms })
}
