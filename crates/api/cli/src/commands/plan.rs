//! `ampoule plan`: the text form, the seal, the roofline.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use ampoule::{Ampoule, Cost, CostPoint, Phase, Sealed, StateRegions};
use anyhow::Context;
use serde::Serialize;

use crate::args::{GlobalArgs, PlanArgs};
use crate::bench::command_line;
use crate::hardware::Bandwidth;
use crate::output::{self, Progress, Table, figure};

fn plans(args: &PlanArgs, global: &GlobalArgs) -> anyhow::Result<Arc<Sealed>> {
    Ok(Ampoule::plans(&args.model.model.resolve()?, &global.load_options(None))?)
}

pub(crate) fn print(args: &PlanArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let text = plans(args, global)?.model().to_text();
    if args.json {
        return output::json(&serde_json::json!({ "plan": text }));
    }
    output::put(&text)
}

#[derive(Debug, Serialize)]
struct PlanCheck {
    model: String,
    /// Whether everything carried between replays is in State buffers; there are no plans otherwise.
    sealed: bool,
    digest: String,
    context: usize,
    buffers: usize,
    state_buffers: usize,
    plans: Vec<PlanShape>,
    ops: usize,
    weight_bytes: u64,
    /// State of a slot that every boundary holds whole.
    state_fixed_bytes: u64,
    /// State that each position adds.
    state_bytes_per_position: u64,
}

#[derive(Debug, Serialize)]
struct PlanShape {
    phase: String,
    tokens: usize,
    context: usize,
    ops: usize,
}

