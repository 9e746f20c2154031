//! Ampoule: low-latency inference with execution-state capsules.
//!
//! [`Ampoule::load`] makes a model resident on a device. Tokens go into slots; a slot's complete state can be frozen
//! as a [`Capsule`], restored, forked, rolled back, saved and loaded, and goes on exactly as if nothing had happened.
//!
//! ```no_run
//! use ampoule::{Ampoule, LoadOptions};
//!
//! # fn main() -> Result<(), ampoule::Error> {
//! let mut model = Ampoule::load(ampoule::NANO, &LoadOptions::default(), &mut |_, _| {})?;
//! let slot = model.engine.create_slot()?;
//! let prompt = model.encode_prompt("The quick brown fox")?;
//! model.append(slot, &prompt)?;
//! let capsule = model.engine.snapshot(slot)?; // frozen: the whole execution state
//! let twins = model.engine.fork(&capsule, &[Some(1), Some(2)])?; // nothing is read again
//! model.save(&capsule, "fox.ampoule".as_ref())?;
//! # let _ = twins;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod ablate;
mod cache;
mod constrained;
mod decoded;
mod error;
mod files;
mod load;
mod reply;
mod stores;
mod texts;
mod turns;
mod verify;

pub use ablate::{Ablation, AblationReport};
pub use cache::{
    CacheError, CacheEvent, CacheOptions, CachedCapsule, CapsuleCache, CapsuleKey, TierBytes,
};
pub use error::{Error, UnknownDevice};
pub use files::{CapsuleReader, check_writable, write_atomically, write_privately};
pub use load::{Ampoule, DecodeTimes, Device, LoadOptions};
pub use reply::{Reply, ReplyOptions, ReplyStep};
pub use stores::{CapsuleStore, DetachedCapsule, StoreError, StoreOptions, StoredState};
pub use texts::{TEXTS, sample_tokens};
pub use turns::{Turn, TurnsOptions, TurnsReport, turns};
pub use verify::{LevelReport, VerifyOptions, VerifyReport};

pub use ampoule_backend::{Backend, BackendError, Region, StateRegions, StepTime};
pub use ampoule_capsule::{
    CapsuleError, CapsuleFile, CapsuleHeader, Component, LineageError, Manifest,
};
pub use ampoule_cuda::GpuInfo;
pub use ampoule_cuda::bench::{GpuBandwidth, PlainCopy};
pub use ampoule_engine::{
    Capsule, Control, Counters, DeviceInfo, Digest, Engine, EngineError, EngineOptions,
    Fingerprint, FinishReason, History, Identity, LineageId, Origin, PieceKind, PrefillProgress,
    Residence, Rollback, SamplingParams, Segment, SlotId, StatePiece, Waypoints,
};
pub use ampoule_models::chat::{ChatError, ChatMessage, ChatTemplate};
pub use ampoule_models::decoder::BuildError;
pub use ampoule_models::error::ModelFileError;
pub use ampoule_models::model::{NANO, OpenError};
pub use ampoule_models::tokenizer::{
    EncodeOptions, Passed, StopMatcher, StreamDecoder, TokenKind, Tokenizer, TokenizerError,
};
pub use ampoule_plan::{
    Buffer, BufferId, BufferTable, Cost, CostPoint, DType, Model as PlanModel, Op, Phase, Plan,
    Role, Sealed, StateKind, WeightSource,
};

/// The backends there are, for [`Ampoule::load_on`].
pub mod backends {
    pub use ampoule_cpu::{CpuBackend, Isa};
    pub use ampoule_cuda::{CudaBackend, CudaOptions, LIBS_VARIABLE};
    pub use ampoule_reference::ReferenceBackend;
}

/// What a backend implements: [`backend::Backend`], [`backend::Program`] and
/// [`Frozen`](backend::Frozen), with everything in their signatures.
///
/// Its [`LoadOptions`](backend::LoadOptions) are the backend's share of [`crate::LoadOptions`].
pub mod backend {
    pub use ampoule_backend::*;
}

/// The file format of capsules, with every type that its manifest is made of.
pub mod format {
    pub use ampoule_capsule::*;
}

/// What a [`CapsuleStore`] is made of: ids, names, options, errors, reports.
pub mod store {
    pub use ampoule_store::*;
}

/// Plans: buffers, ops and phases, as backends get them.
pub mod plan {
    pub use ampoule_plan::*;
}
