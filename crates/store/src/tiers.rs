//! Which state lies where: budgets for each tier, pins, demotion of what was used least recently, promotion on use.
//!
//! Pure bookkeeping, above the mechanisms: nothing here copies a byte or reads a clock. [`Tiers`] says which moves to make
//! and holds the budgets; whoever owns the bytes makes them, one after the other, and reports each:
//!
//! ```
//! use ampoule_store::tiers::{Budgets, LeastRecentlyUsed, StateKind, Tier, Tiers};
//!
//! let budgets = Budgets { device: 100, host: 1000, disk: u64::MAX };
//! let mut tiers = Tiers::new(budgets, LeastRecentlyUsed);
//! for (key, bytes) in [("a", 60), ("b", 60)] {
//!     for step in tiers.admit(&key, StateKind::Rows, bytes, Tier::Device)? {
//!         tiers.begin(&step)?; // reserves the bytes at the target
//!         // ... copy the bytes from step.from to step.to ...
//!         tiers.finish(&step); // gives the bytes at the source back
//!     }
//! }
//! assert_eq!(tiers.tier_of(&"a"), Some(Tier::Host)); // made room for b
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! An item is what moves as a whole: the rows of one node, or the fixed state of one capsule. Rows are shared, so the owner
//! uses a capsule by bringing its fixed state and the rows of its whole chain with one [`Tiers::bring`].

use std::collections::BTreeMap;
use std::fmt;

/// Where state lies, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Device memory.
    Device,
    /// Host memory, pinned where the device copies from it.
    Host,
    /// The store.
    Disk,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Self; 3] = [Self::Device, Self::Host, Self::Disk];

    const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        })
    }
}

/// Which kind of state an item is; the two are accounted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateKind {
    /// Of one boundary alone.
    Fixed,
    /// Rows of a node, shared by all boundaries below it.
    Rows,
}

/// Bytes that each tier may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// In device memory; 0 where there is no device.
    pub device: u64,
    /// In host memory.
    pub host: u64,
    /// On disk.
    pub disk: u64,
}

impl Budgets {
    /// Of one tier.
    pub const fn of(&self, tier: Tier) -> u64 {
        match tier {
            Tier::Device => self.device,
            Tier::Host => self.host,
            Tier::Disk => self.disk,
        }
    }
}

/// Bytes in a tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of fixed state.
    pub fixed: u64,
    /// Of rows.
    pub rows: u64,
}

impl Usage {
    /// Of both.
    pub const fn total(&self) -> u64 {
        self.fixed.saturating_add(self.rows)
    }

    fn of(&mut self, kind: StateKind) -> &mut u64 {
        match kind {
            StateKind::Fixed => &mut self.fixed,
            StateKind::Rows => &mut self.rows,
        }
    }
}

/// An item that a policy may choose.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a, K> {
    /// The item.
    pub key: &'a K,
    /// Its kind.
    pub kind: StateKind,
    /// Its bytes.
    pub bytes: u64,
    /// When it was last used: larger is later, no two are equal.
    pub last_used: u64,
}

/// What is demoted, and what use promotes. Replace it to weigh cost, size or age in another way.
pub trait Policy<K> {
    /// Which of the candidates leaves `tier` when room is needed for `wanted` bytes; `None` if none may. There is at least
    /// one candidate; none is pinned or moving.
    fn victim(
        &mut self,
        tier: Tier,
        wanted: u64,
        candidates: &mut dyn Iterator<Item = Candidate<'_, K>>,
    ) -> Option<K>;

    /// Where an item goes that lies in `at` and is used at `wanted`: `wanted` to promote it, `at` to use it from there.
    fn promotion(&mut self, item: Candidate<'_, K>, at: Tier, wanted: Tier) -> Tier {
        let _ = (item, at);
        wanted
    }
}

/// Demotes what was used least recently, promotes whatever is used.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastRecentlyUsed;

impl<K: Clone> Policy<K> for LeastRecentlyUsed {
    fn victim(
        &mut self,
        _: Tier,
        _: u64,
        candidates: &mut dyn Iterator<Item = Candidate<'_, K>>,
    ) -> Option<K> {
        candidates.min_by_key(|candidate| candidate.last_used).map(|c| c.key.clone())
    }
}

