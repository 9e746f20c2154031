//! Many rows times a matrix.
//!
//! Order: that of [`super::gemv`], so a row's result does not depend on how many rows run with it. Tiles change
//! only what is in a cache when; where `K` is cut, the lanes go on from where they were.

use super::gemv::Sink;
use super::weights::decode;
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd};

/// Weight rows decoded at a time.
pub(crate) const PANEL: usize = 12;
/// Elements of `k` at a time, about: a panel of them stays in the first cache level.
const DEPTH: usize = 640;
/// Token rows at a time, at most.
const TOKENS: usize = 192;
/// Elements of `x` at a time, about: they stay in the second cache level.
const BLOCK_ELEMENTS: usize = 1 << 18;

/// How a product is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    /// Token rows at a time.
    pub(crate) tokens: usize,
    /// Elements of `k` at a time; a multiple of 32.
    depth: usize,
    /// Columns of `x`.
    cols: usize,
}

impl Tiling {
    /// For `rows` token rows of `cols` elements.
    pub(crate) fn new(rows: usize, cols: usize) -> Self {
        let cuts = cols.div_ceil(DEPTH);
        let depth = cols.div_ceil(cuts).next_multiple_of(32);
        let tokens = rows.div_ceil(rows.div_ceil(most_tokens(cols))).next_multiple_of(6);
        Self { tokens, depth, cols }
    }

    /// Elements of scratch that one thread needs, however many rows there are: a panel, and the lanes of its sums.
    pub(crate) fn most_scratch(cols: usize) -> usize {
        PANEL * DEPTH.next_multiple_of(32) + most_tokens(cols).next_multiple_of(6) * PANEL * LANES
    }

    fn panel_elements(&self) -> usize {
        PANEL * self.depth
    }
}

/// Token rows at a time, at most, for rows of `cols` elements.
fn most_tokens(cols: usize) -> usize {
    (BLOCK_ELEMENTS / cols).clamp(24, TOKENS)
}

/// Rows `tokens` of `x` times weight rows `from..` ([`PANEL`] of them or what is left).
///
/// Safe to run if operands are as [`Mat`] says, `x` is of f32, `scratch` has [`Tiling::most_scratch`] elements that
/// nobody else uses, and nobody else touches those outputs.
pub(crate) struct Gemm {
    pub(crate) tiling: Tiling,
    pub(crate) x: Mat,
    pub(crate) weight: Mat,
    pub(crate) sink: Sink,
    pub(crate) tokens: std::ops::Range<usize>,
    pub(crate) from: usize,
    pub(crate) scratch: *mut f32,
}

/// One tile's operands.
struct Tile {
    x: *const f32,
    /// Elements from one row of `x` to the next.
    stride: usize,
    /// Vectors of `k`; the last has `tail` elements.
    vectors: usize,
    tail: usize,
    /// Decoded weights: of each vector of `k`, all rows of the strip.
    strip: *const f32,
    /// Lanes so far, and where they go.
    lanes: *mut f32,
    resume: bool,
}

impl Kernel for Gemm {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the promise of `Gemm`.
        unsafe {
            if S::WIDE {
                self.product::<S, 6, 4>(s);
            } else {
                self.product::<S, 2, 2>(s);
            }
        }
    }
}

impl Gemm {
    /// Tiles of `M` token rows and `N` weight rows.
    ///
    /// # Safety
    /// As `Gemm` says.
    #[inline(always)]
    unsafe fn product<S: Simd, const M: usize, const N: usize>(self, s: S) {
        let Tiling { depth, cols, .. } = self.tiling;
        let rows = (self.weight.rows - self.from).min(PANEL);
        let panel = self.scratch;
        let lanes = self.scratch.wrapping_add(self.tiling.panel_elements());
        let strips = rows.div_ceil(N);
        let mut start = 0;
        while start < cols {
            let len = (cols - start).min(depth);
            let vectors = len.div_ceil(LANES);
            let last = start + len == cols;
            // SAFETY: the promise of `Gemm`; the panel holds `PANEL * depth` elements.
            unsafe { self.fill_panel::<S, N>(s, panel, start, len, strips) };
            let mut t = self.tokens.start;
            while t < self.tokens.end {
                let m = (self.tokens.end - t).min(M);
                for strip in 0..strips {
                    // SAFETY: the promise of `Gemm`: scratch has lanes for every token row and panel row.
                    unsafe {
                        let place = (t - self.tokens.start) * PANEL + strip * N * M;
                        let tile = Tile {
                            x: self.x.at(t, start).cast(),
                            stride: self.x.stride / 4,
                            vectors,
                            tail: len - (vectors - 1) * LANES,
                            strip: panel.add(strip * N * depth),
                            lanes: lanes.add(place * LANES),
                            resume: start > 0,
                        };
                        let n = (rows - strip * N).min(N);
                        self.tile::<S, M, N>(s, &tile, m, n, t, strip, last);
                    }
                }
                t += M;
            }
            start += len;
        }
    }

