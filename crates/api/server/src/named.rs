//! Capsules that can be asked for: those that clients made, and those that the store has under a name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ampoule::Capsule;
use ampoule::store::{CapsuleId, StoredCapsule};

use crate::metrics::Metrics;
use crate::vault::lock;

/// A capsule that a client asked for, or one that the store has under a name. Its state lies in memory, in the store, or in
/// both.
#[derive(Clone)]
pub(crate) struct NamedCapsule {
    /// Whose it is; of one that is the store's own it says nothing.
    pub key: [u8; 32],
    pub created: u64,
    /// Microseconds since 1970: of several that were given one name the latest has it.
    pub order: u64,
    pub name: Option<String>,
    pub parent: Option<String>,
    pub pinned: bool,
    pub origin: Origin,
    pub about: About,
    /// Its state, while that is in memory.
    pub capsule: Option<Capsule>,
    /// Where its state lies in the store: there as long as anybody can ask for it, and after a restart only if it
    /// [is kept](Self::is_kept).
    pub stored: Option<CapsuleId>,
    /// The model it is of, if that is not the one that is served.
    pub misfit: Option<String>,
}

/// Where a capsule that can be asked for comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A client made it.
    Client,
    /// A name of the store, for everybody.
    Store,
    /// A name of the store that is to stay in memory (`--warm`).
    Warm,
}

/// What is said of a capsule, wherever it lies.
#[derive(Clone)]
pub(crate) struct About {
    pub position: u32,
    pub lineage: String,
    pub fixed_bytes: u64,
    pub own_row_bytes: u64,
    pub row_bytes: u64,
}

impl From<&Capsule> for About {
    fn from(capsule: &Capsule) -> Self {
        Self {
            position: capsule.position(),
            lineage: capsule.lineage().to_string(),
            fixed_bytes: capsule.fixed_bytes() as u64,
            own_row_bytes: capsule.own_row_bytes() as u64,
            row_bytes: capsule.row_bytes() as u64,
        }
    }
}

impl From<&StoredCapsule> for About {
    fn from(stored: &StoredCapsule) -> Self {
        Self {
            position: stored.position(),
            lineage: stored.lineage().to_string(),
            fixed_bytes: stored.fixed_bytes(),
            own_row_bytes: stored.own_row_bytes(),
            row_bytes: stored.row_bytes(),
        }
    }
}

impl NamedCapsule {
    /// Whether it is this key's own, to be changed and deleted.
    pub(crate) fn is_of(&self, key: &[u8; 32]) -> bool {
        self.origin == Origin::Client && self.key == *key
    }

    /// Whether this key may use it.
    fn is_for(&self, key: &[u8; 32]) -> bool {
        self.origin != Origin::Client || self.key == *key
    }

    /// Whether it outlasts the process, where there is a store.
    pub(crate) fn is_kept(&self) -> bool {
        self.pinned || self.name.is_some() || self.origin != Origin::Client
    }

    /// Whether it is this key's and the model's, and is called so.
    fn is_called(&self, key: &[u8; 32], name: &str) -> bool {
        self.name.as_deref() == Some(name) && self.misfit.is_none() && self.is_of(key)
    }
}

struct Entry {
    named: NamedCapsule,
    used: Instant,
}

type All = HashMap<String, Entry>;

/// All of them, by id.
pub(crate) struct Names {
    all: Mutex<All>,
    metrics: Arc<Metrics>,
}

