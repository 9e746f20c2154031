//! Why the store refuses or fails: one enum per family of operations.

use std::io;
use std::time::Duration;

use ampoule_capsule::{CapsuleError, LayoutError, LineageError};

use crate::identity::{CapsuleId, KeyId};
use crate::storage::{Folder, Holder, Key};

/// Whatever kept a source from giving the bytes of a tensor.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// A key that cannot be had or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The key file cannot be read.
    #[error("cannot read the store key from {origin}: {source}")]
    Read {
        /// Where it should be.
        origin: String,
        /// The failure.
        source: io::Error,
    },
    /// It is no key.
    #[error("{origin} does not hold a store key: 32 bytes, or 64 hexadecimal characters")]
    Form {
        /// Where it came from.
        origin: String,
    },
    /// The system gave no random bytes.
    #[error("the system gives no random bytes: {reason}")]
    Randomness {
        /// What it said.
        reason: String,
    },
    /// More bytes than the cipher takes at once.
    #[error("{bytes} bytes are more than one object can be sealed with")]
    TooLong {
        /// The bytes.
        bytes: usize,
    },
}

/// The storage beneath the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// An operation on one object failed.
    #[error("cannot {action} '{object}' in {place}: {source}{}", advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The object or folder.
        object: String,
        /// The store.
        place: String,
        /// The failure.
        source: io::Error,
    },
    /// A sync failed earlier: what was written around then may be lost, and a second sync could claim otherwise.
    #[error(
        "{place} takes no more writes: an earlier sync failed ({reason}); check the medium, then open the store again \
         and run fsck"
    )]
    Latched {
        /// The store.
        place: String,
        /// The failure.
        reason: String,
    },
    /// The object storage gave up after retries.
    #[error("cannot {action} '{object}' in {place}, tried {tries} times: {reason}")]
    Remote {
        /// What was tried.
        action: &'static str,
        /// The object or folder.
        object: String,
        /// The store.
        place: String,
        /// How often.
        tries: u32,
        /// What the last try met.
        reason: String,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; the disk is full: remove capsules, run gc with a grace of 0, and try again (what was saved before is safe)"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; the folder cannot be written: open the store read-only, or change its permissions"
        }
        _ => "",
    }
}

impl StorageError {
    /// Whether the medium is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

/// What is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// It is shorter or longer than its header says.
    #[error("it has {actual} bytes, not {expected}")]
    Length {
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that it has.
        actual: u64,
    },
    /// Its first bytes are not those of an object of this store.
    #[error("its header is damaged: {reason}")]
    Header {
        /// What is wrong.
        reason: String,
    },
    /// A version of the format that this reader does not know.
    #[error("it has format version {found}, this build reads 1: use the Ampoule that wrote it")]
    Version {
        /// The version.
        found: u16,
    },
    /// The bytes are not those that were written.
    #[error("its bytes do not match their checksum")]
    Checksum,
    /// The bytes are sound but belong under another name.
    #[error("its bytes belong under another name: the file was renamed or swapped")]
    Name,
    /// It is encrypted, and no key was given.
    #[error("it is encrypted with key {key}; open the store with that key")]
    Sealed {
        /// The key that it needs.
        key: KeyId,
    },
    /// The key does not open it.
    #[error("it is not sealed by this store's key for this name")]
    Seal,
    /// The coded bytes cannot be decoded.
    #[error("it cannot be decoded: {reason}")]
    Decode {
        /// What is wrong.
        reason: String,
    },
    /// The record in it is not what the format asks for.
    #[error("its record is not allowed: {reason}; the program that wrote it is faulty")]
    Record {
        /// What is wrong.
        reason: String,
    },
}

/// One damaged object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{object}' is damaged: {damage}")]
pub struct Damaged {
    /// The object.
    pub object: Key,
    /// What is wrong with it.
    pub damage: Damage,
}

