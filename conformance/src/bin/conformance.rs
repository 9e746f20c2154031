//! Runs the op suite or the capsule suite on a backend of this machine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use ampoule_backend::Backend;
use ampoule_conformance::capsules::{self, CapsuleOptions};
use ampoule_conformance::ops::{self, Problem, Report, SuiteOptions};
use ampoule_cpu::CpuBackend;
use ampoule_cuda::CudaBackend;
use ampoule_reference::ReferenceBackend;
use serde_json::{Value, json};

const USAGE: &str = "\
usage: conformance ops [--backend cpu|cuda|reference] [--filter WORDS] [--part K/N] [--seed N] [--cases N] [--json] [--list]
                       [--verbose]
       conformance capsules [--backend cpu|cuda|reference] [--filter WORDS] [--trials N] [--goldens FOLDER] [--json]

  --backend B    what to test: cpu, cuda or reference (default: cpu)
  --filter W     only cases whose name holds each of these words
  --part K/N     of these, every N-th from the K-th on: N processes with K from 1 to N run all of them
  --seed N       of all random operands (default: 1)
  --cases N      cases of random shape added to those chosen by hand (default: 50)
  --json         the report as JSON
  --list         the cases' names
  --verbose      each case's name before it runs, and the seconds since the start, on standard error

of capsules:
  --filter W     only checks whose name holds these words
  --trials N     of the first check; others have a tenth (default: 200)
  --goldens F    where the checkpoints lie (default: conformance/golden/qwen35 of the sources)";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Suite {
    Ops,
    Capsules,
}

/// What the command line asks for.
struct Arguments {
    suite: Suite,
    backend: String,
    capsules: CapsuleOptions,
    options: SuiteOptions,
    /// Every so manieth case from this one on.
    part: (usize, usize),
    json: bool,
    list: bool,
    verbose: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let suite = match words.next().as_deref() {
        Some("ops") => Suite::Ops,
        Some("capsules") => Suite::Capsules,
        _ => return Err("the command must be 'ops' or 'capsules'".to_owned()),
    };
    let mut arguments = Arguments {
        suite,
        capsules: CapsuleOptions::default(),
        backend: "cpu".to_owned(),
        options: SuiteOptions::default(),
        part: (1, 1),
        json: false,
        list: false,
        verbose: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let number = |text: String| {
            text.parse::<u64>().map_err(|_| format!("{word} needs a number, not '{text}'"))
        };
        let ops = suite == Suite::Ops;
        match word.as_str() {
            "--backend" => arguments.backend = value()?,
            "--json" => arguments.json = true,
            "--filter" if ops => arguments.options.filter = value()?,
            "--filter" => arguments.capsules.filter = value()?,
            "--trials" if !ops => {
                let trials = value().and_then(number)?;
                arguments.capsules.trials = usize::try_from(trials.max(1)).unwrap_or(usize::MAX);
            }
            "--goldens" if !ops => arguments.capsules.goldens = Some(PathBuf::from(value()?)),
            _ if !ops => return Err(format!("unknown option '{word}' of 'capsules'")),
            "--part" => arguments.part = value().and_then(|text| part(&text))?,
            "--seed" => arguments.options.seed = value().and_then(number)?,
            "--cases" => {
                let cases = value().and_then(number)?;
                arguments.options.random_cases =
                    usize::try_from(cases).map_err(|_| format!("{cases} cases are too many"))?;
            }
            "--list" => arguments.list = true,
            "--verbose" => arguments.verbose = true,
            _ => return Err(format!("unknown option '{word}'")),
        }
    }
    Ok(arguments)
}

/// `K/N`, with K from 1 to N.
fn part(text: &str) -> Result<(usize, usize), String> {
    let numbers = text.split_once('/').and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
    numbers.filter(|(k, n)| (1..=*n).contains(k)).ok_or_else(|| {
        format!("--part needs two numbers like 2/6, the first from 1 to the second, not '{text}'")
    })
}

fn backend(name: &str) -> Result<Box<dyn Backend>, String> {
    match name {
        "cpu" => Ok(Box::new(CpuBackend::new(0))),
        "reference" => Ok(Box::new(ReferenceBackend)),
        "cuda" => Ok(Box::new(CudaBackend::new(0).map_err(|e| e.to_string())?)),
        _ => Err(format!("unknown backend '{name}'; this binary has cpu, cuda and reference")),
    }
}

