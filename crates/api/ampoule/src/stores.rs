//! Capsules in a durable store.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use ampoule_engine::{Capsule, Chain, ChainScope, NewLink, StatePart, TensorBytes};
use ampoule_store::{
    CapsuleId, Expected, FsckReport, GcReport, HeadError, Link, LoadError, MaintenanceError,
    NewCapsule, OpenError, PartBytes, ReadError, SaveError, Saved, Scope, SourceError, StateBytes,
    StorageError, Store, StoredCapsule,
};

use ampoule_capsule::{CapsuleError, CapsuleFile};

use crate::{Ampoule, CapsuleReader, Error};

pub use ampoule_store::Options as StoreOptions;

/// Something about a store went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A capsule was not saved; what was there is untouched.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A capsule cannot be loaded; others can.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A name was not moved.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// Removing, checking or collecting failed.
    #[error(transparent)]
    Maintenance(#[from] MaintenanceError),
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A record cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No capsule has that name or id.
    #[error("{place}: no capsule is called '{which}'; `ampoule capsule list` shows what there is")]
    Unknown {
        /// The store.
        place: String,
        /// What was asked for.
        which: String,
    },
    /// An abbreviated id fits several capsules.
    #[error("{place}: '{which}' is the beginning of {matches} ids; write more of it")]
    Ambiguous {
        /// The store.
        place: String,
        /// What was asked for.
        which: String,
        /// How many it fits.
        matches: usize,
    },
    /// This build has no object storage.
    #[error("{place}: this build has no object storage; build with --features s3")]
    NoObjectStorage {
        /// The place asked for.
        place: String,
    },
}

macro_rules! store_errors {
    ($($error:ident),*) => {$(
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::Store(Box::new(error.into()))
            }
        }
    )*};
}

store_errors!(
    OpenError,
    SaveError,
    LoadError,
    HeadError,
    MaintenanceError,
    StorageError,
    ReadError
);

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

/// A capsule and all that a store must know of it. Nothing is copied: it shares the capsule's rows.
pub struct DetachedCapsule {
    chain: Chain,
    scope: Scope,
    model: String,
}

/// A capsule of a store on its way to memory: its records, and what was read ahead of its state.
pub struct StoredState {
    stored: StoredCapsule,
    scope: ChainScope,
    links: Vec<NewLink>,
    /// Of links, by index.
    rows: HashMap<usize, Arc<PartBytes>>,
    fixed: Option<Arc<PartBytes>>,
}

impl Ampoule {
    /// The links of a stored capsule whose rows are not in memory: what [`CapsuleStore::read_ahead`] is to read.
    ///
    /// # Errors
    /// If the capsule does not fit the model, plan, layout, kernels, device or tenant (the error names which).
    pub fn lacks(&self, state: &StoredState) -> Result<Vec<usize>, Error> {
        Ok(self.engine.lacking(&state.scope, &state.links)?)
    }

    /// What [`CapsuleStore::save_detached`] takes.
    ///
    /// # Errors
    /// If the capsule belongs to another engine.
    pub fn detach(&self, capsule: &Capsule) -> Result<DetachedCapsule, Error> {
        let chain = self.engine.chain(capsule)?;
        let ChainScope { fingerprint, layout, salt } = self.engine.chain_scope();
        let scope = Scope { fingerprint, layout, salt };
        Ok(DetachedCapsule { chain, scope, model: self.name().to_owned() })
    }
}

/// A durable store of capsules, in a folder or on object storage.
///
/// What capsules of one branch share is stored once. A save that has returned survives a power cut. One process writes at
/// a time; any number read.
#[derive(Debug)]
pub struct CapsuleStore {
    store: Store,
    place: String,
}

/// The shortest beginning of an id that is taken for one.
const SHORTEST_ID: usize = 6;

impl CapsuleStore {
    /// Opens a store to read and write, and makes it if there is none: a folder, or `s3://BUCKET/PREFIX`.
    ///
    /// # Errors
    /// If another process writes it, it cannot be written, the key is not its key, or it holds something else.
    pub fn open(place: &str, options: StoreOptions) -> Result<Self, Error> {
        let store = if place.starts_with("s3://") {
            Store::open_storage(remote(place)?, options)?
        } else {
            Store::open(Path::new(place), options)?
        };
        Ok(Self { store, place: place.to_owned() })
    }

    /// Opens a store to read: takes no lock and writes nothing.
    ///
    /// # Errors
    /// If there is none, or the key is not its key.
    pub fn open_read_only(place: &str, options: StoreOptions) -> Result<Self, Error> {
        let store = if place.starts_with("s3://") {
            Store::open_storage_read_only(remote(place)?, options)?
        } else {
            Store::open_read_only(Path::new(place), options)?
        };
        Ok(Self { store, place: place.to_owned() })
    }

