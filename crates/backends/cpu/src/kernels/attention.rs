//! Attention, one token row at a time, and what it shares with [`super::prefill_attention`].
//!
//! Order, for a row and a head: keys are cut into blocks of [`KEYS`] at absolute positions. Within a block a score
//! is a dot product in lanes as in [`super::gemv`], times the scale; `m` is the highest; the weights `exp(score - m)`
//! are summed in lanes, key `j` in lane `j % 16`; values are summed key after key, one lane per element, with fused
//! multiply-add. Blocks are then merged from the first to the last by [`merge`]. So blocks can be computed anywhere,
//! and many rows together, with the same result.

use std::ops::Range;

use ampoule_plan::DType;

use super::weights::{Bf16, F16, F32, Float, decode, load, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd, exp};

/// Keys in one block.
pub(crate) const KEYS: usize = 128;

/// The shape of the heads.
#[allow(clippy::struct_field_names)] // as in the op
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
}

impl Heads {
    /// Query heads of one KV head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of a head, filled up to whole vectors.
    pub(crate) fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of a partial result: the sum of values, then the highest score and the sum of weights.
    pub(crate) fn partial(&self) -> usize {
        self.padded() + LANES
    }

    /// Elements of scratch that [`Block`] needs.
    pub(crate) fn block_scratch(&self) -> usize {
        KEYS * self.padded() + self.group() * (self.padded() + KEYS)
    }
}

/// Rows of a cache to ask for ahead of use.
const ROWS_AHEAD: usize = 16;

/// One block of keys for the query heads of some KV heads and one token row.
///
/// Safe to run if operands are as [`Mat`] says, keys `start..start + count` are rows of the caches, `scratch` has
/// [`Heads::block_scratch`] elements, `partials` has room for the heads', and nobody else touches either.
pub(crate) struct Block {
    pub(crate) shape: Heads,
    pub(crate) query: Mat,
    pub(crate) keys: Mat,
    pub(crate) values: Mat,
    pub(crate) row: usize,
    pub(crate) kv_heads: Range<usize>,
    pub(crate) start: usize,
    pub(crate) count: usize,
    pub(crate) scratch: *mut f32,
    /// The partial result of this block of head 0.
    pub(crate) partials: *mut f32,
    /// Elements to the next head's.
    pub(crate) partial_stride: usize,
}

impl Kernel for Block {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for kv_head in self.kv_heads.clone() {
            // The first head asks for the rows of all: memory likes whole rows.
            let ahead = kv_head == self.kv_heads.start;
            // SAFETY: the promise of `Block`.
            unsafe {
                self.prepare(s, kv_head, ahead);
                // Whole vectors are taken from the cache as they are, others decoded and filled up with zeros.
                let in_place = self.shape.head_dim.is_multiple_of(LANES);
                match self.keys.dtype {
                    _ if !in_place => self.scores::<S, F32>(s, kv_head, ahead, true),
                    DType::F32 => self.scores::<S, F32>(s, kv_head, ahead, false),
                    DType::F16 => self.scores::<S, F16>(s, kv_head, ahead, false),
                    _ => self.scores::<S, Bf16>(s, kv_head, ahead, false),
                }
                match self.values.dtype {
                    _ if !in_place => self.sums::<S, F32>(s, kv_head, true),
                    DType::F32 => self.sums::<S, F32>(s, kv_head, false),
                    DType::F16 => self.sums::<S, F16>(s, kv_head, false),
                    _ => self.sums::<S, Bf16>(s, kv_head, false),
                }
            }
        }
    }
}

impl Block {
    /// Room for decoded rows, for the queries of a group, and for their scores.
    #[inline(always)]
    fn places(&self) -> [*mut f32; 3] {
        let (padded, group) = (self.shape.padded(), self.shape.group());
        let queries = self.scratch.wrapping_add(KEYS * padded);
        [self.scratch, queries, queries.wrapping_add(group * padded)]
    }

    /// Widens the queries of a group.
    ///
    /// # Safety
    /// As `Block` says.
    #[inline(always)]
    unsafe fn prepare<S: Simd>(&self, s: S, kv_head: usize, ahead: bool) {
        let [_, queries, _] = self.places();
        let head_dim = self.shape.head_dim;
        if ahead {
            for row in 0..self.count.min(ROWS_AHEAD) {
                self.ask(s, &self.keys, self.start + row);
            }
        }
        for head in 0..self.shape.group() {
            let from = (kv_head * self.shape.group() + head) * head_dim;
            // SAFETY: the caller's promise.
            unsafe {
                let to = queries.add(head * self.shape.padded());
                widen(s, &self.query, self.query.row(self.row), from, head_dim, to);
            }
        }
    }

