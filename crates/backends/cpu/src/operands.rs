//! Views as addresses.

use ampoule_backend::SlotId;
use ampoule_backend::host::HostMemory;
use ampoule_plan::{BufferId, BufferTable, DType, View};

use crate::memory::AlignedBytes;

/// A view: address, distance of rows, shape.
///
/// Kernels may read all of an operand, and write all of it where the op does: [`ampoule_plan::Model::seal`] has
/// proved that views lie in their buffers, cut no block, have the shapes and types the op wants, and that nothing
/// an op writes overlaps another operand of it (but for `x` and `out` of the ops that allow it). Tasks of one call
/// write different elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat {
    base: *mut u8,
    /// Bytes from one row to the next.
    pub(crate) stride: usize,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

// SAFETY: an address and numbers; those who read or write there say why they may.
unsafe impl Send for Mat {}
// SAFETY: as above.
unsafe impl Sync for Mat {}

impl Mat {
    /// The address of a row's first element.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> *mut u8 {
        debug_assert!(row < self.rows);
        self.base.wrapping_add(row * self.stride)
    }

    /// The address of an element of a plain type.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, col: usize) -> *mut u8 {
        debug_assert!(col < self.cols);
        self.row(row).wrapping_add(col * self.dtype.block_bytes())
    }

    /// A matrix of `f32` outside the table's buffers.
    pub(crate) fn of_f32(base: *mut f32, stride: usize, rows: usize, cols: usize) -> Self {
        Self { base: base.cast(), stride: 4 * stride, dtype: DType::F32, rows, cols }
    }
}

/// Operands of one op at most.
const MOST: usize = 12;

/// Finds the addresses of one op's operands.
///
/// Each buffer's address is taken once, mutably, and used until the op is done; the memory is not borrowed
/// otherwise meanwhile.
pub(crate) struct Operands<'a> {
    table: &'a BufferTable,
    slot: SlotId,
    memory: &'a mut HostMemory<AlignedBytes>,
    found: [Option<(BufferId, *mut u8)>; MOST],
}

impl<'a> Operands<'a> {
    pub(crate) fn new(
        table: &'a BufferTable,
        slot: SlotId,
        memory: &'a mut HostMemory<AlignedBytes>,
    ) -> Self {
        Self { table, slot, memory, found: [None; MOST] }
    }

    fn address(&mut self, buffer: BufferId) -> *mut u8 {
        for entry in &mut self.found {
            match entry {
                Some((id, address)) if *id == buffer => return *address,
                Some(_) => {}
                None => {
                    let address = self.memory.bytes_mut(self.slot, buffer).as_mut_ptr();
                    *entry = Some((buffer, address));
                    return address;
                }
            }
        }
        unreachable!("no op has more than {MOST} operands")
    }

    pub(crate) fn mat(&mut self, view: &View) -> Mat {
        let buffer = &self.table[view.buffer];
        let bytes = |n: usize| buffer.dtype.bytes_for(n).expect("views cut no block");
        let stride = buffer.row_bytes();
        let offset = view.rows.start * stride + bytes(view.cols.start);
        Mat {
            base: self.address(view.buffer).wrapping_add(offset),
            stride,
            dtype: buffer.dtype,
            rows: view.height(),
            cols: view.width(),
        }
    }

    pub(crate) fn maybe(&mut self, view: Option<&View>) -> Option<Mat> {
        view.map(|v| self.mat(v))
    }

    /// The first word of a view of words.
    pub(crate) fn word(&mut self, view: &View) -> u32 {
        let mat = self.mat(view);
        // SAFETY: a checked view has at least one element, at a multiple of its size.
        unsafe { mat.row(0).cast::<u32>().read() }
    }
}
