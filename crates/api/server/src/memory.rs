//! The memory of capsules: what moves to a slower one, and what goes, when something needs room.

use ampoule::store::tiers::{Tier, TierError};
use ampoule::{BackendError, CacheError, Capsule, EngineError, Residence, SlotId};

use crate::error::{ApiError, ApiResult};
use crate::worker::Worker;

/// Demotions on end that may fail to make room before something is dropped.
const DEMOTIONS: u32 = 16;

/// What may be dropped for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relief {
    /// Places within replies that nobody is likely to cut any more, and what the store has and nobody used lately.
    Idle,
    /// Places within replies.
    Waypoints,
    /// Whatever can be had again.
    Any,
}

impl Worker {
    /// A boundary, with old ones dropped for it if need be; `None` if there is no room at all.
    pub(crate) fn snapshot(&mut self, slot: SlotId) -> ApiResult<Option<Capsule>> {
        let made = self.make_room(|worker| {
            worker.tiers.snapshot(&mut worker.model, slot, false)?;
            // The same one, for whoever wants it: the tiers let it go when nobody has it any more.
            Ok(worker.model.engine.snapshot(slot)?)
        })?;
        match &made {
            Some(_) => self.metrics.snapshots.add(1),
            None => tracing::warn!("no room for a boundary; give more memory for capsules"),
        }
        Ok(made)
    }

    /// Puts a capsule into a slot, from whatever memory it lies in; what is used comes to the fastest.
    pub(crate) fn restore(&mut self, slot: SlotId, capsule: &Capsule) -> ApiResult<()> {
        let bytes = (capsule.fixed_bytes() + capsule.row_bytes()) as u64;
        if bytes > self.tiers.budgets().device {
            // More than fits at once, whatever is dropped: from where it lies, and nothing goes for it.
            let restore = |worker: &mut Self| Ok(worker.model.engine.restore(slot, capsule)?);
            return self.make_room_by(restore, |_| false)?.ok_or_else(ApiError::no_room);
        }
        let restored = self.make_room(|worker| {
            let key = worker.tiers.insert(&mut worker.model, capsule, false)?;
            worker.tiers.restore(&mut worker.model, key, slot)
        })?;
        match restored {
            Some(()) => Ok(()),
            None => Ok(self.model.engine.restore(slot, capsule)?),
        }
    }

    /// Makes a capsule of bytes, with old boundaries dropped for it if need be.
    ///
    /// # Errors
    /// 507 if there is no room at all; otherwise what `work` says.
    pub(crate) fn load(
        &mut self,
        work: impl FnMut(&mut Self) -> Result<Capsule, ampoule::Error>,
    ) -> ApiResult<Capsule> {
        let capsule = self.make_room(work)?.ok_or_else(ApiError::no_room)?;
        if let Err(error) = self.tiers.insert(&mut self.model, &capsule, false) {
            // It is usable all the same, but stays where it is until it is used.
            tracing::warn!(%error, "a capsule is in no tier");
        }
        Ok(capsule)
    }

    /// Gives the memory of capsules back that nobody holds any more; whether there were any.
    pub(crate) fn drop_unheld(&mut self) -> bool {
        match self.tiers.drop_unheld(&mut self.model) {
            Ok(count) => count > 0,
            Err(error) => {
                tracing::error!(%error, "capsules were not let go");
                false
            }
        }
    }

    /// Runs what takes memory for capsules, with boundaries dropped for it that nobody asked for; `None` if that is not enough.
    pub(crate) fn room_from_cache<T>(
        &mut self,
        work: impl FnMut(&mut Self) -> Result<T, ampoule::Error>,
    ) -> ApiResult<Option<T>> {
        self.make_room_by(work, |worker| {
            (worker.relieve)(Relief::Idle) || (!worker.is_crowded() && worker.cache.evict())
        })
    }

    fn make_room<T>(
        &mut self,
        work: impl FnMut(&mut Self) -> Result<T, ampoule::Error>,
    ) -> ApiResult<Option<T>> {
        self.make_room_by(work, |worker| {
            (worker.relieve)(Relief::Idle)
                || (worker.is_crowded() && worker.drop_waypoints())
                || worker.cache.evict()
                || worker.drop_waypoints()
                || (worker.relieve)(Relief::Any)
        })
    }

    fn make_room_by<T>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, ampoule::Error>,
        mut drop_one: impl FnMut(&mut Self) -> bool,
    ) -> ApiResult<Option<T>> {
        // What a demotion sends away the work may bring back: so many without success, and something is dropped.
        let mut demotions = 0;
        loop {
            match work(self) {
                Ok(made) => return Ok(Some(made)),
                Err(error) if lacks_room(&error) => {
                    if self.drop_unheld() {
                        continue;
                    }
                    demotions += 1;
                    if demotions <= DEMOTIONS && self.demote(&error) {
                        continue;
                    }
                    demotions = 0;
                    if !drop_one(self) {
                        return Ok(None);
                    }
                    self.drop_unheld();
                    self.metrics.evictions.add(1);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives up the places within replies: those of a session, or, where no session has any, those of the slots.
    fn drop_waypoints(&mut self) -> bool {
        (self.relieve)(Relief::Waypoints) || self.model.engine.forget_waypoints() > 0
    }

    /// Whether most of a device's memory is in use by what the tiers do not count: places within replies. Dropping boundaries
    /// that lie in the host's memory would not help then.
    fn is_crowded(&self) -> bool {
        let (own, budget) = (self.tiers.usage(Tier::Device).total(), self.tiers.budgets().device);
        self.model.engine.residence() == Residence::Device && own < budget / 2
    }

    /// Moves state to a slower memory, where the fastest is used by more than capsules; false where there is none.
    fn demote(&mut self, error: &ampoule::Error) -> bool {
        let ampoule::Error::Engine(EngineError::Backend(BackendError::CapsuleBudget {
            wanted,
            ..
        })) = error
        else {
            return false;
        };
        self.tiers.make_way(&mut self.model, *wanted as u64).is_ok()
    }
}

/// Whether something failed for want of memory for capsules.
pub(crate) const fn lacks_room(error: &ampoule::Error) -> bool {
    matches!(
        error,
        ampoule::Error::Engine(EngineError::Backend(
            BackendError::CapsuleBudget { .. } | BackendError::OutOfMemory { .. },
        )) | ampoule::Error::Cache(CacheError::Tier(TierError::Full { .. }))
    )
}
