//! Attention of many token rows together, in the order of [`super::attention`].
//!
//! The keys of a block are transposed once for all rows, so that a vector holds one element of 16 keys. Each of the
//! 16 partial sums that a dot product's lanes would hold is then a vector of its own, and the sum of the lanes a sum
//! of vectors in the same order: no shuffles, the same bits.

use super::attention::{Heads, KEYS, Sums, begin, cache_rows, finish, merge, softmax, widen};
use super::weights::F32;
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd};

/// Queries (rows times heads of a group) of one tile, about.
const QUERIES: usize = 96;

impl Heads {
    /// Token rows of one tile.
    pub(crate) fn tile_rows(&self) -> usize {
        (QUERIES / self.group()).max(1)
    }

    /// Elements of scratch that [`RowTile`] needs.
    pub(crate) fn tile_scratch(&self) -> usize {
        let queries = self.tile_rows() * self.group();
        2 * KEYS * self.padded() + queries * (self.padded() + KEYS + 2 * self.partial())
    }
}

/// Some token rows for the query heads of one KV head.
///
/// Safe to run if operands are as [`Mat`] says, rows `0..position + row + 1` of the caches exist for every row,
/// `scratch` has [`Heads::tile_scratch`] elements, and nobody else touches those or the outputs.
pub(crate) struct RowTile {
    pub(crate) shape: Heads,
    pub(crate) query: Mat,
    pub(crate) keys: Mat,
    pub(crate) values: Mat,
    pub(crate) out: Mat,
    pub(crate) position: usize,
    /// At most [`Heads::tile_rows`].
    pub(crate) rows: std::ops::Range<usize>,
    pub(crate) kv_head: usize,
    pub(crate) scratch: *mut f32,
}

impl Kernel for RowTile {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let shape = self.shape;
        let (padded, group, size) = (shape.padded(), shape.group(), shape.partial());
        let queries = self.rows.len() * group;
        let (space, rest) = (self.scratch, self.scratch.wrapping_add(KEYS * padded));
        let (transposed, rest) = (rest, rest.wrapping_add(KEYS * padded));
        let (query, rest) = (rest, rest.wrapping_add(queries * padded));
        let (weights, rest) = (rest, rest.wrapping_add(queries * KEYS));
        let (parts, totals) = (rest, rest.wrapping_add(queries * size));
        // SAFETY: the promise of `RowTile`.
        unsafe {
            for q in 0..queries {
                let row = self.query.row(self.rows.start + q / group);
                let from = (self.kv_head * group + q % group) * shape.head_dim;
                widen(s, &self.query, row, from, shape.head_dim, query.add(q * padded));
                begin(&shape, totals.add(q * size));
            }
            let keys_in_all = self.position + self.rows.end;
            let mut start = 0;
            while start < keys_in_all {
                let count = (keys_in_all - start).min(KEYS);
                let at = self.kv_head * shape.head_dim;
                let rows = start..start + count;
                let keys = cache_rows(s, &self.keys, rows.clone(), at, shape.head_dim, space);
                let mut first = 0;
                while first < count {
                    let mut d = 0;
                    while d < padded {
                        let mut tile = [s.zero(); LANES];
                        for i in 0..LANES.min(count - first) {
                            tile[i] = s.load(keys.row(first + i).cast::<f32>().add(d));
                        }
                        s.transpose(&mut tile);
                        for i in 0..LANES {
                            s.store(transposed.add((d + i) * KEYS + first), tile[i]);
                        }
                        d += LANES;
                    }
                    first += LANES;
                }
                // The first row that sees a key of this block.
                let seen = (start + 1).saturating_sub(self.position + 1 + self.rows.start) * group;
                self.scores(s, query, transposed, weights, seen, queries, start);
                for q in seen..queries {
                    let part = parts.add(q * size);
                    let n = self.limit(q, start);
                    let (highest, sum) = softmax(s, weights.add(q * KEYS), n);
                    *part.add(padded) = highest;
                    *part.add(padded + 1) = sum;
                }
                // The decoded keys are done with; their space serves the values.
                let values = cache_rows(s, &self.values, rows, at, shape.head_dim, space);
                let mut q = seen;
                while q < queries {
                    let sums = |q: usize| Sums {
                        weights: weights.wrapping_add(q * KEYS),
                        values,
                        vectors: padded / LANES,
                        out: parts.wrapping_add(q * size),
                        out_stride: size,
                    };
                    // What all of them see, then the rest of each.
                    let together = self.limit(q, start);
                    let done = sums(q).some_queries::<S, F32>(s, queries - q, 0, together);
                    for one in q..q + done {
                        let n = self.limit(one, start);
                        if n > together {
                            sums(one).some_queries::<S, F32>(s, 1, together, n);
                        }
                    }
                    q += done;
                }
                for q in seen..queries {
                    merge(s, &shape, totals.add(q * size), parts.add(q * size));
                }
                start += KEYS;
            }
            for q in 0..queries {
                let head = self.kv_head * group + q % group;
                let row = self.rows.start + q / group;
                finish(s, &shape, totals.add(q * size), &self.out, row, head);
            }
        }
    }
}