/// Reading one object failed: the storage, or the object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The object is damaged.
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process owns it.
    #[error("{place} is in use by {holder}: end that process, or open the store read-only")]
    InUse {
        /// The store.
        place: String,
        /// Who owns it.
        holder: Holder,
    },
    /// There is no store.
    #[error("{place} is not a capsule store: {reason}")]
    NotAStore {
        /// Where it should be.
        place: String,
        /// What is there.
        reason: &'static str,
    },
    /// The store is sealed and no key was given.
    #[error("{place} is encrypted with key {key}: give that key")]
    KeyNeeded {
        /// The store.
        place: String,
        /// The key that it needs.
        key: KeyId,
    },
    /// The key is not the store's.
    #[error("{place} is encrypted with key {needed}, the key given is {given}")]
    WrongKey {
        /// The store.
        place: String,
        /// The key that it needs.
        needed: KeyId,
        /// The key that was given.
        given: KeyId,
    },
    /// A key was given for a store that is not encrypted.
    #[error(
        "{place} is not encrypted, but a key was given: leave the key out, or make a new store"
    )]
    NotSealed {
        /// The store.
        place: String,
    },
    /// The object storage does not enforce conditional writes.
    #[error(
        "{place} does not enforce conditional writes ({what}): two writers could overwrite each other's heads; use a \
         storage that does"
    )]
    NoConditionalWrites {
        /// The store.
        place: String,
        /// Which write went through that must not.
        what: &'static str,
    },
    /// An option is out of its range.
    #[error("store option {option}: {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The store's own record is damaged, or the storage failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The record could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Writing one object failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Encryption failed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Compression failed.
    #[error("'{object}' cannot be compressed: {source}")]
    Compression {
        /// The object.
        object: Key,
        /// The failure.
        source: io::Error,
    },
    /// The store was opened for reading.
    #[error("the store was opened read-only")]
    ReadOnly,
    /// The object is longer than the format allows.
    #[error("{what} takes {bytes} bytes, at most {max} are allowed")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// The bytes.
        bytes: u64,
        /// The most.
        max: u64,
    },
}

/// Why a capsule is not saved. What had been saved before is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// An object could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// An object that is to be shared could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It would go over the quota.
    #[error(
        "the store holds {used} bytes of its quota of {quota}, {wanted} more are wanted: remove capsules and run gc"
    )]
    Quota {
        /// Bytes that it holds.
        used: u64,
        /// Bytes that it may hold.
        quota: u64,
        /// Bytes that are wanted.
        wanted: u64,
    },
    /// The layout is not allowed, or does not reach the position.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The fingerprint was made for another layout.
    #[error(
        "the fingerprint's layout digest is not the layout's: make it from StateLayout::digest"
    )]
    LayoutDigest,
    /// The tokens, spans and lineage of a link do not agree.
    #[error("link {link} of the chain: {source}")]
    Lineage {
        /// Which link, from the root.
        link: usize,
        /// How they disagree.
        source: LineageError,
    },
    /// There is no link.
    #[error("a capsule needs a chain of at least one link, also at position 0")]
    EmptyChain,
    /// Only the first link can begin from a node that is not in the chain.
    #[error(
        "link {link} of the chain begins from a lineage node of its own, which only the first may"
    )]
    InnerOrigin {
        /// Which link, from the root.
        link: usize,
    },
    /// A text is too long.
    #[error("{field} has {bytes} bytes, at most {max} are allowed")]
    Text {
        /// The field.
        field: &'static str,
        /// Its bytes.
        bytes: usize,
        /// The most.
        max: usize,
    },
    /// The source of a tensor's bytes failed.
    #[error("the bytes of state tensor '{tensor}' cannot be had: {source}")]
    Source {
        /// The tensor.
        tensor: String,
        /// The failure.
        source: SourceError,
    },
    /// The source gave more or fewer bytes than were asked for.
    #[error("state tensor '{tensor}': {expected} bytes were asked for, {actual} given")]
    SourceBytes {
        /// The tensor.
        tensor: String,
        /// Bytes asked for.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// It took so long that a gc elsewhere may have counted its objects as garbage.
    #[error(
        "the save took {took:?}, more than a quarter of the store's grace of {grace:?}: what was uploaded is kept for \
         now, save again to go on from there"
    )]
    TooSlow {
        /// How long it took.
        took: Duration,
        /// The store's grace.
        grace: Duration,
    },
}

