//! The gated delta rule.

use ampoule_plan::DType;

use super::weights::{load, store};
use crate::operands::Mat;
use crate::simd::{Kernel, LANES, Simd};

/// Tokens whose keys and queries are made ready together.
const TOKENS: usize = 16;

/// One value head of all token rows, one token after another.
///
/// Order: norms as [`Simd::sum`]; `S^T k` and `S^T q` over the key's elements from the first to the last with fused
/// multiply-add, one lane per column of the state. `S^T k` is of the state before its decay, then scaled by it.
///
/// Safe to run if operands are as [`Mat`] says, `count` is at most their token rows, `scratch` has
/// [`scratch`] elements, and nobody else touches those, the head's state or its outputs.
pub(crate) struct Delta {
    pub(crate) qkv: Mat,
    pub(crate) decay: Mat,
    pub(crate) beta: Mat,
    pub(crate) a_log: Mat,
    pub(crate) dt_bias: Mat,
    pub(crate) state: Mat,
    pub(crate) out: Mat,
    pub(crate) count: usize,
    pub(crate) key_heads: usize,
    pub(crate) value_heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) head: usize,
    pub(crate) scratch: *mut f32,
}

/// Elements of scratch that one thread needs.
pub(crate) fn scratch(key_dim: usize) -> usize {
    2 * TOKENS * key_dim.next_multiple_of(LANES)
}

/// What one token does to one head.
#[derive(Clone, Copy, Default)]
struct Step {
    /// Factor of the state.
    decay: f32,
    /// Factor of the correction.
    beta: f32,
}

impl Kernel for Delta {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let mut steps = [Step::default(); TOKENS];
        let mut first = 0;
        while first < self.count {
            let tokens = (self.count - first).min(TOKENS);
            // SAFETY: the promise of `Delta`.
            unsafe {
                for (i, step) in steps.iter_mut().enumerate().take(tokens) {
                    *step = self.prepare(s, first + i, i);
                }
                let mut j = 0;
                while j < self.value_dim {
                    j += match self.value_dim - j {
                        64.. => self.columns::<S, 4>(s, &steps, first, tokens, j),
                        32.. => self.columns::<S, 2>(s, &steps, first, tokens, j),
                        _ => self.columns::<S, 1>(s, &steps, first, tokens, j),
                    };
                }
            }
            first += tokens;
        }
    }
}

impl Delta {
    /// The place of a token's normalised key, and, behind it, of its query.
    #[inline(always)]
    fn place(&self, index: usize) -> (*mut f32, *mut f32) {
        let padded = self.key_dim.next_multiple_of(LANES);
        let key = self.scratch.wrapping_add(2 * index * padded);
        (key, key.wrapping_add(padded))
    }

    /// # Safety
    /// As `Delta` says.
    #[inline(always)]
    unsafe fn prepare<S: Simd>(&self, s: S, t: usize, index: usize) -> Step {
        let key_head = self.head / (self.value_heads / self.key_heads);
        let query_at = key_head * self.key_dim;
        let key_at = (self.key_heads + key_head) * self.key_dim;
        let (key, query) = self.place(index);
        // SAFETY: the caller's promise.
        unsafe {
            self.unit(s, t, key_at, 1.0, key);
            self.unit(s, t, query_at, (self.key_dim as f32).sqrt(), query);
            let step = softplus(self.one(s, &self.decay, t) + self.one(s, &self.dt_bias, 0));
            Step {
                decay: (-self.one(s, &self.a_log, 0).exp() * step).exp(),
                beta: 1.0 / (1.0 + (-self.one(s, &self.beta, t)).exp()),
            }
        }
    }

    /// This head's element of a row.
    ///
    /// # Safety
    /// As `Delta` says.
    #[inline(always)]
    unsafe fn one<S: Simd>(&self, s: S, mat: &Mat, row: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { s.lanes(load(s, mat.dtype, mat.row(row), self.head, 1))[0] }
    }

    /// `to = x / sqrt(sum of squares + 1e-6) / divisor`, filled up with zeros.
    ///
    /// # Safety
    /// As `Delta` says.
    #[inline(always)]
    unsafe fn unit<S: Simd>(&self, s: S, t: usize, at: usize, divisor: f32, to: *mut f32) {
        let row = self.qkv.row(t);
        let mut squares = s.zero();
        // SAFETY: the caller's promise.
        unsafe {
            let mut k = 0;
            while k < self.key_dim {
                let x = load(s, self.qkv.dtype, row, at + k, (self.key_dim - k).min(LANES));
                squares = s.fma(x, x, squares);
                k += LANES;
            }
            let scale = s.splat(1.0 / (s.sum(squares) + 1e-6).sqrt());
            let divisor = s.splat(divisor);
            let mut k = 0;
            while k < self.key_dim {
                let x = load(s, self.qkv.dtype, row, at + k, (self.key_dim - k).min(LANES));
                s.store(to.add(k), s.div(s.mul(x, scale), divisor));
                k += LANES;
            }
        }
    }

    /// Takes `N` vectors of columns, from `j` on, through some tokens; returns the number of columns.
    ///
    /// # Safety
    /// As `Delta` says.
    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize>(
        &self,
        s: S,
        steps: &[Step; TOKENS],
        first: usize,
        tokens: usize,
        j: usize,
    ) -> usize {
        let columns = (self.value_dim - j).min(N * LANES);
        let tail = columns - (N - 1) * LANES;
        let width = |v: usize| if v + 1 == N { tail } else { LANES };
        let value_at = 2 * self.key_heads * self.key_dim + self.head * self.value_dim + j;
        let state = self.state.at(self.head * self.key_dim, j).cast::<f32>();
        let stride = self.state.stride / 4;
        for i in 0..tokens {
            let (key, query) = self.place(i);
            let (decay, beta) = (s.splat(steps[i].decay), s.splat(steps[i].beta));
            let values = self.qkv.row(first + i);
            // SAFETY: the caller's promise: the state has `key_dim` rows of this head's columns.
            unsafe {
                let mut predicted = [s.zero(); N];
                for k in 0..self.key_dim {
                    let factor = s.splat(*key.add(k));
                    for v in 0..N {
                        let kept = Self::state_at(s, state.add(k * stride + v * LANES), width(v));
                        predicted[v] = s.fma(kept, factor, predicted[v]);
                    }
                }
                let mut delta = [s.zero(); N];
                for v in 0..N {
                    let value = load(s, self.qkv.dtype, values, value_at + v * LANES, width(v));
                    delta[v] = s.mul(s.sub(value, s.mul(decay, predicted[v])), beta);
                }
                let mut read = [s.zero(); N];
                for k in 0..self.key_dim {
                    let (key, query) = (s.splat(*key.add(k)), s.splat(*query.add(k)));
                    for v in 0..N {
                        let place = state.add(k * stride + v * LANES);
                        let kept = Self::state_at(s, place, width(v));
                        let next = s.fma(key, delta[v], s.mul(kept, decay));
                        store(s, DType::F32, place.cast(), 0, width(v), next);
                        read[v] = s.fma(next, query, read[v]);
                    }
                }
                let out = self.out.row(first + i);
                for v in 0..N {
                    let at = self.head * self.value_dim + j + v * LANES;
                    store(s, self.out.dtype, out, at, width(v), read[v]);
                }
            }
        }
        columns
    }

    /// # Safety
    /// `place` must be readable for `n` elements.
    #[inline(always)]
    unsafe fn state_at<S: Simd>(s: S, place: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { load(s, DType::F32, place.cast(), 0, n) }
    }
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
