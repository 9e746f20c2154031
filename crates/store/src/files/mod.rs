//! A store in a folder: every object is a file, published by writing it aside, syncing it and renaming it.

mod vfs;

pub use vfs::{FileEntry, LockOutcome, ReadFile, RealFiles, Vfs, WriteFile};

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::error::{OpenError, StorageError, folder_name};
use crate::storage::{Entry, Folder, Holder, Key, Object, Storage, Swapped, Version};

/// The folder of files that are being written.
const ASIDE: &str = "aside";
/// Bytes of a mutable object at most.
const MUTABLE_BYTES: u64 = 1 << 20;
/// The lock file.
const LOCK: &str = "lock";
/// What lies in the folder beside the objects.
pub(crate) const OWN: [&str; 2] = [ASIDE, LOCK];

/// A store in a folder of one machine.
pub struct FileStorage {
    files: Arc<dyn Vfs>,
    next: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lock: Option<Box<dyn Send + Sync>>,
    /// By folder: changes of names that this process made, and how many of them are durable. `None`: not even what an
    /// earlier process did before it was killed is known to be.
    names: HashMap<Folder, (u64, Option<u64>)>,
    /// Why nothing is written any more.
    latched: Option<String>,
}

impl FileStorage {
    /// A store in these files. Nothing is touched yet.
    pub fn new(files: Arc<dyn Vfs>) -> Self {
        Self { files, next: AtomicU64::new(0), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(
        &self,
        action: &'static str,
        object: &dyn ToString,
    ) -> impl FnOnce(io::Error) -> StorageError {
        let (object, place) = (object.to_string(), self.files.describe());
        move |source| StorageError::Io { action, object, place, source }
    }

    fn ensure_sound(&self) -> Result<(), StorageError> {
        match &self.state().latched {
            None => Ok(()),
            Some(reason) => {
                Err(StorageError::Latched { place: self.files.describe(), reason: reason.clone() })
            }
        }
    }

    /// After a sync that failed, a second one may succeed although the bytes are lost (the kernel reports an error once
    /// and drops the dirty pages): so there is no second one.
    fn latch(&self, error: &io::Error) {
        self.state().latched.get_or_insert_with(|| error.to_string());
    }

    fn changed(&self, folder: Folder) {
        self.state().names.entry(folder).or_default().0 += 1;
    }

    fn sync_folder(&self, folder: Folder) -> Result<(), StorageError> {
        // Counted before: what changes during the sync may not be part of it.
        let changes = self.state().names.entry(folder).or_default().0;
        self.files.sync_folder(folder.name()).map_err(|error| {
            self.latch(&error);
            self.failed("sync folder", &folder_name(folder))(error)
        })?;
        self.state().names.entry(folder).or_default().1 = Some(changes);
        Ok(())
    }

    /// Writes a file aside, syncs it and renames it into place.
    fn publish(&self, key: &Key, pieces: &[&[u8]]) -> Result<(), StorageError> {
        self.ensure_sound()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let aside = format!("{ASIDE}/{number}");
        let written = (|| {
            let mut file = self.files.create(&aside).map_err(self.failed("create", key))?;
            for piece in pieces {
                file.write(piece).map_err(self.failed("write", key))?;
            }
            file.sync().map_err(|error| {
                // A full disk may show only here; then nothing else was at stake than this file.
                if !matches!(
                    error.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) {
                    self.latch(&error);
                }
                self.failed("sync", key)(error)
            })?;
            drop(file);
            let renamed = self.files.rename(&aside, &key.to_string());
            self.changed(key.folder);
            renamed.map_err(self.failed("publish", key))
        })();
        if written.is_err() {
            let _ = self.files.remove(&aside);
        }
        written
    }

    fn version(bytes: &[u8]) -> Version {
        Version(ampoule_capsule::Digest::of(bytes).to_string())
    }
}

impl Storage for FileStorage {
    fn describe(&self) -> String {
        self.files.describe()
    }

    fn single_writer(&self) -> bool {
        true
    }

    fn begin_writing(&self) -> Result<(), OpenError> {
        let io = |action, object: &str, error| OpenError::from(self.failed(action, &object)(error));
        self.files.create_folder("").map_err(|e| io("make folder", ".", e))?;
        let since = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_secs());
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let holder = Holder { pid: std::process::id(), host, since };
        match self.files.lock(LOCK, &holder).map_err(|e| io("lock", LOCK, e))? {
            LockOutcome::Taken(lock) => self.state().lock = Some(lock),
            LockOutcome::HeldBy(holder) => {
                return Err(OpenError::InUse { place: self.describe(), holder });
            }
        }
        for folder in Folder::ALL.map(Folder::name).into_iter().chain([ASIDE]) {
            self.files.create_folder(folder).map_err(|e| io("make folder", folder, e))?;
        }
        // The folders' own names, before anything is acknowledged that lies in them.
        self.sync_folder(Folder::Root)?;
        for left in self.files.list(ASIDE).map_err(|e| io("list", ASIDE, e))? {
            let path = format!("{ASIDE}/{}", left.name);
            self.files.remove(&path).map_err(|e| io("remove", &path, e))?;
        }
        Ok(())
    }

    fn put(&self, key: &Key, pieces: &[&[u8]]) -> Result<(), StorageError> {
        self.publish(key, pieces)
    }

    fn flush(&self, folders: &[Folder]) -> Result<(), StorageError> {
        self.ensure_sound()?;
        for &folder in folders {
            let (changes, synced) = self.state().names.get(&folder).copied().unwrap_or_default();
            if synced != Some(changes) {
                self.sync_folder(folder)?;
            }
        }
        Ok(())
    }

    fn stat(&self, key: &Key) -> Result<Option<u64>, StorageError> {
        let opened = self.files.open(&key.to_string()).and_then(|file| file.bytes());
        match opened {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read", key)(error)),
        }
    }

    fn open(&self, key: &Key, limit: u64) -> Result<Option<Box<dyn Object>>, StorageError> {
        let file = match self.files.open(&key.to_string()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("read", key)(error)),
        };
        let bytes = file.bytes().map_err(self.failed("read the size of", key))?;
        if bytes > limit {
            let text = format!("it has {bytes} bytes, at most {limit} are allowed");
            let error = io::Error::new(io::ErrorKind::FileTooLarge, text);
            return Err(self.failed("read", key)(error));
        }
        let place = self.files.describe();
        Ok(Some(Box::new(FileObject { file, bytes, key: key.clone(), place })))
    }

