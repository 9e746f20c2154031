//! Rollbacks on the engine's thread: a token at a time between the tokens of replies under way, so that nobody waits for a
//! whole one. And the waypoints that replies leave behind, from which rollbacks into them start.

use std::collections::VecDeque;

use ampoule::{Capsule, Rollback, SlotId, Waypoints};

use crate::error::{ApiError, ApiResult};
use crate::worker::Worker;

/// Tokens of a reply between waypoints; more where it is longer than `MOST` times that.
const SPACING: usize = 32;
const MOST: usize = 16;

/// Tokens between waypoints where the reply is being written: of a client that goes away the last few did not arrive.
const FINE: usize = 8;

/// Whether the waypoint after `n` tokens of a reply stays while it has `said` tokens.
fn stays(n: usize, said: usize) -> bool {
    let mut spacing = SPACING;
    while said / spacing > MOST {
        spacing *= 2;
    }
    n.is_multiple_of(spacing) || said - n < SPACING
}

/// A place that a session was brought back to.
pub(crate) struct Cut {
    pub capsule: Capsule,
    pub waypoints: Option<Waypoints>,
    /// Tokens that had to be read again.
    pub replayed: u32,
}

/// Told where a rollback has ended.
pub(crate) type Then = Box<dyn FnOnce(ApiResult<Cut>) + Send>;

/// Tells whether whoever asked for a rollback has gone.
pub(crate) type Gone = Box<dyn Fn() -> bool + Send>;

/// A rollback that waits for a slot.
struct Wish {
    from: Capsule,
    position: u32,
    gone: Gone,
    then: Then,
}

/// A rollback under way.
struct Rewind {
    slot: SlotId,
    /// Whether the slot is the one that replies may not take.
    spared: bool,
    rollback: Rollback,
    replayed: u32,
    gone: Gone,
    then: Then,
}

/// All rollbacks there are.
#[derive(Default)]
pub(crate) struct Rewinds {
    waiting: VecDeque<Wish>,
    running: VecDeque<Rewind>,
}

impl Rewinds {
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Those that will not be carried out.
    pub(crate) fn give_up(&mut self) {
        let waiting = self.waiting.drain(..).map(|wish| wish.then);
        for then in waiting.chain(self.running.drain(..).map(|rewind| rewind.then)) {
            then(Err(ApiError::stopping()));
        }
    }
}

impl Worker {
    /// Notes a place that the reply under way in a slot can be cut at, if it is time for one.
    pub(crate) fn waypoint(&mut self, slot: SlotId, said: usize) -> ApiResult<()> {
        if said == 0 || !said.is_multiple_of(FINE) {
            return Ok(());
        }
        let start = self.model.engine.position(slot)? as usize - said;
        self.model.engine.keep_waypoints(slot, |at| stays(at as usize - start, said))?;
        // Without it a cut reads more again, no more than that: only boundaries that nobody asked for go for it.
        self.room_from_cache(|worker| Ok(worker.model.engine.add_waypoint(slot)?))?;
        Ok(())
    }

    /// Brings a state back to an earlier position of its branch; `then` gets the boundary there.
    pub(crate) fn rewind(&mut self, from: Capsule, position: u32, gone: Gone, then: Then) {
        self.rewinds.waiting.push_back(Wish { from, position, gone, then });
    }

    /// As [`Worker::rewind`] from where a slot stands; the slot is given back afterwards.
    pub(crate) fn rewind_slot(&mut self, slot: SlotId, position: u32, then: Then) {
        // The session wants it whether or not its client is there.
        self.begin_rewind(slot, false, None, position, Box::new(|| false), then);
    }

    fn begin_rewind(
        &mut self,
        slot: SlotId,
        spared: bool,
        from: Option<&Capsule>,
        position: u32,
        gone: Gone,
        then: Then,
    ) {
        let begun = self.guard(|worker| {
            if let Some(from) = from {
                worker.restore(slot, from)?;
            }
            Ok(worker.model.engine.begin_rollback(slot, position)?)
        });
        match begun {
            Ok(rollback) => {
                let rewind = Rewind { slot, spared, rollback, replayed: 0, gone, then };
                self.rewinds.running.push_back(rewind);
            }
            Err(error) => self.end_rewind(slot, spared, Err(error), then),
        }
    }