fn to_json(report: &Report) -> Value {
    let failures: Vec<Value> = report
        .failures
        .iter()
        .map(|f| {
            let problem = match &f.problem {
                Problem::Mismatch { buffer, dtype, mismatch: m } => json!({
                    "buffer": buffer,
                    "dtype": dtype,
                    "index": m.index,
                    // JSON has no NaN: as text, it stays readable.
                    "got": m.got.to_string(),
                    "expected": m.expected.to_string(),
                    "relative_error": m.relative_error.to_string(),
                    "wrong": m.wrong,
                    "elements": m.elements,
                }),
                other => json!({ "error": other.to_string() }),
            };
            json!({ "case": f.case, "op": f.op, "check": f.check, "problem": problem })
        })
        .collect();
    let skipped: Vec<Value> =
        report.skipped.iter().map(|s| json!({ "case": s.case, "reason": s.reason })).collect();
    let worst: Vec<Value> = report
        .worst
        .iter()
        .map(
            |((op, dtype), e)| json!({ "op": op, "dtype": dtype, "relative_error": e.to_string() }),
        )
        .collect();
    json!({
        "backend": report.backend,
        "run": report.run,
        "passed": report.passed,
        "failed": report.failed(),
        "failures": failures,
        "skipped": skipped,
        "unused_ignores": report.unused_ignores,
        "draws": report.draws,
        "near_ties": report.near_ties,
        "worst": worst,
    })
}

/// The capsule suite: a line a check, as it is done.
fn run_capsules(arguments: &Arguments) -> ExitCode {
    let backend = match backend(&arguments.backend) {
        Ok(backend) => backend,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::from(2);
        }
    };
    let info = backend.info();
    let outcomes = capsules::run(backend.as_ref(), &arguments.capsules, &mut |outcome| {
        let (verdict, words) = match &outcome.found {
            Ok(words) => ("ok", words),
            Err(words) => ("FAILED", words),
        };
        let line = format!("{verdict:6} {:7.1} s  {}: {words}", outcome.seconds, outcome.check);
        if arguments.json { eprintln!("{line}") } else { println!("{line}") }
    });
    let failed = outcomes.iter().filter(|outcome| outcome.found.is_err()).count();
    if arguments.json {
        let checks: Vec<Value> = outcomes
            .iter()
            .map(|o| {
                json!({
                    "check": o.check, "passed": o.found.is_ok(), "seconds": o.seconds,
                    "found": o.found.as_ref().unwrap_or_else(|words| words),
                })
            })
            .collect();
        let command: Vec<String> = std::env::args().skip(1).collect();
        let report = json!({
            "suite": "capsules", "command": format!("conformance {}", command.join(" ")),
            "backend": info.backend, "device": info.class, "kernels": info.kernels,
            "trials": arguments.capsules.trials, "failed": failed, "checks": checks,
        });
        println!("{report:#}");
    } else {
        println!("{}: {} checks, {failed} failed", info.class, outcomes.len());
    }
    if outcomes.is_empty() {
        eprintln!("no check is called '{}'", arguments.capsules.filter);
        return ExitCode::from(2);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if arguments.suite == Suite::Capsules {
        return run_capsules(&arguments);
    }
    let (first, of) = arguments.part;
    let specs: Vec<_> =
        ops::specs(&arguments.options).into_iter().skip(first - 1).step_by(of).collect();
    if arguments.list {
        for spec in &specs {
            println!("{}", spec.name());
        }
        return ExitCode::SUCCESS;
    }
    let backend = match backend(&arguments.backend) {
        Ok(backend) => backend,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::from(2);
        }
    };
    let mut arguments = arguments;
    // Quantised weights are held as bf16 there.
    arguments.options.bf16_weights = backend.info().backend == "cuda";
    let start = Instant::now();
    let mut observer = |name: &str| {
        if arguments.verbose {
            eprintln!("{:8.2}  {name}", start.elapsed().as_secs_f64());
        }
    };
    let report = ops::run_specs(backend.as_ref(), &specs, &arguments.options, &mut observer);
    if arguments.json {
        println!("{:#}", to_json(&report));
    } else {
        println!("{report}");
    }
    if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
