//! Depthwise causal convolution.

use std::ops::Range;

use ampoule_plan::DType;

use super::weights::{load, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd, silu};

/// Some channels of all token rows, and of the state.
///
/// Order: taps from the oldest row to the newest, each with fused multiply-add onto zero; then the bias.
///
/// Safe to run if operands are as [`Mat`] says, `taps` holds the transposed weight `[K, C]`, `count` is at most the
/// rows of `x`, and nobody else touches the channels.
pub(crate) struct Conv {
    pub(crate) x: Mat,
    pub(crate) taps: Mat,
    pub(crate) bias: Option<Mat>,
    pub(crate) state: Mat,
    pub(crate) out: Mat,
    pub(crate) count: usize,
    pub(crate) channels: Range<usize>,
}

impl Conv {
    /// Row `index` of the state's rows followed by those of `x`.
    ///
    /// # Safety
    /// As `Conv` says.
    #[inline(always)]
    unsafe fn sequence<S: Simd>(&self, s: S, index: usize, c: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            match index.checked_sub(self.state.rows) {
                None => load(s, DType::F32, self.state.row(index), c, n),
                Some(t) => load(s, self.x.dtype, self.x.row(t), c, n),
            }
        }
    }
}

impl Kernel for Conv {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the promise of `Conv`; rows `t..=t + state.rows` of the sequence exist for `t < count`.
        unsafe {
            for t in 0..self.count {
                let mut c = self.channels.start;
                while c < self.channels.end {
                    let n = (self.channels.end - c).min(LANES);
                    let mut sum = s.zero();
                    for j in 0..self.taps.rows {
                        let w = load(s, DType::F32, self.taps.row(j), c, n);
                        sum = s.fma(w, self.sequence(s, t + j, c, n), sum);
                    }
                    if let Some(bias) = &self.bias {
                        sum = s.add(sum, load(s, DType::F32, bias.row(0), c, n));
                    }
                    store(s, self.out.dtype, self.out.row(t), c, n, silu(s, sum));
                    c += LANES;
                }
            }
            // Oldest first: what is read lies at or after what is written.
            for row in 0..self.state.rows {
                let mut c = self.channels.start;
                while c < self.channels.end {
                    let n = (self.channels.end - c).min(LANES);
                    let kept = self.sequence(s, self.count + row, c, n);
                    store(s, DType::F32, self.state.row(row), c, n, kept);
                    c += LANES;
                }
            }
        }
    }
}
