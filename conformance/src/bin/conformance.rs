//! Runs the op suite on a backend of this machine.

use std::process::ExitCode;
use std::time::Instant;

use ampoule_backend::Backend;
use ampoule_conformance::ops::{self, Problem, Report, SuiteOptions};
use ampoule_cpu::CpuBackend;
use ampoule_cuda::CudaBackend;
use ampoule_reference::ReferenceBackend;
use serde_json::{Value, json};

const USAGE: &str = "\
usage: conformance ops [--backend cpu|cuda|reference] [--filter WORDS] [--part K/N] [--seed N] [--cases N] [--json] [--list]
                       [--verbose]

  --backend B    what to test: cpu, cuda or reference (default: cpu)
  --filter W     only cases whose name holds each of these words
  --part K/N     of these, every N-th from the K-th on: N processes with K from 1 to N run all of them
  --seed N       of all random operands (default: 1)
  --cases N      cases of random shape added to those chosen by hand (default: 50)
  --json         the report as JSON
  --list         the cases' names
  --verbose      each case's name before it runs, and the seconds since the start, on standard error";

/// What the command line asks for.
struct Arguments {
    backend: String,
    options: SuiteOptions,
    /// Every so manieth case from this one on.
    part: (usize, usize),
    json: bool,
    list: bool,
    verbose: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    if words.next().as_deref() != Some("ops") {
        return Err("the command must be 'ops'".to_owned());
    }
    let mut arguments = Arguments {
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
        match word.as_str() {
            "--backend" => arguments.backend = value()?,
            "--filter" => arguments.options.filter = value()?,
            "--part" => arguments.part = value().and_then(|text| part(&text))?,
            "--seed" => arguments.options.seed = value().and_then(number)?,
            "--cases" => {
                let cases = value().and_then(number)?;
                arguments.options.random_cases =
                    usize::try_from(cases).map_err(|_| format!("{cases} cases are too many"))?;
            }
            "--json" => arguments.json = true,
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

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
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
