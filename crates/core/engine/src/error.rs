//! What can go wrong in a session.

use ampoule_backend::BackendError;
use ampoule_capsule::{CapsuleError, LineageError};

/// An engine operation failed. Unless the variant says otherwise, the slot is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The slot does not exist.
    #[error("there is no slot {slot}")]
    NoSuchSlot {
        /// The slot asked for.
        slot: u32,
    },
    /// The slot lost its state in an earlier failure.
    #[error("slot {slot} is empty after a failure ({cause}); restore a capsule or reset it")]
    SlotEmpty {
        /// The slot.
        slot: u32,
        /// The failure.
        cause: String,
    },
    /// The context is full.
    #[error(
        "the context holds {context} tokens: {wanted} more at position {position} do not fit; load the model with a longer context or roll back"
    )]
    ContextFull {
        /// Position of the slot.
        position: u32,
        /// Tokens that were to be read.
        wanted: usize,
        /// Tokens the context holds.
        context: usize,
    },
    /// A token outside the vocabulary.
    #[error(
        "token {token} is outside the vocabulary of {vocabulary}; is the tokenizer of another model?"
    )]
    TokenRange {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Nothing has been read yet, so there are no logits to draw from.
    #[error("slot {slot} has read nothing yet: append at least one token before decoding")]
    NothingRead {
        /// The slot.
        slot: u32,
    },
    /// A sampling parameter out of range.
    #[error("{name} = {value} is out of range: {range}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// A rollback forwards.
    #[error("slot {slot} is at position {position}: it cannot roll back to {wanted}")]
    RollbackAhead {
        /// The slot.
        slot: u32,
        /// Its position.
        position: u32,
        /// The position asked for.
        wanted: u32,
    },
    /// A slot was used in the middle of a rollback.
    #[error(
        "slot {slot} is at position {position}, but its rollback stood at {expected}: it was used meanwhile; begin the rollback anew"
    )]
    RollbackBroken {
        /// The slot.
        slot: u32,
        /// Its position.
        position: u32,
        /// Where the rollback left it.
        expected: u32,
    },
    /// A rollback behind an imported boundary whose file did not say which sampler settings led to it.
    #[error(
        "position {wanted} cannot be rebuilt: the capsule imported at position {position} has no journal of the settings that led there; export a capsule at {wanted} as well"
    )]
    NoJournal {
        /// Position of the imported boundary.
        position: u32,
        /// The position asked for.
        wanted: u32,
    },
    /// An experiment changed the slot's state.
    #[error(
        "slot {slot} holds state that an experiment changed, which is of no lineage; restore a capsule or reset it"
    )]
    Tainted {
        /// The slot.
        slot: u32,
    },
    /// State that was given up to be kept elsewhere.
    #[error(
        "the state up to position {position} is not in memory: bring the capsule back from where it is kept first"
    )]
    Away {
        /// Position of the boundary at its end.
        position: u32,
    },
    /// A capsule of another engine.
    #[error("the capsule belongs to another engine; export it there and import it here")]
    ForeignCapsule,
    /// A capsule file is damaged or does not fit.
    #[error(transparent)]
    Capsule(#[from] CapsuleError),
    /// A history does not hold together.
    #[error(transparent)]
    Lineage(#[from] LineageError),
    /// A capsule's state and what it says about itself disagree.
    #[error("the capsule says {what}, but its state says {found}; it is not used")]
    CapsuleState {
        /// What the manifest says.
        what: String,
        /// What the state says.
        found: String,
    },
    /// The backend refused or failed. Where it failed, the slot is empty and says so; where it refused (a budget, say),
    /// the slot is as it was.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The model lacks a buffer or plan that the engine needs.
    #[error("the model has no {what}; it was built for another engine")]
    Model {
        /// What is missing.
        what: String,
    },
}
