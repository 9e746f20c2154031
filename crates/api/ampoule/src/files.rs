//! Capsule files on disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ampoule_capsule::{CapsuleError, CapsuleHeader};
use ampoule_engine::{Capsule, Engine, EngineError};

use crate::Error;

/// Names that a save tries for its temporary file: others are left over from a process of the same number.
const NAMES: usize = 1000;

/// Writes a file so that after a crash there is either the old one or the whole new one: temporary file in the same
/// folder, fsync, rename, fsync of the folder. Saves of one name at the same time each write a file of their own; the
/// last to be renamed stays.
///
/// # Errors
/// If a step fails. The temporary file is removed and an older file of that name is as it was, unless the last step
/// failed, the fsync of the folder: then the new file is in place, but a crash may yet bring the old one back.
/// A link is followed; something other than a regular file (a device, a pipe, a folder) is refused. An older file's
/// permissions stay.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<u64, Error> {
    publish(path, false, write)
}

/// As [`write_atomically`]; a new file can be read by its owner alone, for a capsule holds what users said.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_privately(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<u64, Error> {
    publish(path, true, write)
}

/// Refuses a path that could not be written, before the work whose result goes there is done.
///
/// # Errors
/// As [`write_atomically`] would for its first steps.
pub fn check_writable(path: &Path) -> Result<(), Error> {
    let target = target(path)?;
    Temporary::create(folder_of(&target), true).map(drop).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "create",
        source,
    })
}

