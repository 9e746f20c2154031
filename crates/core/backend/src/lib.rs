//! The seam between a plan and the device that runs it.
//!
//! A [`Backend`] turns a sealed model and its weights into a [`Program`]: weights resident, slots allocated, plans
//! ready to replay. A program knows buffers, slots and copies, and nothing of tokens, sessions or files.
//!
//! # Contracts every backend keeps
//! - A replay changes nothing but Scratch and Output of the program and State of its slot.
//! - Results depend on the operands' values alone: not on thread count, on what ran before, or on how many rows of
//!   the token bucket are valid beside a row. No floating-point sum depends on the order in which threads arrive.
//! - After [`Backend::load`] no replay allocates.
//! - Copies are exact: what [`Program::freeze`] took, [`Program::thaw`] puts back bit for bit.
#![forbid(unsafe_code)]

mod error;
mod frozen;
pub mod host;

use std::ops::Range;
use std::sync::Arc;

use ampoule_plan::{BufferId, BufferTable, Growth, Sealed};
pub use ampoule_plan::{WeightError, WeightSource};

pub use error::BackendError;
pub use frozen::{Frozen, HostBudget, HostFrozen, Residence, check_regions};

/// What a backend runs on, for people and for fingerprints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The backend: `reference`, `cpu` or `cuda`.
    pub backend: &'static str,
    /// The class of device whose results are the same bits: architecture and instruction path, or GPU model.
    pub class: String,
    /// Versions of kernels and libraries that results depend on.
    pub kernels: String,
    /// For people: the device's name, cores, memory.
    pub description: String,
    /// For people: what makes it slower than it could be, a sentence each; part of the description, too.
    pub remarks: Vec<String>,
}

/// Names one slot of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// Whole rows of a buffer, to be copied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// The State buffer.
    pub buffer: BufferId,
    /// Its rows.
    pub rows: Range<usize>,
}

impl Region {
    /// Bytes the region covers.
    pub fn bytes(&self, table: &BufferTable) -> usize {
        (self.rows.end - self.rows.start) * table[self.buffer].row_bytes()
    }
}

/// What to allocate when a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Slots that may live at once.
    pub slots: usize,
    /// Bytes for frozen state on the device; reserved at load where the device has its own memory.
    pub capsule_bytes: usize,
}

/// Called with bytes done and bytes in all while weights load.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Makes programs.
pub trait Backend: Send + Sync {
    /// What it runs on.
    fn info(&self) -> DeviceInfo;

    /// Makes the model resident: weights copied, plans prepared, everything allocated that replays need.
    ///
    /// # Errors
    /// If memory is short, an op is not supported, the weights cannot be read or the device fails.
    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError>;
}

/// Counts since load, so that tests can hold a backend to its contracts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Replays, each one launch from the host's side.
    pub launches: u64,
    /// Allocations of device memory (or of the memory that stands for it), and of page-locked host memory for capsules.
    pub allocations: u64,
    /// Plans captured or compiled.
    pub captures: u64,
    /// Times the host waited for the device.
    pub synchronizations: u64,
}

/// Regions that become frozen state together.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The regions.
    pub regions: &'a [Region],
    /// Whether all of them are rows below the cursor: replays leave those as they are until the slot is reset or thawed, so
    /// they may be copied while replays go on.
    pub settled: bool,
}

/// One model resident on one device.
///
/// Calls of one program are ordered: each sees the effects of those before it.
pub trait Program: Send {
    /// The model.
    fn model(&self) -> &Arc<Sealed>;

    /// Takes a free slot. Its State is unspecified until a reset plan runs or all of it is thawed.
    ///
    /// # Errors
    /// If no slot is free.
    fn create_slot(&mut self) -> Result<SlotId, BackendError>;

    /// Gives a slot back.
    ///
    /// # Errors
    /// If there is no such slot.
    fn drop_slot(&mut self, slot: SlotId) -> Result<(), BackendError>;

    /// Writes the first `bytes.len()` bytes of an Input, as seen by the next [`Program::run`].
    ///
    /// # Errors
    /// If the buffer is no Input, or smaller.
    fn write_input(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), BackendError>;

    /// Replays a plan over a slot. May return before the device has finished.
    ///
    /// # Errors
    /// If there is no such slot or plan, or the device fails; the slot's State is then unspecified.
    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError>;

    /// Reads bytes `offset..offset + into.len()` of an Output as the last replay left it; returns as soon as they
    /// are there, which may be before the whole replay has finished.
    ///
    /// # Errors
    /// If the buffer is no Output, or smaller, or the device fails.
    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError>;

    /// Reads rows of a State buffer of a slot after all replays so far.
    ///
    /// # Errors
    /// If the region is not of a State buffer, `into` has not its size, or the device fails.
    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError>;

