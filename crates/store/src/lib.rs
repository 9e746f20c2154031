//! A durable store of execution-state capsules: immutable segments named by their contents, small records that say what
//! belongs together, and heads that can be moved. In a folder, or (feature `s3`) on object storage that a fleet shares.
//!
//! docs/store.md has the format, what the medium must promise, and the order of writes. In short:
//!
//! - a **node** holds the rows between one boundary and the next, a **capsule** a node and the fixed state at its end: the
//!   same two parts as in the engine. A session of N turns costs O(N), and removing a capsule keeps what its descendants
//!   need;
//! - what [`Store::save`] returned is durable, and whatever is listed is whole;
//! - damage is found when it is read and reported by the name of the object; the rest stays usable;
//! - one process writes to a folder, any number read, without a lock, also during [`Store::gc`]. On object storage any
//!   number write.
//!
//! All calls block. A [`Store`] may be shared by threads.
//!
//! # From an engine to the store and back
//!
//! The engine's chain maps to [`Link`]s one to one, from the root on: own tokens, [`History::since`] the node's start as
//! `spans`, the lineage id, the node's own sampler events as `journal`, `imported_from` as `from` (roots only), and a
//! [`StateBytes`] that gives a range of a tensor (by its index in the layout) out of the frozen rows. The fixed state is
//! another [`StateBytes`]. The sources of links that this process has saved or loaded before are never asked, so every
//! turn may pass the whole chain.
//!
//! Back: [`Store::capsule`] reads the records (who it is, does it fit: compare [`StoredCapsule::scope`] before any state
//! is read), [`Store::rows`] the verified own rows of one node, [`Store::fixed`] the fixed state. Nodes have ids, so an
//! engine that holds the rows of a [`NodeId`] already need not read them again. [`Store::export`] and [`Store::import`]
//! are the way through a single capsule file.
//!
//! ```
//! use ampoule_capsule::{Digest, Fingerprint, Growth, Labels, Origin, Segment, StateLayout, StateTensor};
//! use ampoule_store::{Expected, Link, NewCapsule, Options, Scope, Slices, Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tensor = |name: &str, shape: &[usize], growth| StateTensor {
//!     name: name.into(),
//!     dtype: "f32".parse().unwrap(),
//!     shape: shape.to_vec(),
//!     kind: "demo".into(),
//!     growth,
//! };
//! let layout = StateLayout {
//!     tensors: vec![tensor("kv", &[1024, 2], Growth::Rows), tensor("cursor", &[1], Growth::Fixed)],
//! };
//! # let digest = Digest::of(b"demo");
//! let fingerprint = Fingerprint {
//!     layout: layout.digest(),
//!     # weights: digest, plan: digest, kernels: digest, device: digest, labels: Labels::default(),
//!     // ...
//! };
//! let scope = Scope { fingerprint, layout, salt: ampoule_capsule::salt_digest(b"tenant") };
//!
//! // A prefill of three tokens.
//! let (tokens, span) = ([5, 6, 7], Segment { start: 0, end: 3, origin: Origin::Prefill });
//! let lineage = scope.lineage().extend(scope.lineage().root(), span, &tokens)?;
//! let (kv, cursor) = ([1_u8; 24], 3_u32.to_le_bytes());
//! let (rows, fixed) = (Slices(vec![&kv, &[]]), Slices(vec![&[], &cursor]));
//! let link = Link { tokens: &tokens, spans: vec![span], lineage, from: None, journal: None, rows: &rows };
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("store");
//! let store = Store::open(&path, Options::default())?;
//! let capsule = NewCapsule { scope: &scope, links: &[link], fixed: &fixed, model: "demo", note: None };
//! let saved = store.save(&capsule)?;
//! store.set_head("main", Expected::Nothing, saved.id)?;
//!
//! let id = store.head("main")?.ok_or("no head")?;
//! let found = store.capsule(id)?;
//! assert_eq!((found.position(), found.tokens()), (3, vec![5, 6, 7]));
//! assert_eq!(store.rows(&found, 0)?.tensor(0), kv);
//! assert_eq!(store.fixed(&found)?.tensor(1), cursor);
//! # Ok(())
//! # }
//! ```
//!
//! [`Store::catalog`] has what a listing or a tree shows: own and shared bytes, parents, positions, tokens, heads, and what
//! cannot be read. [`tiers`] holds the budgets of device, host and disk and says what to move.
//!
//! [`History::since`]: ampoule_capsule::History::since
#![forbid(unsafe_code)]

mod codec;
mod error;
mod files;
mod frame;
mod heads;
mod identity;
mod load;
mod maintain;
mod memos;
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
pub use memos::Memo;
/// The crate whose types [`RemoteStorage::over`] takes.
#[cfg(feature = "s3")]
pub use object_store;
pub use records::{Scope, SegmentRef};
#[cfg(feature = "s3")]
pub use remote::{RemoteOptions, RemoteStorage};
pub use save::{Link, NewCapsule, Saved, Slices, StateBytes};
pub use storage::{Entry, Folder, Holder, Key, Object, Storage, Swapped, Version};
pub use store::{Options, Store};