    fn read_version(
        &self,
        key: &Key,
        limit: u64,
    ) -> Result<Option<(Vec<u8>, Version)>, StorageError> {
        let Some(object) = self.open(key, limit)? else { return Ok(None) };
        let mut bytes = vec![0; object.bytes() as usize];
        object.read_at(0, &mut bytes)?;
        let version = Self::version(&bytes);
        Ok(Some((bytes, version)))
    }

    fn swap(
        &self,
        key: &Key,
        expected: Option<&Version>,
        bytes: &[u8],
    ) -> Result<Swapped, StorageError> {
        // One process writes, and the store lets one of its threads swap at a time: nobody comes between.
        let found = self.read_version(key, MUTABLE_BYTES)?.map(|(_, version)| version);
        if found.as_ref() != expected {
            return Ok(Swapped::No);
        }
        self.publish(key, &[bytes])?;
        self.sync_folder(key.folder)?;
        Ok(Swapped::Yes)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Entry>, StorageError> {
        let entries = match self.files.list(folder.name()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(self.failed("list", &folder_name(folder))(error)),
        };
        let entry = |e: FileEntry| Entry { name: e.name, bytes: e.bytes, modified: e.modified };
        Ok(entries.into_iter().map(entry).collect())
    }

    fn remove(&self, key: &Key) -> Result<(), StorageError> {
        self.ensure_sound()?;
        let removed = self.files.remove(&key.to_string());
        self.changed(key.folder);
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("remove", key)(error))
            }
            _ => Ok(()),
        }
    }

    fn now(&self) -> Result<SystemTime, StorageError> {
        Ok(self.files.now())
    }
}

struct FileObject {
    file: Box<dyn ReadFile>,
    bytes: u64,
    key: Key,
    place: String,
}

impl Object for FileObject {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn prefetch(&self, offset: u64, bytes: u64) {
        if offset < self.bytes {
            self.file.prefetch(offset, bytes.min(self.bytes - offset));
        }
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.file.read_at(offset, into).map_err(|source| StorageError::Io {
            action: "read",
            object: self.key.to_string(),
            place: self.place.clone(),
            source,
        })
    }
}
