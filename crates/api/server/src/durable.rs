//! What survives the process: capsules in a store, and beside them small records of what they belong to.
//!
//! Records lie in the folder `server` of the store, one file each, named by a digest of the id: no text from a request
//! ever becomes a path. A record is written after its capsule is durable, so whatever a record names is there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ampoule::store::Expected;
use ampoule::{Ampoule, Capsule, CapsuleStore, DetachedCapsule, StoreOptions};
use serde_json::{Value, json};

/// Bytes of a record at most: a conversation's messages.
const RECORD_LIMIT: u64 = 256 << 20;

/// A store, and the folder of records in it.
pub(crate) struct Durable {
    store: Arc<CapsuleStore>,
    folder: PathBuf,
}

impl Durable {
    /// Opens or makes a store in a folder.
    ///
    /// # Errors
    /// If it cannot be opened, or the folder of records cannot be made.
    pub(crate) fn open(place: &str, options: StoreOptions) -> Result<Self, ampoule::Error> {
        let store = CapsuleStore::open(place, options)?;
        let folder = Path::new(place).join("server");
        std::fs::create_dir_all(&folder).map_err(|source| ampoule::Error::Io {
            path: folder.clone(),
            action: "create",
            source,
        })?;
        Ok(Self { store: Arc::new(store), folder })
    }

    pub(crate) fn store(&self) -> &CapsuleStore {
        &self.store
    }

    fn path(&self, kind: &str, id: &str) -> PathBuf {
        let digest = blake3::hash(format!("{kind} {id}").as_bytes()).to_hex();
        self.folder.join(format!("{kind}-{}.json", &digest[..40]))
    }

    /// Saves a capsule under a name of the server's own, and the record. Blocks until both are durable.
    ///
    /// # Errors
    /// If either cannot be written.
    pub(crate) fn save(
        &self,
        kind: &str,
        id: &str,
        capsule: &DetachedCapsule,
        mut record: Value,
    ) -> Result<(), ampoule::Error> {
        let name = format!("server {kind} {id}");
        self.store.save_detached(capsule, Some((&name, Expected::Anything)), None)?;
        record["id"] = json!(id);
        let path = self.path(kind, id);
        ampoule::write_privately(&path, |out| {
            let bytes = record.to_string();
            out.write_all(bytes.as_bytes()).map_err(|source| ampoule::Error::Io {
                path: path.clone(),
                action: "write",
                source,
            })
        })?;
        Ok(())
    }

    /// The capsule that was saved with a record.
    ///
    /// # Errors
    /// If it is not there or does not fit the model.
    pub(crate) fn capsule(
        &self,
        model: &mut Ampoule,
        kind: &str,
        id: &str,
    ) -> Result<Capsule, ampoule::Error> {
        let found = self.store.find(&format!("server {kind} {id}"))?;
        self.store.load(model, found)
    }

    /// The records of a kind. One that cannot be read is left out, and said.
    pub(crate) fn records(&self, kind: &str) -> Vec<(String, Value)> {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return Vec::new() };
        let mut out = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let ours = stem.is_some_and(|stem| stem.starts_with(&format!("{kind}-")))
                && path.extension().is_some_and(|ending| ending == "json");
            if !ours || entry.metadata().is_ok_and(|m| m.len() > RECORD_LIMIT) {
                continue;
            }
            let text = std::fs::read(entry.path()).ok();
            let record = text.and_then(|t| serde_json::from_slice::<Value>(&t).ok());
            match record.as_ref().and_then(|r| r["id"].as_str()) {
                Some(id) => out.push((id.to_owned(), record.clone().unwrap_or_default())),
                None => tracing::warn!(kind, "a record cannot be read and is left alone"),
            }
        }
        out.sort_by(|a, b| a.0.cmp(&b.0));
        out
    }

    /// Forgets a record and its capsule.
    pub(crate) fn forget(&self, kind: &str, id: &str) {
        let _ = std::fs::remove_file(self.path(kind, id));
        if let Ok(found) = self.store.find(&format!("server {kind} {id}")) {
            // Others may share the capsule's id: only the name goes, gc takes what nothing names.
            let _ = self.store.store().remove_head(&format!("server {kind} {id}"));
            let heads = self.store.store().catalog().map(|c| c.heads).unwrap_or_default();
            if !heads.iter().any(|head| head.capsule == found) {
                let _ = self.store.remove(found);
            }
        }
    }

    pub(crate) fn forget_response(&self, id: &str) {
        self.forget("response", id);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.store.store().stored_bytes().unwrap_or_default()
    }
}
