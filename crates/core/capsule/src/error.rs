//! Why a capsule is refused.

use crate::header::{FORMAT_VERSION, MAX_HEADER_BYTES};
use crate::{Digest, FingerprintMismatch, LayoutError, LineageError};

/// Why a capsule cannot be written, read or restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CapsuleError {
    /// The file ends before the header does.
    #[error(
        "the capsule is cut short: its header needs {needed} bytes, there are {available}; \
         copy or download it again"
    )]
    HeaderCutShort {
        /// Bytes that prefix and header take.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// The header length is out of bounds or not what the format allows.
    #[error(
        "header length {length} is not a multiple of 8 between {min} and {MAX_HEADER_BYTES}: \
         this is not an Ampoule capsule, or its first 8 bytes are damaged"
    )]
    HeaderLength {
        /// The length that the first 8 bytes give.
        length: u64,
        /// The least that the format allows.
        min: u64,
    },
    /// The header does not begin as a capsule's does.
    #[error(
        "no capsule header at byte 8: this is not an Ampoule capsule (a plain safetensors file is \
         not one), or its start is damaged"
    )]
    NotACapsule,
    /// The header's bytes are not those that were written.
    #[error(
        "header checksum mismatch: stored {stored}, computed {computed}; the header is damaged, \
         copy or download the file again"
    )]
    HeaderChecksum {
        /// The stored text, with unprintable bytes escaped.
        stored: String,
        /// What the bytes give.
        computed: Digest,
    },
    /// A version of the format that this reader does not know.
    #[error(
        "capsule format version '{found}' is not supported, this build reads {FORMAT_VERSION}: \
         use the Ampoule that wrote it, or prefill again"
    )]
    Version {
        /// The version in the file.
        found: String,
    },
    /// The manifest is not the JSON that the format asks for.
    #[error("the manifest cannot be read: {reason}; the program that wrote it is faulty")]
    Manifest {
        /// What is wrong, and where.
        reason: String,
    },
    /// The header is not the one encoding of its manifest that the format allows.
    #[error(
        "byte {offset} of the header is not as the format asks: found '{found}', expected \
         '{expected}'; the program that wrote it is faulty"
    )]
    NotCanonical {
        /// Offset in the file.
        offset: u64,
        /// What is there, cut short.
        found: String,
        /// What should be there, cut short.
        expected: String,
    },
    /// A text of the manifest is too long.
    #[error("{field} has {bytes} bytes, at most {max} are allowed: shorten '{text}...'")]
    Text {
        /// The field.
        field: &'static str,
        /// Its bytes.
        bytes: usize,
        /// The most it may have.
        max: usize,
        /// Its beginning.
        text: String,
    },
    /// The layout is not allowed, or the position is past its rows.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The fingerprint was made for another layout.
    #[error(
        "the fingerprint's layout digest is {fingerprint}, the layout's own is {layout}: make the \
         fingerprint from StateLayout::digest"
    )]
    LayoutDigest {
        /// In the fingerprint.
        fingerprint: Digest,
        /// Of the layout.
        layout: Digest,
    },
    /// The history does not end at the position.
    #[error("the capsule is at position {position}, but its history ends at {end}")]
    Position {
        /// The capsule's position.
        position: u32,
        /// The history's end.
        end: u32,
    },
    /// The parent is not before the capsule.
    #[error(
        "the capsule's parent is at position {parent}, which is not before its own, {position}"
    )]
    Parent {
        /// The parent's position.
        parent: u32,
        /// The capsule's position.
        position: u32,
    },
    /// The history is not in normal form, or the lineage node is not that of the tokens.
    #[error(transparent)]
    Lineage(#[from] LineageError),
    /// The file has fewer or more bytes than its header asks for.
    #[error("the capsule has {actual} bytes, its header asks for {expected}: {}", length_advice(*expected, *actual))]
    Length {
        /// Bytes by the header.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// The bytes of a tensor are not those that were written.
    #[error(
        "checksum mismatch in tensor '{tensor}', bytes {start}..{end}: stored {stored}, computed \
         {computed}; the file is damaged, copy or download it again"
    )]
    TensorChecksum {
        /// The tensor.
        tensor: String,
        /// Offset in the file of its first byte.
        start: u64,
        /// Offset in the file past its last byte.
        end: u64,
        /// The stored digest.
        stored: Digest,
        /// What the bytes give.
        computed: Digest,
    },
    /// The capsule belongs to another tenant.
    #[error("the capsule belongs to another tenant and cannot be restored here")]
    OtherTenant,
    /// The capsule was made by other weights, plans, kernels or devices.
    #[error(transparent)]
    Fingerprint(#[from] FingerprintMismatch),
    /// The capsule holds other state tensors than the model has.
    #[error(
        "the capsule's layout does not match at state tensor '{tensor}': {reason}; use the context \
         length and state types that the capsule was made with, or prefill again"
    )]
    OtherLayout {
        /// The first tensor that differs.
        tensor: String,
        /// How.
        reason: String,
    },
    /// Bytes were given for a tensor that the layout does not have.
    #[error("the layout has no state tensor '{tensor}'")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
    },
    /// Bytes were given twice for one tensor.
    #[error("state tensor '{tensor}' was given twice")]
    TensorTwice {
        /// The tensor.
        tensor: String,
    },
    /// No bytes were given for a tensor.
    #[error("state tensor '{tensor}' was not given: a capsule holds all state")]
    TensorMissing {
        /// The tensor.
        tensor: String,
    },
    /// A tensor was given more or fewer bytes than it has at the position.
    #[error(
        "state tensor '{tensor}' takes {expected} bytes at position {position}, {actual} were given"
    )]
    TensorBytes {
        /// The tensor.
        tensor: String,
        /// The capsule's position.
        position: u32,
        /// Bytes that it takes.
        expected: usize,
        /// Bytes that were given.
        actual: usize,
    },
    /// There is not one digest a tensor.
    #[error("the layout has {expected} state tensors, {actual} digests were given")]
    DigestCount {
        /// Tensors in the layout.
        expected: usize,
        /// Digests that were given.
        actual: usize,
    },
    /// The header would be longer than a reader accepts.
    #[error(
        "the header would take {bytes} bytes, at most {MAX_HEADER_BYTES} are allowed: the history \
         has too many segments"
    )]
    HeaderTooLong {
        /// Bytes that it would take.
        bytes: usize,
    },
}

fn length_advice(expected: u64, actual: u64) -> String {
    if actual < expected {
        let missing = expected - actual;
        format!("{missing} are missing at the end, copy or download it again")
    } else {
        let extra = actual - expected;
        format!("{extra} too many at the end, which no checksum covers; they must be removed")
    }
}
