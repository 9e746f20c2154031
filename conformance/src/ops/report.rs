//! What a run of the suite found.

use std::collections::BTreeMap;
use std::fmt;

/// The first wrong element of a buffer, and how many there are.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// Its index among the elements compared, row-major (of quantised blocks: the byte).
    pub index: usize,
    /// What the backend gave.
    pub got: f64,
    /// What was expected.
    pub expected: f64,
    /// The error, relative to the larger of the expected element and the tensor's root mean square; infinite for a
    /// NaN.
    pub relative_error: f64,
    /// How many elements are wrong.
    pub wrong: usize,
    /// How many were compared.
    pub elements: usize,
}

/// What is wrong with a case.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Problem {
    /// A buffer holds something else.
    Mismatch {
        /// The buffer's name in the case's model.
        buffer: String,
        /// Its element type.
        dtype: &'static str,
        /// Where and what.
        mismatch: Mismatch,
    },
    /// The backend refused, failed or panicked.
    Error(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mismatch { buffer, dtype, mismatch: m } => write!(
                f,
                "'{buffer}' ({dtype}) at {}: got {}, expected {}, relative error {:.3e}; {} of {} wrong",
                m.index, m.got, m.expected, m.relative_error, m.wrong, m.elements
            ),
            Self::Error(text) => f.write_str(text),
        }
    }
}

/// A property that does not hold in a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The case.
    pub case: String,
    /// The op it is about.
    pub op: &'static str,
    /// The property: `reference`, `repeat`, `poison`, `split`, ...; see [`super`].
    pub check: &'static str,
    /// What was found.
    pub problem: Problem,
}

/// A case that was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The case.
    pub case: String,
    /// Why, as the ignore list says.
    pub reason: String,
}

/// What a run of the suite found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The backend, and what it ran on.
    pub backend: String,
    /// Cases run.
    pub run: usize,
    /// Cases in which every property held.
    pub passed: usize,
    /// Everything that was wrong; a case may appear more than once.
    pub failures: Vec<Failure>,
    /// Cases left out by the ignore list.
    pub skipped: Vec<Skipped>,
    /// Patterns of the ignore list that no case matched: they should go.
    pub unused_ignores: Vec<String>,
    /// Sampling steps compared with the reference where noise decided.
    pub draws: usize,
    /// Those in which another token was taken in a near tie.
    pub near_ties: usize,
    /// The largest relative error seen, by op and element type.
    pub worst: BTreeMap<(&'static str, &'static str), f64>,
}

impl Report {
    /// Whether nothing was wrong.
    pub fn is_ok(&self) -> bool {
        self.failures.is_empty()
    }

    /// Cases with at least one failure.
    pub fn failed(&self) -> usize {
        self.run - self.passed
    }
}

/// Failures shown in full; the rest is counted by op and property.
const SHOWN: usize = 60;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in self.failures.iter().take(SHOWN) {
            writeln!(f, "FAILED {} [{}] {}", failure.case, failure.check, failure.problem)?;
        }
        if self.failures.len() > SHOWN {
            let mut groups: BTreeMap<(&str, &str), usize> = BTreeMap::new();
            for failure in &self.failures {
                *groups.entry((failure.op, failure.check)).or_default() += 1;
            }
            writeln!(f, "... {} more; all by op and property:", self.failures.len() - SHOWN)?;
            for ((op, check), count) in groups {
                writeln!(f, "    {op} [{check}]: {count}")?;
            }
        }
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for skipped in &self.skipped {
            *reasons.entry(&skipped.reason).or_default() += 1;
        }
        for (reason, count) in reasons {
            writeln!(f, "skipped {count}: {reason}")?;
        }
        for pattern in &self.unused_ignores {
            writeln!(f, "ignore pattern '{pattern}' matches no case: remove it")?;
        }
        for ((op, dtype), error) in self.worst.iter().filter(|(_, e)| **e > 0.0) {
            writeln!(f, "largest relative error {op} {dtype}: {error:.2e}")?;
        }
        if self.draws > 0 {
            writeln!(f, "{} draws, {} decided by a near tie", self.draws, self.near_ties)?;
        }
        write!(
            f,
            "{}: {} cases, {} passed, {} failed, {} skipped",
            self.backend,
            self.run,
            self.passed,
            self.failed(),
            self.skipped.len()
        )
    }
}
