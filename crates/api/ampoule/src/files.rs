//! Capsule files on disk.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use ampoule_engine::{Capsule, Engine, EngineError};

use crate::Error;

/// Writes a file so that after a crash there is either the old one or the whole new one: temporary file in the same
/// folder, fsync, rename, fsync of the folder.
///
/// # Errors
/// If a step fails; the temporary file is removed and an older file of that name is as it was.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<u64, Error> {
    let failed = |action| move |source| Error::Io { path: path.to_owned(), action, source };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name =
        path.file_name().ok_or_else(|| failed("write")(io::ErrorKind::InvalidInput.into()))?;
    let temporary = parent.join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let publish = || {
        let file = File::create(&temporary).map_err(failed("create"))?;
        let mut buffered = BufWriter::with_capacity(1 << 20, file);
        write(&mut buffered)?;
        let file = buffered.into_inner().map_err(|e| failed("write")(e.into_error()))?;
        file.sync_all().map_err(failed("sync"))?;
        let bytes = file.metadata().map_err(failed("read the size of"))?.len();
        fs::rename(&temporary, path).map_err(failed("rename into place"))?;
        File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(failed("sync the folder of"))?;
        Ok(bytes)
    };
    let result = publish();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

pub(crate) fn save(engine: &Engine, capsule: &Capsule, path: &Path) -> Result<u64, Error> {
    write_atomically(path, |out| {
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
    let bytes = fs::read(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "read",
        source,
    })?;
    engine.import(&bytes).map_err(|error| match error {
        EngineError::Backend(_) => Error::Engine(error),
        _ => Error::CapsuleFile { path: path.to_owned(), source: Box::new(error) },
    })
}
