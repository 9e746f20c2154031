//! Capsules link by link, for whoever keeps them elsewhere and wants to keep shared rows once.
//!
//! [`Engine::chain`] takes a capsule apart: what lies between each boundary and its parent, and the fixed state at the
//! end. [`Engine::assemble`] puts one together again. Links that the engine still holds, because another capsule or a
//! slot has them, are shared: their rows are not asked for.

use std::sync::{Arc, OnceLock, Weak};

use ampoule_backend::{BackendError, Frozen, Region};
use ampoule_capsule::{
    Digest, Fingerprint, History, LineageId, Manifest, Parent, Segment, StateLayout,
};

use crate::engine::Engine;
use crate::lineage::{Capsule, RowNode, path};
use crate::piece::{Piece, PieceKind};
use crate::sampling::Stamped;
use crate::{EngineError, SlotId};

/// State tensors of one part of a capsule: the rows of a link, or the fixed state.
pub struct StatePart {
    piece: Option<Arc<Piece>>,
    /// Taken when the chain was, unless it was away then.
    frozen: Option<Arc<dyn Frozen>>,
    /// Tensor in the layout of each region.
    tensors: Vec<usize>,
    sizes: Vec<usize>,
    /// Regions that lay on a device, as they are asked for.
    copies: Vec<OnceLock<Vec<u8>>>,
}

impl StatePart {
    /// The bytes of the tensor with that index in the layout, copied to the host if they lie elsewhere; none for a
    /// tensor of the other growth.
    ///
    /// # Errors
    /// [`EngineError::Away`] if the part was not in memory when the capsule was taken apart, or the device fails.
    pub fn tensor(&self, index: usize) -> Result<&[u8], EngineError> {
        let Some(piece) = &self.piece else { return Ok(&[]) };
        let Some(region) = self.tensors.iter().position(|t| *t == index) else { return Ok(&[]) };
        let Some(frozen) = &self.frozen else { return Err(piece.away()) };
        if let Some(bytes) = frozen.host(region) {
            return Ok(bytes);
        }
        if let Some(bytes) = self.copies[region].get() {
            return Ok(bytes);
        }
        let mut bytes = vec![0; self.sizes[region]];
        frozen.read(region, &mut bytes)?;
        Ok(self.copies[region].get_or_init(|| bytes))
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.sizes.iter().sum()
    }
}

/// What lies between a boundary and its parent.
pub struct ChainLink {
    node: Arc<RowNode>,
    /// The rows.
    pub rows: StatePart,
}

impl ChainLink {
    /// The tokens; may be none, where only settings were made.
    pub fn tokens(&self) -> &[u32] {
        &self.node.tokens
    }

    /// The first position.
    pub fn start(&self) -> u32 {
        self.node.start
    }

    /// How the rows were made.
    pub fn spans(&self) -> Vec<Segment> {
        self.node.history.since(self.node.start).collect()
    }

    /// The identity of the boundary at the end.
    pub fn lineage(&self) -> LineageId {
        self.node.id
    }

    /// Of an imported root: the node that its identity was made from.
    pub fn from(&self) -> Option<Parent> {
        self.node.imported_from
    }

    /// The sampler settings made since the parent, as JSON; `None` where they are not known.
    pub fn journal(&self) -> Option<String> {
        self.node.events.as_ref().and_then(|events| serde_json::to_string(events).ok())
    }
}

/// A capsule taken apart.
pub struct Chain {
    /// From the root on; never empty.
    pub links: Vec<ChainLink>,
    /// The fixed state.
    pub fixed: StatePart,
}

/// What a chain is of: a capsule fits only where all three are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainScope {
    /// Model, plans, kernels, device.
    pub fingerprint: Fingerprint,
    /// The state's tensors.
    pub layout: StateLayout,
    /// The tenant.
    pub salt: Digest,
}

/// A link to be put together: as [`ChainLink`] says, without the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewLink {
    /// See [`ChainLink::tokens`].
    pub tokens: Vec<u32>,
    /// See [`ChainLink::spans`].
    pub spans: Vec<Segment>,
    /// See [`ChainLink::lineage`].
    pub lineage: LineageId,
    /// See [`ChainLink::from`].
    pub from: Option<Parent>,
    /// See [`ChainLink::journal`].
    pub journal: Option<String>,
}

