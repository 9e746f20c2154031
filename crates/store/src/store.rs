//! Opening a store, and reading and writing its objects.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::codec::Compression;
use crate::error::{Damage, Damaged, OpenError, ReadError, SaveError, WriteError};
use crate::files::{self, FileStorage, RealFiles};
use crate::frame::{self, Kind, MAX_SEGMENT_BYTES};
use crate::identity::{NodeId, ScopeId, StoreKey};
use crate::records::{Scope, ScopeRecord, StoreRecord, VERSION, from_json, to_json};
use crate::storage::{Folder, Key, Storage, Swapped};

/// How a store is used. `Options::default()` is a good start; change what differs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// The key of a sealed store. A new store is sealed if there is one.
    pub key: Option<StoreKey>,
    /// How new segments are coded. Whatever is there is read, however it is coded.
    pub compression: Compression,
    /// Bytes of a new segment at most: from 4096 to 64 MiB. Large ones are fast, small ones lose less to damage.
    pub segment_bytes: usize,
    /// Threads that read, write and hash segments. More than there are cores help: most of the time they wait.
    pub threads: usize,
    /// Bytes that the store may hold, garbage included; a save that would go over it is refused.
    pub quota: Option<u64>,
    /// How long a new store keeps garbage for readers that may still be reading it, and on object storage for writers
    /// that may still be using it: there a save takes at most a quarter of it. A store that exists has its own.
    pub grace: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key: None,
            compression: Compression::None,
            segment_bytes: 16 << 20,
            threads: 3,
            quota: None,
            grace: None,
        }
    }
}

/// The grace of a new store in a folder.
const FILE_GRACE: Duration = Duration::from_secs(60);
/// The grace of a new store on object storage.
const REMOTE_GRACE: Duration = Duration::from_secs(24 * 60 * 60);
/// The keys of the store's own record and of its copy: without either nothing could be read.
const RECORDS: [&str; 2] = ["store", "store.copy"];

/// What the one writer of this process knows.
#[derive(Default)]
pub(crate) struct Writer {
    /// Lists of condemned objects, by the name of their record.
    pub(crate) condemned: HashMap<String, Arc<HashSet<String>>>,
}

pub(crate) type NodeKey = (Option<NodeId>, ampoule_capsule::LineageId, ampoule_capsule::Digest);

