//! Execution-state capsules: what one is, and its file format.
//!
//! A capsule is a frozen boundary of a model: every byte of its state at one token position, and a
//! [`Manifest`] that says which model, which tokens and which history made those bytes. This crate
//! holds the words and the bytes and does no I/O:
//!
//! - [`Fingerprint`]: what must be equal for a capsule to fit a model;
//! - [`StateLayout`]: the named state tensors, and which of them grow by a row a token;
//! - [`History`], [`LineageId`]: how the rows were made, and the identity of a boundary;
//! - [`CapsuleWriter`], [`CapsuleFile`], [`CapsuleHeader`]: the file, which is a safetensors file.
//!
//! The byte layout is specified in `docs/capsule-format.md`.
//!
//! ```
//! use ampoule_capsule::{
//!     CapsuleFile, CapsuleWriter, Digest, Fingerprint, Growth, History, Labels, LineageScope,
//!     Manifest, Origin, StateLayout, StateTensor, salt_digest,
//! };
//! use ampoule_plan::DType;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layout = StateLayout {
//!     tensors: vec![StateTensor {
//!         name: "layers.0.kv.key".into(),
//!         dtype: DType::F32,
//!         shape: vec![128, 2], // 128 rows at most, 2 elements a row
//!         kind: "kv_cache".into(),
//!         growth: Growth::Rows,
//!     }],
//! };
//! let fingerprint = Fingerprint {
//!     weights: Digest::of(b"weights"),
//!     plan: Digest::of(b"plan"),
//!     kernels: Digest::of(b"kernels"),
//!     device: Digest::of(b"device"),
//!     layout: layout.digest(),
//!     labels: Labels { device: "cpu x86_64".into(), ..Labels::default() },
//! };
//! let tokens = [11, 12, 13];
//! let salt = salt_digest(b"tenant-1");
//! let mut history = History::new();
//! history.append(Origin::Prefill, 2)?;
//! history.append(Origin::Decode, 1)?;
//! let scope = LineageScope { fingerprint: fingerprint.digest(), salt };
//! let manifest = Manifest {
//!     producer: "ampoule 0.1.0".into(),
//!     model: "example".into(),
//!     position: 3,
//!     lineage: scope.advance(scope.root(), 0, &history, &tokens)?,
//!     history,
//!     parent: None,
//!     salt,
//!     fingerprint,
//!     layout,
//!     journal: None,
//!     note: None,
//! };
//! let (ancestor_rows, own_rows) = ([0_u8; 16], [1_u8; 8]);
//! let mut writer = CapsuleWriter::new(&manifest, &tokens)?;
//! writer.add("layers.0.kv.key", &[&ancestor_rows, &own_rows])?;
//! let bytes = writer.finish()?.to_bytes();
//!
//! let capsule = CapsuleFile::parse(&bytes)?;
//! capsule.check_fits(&manifest.fingerprint, &manifest.layout, &salt)?;
//! assert_eq!(capsule.tokens().collect::<Vec<_>>(), tokens);
//! assert_eq!(capsule.tensor("layers.0.kv.key").unwrap().len(), 24);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod digest;
mod error;
mod file;
mod fingerprint;
mod header;
mod json;
mod layout;
mod lineage;
mod manifest;
mod writer;

pub use digest::{Digest, ParseDigestError, salt_digest};
pub use error::CapsuleError;
pub use file::{CapsuleFile, TensorPayload};
pub use fingerprint::{Component, Fingerprint, FingerprintMismatch, Labels};
pub use header::{CapsuleHeader, FORMAT_VERSION, MAX_HEADER_BYTES, TensorEntry};
pub use layout::{
    Growth, LayoutError, MAX_KIND_BYTES, MAX_NAME_BYTES, MAX_RANK, MAX_TENSORS, StateLayout,
    StateTensor, TOKENS,
};
pub use lineage::{History, LineageError, LineageId, LineageScope, Origin, Segment};
pub use manifest::{MAX_JOURNAL_BYTES, MAX_NOTE_BYTES, MAX_TEXT_BYTES, Manifest, Parent};
pub use writer::{CapsuleWriter, EncodedCapsule, PayloadDigests, encode_header, to_bytes};