/// Where a file of that name is to be put: links are followed.
fn target(path: &Path) -> Result<PathBuf, Error> {
    if path.file_name().is_none() {
        return Err(Error::NotAFile { path: path.to_owned() });
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => {
            let whole = fs::canonicalize(path);
            let failed =
                |source| Error::Io { path: path.to_owned(), action: "follow the link", source };
            let target = whole.map_err(failed)?;
            if target.is_file() { Ok(target) } else { Err(Error::NotAFile { path: target }) }
        }
        Ok(found) if !found.is_file() => Err(Error::NotAFile { path: path.to_owned() }),
        _ => Ok(path.to_owned()),
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn publish(
    path: &Path,
    private: bool,
    write: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<u64, Error> {
    let failed = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    let target = target(path)?;
    let parent = folder_of(&target);
    let (temporary, file) = Temporary::create(parent, private).map_err(failed("create"))?;
    if let Ok(older) = fs::metadata(&target) {
        file.set_permissions(older.permissions()).map_err(failed("set the permissions of"))?;
    }
    let mut buffered = BufWriter::with_capacity(1 << 20, file);
    write(&mut buffered)?;
    let file = buffered.into_inner().map_err(|e| failed("write")(e.into_error()))?;
    file.sync_all().map_err(failed("sync"))?;
    let bytes = file.metadata().map_err(failed("read the size of"))?.len();
    temporary.publish(&target).map_err(failed("rename into place"))?;
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("sync the folder of"))?;
    Ok(bytes)
}

/// A file that is gone afterwards, whatever happens, unless it was published.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// A new file of this call alone: never one that is there, be it a link, and never shared with another thread.
    fn create(folder: &Path, private: bool) -> io::Result<(Self, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        for _ in 0..NAMES {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".ampoule.{}.{number}.tmp", std::process::id()));
            let mut options = OpenOptions::new();
            options.write(true).create_new(true);
            #[cfg(unix)]
            if private {
                std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            }
            #[cfg(not(unix))]
            let _ = private;
            match options.open(&path) {
                Ok(file) => return Ok((Self(Some(path)), file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn publish(mut self, path: &Path) -> io::Result<()> {
        if let Some(temporary) = &self.0 {
            fs::rename(temporary, path)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// A capsule file whose header has been read and checked, and whose payload has not been read.
///
/// Opening takes memory for the header alone, whatever the file is: something other than a regular file is refused,
/// and so is a file whose length is not what its header says.
#[derive(Debug)]
pub struct CapsuleReader {
    path: PathBuf,
    file: File,
    header: CapsuleHeader,
    /// The header's bytes.
    start: Vec<u8>,
}

impl CapsuleReader {
    /// Opens a capsule file.
    ///
    /// # Errors
    /// If the file cannot be read, is no regular file, or its header is damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        // Asked before it is opened too: opening a pipe waits for whoever writes to it.
        let regular = |metadata: fs::Metadata| {
            if metadata.is_file() {
                Ok(metadata.len())
            } else {
                Err(Error::NotAFile { path: path.to_owned() })
            }
        };
        regular(fs::metadata(path).map_err(failed("read"))?)?;
        let mut file = File::open(path).map_err(failed("read"))?;
        let total = regular(file.metadata().map_err(failed("read"))?)?;
        let mut start = Vec::new();
        let mut read_to = |start: &mut Vec<u8>, length: usize| {
            let missing = length.saturating_sub(start.len()) as u64;
            Read::by_ref(&mut file).take(missing).read_to_end(start).map_err(failed("read"))
        };
        read_to(&mut start, 8)?;
        let needed = CapsuleHeader::bytes_needed(&start, total).map_err(damaged(path))?;
        read_to(&mut start, needed)?;
        let header = CapsuleHeader::parse(&start, total).map_err(damaged(path))?;
        Ok(Self { path: path.to_owned(), file, header, start })
    }

    /// What the file says about itself.
    pub const fn header(&self) -> &CapsuleHeader {
        &self.header
    }

    /// Reads the payload; returns the bytes of the whole file. They are not checked yet.
    ///
    /// # Errors
    /// If the file cannot be read, or there is no memory for it.
    pub fn read(mut self) -> Result<Vec<u8>, Error> {
        let failed = |source| Error::Io { path: self.path.clone(), action: "read", source };
        let total = self.header.total_bytes();
        let room = usize::try_from(total).unwrap_or(usize::MAX).saturating_sub(self.start.len());
        let mut bytes = std::mem::take(&mut self.start);
        bytes
            .try_reserve_exact(room)
            .map_err(|_| failed(io::Error::new(io::ErrorKind::OutOfMemory, "no memory for it")))?;
        // A file that grows meanwhile is not read past what its header says.
        self.file.take(room as u64).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }
}

fn damaged(path: &Path) -> impl Fn(CapsuleError) -> Error + '_ {
    |error| Error::CapsuleFile { path: path.to_owned(), source: Box::new(error.into()) }
}

pub(crate) fn save(engine: &Engine, capsule: &Capsule, path: &Path) -> Result<u64, Error> {
    write_privately(path, |out| {
        let mut failure = None;
        engine.export(capsule, &mut |piece| match out.write_all(piece) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        })?;
        failure.map_or(Ok(()), |source| {
            Err(Error::Io { path: path.to_owned(), action: "write", source })
        })
    })
}

pub(crate) fn load(engine: &mut Engine, path: &Path) -> Result<Capsule, Error> {
    let refused = |error| match error {
        EngineError::Backend(_) => Error::Engine(error),
        _ => Error::CapsuleFile { path: path.to_owned(), source: Box::new(error) },
    };
    let reader = CapsuleReader::open(path)?;
    // What does not fit is refused before its payload takes memory.
    engine.check_fits(reader.header()).map_err(refused)?;
    engine.import(&reader.read()?).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(path: &Path, bytes: &[u8]) -> Result<u64, Error> {
        write_atomically(path, |out| {
            // In pieces, past the buffer: a shared file would show a mixture.
            bytes
                .chunks(70_000)
                .try_for_each(|piece| out.write_all(piece))
                .map_err(|source| Error::Io { path: path.to_owned(), action: "write", source })
        })
    }

    fn files(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn saves_at_the_same_time_leave_one_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("same");
        std::thread::scope(|scope| {
            for thread in 0..6_u8 {
                let path = &path;
                scope.spawn(move || {
                    for round in 0..8 {
                        let length = 1_300_000 + 1000 * usize::from(thread);
                        assert_eq!(put(path, &vec![thread; length]).unwrap(), length as u64);
                        let found = fs::read(path).unwrap();
                        let owner = found[0];
                        assert_eq!(found.len(), 1_300_000 + 1000 * usize::from(owner), "{round}");
                        assert!(found.iter().all(|&b| b == owner), "two saves in one file");
                    }
                });
            }
        });
        assert_eq!(files(folder.path()), ["same"]);
    }

    #[test]
    fn a_failed_save_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        put(&path, b"old").unwrap();
        let broken = write_atomically(&path, |out| {
            out.write_all(&vec![7; 3 << 20]).unwrap();
            Err(Error::NoTokenizer)
        });
        assert!(matches!(broken, Err(Error::NoTokenizer)));
        let panicked = std::panic::catch_unwind(|| write_atomically(&path, |_| panic!("broken")));
        assert!(panicked.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(files(folder.path()), ["kept"]);
        // A folder stands where the file should go.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("inside"), b"x").unwrap();
        assert!(matches!(put(&taken, b"new"), Err(Error::NotAFile { .. })));
        assert_eq!(files(&taken), ["inside"]);
        assert_eq!(files(folder.path()).len(), 2);
        assert!(put(Path::new("/"), b"new").is_err());
    }

    #[test]
    fn temporary_files_are_never_shared() {
        let folder = tempfile::tempdir().unwrap();
        let made: Vec<_> =
            (0..3).map(|_| Temporary::create(folder.path(), false).unwrap().0).collect();
        assert_eq!(files(folder.path()).len(), 3);
        drop(made);
        assert!(files(folder.path()).is_empty());
    }

    #[test]
    fn what_is_no_regular_file_is_no_capsule() {
        let folder = tempfile::tempdir().unwrap();
        for path in [Path::new("/dev/zero"), folder.path()] {
            let error = CapsuleReader::open(path).unwrap_err();
            assert!(matches!(error, Error::NotAFile { .. }), "{error}");
        }
        let missing = CapsuleReader::open(&folder.path().join("missing")).unwrap_err();
        assert!(matches!(missing, Error::Io { .. }), "{missing}");
    }

    #[test]
    fn a_huge_file_is_refused_by_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sparse");
        for first in [0, 1 << 20, 400 << 30, u64::MAX] {
            let mut file = File::create(&path).unwrap();
            file.write_all(&u64::to_le_bytes(first)).unwrap();
            file.set_len(500 << 30).unwrap();
            let error = CapsuleReader::open(&path).unwrap_err();
            assert!(matches!(error, Error::CapsuleFile { .. }), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn devices_and_folders_are_refused_links_followed_permissions_kept() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for path in [folder.path().to_owned(), PathBuf::from("/dev/null")] {
            assert!(matches!(check_writable(&path), Err(Error::NotAFile { .. })));
            assert!(matches!(put(&path, b"x"), Err(Error::NotAFile { .. })));
        }
        assert!(matches!(check_writable(&at("none/file")), Err(Error::Io { .. })));
        write_privately(&at("private"), |out| {
            out.write_all(b"x").unwrap();
            Ok(())
        })
        .unwrap();
        assert_eq!(mode(&at("private")), 0o600);
        fs::set_permissions(at("private"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("private", at("link")).unwrap();
        put(&at("link"), b"new").unwrap();
        assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
        assert_eq!(
            (fs::read(at("private")).unwrap(), mode(&at("private"))),
            (b"new".to_vec(), 0o640)
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file stays");
    }
}