/// One item to be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move<K> {
    /// The item.
    pub key: K,
    /// Its kind.
    pub kind: StateKind,
    /// Its bytes.
    pub bytes: u64,
    /// Where it lies; `None` for one that is new.
    pub from: Option<Tier>,
    /// Where it goes.
    pub to: Tier,
}

/// Why no moves can be planned or begun. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TierError {
    /// There is no room, and nothing that may leave.
    #[error(
        "{wanted} bytes do not fit the {tier} budget of {budget}: {used} are in use and none of that may leave; raise the \
         budget, unpin or remove capsules"
    )]
    Full {
        /// The tier.
        tier: Tier,
        /// Bytes that are wanted.
        wanted: u64,
        /// Bytes in use once all planned moves are done.
        used: u64,
        /// The budget.
        budget: u64,
    },
    /// An item of that key is there.
    #[error("an item of that key is there already")]
    Exists,
    /// There is no such item.
    #[error("there is no item of that key")]
    Unknown,
    /// The item is on its way.
    #[error("the item is being moved: finish that first")]
    Moving,
    /// Moves of one plan were begun out of order.
    #[error(
        "{bytes} bytes are not free in the {tier} tier yet: make the moves of a plan in their order"
    )]
    NotYet {
        /// The tier.
        tier: Tier,
        /// The bytes.
        bytes: u64,
    },
}

#[derive(Clone, Debug)]
struct Item {
    kind: StateKind,
    bytes: u64,
    /// Where it lies; `None` before its first move is finished.
    tier: Option<Tier>,
    /// Where it is to go.
    target: Option<Tier>,
    /// Its move was begun.
    begun: bool,
    pins: u32,
    last_used: u64,
}

/// The items of all tiers.
#[derive(Debug)]
pub struct Tiers<K, P> {
    budgets: Budgets,
    policy: P,
    items: BTreeMap<K, Item>,
    clock: u64,
    /// Bytes that lie in a tier, both copies of an item that is being moved.
    resident: [Usage; 3],
    /// Bytes that will lie there once all planned moves are done.
    settled: [Usage; 3],
}

impl<K: Ord + Clone, P: Policy<K>> Tiers<K, P> {
    /// Empty tiers.
    pub const fn new(budgets: Budgets, policy: P) -> Self {
        let none = Usage { fixed: 0, rows: 0 };
        let (resident, settled) = ([none; 3], [none; 3]);
        Self { budgets, policy, items: BTreeMap::new(), clock: 0, resident, settled }
    }

    /// Bytes in a tier; both copies of an item that is being moved count.
    pub const fn usage(&self, tier: Tier) -> Usage {
        self.resident[tier.index()]
    }

    /// The budgets.
    pub const fn budgets(&self) -> Budgets {
        self.budgets
    }

    /// Where an item lies; `None` for one that is unknown or not there yet.
    pub fn tier_of(&self, key: &K) -> Option<Tier> {
        self.items.get(key)?.tier
    }

    /// Keeps an item from being demoted, until it is unpinned as often.
    ///
    /// # Errors
    /// [`TierError::Unknown`].
    pub fn pin(&mut self, key: &K) -> Result<(), TierError> {
        let item = self.items.get_mut(key).ok_or(TierError::Unknown)?;
        item.pins = item.pins.saturating_add(1);
        Ok(())
    }

    /// Takes one pin back.
    ///
    /// # Errors
    /// [`TierError::Unknown`].
    pub fn unpin(&mut self, key: &K) -> Result<(), TierError> {
        let item = self.items.get_mut(key).ok_or(TierError::Unknown)?;
        item.pins = item.pins.saturating_sub(1);
        Ok(())
    }

    /// Notes a use without moving anything.
    ///
    /// # Errors
    /// [`TierError::Unknown`].
    pub fn touch(&mut self, key: &K) -> Result<(), TierError> {
        self.clock += 1;
        self.items.get_mut(key).ok_or(TierError::Unknown)?.last_used = self.clock;
        Ok(())
    }

