//! Rollback, at once or step by step, and the waypoints that make it short.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

use ampoule_backend::SlotId;
use ampoule_capsule::{History, Origin};

use crate::EngineError;
use crate::engine::{Engine, Slot};
use crate::lineage::{Boundary, RowNode};
use crate::piece::{Piece, PieceKind};
use crate::sampling::Stamped;

/// The fixed state at a place between two boundaries. The rows up to it are those of the slot, or of the node that it lies
/// in.
#[derive(Clone)]
pub(crate) struct Waypoint {
    position: u32,
    /// Sampler events since the boundary before that it has in it.
    events: usize,
    fixed: Arc<Piece>,
}

/// Holds the waypoints of what a snapshot froze: as long as somebody does, rollbacks use them.
#[derive(Clone)]
pub struct Waypoints(Arc<Vec<Waypoint>>);

impl Waypoints {
    pub(crate) fn of(all: Vec<Waypoint>) -> Self {
        Self(Arc::new(all))
    }

    pub(crate) fn downgrade(&self) -> Weak<Vec<Waypoint>> {
        Arc::downgrade(&self.0)
    }

    /// Where they are, ascending.
    pub fn positions(&self) -> Vec<u32> {
        self.0.iter().map(|w| w.position).collect()
    }

    /// Bytes of memory for capsules that they take.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|w| w.fixed.bytes()).sum()
    }
}

impl std::fmt::Debug for Waypoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Waypoints").field(&self.positions()).finish()
    }
}

/// A rollback under way, from [`Engine::begin_rollback`]. Between two steps the slot stands at an earlier position of its
/// branch; if the rollback is given up it stays there.
#[derive(Debug)]
#[must_use = "a rollback that is not advanced to its end leaves the slot before the position asked for"]
pub struct Rollback {
    slot: SlotId,
    /// Where the tokens begin.
    start: u32,
    at: u32,
    to: u32,
    tokens: Vec<u32>,
    events: VecDeque<Stamped>,
    history: History,
}

impl Rollback {
    /// Tokens that are still to be read again.
    pub const fn left(&self) -> u32 {
        self.to - self.at
    }
}

/// What a rollback starts from.
enum Place {
    Start,
    Boundary(Arc<Boundary>),
    /// One of a node's waypoints.
    Node(Arc<RowNode>, Arc<Vec<Waypoint>>, usize),
    /// One of the slot's own.
    Tail(usize),
}

impl Place {
    /// The position, and how many events after the boundary before are in it.
    fn stands(&self, slot: &Slot) -> (u32, usize) {
        let at = |waypoint: &Waypoint| (waypoint.position, waypoint.events);
        match self {
            Self::Start => (0, 0),
            Self::Boundary(boundary) => (boundary.node.end(), 0),
            Self::Node(_, all, index) => at(&all[*index]),
            Self::Tail(index) => at(&slot.waypoints[*index]),
        }
    }
}

fn last_before(all: &[Waypoint], position: u32) -> Option<usize> {
    all.iter().rposition(|w| w.position <= position)
}

impl Engine {
    /// Notes the place where the slot stands as one that a rollback can start from: the fixed state is copied, no row is.
    /// A snapshot hands the slot's waypoints on ([`Engine::waypoints`]); a restore or reset drops them.
    ///
    /// At a boundary there is nothing to note. Returns whether there is a new waypoint.
    ///
    /// # Errors
    /// If the budget for capsules is used up or the device fails; where it is the budget, the slot goes on as it was.
    pub fn add_waypoint(&mut self, slot: SlotId) -> Result<bool, EngineError> {
        let entry = self.slot(slot)?;
        if entry.tainted {
            return Err(EngineError::Tainted { slot: slot.0 });
        }
        let (position, events) = (entry.position(), entry.events.len());
        let known =
            entry.waypoints.last().is_some_and(|w| (w.position, w.events) == (position, events));
        if entry.tail.is_empty() || known {
            return Ok(false);
        }
        let fixed = self.program.freeze(slot, self.state.fixed());
        let fixed = Piece::new(PieceKind::Fixed, position, self.survive(slot, fixed)?);
        self.slot_mut(slot)?.waypoints.push(Waypoint { position, events, fixed });
        Ok(true)
    }

