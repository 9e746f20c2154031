//! Snapshot, restore, fork.

use std::sync::Arc;

use ampoule_backend::{BackendError, Part, SlotId};

use crate::engine::{Engine, Slot};
use crate::lineage::{Capsule, RowNode, missing};
use crate::piece::{Piece, PieceKind};
use crate::rollback::Waypoints;
use crate::{EngineError, LineageId};

impl Engine {
    /// Freezes the slot's boundary.
    ///
    /// Copies the fixed state and the rows read since the last boundary; rows before it are shared. A second
    /// snapshot of an unchanged slot is the same capsule and copies nothing.
    ///
    /// # Errors
    /// If the budget for capsules is used up or the device fails; the slot goes on as it was.
    pub fn snapshot(&mut self, slot: SlotId) -> Result<Capsule, EngineError> {
        let entry = self.slot(slot)?;
        if entry.tainted {
            return Err(EngineError::Tainted { slot: slot.0 });
        }
        if let Some(chain) =
            entry.chain.clone().filter(|_| entry.tail.is_empty() && entry.events.is_empty())
        {
            if let Some(boundary) = chain.boundary().filter(|b| !b.fixed.is_away()) {
                return Ok(Capsule(boundary));
            }
            let fixed = self.program.freeze(slot, self.state.fixed());
            let fixed = Piece::new(PieceKind::Fixed, chain.end(), self.survive(slot, fixed)?);
            return Ok(Capsule::new(chain, fixed, self.id));
        }
        let (start, end) = (entry.chain.as_ref().map_or(0, |n| n.end()), entry.position());
        let rows = self.state.rows(&(start as usize..end as usize));
        let fixed = Part { regions: self.state.fixed(), settled: false };
        let both = [fixed, Part { regions: &rows, settled: true }];
        let parts = if rows.is_empty() { 1 } else { 2 };
        let frozen = self.program.freeze_parts(slot, &both[..parts]);
        let frozen = self.survive(slot, frozen)?;
        // A hash over all the tokens: a device copies meanwhile.
        let id = self.next_lineage(self.slot(slot)?, start)?;
        if frozen.len() != parts {
            let problem = format!("{} parts were frozen, not {parts}", frozen.len());
            let buffer = "frozen state".to_owned();
            return Err(BackendError::WrongBuffer { buffer, problem }.into());
        }
        let mut frozen = frozen.into_iter();
        let fixed = frozen.next().ok_or(BackendError::ForeignState)?;
        let fixed = Piece::new(PieceKind::Fixed, end, fixed);
        let rows = frozen.next().map(|rows| Piece::new(PieceKind::Rows, end, rows));
        let entry = self.slot_mut(slot)?;
        let (tail, events) = (std::mem::take(&mut entry.tail), std::mem::take(&mut entry.events));
        let waypoints = Waypoints::of(std::mem::take(&mut entry.waypoints));
        let node =
            RowNode::new(entry.chain.take(), tail, entry.history.clone(), Some(events), rows, id);
        node.set_waypoints(&waypoints);
        entry.passed = Some(waypoints);
        self.known.add(&node);
        let entry = self.slot_mut(slot)?;
        // The slot holds the rows it just froze. What it holds beyond its position is of another branch.
        entry.held.truncate(node.depth);
        entry.held.push(Arc::clone(&node));
        entry.chain = Some(Arc::clone(&node));
        Ok(Capsule::new(node, fixed, self.id))
    }

    /// The identity of the boundary that a snapshot would make.
    fn next_lineage(&self, slot: &Slot, start: u32) -> Result<LineageId, EngineError> {
        let from = slot.chain.as_ref().map_or_else(|| self.scope.root(), |n| n.id);
        if slot.tail.is_empty() {
            return Ok(from);
        }
        let mut id = from;
        for segment in slot.history.since(start) {
            let tokens =
                &slot.tail[(segment.start - start) as usize..(segment.end - start) as usize];
            id = self.scope.extend(id, segment, tokens)?;
        }
        Ok(id)
    }