    /// The weights of the block's keys for each query of a group, with their highest scores and sums.
    ///
    /// # Safety
    /// As `Block` says; `F` is the type of the keys, or f32 where they are to be decoded.
    #[inline(always)]
    unsafe fn scores<S: Simd, F: Float>(&self, s: S, kv_head: usize, ahead: bool, decoded: bool) {
        let (padded, group) = (self.shape.padded(), self.shape.group());
        let [space, queries, scores] = self.places();
        let at = kv_head * self.shape.head_dim;
        // SAFETY: the caller's promise.
        unsafe {
            let mut first = 0;
            while first < self.count {
                let n = (self.count - first).min(LANES);
                let part = self.start + first..self.start + first + n;
                if ahead {
                    for row in part.clone() {
                        if row + ROWS_AHEAD < self.start + self.count {
                            self.ask(s, &self.keys, row + ROWS_AHEAD);
                        }
                        self.ask(s, &self.values, row);
                    }
                }
                let keys = if decoded {
                    cache_rows(s, &self.keys, part, at, self.shape.head_dim, space)
                } else {
                    Rows::of(&self.keys, part.start, at)
                };
                let mut head = 0;
                while head < group {
                    let dots = KeyDots {
                        keys,
                        n,
                        query: queries.add(head * padded),
                        vectors: padded / LANES,
                        scale: self.shape.scale,
                        out: scores.add(head * KEYS + first),
                    };
                    head += match group - head {
                        3.. if S::WIDE => dots.run::<S, F, 3>(s),
                        2.. if S::WIDE => dots.run::<S, F, 2>(s),
                        _ => dots.run::<S, F, 1>(s),
                    };
                }
                first += LANES;
            }
            for head in 0..group {
                let partial = self.partial(kv_head * group + head);
                let (highest, sum) = softmax(s, scores.add(head * KEYS), self.count);
                *partial.add(padded) = highest;
                *partial.add(padded + 1) = sum;
            }
        }
    }

    /// The sums of values for each query of a group.
    ///
    /// # Safety
    /// As `Block` says; `F` is the type of the values, or f32 where they are to be decoded.
    #[inline(always)]
    unsafe fn sums<S: Simd, F: Float>(&self, s: S, kv_head: usize, decoded: bool) {
        let group = self.shape.group();
        let [space, _, scores] = self.places();
        let at = kv_head * self.shape.head_dim;
        // SAFETY: the caller's promise.
        unsafe {
            let values = if decoded {
                let rows = self.start..self.start + self.count;
                cache_rows(s, &self.values, rows, at, self.shape.head_dim, space)
            } else {
                Rows::of(&self.values, self.start, at)
            };
            let mut head = 0;
            while head < group {
                let sums = Sums {
                    weights: scores.add(head * KEYS),
                    values,
                    vectors: self.shape.padded() / LANES,
                    out: self.partial(kv_head * group + head),
                    out_stride: self.partial_stride,
                };
                head += sums.some_queries::<S, F>(s, group - head, 0, self.count);
            }
        }
    }

    /// The partial result of a head.
    #[inline(always)]
    fn partial(&self, head: usize) -> *mut f32 {
        self.partials.wrapping_add(head * self.partial_stride)
    }

    /// Asks for the elements of all heads of this task in one row of a cache.
    #[inline(always)]
    fn ask<S: Simd>(&self, s: S, cache: &Mat, row: usize) {
        let bytes = self.kv_heads.len() * self.shape.head_dim * cache.dtype.block_bytes();
        let line = cache.at(row, self.kv_heads.start * self.shape.head_dim);
        for offset in (0..bytes).step_by(64) {
            s.prefetch(line.wrapping_add(offset));
        }
    }
}

/// Dot products of some queries with up to 16 keys.
struct KeyDots {
    keys: Rows,
    n: usize,
    query: *const f32,
    vectors: usize,
    scale: f32,
    out: *mut f32,
}

impl KeyDots {
    /// Stores the scores of `Q` queries; returns `Q`.
    ///
    /// # Safety
    /// Queries and keys must exist, and `out` have room for whole vectors.
    #[inline(always)]
    unsafe fn run<S: Simd, F: Float, const Q: usize>(&self, s: S) -> usize {
        let mut sums = [[s.zero(); LANES]; Q];
        let mut d = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while d < self.vectors {
                if self.vectors - d >= 4 {
                    self.part::<S, F, Q, 4>(s, d * LANES, &mut sums);
                    d += 4;
                } else {
                    self.part::<S, F, Q, 1>(s, d * LANES, &mut sums);
                    d += 1;
                }
            }
            for q in 0..Q {
                let dots = s.mul(s.sum16(&sums[q]), s.splat(self.scale));
                s.store(self.out.add(q * KEYS), dots);
            }
        }
        Q
    }

    /// Goes on with `D` vectors from element `at` on.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn part<S: Simd, F: Float, const Q: usize, const D: usize>(
        &self,
        s: S,
        at: usize,
        sums: &mut [[S::V; LANES]; Q],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut query = [[s.zero(); D]; Q];
            for q in 0..Q {
                for d in 0..D {
                    let row = self.query.add(q * self.vectors * LANES);
                    query[q][d] = s.load(row.add(at + d * LANES));
                }
            }
            for j in 0..self.n {
                let row = self.keys.row(j);
                let mut key = [s.zero(); D];
                for d in 0..D {
                    key[d] = load(s, F::DTYPE, row, at + d * LANES, LANES);
                }
                for q in 0..Q {
                    let mut sum = sums[q][j];
                    for d in 0..D {
                        sum = s.fma(query[q][d], key[d], sum);
                    }
                    sums[q][j] = sum;
                }
            }
        }
    }
}