    /// Decodes elements `start..start + len` of the panel's rows; rows past the weight's last repeat it.
    ///
    /// # Safety
    /// As `Gemm` says.
    #[inline(always)]
    unsafe fn fill_panel<S: Simd, const N: usize>(
        &self,
        s: S,
        panel: *mut f32,
        start: usize,
        len: usize,
        strips: usize,
    ) {
        for row in 0..strips * N {
            let from = self.weight.row((self.from + row).min(self.weight.rows - 1));
            let to = panel.wrapping_add(row / N * N * self.tiling.depth + row % N * LANES);
            // SAFETY: the caller's promise.
            unsafe { decode(s, self.weight.dtype, from, start, len, to, N * LANES) };
        }
    }

    /// # Safety
    /// As `Gemm` says.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        tile: &Tile,
        m: usize,
        n: usize,
        t: usize,
        strip: usize,
        last: bool,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match m {
                1 => self.finish::<S, 1, N>(s, tile, n, t, strip, last),
                2 => self.finish::<S, 2, N>(s, tile, n, t, strip, last),
                3 if M > 2 => self.finish::<S, 3, N>(s, tile, n, t, strip, last),
                4 if M > 2 => self.finish::<S, 4, N>(s, tile, n, t, strip, last),
                5 if M > 2 => self.finish::<S, 5, N>(s, tile, n, t, strip, last),
                _ => self.finish::<S, M, N>(s, tile, n, t, strip, last),
            }
        }
    }

    /// # Safety
    /// As `Gemm` says.
    #[inline(always)]
    unsafe fn finish<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        tile: &Tile,
        n: usize,
        t: usize,
        strip: usize,
        last: bool,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let sums = multiply::<S, M, N>(s, tile);
            if !last {
                for i in 0..M {
                    for j in 0..N {
                        s.store(tile.lanes.add((i * N + j) * LANES), sums[i][j]);
                    }
                }
                return;
            }
            let mut flat = [s.zero(); LANES];
            let per_turn = LANES / N;
            let mut i = 0;
            while i < M {
                let rows = (M - i).min(per_turn);
                for r in 0..rows {
                    for j in 0..N {
                        flat[r * N + j] = sums[i + r][j];
                    }
                }
                let totals = s.lanes(s.sum16(&flat));
                for r in 0..rows {
                    let mut row = [0.0; LANES];
                    row[..N].copy_from_slice(&totals[r * N..(r + 1) * N]);
                    self.sink.put(s, t + i + r, self.from + strip * N, n, s.from_lanes(&row));
                }
                i += rows;
            }
        }
    }
}

/// Multiplies `M` rows of `x` with `N` decoded rows, lane by lane.
///
/// # Safety
/// The tile's rows must be readable for its vectors.
#[inline(always)]
unsafe fn multiply<S: Simd, const M: usize, const N: usize>(s: S, tile: &Tile) -> [[S::V; N]; M] {
    let mut sums = [[s.zero(); N]; M];
    // SAFETY: the caller's promise.
    unsafe {
        if tile.resume {
            for i in 0..M {
                for j in 0..N {
                    sums[i][j] = s.load(tile.lanes.add((i * N + j) * LANES));
                }
            }
        }
        let whole = if tile.tail == LANES { tile.vectors } else { tile.vectors - 1 };
        let mut x = tile.x;
        let mut w = tile.strip;
        for _ in 0..whole {
            let mut b = [s.zero(); N];
            for j in 0..N {
                b[j] = s.load(w.add(j * LANES));
            }
            for i in 0..M {
                let a = s.load(x.add(i * tile.stride));
                for j in 0..N {
                    sums[i][j] = s.fma(a, b[j], sums[i][j]);
                }
            }
            x = x.add(LANES);
            w = w.add(N * LANES);
        }
        if whole < tile.vectors {
            for i in 0..M {
                let a = s.load_n(x.add(i * tile.stride), tile.tail);
                for j in 0..N {
                    sums[i][j] = s.fma(a, s.load(w.add(j * LANES)), sums[i][j]);
                }
            }
        }
    }
    sums
}
