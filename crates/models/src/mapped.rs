//! Files as read-only bytes.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::ModelFileError;

/// The bytes of a file, mapped read-only or held in memory.
///
/// A mapped file must not be changed or truncated while it is open: another process that truncates it makes
/// the next access fail with a signal, as with every program that maps files. Put a new model at a new path,
/// or rename it over the old one.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Held(Cow<'static, [u8]>),
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// [`ModelFileError::NotAFile`] for folders, pipes and devices; [`ModelFileError::Io`] when the system refuses.
    #[allow(
        unsafe_code,
        reason = "mapping a file is the one thing here that safe Rust does not offer"
    )]
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelFileError> {
        let path = path.as_ref();
        let io =
            |action| move |source| ModelFileError::Io { file: path.to_owned(), action, source };
        // Asked before opening: opening a pipe would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(io("open"))?;
        if !metadata.is_file() {
            return Err(ModelFileError::NotAFile { file: path.to_owned() });
        }
        let file = File::open(path).map_err(io("open"))?;
        let bytes = if metadata.len() == 0 {
            Bytes::Held(Cow::Borrowed(&[]))
        } else {
            // SAFETY: the map is read-only and private to this value. Its bytes could change only if somebody
            // wrote to the file meanwhile, which the type's documentation forbids; the readers check every
            // offset against the length of this map, never against the file again.
            Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(io("map"))?)
        };
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// Bytes that are in memory already, under a name for error messages. No file is touched.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        Self { path: name.into(), bytes: Bytes::Held(bytes.into()) }
    }

    /// The path as given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Held(bytes) => bytes,
        }
    }
}
