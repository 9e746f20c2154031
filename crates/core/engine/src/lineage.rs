//! The tree of boundaries: what a capsule is in memory, and which rows a slot holds.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use ampoule_capsule::{History, LineageId, Manifest, Parent};

use crate::chain::NewLink;
use crate::piece::Piece;
use crate::rollback::{Waypoint, Waypoints};
use crate::sampling::Stamped;

/// The rows between a boundary and its parent, and how they came about.
///
/// Shared by every boundary below it; two slots hold the same rows only if they hold the same node.
pub(crate) struct RowNode {
    pub(crate) parent: Option<Arc<RowNode>>,
    /// Position of the parent.
    pub(crate) start: u32,
    /// Tokens of positions `start..`.
    pub(crate) tokens: Vec<u32>,
    /// How rows `0..end` were made.
    pub(crate) history: History,
    /// Sampler events since the parent; `None` where an imported capsule brought none.
    pub(crate) events: Option<Vec<Stamped>>,
    /// The rows themselves; `None` where there are none.
    pub(crate) rows: Option<Arc<Piece>>,
    /// Nodes above it.
    pub(crate) depth: usize,
    pub(crate) id: LineageId,
    /// Of an imported root: the node that its identity was made from in the session that exported it.
    pub(crate) imported_from: Option<Parent>,
    /// The boundary at the node's end, while somebody holds it.
    boundary: Mutex<Weak<Boundary>>,
    /// Places before the node's end that a rollback can start from, while somebody holds them.
    waypoints: Mutex<Weak<Vec<Waypoint>>>,
}

impl RowNode {
    pub(crate) fn new(
        parent: Option<Arc<Self>>,
        tokens: Vec<u32>,
        history: History,
        events: Option<Vec<Stamped>>,
        rows: Option<Arc<Piece>>,
        id: LineageId,
    ) -> Arc<Self> {
        let start = parent.as_ref().map_or(0, |p| p.end());
        Arc::new(Self {
            depth: parent.as_ref().map_or(0, |p| p.depth + 1),
            parent,
            start,
            tokens,
            history,
            events,
            rows,
            id,
            imported_from: None,
            boundary: Mutex::default(),
            waypoints: Mutex::default(),
        })
    }

    /// The root that an imported capsule makes: all its rows at once.
    pub(crate) fn imported(
        tokens: Vec<u32>,
        manifest: &Manifest,
        events: Option<Vec<Stamped>>,
        rows: Option<Arc<Piece>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            depth: 0,
            parent: None,
            start: 0,
            tokens,
            history: manifest.history.clone(),
            events,
            rows,
            id: manifest.lineage,
            imported_from: manifest.parent,
            boundary: Mutex::default(),
            waypoints: Mutex::default(),
        })
    }

    /// A link put together below `parent`.
    pub(crate) fn linked(
        parent: Option<Arc<Self>>,
        link: &NewLink,
        history: History,
        events: Option<Vec<Stamped>>,
        rows: Option<Arc<Piece>>,
    ) -> Arc<Self> {
        let start = parent.as_ref().map_or(0, |p| p.end());
        let imported_from = link.from.filter(|_| parent.is_none());
        Arc::new(Self {
            depth: parent.as_ref().map_or(0, |p| p.depth + 1),
            parent,
            start,
            tokens: link.tokens.clone(),
            history,
            events,
            rows,
            id: link.lineage,
            imported_from,
            boundary: Mutex::default(),
            waypoints: Mutex::default(),
        })
    }

    /// The node from which this node's identity was made: the nearest ancestor before its end.
    pub(crate) fn lineage_parent(&self) -> Option<Parent> {
        let mut node = self;
        while let Some(parent) = &node.parent {
            if parent.end() < self.end() {
                let known = Parent { id: parent.id, position: parent.end() };
                return Some(known).filter(|p| p.position > 0);
            }
            node = parent;
        }
        node.imported_from
    }

    pub(crate) fn end(&self) -> u32 {
        self.start + self.tokens.len() as u32
    }

    pub(crate) fn boundary(&self) -> Option<Arc<Boundary>> {
        self.boundary.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    pub(crate) fn set_waypoints(&self, all: &Waypoints) {
        *self.waypoints.lock().unwrap_or_else(PoisonError::into_inner) = all.downgrade();
    }

    pub(crate) fn waypoints(&self) -> Option<Arc<Vec<Waypoint>>> {
        self.waypoints.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }
}

