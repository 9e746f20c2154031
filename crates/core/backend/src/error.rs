//! What can go wrong between a plan and its device.

use crate::WeightError;

/// A backend's operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// Memory is short.
    #[error(
        "{what} needs {wanted} bytes, but only {available} are available; load a smaller model, a shorter context, fewer slots or with less room for capsules"
    )]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes there are.
        available: u64,
    },
    /// The budget for frozen state is used up.
    #[error(
        "a capsule of {wanted} bytes does not fit: {used} of the budget of {budget} bytes are in use; drop capsules or raise the budget"
    )]
    CapsuleBudget {
        /// Bytes wanted.
        wanted: usize,
        /// Bytes in use.
        used: usize,
        /// The budget.
        budget: usize,
    },
    /// All slots are taken.
    #[error("all {slots} slots are in use; drop one or load the model with more")]
    NoFreeSlot {
        /// Slots there are.
        slots: usize,
    },
    /// The slot does not exist.
    #[error("there is no slot {slot}")]
    NoSuchSlot {
        /// The slot asked for.
        slot: u32,
    },
    /// The plan does not exist.
    #[error("there is no plan {plan}; the model has {plans}")]
    NoSuchPlan {
        /// The plan asked for.
        plan: usize,
        /// How many there are.
        plans: usize,
    },
    /// The buffer has another role, or is smaller, than the call needs.
    #[error("buffer '{buffer}': {problem}")]
    WrongBuffer {
        /// The buffer.
        buffer: String,
        /// What does not fit.
        problem: String,
    },
    /// Frozen state of another program.
    #[error("this state was frozen by another model or device; export and import it instead")]
    ForeignState,
    /// The backend cannot run an op as the plan has it.
    #[error("the {backend} backend cannot run op {op}: {problem}")]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// The op.
        op: &'static str,
        /// Why not.
        problem: String,
    },
    /// A weight cannot be read.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The device is missing or failed.
    #[error("{device}: {problem}")]
    Device {
        /// The device or library.
        device: String,
        /// What happened, naming op or kernel where known.
        problem: String,
    },
}
