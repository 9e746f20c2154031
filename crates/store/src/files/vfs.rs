//! The seam between the store and an operating system's files: few operations, each of which a test can cut.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::storage::Holder;

/// A file that is being written.
pub trait WriteFile: Send {
    /// Appends all bytes.
    ///
    /// # Errors
    /// If the medium fails or is full.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes the contents durable.
    ///
    /// # Errors
    /// If the medium fails. What is durable then is unknown, and trying again would not tell.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that is being read. It keeps its contents when the name is replaced or removed.
pub trait ReadFile: Send + Sync {
    /// Its bytes.
    ///
    /// # Errors
    /// If the medium fails.
    fn bytes(&self) -> io::Result<u64>;

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// If the medium fails, or `UnexpectedEof` when the file ends before.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Says that these bytes will be read soon. A hint: it changes no result and may reach past the end.
    fn prefetch(&self, offset: u64, bytes: u64) {
        let _ = (offset, bytes);
    }
}

/// One entry of a folder.
#[derive(Clone, Debug)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// When it was last written.
    pub modified: SystemTime,
}

/// Whether the lock was taken.
pub enum LockOutcome {
    /// It was; dropping the value releases it.
    Taken(Box<dyn Send + Sync>),
    /// Somebody else has it.
    HeldBy(Holder),
}

/// Files below one folder; paths are relative to it and use `/`.
///
/// What is promised about durability: contents after [`WriteFile::sync`]; names, whether made, replaced or removed,
/// after [`sync_folder`](Self::sync_folder) of the folder that they are in. Nothing else, in no order.
pub trait Vfs: Send + Sync {
    /// The folder, for messages.
    fn describe(&self) -> String;

    /// Makes a new file.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one; others if the medium fails.
    fn create(&self, path: &str) -> io::Result<Box<dyn WriteFile>>;

    /// Opens a regular file.
    ///
    /// # Errors
    /// `NotFound`; others if the medium fails.
    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>>;

    /// Gives a file another name, replacing the file of that name at once.
    ///
    /// # Errors
    /// If the medium fails.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// `NotFound`; others if the medium fails.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// Makes the names in a folder durable; `""` is the folder itself.
    ///
    /// # Errors
    /// If the medium fails.
    fn sync_folder(&self, path: &str) -> io::Result<()>;

    /// Makes a folder, `""` the folder itself with all above it; one that is there is no error.
    ///
    /// # Errors
    /// If the medium fails.
    fn create_folder(&self, path: &str) -> io::Result<()>;

    /// The files of a folder, in no order.
    ///
    /// # Errors
    /// `NotFound`; others if the medium fails.
    fn list(&self, folder: &str) -> io::Result<Vec<FileEntry>>;

    /// The time by the clock of [`FileEntry::modified`].
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    /// Takes the lock that a file of this path stands for; it goes with the process at the latest.
    ///
    /// # Errors
    /// If the medium fails or has no locks.
    fn lock(&self, path: &str, holder: &Holder) -> io::Result<LockOutcome>;
}

/// Real files.
#[derive(Debug)]
pub struct RealFiles {
    root: PathBuf,
}

impl RealFiles {
    /// Files below `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn path(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.root.clone() } else { self.root.join(path) }
    }
}

impl WriteFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl ReadFile for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match rustix::io::pread(self, &mut *into, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    into = &mut into[read..];
                    offset += read as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn prefetch(&self, offset: u64, bytes: u64) {
        let bytes = std::num::NonZero::new(bytes);
        let _ = rustix::fs::fadvise(self, offset, bytes, rustix::fs::Advice::WillNeed);
    }
}

struct HeldLock(File);

impl Drop for HeldLock {
    fn drop(&mut self) {
        // Nobody is named as its holder afterwards. Closing the file would not be enough: a child process that is just being
        // made has a copy of it until it runs its own program.
        let _ = self.0.set_len(0);
        let _ = self.0.unlock();
    }
}

/// Bytes of a lock file that are read at most.
const LOCK_BYTES: u64 = 4096;

impl Vfs for RealFiles {
    fn describe(&self) -> String {
        self.root.display().to_string()
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn WriteFile>> {
        let file = OpenOptions::new().write(true).create_new(true).open(self.path(path))?;
        Ok(Box::new(file))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>> {
        let path = self.path(path);
        // Asked first: opening a pipe would wait for whoever writes to it.
        if !fs::metadata(&path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        let file = File::open(path)?;
        // Objects are read once, from end to end; a hint that fails changes nothing.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        Ok(Box::new(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.path(path))
    }

    fn sync_folder(&self, path: &str) -> io::Result<()> {
        File::open(self.path(path))?.sync_all()
    }

    fn create_folder(&self, path: &str) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let full = self.path(path);
        // What users said is nobody else's business.
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        if !path.is_empty() {
            return match builder.create(&full) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                made => made,
            };
        }
        if full.is_dir() {
            return Ok(());
        }
        builder.recursive(true).create(&full)?;
        // The names of the folders made above must be durable too.
        let mut above = full.as_path();
        while let Some(parent) = above.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            File::open(parent)?.sync_all()?;
            if above.parent().is_some_and(|p| p.as_os_str().is_empty()) {
                break;
            }
            above = parent;
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<FileEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.path(folder))? {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                // Removed since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.is_file() {
                entries.push(FileEntry {
                    name: entry.file_name().to_string_lossy().into_owned(),
                    bytes: metadata.len(),
                    modified: metadata.modified()?,
                });
            }
        }
        Ok(entries)
    }

    fn lock(&self, path: &str, holder: &Holder) -> io::Result<LockOutcome> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(self.path(path))?;
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0)?;
                file.rewind()?;
                file.write_all(&serde_json::to_vec(holder)?)?;
                Ok(LockOutcome::Taken(Box::new(HeldLock(file))))
            }
            Err(TryLockError::WouldBlock) => {
                let mut text = Vec::new();
                Read::take(&mut file, LOCK_BYTES).read_to_end(&mut text)?;
                // The holder may be writing it at this moment: then it is not named.
                Ok(LockOutcome::HeldBy(serde_json::from_slice(&text).unwrap_or_default()))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_goes_even_if_a_copy_of_its_file_stays_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let open =
            || OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
        let file = open();
        // As a child process has it that has not run its own program yet.
        let inherited = file.try_clone().unwrap();
        file.try_lock().unwrap();
        let held = HeldLock(file);
        assert!(matches!(open().try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        open().try_lock().unwrap();
        drop(inherited);
    }
}
