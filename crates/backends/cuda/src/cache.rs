//! Compiled kernels on disk: content-addressed, checked, published atomically, shared by processes.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where compiled kernels are kept. Losing it costs a few seconds.
pub(crate) struct Cache {
    folder: Option<PathBuf>,
}

const MAGIC: &[u8; 8] = b"AMPKRN\x00\x01";

impl Cache {
    /// `$AMPOULE_CACHE`, else `$XDG_CACHE_HOME/ampoule`, else `~/.cache/ampoule`; none if there is no home either.
    pub(crate) fn of_user() -> Self {
        let variable =
            |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = variable("AMPOULE_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|d| d.join("ampoule")))
            .or_else(|| variable("HOME").map(|d| d.join(".cache/ampoule")));
        Self { folder: base.map(|d| d.join("kernels")) }
    }

    /// A cache in this folder.
    #[cfg(test)]
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: Some(folder.to_path_buf()) }
    }

    /// What was stored under the key, if it is whole.
    pub(crate) fn load(&self, key: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(key)?).ok()?;
        let header = MAGIC.len() + 32;
        if bytes.len() < header || &bytes[..MAGIC.len()] != MAGIC {
            return None;
        }
        if blake3::hash(&bytes[header..]).as_bytes()[..] != bytes[MAGIC.len()..header] {
            return None;
        }
        bytes.drain(..header);
        Some(bytes)
    }

    /// Whether something is stored under the key.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.path(key).is_some_and(|path| path.exists())
    }

    /// Stores under the key. Where that cannot be done the next start compiles again; a sentence says so.
    pub(crate) fn store(&self, key: &str, bytes: &[u8]) -> Result<(), String> {
        let Some(path) = self.path(key) else {
            return Err("compiled kernels are not kept: name a folder in AMPOULE_CACHE".to_owned());
        };
        publish(&path, bytes)
            .map_err(|error| format!("compiled kernels are not kept: {}: {error}", path.display()))
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.folder.as_ref().map(|f| f.join(format!("{key}.cubin")))
    }
}

fn publish(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}.{number}.tmp", std::process::id()));
    let written = (|| {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(MAGIC)?;
        file.write_all(blake3::hash(bytes).as_bytes())?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded_and_no_temporary_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        assert_eq!(cache.load("a"), None);
        cache.store("a", b"kernel").unwrap();
        cache.store("a", b"kernel").unwrap();
        assert_eq!(cache.load("a").as_deref(), Some(&b"kernel"[..]));
        assert!(cache.has("a") && !cache.has("b"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn any_flipped_bit_or_truncation_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        cache.store("a", b"kernel").unwrap();
        let path = folder.path().join("a.cubin");
        let whole = fs::read(&path).unwrap();
        for i in 0..whole.len() {
            let mut bad = whole.clone();
            bad[i] ^= 4;
            fs::write(&path, &bad).unwrap();
            assert_eq!(cache.load("a"), None, "byte {i}");
            fs::write(&path, &whole[..i]).unwrap();
            assert_eq!(cache.load("a"), None, "length {i}");
        }
        cache.store("a", b"kernel").unwrap();
        assert!(cache.load("a").is_some());
    }

    #[test]
    fn writers_in_parallel_leave_a_whole_entry() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = Cache::at(folder.path());
                    for _ in 0..20 {
                        cache.store("a", &[7; 4096]).unwrap();
                        if let Some(bytes) = cache.load("a") {
                            assert_eq!(bytes, [7; 4096]);
                        }
                    }
                });
            }
        });
        assert!(Cache::at(folder.path()).load("a").is_some());
    }

    /// Processes that begin together fill one cache, while entries are damaged under their hands: nobody may ever read anything
    /// but what belongs to a key.
    #[test]
    fn processes_share_a_cache() {
        const FOLDER: &str = "AMPOULE_TEST_CACHE_FOLDER";
        let content = |key: u8| vec![key; 100_000 + usize::from(key)];
        if let Some(folder) = std::env::var_os(FOLDER) {
            let cache = Cache::at(Path::new(&folder));
            let mut loaded = 0;
            for _ in 0..20 {
                for key in 0..3 {
                    if let Some(bytes) = cache.load(&key.to_string()) {
                        assert!(bytes == content(key), "key {key}");
                        loaded += 1;
                    }
                    cache.store(&key.to_string(), &content(key)).unwrap();
                }
            }
            assert!(loaded > 0);
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let child = || {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "cache::tests::processes_share_a_cache"])
                .env(FOLDER, folder.path())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut children: Vec<_> = (0..3).map(|_| child()).collect();
        let damaged = folder.path().join("1.cubin");
        let mut damages = 0;
        while children.iter_mut().any(|c| c.try_wait().unwrap().is_none()) {
            if let Ok(mut bytes) = fs::read(&damaged) {
                let middle = bytes.len() / 2;
                bytes.truncate(middle + 1);
                bytes[middle] ^= 1;
                fs::write(&damaged, &bytes).unwrap();
                damages += 1;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        assert!(damages > 0);
        let cache = Cache::at(folder.path());
        for key in 0..3 {
            cache.store(&key.to_string(), &content(key)).unwrap();
            assert!(cache.load(&key.to_string()) == Some(content(key)));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "temporary files are left");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        for cache in [Cache::at(&file), Cache::at(&file.join("below"))] {
            let problem = cache.store("a", b"kernel").unwrap_err();
            assert!(problem.contains("not kept") && problem.contains("a.cubin"), "{problem}");
            assert_eq!(cache.load("a"), None);
        }
        assert!(Cache { folder: None }.store("a", b"kernel").is_err());
    }
}
