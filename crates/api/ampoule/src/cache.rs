//! Capsules in tiers: device memory, host memory, a store on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use ampoule_engine::{Capsule, PieceKind, Residence, SlotId, StatePiece};
use ampoule_store::tiers::{
    Budgets, LeastRecentlyUsed, Move, Policy, StateKind, Tier, TierError, Tiers, Usage,
};
use ampoule_store::{CapsuleId, StoredCapsule};

use crate::stores::Verified;
use crate::{Ampoule, CapsuleStore, Error};

/// Names a capsule of a cache, for as long as the cache lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CapsuleKey(u64);

impl fmt::Display for CapsuleKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Why a cache did not do what it was asked to. What it holds is as it was, but for moves that were made before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A budget is used up, and nothing may leave.
    #[error(transparent)]
    Tier(#[from] TierError),
    /// There is no such capsule.
    #[error("the cache has no capsule {key}: it was removed, or forgotten to make room")]
    Unknown {
        /// What was asked for.
        key: CapsuleKey,
    },
    /// The disk tier needs a store.
    #[error("this cache has no store, so nothing can be kept on disk; give it one")]
    NoStore,
}

/// How much a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes of each tier. Where slots lie in host memory there is no device tier. The tier that snapshots go to is never
    /// more than the engine's own budget for capsules; leave that some room for snapshots that no cache holds.
    pub budgets: Budgets,
    /// What happens when no tier has room: the capsules used least recently are forgotten, or (`false`) the call fails.
    pub forget: bool,
}

impl Default for CacheOptions {
    fn default() -> Self {
        let budgets = Budgets { device: 2 << 30, host: 2 << 30, disk: 16 << 30 };
        Self { budgets, forget: false }
    }
}

/// Something that a cache did on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheEvent {
    /// A piece was moved.
    Moved {
        /// Capsules that it is a piece of.
        capsules: Vec<CapsuleKey>,
        /// Rows or fixed state.
        kind: StateKind,
        /// Its bytes.
        bytes: u64,
        /// Where it lay.
        from: Tier,
        /// Where it lies.
        to: Tier,
    },
    /// A capsule was written to the store, so that pieces of it could leave memory.
    Spilled {
        /// The capsule.
        key: CapsuleKey,
        /// Its id there.
        id: CapsuleId,
        /// Bytes written: what the store did not hold yet.
        written: u64,
    },
    /// A capsule was forgotten to make room.
    Forgotten {
        /// The capsule.
        key: CapsuleKey,
    },
}

/// Bytes of fixed state and of rows, apart, by tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierBytes {
    /// In device memory.
    pub device: Usage,
    /// In host memory.
    pub host: Usage,
    /// In the store alone.
    pub disk: Usage,
}

impl TierBytes {
    fn add(&mut self, tier: Tier, kind: StateKind, bytes: u64) {
        let usage = match tier {
            Tier::Device => &mut self.device,
            Tier::Host => &mut self.host,
            Tier::Disk => &mut self.disk,
        };
        match kind {
            StateKind::Fixed => usage.fixed += bytes,
            StateKind::Rows => usage.rows += bytes,
        }
    }
}

/// A capsule of a cache, as it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedCapsule {
    /// Its key.
    pub key: CapsuleKey,
    /// Tokens read at its boundary.
    pub position: u32,
    /// Bytes of its pieces by where they lie; rows may be shared with other capsules.
    pub bytes: TierBytes,
    /// Bytes of its rows that other capsules of the cache need as well.
    pub shared_row_bytes: u64,
    /// Whether it may not be demoted or forgotten.
    pub pinned: bool,
    /// Its id in the store, if it is there.
    pub stored: Option<CapsuleId>,
}

struct Entry {
    capsule: Capsule,
    /// Pieces of the chain's nodes, from the root on.
    rows: Vec<Option<u64>>,
    fixed: u64,
    stored: Option<CapsuleId>,
    /// Whether it is in the store because of this cache.
    spilled: bool,
    pinned: bool,
    last_used: u64,
}

