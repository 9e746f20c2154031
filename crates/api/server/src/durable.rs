//! What survives the process: capsules in a store, and beside them, as memos of the store, small records of what they
//! belong to. A record is written after its capsule is durable, so whatever a record names is there.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use ampoule::store::{CapsuleId, Expected, SaveError};
use ampoule::{Ampoule, Capsule, CapsuleStore, DetachedCapsule, StoreError, StoreOptions};
use serde_json::{Value, json};

use crate::metrics::Metrics;
use crate::vault::lock;

/// A store of capsules and records.
pub(crate) struct Durable {
    store: CapsuleStore,
    /// Every name and its capsule: what no name points to any more is removed.
    names: Mutex<HashMap<String, CapsuleId>>,
    /// Capsules removed since the last gc.
    removed: AtomicUsize,
    metrics: Arc<Metrics>,
    /// Held for writing while a capsule without a name is removed, for reading from a save until its name is known: what
    /// is being saved may be the same capsule.
    removing: RwLock<()>,
}

/// A record of the store.
pub(crate) struct Record {
    /// `response`, `session`, `capsule` or `boundary`.
    pub kind: String,
    pub id: String,
    pub value: Value,
}

/// The name of a record, and of the capsule that belongs to it.
fn name(kind: &str, id: &str) -> String {
    // An id may come from a request: whatever it is, the name is short and plain.
    let digest = blake3::hash(id.as_bytes()).to_hex();
    let plain = id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    format!("server {kind} {}", if plain { id } else { &digest[..40] })
}

fn is_over_quota(error: &ampoule::Error) -> bool {
    let ampoule::Error::Store(error) = error else { return false };
    matches!(**error, StoreError::Save(SaveError::Quota { .. }))
}

impl Durable {
    /// Opens or makes a store.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(crate) fn open(
        place: &str,
        options: StoreOptions,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ampoule::Error> {
        let store = CapsuleStore::open(place, options)?;
        let (heads, _) = store.store().heads().map_err(StoreError::from)?;
        let names = heads.into_iter().map(|head| (head.name, head.capsule)).collect();
        let (removed, removing) = (AtomicUsize::new(0), RwLock::new(()));
        let durable = Self { store, names: Mutex::new(names), removed, metrics, removing };
        durable.count();
        Ok(durable)
    }

    /// Counts what lies there anew. Between two counts what is written is added.
    pub(crate) fn count(&self) {
        let bytes = self.store.store().stored_bytes().unwrap_or_default();
        self.metrics.disk_bytes.set(bytes as usize);
    }

    /// The names that a server did not give, each with its capsule, by name.
    pub(crate) fn given_names(&self) -> Vec<(String, CapsuleId)> {
        let names = lock(&self.names);
        let given = names.iter().filter(|(name, _)| !name.starts_with("server "));
        let mut list: Vec<_> = given.map(|(name, id)| (name.clone(), *id)).collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }

    pub(crate) const fn store(&self) -> &CapsuleStore {
        &self.store
    }

    /// The capsule that lies there under a name of the server's own.
    pub(crate) fn id_of(&self, kind: &str, id: &str) -> Option<CapsuleId> {
        lock(&self.names).get(&name(kind, id)).copied()
    }

    /// Saves a capsule, if there is one, under a name of the server's own, and the record. Blocks until both are durable;
    /// says what the capsule is called there.
    ///
    /// # Errors
    /// If either cannot be written.
    pub(crate) fn save(
        &self,
        kind: &str,
        id: &str,
        capsule: Option<&DetachedCapsule>,
        mut record: Value,
    ) -> Result<Option<CapsuleId>, ampoule::Error> {
        let name = name(kind, id);
        let (mut before, mut written) = (None, None);
        if let Some(capsule) = capsule {
            let saved = match self.save_capsule(capsule, &name) {
                Err(error) if is_over_quota(&error) && self.make_space() => {
                    self.save_capsule(capsule, &name)?
                }
                other => other?,
            };
            (written, before) = (Some(saved.0), saved.1);
        }
        record["id"] = json!(id);
        let saved = self.store.store().set_memo(&name, record.to_string().as_bytes());
        saved.map_err(StoreError::from)?;
        self.drop_unnamed(before);
        Ok(written)
    }