    /// The store itself.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// Where it is.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Saves a capsule with its chain, of which only what the store lacks is written, and points `name` to it. On return
    /// both are durable.
    ///
    /// # Errors
    /// If the capsule is of another engine, the medium or the quota is full, the storage fails, or the name does not
    /// point where `expected`; the capsule is then in the store without that name.
    pub fn save(
        &self,
        model: &Ampoule,
        capsule: &Capsule,
        name: Option<(&str, Expected)>,
        note: Option<&str>,
    ) -> Result<Saved, Error> {
        self.save_detached(&model.detach(capsule)?, name, note)
    }

    /// As [`save`](Self::save), without the model: on another thread, while the engine goes on.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_detached(
        &self,
        capsule: &DetachedCapsule,
        name: Option<(&str, Expected)>,
        note: Option<&str>,
    ) -> Result<Saved, Error> {
        let DetachedCapsule { chain, scope, model } = capsule;
        let parts: Vec<Part<'_>> = chain.links.iter().map(|link| Part(&link.rows)).collect();
        let links = chain.links.iter().zip(&parts).map(|(link, rows)| Link {
            tokens: link.tokens(),
            spans: link.spans(),
            lineage: link.lineage(),
            from: link.from(),
            journal: link.journal().map(Into::into),
            rows,
        });
        let saved = self.store.save(&NewCapsule {
            scope,
            links: &links.collect::<Vec<_>>(),
            fixed: &Part(&chain.fixed),
            model,
            note,
        })?;
        if let Some((name, expected)) = name {
            self.store.set_head(name, expected, saved.id)?;
        }
        Ok(saved)
    }

    /// The capsule with that name, that id, or an id that begins so (with at least six characters).
    ///
    /// # Errors
    /// If there is none, more than one, or the storage fails.
    pub fn find(&self, which: &str) -> Result<CapsuleId, Error> {
        if let Some(id) = self.store.head(which)? {
            return Ok(id);
        }
        let hexadecimal = which.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
        let mut found = Vec::new();
        if hexadecimal && which.len() >= SHORTEST_ID {
            let ids = self.store.catalog()?.capsules.into_iter().map(|listed| listed.capsule.id);
            found.extend(ids.filter(|id| id.to_string().starts_with(which)));
        }
        let (place, which) = (self.place.clone(), which.to_owned());
        match found.as_slice() {
            [] => Err(StoreError::Unknown { place, which }.into()),
            [id] => Ok(*id),
            _ => Err(StoreError::Ambiguous { place, which, matches: found.len() }.into()),
        }
    }

    /// Brings a capsule back to memory. Rows that the engine holds already, because a capsule or a slot has them, are
    /// neither read nor copied.
    ///
    /// # Errors
    /// If there is no such capsule, any byte of it is damaged, it does not fit the model, plan, layout, kernels, device
    /// or tenant (the error names which), or the memory for capsules is used up.
    pub fn load(&self, model: &mut Ampoule, id: CapsuleId) -> Result<Capsule, Error> {
        self.finish_load(model, &self.begin_load(id)?)
    }

    /// The first part of [`load`](Self::load), without the model: reads the records of a capsule, not its state.
    ///
    /// For a thread beside the engine's: `begin_load` and [`read_ahead`](Self::read_ahead) do what takes long, and between
    /// them and at the end [`Ampoule::lacks`] and [`finish_load`](Self::finish_load) need the engine for a moment each.
    ///
    /// # Errors
    /// If there is no such capsule, a record of it is damaged, or the storage fails.
    pub fn begin_load(&self, id: CapsuleId) -> Result<StoredState, Error> {
        let stored = self.store.capsule(id)?;
        let scope = ChainScope {
            fingerprint: stored.scope.fingerprint.clone(),
            layout: stored.scope.layout.clone(),
            salt: stored.scope.salt,
        };
        let links = stored.nodes.iter().map(|node| NewLink {
            tokens: node.tokens.clone(),
            spans: node.spans().to_vec(),
            lineage: node.lineage(),
            from: node.from(),
            journal: node.journal().map(str::to_owned),
        });
        let links = links.collect();
        Ok(StoredState { stored, scope, links, rows: HashMap::new(), fixed: None })
    }

    /// Reads and checks the fixed state and the rows that [`Ampoule::lacks`] named, to host memory. What would take it over
    /// `most` bytes is left for [`finish_load`](Self::finish_load).
    ///
    /// # Errors
    /// If any byte is damaged, there is no memory, or the storage fails.
    pub fn read_ahead(
        &self,
        state: &mut StoredState,
        lacks: &[usize],
        most: u64,
    ) -> Result<(), Error> {
        let mut left = most;
        let mut fits = |bytes: u64| {
            let after = left.checked_sub(bytes);
            left = after.unwrap_or(left);
            after.is_some()
        };
        if fits(state.stored.fixed_bytes()) {
            state.fixed = Some(Arc::new(self.store.fixed(&state.stored)?));
        }
        for &index in lacks {
            let node = state.stored.nodes.get(index);
            if node.is_some_and(|node| fits(node.row_bytes())) {
                let rows = self.store.rows(&state.stored, index)?;
                state.rows.insert(index, Arc::new(rows));
            }
        }
        Ok(())
    }

    /// The last part of [`load`](Self::load): what was not read ahead is read now, where the engine lacks it. After an error
    /// it can be tried again.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn finish_load(&self, model: &mut Ampoule, state: &StoredState) -> Result<Capsule, Error> {
        let StoredState { stored, scope, links, rows, fixed } = state;
        let fixed = || match fixed {
            Some(ahead) => Ok::<_, Error>(Verified(Arc::clone(ahead))),
            None => Ok(Verified(Arc::new(self.store.fixed(stored)?))),
        };
        model.engine.assemble(scope, links, fixed, &mut |index| match rows.get(&index) {
            Some(ahead) => Ok(Verified(Arc::clone(ahead))),
            None => Ok(Verified(Arc::new(self.store.rows(stored, index)?))),
        })
    }

    /// Writes a capsule and its whole chain to one file, atomically; returns its size.
    ///
    /// # Errors
    /// If the capsule is damaged, or the file cannot be written.
    pub fn export(&self, id: CapsuleId, path: &Path) -> Result<u64, Error> {
        let stored = self.store.capsule(id)?;
        crate::write_privately(path, |file| {
            let mut written = Ok(());
            self.store.export(&stored, &ampoule_engine::join_journals, &mut |piece| {
                written = file.write_all(piece);
                if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
            let path = path.to_owned();
            written.map_err(|source| Error::Io { path, action: "write", source })
        })
    }

    /// Saves a capsule file as it is, without a model.
    ///
    /// # Errors
    /// If the file is damaged, or as [`save`](Self::save).
    pub fn import(&self, path: &Path, name: Option<(&str, Expected)>) -> Result<Saved, Error> {
        let bytes = CapsuleReader::open(path)?.read()?;
        let damaged = |source: CapsuleError| Error::CapsuleFile {
            path: path.to_owned(),
            source: Box::new(source.into()),
        };
        let saved = self.store.import(&CapsuleFile::parse(&bytes).map_err(damaged)?)?;
        if let Some((name, expected)) = name {
            self.store.set_head(name, expected, saved.id)?;
        }
        Ok(saved)
    }

    /// Every capsule that depends on nothing but itself and what it shares, checked byte by byte.
    ///
    /// # Errors
    /// If the storage fails; damage is in the report.
    pub fn fsck(&self) -> Result<FsckReport, Error> {
        Ok(self.store.fsck()?)
    }

    /// Removes a capsule, and every name that points to it. What others share stays. The bytes go at the next
    /// [`gc`](Self::gc) after the store's grace.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn remove(&self, id: CapsuleId) -> Result<bool, Error> {
        for head in self.store.heads()?.0 {
            if head.capsule == id {
                self.store.remove_head(&head.name)?;
            }
        }
        Ok(self.store.remove(id)?)
    }

    /// Deletes what no capsule needs.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn gc(&self) -> Result<GcReport, Error> {
        Ok(self.store.gc(None)?)
    }

    /// Reads and checks every byte that a capsule needs, without a model; returns it and how many there are.
    ///
    /// # Errors
    /// If any is damaged or missing; the error names the object.
    pub fn verify(&self, id: CapsuleId) -> Result<(StoredCapsule, u64), Error> {
        let stored = self.store.capsule(id)?;
        let mut bytes = self.store.fixed(&stored)?.len() as u64;
        for index in 0..stored.nodes.len() {
            bytes += self.store.rows(&stored, index)?.len() as u64;
        }
        Ok((stored, bytes))
    }
}

#[cfg(feature = "s3")]
fn remote(place: &str) -> Result<Box<dyn ampoule_store::Storage>, Error> {
    let options = ampoule_store::RemoteOptions::default();
    Ok(Box::new(ampoule_store::RemoteStorage::s3(place, options)?))
}

#[cfg(not(feature = "s3"))]
fn remote(place: &str) -> Result<Box<dyn ampoule_store::Storage>, Error> {
    Err(StoreError::NoObjectStorage { place: place.to_owned() }.into())
}

/// State of the engine, for the store.
struct Part<'a>(&'a StatePart);

impl StateBytes for Part<'_> {
    fn bytes(
        &self,
        tensor: usize,
        range: std::ops::Range<usize>,
    ) -> Result<std::borrow::Cow<'_, [u8]>, SourceError> {
        let bytes = self.0.tensor(tensor)?;
        let slice = bytes.get(range.clone());
        slice.map(Into::into).ok_or_else(|| format!("there are no bytes {range:?}").into())
    }
}

/// Bytes of the store, for the engine.
pub(crate) struct Verified(pub(crate) Arc<PartBytes>);

impl TensorBytes for Verified {
    fn tensor(&self, index: usize) -> &[u8] {
        self.0.tensor(index)
    }
}