/// Bytes of state tensors by index in the layout.
pub trait TensorBytes {
    /// The bytes; empty for tensors that the part does not have.
    fn tensor(&self, index: usize) -> &[u8];
}

impl TensorBytes for Vec<Vec<u8>> {
    fn tensor(&self, index: usize) -> &[u8] {
        self.get(index).map_or(&[], Vec::as_slice)
    }
}

/// Nodes that somebody holds, so that a chain put together shares them.
#[derive(Default)]
pub(crate) struct KnownNodes {
    nodes: std::collections::HashMap<(LineageId, u32), Vec<Weak<RowNode>>>,
    sweep_at: usize,
}

impl KnownNodes {
    pub(crate) fn add(&mut self, node: &Arc<RowNode>) {
        if self.nodes.len() >= self.sweep_at {
            self.nodes.retain(|_, all| {
                all.retain(|n| n.strong_count() > 0);
                !all.is_empty()
            });
            self.sweep_at = (2 * self.nodes.len()).max(256);
        }
        let same = self.nodes.entry((node.id, node.start)).or_default();
        // A prompt that comes again and again makes the same node anew each time.
        same.retain(|n| n.strong_count() > 0);
        same.push(Arc::downgrade(node));
    }

    fn find(
        &self,
        lineage: LineageId,
        start: u32,
        good: impl Fn(&RowNode) -> bool,
    ) -> Option<Arc<RowNode>> {
        let all = self.nodes.get(&(lineage, start))?;
        all.iter().filter_map(Weak::upgrade).find(|node| good(node))
    }
}

impl Engine {
    /// What capsules of this engine are of.
    pub fn chain_scope(&self) -> ChainScope {
        ChainScope {
            fingerprint: self.fingerprint.clone(),
            layout: self.layout.clone(),
            salt: self.scope.salt,
        }
    }

    /// Takes a capsule apart. Nothing is copied: the links share the capsule's rows.
    ///
    /// # Errors
    /// If the capsule belongs to another engine.
    pub fn chain(&self, capsule: &Capsule) -> Result<Chain, EngineError> {
        if capsule.0.engine != self.id {
            return Err(EngineError::ForeignCapsule);
        }
        let links = path(Some(&capsule.0.node));
        let link = |node: Arc<RowNode>| ChainLink { rows: self.part(node.rows.clone()), node };
        Ok(Chain {
            links: links.into_iter().map(link).collect(),
            fixed: self.part(Some(Arc::clone(&capsule.0.fixed))),
        })
    }

    pub(crate) fn part(&self, piece: Option<Arc<Piece>>) -> StatePart {
        let regions = piece.as_ref().map_or(&[][..], |p| p.regions());
        let tensors = regions.iter().map(|r| self.tensor_index(r)).collect();
        let sizes: Vec<usize> = regions.iter().map(|r| r.bytes(self.buffers())).collect();
        let copies = sizes.iter().map(|_| OnceLock::new()).collect();
        let frozen = piece.as_ref().and_then(|p| p.frozen().ok());
        StatePart { piece, frozen, tensors, sizes, copies }
    }