impl Entry {
    /// Its pieces, in the order of use: fixed state first, the root's rows last, since most capsules need those.
    fn pieces(&self) -> Vec<u64> {
        let rows: BTreeSet<u64> = self.rows.iter().flatten().copied().collect();
        let mut seen = BTreeSet::new();
        let leaf_first = self.rows.iter().rev().flatten().copied().filter(|id| rows.contains(id));
        std::iter::once(self.fixed).chain(leaf_first).filter(|id| seen.insert(*id)).collect()
    }
}

struct Held {
    piece: StatePiece,
    users: BTreeSet<CapsuleKey>,
}

/// Asks for moves; asked again after something was forgotten.
type Plan<'a, P> = &'a mut dyn FnMut(&mut Tiers<u64, P>) -> Result<Vec<Move<u64>>, TierError>;

/// Events kept until somebody takes them; older ones go.
const EVENTS: usize = 4096;

/// Holds capsules under budgets of bytes, in device memory, host memory and a store on disk. Bookkeeping and policy are [`Tiers`] and
/// [`Policy`], which can be replaced; the moves themselves are the engine's and the store's. What moves are pieces: the
/// fixed state of a capsule, and the rows of each node of its chain, which it shares with every capsule below that node.
///
/// ```no_run
/// use ampoule::{Ampoule, CacheOptions, CapsuleCache, LoadOptions};
///
/// # fn main() -> Result<(), ampoule::Error> {
/// let mut model = Ampoule::load("random:qwen3.5-tiny", &LoadOptions::default(), &mut |_, _| {})?;
/// let mut cache = CapsuleCache::new(&model, None, CacheOptions::default());
/// let slot = model.slot_with(&[1, 2, 3])?;
/// let key = cache.snapshot(&mut model, slot, false)?; // makes room first
/// cache.restore(&mut model, key, slot)?; // from wherever it lies
/// # Ok(())
/// # }
/// ```
///
/// A capsule that is given to a cache is in its custody: its pieces may leave memory at any later call. Hold keys, not
/// [`Capsule`]s; one that is [got](Self::get) stays usable until the next call, or for as long as it is pinned. Restoring
/// one that is away fails with a typed error and changes nothing.
pub struct CapsuleCache<P = LeastRecentlyUsed> {
    tiers: Tiers<u64, P>,
    store: Option<Arc<CapsuleStore>>,
    /// Where snapshots are made and restores are fastest.
    base: Tier,
    forget: bool,
    entries: BTreeMap<CapsuleKey, Entry>,
    pieces: BTreeMap<u64, Held>,
    events: VecDeque<CacheEvent>,
    next: u64,
    clock: u64,
}

impl<P> fmt::Debug for CapsuleCache<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapsuleCache")
            .field("capsules", &self.entries.len())
            .field("pieces", &self.pieces.len())
            .finish_non_exhaustive()
    }
}

impl CapsuleCache {
    /// A cache for a model's capsules that demotes what was used least recently. Without a store there is no disk tier.
    pub fn new(model: &Ampoule, store: Option<Arc<CapsuleStore>>, options: CacheOptions) -> Self {
        Self::with_policy(model, store, options, LeastRecentlyUsed)
    }
}

const fn tier_of(residence: Residence) -> Tier {
    match residence {
        Residence::Device => Tier::Device,
        Residence::Host => Tier::Host,
    }
}

fn kind_of(piece: &StatePiece) -> StateKind {
    match piece.kind() {
        PieceKind::Rows => StateKind::Rows,
        PieceKind::Fixed => StateKind::Fixed,
    }
}

impl<P: Policy<u64>> CapsuleCache<P> {
    /// [`new`](CapsuleCache::new) with a policy of one's own. It is asked about pieces, by [`StatePiece::id`].
    pub fn with_policy(
        model: &Ampoule,
        store: Option<Arc<CapsuleStore>>,
        options: CacheOptions,
        policy: P,
    ) -> Self {
        let mut budgets = options.budgets;
        let engine = model.engine.capsule_bytes().1 as u64;
        let base = tier_of(model.engine.residence());
        if base == Tier::Host {
            budgets.device = 0;
            budgets.host = budgets.host.min(engine);
        } else {
            budgets.device = budgets.device.min(engine);
        }
        if store.is_none() {
            budgets.disk = 0;
        }
        Self {
            tiers: Tiers::new(budgets, policy),
            store,
            base,
            forget: options.forget,
            entries: BTreeMap::new(),
            pieces: BTreeMap::new(),
            events: VecDeque::new(),
            next: 1,
            clock: 0,
        }
    }