impl Names {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self { all: Mutex::default(), metrics }
    }

    fn count_clients(&self, all: &All) {
        let clients = |e: &&Entry| e.named.origin == Origin::Client && e.named.misfit.is_none();
        self.metrics.named.set(all.values().filter(clients).count());
    }

    /// Adds a capsule. One of the same key that had its name has none any more, and is returned as it is now.
    pub(crate) fn add(&self, id: &str, named: NamedCapsule) -> Option<(String, NamedCapsule)> {
        let mut all = lock(&self.all);
        let takes = named.origin == Origin::Client && named.misfit.is_none();
        let name = named.name.as_deref().filter(|_| takes);
        let before = name.and_then(|name| {
            let mut others = all.iter_mut().filter(|(other, _)| *other != id);
            let (other, before) = others.find(|(_, e)| e.named.is_called(&named.key, name))?;
            before.named.name = None;
            Some((other.clone(), before.named.clone()))
        });
        all.insert(id.to_owned(), Entry { named, used: Instant::now() });
        self.count_clients(&all);
        before
    }

    pub(crate) fn has(&self, id: &str) -> bool {
        lock(&self.all).contains_key(id)
    }

    /// One by its id, for somebody who may use it and does.
    pub(crate) fn used(&self, id: &str) -> Option<NamedCapsule> {
        let mut all = lock(&self.all);
        let entry = all.get_mut(id)?;
        entry.used = Instant::now();
        Some(entry.named.clone())
    }

    /// A capsule by id, by the name that its owner gave it, or by a name of the store.
    pub(crate) fn find(&self, key: &[u8; 32], which: &str) -> Option<(String, NamedCapsule)> {
        let all = lock(&self.all);
        // Of other keys' capsules not even the names are looked at.
        let by_id = all.get_key_value(which).filter(|(_, e)| e.named.is_for(key));
        let (id, entry) = by_id.or_else(|| {
            let mine = all.iter().filter(|(_, e)| e.named.is_for(key));
            let so_called = mine.filter(|(_, e)| e.named.name.as_deref() == Some(which));
            let place = |n: &NamedCapsule| (n.misfit.is_none(), n.is_of(key), n.order);
            so_called.max_by_key(|(_, e)| place(&e.named))
        })?;
        Some((id.clone(), entry.named.clone()))
    }

    /// What a key may use: its own, oldest first, then the store's by name.
    pub(crate) fn list(&self, key: &[u8; 32]) -> Vec<(String, NamedCapsule)> {
        let all = lock(&self.all);
        let mine = all.iter().filter(|(_, e)| e.named.is_for(key) && e.named.misfit.is_none());
        let mut list: Vec<_> = mine.map(|(id, e)| (id.clone(), e.named.clone())).collect();
        list.sort_by(|(a_id, a), (b_id, b)| {
            let place = |n: &NamedCapsule| (n.origin != Origin::Client, n.created, n.order);
            (place(a), &a.name, a_id).cmp(&(place(b), &b.name, b_id))
        });
        list
    }

    /// How many a key has.
    pub(crate) fn count(&self, key: &[u8; 32]) -> usize {
        let all = lock(&self.all);
        all.values().filter(|e| e.named.is_of(key) && e.named.misfit.is_none()).count()
    }

    /// Changes one of a key's own.
    pub(crate) fn change(
        &self,
        key: &[u8; 32],
        id: &str,
        work: impl FnOnce(&mut NamedCapsule),
    ) -> Option<NamedCapsule> {
        let mut all = lock(&self.all);
        let entry = all.get_mut(id).filter(|e| e.named.is_of(key))?;
        work(&mut entry.named);
        Some(entry.named.clone())
    }

    pub(crate) fn remove(&self, key: &[u8; 32], id: &str) -> bool {
        let mut all = lock(&self.all);
        let mine = all.get(id).is_some_and(|e| e.named.is_of(key));
        let removed = mine && all.remove(id).is_some();
        self.count_clients(&all);
        removed
    }

    /// Notes that a state is in memory now.
    pub(crate) fn loaded(&self, id: &str, capsule: &Capsule) {
        if let Some(entry) = lock(&self.all).get_mut(id) {
            entry.named.capsule.get_or_insert_with(|| capsule.clone());
        }
    }

    /// Lets the state go from memory that was used least recently of those that the store has, and not for `idle`. False if
    /// there is none.
    pub(crate) fn relieve(&self, idle: Duration) -> bool {
        let mut all = lock(&self.all);
        let again = |e: &&mut Entry| {
            let named = &e.named;
            let kept = named.stored.is_some() && named.origin != Origin::Warm;
            kept && named.capsule.is_some() && e.used.elapsed() >= idle
        };
        let oldest = all.values_mut().filter(again).min_by_key(|e| e.used);
        oldest.is_some_and(|entry| entry.named.capsule.take().is_some())
    }
}
