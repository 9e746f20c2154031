//! Pieces of capsules: what can be moved between memories as a whole, or be away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ampoule_backend::{Frozen, Region, Residence};

use crate::chain::TensorBytes;
use crate::engine::Engine;
use crate::lineage::{Capsule, RowNode};
use crate::{BackendError, EngineError};

/// Rows of a node, or the fixed state of a boundary. Nodes of equal rows share one.
pub(crate) struct Piece {
    id: u64,
    kind: PieceKind,
    regions: Vec<Region>,
    bytes: usize,
    /// Position of the boundary at its end.
    position: u32,
    /// The state; `None` while it is away.
    state: Mutex<Option<Arc<dyn Frozen>>>,
}

static NEXT_PIECE: AtomicU64 = AtomicU64::new(1);

impl Piece {
    pub(crate) fn new(kind: PieceKind, position: u32, frozen: Arc<dyn Frozen>) -> Arc<Self> {
        Arc::new(Self {
            id: NEXT_PIECE.fetch_add(1, Ordering::Relaxed),
            kind,
            regions: frozen.regions().to_vec(),
            bytes: frozen.bytes(),
            position,
            state: Mutex::new(Some(frozen)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Frozen>>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub(crate) fn is_away(&self) -> bool {
        self.lock().is_none()
    }

    pub(crate) fn frozen(&self) -> Result<Arc<dyn Frozen>, EngineError> {
        self.lock().clone().ok_or_else(|| self.away())
    }

    /// That it is not in memory.
    pub(crate) const fn away(&self) -> EngineError {
        EngineError::Away { position: self.position }
    }

    pub(crate) fn put(&self, frozen: Arc<dyn Frozen>) {
        *self.lock() = Some(frozen);
    }
}

/// Which part of a capsule a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PieceKind {
    /// The rows between a boundary and its parent, shared by every capsule below.
    Rows,
    /// The fixed state of one boundary.
    Fixed,
}

/// A piece of a capsule that is held in memory: it can be moved, and be given up while its bytes are kept elsewhere.
///
/// A capsule whose pieces are not all in memory cannot be restored, saved or exported until they are back: the error is
/// [`EngineError::Away`], and nothing has changed then.
#[derive(Clone)]
pub struct StatePiece(Arc<Piece>);

impl StatePiece {
    /// Names the piece for as long as the process lives: equal for two capsules that share it.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Which part it is.
    pub fn kind(&self) -> PieceKind {
        self.0.kind
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// In which memory it lies; `None` while it is away.
    pub fn residence(&self) -> Option<Residence> {
        self.0.lock().as_ref().map(|frozen| frozen.residence())
    }

    /// Gives its memory back. Whoever calls has its bytes, and brings them back with [`Engine::bring_back`].
    pub fn give_up(&self) {
        let state = self.0.lock().take();
        drop(state);
    }
}

impl std::fmt::Debug for StatePiece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatePiece")
            .field("id", &self.id())
            .field("kind", &self.kind())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl Capsule {
    /// What the capsule is made of: for each node of its chain, from the root on, its rows (`None` where it has none or
    /// shares those of a node before it), and the fixed state.
    pub fn pieces(&self) -> (Vec<Option<StatePiece>>, StatePiece) {
        let nodes = crate::lineage::path(Some(&self.0.node));
        let rows = |node: &Arc<RowNode>| node.rows.clone().map(StatePiece);
        (nodes.iter().map(rows).collect(), StatePiece(Arc::clone(&self.0.fixed)))
    }
}

impl Engine {
    /// Where the device's frozen state lies: the memory from which a restore is fastest.
    pub fn residence(&self) -> Residence {
        self.program.residence()
    }

    /// Bytes of rows and of fixed state that a snapshot of the slot would take now; both are 0 for one that is there.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn snapshot_bytes(&self, slot: crate::SlotId) -> Result<(usize, usize), EngineError> {
        let entry = self.slot(slot)?;
        let still = entry.tail.is_empty() && entry.events.is_empty();
        let boundary = entry.chain.as_ref().and_then(|node| node.boundary());
        if still && boundary.is_some_and(|boundary| !boundary.fixed.is_away()) {
            return Ok((0, 0));
        }
        let table = &self.model.model().buffers;
        let sum = |regions: &[Region]| regions.iter().map(|r| r.bytes(table)).sum();
        let (start, end) =
            (entry.position() as usize - entry.tail.len(), entry.position() as usize);
        let rows = sum(&self.state.rows(&(start..end)));
        Ok((rows, sum(self.state.fixed())))
    }

    /// Moves a piece into the other memory, where there are two. All capsules that share it go on from there.
    ///
    /// # Errors
    /// If it is away, that memory is full, or the device fails; the piece stays where it was.
    pub fn move_piece(&mut self, piece: &StatePiece, to: Residence) -> Result<(), EngineError> {
        let frozen = piece.0.frozen()?;
        if frozen.residence() != to {
            let moved = self.program.relocate(&frozen, to)?;
            piece.0.put(moved);
        }
        Ok(())
    }

    /// Brings a piece back that was given up, into that memory; does nothing where it is not away.
    ///
    /// # Errors
    /// If the bytes have not its size, that memory is full, or the device fails; it stays away.
    pub fn bring_back(
        &mut self,
        piece: &StatePiece,
        bytes: &impl TensorBytes,
        to: Residence,
    ) -> Result<(), EngineError> {
        if piece.0.is_away() {
            let parts: Vec<&[u8]> =
                piece.0.regions.iter().map(|r| bytes.tensor(self.tensor_index(r))).collect();
            let frozen = self.program.freeze_bytes(&piece.0.regions, &parts)?;
            let frozen = if frozen.residence() == to {
                frozen
            } else {
                self.program.relocate(&frozen, to)?
            };
            piece.0.put(frozen);
        }
        Ok(())
    }

    /// Frozen state where the device can thaw it.
    pub(crate) fn here(
        &mut self,
        frozen: Arc<dyn Frozen>,
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let here = self.program.residence();
        if frozen.residence() == here { Ok(frozen) } else { self.program.relocate(&frozen, here) }
    }
}
