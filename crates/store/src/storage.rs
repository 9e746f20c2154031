//! Where objects lie: what the store asks of a folder on disk and of object storage alike.

use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::error::{OpenError, StorageError};

/// The kinds of objects, each in a folder of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Folder {
    /// The store's own record.
    Root,
    /// Scopes: fingerprint, layout, salt.
    Scopes,
    /// Immutable bytes of state.
    Segments,
    /// Row nodes.
    Nodes,
    /// Capsules.
    Capsules,
    /// Mutable names.
    Heads,
    /// Lists of objects that a gc will delete after the grace.
    Condemned,
    /// Small contents with a name.
    Memos,
}

impl Folder {
    /// Every folder but the root.
    pub const ALL: [Self; 7] = [
        Self::Scopes,
        Self::Segments,
        Self::Nodes,
        Self::Capsules,
        Self::Heads,
        Self::Condemned,
        Self::Memos,
    ];

    /// Its name; empty for the root.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "",
            Self::Scopes => "scopes",
            Self::Segments => "segments",
            Self::Nodes => "nodes",
            Self::Capsules => "capsules",
            Self::Heads => "heads",
            Self::Condemned => "condemned",
            Self::Memos => "memos",
        }
    }
}

/// The name of an object: a folder, and a name of lower-case letters, digits, `.` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The folder.
    pub folder: Folder,
    /// The name within it.
    pub name: String,
}

impl Key {
    /// A key.
    pub fn new(folder: Folder, name: impl fmt::Display) -> Self {
        Self { folder, name: name.to_string() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.folder.name() {
            "" => f.write_str(&self.name),
            folder => write!(f, "{folder}/{}", self.name),
        }
    }
}

/// What a listing says about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name within the folder.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// When it was last written, by the storage's own clock.
    pub modified: SystemTime,
}

/// Which contents of a mutable object somebody saw; opaque.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(pub String);

/// Whether a conditional write went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// It did, and is durable.
    Yes,
    /// Somebody else wrote first; nothing changed.
    No,
}

/// An object open for reading.
pub trait Object: Send + Sync {
    /// Its bytes.
    fn bytes(&self) -> u64;

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// If the storage fails, or the object ends before.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StorageError>;

    /// Says that these bytes will be read soon. A hint: it changes no result and may reach past the end.
    fn prefetch(&self, offset: u64, bytes: u64) {
        let _ = (offset, bytes);
    }
}

/// Bytes that lie in memory.
impl Object for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(into.len());
        let bytes = self.get(start..end).ok_or_else(|| StorageError::Io {
            action: "read",
            object: "an object in memory".to_owned(),
            place: "memory".to_owned(),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        })?;
        into.copy_from_slice(bytes);
        Ok(())
    }
}

/// The storage beneath a store.
///
/// Immutable objects are published whole by [`put`](Self::put) and made durable by [`flush`](Self::flush); a reader
/// never sees a part of one. Heads are written by [`swap`](Self::swap) alone.
pub trait Storage: Send + Sync {
    /// What it is, for messages.
    fn describe(&self) -> String;

    /// Whether only one process writes at a time, and holds the lock until it is dropped.
    fn single_writer(&self) -> bool;

    /// Readies the storage for writing: takes the lock, makes folders, clears what dead writers left, probes that
    /// conditional writes are enforced.
    ///
    /// # Errors
    /// If another process owns it, it cannot be written, or conditional writes are not enforced.
    fn begin_writing(&self) -> Result<(), OpenError>;

    /// Publishes an immutable object: its bytes are `pieces` laid end to end. After a return without error its contents
    /// are durable, its name is so after [`flush`](Self::flush) of its folder. An object of that name is replaced.
    ///
    /// # Errors
    /// If the storage fails; then there is no object of that name, or the old one, or the whole new one.
    fn put(&self, key: &Key, pieces: &[&[u8]]) -> Result<(), StorageError>;

    /// Makes durable whatever was published in or removed from these folders, by whomever.
    ///
    /// # Errors
    /// If the storage fails. It then takes no more writes.
    fn flush(&self, folders: &[Folder]) -> Result<(), StorageError>;

    /// The object's bytes, if it is there.
    ///
    /// # Errors
    /// If the storage fails.
    fn stat(&self, key: &Key) -> Result<Option<u64>, StorageError>;

    /// Opens an object of at most `limit` bytes; `None` if it is not there. What it then reads stays as it is, whoever
    /// replaces or removes the object.
    ///
    /// # Errors
    /// If the storage fails or the object is longer.
    fn open(&self, key: &Key, limit: u64) -> Result<Option<Box<dyn Object>>, StorageError>;

    /// Reads a mutable object of at most `limit` bytes.
    ///
    /// # Errors
    /// If the storage fails or the object is longer.
    fn read_version(
        &self,
        key: &Key,
        limit: u64,
    ) -> Result<Option<(Vec<u8>, Version)>, StorageError>;

    /// Writes a mutable object if it is as `expected`: absent, or of that version. Durable on return.
    ///
    /// # Errors
    /// If the storage fails; then it is as it was, or written.
    fn swap(
        &self,
        key: &Key,
        expected: Option<&Version>,
        bytes: &[u8],
    ) -> Result<Swapped, StorageError>;

    /// Lists a folder, in no order.
    ///
    /// # Errors
    /// If the storage fails.
    fn list(&self, folder: Folder) -> Result<Vec<Entry>, StorageError>;

    /// Removes an object; one that is not there is no error. Durable after [`flush`](Self::flush).
    ///
    /// # Errors
    /// If the storage fails.
    fn remove(&self, key: &Key) -> Result<(), StorageError>;

    /// The time by the clock that [`Entry::modified`] goes by, to a second or so.
    ///
    /// # Errors
    /// If the storage fails.
    fn now(&self) -> Result<SystemTime, StorageError>;
}

/// Who owns a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// Its machine.
    pub host: String,
    /// When it took the lock, in seconds since 1970.
    pub since: u64,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == 0 {
            return f.write_str("another process");
        }
        let ago = SystemTime::UNIX_EPOCH
            .elapsed()
            .map_or(0, |now| now.as_secs().saturating_sub(self.since));
        write!(f, "process {} on {} since {} ({ago} s ago)", self.pid, self.host, self.since)
    }
}
