//! One row times a matrix: weights are streamed once.
//!
//! Order: lane `l` sums the products of `k = l, l + 16, ...` with fused multiply-add, then the lanes are summed as
//! [`Simd::sum`] does. [`super::gemm`] keeps the same order.

use std::ops::Range;

use ampoule_plan::{BLOCK, DType};

use super::weights::{Bf16, F16, F32, Float, load, offset, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd};

/// Weight rows that run together, so that their chains of additions overlap.
const ROWS: usize = 4;
/// Blocks whose scales are converted ahead of use.
const AHEAD: usize = 512;
/// How far ahead of what is read to ask for memory, in bytes.
const PREFETCH: usize = 8192;

/// Where a product goes: `out = sum (+ bias)`, or `out += sum (+ bias)`.
#[derive(Clone, Copy)]
pub(crate) struct Sink {
    pub(crate) out: Mat,
    pub(crate) bias: Option<Mat>,
    pub(crate) add: bool,
}

impl Sink {
    /// Stores the sums of `n <= 16` outputs from column `col` on.
    ///
    /// # Safety
    /// Nobody else may touch those elements; operands are as [`Mat`] says.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&self, s: S, row: usize, col: usize, n: usize, sums: S::V) {
        // SAFETY: the caller's promise; bias has as many elements as out has columns.
        unsafe {
            let mut sums = sums;
            if let Some(bias) = &self.bias {
                sums = s.add(sums, load(s, DType::F32, bias.row(0), col, n));
            }
            let to = self.out.row(row);
            if self.add {
                sums = s.add(load(s, self.out.dtype, to, col, n), sums);
            }
            store(s, self.out.dtype, to, col, n, sums);
        }
    }
}

/// Rows `from..to` of the weight times one row of `f32`; outputs in one row of the sink.
///
/// Safe to run if operands are as [`Mat`] says, `x` is readable for the weight's columns, and nobody else touches
/// those outputs.
pub(crate) struct Gemv {
    pub(crate) x: *const f32,
    pub(crate) weight: Mat,
    pub(crate) sink: Sink,
    pub(crate) row: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// Scales (and minima) of some blocks: as they are stored, then as `f32`.
struct Scales {
    packed: [u16; 2 * AHEAD],
    wide: [f32; 2 * AHEAD],
}

impl Kernel for Gemv {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the promise of `Gemv`.
        unsafe {
            match self.weight.dtype {
                DType::F32 => self.floats::<S, F32>(s),
                DType::F16 => self.floats::<S, F16>(s),
                DType::BF16 => self.floats::<S, Bf16>(s),
                DType::Q8_0 => self.blocks::<S, Q8>(s),
                DType::Q4_0 => self.blocks::<S, Q4>(s),
                _ => self.blocks::<S, Q41>(s),
            }
        }
    }
}

impl Gemv {
    /// Rows `first..` of the weight; a group that is cut short repeats row `last`.
    #[inline(always)]
    fn group(&self, first: usize, last: usize) -> [*const u8; ROWS] {
        let mut rows = [std::ptr::null(); ROWS];
        for r in 0..ROWS {
            rows[r] = self.weight.row((first + r).min(last)).cast_const();
        }
        rows
    }

    /// # Safety
    /// As `Gemv` says.
    #[inline(always)]
    unsafe fn floats<S: Simd, F: Float>(&self, s: S) {
        let mut first = self.from;
        while first < self.to {
            let n = (self.to - first).min(LANES);
            let mut sums = [s.zero(); LANES];
            for i in (0..n).step_by(ROWS) {
                let rows = self.group(first + i, first + n - 1);
                // SAFETY: the caller's promise.
                unsafe {
                    let part = dot_floats::<S, F>(s, rows, self.weight.cols, self.x);
                    sums[i..i + ROWS].copy_from_slice(&part);
                }
            }
            // SAFETY: the caller's promise.
            unsafe { self.sink.put(s, self.row, first, n, s.sum16(&sums)) };
            first += LANES;
        }
    }

