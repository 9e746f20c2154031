//! A durable store of execution-state capsules.
#![forbid(unsafe_code)]

mod codec;
mod error;
mod files;
mod frame;
mod heads;
mod identity;
mod load;
mod maintain;
mod records;
#[cfg(feature = "s3")]
mod remote;
mod save;
mod storage;
mod store;
pub mod tiers;

pub use codec::Compression;
pub use error::{
    Damage, Damaged, HeadError, KeyError, LoadError, MaintenanceError, OpenError, ReadError,
    SaveError, SourceError, StorageError, WriteError,
};
pub use files::{FileEntry, FileStorage, LockOutcome, ReadFile, RealFiles, Vfs, WriteFile};
pub use heads::{Expected, Head};
pub use identity::{CapsuleId, KeyId, NodeId, ScopeId, SegmentId, StoreKey};
pub use load::{PartBytes, StoredCapsule, StoredNode};
pub use maintain::{Amount, Catalog, FsckReport, GcReport, Listed, Problem};
/// The crate whose types [`RemoteStorage::over`] takes.
#[cfg(feature = "s3")]
pub use object_store;
pub use records::{Scope, SegmentRef};
#[cfg(feature = "s3")]
pub use remote::{RemoteOptions, RemoteStorage};
pub use save::{Link, NewCapsule, Saved, Slices, StateBytes};
pub use storage::{Entry, Folder, Holder, Key, Object, Storage, Swapped, Version};
pub use store::{Options, Store};
