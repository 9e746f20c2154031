//! Loading: the records of a capsule first, then as much of its state as is wanted, every byte checked.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use ampoule_capsule::{CapsuleFile, CapsuleWriter, History, LineageId, Manifest, Parent, Segment};

use crate::error::{Damage, Damaged, LoadError, ReadError, SaveError};
use crate::frame::{self, Kind, Opened};
use crate::identity::{CapsuleId, Named, NodeId, ScopeId};
use crate::records::{
    CapsuleRecord, NodeRecord, Piece, Scope, SegmentRef, from_json, history, node_from_bytes,
};
use crate::save::{Link, NewCapsule, Saved, Slices, key_of, parallel};
use crate::storage::{Folder, Key};
use crate::store::{Store, record_damage};

/// A stored row node: the rows between a boundary and the one before it. Its rows lie in the store.
#[derive(Clone, Debug)]
pub struct StoredNode {
    /// Its id.
    pub id: NodeId,
    pub(crate) record: NodeRecord,
    /// The tokens of its own positions.
    pub tokens: Vec<u32>,
    row_bytes: u64,
}

impl StoredNode {
    /// The node before it.
    pub const fn parent(&self) -> Option<NodeId> {
        self.record.parent
    }

    /// What its tree has in common.
    pub const fn scope(&self) -> ScopeId {
        self.record.scope
    }

    /// Its own positions.
    pub const fn positions(&self) -> Range<u32> {
        self.record.start..self.record.end
    }

    /// How its own rows were made.
    pub fn spans(&self) -> &[Segment] {
        &self.record.spans
    }

    /// The lineage node at its end.
    pub const fn lineage(&self) -> LineageId {
        self.record.lineage
    }

    /// See [`Link::from`].
    pub const fn from(&self) -> Option<Parent> {
        self.record.from
    }

    /// See [`Link::journal`].
    pub fn journal(&self) -> Option<&str> {
        self.record.journal.as_deref()
    }

    /// Bytes of its own rows.
    pub const fn row_bytes(&self) -> u64 {
        self.row_bytes
    }

    /// The segments of its own rows.
    pub fn segments(&self) -> &[SegmentRef] {
        &self.record.rows
    }
}

/// A stored capsule: its records have been read and checked, its state lies in the store.
#[derive(Clone, Debug)]
pub struct StoredCapsule {
    /// Its id.
    pub id: CapsuleId,
    pub(crate) record: CapsuleRecord,
    /// Fingerprint, layout and salt.
    pub scope: Arc<Scope>,
    /// Its chain, from the root on.
    pub nodes: Vec<Arc<StoredNode>>,
}

impl StoredCapsule {
    /// Tokens that its state has seen.
    pub const fn position(&self) -> u32 {
        self.record.position
    }

    /// Those tokens.
    pub fn tokens(&self) -> Vec<u32> {
        self.nodes.iter().flat_map(|node| node.tokens.iter().copied()).collect()
    }

    /// How its rows were made.
    pub fn history(&self) -> History {
        history(self.nodes.iter().flat_map(|node| node.spans()))
    }

    /// The identity of its boundary.
    pub fn lineage(&self) -> LineageId {
        self.nodes.last().map_or_else(|| self.scope.lineage().root(), |node| node.lineage())
    }

    /// The program that saved it.
    pub fn producer(&self) -> &str {
        &self.record.producer
    }

    /// The model's name, for people.
    pub fn model(&self) -> &str {
        &self.record.model
    }

    /// What its owner wanted to remember.
    pub fn note(&self) -> Option<&str> {
        self.record.note.as_deref()
    }

    /// Bytes of its fixed state.
    pub fn fixed_bytes(&self) -> u64 {
        self.record.fixed.iter().map(|segment| segment.bytes).sum()
    }

    /// Bytes of the rows since the boundary before it.
    pub fn own_row_bytes(&self) -> u64 {
        self.nodes.last().map_or(0, |node| node.row_bytes())
    }