pub(crate) fn check(args: &PlanArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let sealed = plans(args, global)?;
    let model = sealed.model();
    let table = &model.buffers;
    let state = StateRegions::of(&sealed);
    let bytes =
        |regions: &[ampoule::Region]| regions.iter().map(|r| r.bytes(table) as u64).sum::<u64>();
    let shapes = model.plans.iter().map(|p| PlanShape {
        phase: p.key.phase.to_string(),
        tokens: p.key.tokens,
        context: p.key.context,
        ops: p.ops.len(),
    });
    let check = PlanCheck {
        model: model.name.clone(),
        sealed: true,
        digest: hex(&sealed.digest()),
        context: model.plans.iter().map(|p| p.key.context).max().unwrap_or(0),
        buffers: table.len(),
        state_buffers: sealed.state().len(),
        plans: shapes.collect(),
        ops: model.plans.iter().map(|p| p.ops.len()).sum(),
        weight_bytes: table
            .iter()
            .filter(|(_, b)| b.role == ampoule::Role::Weight)
            .map(|(_, b)| b.bytes() as u64)
            .sum(),
        state_fixed_bytes: bytes(state.fixed()),
        state_bytes_per_position: bytes(&state.rows(&(0..1))),
    };
    if args.json {
        return output::json(&check);
    }
    output::line(format!("{}: sealed, digest {}", check.model, &check.digest[..16]))?;
    output::line(format!(
        "{} buffers, {} of them State; weights {}; context {}",
        check.buffers,
        check.state_buffers,
        output::bytes(check.weight_bytes),
        check.context
    ))?;
    output::line(format!(
        "state of a slot: {} bytes fixed, and {} bytes per position",
        check.state_fixed_bytes, check.state_bytes_per_position
    ))?;
    let mut rows = Table::new(&["plan", "tokens", "context", "ops"]);
    for plan in &check.plans {
        rows.row([
            plan.phase.clone(),
            plan.tokens.to_string(),
            plan.context.to_string(),
            plan.ops.to_string(),
        ]);
    }
    output::put(&rows.to_text())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[derive(Debug, Serialize)]
struct Roofline {
    model: String,
    position: usize,
    bandwidth: Bandwidth,
    ops: Vec<Row>,
    total: Row,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    op: String,
    count: usize,
    bytes_read: u64,
    bytes_written: u64,
    flops: u64,
    /// Bytes over the read bandwidth.
    floor_ms: f64,
}

impl Row {
    fn add(&mut self, cost: Cost) {
        self.count += 1;
        self.bytes_read += cost.bytes_read;
        self.bytes_written += cost.bytes_written;
        self.flops += cost.flops;
    }

    fn cells(&self) -> [String; 6] {
        [
            self.op.clone(),
            self.count.to_string(),
            output::bytes(self.bytes_read),
            output::bytes(self.bytes_written),
            figure(self.flops as f64 / 1e6),
            figure(self.floor_ms),
        ]
    }
}

/// One kind of launch on the GPU.
#[derive(Clone, Debug, Default, Serialize)]
struct Launches {
    /// The ops it stands for; of linears, the weights' shapes.
    ops: String,
    count: usize,
    bytes: u64,
    /// Bytes over the measured read bandwidth.
    floor_ms: f64,
    measured_ms: f64,
    /// Measured over floor.
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct GpuRoofline {
    model: String,
    device: String,
    kernels: String,
    position: usize,
    read_gb_s: f64,
    launches: Vec<Launches>,
    /// All launches, each kind timed by itself.
    sum: Launches,
    /// The step as one graph.
    step_ms: f64,
    /// Steps in one launch, and milliseconds of each of them.
    together: Vec<(usize, f64)>,
    /// That made this.
    command: String,
}

/// The decode step on a GPU: bytes, floor, measured, by kind of launch.
fn gpu_roofline(args: &PlanArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let options = global.load_options(None);
    let info = Ampoule::device_info(&options)?;
    let bandwidth = Ampoule::gpu_bandwidth()?;
    let times = Ampoule::time_decode(&args.model.model.resolve()?, &options, args.position)?;
    let model = times.sealed.model();
    let ops = &model.plans[times.plan].ops;
    let at = CostPoint { position: args.position, tokens: 1 };
    let mut kinds: Vec<Launches> = Vec::new();
    for step in &times.steps {
        let name = |&i: &usize| match &ops[i] {
            ampoule::Op::Linear(o) => format!("linear {}x{}", o.weight.height(), o.weight.width()),
            ampoule::Op::LinearAdd(o) => {
                format!("linear_add {}x{}", o.weight.height(), o.weight.width())
            }
            op => op.name().to_owned(),
        };
        let label = step.ops.iter().map(name).collect::<Vec<_>>().join(", ");
        let cost = |&i: &usize| {
            let cost = ops[i].cost(&model.buffers, at);
            cost.bytes_read + cost.bytes_written
        };
        let slot = kinds.iter().position(|k| k.ops == label).unwrap_or_else(|| {
            kinds.push(Launches { ops: label, ..Launches::default() });
            kinds.len() - 1
        });
        kinds[slot].count += 1;
        kinds[slot].bytes += step.ops.iter().map(cost).sum::<u64>();
        kinds[slot].measured_ms += step.milliseconds;
    }
    kinds.sort_by_key(|k| std::cmp::Reverse(k.bytes));
    let mut sum = Launches { ops: "sum".to_owned(), ..Launches::default() };
    for kind in &kinds {
        sum.count += kind.count;
        sum.bytes += kind.bytes;
        sum.measured_ms += kind.measured_ms;
    }
    for kind in kinds.iter_mut().chain([&mut sum]) {
        kind.floor_ms = kind.bytes as f64 / (bandwidth.read_gb_s * 1e6);
        kind.ratio = kind.measured_ms / kind.floor_ms;
    }
    let report = GpuRoofline {
        model: model.name.clone(),
        device: info.class,
        kernels: info.kernels,
        position: args.position,
        read_gb_s: bandwidth.read_gb_s,
        launches: kinds,
        sum,
        step_ms: times.step_ms,
        together: times.together,
        command: command_line(),
    };
    if args.json {
        return output::json(&report);
    }
    output::line(format!(
        "{}: one decode step at position {} on {}; reads at {} GB/s",
        report.model,
        report.position,
        report.device,
        figure(report.read_gb_s)
    ))?;
    let mut table = Table::new(&["launch", "count", "bytes", "floor ms", "measured ms", "ratio"]);
    for k in report.launches.iter().chain([&report.sum]) {
        table.row([
            k.ops.clone(),
            k.count.to_string(),
            output::bytes(k.bytes),
            figure(k.floor_ms),
            figure(k.measured_ms),
            figure(k.ratio),
        ]);
    }
    output::put(&table.to_text())?;
    output::line(format!(
        "the whole step as one graph: {} ms, {} of its floor",
        figure(report.step_ms),
        figure(report.step_ms / report.sum.floor_ms)
    ))?;
    let each = |(steps, ms): &(usize, f64)| format!("{steps}: {} ms", figure(*ms));
    let each: Vec<String> = report.together.iter().map(each).collect();
    output::line(format!("steps in one launch, and each of them: {}", each.join(", ")))
}

pub(crate) fn roofline(args: &PlanArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    if Ampoule::device_info(&global.load_options(None))?.backend == "cuda" {
        return gpu_roofline(args, global);
    }
    let sealed = plans(args, global)?;
    let model = sealed.model();
    let fitting = model
        .plans
        .iter()
        .filter(|p| p.key.phase == Phase::Decode && p.key.context > args.position);
    let plan = fitting.min_by_key(|p| p.key.context).with_context(|| {
        format!("no decode plan reaches position {}: raise --context", args.position)
    })?;
    let at = CostPoint { position: args.position, tokens: 1 };
    let mut rows: Vec<Row> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    let mut total = Row { op: "total".to_owned(), ..Row::default() };
    for op in &plan.ops {
        let slot = *index.entry(op.name()).or_insert_with(|| {
            rows.push(Row { op: op.name().to_owned(), ..Row::default() });
            rows.len() - 1
        });
        let cost = op.cost(&model.buffers, at);
        rows[slot].add(cost);
        total.add(cost);
    }
    let bandwidth = Bandwidth::measure(global.threads, Progress::new(args.json));
    for row in rows.iter_mut().chain([&mut total]) {
        let bytes = (row.bytes_read + row.bytes_written) as f64;
        row.floor_ms = bytes / (bandwidth.read_gb_s * 1e6);
    }
    rows.sort_by_key(|r| std::cmp::Reverse(r.bytes_read + r.bytes_written));
    let report = Roofline {
        model: model.name.clone(),
        position: args.position,
        bandwidth,
        ops: rows,
        total,
    };
    if args.json {
        return output::json(&report);
    }
    output::line(format!(
        "{}: one decode step at position {}; reads at {} GB/s with {} threads",
        report.model,
        report.position,
        figure(bandwidth.read_gb_s),
        bandwidth.threads
    ))?;
    let mut table = Table::new(&["op", "count", "read", "written", "MFLOP", "floor ms"]);
    for row in report.ops.iter().chain([&report.total]) {
        table.row(row.cells());
    }
    output::put(&table.to_text())?;
    output::line(format!(
        "at this bandwidth no faster than {} tokens a second",
        figure(1e3 / report.total.floor_ms)
    ))
}