    /// Gives rollbacks that wait the slots that there are: that of the native API, or a free one that holds the rows.
    /// Where replies wait, the former alone: they must not wait for rollbacks.
    pub(crate) fn admit_rewinds(&mut self) {
        self.rewinds.waiting.retain(|wish| !(wish.gone)());
        while let Some(wish) = self.rewinds.waiting.front() {
            let from = wish.from.clone();
            let free = if self.do_replies_wait() { None } else { self.slot_for(Some(&from)) };
            let spared = free.is_none();
            let Some(slot) = free.or_else(|| self.take_spare()) else { return };
            let Some(wish) = self.rewinds.waiting.pop_front() else { return };
            self.begin_rewind(slot, spared, Some(&from), wish.position, wish.gone, wish.then);
        }
    }

    /// Takes the rollback that was not served for longest one step on: a token or a chunk of a prompt.
    pub(crate) fn advance_rewinds(&mut self) {
        let running = std::mem::take(&mut self.rewinds.running);
        let (left, running): (Vec<_>, Vec<_>) = running.into_iter().partition(|r| (r.gone)());
        for rewind in left {
            let gone = Err(ApiError::conflict("whoever asked for this has gone"));
            self.end_rewind(rewind.slot, rewind.spared, gone, rewind.then);
        }
        self.rewinds.running = running.into();
        let Some(mut rewind) = self.rewinds.running.pop_front() else { return };
        let before = rewind.rollback.left();
        let more = self.guard(|worker| Ok(worker.model.engine.advance(&mut rewind.rollback)?));
        let read = before - rewind.rollback.left();
        rewind.replayed += read;
        self.metrics.replayed_tokens.add(u64::from(read));
        match more {
            Ok(true) => self.rewinds.running.push_back(rewind),
            Ok(false) => {
                let (slot, replayed) = (rewind.slot, rewind.replayed);
                let cut = self.guard(|worker| worker.cut(slot, replayed));
                self.end_rewind(slot, rewind.spared, cut, rewind.then);
            }
            Err(error) => self.end_rewind(rewind.slot, rewind.spared, Err(error), rewind.then),
        }
    }

    /// The boundary where a slot stands.
    pub(crate) fn cut(&mut self, slot: SlotId, replayed: u32) -> ApiResult<Cut> {
        let capsule = self.snapshot(slot)?.ok_or_else(ApiError::no_room)?;
        let waypoints = self.model.engine.waypoints(slot)?;
        Ok(Cut { capsule, waypoints, replayed })
    }

    fn end_rewind(&mut self, slot: SlotId, spared: bool, cut: ApiResult<Cut>, then: Then) {
        self.release(slot, cut.as_ref().is_err_and(|e| e.status.is_server_error()));
        if spared {
            self.spare_last();
        }
        self.tell(|| then(cut));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waypoints_are_few_and_near_any_place_that_a_reply_may_be_cut_at() {
        let mut held: Vec<usize> = Vec::new();
        for said in 1..=20_000_usize {
            if said.is_multiple_of(FINE) {
                held.retain(|n| stays(*n, said));
                held.push(said);
            }
            assert!(held.len() <= MOST + SPACING / FINE + 1, "{said}: {held:?}");
            let spacing = SPACING.max((said / (MOST / 2)).next_power_of_two());
            let mut last = 0;
            for at in held.iter().copied().chain([said + 1]) {
                assert!(at - last <= spacing.max(FINE), "{said}: {last} to {at}");
                last = at;
            }
            assert!(said - held.last().copied().unwrap_or(0) < FINE);
            assert!(said > 512 || held.windows(2).all(|w| w[1] - w[0] <= SPACING));
        }
    }
}