/// A store of capsules. All methods may be called from many threads; writes take turns.
pub struct Store {
    pub(crate) storage: Box<dyn Storage>,
    pub(crate) key: Option<StoreKey>,
    pub(crate) options: Options,
    pub(crate) grace: Duration,
    writable: bool,
    /// Taken for every write, and for as long as it lasts.
    writer: Mutex<Writer>,
    /// Nodes that this process saved or loaded, by what makes a node: its parent, its lineage and its journal.
    nodes: Mutex<HashMap<NodeKey, NodeId>>,
    scopes: Mutex<HashMap<ScopeId, Arc<Scope>>>,
    used: Mutex<Option<u64>>,
    moved: AtomicU64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("place", &self.storage.describe()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the store in a folder for reading and writing, and makes it if there is none.
    ///
    /// This process then owns the folder until the store is dropped; others can read it meanwhile.
    ///
    /// # Errors
    /// If another process owns it ([`OpenError::InUse`] names it), the folder cannot be written or holds something else,
    /// or the key is not the store's.
    pub fn open(folder: &Path, options: Options) -> Result<Self, OpenError> {
        let storage = FileStorage::new(Arc::new(RealFiles::new(folder)));
        if Self::read_record(&storage)?.is_none() && holds_other_things(folder) {
            return Err(OpenError::NotAStore {
                place: storage.describe(),
                reason: "it holds other things; a store is made in a new or an empty folder",
            });
        }
        Self::open_storage(Box::new(storage), options)
    }

    /// Opens the store in a folder for reading alone: takes no lock and writes nothing, so it also works while another
    /// process writes, and on a read-only medium.
    ///
    /// # Errors
    /// If there is no store, or the key is not the store's.
    pub fn open_read_only(folder: &Path, options: Options) -> Result<Self, OpenError> {
        let storage = FileStorage::new(Arc::new(RealFiles::new(folder)));
        Self::open_storage_read_only(Box::new(storage), options)
    }

    /// [`open`](Self::open) over any storage.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`OpenError::NoConditionalWrites`] for object storage that does not enforce them.
    pub fn open_storage(storage: Box<dyn Storage>, options: Options) -> Result<Self, OpenError> {
        if !(4096..=MAX_SEGMENT_BYTES as usize).contains(&options.segment_bytes) {
            let reason =
                format!("{} is not from 4096 to {MAX_SEGMENT_BYTES}", options.segment_bytes);
            return Err(OpenError::Option { option: "segment_bytes", reason });
        }
        if let Compression::Zstd { level } = options.compression
            && !(1..=19).contains(&level)
        {
            let reason = format!("zstd level {level} is not from 1 to 19");
            return Err(OpenError::Option { option: "compression", reason });
        }
        let record = Self::read_record(&*storage)?;
        if record.is_none() {
            // Something else may lie there: a store begins in an empty place, or where one was being made.
            let mut empty = true;
            for folder in Folder::ALL {
                empty &= storage.list(folder)?.is_empty();
            }
            // Another machine may be making it at this moment, and saving to it already.
            if !empty && Self::read_record(&*storage)?.is_none() {
                let reason = "it has a store's objects, but no 'store' record";
                return Err(OpenError::NotAStore { place: storage.describe(), reason });
            }
        }
        storage.begin_writing()?;
        // Read again: another process may have made it before this one got the lock.
        let record = match Self::read_record(&*storage)? {
            Some(record) => record,
            None => StoreRecord {
                version: VERSION,
                producer: producer(),
                key: options.key.as_ref().map(|key| key.id().to_string()),
                grace_seconds: options.grace.unwrap_or(usual_grace(&*storage)).as_secs(),
            },
        };
        let record = Self::write_records(&*storage, record)?;
        Self::over(storage, options, &record, true)
    }

    /// [`open_read_only`](Self::open_read_only) over any storage.
    ///
    /// # Errors
    /// As there.
    pub fn open_storage_read_only(
        storage: Box<dyn Storage>,
        options: Options,
    ) -> Result<Self, OpenError> {
        let record = Self::read_record(&*storage)?.ok_or_else(|| OpenError::NotAStore {
            place: storage.describe(),
            reason: "there is no 'store' record",
        })?;
        Self::over(storage, options, &record, false)
    }

    fn over(
        storage: Box<dyn Storage>,
        options: Options,
        record: &StoreRecord,
        writable: bool,
    ) -> Result<Self, OpenError> {
        let place = storage.describe();
        match (&record.key, &options.key) {
            (None, None) => {}
            (None, Some(_)) => return Err(OpenError::NotSealed { place }),
            (Some(needed), given) => {
                let needed = parse_key_id(needed).ok_or_else(|| {
                    let reason = "its key id is not hexadecimal".to_owned();
                    record_damage(&Key::new(Folder::Root, RECORDS[0]), reason)
                })?;
                match given.as_ref().map(StoreKey::id) {
                    None => return Err(OpenError::KeyNeeded { place, key: needed }),
                    Some(given) if given != needed => {
                        return Err(OpenError::WrongKey { place, needed, given });
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(Self {
            storage,
            key: options.key.clone(),
            options,
            grace: Duration::from_secs(record.grace_seconds),
            writable,
            writer: Mutex::default(),
            nodes: Mutex::default(),
            scopes: Mutex::default(),
            used: Mutex::default(),
            moved: AtomicU64::new(0),
        })
    }

    /// The store's record, or its copy where that is damaged or missing; `None` where there is neither.
    fn read_record(storage: &dyn Storage) -> Result<Option<StoreRecord>, OpenError> {
        let mut damaged = None;
        for name in RECORDS {
            match Self::read_one_record(storage, name) {
                Ok(record) => return Ok(Some(record)),
                Err(ReadError::Damaged(Damaged { damage: Damage::Missing, .. })) => {}
                Err(error @ ReadError::Damaged(_)) => damaged = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        damaged.map_or(Ok(None), |error| Err(error.into()))
    }

    fn read_one_record(storage: &dyn Storage, name: &str) -> Result<StoreRecord, ReadError> {
        let key = Key::new(Folder::Root, name);
        let bytes = frame::open(storage, &key, Kind::Store)?.record(None)?;
        let record: StoreRecord = from_json(&bytes).map_err(|e| record_damage(&key, e))?;
        record.check().map_err(|e| record_damage(&key, e))?;
        Ok(record)
    }

    /// Checks the store's record and its copy.
    pub(crate) fn check_records(&self) -> Vec<ReadError> {
        let check = |name| Self::read_one_record(&*self.storage, name).err();
        RECORDS.into_iter().filter_map(check).collect()
    }

    /// Writes the record and its copy where they are missing or damaged. Returns what they say: another machine may have
    /// been faster.
    fn write_records(
        storage: &dyn Storage,
        mut record: StoreRecord,
    ) -> Result<StoreRecord, OpenError> {
        for name in RECORDS {
            match Self::read_one_record(storage, name) {
                Ok(found) => {
                    record = found;
                    continue;
                }
                Err(ReadError::Damaged(_)) => {}
                Err(error) => return Err(error.into()),
            }
            let key = Key::new(Folder::Root, name);
            let bytes = to_json(&record);
            let coding = (Compression::None, 1);
            let framed = frame::frame(Kind::Store, &key, None, coding, &[&bytes], None)?;
            let whole = framed.slices(&[&bytes]).concat();
            let version = storage.read_version(&key, 1 << 20)?.map(|(_, version)| version);
            if storage.swap(&key, version.as_ref(), &whole)? == Swapped::No {
                record = Self::read_one_record(storage, name)?;
            }
        }
        Ok(record)
    }

    /// Where the store is.
    pub fn place(&self) -> String {
        self.storage.describe()
    }

    /// How long garbage is kept for those who may still be using it.
    pub const fn grace(&self) -> Duration {
        self.grace
    }

    /// Bytes of state that were read and checked, or written, or found to be there already, since the store was opened:
    /// another thread can ask how far a long call is.
    pub fn moved_bytes(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    pub(crate) fn count_moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether this process may write.
    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn ensure_writable(&self) -> Result<(), WriteError> {
        if self.writable { Ok(()) } else { Err(WriteError::ReadOnly) }
    }

    /// The one who writes, of the threads of this process.
    pub(crate) fn writer(&self) -> MutexGuard<'_, Writer> {
        lock(&self.writer)
    }

    /// Remembers a node, so that a save of its descendants need not read its rows.
    pub(crate) fn remember(&self, key: NodeKey, id: NodeId) {
        if self.writable {
            lock(&self.nodes).insert(key, id);
        }
    }

    pub(crate) fn remembered(&self, key: &NodeKey) -> Option<NodeId> {
        lock(&self.nodes).get(key).copied()
    }

    /// Forgets the nodes: some may be gone.
    pub(crate) fn forget(&self) {
        lock(&self.nodes).clear();
    }

    /// The record of an immutable object, its bytes checked against its name.
    pub(crate) fn read_named(
        &self,
        key: &Key,
        kind: Kind,
        named: crate::identity::Named,
    ) -> Result<Vec<u8>, ReadError> {
        let bytes = frame::open(&*self.storage, key, kind)?.record(self.key.as_ref())?;
        if named.digest(self.key.as_ref(), &[&bytes]).to_string() == key.name {
            Ok(bytes)
        } else {
            Err(Damaged { object: key.clone(), damage: Damage::Name }.into())
        }
    }

    /// The scope of that id.
    pub(crate) fn scope(&self, id: ScopeId) -> Result<Arc<Scope>, ReadError> {
        if let Some(scope) = lock(&self.scopes).get(&id) {
            return Ok(Arc::clone(scope));
        }
        let key = Key::new(Folder::Scopes, id);
        let bytes = self.read_named(&key, Kind::Scope, crate::identity::Named::Scope)?;
        let record: ScopeRecord = from_json(&bytes).map_err(|e| record_damage(&key, e))?;
        record.check().map_err(|e| record_damage(&key, e))?;
        let ScopeRecord { fingerprint, layout, salt, .. } = record;
        let scope = Arc::new(Scope { fingerprint, layout, salt });
        lock(&self.scopes).insert(id, Arc::clone(&scope));
        Ok(scope)
    }

    pub(crate) fn knows_scope(&self, id: ScopeId) -> bool {
        lock(&self.scopes).contains_key(&id)
    }

    pub(crate) fn learn_scope(&self, id: ScopeId, scope: &Scope) {
        lock(&self.scopes).entry(id).or_insert_with(|| Arc::new(scope.clone()));
    }

    /// Frames and publishes an object, within the quota.
    pub(crate) fn publish(
        &self,
        kind: Kind,
        key: &Key,
        coding: (Compression, u8),
        pieces: &[&[u8]],
        digest: Option<[u8; 32]>,
    ) -> Result<u64, SaveError> {
        let framed = frame::frame(kind, key, self.key.as_ref(), coding, pieces, digest)?;
        let bytes = framed.bytes(pieces);
        self.charge(bytes)?;
        let put = self.storage.put(key, &framed.slices(pieces));
        if put.is_err() {
            self.recount();
        }
        put?;
        Ok(bytes)
    }

    /// Counts bytes against the quota before they are written.
    pub(crate) fn charge(&self, wanted: u64) -> Result<(), SaveError> {
        let Some(quota) = self.options.quota else { return Ok(()) };
        let mut counted = lock(&self.used);
        let used = match *counted {
            Some(used) => used,
            None => self.stored_bytes()?,
        };
        if used.saturating_add(wanted) > quota {
            *counted = Some(used);
            return Err(SaveError::Quota { used, quota, wanted });
        }
        *counted = Some(used + wanted);
        Ok(())
    }

    /// What was counted no longer holds.
    pub(crate) fn recount(&self) {
        *lock(&self.used) = None;
    }

    /// Bytes of all objects, garbage included.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn stored_bytes(&self) -> Result<u64, crate::error::StorageError> {
        let mut sum = 0;
        for folder in Folder::ALL {
            sum += self.storage.list(folder)?.iter().map(|entry| entry.bytes).sum::<u64>();
        }
        Ok(sum)
    }
}

/// Whether a folder holds what no store makes. Hidden files do not count, nor what a new volume comes with.
fn holds_other_things(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    let own = Folder::ALL.map(Folder::name).into_iter().chain(RECORDS).chain(files::OWN);
    let own: Vec<&str> = own.chain(["lost+found"]).collect();
    let mut names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.any(|name| !name.starts_with('.') && !own.contains(&name.as_str()))
}

fn usual_grace(storage: &dyn Storage) -> Duration {
    if storage.single_writer() { FILE_GRACE } else { REMOTE_GRACE }
}

fn parse_key_id(text: &str) -> Option<crate::identity::KeyId> {
    let value = (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok())??;
    Some(crate::identity::KeyId(value.to_be_bytes()))
}

/// This program, for records.
pub(crate) fn producer() -> String {
    format!("ampoule {}", env!("CARGO_PKG_VERSION"))
}

/// A record that is sound by its checksums but not allowed.
pub(crate) fn record_damage(key: &Key, reason: String) -> ReadError {
    Damaged { object: key.clone(), damage: Damage::Record { reason } }.into()
}