    /// Takes up a new item that is to be put into `tier`: the moves that make room for it, then its own.
    ///
    /// # Errors
    /// [`TierError::Exists`], [`TierError::Full`].
    pub fn admit(
        &mut self,
        key: &K,
        kind: StateKind,
        bytes: u64,
        tier: Tier,
    ) -> Result<Vec<Move<K>>, TierError> {
        if self.items.contains_key(key) {
            return Err(TierError::Exists);
        }
        self.clock += 1;
        let last_used = self.clock;
        let item = Item { kind, bytes, tier: None, target: None, begun: false, pins: 0, last_used };
        self.items.insert(key.clone(), item);
        self.plan(&[(key.clone(), tier)]).inspect_err(|_| {
            self.items.remove(key);
        })
    }

    /// Makes room for `bytes` in `tier`, for what is admitted next: the moves that do it.
    ///
    /// # Errors
    /// [`TierError::Full`].
    pub fn make_way(&mut self, tier: Tier, bytes: u64) -> Result<Vec<Move<K>>, TierError> {
        let settled = self.settled;
        let mut moves = Vec::new();
        let result = self.make_room(tier, bytes, &mut moves);
        self.keep_plan(result, moves, settled)
    }

    /// Uses items at `tier`, as a restore does: the moves that bring there all that the policy promotes, after those that
    /// make room. None of the items leaves for another of them.
    ///
    /// # Errors
    /// [`TierError::Unknown`], [`TierError::Moving`], [`TierError::Full`].
    pub fn bring(&mut self, keys: &[K], tier: Tier) -> Result<Vec<Move<K>>, TierError> {
        let mut wanted = Vec::new();
        for key in keys {
            let item = self.items.get(key).ok_or(TierError::Unknown)?;
            let (None, Some(at)) = (item.target, item.tier) else { return Err(TierError::Moving) };
            let candidate =
                Candidate { key, kind: item.kind, bytes: item.bytes, last_used: item.last_used };
            let to = self.policy.promotion(candidate, at, tier);
            if to != at && !wanted.iter().any(|(other, _)| other == key) {
                wanted.push((key.clone(), to));
            }
        }
        // All of them stay while the plan is made, also those that need not move; the owner pins them for as long as it
        // reads them.
        keys.iter().try_for_each(|key| self.pin(key))?;
        let plan = self.plan(&wanted);
        keys.iter().try_for_each(|key| self.unpin(key))?;
        let plan = plan?;
        keys.iter().try_for_each(|key| self.touch(key))?;
        Ok(plan)
    }

    /// Moves one item explicitly, up or down.
    ///
    /// # Errors
    /// As [`bring`](Self::bring).
    pub fn place(&mut self, key: &K, tier: Tier) -> Result<Vec<Move<K>>, TierError> {
        let item = self.items.get(key).ok_or(TierError::Unknown)?;
        match (item.target, item.tier) {
            (None, Some(at)) if at == tier => Ok(Vec::new()),
            (None, Some(_)) => self.plan(&[(key.clone(), tier)]),
            _ => Err(TierError::Moving),
        }
    }

    /// Forgets an item, and gives its bytes back.
    ///
    /// # Errors
    /// [`TierError::Unknown`]; [`TierError::Moving`].
    pub fn remove(&mut self, key: &K) -> Result<(), TierError> {
        let item = self.items.get(key).ok_or(TierError::Unknown)?;
        let (None, Some(tier)) = (item.target, item.tier) else { return Err(TierError::Moving) };
        *self.resident[tier.index()].of(item.kind) -= item.bytes;
        *self.settled[tier.index()].of(item.kind) -= item.bytes;
        self.items.remove(key);
        Ok(())
    }

    /// Plans these moves and those that make room for them, all or none.
    fn plan(&mut self, wanted: &[(K, Tier)]) -> Result<Vec<Move<K>>, TierError> {
        let settled = self.settled;
        let mut moves: Vec<Move<K>> = Vec::new();
        // Making room for an item must not send it away itself.
        wanted.iter().try_for_each(|(key, _)| self.pin(key))?;
        let result = wanted.iter().try_for_each(|(key, tier)| {
            let bytes = self.items[key].bytes;
            self.make_room(*tier, bytes, &mut moves)?;
            self.plan_move(key, *tier, &mut moves);
            Ok(())
        });
        wanted.iter().try_for_each(|(key, _)| self.unpin(key))?;
        self.keep_plan(result, moves, settled)
    }

