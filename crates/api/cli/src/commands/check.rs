//! `ampoule verify` and `ampoule ablate`.

use ampoule::{Ablation, AblationReport, VerifyOptions};
use serde_json::{Value, json};

use super::load;
use crate::args::{AblateArgs, GlobalArgs, VerifyArgs};
use crate::bench::command_line;
use crate::output::{self, Failed, Progress, Table};

/// Tokens compared by `ablate`.
pub(crate) const TOKENS: usize = 48;

pub(crate) fn verify(args: &VerifyArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let progress = Progress::new(args.json);
    let options = VerifyOptions {
        trials: args.trials,
        max_tokens: args.max_tokens,
        seed: args.seed,
        ..VerifyOptions::default()
    };
    let enough = (options.max_tokens + 8 * options.decode).next_multiple_of(256);
    let mut model = load(&args.model.model, global, Some(enough), progress)?;
    model.engine.poison_between_replays(args.poison);
    let bar = progress.count(args.trials, "verifying");
    let report = model.verify(&options, &mut |done, _| bar.set_position(done as u64));
    bar.finish_and_clear();
    let report = report?;
    let passed = report.passed();
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        value["poison"] = Value::Bool(args.poison);
        value["max_tokens"] = json!(args.max_tokens);
        value["command"] = json!(command_line());
        value["kernels"] = json!(model.engine.device().kernels);
        value["passed"] = Value::Bool(passed);
        output::json(&value)?;
    } else {
        let mut table = Table::new(&["level", "checks", "mismatches"]);
        for level in &report.levels {
            table.row([
                level.level.to_owned(),
                level.checks.to_string(),
                level.mismatches.to_string(),
            ]);
        }
        let poison = if args.poison { ", scratch poisoned" } else { "" };
        output::line(format!(
            "{} on {}: {} trials, seed {}{poison}",
            report.model, report.device, report.trials, report.seed
        ))?;
        output::put(&table.to_text())?;
        for level in report.levels.iter().filter(|l| l.mismatches > 0) {
            let first = level.first.as_deref().unwrap_or_default();
            output::line(format!(
                "{}: promised was '{}', but {first}",
                level.level, level.promise
            ))?;
        }
        output::line(if passed { "every bit is the same" } else { "NOT the same: see above" })?;
    }
    if passed { Ok(()) } else { Err(Failed.into()) }
}

/// The sentence for one ablation.
pub(crate) fn sentence(report: &AblationReport, ablation: Ablation, differ: usize) -> String {
    let what = match ablation {
        Ablation::Zeroed => "recurrent state zeroed",
        Ablation::Stale => "recurrent state stale",
        Ablation::Whole => "whole capsule",
    };
    format!("{what:<24} {differ:>2} of {} greedy tokens differ", report.tokens)
}

pub(crate) fn ablate(args: &AblateArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let progress = Progress::new(args.json);
    let enough = (args.prefix + TOKENS).next_multiple_of(256);
    let mut model = load(&args.model.model, global, Some(enough), progress)?;
    let report = model.ablate(args.prefix, TOKENS, args.seed)?;
    let passed = report.passed();
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        let differ = report.differ.iter().map(|&(ablation, differ)| {
            Ok((
                serde_json::to_value(ablation)?.as_str().unwrap_or_default().to_owned(),
                json!(differ),
            ))
        });
        value["differ"] = Value::Object(differ.collect::<anyhow::Result<_>>()?);
        value["passed"] = Value::Bool(passed);
        output::json(&value)?;
    } else {
        output::line(format!(
            "{}: {} tokens, then {TOKENS} greedy ones",
            report.model, report.prefix
        ))?;
        if !report.recurrent {
            output::line(
                "this model has no recurrent state: its KV cache is all there is to lose",
            )?;
        }
        for &(ablation, differ) in &report.differ {
            if report.recurrent || ablation == Ablation::Whole {
                output::line(sentence(&report, ablation, differ))?;
            }
        }
        if !passed {
            output::line(
                "NOT as promised: the whole capsule must change nothing, and zeroed state something",
            )?;
        }
    }
    if passed { Ok(()) } else { Err(Failed.into()) }
}