    /// Bytes of all its rows: own and shared.
    pub fn row_bytes(&self) -> u64 {
        self.nodes.iter().map(|node| node.row_bytes()).sum()
    }

    /// The segments of its fixed state.
    pub fn segments(&self) -> &[SegmentRef] {
        &self.record.fixed
    }

    /// What a capsule file says of it. `journal` is that of the whole branch, which only the engine can join.
    pub fn manifest(&self, journal: Option<String>) -> Manifest {
        // Lineage is made from the nearest boundary before this one, as the engine does.
        let before = self.nodes.iter().rev().find(|node| node.record.end < self.record.position);
        let parent = before
            .map(|node| Parent { id: node.lineage(), position: node.record.end })
            .filter(|parent| parent.position > 0)
            .or_else(|| self.nodes.first().and_then(|node| node.from()));
        Manifest {
            producer: self.record.producer.clone(),
            model: self.record.model.clone(),
            position: self.record.position,
            history: self.history(),
            lineage: self.lineage(),
            parent,
            salt: self.scope.salt,
            fingerprint: self.scope.fingerprint.clone(),
            layout: self.scope.layout.clone(),
            journal,
            note: self.record.note.clone(),
        }
    }
}

/// The verified bytes of one part: a node's own rows, or a capsule's fixed state.
#[derive(Debug)]
pub struct PartBytes {
    bytes: Vec<u8>,
    /// By index in the layout; empty for tensors of the other growth.
    ranges: Vec<Range<usize>>,
}

impl PartBytes {
    /// The bytes of the tensor with that index in the layout; of a node, those of its own rows.
    pub fn tensor(&self, index: usize) -> &[u8] {
        self.ranges.get(index).and_then(|range| self.bytes.get(range.clone())).unwrap_or_default()
    }