    /// Freezes the slot's boundary, after making room for it, and takes it up.
    ///
    /// # Errors
    /// If no room can be made; the slot goes on as it was then. If the snapshot fails.
    pub fn snapshot(
        &mut self,
        model: &mut Ampoule,
        slot: SlotId,
        pinned: bool,
    ) -> Result<CapsuleKey, Error> {
        let (rows, fixed) = model.engine.snapshot_bytes(slot)?;
        self.reserve(model, (rows + fixed) as u64)?;
        let capsule = model.engine.snapshot(slot)?;
        self.insert(model, &capsule, pinned)
    }

    /// Takes a capsule up that is in memory. One that the cache has already keeps its key.
    ///
    /// # Errors
    /// If no room can be made; the capsule is then the caller's as before.
    pub fn insert(
        &mut self,
        model: &mut Ampoule,
        capsule: &Capsule,
        pinned: bool,
    ) -> Result<CapsuleKey, Error> {
        let (rows, fixed) = capsule.pieces();
        let known = self.pieces.get(&fixed.id()).and_then(|held| held.users.first().copied());
        if let Some(key) = known {
            if pinned {
                self.pin(model, key)?;
            }
            return Ok(key);
        }
        let key = CapsuleKey(self.next);
        self.next += 1;
        let ids = rows.iter().map(|r| r.as_ref().map(StatePiece::id)).collect();
        self.clock += 1;
        let entry = Entry {
            capsule: capsule.clone(),
            rows: ids,
            fixed: fixed.id(),
            stored: None,
            spilled: false,
            pinned: false,
            last_used: self.clock,
        };
        // It is a user of its pieces from now on: making room for some of them must not lose others.
        self.entries.insert(key, entry);
        let pieces: Vec<StatePiece> = rows.into_iter().flatten().chain([fixed]).collect();
        let taken = self.take_up(model, key, &pieces);
        if let Err(error) = taken.and_then(|()| if pinned { self.pin(model, key) } else { Ok(()) })
        {
            self.remove(model, key)?;
            return Err(error);
        }
        Ok(key)
    }

    /// Counts the pieces of a capsule that is in memory, those of them that are new.
    fn take_up(
        &mut self,
        model: &mut Ampoule,
        key: CapsuleKey,
        pieces: &[StatePiece],
    ) -> Result<(), Error> {
        let mut fresh = Vec::new();
        for piece in pieces {
            let users = BTreeSet::new();
            let held = Held { piece: piece.clone(), users };
            let held = self.pieces.entry(piece.id()).or_insert(held);
            if held.users.is_empty() {
                fresh.push(piece);
            }
            held.users.insert(key);
        }
        let mut pinned = Vec::new();
        let mut result = Ok(());
        for piece in pieces {
            let id = piece.id();
            if fresh.iter().any(|new| new.id() == id) {
                let (kind, bytes) = (kind_of(piece), piece.bytes() as u64);
                let tier = piece.residence().map_or(Tier::Disk, tier_of);
                result = self
                    .attempt(model, Some(key), &mut |tiers| tiers.admit(&id, kind, bytes, tier));
                if result.is_err() {
                    break;
                }
                // It stays while room is made for the others.
                self.tiers.pin(&id).map_err(CacheError::Tier)?;
                pinned.push(id);
            } else if let (Some(Tier::Disk), Some(at)) =
                (self.tiers.tier_of(&id), piece.residence())
            {
                // It came back by another way, such as a load: it is counted, or leaves again.
                let to = tier_of(at);
                let counted = self.attempt(model, Some(key), &mut |tiers| tiers.place(&id, to));
                if counted.is_err() {
                    piece.give_up();
                }
            }
        }
        for id in pinned {
            self.tiers.unpin(&id).map_err(CacheError::Tier)?;
        }
        result
    }

