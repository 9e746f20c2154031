//! What a case is: a tiny sealed model, and scenarios that are replayed on it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ampoule_plan::{
    Buffer, BufferId, BufferTable, DType, Model, RandomFill, Role, Sealed, WeightError,
    WeightSource,
};
use ampoule_reference::{load_elements, store_elements};

/// How near a result must be to the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tolerance {
    /// The same bits.
    Bits,
    /// The same numbers; zeros of either sign are one number.
    Value,
    /// The tolerance of the element type, times this.
    Relative(f64),
    /// As `Relative`; where the reference has a NaN, in rows nobody wrote, the same bits.
    OverStale(f64),
}

impl Tolerance {
    pub(crate) fn over_stale(self) -> Self {
        match self {
            Self::Relative(scale) => Self::OverStale(scale),
            other => other,
        }
    }
}

/// When an Output is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Its valid token rows, after every replay.
    TokenRows,
    /// All of it, after the last replay.
    Last,
}

/// An Output that is compared.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) buffer: BufferId,
    pub(crate) reading: Reading,
}

/// Bytes of a buffer; shared between scenarios.
pub(crate) type Bytes = Arc<[u8]>;

/// One replay.
#[derive(Clone, Debug)]
pub(crate) struct Replay {
    pub(crate) plan: usize,
    pub(crate) inputs: Vec<(BufferId, Bytes)>,
    /// Outputs read afterwards, and how many of their rows.
    pub(crate) reads: Vec<(BufferId, usize)>,
}

/// Which State must be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum States {
    All,
    /// Fixed State whole; of State that grows by rows, the rows below this.
    RowsBelow(usize),
    None,
}

/// What a sampling step drew from; near ties are judged by it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DrawOf {
    pub(crate) params: [f32; 8],
    pub(crate) seed: [u32; 2],
    pub(crate) position: u32,
    pub(crate) token: BufferId,
    pub(crate) adjusted: BufferId,
}

/// What a scenario's trace must be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expect {
    /// Near what the reference backend makes of it.
    Reference,
    /// As `Reference`, but another token may be drawn in a near tie.
    Draw(DrawOf),
    /// Bit for bit what an earlier scenario gave on the same backend: of token rows the first `rows`.
    Same { scenario: usize, rows: Option<usize>, states: States },
}

/// State put in place, replays, and what must come of them.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    /// The name of the property.
    pub(crate) check: &'static str,
    pub(crate) state: Vec<(BufferId, Bytes)>,
    pub(crate) replays: Vec<Replay>,
    pub(crate) expect: Expect,
    /// Runs on the program's second slot.
    pub(crate) second_slot: bool,
    /// Poisons before every replay.
    pub(crate) poison: bool,
}

/// A tiny model and what is done with it.
pub(crate) struct Case {
    pub(crate) model: Arc<Sealed>,
    pub(crate) weights: Weights,
    pub(crate) tolerances: HashMap<BufferId, Tolerance>,
    /// Outputs read row by row.
    pub(crate) token_rows: HashSet<BufferId>,
    pub(crate) scenarios: Vec<Scenario>,
}

impl Case {
    /// The same case with quantised weights dequantised and rounded to bfloat16: what a backend computes that holds them
    /// so. `None` if no weight is quantised.
    pub(crate) fn with_bf16_weights(&self) -> Option<(Arc<Sealed>, Weights)> {
        let model = self.model.model();
        // Blocks that are no weights stay what they are: only copies touch them.
        let held = |b: &Buffer| b.dtype.is_quantized() && b.role == Role::Weight;
        if !model.buffers.iter().any(|(_, b)| held(b)) {
            return None;
        }
        let mut buffers = BufferTable::default();
        let mut weights = self.weights.clone();
        for (id, buffer) in model.buffers.iter() {
            let mut buffer = buffer.clone();
            if held(&buffer) {
                let Some(Weight::Stored(blocks)) = self.weights.0.get(&id) else {
                    panic!("quantised weights of cases are stored");
                };
                let values = load_elements(buffer.dtype, blocks);
                let mut bytes = vec![0; 2 * values.len()];
                store_elements(DType::BF16, &values, &mut bytes);
                weights.0.insert(id, Weight::Stored(bytes));
                buffer.dtype = DType::BF16;
            }
            let same = buffers.add(buffer).expect("the same names");
            assert_eq!(same, id, "buffers keep their order");
        }
        let model = Model { name: model.name.clone(), buffers, plans: model.plans.clone() };
        Some((Arc::new(model.seal().expect("only weights' types differ")), weights))
    }

    pub(crate) fn tolerance(&self, buffer: BufferId) -> Tolerance {
        self.tolerances.get(&buffer).copied().unwrap_or(Tolerance::Bits)
    }
}

/// A weight's contents.
#[derive(Clone, Debug)]
pub(crate) enum Weight {
    Stored(Vec<u8>),
    Recipe(RandomFill, DType),
}

/// Weights in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Weights(pub(crate) HashMap<BufferId, Weight>);

impl WeightSource for Weights {
    fn random(&self, buffer: BufferId) -> Option<RandomFill> {
        match self.0.get(&buffer) {
            Some(Weight::Recipe(fill, _)) => Some(*fill),
            _ => None,
        }
    }

    fn read(&self, buffer: BufferId, offset: usize, into: &mut [u8]) -> Result<(), WeightError> {
        let wrong = |problem: &str| WeightError {
            buffer: format!("#{}", buffer.0),
            problem: problem.to_owned(),
        };
        match self.0.get(&buffer).ok_or_else(|| wrong("is no weight of the case"))? {
            Weight::Stored(bytes) => {
                let part = offset
                    .checked_add(into.len())
                    .and_then(|end| bytes.get(offset..end))
                    .ok_or_else(|| wrong("is smaller"))?;
                into.copy_from_slice(part);
            }
            Weight::Recipe(fill, dtype) => {
                let size = dtype.block_bytes();
                for (i, byte) in into.iter_mut().enumerate() {
                    let at = offset + i;
                    let mut element = [0; 4];
                    let value = fill.value((at / size) as u64);
                    store_elements(*dtype, &[value], &mut element[..size]);
                    *byte = element[at % size];
                }
            }
        }
        Ok(())
    }
}