    /// Saves a capsule under a name; what it is called, and the one that had the name before.
    fn save_capsule(
        &self,
        capsule: &DetachedCapsule,
        name: &str,
    ) -> Result<(CapsuleId, Option<CapsuleId>), ampoule::Error> {
        let _turn = self.removing.read().unwrap_or_else(PoisonError::into_inner);
        let saved = self.store.save_detached(capsule, Some((name, Expected::Anything)), None)?;
        let before = lock(&self.names).insert(name.to_owned(), saved.id);
        self.metrics.disk_bytes.add(i64::try_from(saved.written).unwrap_or_default());
        Ok((saved.id, before))
    }

    /// Deletes at once what nobody needs any more; whether there was anything. On object storage deletions have to wait.
    fn make_space(&self) -> bool {
        match self.store.store().gc(Some(Duration::ZERO)) {
            Ok(report) => {
                self.count();
                report.deleted.bytes > 0
            }
            Err(error) => {
                tracing::warn!(%error, "the store is full, and its garbage was not deleted");
                false
            }
        }
    }

    /// Removes a capsule that no name points to any more.
    fn drop_unnamed(&self, capsule: Option<CapsuleId>) {
        let Some(capsule) = capsule else { return };
        let _turn = self.removing.write().unwrap_or_else(PoisonError::into_inner);
        if lock(&self.names).values().any(|named| *named == capsule) {
            return;
        }
        match self.store.store().remove(capsule) {
            Ok(_) => {
                self.removed.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => tracing::warn!(%error, "a capsule was not removed from the store"),
        }
    }

    /// Deletes what was removed since the last time, if anything was.
    pub(crate) fn gc(&self) {
        if self.removed.swap(0, Ordering::Relaxed) > 0
            && let Err(error) = self.store.gc()
        {
            tracing::warn!(%error, "the store's garbage was not collected");
        }
    }

    /// What the capsule is called that was saved with a record.
    ///
    /// # Errors
    /// If it is not there.
    pub(crate) fn find(&self, kind: &str, id: &str) -> Result<CapsuleId, ampoule::Error> {
        self.store.find(&name(kind, id))
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
        self.store.load(model, self.find(kind, id)?)
    }

    /// One record.
    ///
    /// # Errors
    /// If it is damaged or the storage fails.
    pub(crate) fn record(&self, kind: &str, id: &str) -> Result<Option<Value>, ampoule::Error> {
        let text = self.store.store().memo(&name(kind, id)).map_err(StoreError::from)?;
        let record = text.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        Ok(record.filter(|record| record["id"] == id))
    }

    /// All records, by name. Those that cannot be read are left out, said, and counted.
    ///
    /// # Errors
    /// If the storage fails.
    pub(crate) fn records(&self) -> Result<(Vec<Record>, usize), ampoule::Error> {
        let (memos, damaged) = self.store.store().memos().map_err(StoreError::from)?;
        let unreadable = damaged.len();
        for error in damaged {
            tracing::warn!(%error, "a record cannot be read and is left alone");
        }
        let mut out = Vec::new();
        for (name, text) in memos {
            let mut words = name.split(' ');
            let (Some("server"), Some(kind)) = (words.next(), words.next()) else { continue };
            let value = serde_json::from_slice::<Value>(&text).unwrap_or_default();
            match value["id"].as_str().map(str::to_owned) {
                Some(id) => out.push(Record { kind: kind.to_owned(), id, value }),
                None => tracing::warn!(kind, "a record has no id and is left alone"),
            }
        }
        Ok((out, unreadable))
    }

    /// Forgets a record and its capsule.
    pub(crate) fn forget(&self, kind: &str, id: &str) {
        let name = name(kind, id);
        let _ = self.store.store().remove_memo(&name);
        let _ = self.store.store().remove_head(&name);
        let before = lock(&self.names).remove(&name);
        self.drop_unnamed(before);
    }

    pub(crate) fn forget_response(&self, id: &str) {
        self.forget("response", id);
    }
}