impl RowTile {
    /// How many keys of the block that starts at `start` a query sees.
    #[inline(always)]
    fn limit(&self, q: usize, start: usize) -> usize {
        let end = self.position + self.rows.start + q / self.shape.group() + 1;
        end.saturating_sub(start).min(KEYS)
    }

    /// Scores of queries `from..to`, as far as each sees, or further.
    ///
    /// # Safety
    /// As `RowTile` says.
    #[inline(always)]
    unsafe fn scores<S: Simd>(
        &self,
        s: S,
        query: *const f32,
        transposed: *const f32,
        scores: *mut f32,
        from: usize,
        to: usize,
        start: usize,
    ) {
        let padded = self.shape.padded();
        let mut q = from;
        while q < to {
            let count = if to - q >= 3 && S::WIDE { 3 } else { 1 };
            let n = self.limit(q + count - 1, start);
            let mut first = 0;
            while first < n {
                // SAFETY: the caller's promise; a row of scores has room for all keys of a block.
                unsafe {
                    let dots = Dots {
                        query: query.add(q * padded),
                        transposed: transposed.add(first),
                        padded,
                        scale: self.shape.scale,
                        out: scores.add(q * KEYS + first),
                    };
                    match (count, S::WIDE) {
                        (3, _) => dots.run::<S, 3, 2>(s),
                        (_, true) => dots.run::<S, 1, 2>(s),
                        _ => dots.run::<S, 1, 1>(s),
                    }
                }
                first += if S::WIDE { 2 * LANES } else { LANES };
            }
            q += count;
        }
    }
}

/// Dot products of some queries with some vectors of keys.
struct Dots {
    query: *const f32,
    transposed: *const f32,
    padded: usize,
    scale: f32,
    out: *mut f32,
}

type Cells<V, const Q: usize, const K: usize> = [[V; K]; Q];

impl Dots {
    /// # Safety
    /// The queries and keys must exist.
    #[inline(always)]
    unsafe fn run<S: Simd, const Q: usize, const K: usize>(&self, s: S) {
        // SAFETY: the caller's promise.
        unsafe {
            let sums = add(s, &self.two::<S, Q, K>(s, 0), &self.two::<S, Q, K>(s, 1));
            for q in 0..Q {
                for k in 0..K {
                    let score = s.mul(sums[q][k], s.splat(self.scale));
                    s.store(self.out.add(q * KEYS + k * LANES), score);
                }
            }
        }
    }

    /// What lanes `l`, `l + 2`, ... add up to.
    #[inline(always)]
    unsafe fn two<S: Simd, const Q: usize, const K: usize>(
        &self,
        s: S,
        l: usize,
    ) -> Cells<S::V, Q, K> {
        // SAFETY: the caller's promise.
        unsafe { add(s, &self.four::<S, Q, K>(s, l), &self.four::<S, Q, K>(s, l + 2)) }
    }

    /// What lanes `l`, `l + 4`, ... add up to.
    #[inline(always)]
    unsafe fn four<S: Simd, const Q: usize, const K: usize>(
        &self,
        s: S,
        l: usize,
    ) -> Cells<S::V, Q, K> {
        // SAFETY: the caller's promise.
        unsafe { add(s, &self.eight::<S, Q, K>(s, l), &self.eight::<S, Q, K>(s, l + 4)) }
    }

    /// What lanes `l` and `l + 8` add up to.
    #[inline(always)]
    unsafe fn eight<S: Simd, const Q: usize, const K: usize>(
        &self,
        s: S,
        l: usize,
    ) -> Cells<S::V, Q, K> {
        // SAFETY: the caller's promise.
        unsafe { add(s, &self.lane::<S, Q, K>(s, l), &self.lane::<S, Q, K>(s, l + 8)) }
    }

    /// Lane `l`: the products of elements `l, l + 16, ...`.
    #[inline(always)]
    unsafe fn lane<S: Simd, const Q: usize, const K: usize>(
        &self,
        s: S,
        l: usize,
    ) -> Cells<S::V, Q, K> {
        let mut sums = [[s.zero(); K]; Q];
        let mut d = l;
        while d < self.padded {
            // SAFETY: the caller's promise.
            unsafe {
                let mut keys = [s.zero(); K];
                for k in 0..K {
                    keys[k] = s.load(self.transposed.add(d * KEYS + k * LANES));
                }
                for q in 0..Q {
                    let query = s.splat(*self.query.add(q * self.padded + d));
                    for k in 0..K {
                        sums[q][k] = s.fma(query, keys[k], sums[q][k]);
                    }
                }
            }
            d += LANES;
        }
        sums
    }
}

#[inline(always)]
fn add<S: Simd, const Q: usize, const K: usize>(
    s: S,
    a: &Cells<S::V, Q, K>,
    b: &Cells<S::V, Q, K>,
) -> Cells<S::V, Q, K> {
    let mut sums = *a;
    for q in 0..Q {
        for k in 0..K {
            sums[q][k] = s.add(a[q][k], b[q][k]);
        }
    }
    sums
}
