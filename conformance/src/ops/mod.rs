//! The op suite: every op, on any backend, against the reference.
//!
//! A case is one op, or a few, in a tiny sealed model with random weights, inputs and State. It runs on the backend
//! under test and on the reference, and every Output and every State buffer is compared ([`Tolerances`]). Rows past
//! the count hold NaN, and so do cache rows at or past the position. Token operands lie alone, in columns of fused
//! buffers, or at odd offsets ([`Layout`]), and what lies around a result must stay as it was.
//!
//! Then the contracts of `ampoule-backend` are held, bit for bit, against the backend's own first result:
//!
//! | check | what is done |
//! | --- | --- |
//! | `repeat` | the same again |
//! | `poison` | the same in the other slot, everything but State and Weight poisoned before each replay |
//! | `split` | the rows in two replays, the second from the State that the first left |
//! | `bucket 64`, `bucket 16`, `one by one`, `uneven` | the rows through other token buckets and counts |
//! | `later rows` | NaN in the rows after some row: those before must not change |
//! | `stale rows` | other numbers in cache rows at and past the position |
//! | `bystander` | the other slot's State must stay as it is |
//! | `freeze and thaw` | State frozen in one slot and thawed in the other is the same |
//! | `counters` | a replay is one launch and allocates nothing |
//!
//! ```no_run
//! use ampoule_conformance::ops::{SuiteOptions, run};
//!
//! let report = run(&ampoule_reference::ReferenceBackend, &SuiteOptions::default());
//! assert!(report.is_ok(), "{report}");
//! ```

mod build;
mod case;
mod compare;
mod execute;
mod list;
mod random;
mod report;
pub(crate) mod rng;
mod rows;
mod sampling;
mod sequence;
mod spec;
mod words;

use ampoule_backend::Backend;
use ampoule_reference::ReferenceBackend;

use execute::Judge;

pub use build::{Layout, Tokens};
pub use compare::Tolerances;
pub use random::Choice;
pub use report::{Failure, Mismatch, Problem, Report, Skipped};
pub use spec::Spec;

/// Cases that a backend is known not to pass, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ignore {
    /// Matches names in which each of its words occurs.
    pub pattern: String,
    /// For people.
    pub reason: String,
}

impl Ignore {
    /// An entry of the list.
    pub fn new(pattern: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { pattern: pattern.into(), reason: reason.into() }
    }
}

/// What to run and how to judge it.
#[derive(Clone, Debug)]
pub struct SuiteOptions {
    /// Only cases whose name holds each of these words; empty for all.
    pub filter: String,
    /// Of all random operands.
    pub seed: u64,
    /// Cases of random shape to add to those chosen by hand.
    pub random_cases: usize,
    /// Cases to leave out.
    pub ignore: Vec<Ignore>,
    /// Allowed errors.
    pub tolerances: Tolerances,
    /// Expected results are those of quantised weights rounded to bfloat16 on load, as the CUDA backend holds them; the
    /// tolerances stay as they are.
    pub bf16_weights: bool,
}

impl Default for SuiteOptions {
    fn default() -> Self {
        Self {
            filter: String::new(),
            seed: 1,
            random_cases: 50,
            ignore: Vec::new(),
            tolerances: Tolerances::default(),
            bf16_weights: false,
        }
    }
}

/// The cases that the options ask for, ignored ones included.
pub fn specs(options: &SuiteOptions) -> Vec<Spec> {
    let drawn = (0..options.random_cases).map(|i| Choice::drawn(options.seed, i).spec());
    let mut names = std::collections::HashSet::new();
    let unique = list::all().into_iter().chain(drawn).filter(|s| names.insert(s.name().to_owned()));
    unique.filter(|s| s.matches(&options.filter)).collect()
}

/// Runs the suite.
pub fn run(backend: &dyn Backend, options: &SuiteOptions) -> Report {
    run_specs(backend, &specs(options), options, &mut |_| {})
}

/// Near ties allowed whatever the number of draws; else fewer than one draw in a hundred.
const FEW_NEAR_TIES: usize = 1;

/// Runs these cases, and tells of each before it runs, so that a crash has a name. The options' filter and number of random
/// cases play no part.
pub fn run_specs(
    backend: &dyn Backend,
    specs: &[Spec],
    options: &SuiteOptions,
    observer: &mut dyn FnMut(&str),
) -> Report {
    let tolerances = options.tolerances;
    let judge = Judge {
        oracle: &ReferenceBackend,
        tolerances,
        exact: false,
        bf16_weights: options.bf16_weights,
    };
    judged(backend, specs, options, &judge, observer)
}

/// Runs the suite and holds the backend against another one bit for bit: other thread counts and instruction paths
/// of one backend whose results are said to be the same.
pub fn run_against(backend: &dyn Backend, oracle: &dyn Backend, options: &SuiteOptions) -> Report {
    let judge = Judge {
        oracle,
        tolerances: options.tolerances,
        exact: true,
        bf16_weights: options.bf16_weights,
    };
    judged(backend, &specs(options), options, &judge, &mut |_| {})
}

fn judged(
    backend: &dyn Backend,
    specs: &[Spec],
    options: &SuiteOptions,
    judge: &Judge<'_>,
    observer: &mut dyn FnMut(&str),
) -> Report {
    let info = backend.info();
    let mut report =
        Report { backend: format!("{} ({})", info.backend, info.class), ..Report::default() };
    let mut used = vec![false; options.ignore.len()];
    for spec in specs {
        let ignored = options.ignore.iter().position(|i| spec.matches(&i.pattern));
        if let Some(index) = ignored {
            used[index] = true;
            let reason = options.ignore[index].reason.clone();
            report.skipped.push(Skipped { case: spec.name().to_owned(), reason });
            continue;
        }
        observer(spec.name());
        let case = spec.build(options.seed);
        execute::run_case(backend, spec.name(), spec.op(), &case, judge, &mut report);
    }
    for (ignore, used) in options.ignore.iter().zip(used) {
        if !used {
            report.unused_ignores.push(ignore.pattern.clone());
        }
    }
    if report.near_ties > FEW_NEAR_TIES && report.near_ties * 100 >= report.draws {
        let text = format!(
            "{} of {} draws took another token in a near tie: the noise or the exponential is wrong",
            report.near_ties, report.draws
        );
        report.failures.push(Failure {
            case: "sample/all draws".to_owned(),
            op: "sample",
            check: "near ties",
            problem: Problem::Error(text),
        });
    }
    report
}