    /// Puts a capsule into a slot, which then goes on exactly as the slot it was taken from would have.
    ///
    /// Copies the fixed state, and of the rows only those that the slot does not hold already.
    ///
    /// # Errors
    /// If the capsule belongs to another engine the slot is as it was. If the device fails the slot is empty and
    /// says so.
    pub fn restore(&mut self, slot: SlotId, capsule: &Capsule) -> Result<(), EngineError> {
        if capsule.0.engine != self.id {
            return Err(EngineError::ForeignCapsule);
        }
        let held = self.thaw_path(slot, &capsule.0.node, &capsule.0.fixed)?;
        let entry = self.slots.get_mut(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        *entry = Slot {
            chain: Some(Arc::clone(&capsule.0.node)),
            history: capsule.0.node.history.clone(),
            held,
            base: Some(Arc::clone(&capsule.0)),
            ..Slot::new()
        };
        Ok(())
    }

    /// Copies into a slot the rows of the path to `node` that it lacks, and `fixed`; the nodes that it holds then.
    pub(crate) fn thaw_path(
        &mut self,
        slot: SlotId,
        node: &Arc<RowNode>,
        fixed: &Piece,
    ) -> Result<Vec<Arc<RowNode>>, EngineError> {
        let entry = self.slots.get(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        let lacks = missing(&entry.held, node);
        let mut parts = Vec::with_capacity(lacks.len() + 1);
        for piece in lacks.iter().filter_map(|n| n.rows.as_deref()).chain([fixed]) {
            let part = self.here(piece.frozen()?);
            parts.push(self.survive(slot, part)?);
        }
        let thawed = self.program.thaw(slot, &parts);
        self.survive(slot, thawed)?;
        let entry = self.slots.get_mut(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        // A target that is a prefix of what is held leaves the rest valid: it was not overwritten.
        let mut held = std::mem::take(&mut entry.held);
        if let Some(first) = lacks.first() {
            held.truncate(first.depth);
            held.extend(lacks);
        }
        Ok(held)
    }

    /// Tokens of the capsule whose rows lie in the slot's memory already: a restore into this slot copies only the rest.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn held(&self, slot: SlotId, capsule: &Capsule) -> Result<u32, EngineError> {
        let entry = self.slots.get(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        let lacks = missing(&entry.held, &capsule.0.node);
        Ok(lacks.first().map_or_else(|| capsule.0.node.end(), |node| node.start))
    }

    /// For experiments: restores `capsule`, but takes the Fixed State buffers that `other` picks by name from `donor`,
    /// or zeroes them where there is none. What the slot then says is not the model's answer: that is the point. The
    /// slot refuses to be snapshotted or rolled back until it is restored or reset.
    ///
    /// # Errors
    /// As [`Engine::restore`].
    pub fn restore_with_other_state(
        &mut self,
        slot: SlotId,
        capsule: &Capsule,
        donor: Option<&Capsule>,
        other: &dyn Fn(&str) -> bool,
    ) -> Result<(), EngineError> {
        let source = donor.unwrap_or(capsule);
        if source.0.engine != self.id {
            return Err(EngineError::ForeignCapsule);
        }
        self.restore(slot, capsule)?;
        let (mut regions, mut bytes) = (Vec::new(), Vec::new());
        let fixed = source.0.fixed.frozen()?;
        for (index, region) in fixed.regions().iter().enumerate() {
            if other(&self.model.buffer(region.buffer).name) {
                let mut part = vec![0; region.bytes(self.buffers())];
                if donor.is_some() {
                    fixed.read(index, &mut part)?;
                }
                regions.push(region.clone());
                bytes.push(part);
            }
        }
        let bytes: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        self.slot_mut(slot)?.tainted = true;
        let frozen = self.program.freeze_bytes(&regions, &bytes)?;
        let thawed = self.program.thaw(slot, &[frozen]);
        self.survive(slot, thawed)
    }

    /// Restores one capsule into one new slot per seed; `None` keeps the capsule's random stream.
    ///
    /// # Errors
    /// If there are not enough free slots, or the device fails; no slot is left behind then.
    pub fn fork(
        &mut self,
        capsule: &Capsule,
        seeds: &[Option<u64>],
    ) -> Result<Vec<SlotId>, EngineError> {
        let mut slots = Vec::with_capacity(seeds.len());
        for seed in seeds {
            let made = self.fork_one(capsule, *seed);
            match made {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    for slot in slots {
                        let _ = self.drop_slot(slot);
                    }
                    return Err(error);
                }
            }
        }
        Ok(slots)
    }

    fn fork_one(&mut self, capsule: &Capsule, seed: Option<u64>) -> Result<SlotId, EngineError> {
        let slot = self.create_slot()?;
        let restored = self.restore(slot, capsule);
        let seeded = restored.and_then(|()| seed.map_or(Ok(()), |seed| self.reseed(slot, seed)));
        if let Err(error) = seeded {
            let _ = self.drop_slot(slot);
            return Err(error);
        }
        Ok(slot)
    }
}