    /// Puts a capsule together. `fixed` is asked for its fixed state once all of it is known to fit and to have room, and `rows`
    /// for the rows of a link, by index, only where the engine does not hold them any more.
    ///
    /// # Errors
    /// If the chain does not fit the model, plan, layout, kernels, device or tenant (the error names which), its parts do
    /// not agree, there is no room for all of it (nothing has been read or copied then), the device fails, or `fixed` or
    /// `rows` fails.
    pub fn assemble<P: TensorBytes, E: From<EngineError>>(
        &mut self,
        scope: &ChainScope,
        links: &[NewLink],
        fixed: impl FnOnce() -> Result<P, E>,
        rows: &mut dyn FnMut(usize) -> Result<P, E>,
    ) -> Result<Capsule, E> {
        let wanted = links.iter().map(|l| l.tokens.len()).sum();
        self.check_scope(scope, links.len(), wanted)?;
        self.has_room(self.lacks(links).1)?;
        let fixed = fixed()?;
        let state = |name: &str| {
            let index = self.layout.tensors.iter().position(|t| t.name == name);
            index.map_or(&[][..], |i| fixed.tensor(i))
        };
        self.check_state(&state, wanted as u32)?;
        let mut parent: Option<Arc<RowNode>> = None;
        for (index, link) in links.iter().enumerate() {
            parent = Some(self.attach(parent, link, &mut || rows(index))?);
        }
        let node = parent.ok_or(EngineError::NothingRead { slot: 0 })?;
        let regions = self.state.fixed();
        let bytes: Vec<&[u8]> =
            regions.iter().map(|r| fixed.tensor(self.tensor_index(r))).collect();
        let fixed = self.program.freeze_bytes(regions, &bytes).map_err(EngineError::from)?;
        let fixed = Piece::new(PieceKind::Fixed, node.end(), fixed);
        Ok(Capsule::new(node, fixed, self.id))
    }

    /// The links whose rows the engine does not hold, by index: those that [`Self::assemble`] would ask for. Between the two
    /// that can change.
    ///
    /// # Errors
    /// If the chain does not fit the model, plan, layout, kernels, device or tenant (the error names which), or takes more than
    /// the whole budget for capsules.
    pub fn lacking(
        &self,
        scope: &ChainScope,
        links: &[NewLink],
    ) -> Result<Vec<usize>, EngineError> {
        self.check_scope(scope, links.len(), links.iter().map(|l| l.tokens.len()).sum())?;
        let (lacks, wanted) = self.lacks(links);
        let (used, budget) = self.program.frozen_bytes();
        if wanted > budget {
            return Err(BackendError::CapsuleBudget { wanted, used, budget }.into());
        }
        Ok(lacks)
    }

    /// The links whose rows putting such a chain together would copy, by index, and the bytes of those and the fixed state.
    fn lacks(&self, links: &[NewLink]) -> (Vec<usize>, usize) {
        let bytes = |regions: &[Region]| -> usize {
            regions.iter().map(|region| region.bytes(self.buffers())).sum()
        };
        let (mut lacks, mut wanted) = (Vec::new(), bytes(self.state.fixed()));
        let mut start = 0;
        for (index, link) in links.iter().enumerate() {
            let end = start + link.tokens.len();
            let same_rows = |node: &RowNode| node.tokens == link.tokens;
            let held = self.known.find(link.lineage, start as u32, same_rows);
            if held.is_none_or(|node| node.rows.as_ref().is_some_and(|rows| rows.is_away())) {
                let regions = self.state.rows(&(start..end));
                wanted += bytes(&regions);
                if !regions.is_empty() {
                    lacks.push(index);
                }
            }
            start = end;
        }
        (lacks, wanted)
    }

    fn check_scope(
        &self,
        scope: &ChainScope,
        links: usize,
        wanted: usize,
    ) -> Result<(), EngineError> {
        let manifest = Manifest {
            producer: String::new(),
            model: String::new(),
            position: 0,
            history: History::new(),
            lineage: self.scope.root(),
            parent: None,
            salt: scope.salt,
            fingerprint: scope.fingerprint.clone(),
            layout: scope.layout.clone(),
            journal: None,
            note: None,
        };
        manifest.check_fits(&self.fingerprint, &self.layout, &self.scope.salt)?;
        if links == 0 {
            let (what, found) = ("it has a chain".to_owned(), "no link".to_owned());
            return Err(EngineError::CapsuleState { what, found });
        }
        if wanted > self.context() {
            let context = self.context();
            return Err(EngineError::ContextFull { position: 0, wanted, context });
        }
        Ok(())
    }