    /// One slice for each tensor of the layout.
    pub fn slices(&self) -> Slices<'_> {
        Slices((0..self.ranges.len()).map(|index| self.tensor(index)).collect())
    }

    /// Bytes of the part.
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has none.
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl Store {
    /// Reads and checks the records of a capsule, not its state: who it is, what it fits, its chain.
    ///
    /// # Errors
    /// If there is no such capsule, one of its records is damaged, or the storage fails.
    pub fn capsule(&self, id: CapsuleId) -> Result<StoredCapsule, LoadError> {
        self.loading(id, || {
            let key = Key::new(Folder::Capsules, id);
            if self.storage.stat(&key)?.is_none() {
                return Err(LoadError::NoSuchCapsule { capsule: id, place: self.place() });
            }
            let read = self.read_capsule(id, &mut HashMap::new());
            let capsule = read.map_err(|e| load_error(id, e))?;
            capsule.nodes.iter().for_each(|node| self.remember(key_of(&node.record), node.id));
            Ok(capsule)
        })
    }

    /// Reads the records of a capsule; nodes that were read before are taken from `nodes`.
    pub(crate) fn read_capsule(
        &self,
        id: CapsuleId,
        nodes: &mut HashMap<NodeId, Arc<StoredNode>>,
    ) -> Result<StoredCapsule, ReadError> {
        let key = Key::new(Folder::Capsules, id);
        let bytes = self.read_named(&key, Kind::Capsule, Named::Capsule)?;
        let record: CapsuleRecord = from_json(&bytes).map_err(|e| record_damage(&key, e))?;
        record.check().map_err(|e| record_damage(&key, e))?;
        let (scope, chain) = self.read_chain(record.node, nodes)?;
        let end = chain.last().map_or(0, |node| node.record.end);
        record.check_node(&scope, end).map_err(|e| record_damage(&key, e))?;
        Ok(StoredCapsule { id, record, scope, nodes: chain })
    }

    /// The nodes from the root to `last`, each checked against its parent.
    fn read_chain(
        &self,
        last: NodeId,
        known: &mut HashMap<NodeId, Arc<StoredNode>>,
    ) -> Result<(Arc<Scope>, Vec<Arc<StoredNode>>), ReadError> {
        let mut chain = Vec::new();
        // Nodes below the first that was known before: those are still to be checked.
        let mut fresh = 0;
        let mut next = Some(last);
        let mut all_known = false;
        while let Some(id) = next {
            let node = match known.get(&id) {
                Some(node) => {
                    all_known = true;
                    Arc::clone(node)
                }
                None => Arc::new(self.read_node(id)?),
            };
            fresh += usize::from(!all_known);
            next = node.parent();
            chain.push(node);
        }
        chain.reverse();
        let scope_id = chain.last().map(|node| node.scope()).expect("a chain has its last node");
        let scope = self.scope(scope_id)?;
        for index in chain.len() - fresh..chain.len() {
            let node = &chain[index];
            let key = Key::new(Folder::Nodes, node.id);
            let parent = index
                .checked_sub(1)
                .map(|i| (chain[i].scope(), chain[i].record.end, chain[i].lineage()));
            node.record
                .check(&scope, &node.tokens)
                .and_then(|()| node.record.check_parent(&scope, parent, &node.tokens))
                .map_err(|e| record_damage(&key, e))?;
            known.insert(node.id, Arc::clone(node));
        }
        Ok((scope, chain))
    }

    fn read_node(&self, id: NodeId) -> Result<StoredNode, ReadError> {
        let key = Key::new(Folder::Nodes, id);
        let bytes = self.read_named(&key, Kind::Node, Named::Node)?;
        let (record, tokens) = node_from_bytes(&bytes).map_err(|e| record_damage(&key, e))?;
        let row_bytes = record.rows.iter().fold(0_u64, |sum, s| sum.saturating_add(s.bytes));
        Ok(StoredNode { id, record, tokens, row_bytes })
    }

    /// Reads and checks the own rows of one node of the capsule's chain.
    ///
    /// # Errors
    /// If a segment is damaged or missing, there is no memory, or the storage fails.
    ///
    /// # Panics
    /// If the chain has no node of that index.
    pub fn rows(&self, capsule: &StoredCapsule, index: usize) -> Result<PartBytes, LoadError> {
        let node = &capsule.nodes[index];
        let pieces = capsule.scope.row_parts(node.tokens.len());
        self.part(capsule, &pieces, &node.record.rows)
    }

    /// Reads and checks the capsule's fixed state.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub fn fixed(&self, capsule: &StoredCapsule) -> Result<PartBytes, LoadError> {
        self.part(capsule, &capsule.scope.fixed_parts(), &capsule.record.fixed)
    }

    fn part(
        &self,
        capsule: &StoredCapsule,
        pieces: &[Piece],
        segments: &[SegmentRef],
    ) -> Result<PartBytes, LoadError> {
        let id = capsule.id;
        self.loading(id, || {
            // Every segment's header first: memory is taken for what is there, not for what a record says.
            let opened = parallel(self.options.threads, segments.len(), |index| {
                self.open_segment(segments[index])
            })
            .map_err(|e| load_error(id, e))?;
            let total: u64 = segments.iter().map(|segment| segment.bytes).sum();
            let memory = || LoadError::Memory { capsule: id, bytes: total };
            let length = usize::try_from(total).map_err(|_| memory())?;
            // Asked first, since the next line has no way to say no; that one takes fresh pages, which the threads below
            // fill without anybody having written zeros.
            Vec::<u8>::new().try_reserve_exact(length).map_err(|_| memory())?;
            let mut bytes = vec![0; length];
            let mut rest = bytes.as_mut_slice();
            let mut targets = Vec::with_capacity(segments.len());
            for segment in segments {
                let (target, after) = rest.split_at_mut(segment.bytes as usize);
                targets.push(std::sync::Mutex::new(target));
                rest = after;
            }
            parallel(self.options.threads, segments.len(), |index| {
                let mut target =
                    targets[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                opened[index].segment(self.key.as_ref(), segments[index].id.0, &mut target)?;
                self.count_moved(segments[index].bytes);
                Ok(())
            })
            .map_err(|e| load_error(id, e))?;
            drop(targets);
            let mut ranges = vec![0..0; capsule.scope.layout.tensors.len()];
            let mut at = 0;
            for piece in pieces {
                ranges[piece.tensor] = at..at + piece.bytes;
                at += piece.bytes;
            }
            Ok(PartBytes { bytes, ranges })
        })
    }

    pub(crate) fn open_segment(&self, segment: SegmentRef) -> Result<Opened, ReadError> {
        let key = Key::new(Folder::Segments, segment.name());
        let opened = frame::open(&*self.storage, &key, Kind::Segment)?;
        if opened.header.plain == segment.bytes {
            Ok(opened)
        } else {
            let damage = Damage::Length { expected: segment.bytes, actual: opened.header.plain };
            Err(Damaged { object: key, damage }.into())
        }
    }

    /// Runs a part of a load. Where something is missing because the capsule was removed meanwhile, says that instead.
    fn loading<T>(
        &self,
        id: CapsuleId,
        work: impl FnOnce() -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let result = work();
        if let Err(LoadError::Damaged { source: Damaged { damage: Damage::Missing, .. }, .. }) =
            &result
            && self.storage.stat(&Key::new(Folder::Capsules, id))?.is_none()
        {
            return Err(LoadError::Removed { capsule: id });
        }
        result
    }

    /// Reads and checks every byte of a capsule and of its chain, and gives it back as a capsule file (format version 1,
    /// docs/capsule-format.md): `sink` is given the bytes piece by piece, in order, and may stop.
    ///
    /// `journal` joins the journals of the nodes, from the root on, to that of the whole branch.
    ///
    /// # Errors
    /// If anything of it is damaged, or it does not fit memory or the file format. What the sink was given then is no
    /// capsule.
    pub fn export(
        &self,
        capsule: &StoredCapsule,
        journal: &dyn Fn(&[Option<&str>]) -> Option<String>,
        sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), LoadError> {
        let refused = |source| LoadError::File { capsule: capsule.id, source };
        let mut parts = Vec::with_capacity(capsule.nodes.len() + 1);
        for index in 0..capsule.nodes.len() {
            parts.push(self.rows(capsule, index)?);
        }
        parts.push(self.fixed(capsule)?);
        let journals: Vec<Option<&str>> = capsule.nodes.iter().map(|n| n.journal()).collect();
        let manifest = capsule.manifest(journal(&journals));
        let mut writer = CapsuleWriter::new(&manifest, &capsule.tokens()).map_err(refused)?;
        for (index, tensor) in capsule.scope.layout.tensors.iter().enumerate() {
            let pieces: Vec<&[u8]> = parts.iter().map(|part| part.tensor(index)).collect();
            writer.add(&tensor.name, &pieces).map_err(refused)?;
        }
        for slice in writer.finish().map_err(refused)?.slices() {
            if sink(slice).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Saves a capsule file as a chain of one link.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn import(&self, file: &CapsuleFile<'_>) -> Result<Saved, SaveError> {
        let manifest = file.manifest();
        let scope = Scope {
            fingerprint: manifest.fingerprint.clone(),
            layout: manifest.layout.clone(),
            salt: manifest.salt,
        };
        let tokens: Vec<u32> = file.tokens().collect();
        let tensors = &scope.layout.tensors;
        let state =
            Slices(tensors.iter().map(|t| file.tensor(&t.name).unwrap_or_default()).collect());
        let link = Link {
            tokens: &tokens,
            spans: manifest.history.segments().to_vec(),
            lineage: manifest.lineage,
            from: manifest.parent,
            journal: manifest.journal.as_deref().map(Into::into),
            rows: &state,
        };
        self.save(&NewCapsule {
            scope: &scope,
            links: &[link],
            fixed: &state,
            model: &manifest.model,
            note: manifest.note.as_deref(),
        })
    }
}

pub(crate) fn load_error(capsule: CapsuleId, error: ReadError) -> LoadError {
    match error {
        ReadError::Storage(error) => LoadError::Storage(error),
        ReadError::Damaged(source) => LoadError::Damaged { capsule, source },
    }
}