    /// # Safety
    /// As `Gemv` says.
    #[inline(always)]
    unsafe fn blocks<S: Simd, B: Blocks>(&self, s: S) {
        let mut scales = Scales { packed: [0; 2 * AHEAD], wide: [0.0; 2 * AHEAD] };
        let per_row = self.weight.cols / BLOCK;
        // Rows follow one another without gaps, so the scales of several can be converted in one go.
        let together = if per_row * LANES <= AHEAD { LANES } else { ROWS };
        let fits = per_row * together <= AHEAD;
        // The scales of all these rows are read first: what is asked for must lie beyond.
        let distance = PREFETCH + together * self.weight.stride;
        let mut first = self.from;
        while first < self.to {
            let n = (self.to - first).min(LANES);
            let mut sums = [s.zero(); LANES];
            for i in (0..n).step_by(ROWS) {
                let rows = self.group(first + i, first + n - 1);
                let part = &mut sums[i..i + ROWS];
                // SAFETY: the caller's promise; `Scales` has room for `AHEAD` blocks.
                unsafe {
                    if fits {
                        if i % together == 0 {
                            let blocks = (n - i).min(together) * per_row;
                            scales.convert::<S, B>(s, rows[0], 0, blocks);
                        }
                        let mut places = [0; ROWS];
                        for r in 0..ROWS {
                            places[r] =
                                (i % together + r).min(n - 1 - i / together * together) * per_row;
                        }
                        dot_blocks::<S, B>(
                            s,
                            rows,
                            0..per_row,
                            self.x,
                            &scales,
                            places,
                            distance,
                            part,
                        );
                        continue;
                    }
                    let each = AHEAD / ROWS;
                    for start in (0..per_row).step_by(each) {
                        let blocks = (per_row - start).min(each);
                        let mut places = [0; ROWS];
                        for r in 0..ROWS {
                            let row = rows[r].add(start * B::DTYPE.block_bytes());
                            scales.convert::<S, B>(s, row, r * each, blocks);
                            places[r] = r * each;
                        }
                        let range = start..start + blocks;
                        dot_blocks::<S, B>(s, rows, range, self.x, &scales, places, distance, part);
                    }
                }
            }
            // SAFETY: the caller's promise.
            unsafe { self.sink.put(s, self.row, first, n, s.sum16(&sums)) };
            first += LANES;
        }
    }
}

impl Scales {
    /// Converts the headers of `count` blocks that follow one another to place `at` and on. Plain moves gather
    /// them and 16 are converted at a time; broadcasting them from memory then takes nothing of the two vector ports
    /// that limit the products.
    ///
    /// # Safety
    /// The blocks must be readable, and `at + count <= AHEAD`.
    #[inline(always)]
    unsafe fn convert<S: Simd, B: Blocks>(
        &mut self,
        s: S,
        block: *const u8,
        at: usize,
        count: usize,
    ) {
        let packed = self.packed.as_mut_ptr().wrapping_add(at * B::HEADER);
        let wide = self.wide.as_mut_ptr().wrapping_add(at * B::HEADER);
        // SAFETY: the caller's promise; `AHEAD` is a multiple of 16, so whole vectors fit.
        unsafe {
            for b in 0..count {
                let header = block.add(b * B::DTYPE.block_bytes());
                if B::HEADER == 2 {
                    let both = header.cast::<[u16; 2]>().read_unaligned();
                    packed.cast::<[u16; 2]>().add(b).write_unaligned(both);
                } else {
                    // Volatile, so that it stays the one move it is: vectors of such gaps are slow.
                    packed.add(b).write_volatile(header.cast::<u16>().read_unaligned());
                }
            }
            for i in (0..count * B::HEADER).step_by(LANES) {
                s.store(wide.add(i), s.load_f16(packed.add(i)));
            }
        }
    }
}

/// Asks for `bytes` bytes that lie `distance` beyond the start of a group of rows. The rows follow one another, so
/// going through the group once asks for all of what follows it.
#[inline(always)]
fn ahead<S: Simd>(s: S, rows: *const u8, distance: usize, bytes: usize) {
    let place = rows.wrapping_add(distance);
    for line in 0..bytes.div_ceil(64) {
        s.prefetch(place.wrapping_add(line * 64));
    }
}