/// Rows of whole vectors of a plain type.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    base: *const u8,
    /// Bytes from one row to the next.
    stride: usize,
}

impl Rows {
    /// Rows of a cache as they are, from one on, starting with column `at`.
    #[inline(always)]
    fn of(cache: &Mat, first: usize, at: usize) -> Self {
        Self { base: cache.at(first, at), stride: cache.stride }
    }

    #[inline(always)]
    pub(crate) fn row(&self, index: usize) -> *const u8 {
        self.base.wrapping_add(index * self.stride)
    }
}

/// Whether a head of a cache is whole vectors of `f32` as it is.
#[inline(always)]
fn is_in_place(cache: &Mat, head_dim: usize) -> bool {
    cache.dtype == DType::F32 && head_dim.is_multiple_of(LANES)
}

/// `head_dim` elements from column `at` on, of some rows of a cache, as whole vectors of `f32`: in place where they
/// are that already, else decoded to `space`.
///
/// # Safety
/// The rows must exist, and `space` have room for them.
#[inline(always)]
pub(crate) unsafe fn cache_rows<S: Simd>(
    s: S,
    cache: &Mat,
    rows: Range<usize>,
    at: usize,
    head_dim: usize,
    space: *mut f32,
) -> Rows {
    if is_in_place(cache, head_dim) {
        return Rows::of(cache, rows.start, at);
    }
    let stride = head_dim.next_multiple_of(LANES);
    for (i, row) in rows.enumerate() {
        // SAFETY: the caller's promise.
        unsafe { widen(s, cache, cache.row(row), at, head_dim, space.add(i * stride)) };
    }
    Rows { base: space.cast(), stride: 4 * stride }
}

/// `len` elements of a plain row from `at` on as whole vectors of `f32`.
///
/// # Safety
/// The elements must exist, and `to` have room for the vectors.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd>(
    s: S,
    mat: &Mat,
    row: *const u8,
    at: usize,
    len: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's promise; `decode` takes any start for plain types.
    unsafe { decode(s, mat.dtype, row, at, len, to, LANES) };
}

/// Turns `n` scores into weights `exp(score - highest)`, zero up to the next whole vector; returns the highest
/// score and the sum of the weights.
///
/// # Safety
/// `scores` must have `n` elements and room up to whole vectors.
#[inline(always)]
pub(crate) unsafe fn softmax<S: Simd>(s: S, scores: *mut f32, n: usize) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        for i in n..n.next_multiple_of(LANES) {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut highest = s.splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i < n {
            highest = s.max(s.load(scores.add(i)), highest);
            i += LANES;
        }
        let highest = s.highest(highest);
        let mut sum = s.zero();
        let mut i = 0;
        while i < n {
            let weight = exp(s, s.sub(s.load(scores.add(i)), s.splat(highest)));
            s.store(scores.add(i), weight);
            sum = s.add(sum, weight);
            i += LANES;
        }
        (highest, s.sum(sum))
    }
}