    /// Takes a capsule up from the store, by name or id, checked byte by byte.
    ///
    /// # Errors
    /// If there is no store or no such capsule, it is damaged or does not fit the model, or no room can be made.
    pub fn load(
        &mut self,
        model: &mut Ampoule,
        which: &str,
        pinned: bool,
    ) -> Result<CapsuleKey, Error> {
        let store = self.store.clone().ok_or(CacheError::NoStore)?;
        let id = store.find(which)?;
        if let Some((key, _)) = self.entries.iter().find(|(_, e)| e.stored == Some(id)) {
            let key = *key;
            if pinned {
                self.pin(model, key)?;
            }
            return Ok(key);
        }
        let stored = store.store().capsule(id)?;
        // At most: rows that are here already are not read.
        self.reserve(model, stored.fixed_bytes() + stored.row_bytes())?;
        let capsule = store.load(model, id)?;
        let key = self.insert(model, &capsule, pinned)?;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.stored = Some(id);
        }
        Ok(key)
    }

    /// A capsule, brought to memory, every piece as far up as the policy says. What was on disk is checked.
    ///
    /// # Errors
    /// If it is not in the cache, no room can be made, or what the store has of it is damaged; others are not affected.
    pub fn get(&mut self, model: &mut Ampoule, key: CapsuleKey) -> Result<Capsule, Error> {
        let pieces = self.entry(key)?.pieces();
        self.clock += 1;
        let clock = self.clock;
        self.entries.entry(key).and_modify(|entry| entry.last_used = clock);
        let base = self.base;
        self.attempt(model, Some(key), &mut |tiers| tiers.bring(&pieces, base))?;
        // A policy may leave state where it is, but from the disk nothing can be used.
        let away: Vec<u64> = pieces
            .iter()
            .copied()
            .filter(|id| self.tiers.tier_of(id) == Some(Tier::Disk))
            .collect();
        for id in &pieces {
            self.tiers.pin(id).map_err(CacheError::Tier)?;
        }
        let brought = away.iter().try_for_each(|id| {
            self.attempt(model, Some(key), &mut |tiers| tiers.place(id, Tier::Host))
        });
        for id in &pieces {
            self.tiers.unpin(id).map_err(CacheError::Tier)?;
        }
        brought?;
        Ok(self.entry(key)?.capsule.clone())
    }

    /// Restores a capsule into a slot.
    ///
    /// # Errors
    /// As [`get`](Self::get), or if the restore fails.
    pub fn restore(
        &mut self,
        model: &mut Ampoule,
        key: CapsuleKey,
        slot: SlotId,
    ) -> Result<(), Error> {
        let capsule = self.get(model, key)?;
        Ok(model.engine.restore(slot, &capsule)?)
    }

    /// Restores a capsule into one new slot per seed.
    ///
    /// # Errors
    /// As [`get`](Self::get), or if there are not enough free slots.
    pub fn fork(
        &mut self,
        model: &mut Ampoule,
        key: CapsuleKey,
        seeds: &[Option<u64>],
    ) -> Result<Vec<SlotId>, Error> {
        let capsule = self.get(model, key)?;
        Ok(model.engine.fork(&capsule, seeds)?)
    }

    /// Brings a capsule to memory and keeps all of it there, until it is unpinned.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn pin(&mut self, model: &mut Ampoule, key: CapsuleKey) -> Result<(), Error> {
        self.get(model, key)?;
        if !self.entry(key)?.pinned {
            for id in self.entry(key)?.pieces() {
                self.tiers.pin(&id).map_err(CacheError::Tier)?;
            }
            self.entries.entry(key).and_modify(|entry| entry.pinned = true);
        }
        Ok(())
    }

    /// Lets a capsule be demoted again.
    ///
    /// # Errors
    /// If it is not in the cache.
    pub fn unpin(&mut self, key: CapsuleKey) -> Result<(), Error> {
        if self.entry(key)?.pinned {
            for id in self.entry(key)?.pieces() {
                self.tiers.unpin(&id).map_err(CacheError::Tier)?;
            }
            self.entries.entry(key).and_modify(|entry| entry.pinned = false);
        }
        Ok(())
    }

    /// Moves a capsule to a tier, up or down. Downwards, rows stay that a capsule in a faster tier needs.
    ///
    /// # Errors
    /// If it is not in the cache, the tier is full, there is no such tier, or the move fails.
    pub fn place(&mut self, model: &mut Ampoule, key: CapsuleKey, tier: Tier) -> Result<(), Error> {
        for id in self.entry(key)?.pieces() {
            let needed = |other: &CapsuleKey| {
                let fixed = self.entries.get(other).and_then(|e| self.tiers.tier_of(&e.fixed));
                *other != key && fixed.is_some_and(|at| at < tier)
            };
            let here = self.tiers.tier_of(&id).is_some_and(|at| at < tier);
            if here && self.pieces.get(&id).is_some_and(|held| held.users.iter().any(needed)) {
                continue;
            }
            self.attempt(model, Some(key), &mut |tiers| tiers.place(&id, tier))?;
        }
        Ok(())
    }

    /// Saves a capsule under a name: it then outlives the cache.
    ///
    /// # Errors
    /// If it is not in the cache, there is no store, or the save fails.
    pub fn save(
        &mut self,
        model: &mut Ampoule,
        key: CapsuleKey,
        name: &str,
    ) -> Result<CapsuleId, Error> {
        let id = self.store_one(model, key)?;
        let store = self.store.clone().ok_or(CacheError::NoStore)?;
        store.store().set_head(name, ampoule_store::Expected::Anything, id)?;
        self.entries.entry(key).and_modify(|entry| entry.spilled = false);
        Ok(id)
    }

    /// Takes a capsule out. Rows that others need stay. From the store goes what only this cache put there.
    ///
    /// # Errors
    /// If it is not in the cache, or the store fails; it is in the cache then as before.
    pub fn remove(&mut self, model: &mut Ampoule, key: CapsuleKey) -> Result<(), Error> {
        self.rehome(model, key)?;
        let entry = self.entry(key)?;
        let (stored, pieces, pinned) =
            (entry.stored.filter(|_| entry.spilled), entry.pieces(), entry.pinned);
        let shared = |id| self.entries.iter().any(|(k, e)| *k != key && e.stored == Some(id));
        if let (Some(id), Some(store)) = (stored.filter(|id| !shared(*id)), &self.store)
            && !store.store().heads()?.0.iter().any(|head| head.capsule == id)
        {
            store.store().remove(id)?;
        }
        for id in pieces {
            if pinned {
                self.tiers.unpin(&id).map_err(CacheError::Tier)?;
            }
            let Some(held) = self.pieces.get_mut(&id) else { continue };
            held.users.remove(&key);
            if held.users.is_empty() {
                match self.tiers.remove(&id) {
                    // Never admitted, for want of room.
                    Ok(()) | Err(TierError::Unknown) => {}
                    Err(error) => return Err(CacheError::Tier(error).into()),
                }
                self.pieces.remove(&id);
            }
        }
        self.entries.remove(&key);
        Ok(())
    }

    /// Takes out the capsules that nobody but the cache holds, for an owner who goes on holding those that he needs and only
    /// drops the others; returns how many there were. Pinned ones stay.
    ///
    /// # Errors
    /// As [`remove`](Self::remove); those before are out then.
    pub fn drop_unheld(&mut self, model: &mut Ampoule) -> Result<usize, Error> {
        let unheld = |entry: &Entry| !entry.pinned && !entry.capsule.is_shared();
        let keys: Vec<CapsuleKey> =
            self.entries.iter().rev().filter(|(_, e)| unheld(e)).map(|(key, _)| *key).collect();
        keys.iter().try_for_each(|key| self.remove(model, *key))?;
        Ok(keys.len())
    }

    /// Moves so many bytes out of the tier that snapshots go to, for state that the engine keeps there and no cache counts.
    ///
    /// # Errors
    /// If they have nowhere to go.
    pub fn make_way(&mut self, model: &mut Ampoule, bytes: u64) -> Result<(), Error> {
        let free = self.budgets().of(self.base).saturating_sub(self.usage(self.base).total());
        self.reserve(model, free.saturating_add(bytes))
    }

    /// Takes all capsules out.
    ///
    /// # Errors
    /// As [`remove`](Self::remove); those before are out then.
    pub fn clear(&mut self, model: &mut Ampoule) -> Result<(), Error> {
        // Children first, so that none has to be saved for the sake of its rows.
        let keys: Vec<CapsuleKey> = self.entries.keys().rev().copied().collect();
        keys.into_iter().try_for_each(|key| self.remove(model, key))
    }

    /// Bytes in a tier, of fixed state and of rows.
    pub fn usage(&self, tier: Tier) -> Usage {
        self.tiers.usage(tier)
    }

    /// The budgets, as they were cut to the device.
    pub fn budgets(&self) -> Budgets {
        self.tiers.budgets()
    }

    /// Capsules there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// One capsule, as it lies.
    ///
    /// # Errors
    /// If it is not in the cache.
    pub fn describe(&self, key: CapsuleKey) -> Result<CachedCapsule, Error> {
        let entry = self.entry(key)?;
        let (mut bytes, mut shared_row_bytes) = (TierBytes::default(), 0);
        for id in entry.pieces() {
            let (Some(held), Some(tier)) = (self.pieces.get(&id), self.tiers.tier_of(&id)) else {
                continue;
            };
            bytes.add(tier, kind_of(&held.piece), held.piece.bytes() as u64);
            if held.users.len() > 1 {
                shared_row_bytes += held.piece.bytes() as u64;
            }
        }
        let (position, pinned, stored) = (entry.capsule.position(), entry.pinned, entry.stored);
        Ok(CachedCapsule { key, position, bytes, shared_row_bytes, pinned, stored })
    }

    /// All capsules, as they lie, in the order in which they came.
    pub fn list(&self) -> Vec<CachedCapsule> {
        self.entries.keys().filter_map(|key| self.describe(*key).ok()).collect()
    }

    /// What happened since the last call, oldest first: the last 4096 events.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        self.events.drain(..).collect()
    }

    fn entry(&self, key: CapsuleKey) -> Result<&Entry, CacheError> {
        self.entries.get(&key).ok_or(CacheError::Unknown { key })
    }

    fn tell(&mut self, event: CacheEvent) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Makes room where snapshots go.
    fn reserve(&mut self, model: &mut Ampoule, bytes: u64) -> Result<(), Error> {
        let base = self.base;
        self.attempt(model, None, &mut |tiers| tiers.make_way(base, bytes))
    }

    /// Plans and makes moves; where there is no room, forgets capsules if that is allowed, but never `used`.
    fn attempt(
        &mut self,
        model: &mut Ampoule,
        used: Option<CapsuleKey>,
        plan: Plan<'_, P>,
    ) -> Result<(), Error> {
        loop {
            match plan(&mut self.tiers) {
                Ok(moves) => return self.carry_out(model, &moves),
                Err(error @ TierError::Full { .. }) if self.forget => {
                    let oldest = self
                        .entries
                        .iter()
                        .filter(|(key, entry)| !entry.pinned && Some(**key) != used)
                        .min_by_key(|(_, entry)| entry.last_used);
                    let Some((&key, _)) = oldest else {
                        return Err(CacheError::Tier(error).into());
                    };
                    self.remove(model, key)?;
                    self.tell(CacheEvent::Forgotten { key });
                }
                Err(error) => return Err(CacheError::Tier(error).into()),
            }
        }
    }

    /// Makes the moves of a plan in their order, each reserved before a byte moves.
    fn carry_out(&mut self, model: &mut Ampoule, moves: &[Move<u64>]) -> Result<(), Error> {
        let mut read = HashMap::new();
        for (index, step) in moves.iter().enumerate() {
            let begun = self.tiers.begin(step).map_err(|e| Error::from(CacheError::Tier(e)));
            match begun.and_then(|()| self.make(model, step, &mut read)) {
                Ok(()) => self.tiers.finish(step),
                Err(error) => {
                    moves[index..].iter().rev().for_each(|step| self.tiers.cancel(step));
                    return Err(error);
                }
            }
            if let (Some(from), Some(held)) = (step.from, self.pieces.get(&step.key)) {
                let capsules = held.users.iter().copied().collect();
                let (kind, bytes, to) = (step.kind, step.bytes, step.to);
                self.tell(CacheEvent::Moved { capsules, kind, bytes, from, to });
            }
        }
        Ok(())
    }

    fn make(
        &mut self,
        model: &mut Ampoule,
        step: &Move<u64>,
        read: &mut HashMap<CapsuleId, StoredCapsule>,
    ) -> Result<(), Error> {
        let Some(from) = step.from else { return Ok(()) };
        let Some(piece) = self.pieces.get(&step.key).map(|held| held.piece.clone()) else {
            return Ok(());
        };
        let residence = if step.to == Tier::Device { Residence::Device } else { Residence::Host };
        match (from, step.to) {
            (_, Tier::Disk) => {
                self.spill(model, step.key)?;
                piece.give_up();
                Ok(())
            }
            (Tier::Disk, _) => self.fetch(model, step.key, &piece, residence, read),
            _ => Ok(model.engine.move_piece(&piece, residence)?),
        }
    }

    /// A user of the piece that is in the store, and the piece's place in its chain; `None` for its fixed state.
    fn home(&self, piece: u64, but: Option<CapsuleKey>) -> Option<(CapsuleId, Option<usize>)> {
        let users = self.pieces.get(&piece)?.users.iter().filter(|key| Some(**key) != but);
        let mut stored = users.filter_map(|key| {
            let entry = self.entries.get(key)?;
            Some((entry.stored?, entry.rows.iter().position(|id| *id == Some(piece))))
        });
        stored.next()
    }

    /// Reads a piece from the store, checked.
    fn fetch(
        &self,
        model: &mut Ampoule,
        id: u64,
        piece: &StatePiece,
        residence: Residence,
        read: &mut HashMap<CapsuleId, StoredCapsule>,
    ) -> Result<(), Error> {
        if piece.residence().is_some() {
            // Somebody loaded it by another way.
            return Ok(model.engine.move_piece(piece, residence)?);
        }
        let store = self.store.as_ref().ok_or(CacheError::NoStore)?.store();
        let (capsule, link) = self.home(id, None).ok_or(CacheError::Tier(TierError::Unknown))?;
        let stored = match read.entry(capsule) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(store.capsule(capsule)?)
            }
        };
        let bytes = match link {
            Some(index) => store.rows(stored, index)?,
            None => store.fixed(stored)?,
        };
        Ok(model.engine.bring_back(piece, &Verified(Arc::new(bytes)), residence)?)
    }

    /// Sees to it that the store has a piece.
    fn spill(&mut self, model: &mut Ampoule, piece: u64) -> Result<(), Error> {
        if self.home(piece, None).is_some() {
            return Ok(());
        }
        let user = self.pieces.get(&piece).and_then(|held| held.users.first().copied());
        let key = user.ok_or(CacheError::Tier(TierError::Unknown))?;
        self.store_one(model, key).map(|_| ())
    }

    /// Saves a capsule unless it is in the store; its id there.
    fn store_one(&mut self, model: &mut Ampoule, key: CapsuleKey) -> Result<CapsuleId, Error> {
        let store = self.store.clone().ok_or(CacheError::NoStore)?;
        let entry = self.entry(key)?;
        if let Some(id) = entry.stored {
            return Ok(id);
        }
        // Rows that are on disk are there as parts of other capsules: the store is to know them again.
        let away =
            entry.rows.iter().flatten().filter(|id| {
                self.pieces.get(id).is_some_and(|held| held.piece.residence().is_none())
            });
        let homes: BTreeSet<CapsuleId> =
            away.filter_map(|id| Some(self.home(*id, None)?.0)).collect();
        for home in homes {
            store.store().capsule(home)?;
        }
        let saved = store.save(model, &entry.capsule, None, None)?;
        let (id, written) = (saved.id, saved.written);
        self.entries.entry(key).and_modify(|entry| {
            entry.stored = Some(id);
            entry.spilled = true;
        });
        self.tell(CacheEvent::Spilled { key, id, written });
        Ok(id)
    }

    /// Before a capsule goes: rows on disk that others need must be in the store as theirs.
    fn rehome(&mut self, model: &mut Ampoule, key: CapsuleKey) -> Result<(), Error> {
        for id in self.entry(key)?.pieces() {
            if self.tiers.tier_of(&id) != Some(Tier::Disk) || self.home(id, Some(key)).is_some() {
                continue;
            }
            let users = self.pieces.get(&id).map(|held| held.users.iter().copied());
            let other = users.and_then(|mut users| users.find(|other| *other != key));
            if let Some(other) = other {
                self.store_one(model, other)?;
            }
        }
        Ok(())
    }
}