    /// Copies regions of a slot's State aside, as of all replays so far: each part becomes frozen state of its own, and there
    /// are as many in the answer, in their order. May return before the copies are done; whoever uses them waits.
    ///
    /// # Errors
    /// If a region is not State or the parts together are over the budget for frozen state; nothing is copied then.
    fn freeze_parts(
        &mut self,
        slot: SlotId,
        parts: &[Part<'_>],
    ) -> Result<Vec<Arc<dyn Frozen>>, BackendError>;

    /// [`freeze_parts`](Self::freeze_parts) of one part.
    ///
    /// # Errors
    /// As there.
    fn freeze(
        &mut self,
        slot: SlotId,
        regions: &[Region],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let mut parts = self.freeze_parts(slot, &[Part { regions, settled: false }])?;
        parts.pop().ok_or(BackendError::ForeignState)
    }

    /// Copies frozen regions into a slot, in order: of two that overlap the later wins.
    ///
    /// # Errors
    /// If any part was frozen by another program; nothing is copied then.
    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError>;

    /// Makes frozen state from bytes: of each region its rows, one after another.
    ///
    /// # Errors
    /// If the bytes have not the regions' size or the budget is used up.
    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError>;

    /// Where [`freeze`](Self::freeze) puts state.
    fn residence(&self) -> Residence {
        Residence::Host
    }

    /// Copies frozen state into the other memory, where a device has its own; elsewhere it is the same state. What was
    /// copied stays as it is.
    ///
    /// Only state that lies where [`residence`](Self::residence) says can be thawed.
    ///
    /// # Errors
    /// If the state was frozen by another program, that memory is full, or the device fails.
    fn relocate(
        &mut self,
        frozen: &Arc<dyn Frozen>,
        to: Residence,
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let _ = to;
        Ok(Arc::clone(frozen))
    }

    /// Overwrites all Scratch, Output and Input with a pattern of quiet NaNs: the dynamic twin of the seal.
    ///
    /// # Errors
    /// If the device fails.
    fn poison(&mut self) -> Result<(), BackendError>;

    /// Waits until all replays and copies so far are done.
    ///
    /// # Errors
    /// If the device failed in one of them.
    fn synchronize(&mut self) -> Result<(), BackendError>;

    /// Counts since load.
    fn counters(&self) -> Counters;

    /// Bytes of frozen state alive, and the budget.
    fn frozen_bytes(&self) -> (usize, usize);

    /// How long each launch of a plan takes on the device at a position, in the order of the plan. Launches of one kind
    /// are timed together, one after another, so what others do beside them is not in it. Overwrites the slot's State.
    ///
    /// # Errors
    /// If there is no such slot or plan, the backend cannot tell, or the device fails.
    fn time_steps(
        &mut self,
        slot: SlotId,
        plan: usize,
        position: u32,
    ) -> Result<Vec<StepTime>, BackendError> {
        let _ = (slot, plan, position);
        Err(BackendError::Unsupported {
            backend: "this backend",
            op: "step",
            problem: "does not time its steps".to_owned(),
        })
    }

    /// Milliseconds of a replay of a plan from a position on, where so many are one launch and launches follow each other
    /// without a pause: what more than one a launch gains. Overwrites the slot's State.
    ///
    /// # Errors
    /// As [`time_steps`](Self::time_steps).
    fn time_together(
        &mut self,
        slot: SlotId,
        plan: usize,
        position: u32,
        replays: usize,
    ) -> Result<f64, BackendError> {
        let _ = (slot, plan, position, replays);
        Err(BackendError::Unsupported {
            backend: "this backend",
            op: "step",
            problem: "does not launch several replays at once".to_owned(),
        })
    }
}

/// A launch that stands for some ops of a plan, and its time; see [`Program::time_steps`].
#[derive(Clone, Debug, PartialEq)]
pub struct StepTime {
    /// Indices in the plan.
    pub ops: Vec<usize>,
    /// Milliseconds.
    pub milliseconds: f64,
}

/// The State of a model as regions, looked up once: they are wanted at every boundary.
#[derive(Clone, Debug)]
pub struct StateRegions {
    fixed: Vec<Region>,
    growing: Vec<BufferId>,
}

impl StateRegions {
    /// Of this model's State.
    pub fn of(model: &Sealed) -> Self {
        let of_growth = |growth| {
            let state = model.state().iter().copied();
            state.filter(move |&id| model.buffer(id).growth() == Some(growth))
        };
        let whole = |buffer| Region { buffer, rows: 0..model.buffer(buffer).rows() };
        Self {
            fixed: of_growth(Growth::Fixed).map(whole).collect(),
            growing: of_growth(Growth::Rows).collect(),
        }
    }

    /// All Fixed State: what every boundary holds whole.
    pub fn fixed(&self) -> &[Region] {
        &self.fixed
    }

    /// Rows `rows` of every State buffer that grows by rows; nothing of no rows.
    pub fn rows(&self, rows: &Range<usize>) -> Vec<Region> {
        if rows.is_empty() {
            return Vec::new();
        }
        self.growing.iter().map(|&buffer| Region { buffer, rows: rows.clone() }).collect()
    }

    /// All State of a slot that has read so many tokens.
    pub fn at(&self, position: usize) -> Vec<Region> {
        [self.fixed(), &self.rows(&(0..position))].concat()
    }
}