    /// The moves of a plan; if it failed, none of them.
    fn keep_plan(
        &mut self,
        result: Result<(), TierError>,
        moves: Vec<Move<K>>,
        settled: [Usage; 3],
    ) -> Result<Vec<Move<K>>, TierError> {
        if let Err(error) = result {
            self.settled = settled;
            for step in moves {
                if let Some(item) = self.items.get_mut(&step.key) {
                    item.target = None;
                }
            }
            return Err(error);
        }
        Ok(moves)
    }

    fn plan_move(&mut self, key: &K, to: Tier, moves: &mut Vec<Move<K>>) {
        let Some(item) = self.items.get_mut(key) else { return };
        item.target = Some(to);
        let (kind, bytes, from) = (item.kind, item.bytes, item.tier);
        if let Some(from) = from {
            *self.settled[from.index()].of(kind) -= bytes;
        }
        *self.settled[to.index()].of(kind) += bytes;
        moves.push(Move { key: key.clone(), kind, bytes, from, to });
    }

    /// Plans demotions until `bytes` fit, lower tiers first.
    fn make_room(
        &mut self,
        tier: Tier,
        wanted: u64,
        moves: &mut Vec<Move<K>>,
    ) -> Result<(), TierError> {
        let budget = self.budgets.of(tier);
        loop {
            let used = self.settled[tier.index()].total();
            if used.saturating_add(wanted) <= budget {
                return Ok(());
            }
            let full = TierError::Full { tier, wanted, used, budget };
            if wanted > budget {
                return Err(full);
            }
            let mut candidates = self
                .items
                .iter()
                .filter(|(_, item)| {
                    item.tier == Some(tier) && item.target.is_none() && item.pins == 0
                })
                .map(|(key, item)| Candidate {
                    key,
                    kind: item.kind,
                    bytes: item.bytes,
                    last_used: item.last_used,
                })
                .peekable();
            if candidates.peek().is_none() {
                return Err(full);
            }
            let Some(victim) = self.policy.victim(tier, wanted, &mut candidates) else {
                return Err(full);
            };
            let bytes = match self.items.get(&victim) {
                Some(item) if item.tier == Some(tier) && item.target.is_none() => item.bytes,
                // A policy that chooses what it was not offered chooses nothing.
                _ => return Err(full),
            };
            let lower = Tier::ALL
                .into_iter()
                .filter(|lower| *lower > tier)
                .find(|lower| self.budgets.of(*lower) >= bytes)
                .ok_or(full)?;
            self.make_room(lower, bytes, moves)?;
            self.plan_move(&victim, lower, moves);
        }
    }

    /// Reserves a move's bytes at its target; the copy may begin.
    ///
    /// # Errors
    /// [`TierError::NotYet`] when the moves before it are not finished; [`TierError::Unknown`] for a move that is not
    /// planned.
    pub fn begin(&mut self, step: &Move<K>) -> Result<(), TierError> {
        let item = self.items.get_mut(&step.key).ok_or(TierError::Unknown)?;
        if item.target != Some(step.to) || item.begun {
            return Err(TierError::Unknown);
        }
        let there = &mut self.resident[step.to.index()];
        if there.total().saturating_add(item.bytes) > self.budgets.of(step.to) {
            return Err(TierError::NotYet { tier: step.to, bytes: item.bytes });
        }
        *there.of(item.kind) += item.bytes;
        item.begun = true;
        Ok(())
    }

    /// A move is done: the item lies at the target, the bytes at the source are free.
    pub fn finish(&mut self, step: &Move<K>) {
        if let Some(item) = self.items.get_mut(&step.key).filter(|item| item.begun) {
            if let Some(from) = item.tier {
                *self.resident[from.index()].of(item.kind) -= item.bytes;
            }
            item.tier = item.target.take();
            item.begun = false;
        }
    }