    /// The node of a link below `parent`: one that is still held, or a new one.
    fn attach<P: TensorBytes, E: From<EngineError>>(
        &mut self,
        parent: Option<Arc<RowNode>>,
        link: &NewLink,
        load: &mut dyn FnMut() -> Result<P, E>,
    ) -> Result<Arc<RowNode>, E> {
        let start = parent.as_ref().map_or(0, |p| p.end());
        let (history, events) = self.check_link(parent.as_ref(), link)?;
        let same_parent = |node: &RowNode| match (&node.parent, &parent) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let whole = |node: &RowNode| {
            same_parent(node) && node.tokens == link.tokens && node.events == events
        };
        let regions = self.state.rows(&(start as usize..start as usize + link.tokens.len()));
        let known = self.known.find(link.lineage, start, whole);
        // The same lineage over the same positions is the same rows, whatever was set beside them.
        let same_rows = |node: &RowNode| node.tokens == link.tokens;
        let similar = known.clone().or_else(|| self.known.find(link.lineage, start, same_rows));
        let rows = if let Some(node) = &similar {
            if let Some(piece) = node.rows.as_ref().filter(|p| p.is_away()) {
                let part = load()?;
                piece.put(self.freeze_part(&regions, &part)?);
            }
            node.rows.clone()
        } else if regions.is_empty() || link.tokens.is_empty() {
            None
        } else {
            let part = load()?;
            let end = start + link.tokens.len() as u32;
            Some(Piece::new(PieceKind::Rows, end, self.freeze_part(&regions, &part)?))
        };
        if let Some(node) = known {
            return Ok(node);
        }
        let node = RowNode::linked(parent, link, history, events, rows);
        self.known.add(&node);
        Ok(node)
    }

    fn freeze_part(
        &mut self,
        regions: &[Region],
        part: &impl TensorBytes,
    ) -> Result<Arc<dyn Frozen>, EngineError> {
        let bytes: Vec<&[u8]> = regions.iter().map(|r| part.tensor(self.tensor_index(r))).collect();
        Ok(self.program.freeze_bytes(regions, &bytes)?)
    }

    /// That a link goes on from its parent: history and events of the node it makes.
    fn check_link(
        &self,
        parent: Option<&Arc<RowNode>>,
        link: &NewLink,
    ) -> Result<(History, Option<Vec<Stamped>>), EngineError> {
        self.check_tokens(&link.tokens)?;
        let start = parent.map_or(0, |p| p.end());
        let end = start + link.tokens.len() as u32;
        let mut history = parent.map_or_else(History::new, |p| p.history.clone());
        for span in &link.spans {
            if span.start != history.end() || span.end <= span.start {
                let (what, found) = (
                    format!("the next span of its history begins at {}", history.end()),
                    format!("{}..{}", span.start, span.end),
                );
                return Err(EngineError::CapsuleState { what, found });
            }
            history.append(span.origin, span.end - span.start)?;
        }
        if history.end() != end {
            let (what, found) =
                (format!("its history ends at {end}"), format!("position {}", history.end()));
            return Err(EngineError::CapsuleState { what, found });
        }
        let (mut id, from) = match (parent, link.from) {
            (Some(parent), _) => (parent.id, start),
            (None, Some(from)) => (from.id, from.position),
            (None, None) => (self.scope.root(), 0),
        };
        for segment in history.since(from.max(start)) {
            let tokens =
                &link.tokens[(segment.start - start) as usize..(segment.end - start) as usize];
            id = self.scope.extend(id, segment, tokens)?;
        }
        if id != link.lineage {
            return Err(EngineError::Lineage(ampoule_capsule::LineageError::WrongId {
                expected: id,
                actual: link.lineage,
            }));
        }
        let events = self.check_journal(link.journal.as_deref(), start..=end)?;
        Ok((history, events))
    }

    /// Whether the slot stands exactly at the capsule's boundary, with nothing read or set since.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn stands_at(&self, slot: SlotId, capsule: &Capsule) -> Result<bool, EngineError> {
        let entry = self.slot(slot)?;
        let same = |chain: &Arc<RowNode>| Arc::ptr_eq(chain, &capsule.0.node);
        Ok(entry.chain.as_ref().is_some_and(same)
            && entry.tail.is_empty()
            && entry.events.is_empty())
    }
}
