//! What a conversation with a boundary after each turn costs, against full copies.

use ampoule::store::Expected;
use ampoule::{Ampoule, Capsule, CapsuleStore, Turn, TurnsOptions, TurnsReport};
use anyhow::ensure;
use serde_json::{Value, json};

use super::Outcome;
use super::chart::{Chart, Series};
use crate::args::TurnsArgs;
use crate::commands::store;
use crate::output::{self, Progress, Table};

pub(super) fn run(
    model: &mut Ampoule,
    args: &TurnsArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let capsules = args.store.store.is_some().then(|| store::open(&args.store)).transpose()?;
    let options = TurnsOptions { turns: args.turns, ..TurnsOptions::default() };
    let bar = progress.count(2 * args.turns, "turns");
    let mut follow = |done: usize, _: usize| bar.set_position(done as u64);
    let (report, kept) = ampoule::turns(model, &options, &mut follow)?;
    bar.finish_and_clear();
    let stored = capsules.map(|capsules| keep(model, &capsules, &kept)).transpose()?;
    let mut table = Table::new(&[
        "turn",
        "message",
        "reply",
        "position",
        "own rows",
        "fixed state",
        "own, so far",
        "full copies, so far",
    ]);
    let (mut own, mut full) = (0, 0);
    let (mut own_line, mut full_line) = (Vec::new(), Vec::new());
    for (index, turn) in report.turns.iter().enumerate() {
        own += turn.own_row_bytes + turn.fixed_bytes;
        full += turn.full_copy_bytes;
        own_line.push(((index + 1) as f64, own as f64 / MIB));
        full_line.push(((index + 1) as f64, full as f64 / MIB));
        table.row(row(index + 1, turn, own, full));
    }
    let mut text = vec![
        format!(
            "held {}: {:.4} times the rows of the whole conversation ({}) and {} fixed states ({} each)",
            output::bytes(report.held_bytes as u64),
            report.over_floor,
            output::bytes(report.final_row_bytes as u64),
            report.turns.len(),
            output::bytes(report.fixed_bytes as u64),
        ),
        format!(
            "full copies would be {}: {:.1} times as much",
            output::bytes(report.full_copy_bytes as u64),
            report.copies_over_held
        ),
        format!(
            "{} capsules restored in a random order: {} differ in any bit",
            report.restored, report.mismatches
        ),
    ];
    if let Some(stored) = &stored {
        text.push(format!(
            "in the store: {} written, {:.4} times the same",
            output::bytes(stored["written_bytes"].as_u64().unwrap_or(0)),
            stored["over_floor"].as_f64().unwrap_or(0.0)
        ));
    }
    let failed = report.first_mismatch.clone();
    let chart = Chart {
        title: "A boundary after each turn".to_owned(),
        x: "turns".to_owned(),
        y: "MiB".to_owned(),
        log: true,
        series: vec![
            Series { name: "capsules: rows once, fixed state a turn".to_owned(), points: own_line },
            Series { name: "full copies".to_owned(), points: full_line },
        ],
    };
    let points = vec![summary(&report, stored)];
    ensure!(failed.is_none(), "a restored turn is not what it was: {}", failed.unwrap_or_default());
    Ok(Outcome { points, table, chart, text })
}

const MIB: f64 = (1 << 20) as f64;

fn row(number: usize, turn: &Turn, own: usize, full: usize) -> [String; 8] {
    let bytes = |n: usize| output::bytes(n as u64);
    [
        number.to_string(),
        turn.message_tokens.to_string(),
        turn.reply_tokens.to_string(),
        turn.position.to_string(),
        bytes(turn.own_row_bytes),
        bytes(turn.fixed_bytes),
        bytes(own),
        bytes(full),
    ]
}

fn summary(report: &TurnsReport, stored: Option<Value>) -> Value {
    let mut value = json!(report);
    if let Some(stored) = stored {
        value["store"] = stored;
    }
    value
}

/// Saves every turn, as a chat does; what was written.
fn keep(model: &Ampoule, store: &CapsuleStore, capsules: &[Capsule]) -> anyhow::Result<Value> {
    let mut written = 0;
    for (index, capsule) in capsules.iter().enumerate() {
        let name = format!("turn-{}", index + 1);
        written += store.save(model, capsule, Some((&name, Expected::Anything)), None)?.written;
    }
    let last = capsules.last().map_or(0, Capsule::row_bytes);
    let floor = last + capsules.iter().map(Capsule::fixed_bytes).sum::<usize>();
    Ok(json!({
        "written_bytes": written,
        "all_objects_bytes": store.store().stored_bytes()?,
        "over_floor": written as f64 / floor.max(1) as f64,
    }))
}
