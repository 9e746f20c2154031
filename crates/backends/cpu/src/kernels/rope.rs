//! Rotary position embedding.

use std::ops::Range;

use ampoule_plan::RopeStyle;

use super::weights::{load, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd};

/// Writes, for each token row, the cosines and then the sines of its angles.
///
/// The angle is `position * frequency` in float32; sine and cosine are the standard library's.
pub(crate) fn fill_angles(table: &mut [f32], frequencies: &[f32], position: usize) {
    for (t, row) in table.chunks_exact_mut(2 * frequencies.len()).enumerate() {
        let (cosines, sines) = row.split_at_mut(frequencies.len());
        for ((cos, sin), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
            (*sin, *cos) = ((position + t) as f32 * frequency).sin_cos();
        }
    }
}

/// Turns the heads of some rows by the angles of [`fill_angles`].
///
/// Safe to run if operands are as [`Mat`] says, `angles` holds the rows' angles, and nobody else touches the rows.
pub(crate) struct Turn {
    pub(crate) x: Mat,
    pub(crate) angles: *const f32,
    pub(crate) pairs: usize,
    pub(crate) head_dim: usize,
    pub(crate) style: RopeStyle,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Turn {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for t in self.rows.clone() {
            let x = self.x.row(t);
            let cosines = self.angles.wrapping_add(2 * self.pairs * t);
            let sines = cosines.wrapping_add(self.pairs);
            for head in 0..self.x.cols / self.head_dim {
                let start = head * self.head_dim;
                // SAFETY: the promise of `Turn`; a head has at least twice as many elements as pairs.
                unsafe {
                    match self.style {
                        RopeStyle::Half => self.half(s, x, start, cosines, sines),
                        RopeStyle::Interleaved => self.interleaved(s, x, start, cosines, sines),
                    }
                }
            }
        }
    }
}

impl Turn {
    /// # Safety
    /// As `Turn` says, for the head that starts at element `start`.
    #[inline(always)]
    unsafe fn half<S: Simd>(
        &self,
        s: S,
        x: *mut u8,
        start: usize,
        cosines: *const f32,
        sines: *const f32,
    ) {
        let dtype = self.x.dtype;
        let mut f = 0;
        while f < self.pairs {
            let n = (self.pairs - f).min(LANES);
            // SAFETY: the caller's promise.
            unsafe {
                let (cos, sin) = (s.load_n(cosines.add(f), n), s.load_n(sines.add(f), n));
                let a = load(s, dtype, x, start + f, n);
                let b = load(s, dtype, x, start + self.pairs + f, n);
                let turned_a = s.sub(s.mul(a, cos), s.mul(b, sin));
                let turned_b = s.add(s.mul(b, cos), s.mul(a, sin));
                store(s, dtype, x, start + f, n, turned_a);
                store(s, dtype, x, start + self.pairs + f, n, turned_b);
            }
            f += LANES;
        }
    }

    /// # Safety
    /// As `Turn` says, for the head that starts at element `start`.
    #[inline(always)]
    unsafe fn interleaved<S: Simd>(
        &self,
        s: S,
        x: *mut u8,
        start: usize,
        cosines: *const f32,
        sines: *const f32,
    ) {
        const PAIRS: usize = LANES / 2;
        let dtype = self.x.dtype;
        let mut f = 0;
        while f < self.pairs {
            let n = (self.pairs - f).min(PAIRS);
            // SAFETY: the caller's promise.
            unsafe {
                let mut lanes = s.lanes(load(s, dtype, x, start + 2 * f, 2 * n));
                for i in 0..n {
                    let (cos, sin) = (*cosines.add(f + i), *sines.add(f + i));
                    let (a, b) = (lanes[2 * i], lanes[2 * i + 1]);
                    lanes[2 * i] = a * cos - b * sin;
                    lanes[2 * i + 1] = b * cos + a * sin;
                }
                store(s, dtype, x, start + 2 * f, 2 * n, s.from_lanes(&lanes));
            }
            f += PAIRS;
        }
    }
}