/// Sums of values by weight: `out[q] = sum over j of weights[q, j] * values[j]`.
pub(crate) struct Sums {
    /// [`KEYS`] elements for each query.
    pub(crate) weights: *const f32,
    pub(crate) values: Rows,
    pub(crate) vectors: usize,
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

impl Sums {
    /// Keys `from..to` for a number of queries that suits the registers, at most `most`; returns that number. Where
    /// `from` is not 0 the sums go on from what `out` holds.
    ///
    /// # Safety
    /// Queries and keys must exist.
    #[inline(always)]
    pub(crate) unsafe fn some_queries<S: Simd, F: Float>(
        &self,
        s: S,
        most: usize,
        from: usize,
        to: usize,
    ) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            match most {
                6.. if S::WIDE => self.queries::<S, F, 6>(s, from, to),
                4.. if S::WIDE => self.queries::<S, F, 4>(s, from, to),
                3.. if S::WIDE => self.queries::<S, F, 3>(s, from, to),
                _ => self.queries::<S, F, 1>(s, from, to),
            }
        }
    }

    #[inline(always)]
    unsafe fn queries<S: Simd, F: Float, const Q: usize>(
        &self,
        s: S,
        from: usize,
        to: usize,
    ) -> usize {
        let mut d = 0;
        while d < self.vectors {
            // SAFETY: the caller's promise.
            unsafe {
                if self.vectors - d >= 4 {
                    self.columns::<S, F, Q, 4>(s, from, to, d * LANES);
                    d += 4;
                } else {
                    self.columns::<S, F, Q, 1>(s, from, to, d * LANES);
                    d += 1;
                }
            }
        }
        Q
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, F: Float, const Q: usize, const D: usize>(
        &self,
        s: S,
        from: usize,
        to: usize,
        at: usize,
    ) {
        let mut sums = [[s.zero(); D]; Q];
        // SAFETY: the caller's promise.
        unsafe {
            if from > 0 {
                for q in 0..Q {
                    for d in 0..D {
                        sums[q][d] = s.load(self.out.add(q * self.out_stride + at + d * LANES));
                    }
                }
            }
            for j in from..to {
                let value = self.values.row(j);
                let mut columns = [s.zero(); D];
                for d in 0..D {
                    columns[d] = load(s, F::DTYPE, value, at + d * LANES, LANES);
                }
                for q in 0..Q {
                    let weight = s.splat(*self.weights.add(q * KEYS + j));
                    for d in 0..D {
                        sums[q][d] = s.fma(weight, columns[d], sums[q][d]);
                    }
                }
            }
            for q in 0..Q {
                for d in 0..D {
                    s.store(self.out.add(q * self.out_stride + at + d * LANES), sums[q][d]);
                }
            }
        }
    }
}

/// Starts a merge: no keys yet.
///
/// # Safety
/// `total` must have [`Heads::partial`] elements.
#[inline(always)]
pub(crate) unsafe fn begin(shape: &Heads, total: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::write_bytes(total, 0, shape.partial());
        *total.add(shape.padded()) = f32::NEG_INFINITY;
    }
}

/// Merges the next block into the total: both scaled to the higher of their highest scores, then added.
///
/// # Safety
/// Both must have [`Heads::partial`] elements.
#[inline(always)]
pub(crate) unsafe fn merge<S: Simd>(s: S, shape: &Heads, total: *mut f32, part: *const f32) {
    let padded = shape.padded();
    // SAFETY: the caller's promise.
    unsafe {
        let (old, new) = (*total.add(padded), *part.add(padded));
        let highest = if old > new { old } else { new };
        let keep = exp(s, s.splat(old - highest));
        let take = exp(s, s.splat(new - highest));
        let mut d = 0;
        while d < padded {
            let kept = s.mul(s.load(total.add(d)), keep);
            s.store(total.add(d), s.fma(s.load(part.add(d)), take, kept));
            d += LANES;
        }
        let kept = s.mul(s.splat(*total.add(padded + 1)), keep);
        let sum = s.fma(s.splat(*part.add(padded + 1)), take, kept);
        *total.add(padded) = highest;
        s.store_n(total.add(padded + 1), sum, 1);
    }
}

/// Divides the total by the sum of its weights and stores it.
///
/// # Safety
/// `total` must have [`Heads::partial`] elements, and the head must exist in the row of `out`.
#[inline(always)]
pub(crate) unsafe fn finish<S: Simd>(
    s: S,
    shape: &Heads,
    total: *const f32,
    out: &Mat,
    row: usize,
    head: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = s.splat(*total.add(shape.padded() + 1));
        let mut d = 0;
        while d < shape.head_dim {
            let n = (shape.head_dim - d).min(LANES);
            let y = s.div(s.load(total.add(d)), sum);
            store(s, out.dtype, out.row(row), head * shape.head_dim + d, n, y);
            d += LANES;
        }
    }
}

/// Merges all blocks of one head and stores the result.
///
/// Safe to run if operands are as [`Mat`] says, `partials` holds the head's blocks one after another, the last
/// followed by room for a total, and nobody else touches the head.
pub(crate) struct Merge {
    pub(crate) shape: Heads,
    pub(crate) partials: *mut f32,
    pub(crate) blocks: usize,
    pub(crate) out: Mat,
    pub(crate) row: usize,
    pub(crate) head: usize,
}

impl Kernel for Merge {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let size = self.shape.partial();
        // SAFETY: the promise of `Merge`.
        unsafe {
            let total = self.partials.add(self.blocks * size);
            begin(&self.shape, total);
            for block in 0..self.blocks {
                merge(s, &self.shape, total, self.partials.add(block * size));
            }
            finish(s, &self.shape, total, &self.out, self.row, self.head);
        }
    }
}