    /// Drops the slot's waypoints since its last boundary but those whose position `keep` holds for.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn keep_waypoints(
        &mut self,
        slot: SlotId,
        mut keep: impl FnMut(u32) -> bool,
    ) -> Result<(), EngineError> {
        self.slot_mut(slot)?.waypoints.retain(|w| keep(w.position));
        Ok(())
    }

    /// Drops the waypoints of all slots, for the memory that they take; returns how many there were. Those that somebody
    /// else [holds](Waypoints) stay.
    pub fn forget_waypoints(&mut self) -> usize {
        let forget = |slot: &mut Slot| {
            let passed = slot.passed.take().map_or(0, |passed| passed.0.len());
            std::mem::take(&mut slot.waypoints).len() + passed
        };
        self.slots.values_mut().map(forget).sum()
    }

    /// The waypoints that the slot's last snapshot froze with its rows; `None` where nothing was frozen since it was
    /// restored or reset. They go when the slot is used otherwise, unless somebody holds them.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn waypoints(&mut self, slot: SlotId) -> Result<Option<Waypoints>, EngineError> {
        Ok(self.slot_mut(slot)?.passed.take())
    }

    /// Returns a slot to an earlier position of its own branch: the state as it was when the slot last stood there.
    ///
    /// The nearest earlier boundary or waypoint that somebody still holds is restored, and the known tokens after it are
    /// read again as they were read the first time, by prefill or by decode; so the bytes are the same. From a boundary
    /// at `position` itself it costs the fixed state only.
    ///
    /// Settings made at `position` itself (a `begin_reply`, say) are part of that state.
    ///
    /// # Errors
    /// If `position` is ahead, or behind an imported boundary whose file has no journal, nothing changes. If the device
    /// fails the slot is empty and says so.
    pub fn rollback(&mut self, slot: SlotId, position: u32) -> Result<(), EngineError> {
        let mut rollback = self.begin_rollback(slot, position)?;
        while self.advance(&mut rollback)? {}
        Ok(())
    }

    /// As [`Engine::rollback`], but reads nothing yet: [`Engine::advance`] does, until it says that it is done. Other slots
    /// can be used meanwhile.
    ///
    /// # Errors
    /// As [`Engine::rollback`].
    pub fn begin_rollback(&mut self, slot: SlotId, position: u32) -> Result<Rollback, EngineError> {
        let entry = self.slot(slot)?;
        let here = entry.position();
        if entry.tainted {
            return Err(EngineError::Tainted { slot: slot.0 });
        }
        if position > here {
            return Err(EngineError::RollbackAhead {
                slot: slot.0,
                position: here,
                wanted: position,
            });
        }
        let (place, after) = find(entry, position);
        if let Some(node) = after.iter().find(|n| n.events.is_none()) {
            return Err(EngineError::NoJournal { position: node.end(), wanted: position });
        }
        // First of all: a device copies while the rest is looked up.
        let held = match &place {
            Place::Boundary(boundary) => self.thaw_path(slot, &boundary.node, &boundary.fixed)?,
            _ => Vec::new(),
        };
        let entry = self.slot(slot)?;
        let (start, skip) = place.stands(entry);
        let tokens: Vec<u32> = after
            .iter()
            .flat_map(|n| n.tokens.iter().copied())
            .chain(entry.tail.iter().copied())
            .collect();
        let first = here - tokens.len() as u32;
        let tokens = tokens[(start - first) as usize..(position - first) as usize].to_vec();
        let events = after.iter().flat_map(|n| n.events.iter().flatten()).chain(&entry.events);
        let events = events.skip(skip).filter(|e| e.position <= position).cloned().collect();
        let mut history = entry.history.clone();
        history.truncate(position);
        let base = entry.base.clone();
        match place {
            Place::Start => self.reset(slot)?,
            Place::Boundary(boundary) => {
                *self.slot_mut(slot)? = Slot {
                    chain: Some(Arc::clone(&boundary.node)),
                    history: boundary.node.history.clone(),
                    held,
                    // What the slot was restored from stays its base while it stands behind it.
                    base: base.or(Some(boundary)),
                    ..Slot::new()
                };
            }
            Place::Node(node, all, index) => {
                let Waypoint { position: at, events, fixed } = &all[index];
                let held = self.thaw_path(slot, &node, fixed)?;
                let mut short = node.history.clone();
                short.truncate(*at);
                let entry = self.slots.get_mut(&slot);
                *entry.ok_or(EngineError::NoSuchSlot { slot: slot.0 })? = Slot {
                    chain: node.parent.clone(),
                    tail: node.tokens[..(at - node.start) as usize].to_vec(),
                    history: short,
                    events: node.events.iter().flatten().take(*events).cloned().collect(),
                    held,
                    base,
                    waypoints: all[..=index].to_vec(),
                    ..Slot::new()
                };
            }
            Place::Tail(index) => {
                let Waypoint { position: at, events, fixed } = entry.waypoints[index].clone();
                let thawed = self.program.thaw(slot, &[fixed.frozen()?]);
                self.survive(slot, thawed)?;
                let entry = self.slot_mut(slot)?;
                let tail = at - (entry.position() - entry.tail.len() as u32);
                entry.tail.truncate(tail as usize);
                entry.history.truncate(at);
                entry.events.truncate(events);
                entry.waypoints.truncate(index + 1);
            }
        }
        Ok(Rollback { slot, start, at: start, to: position, tokens, events, history })
    }

    /// Takes a rollback one step on: one chunk of prefill or one token of decode is read again. True while there is more.
    ///
    /// # Errors
    /// [`EngineError::RollbackBroken`] if the slot was used meanwhile. If the device fails the slot is empty and says so.
    pub fn advance(&mut self, rollback: &mut Rollback) -> Result<bool, EngineError> {
        let (slot, expected) = (rollback.slot, rollback.at);
        let position = self.position(slot)?;
        if position != expected {
            return Err(EngineError::RollbackBroken { slot: slot.0, position, expected });
        }
        self.read_again(rollback).inspect_err(|error| self.empty(slot, &error.to_string()))
    }

    fn read_again(&mut self, rollback: &mut Rollback) -> Result<bool, EngineError> {
        let (slot, at) = (rollback.slot, rollback.at);
        self.events_of(rollback)?;
        let next = rollback.history.since(at).next();
        if let Some(segment) = next {
            let stop = rollback.events.front().map_or(segment.end, |e| e.position.min(segment.end));
            let from = (at - rollback.start) as usize;
            match segment.origin {
                Origin::Prefill => {
                    let tokens = &rollback.tokens[from..(stop - rollback.start) as usize];
                    let read = self.append(slot, tokens, &mut |_| ControlFlow::Break(()))?;
                    rollback.at += read as u32;
                }
                Origin::Decode => {
                    self.step_forced(slot, rollback.tokens[from])?;
                    rollback.at += 1;
                }
            }
        }
        if rollback.left() == 0 {
            self.events_of(rollback)?;
        }
        Ok(rollback.left() > 0)
    }

    /// Makes the settings that were made where the rollback stands.
    fn events_of(&mut self, rollback: &mut Rollback) -> Result<(), EngineError> {
        let at = rollback.at;
        while rollback.events.front().is_some_and(|e| e.position <= at) {
            if let Some(stamped) = rollback.events.pop_front() {
                self.event(rollback.slot, stamped.event)?;
            }
        }
        Ok(())
    }
}

/// The deepest place at or before a position, and the nodes after it from there on, the one that it lies in included.
/// Upwards from the slot, no further than the place that is found: a long branch costs no more than a short one.
fn find(slot: &Slot, position: u32) -> (Place, Vec<Arc<RowNode>>) {
    if let Some(index) = last_before(&slot.waypoints, position) {
        return (Place::Tail(index), Vec::new());
    }
    let mut after = Vec::new();
    let mut place = Place::Start;
    let mut next = slot.chain.as_ref();
    while let Some(node) = next {
        let boundary = Some(node).filter(|n| n.end() <= position).and_then(|n| n.boundary());
        if let Some(boundary) = boundary.filter(|b| !b.fixed.is_away()) {
            place = Place::Boundary(boundary);
            break;
        }
        after.push(Arc::clone(node));
        if let Some(all) = node.waypoints()
            && let Some(index) = last_before(&all, position)
        {
            place = Place::Node(Arc::clone(node), all, index);
            break;
        }
        next = node.parent.as_ref();
    }
    after.reverse();
    (place, after)
}