/// # Safety
/// Rows and `x` must have `cols` elements.
#[inline(always)]
unsafe fn dot_floats<S: Simd, F: Float>(
    s: S,
    rows: [*const u8; ROWS],
    cols: usize,
    x: *const f32,
) -> [S::V; ROWS] {
    let mut sums = [s.zero(); ROWS];
    let whole = cols / LANES * LANES;
    let bytes = F::DTYPE.block_bytes();
    // SAFETY: the caller's promise; prefetches need none.
    unsafe {
        let mut k = 0;
        while k < whole {
            let a = s.load(x.add(k));
            ahead(s, rows[0], PREFETCH + k * ROWS * bytes, LANES * ROWS * bytes);
            for r in 0..ROWS {
                sums[r] = s.fma(a, load(s, F::DTYPE, rows[r], k, LANES), sums[r]);
            }
            k += LANES;
        }
        if whole < cols {
            let n = cols - whole;
            let a = s.load_n(x.add(whole), n);
            for r in 0..ROWS {
                sums[r] = s.fma(a, load(s, F::DTYPE, rows[r], whole, n), sums[r]);
            }
        }
    }
    sums
}

/// A block type.
trait Blocks {
    const DTYPE: DType;
    /// Half-precision numbers at the start of a block.
    const HEADER: usize;

    /// # Safety
    /// `block` must be a whole block; `scale` must hold its header.
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: *const f32) -> (S::V, S::V);
}

struct Q8;
struct Q4;
struct Q41;

impl Blocks for Q8 {
    const DTYPE: DType = DType::Q8_0;
    const HEADER: usize = 1;

    #[inline(always)]
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: *const f32) -> (S::V, S::V) {
        // SAFETY: a block has 2 + 32 bytes.
        unsafe { (s.decode8(block.add(2), *scale), s.decode8(block.add(18), *scale)) }
    }
}

impl Blocks for Q4 {
    const DTYPE: DType = DType::Q4_0;
    const HEADER: usize = 1;

    #[inline(always)]
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: *const f32) -> (S::V, S::V) {
        // SAFETY: a block has 2 + 16 bytes.
        unsafe { s.decode4_0(block.add(2), *scale) }
    }
}

impl Blocks for Q41 {
    const DTYPE: DType = DType::Q4_1;
    const HEADER: usize = 2;

    #[inline(always)]
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: *const f32) -> (S::V, S::V) {
        // SAFETY: a block has 4 + 16 bytes.
        unsafe { s.decode4_1(block.add(4), *scale, *scale.add(1)) }
    }
}

/// Adds the lanes of the dot products over some blocks. `places` says where the rows' scales start, `distance` how far
/// ahead to ask for memory.
///
/// # Safety
/// Rows and `x` must have the blocks, and `scales` hold theirs.
#[inline(always)]
unsafe fn dot_blocks<S: Simd, B: Blocks>(
    s: S,
    rows: [*const u8; ROWS],
    blocks: Range<usize>,
    x: *const f32,
    scales: &Scales,
    places: [usize; ROWS],
    distance: usize,
    out: &mut [S::V],
) {
    let mut sums = [s.zero(); ROWS];
    sums.copy_from_slice(out);
    let at = offset(B::DTYPE, blocks.start * BLOCK);
    let x = x.wrapping_add(blocks.start * BLOCK);
    // SAFETY: the caller's promise; prefetches need none.
    unsafe {
        for b in 0..blocks.len() {
            let a = s.load(x.add(b * BLOCK));
            let c = s.load(x.add(b * BLOCK + LANES));
            let here = ROWS * (at + b * B::DTYPE.block_bytes());
            ahead(s, rows[0], distance + here, ROWS * B::DTYPE.block_bytes());
            for r in 0..ROWS {
                let block = rows[r].add(at + b * B::DTYPE.block_bytes());
                let scale = scales.wide.as_ptr().add((places[r] + b) * B::HEADER);
                let (low, high) = B::decode(s, block, scale);
                sums[r] = s.fma(a, low, sums[r]);
                sums[r] = s.fma(c, high, sums[r]);
            }
        }
    }
    out.copy_from_slice(&sums);
}