impl Drop for RowNode {
    /// A long branch is unlinked step by step: dropped one inside the other it would overflow the stack.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut node) = next.and_then(|n| Arc::try_unwrap(n).ok()) {
            next = node.parent.take();
        }
    }
}

/// The nodes from the root to `node`.
pub(crate) fn path(node: Option<&Arc<RowNode>>) -> Vec<Arc<RowNode>> {
    let mut nodes = Vec::new();
    let mut next = node;
    while let Some(node) = next {
        nodes.push(Arc::clone(node));
        next = node.parent.as_ref();
    }
    nodes.reverse();
    nodes
}

/// The nodes of the path to `node` that a path does not have, from the root on: as much work as there are, however long
/// the paths.
pub(crate) fn missing(held: &[Arc<RowNode>], node: &Arc<RowNode>) -> Vec<Arc<RowNode>> {
    let mut nodes = Vec::new();
    let mut next = Some(node);
    // A path that has a node has all above it.
    while let Some(node) =
        next.filter(|n| !held.get(n.depth).is_some_and(|other| Arc::ptr_eq(other, n)))
    {
        nodes.push(Arc::clone(node));
        next = node.parent.as_ref();
    }
    nodes.reverse();
    nodes
}

/// A boundary: a node and the fixed state at its end.
pub(crate) struct Boundary {
    pub(crate) node: Arc<RowNode>,
    pub(crate) fixed: Arc<Piece>,
    pub(crate) engine: u64,
}

/// The complete, sealed state of a session at a committed boundary, held in memory.
///
/// Cloning shares it. Capsules of one branch share the rows they have in common; dropping one gives back its fixed
/// state, and the rows once no other capsule or slot descends from them.
#[derive(Clone)]
pub struct Capsule(pub(crate) Arc<Boundary>);

impl Capsule {
    pub(crate) fn new(node: Arc<RowNode>, fixed: Arc<Piece>, engine: u64) -> Self {
        let boundary = Arc::new(Boundary { node, fixed, engine });
        *boundary.node.boundary.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::downgrade(&boundary);
        Self(boundary)
    }

    /// Tokens read at the boundary.
    pub fn position(&self) -> u32 {
        self.0.node.end()
    }

    /// Whether anybody else holds it: a clone of this, or a slot that goes on from it.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Those tokens.
    pub fn tokens(&self) -> Vec<u32> {
        path(Some(&self.0.node)).iter().flat_map(|n| n.tokens.iter().copied()).collect()
    }

    /// The identity of the boundary's rows.
    pub fn lineage(&self) -> LineageId {
        self.0.node.id
    }

    /// How the rows were made.
    pub fn history(&self) -> &History {
        &self.0.node.history
    }

    /// Bytes of state that only a boundary at this position needs: the fixed state.
    pub fn fixed_bytes(&self) -> usize {
        self.0.fixed.bytes()
    }

    /// Bytes of the rows since the parent boundary, shared with all descendants.
    pub fn own_row_bytes(&self) -> usize {
        self.0.node.rows.as_ref().map_or(0, |r| r.bytes())
    }

    /// Bytes of all rows up to the boundary: own and shared.
    pub fn row_bytes(&self) -> usize {
        path(Some(&self.0.node)).iter().map(|n| n.rows.as_ref().map_or(0, |r| r.bytes())).sum()
    }
}

impl std::fmt::Debug for Capsule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capsule")
            .field("position", &self.position())
            .field("lineage", &self.lineage())
            .finish_non_exhaustive()
    }
}
