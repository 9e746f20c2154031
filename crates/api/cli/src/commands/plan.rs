//! `ampoule plan`: the text form, the seal, the roofline.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use ampoule::{Ampoule, Cost, CostPoint, Phase, Sealed, fixed_regions, row_regions};
use anyhow::Context;
use serde::Serialize;

use crate::args::{GlobalArgs, PlanArgs};
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
    let bytes = |regions: Vec<_>| {
        regions.iter().map(|r: &ampoule::Region| r.bytes(table) as u64).sum::<u64>()
    };
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
        state_fixed_bytes: bytes(fixed_regions(&sealed)),
        state_bytes_per_position: bytes(row_regions(&sealed, &(0..1))),
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

pub(crate) fn roofline(args: &PlanArgs, global: &GlobalArgs) -> anyhow::Result<()> {
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
