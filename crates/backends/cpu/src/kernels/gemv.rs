//! One row times a matrix: weights are streamed once.
//!
//! Order: lane `l` sums the products of `k = l, l + 16, ...` with fused multiply-add, then the lanes are summed as
//! [`Simd::sum`] does. [`super::gemm`] keeps the same order.

use ampoule_plan::{BLOCK, DType};

use super::weights::{load, offset, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd};

/// Weight rows that run together, so that their chains of additions overlap.
const ROWS: usize = 4;
/// Blocks whose scales are converted ahead of use.
const AHEAD: usize = 32;
/// How far ahead of the row at hand to ask for memory, in bytes.
const PREFETCH: usize = 4096;

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

/// Scales and minima of some blocks of some rows.
type Scales = [[[f32; 4]; AHEAD]; ROWS];

impl Kernel for Gemv {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let mut scales: Scales = [[[0.0; 4]; AHEAD]; ROWS];
        let mut first = self.from;
        while first < self.to {
            let n = (self.to - first).min(LANES);
            let mut sums = [s.zero(); LANES];
            let mut i = 0;
            while i < n {
                // A group that is cut short repeats its last row.
                let last = n - 1;
                let row = |r: usize| self.weight.row(first + (i + r).min(last)).cast_const();
                let rows: [*const u8; ROWS] = [row(0), row(1), row(2), row(3)];
                // SAFETY: the promise of `Gemv`: rows and `x` have the weight's columns.
                let part = unsafe { dot_rows(s, &self.weight, rows, self.x, &mut scales) };
                sums[i..(i + ROWS).min(LANES)].copy_from_slice(&part[..ROWS.min(LANES - i)]);
                i += ROWS;
            }
            // SAFETY: the promise of `Gemv`.
            unsafe { self.sink.put(s, self.row, first, n, s.sum16(&sums)) };
            first += LANES;
        }
    }
}

/// The lanes of the dot products of `x` with some rows of the weight.
///
/// # Safety
/// Rows and `x` must have the weight's columns.
#[inline(always)]
unsafe fn dot_rows<S: Simd>(
    s: S,
    weight: &Mat,
    rows: [*const u8; ROWS],
    x: *const f32,
    scales: &mut Scales,
) -> [S::V; ROWS] {
    // SAFETY: the caller's promise.
    unsafe {
        match weight.dtype {
            DType::F32 => dot_floats::<S, F32>(s, rows, weight.cols, x),
            DType::F16 => dot_floats::<S, F16>(s, rows, weight.cols, x),
            DType::BF16 => dot_floats::<S, Bf16>(s, rows, weight.cols, x),
            DType::Q8_0 => dot_blocks::<S, Q8>(s, rows, weight.cols, x, scales),
            DType::Q4_0 => dot_blocks::<S, Q4>(s, rows, weight.cols, x, scales),
            _ => dot_blocks::<S, Q41>(s, rows, weight.cols, x, scales),
        }
    }
}

/// A plain float type.
trait Float {
    const DTYPE: DType;
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const DTYPE: DType = DType::F32;
}
impl Float for F16 {
    const DTYPE: DType = DType::F16;
}
impl Float for Bf16 {
    const DTYPE: DType = DType::BF16;
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
    let line = 64 / F::DTYPE.block_bytes();
    // SAFETY: the caller's promise; prefetches need none.
    unsafe {
        let mut k = 0;
        while k < whole {
            let a = s.load(x.add(k));
            for r in 0..ROWS {
                if k % line == 0 {
                    s.prefetch(rows[r].wrapping_add(k * F::DTYPE.block_bytes() + PREFETCH));
                }
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

    /// # Safety
    /// `block` must be a whole block.
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: &[f32; 4]) -> (S::V, S::V);
}

struct Q8;
struct Q4;
struct Q41;

impl Blocks for Q8 {
    const DTYPE: DType = DType::Q8_0;

    #[inline(always)]
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: &[f32; 4]) -> (S::V, S::V) {
        // SAFETY: a block has 2 + 32 bytes.
        unsafe { (s.decode8(block.add(2), &scale[0]), s.decode8(block.add(18), &scale[0])) }
    }
}

impl Blocks for Q4 {
    const DTYPE: DType = DType::Q4_0;

    #[inline(always)]
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: &[f32; 4]) -> (S::V, S::V) {
        // SAFETY: a block has 2 + 16 bytes.
        unsafe { s.decode4_0(block.add(2), &scale[0]) }
    }
}

impl Blocks for Q41 {
    const DTYPE: DType = DType::Q4_1;

    #[inline(always)]
    unsafe fn decode<S: Simd>(s: S, block: *const u8, scale: &[f32; 4]) -> (S::V, S::V) {
        // SAFETY: a block has 4 + 16 bytes.
        unsafe { s.decode4_1(block.add(4), &scale[0], &scale[1]) }
    }
}

/// # Safety
/// Rows and `x` must have `cols` elements.
#[inline(always)]
unsafe fn dot_blocks<S: Simd, B: Blocks>(
    s: S,
    rows: [*const u8; ROWS],
    cols: usize,
    x: *const f32,
    scales: &mut Scales,
) -> [S::V; ROWS] {
    let mut sums = [s.zero(); ROWS];
    let mut start = 0;
    while start < cols {
        let blocks = ((cols - start) / BLOCK).min(AHEAD);
        let at = offset(B::DTYPE, start);
        // SAFETY: the caller's promise; the first 8 bytes of a block are its own; prefetches need no promise.
        unsafe {
            // Scales go through memory, from where broadcasting them costs no shuffle.
            for r in 0..ROWS {
                for b in 0..blocks {
                    let block = rows[r].add(at + b * B::DTYPE.block_bytes());
                    s.widen4(block, &mut scales[r][b]);
                }
            }
            for b in 0..blocks {
                let a = s.load(x.add(start + b * BLOCK));
                let c = s.load(x.add(start + b * BLOCK + LANES));
                for r in 0..ROWS {
                    let block = rows[r].add(at + b * B::DTYPE.block_bytes());
                    s.prefetch(block.wrapping_add(PREFETCH));
                    let (low, high) = B::decode(s, block, &scales[r][b]);
                    sums[r] = s.fma(a, low, sums[r]);
                    sums[r] = s.fma(c, high, sums[r]);
                }
            }
        }
        start += blocks * BLOCK;
    }
    sums
}
