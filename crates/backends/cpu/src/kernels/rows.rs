//! Ops that treat each row alone: norms, gates, look-ups, conversions.

use std::ops::Range;

use super::weights::{decode, load, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd, sigmoid, silu};

/// `out = x / sqrt(mean(x^2) + eps) * (offset + weight)`, times `silu(gate)` where there is a gate.
///
/// Order: lane `l` sums the squares of elements `l, l + 16, ...`, then the lanes are summed as [`Simd::sum`] does.
///
/// Safe to run if operands are as [`Mat`] says and nobody else touches the rows.
pub(crate) struct Norm {
    pub(crate) x: Mat,
    pub(crate) gate: Option<Mat>,
    pub(crate) weight: Mat,
    pub(crate) out: Mat,
    pub(crate) eps: f32,
    pub(crate) offset: f32,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Norm {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let width = self.weight.cols;
        for row in self.rows.clone() {
            let (x, out) = (self.x.row(row), self.out.row(row));
            let mut start = 0;
            while start < self.x.cols {
                let mut squares = s.zero();
                // SAFETY: the promise of `Norm`: the group's elements exist in x, gate, weight and out.
                unsafe {
                    let mut k = 0;
                    while k < width {
                        let a = load(s, self.x.dtype, x, start + k, (width - k).min(LANES));
                        squares = s.fma(a, a, squares);
                        k += LANES;
                    }
                    let mean = s.sum(squares) / width as f32;
                    let scale = s.splat(1.0 / (mean + self.eps).sqrt());
                    let mut k = 0;
                    while k < width {
                        let n = (width - k).min(LANES);
                        let a = load(s, self.x.dtype, x, start + k, n);
                        let w = load(s, self.weight.dtype, self.weight.row(0), k, n);
                        let w = s.add(s.splat(self.offset), w);
                        let mut y = s.mul(s.mul(a, scale), w);
                        if let Some(gate) = &self.gate {
                            y = s.mul(y, silu(s, load(s, gate.dtype, gate.row(row), start + k, n)));
                        }
                        store(s, self.out.dtype, out, start + k, n, y);
                        k += LANES;
                    }
                }
                start += width;
            }
        }
    }
}

/// What [`Gate`] computes of `a` and `b`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum GateKind {
    /// `a * sigmoid(b)`
    Sigmoid,
    /// `silu(a) * b`
    SwiGlu,
}

/// An element-wise function of two operands.
///
/// Safe to run if operands are as [`Mat`] says and nobody else touches the elements.
pub(crate) struct Gate {
    pub(crate) kind: GateKind,
    pub(crate) a: Mat,
    pub(crate) b: Mat,
    pub(crate) out: Mat,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Gate {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for row in self.rows.clone() {
            let mut k = 0;
            while k < self.out.cols {
                let n = (self.out.cols - k).min(LANES);
                // SAFETY: the promise of `Gate`.
                unsafe {
                    let a = load(s, self.a.dtype, self.a.row(row), k, n);
                    let b = load(s, self.b.dtype, self.b.row(row), k, n);
                    let y = match self.kind {
                        GateKind::Sigmoid => s.mul(a, sigmoid(s, b)),
                        GateKind::SwiGlu => s.mul(silu(s, a), b),
                    };
                    store(s, self.out.dtype, self.out.row(row), k, n, y);
                }
                k += LANES;
            }
        }
    }
}

/// Elements decoded at a time.
const CHUNK: usize = 512;

/// Converts row `from` of `source`, or zeros, to row `to` of `out`, and fills the row up with zeros to `padded`
/// elements.
///
/// Safe to run if operands are as [`Mat`] says, `out` is of a plain float type, has room for the padding, and
/// nobody else touches the row.
pub(crate) struct ConvertRow {
    pub(crate) source: Mat,
    pub(crate) from: Option<usize>,
    pub(crate) out: Mat,
    pub(crate) to: usize,
    pub(crate) padded: usize,
}

impl Kernel for ConvertRow {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let to = self.out.row(self.to);
        let mut values = [0.0_f32; CHUNK];
        let mut start = 0;
        while start < self.padded {
            let len = (self.padded - start).min(CHUNK);
            // SAFETY: the promise of `ConvertRow`; the array has room for a chunk.
            unsafe {
                let wanted = self.source.cols.saturating_sub(start).min(len);
                if wanted < len {
                    values = [0.0; CHUNK];
                }
                if let Some(from) = self.from
                    && wanted > 0
                {
                    let row = self.source.row(from);
                    decode(s, self.source.dtype, row, start, wanted, values.as_mut_ptr(), LANES);
                }
                let mut k = 0;
                while k < len {
                    let n = (len - k).min(LANES);
                    let a = s.load(values.as_ptr().add(k));
                    store(s, self.out.dtype, to, start + k, n, a);
                    k += LANES;
                }
            }
            start += len;
        }
    }
}