/// Why a capsule cannot be loaded. Others are not affected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no such capsule.
    #[error("there is no capsule {capsule} in {place}")]
    NoSuchCapsule {
        /// The capsule.
        capsule: CapsuleId,
        /// The store.
        place: String,
    },
    /// It was removed while it was being read.
    #[error("capsule {capsule} was removed while it was being read")]
    Removed {
        /// The capsule.
        capsule: CapsuleId,
    },
    /// Something that it needs is damaged.
    #[error("capsule {capsule} cannot be loaded: {source}; other capsules are not affected")]
    Damaged {
        /// The capsule.
        capsule: CapsuleId,
        /// The object, and what is wrong with it.
        source: Damaged,
    },
    /// There is no memory for it.
    #[error("capsule {capsule} takes {bytes} bytes, which cannot be had")]
    Memory {
        /// The capsule.
        capsule: CapsuleId,
        /// The bytes.
        bytes: u64,
    },
    /// The capsule file format refuses it.
    #[error("capsule {capsule} cannot be exported: {source}")]
    File {
        /// The capsule.
        capsule: CapsuleId,
        /// Why.
        source: CapsuleError,
    },
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Why a head is not set, read or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeadError {
    /// The name cannot be used.
    #[error("'{name}' cannot name a head: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// Somebody else moved it.
    #[error(
        "head '{name}' is {found}, not {expected}: another writer moved it; load it and try again"
    )]
    Conflict {
        /// The head.
        name: String,
        /// Where it was expected to point, in words.
        expected: String,
        /// Where it points, in words.
        found: String,
    },
    /// The capsule that it should point to is not there.
    #[error(
        "head '{name}' cannot point to capsule {capsule}, which is not in the store: save it first"
    )]
    NoSuchCapsule {
        /// The head.
        name: String,
        /// The capsule.
        capsule: CapsuleId,
    },
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Why a removal, gc or fsck stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaintenanceError {
    /// A head points to the capsule.
    #[error("capsule {capsule} is what head '{head}' points to: remove or move the head first")]
    HasHead {
        /// The capsule.
        capsule: CapsuleId,
        /// The head.
        head: String,
    },
    /// What a capsule needs cannot be told, so nothing was deleted.
    #[error(
        "gc deleted nothing, since it cannot tell what capsule {capsule} needs: {source}; run fsck, then remove that \
         capsule or save it again"
    )]
    Unknown {
        /// The capsule.
        capsule: CapsuleId,
        /// The damaged object.
        source: Damaged,
    },
    /// A head is damaged, so it cannot be told which capsule must stay.
    #[error("nothing was removed: {source}; run fsck, then remove or set that head again")]
    Head {
        /// The damaged object.
        source: Damaged,
    },
    /// The grace is too short for this storage.
    #[error(
        "a grace of {wanted:?} is not safe in {place}, where others may be saving: the least is the store's own, {least:?}"
    )]
    Grace {
        /// The store.
        place: String,
        /// What was asked for.
        wanted: Duration,
        /// The least.
        least: Duration,
    },
    /// An object could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An object could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Deletion or listing failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl From<StorageError> for SaveError {
    fn from(error: StorageError) -> Self {
        Self::Write(error.into())
    }
}

impl From<StorageError> for HeadError {
    fn from(error: StorageError) -> Self {
        Self::Write(error.into())
    }
}

impl From<StorageError> for OpenError {
    fn from(error: StorageError) -> Self {
        Self::Read(error.into())
    }
}

/// Names a folder in a message.
pub(crate) fn folder_name(folder: Folder) -> String {
    match folder.name() {
        "" => ".".to_owned(),
        name => name.to_owned(),
    }
}
