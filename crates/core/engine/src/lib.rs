//! Slots, prefill, decode, sampling and the capsule verbs, over any backend.
//!
//! The engine does no I/O and holds no clock: tokens go in, tokens and capsules come out. All state of a session
//! lies in the State buffers of a slot. What the engine keeps beside them is history (which tokens were read, how,
//! and which sampler settings were made where), so that lineages can be told apart and rolled back.
#![forbid(unsafe_code)]

mod chain;
mod engine;
mod error;
mod file;
mod generate;
mod lineage;
mod piece;
mod rollback;
mod sampling;
mod verbs;

pub use chain::{Chain, ChainLink, ChainScope, NewLink, StatePart, TensorBytes};
pub use engine::{Control, Engine, EngineOptions, Identity, PrefillProgress};
pub use error::EngineError;
pub use file::join_journals;
pub use generate::FinishReason;
pub use lineage::Capsule;
pub use piece::{PieceKind, StatePiece};
pub use rollback::{Rollback, Waypoints};
pub use sampling::SamplingParams;

pub use ampoule_backend::{BackendError, Counters, DeviceInfo, Residence, SlotId};
pub use ampoule_capsule::{Digest, Fingerprint, History, LineageId, Manifest, Origin, Segment};