    /// A move failed or will not be made: the item stays where it was, and one that was new is forgotten.
    ///
    /// Call it for the moves of the plan that were not made either, last first.
    pub fn cancel(&mut self, step: &Move<K>) {
        let Some(item) = self.items.get_mut(&step.key) else { return };
        let Some(to) = item.target.take() else { return };
        if std::mem::take(&mut item.begun) {
            *self.resident[to.index()].of(item.kind) -= item.bytes;
        }
        *self.settled[to.index()].of(item.kind) -= item.bytes;
        match item.tier {
            Some(from) => *self.settled[from.index()].of(item.kind) += item.bytes,
            None => {
                self.items.remove(&step.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carry_out(tiers: &mut Tiers<u32, LeastRecentlyUsed>, plan: &[Move<u32>]) {
        for step in plan {
            tiers.begin(step).unwrap();
            tiers.finish(step);
        }
    }

    fn budgets(device: u64, host: u64, disk: u64) -> Budgets {
        Budgets { device, host, disk }
    }

    #[test]
    fn demotion_goes_down_step_by_step_and_use_promotes() {
        let mut tiers = Tiers::new(budgets(100, 100, 1000), LeastRecentlyUsed);
        for key in 0..3 {
            let plan = tiers.admit(&key, StateKind::Rows, 60, Tier::Device).unwrap();
            carry_out(&mut tiers, &plan);
        }
        let at = |t: &Tiers<u32, _>, k| t.tier_of(&k).unwrap();
        assert_eq!([0, 1, 2].map(|k| at(&tiers, k)), [Tier::Disk, Tier::Host, Tier::Device]);
        let plan = tiers.bring(&[0], Tier::Device).unwrap();
        assert_eq!(
            plan.last().map(|step| (step.key, step.from, step.to)),
            Some((0, Some(Tier::Disk), Tier::Device))
        );
        carry_out(&mut tiers, &plan);
        assert_eq!([0, 1, 2].map(|k| at(&tiers, k)), [Tier::Device, Tier::Disk, Tier::Host]);
        assert!(tiers.bring(&[0], Tier::Device).unwrap().is_empty());
    }

    #[test]
    fn pins_hold_and_a_full_tier_says_so() {
        let mut tiers = Tiers::new(budgets(100, 0, 50), LeastRecentlyUsed);
        let plan = tiers.admit(&1, StateKind::Fixed, 80, Tier::Device).unwrap();
        carry_out(&mut tiers, &plan);
        tiers.pin(&1).unwrap();
        let error = tiers.admit(&2, StateKind::Rows, 30, Tier::Device).unwrap_err();
        assert!(matches!(error, TierError::Full { tier: Tier::Device, used: 80, .. }), "{error}");
        tiers.unpin(&1).unwrap();
        // It may leave, but there is nowhere to go.
        assert!(tiers.admit(&2, StateKind::Rows, 30, Tier::Device).is_err());
        assert_eq!(tiers.tier_of(&2), None);
        assert_eq!(tiers.usage(Tier::Device), Usage { fixed: 80, rows: 0 });
        let plan = tiers.admit(&2, StateKind::Rows, 20, Tier::Device).unwrap();
        carry_out(&mut tiers, &plan);
        assert_eq!(tiers.usage(Tier::Device), Usage { fixed: 80, rows: 20 });
    }

    #[test]
    fn what_is_brought_together_does_not_push_itself_out() {
        let mut tiers = Tiers::new(budgets(100, 1000, 1000), LeastRecentlyUsed);
        for key in 0..4 {
            let plan = tiers.admit(&key, StateKind::Rows, 40, Tier::Host).unwrap();
            carry_out(&mut tiers, &plan);
        }
        let plan = tiers.bring(&[0, 1], Tier::Device).unwrap();
        carry_out(&mut tiers, &plan);
        assert!(matches!(tiers.bring(&[0, 1, 2], Tier::Device), Err(TierError::Full { .. })));
        let plan = tiers.bring(&[2, 0], Tier::Device).unwrap();
        assert_eq!(plan[0].key, 1);
        carry_out(&mut tiers, &plan);
    }

    #[test]
    fn moves_are_made_in_their_order() {
        let mut tiers = Tiers::new(budgets(100, 100, 1000), LeastRecentlyUsed);
        let plan = tiers.admit(&1, StateKind::Rows, 60, Tier::Device).unwrap();
        carry_out(&mut tiers, &plan);
        let plan = tiers.admit(&2, StateKind::Rows, 60, Tier::Device).unwrap();
        assert_eq!(plan.len(), 2);
        assert!(matches!(tiers.begin(&plan[1]), Err(TierError::NotYet { .. })));
        // Another plan cannot have the space that is being made.
        assert!(matches!(
            tiers.admit(&3, StateKind::Rows, 50, Tier::Device),
            Err(TierError::Full { .. })
        ));
        tiers.begin(&plan[0]).unwrap();
        assert_eq!(tiers.usage(Tier::Host).rows, 60);
        assert_eq!(tiers.usage(Tier::Device).rows, 60);
        tiers.finish(&plan[0]);
        tiers.begin(&plan[1]).unwrap();
        tiers.cancel(&plan[1]);
        assert_eq!(tiers.usage(Tier::Device).rows, 0);
        assert_eq!(tiers.tier_of(&2), None);
    }

    /// A policy of somebody else's: never demotes fixed state, never promotes past the host.
    struct KeepFixed;

    impl Policy<u32> for KeepFixed {
        fn victim(
            &mut self,
            _: Tier,
            _: u64,
            candidates: &mut dyn Iterator<Item = Candidate<'_, u32>>,
        ) -> Option<u32> {
            candidates.filter(|c| c.kind == StateKind::Rows).max_by_key(|c| c.bytes).map(|c| *c.key)
        }

        fn promotion(&mut self, _: Candidate<'_, u32>, at: Tier, wanted: Tier) -> Tier {
            wanted.max(Tier::Host).min(at)
        }
    }

    #[test]
    fn the_policy_can_be_replaced() {
        let mut tiers = Tiers::new(budgets(100, 100, 1000), KeepFixed);
        for (key, kind, bytes) in
            [(0, StateKind::Fixed, 50), (1, StateKind::Rows, 20), (2, StateKind::Rows, 30)]
        {
            for step in tiers.admit(&key, kind, bytes, Tier::Device).unwrap() {
                tiers.begin(&step).unwrap();
                tiers.finish(&step);
            }
        }
        let plan = tiers.admit(&3, StateKind::Rows, 10, Tier::Device).unwrap();
        assert_eq!(plan[0].key, 2);
        for step in &plan {
            tiers.begin(step).unwrap();
            tiers.finish(step);
        }
        assert!(tiers.bring(&[2], Tier::Device).unwrap().is_empty());
    }

    #[test]
    fn a_hundred_thousand_random_operations_keep_the_books() {
        let mut x = 0x1234_5678_9abc_def1_u64;
        let mut draw = move |n: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x % n
        };
        let budgets = budgets(500, 900, 3000);
        let mut tiers: Tiers<u32, LeastRecentlyUsed> = Tiers::new(budgets, LeastRecentlyUsed);
        let mut open: Vec<Vec<Move<u32>>> = Vec::new();
        let (mut moved, mut refused) = (0, 0);
        for _ in 0..100_000 {
            let key = draw(60) as u32;
            let tier = Tier::ALL[draw(3) as usize];
            let kind = if draw(2) == 0 { StateKind::Fixed } else { StateKind::Rows };
            let plan = match draw(9) {
                0 | 1 => tiers.admit(&key, kind, 1 + draw(120), tier),
                2 | 3 => tiers.bring(&[key, draw(60) as u32], tier),
                4 => tiers.place(&key, tier),
                5 => tiers.remove(&key).map(|()| Vec::new()),
                6 => tiers.pin(&key).map(|()| Vec::new()),
                _ => tiers.unpin(&key).map(|()| Vec::new()),
            };
            match plan {
                Ok(plan) if !plan.is_empty() => open.push(plan),
                Ok(_) => {}
                Err(_) => refused += 1,
            }
            while open.len() > draw(3) as usize {
                // Plans are carried out in any order among each other; one that must wait, waits.
                let at = draw(open.len() as u64) as usize;
                let mut plan = open.swap_remove(at);
                if draw(10) == 0 {
                    plan.iter().rev().for_each(|step| tiers.cancel(step));
                    continue;
                }
                while let Some(step) = plan.first().cloned() {
                    if tiers.begin(&step).is_err() {
                        break;
                    }
                    for tier in Tier::ALL {
                        assert!(tiers.usage(tier).total() <= budgets.of(tier), "over the budget");
                    }
                    tiers.finish(&step);
                    plan.remove(0);
                    moved += 1;
                }
                if !plan.is_empty() {
                    open.push(plan);
                    break;
                }
            }
            for tier in Tier::ALL {
                let mut sum = Usage::default();
                for item in tiers.items.values().filter(|item| item.tier == Some(tier)) {
                    *sum.of(item.kind) += item.bytes;
                }
                assert_eq!(sum, tiers.usage(tier));
            }
        }
        assert!(moved > 10_000 && refused > 1000, "{moved} moved, {refused} refused");
    }
}
