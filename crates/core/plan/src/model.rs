//! Plans, shape keys and the model that holds them.

use std::fmt;
use std::str::FromStr;

use crate::{BufferId, BufferTable, Op};

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Empties a slot: writes every Fixed State buffer.
    Reset,
    /// Writes the sampler's parameters, seed and bias from Inputs.
    Configure,
    /// Writes the sampler's seed alone.
    Reseed,
    /// Starts a reply: what was generated so far counts as prompt from here on.
    Begin,
    /// Reads up to `tokens` known tokens; leaves the logits after the last.
    Prefill,
    /// As prefill, with the logits after every token as Output.
    Score,
    /// Samples one token from the logits in State, then reads it.
    Decode,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 7] = [
        Self::Reset,
        Self::Configure,
        Self::Reseed,
        Self::Begin,
        Self::Prefill,
        Self::Score,
        Self::Decode,
    ];

    /// The lower-case name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Configure => "configure",
            Self::Reseed => "reseed",
            Self::Begin => "begin",
            Self::Prefill => "prefill",
            Self::Score => "score",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Phase {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|p| p.name() == text).ok_or(())
    }
}

/// What a plan is compiled for: a small, enumerable set. Never a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShapeKey {
    /// What the plan is for.
    pub phase: Phase,
    /// Token bucket: the most tokens one replay reads; 0 where it reads none.
    pub tokens: usize,
    /// Slot bucket: how many slots one replay serves.
    pub slots: usize,
    /// Context bucket: positions must stay below this.
    pub context: usize,
}

impl fmt::Display for ShapeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} tokens={} slots={} context={}",
            self.phase, self.tokens, self.slots, self.context
        )
    }
}

/// A straight-line list of ops for one shape key.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What the plan is compiled for.
    pub key: ShapeKey,
    /// The `u32[1, 1]` Input that holds how many of the bucket's rows are valid; `None` where all are.
    /// Rows at or past the count hold unspecified values in Scratch and Output, and never reach State.
    pub count: Option<BufferId>,
    /// The ops, in order of execution.
    pub ops: Vec<Op>,
}

/// A set of plans over one table of buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// What the model calls itself; part of no promise.
    pub name: String,
    /// The buffers.
    pub buffers: BufferTable,
    /// The plans, no two with the same key.
    pub plans: Vec<Plan>,
}

impl Model {
    /// The index of the plan with this key.
    pub fn plan_index(&self, key: ShapeKey) -> Option<usize> {
        self.plans.iter().position(|p| p.key == key)
    }

    /// Token buckets of a phase, ascending.
    pub fn token_buckets(&self, phase: Phase) -> Vec<usize> {
        let mut buckets: Vec<usize> =
            self.plans.iter().filter(|p| p.key.phase == phase).map(|p| p.key.tokens).collect();
        buckets.sort_unstable();
        buckets.dedup();
        buckets
    }
}
