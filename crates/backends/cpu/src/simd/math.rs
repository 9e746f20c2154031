//! Exponential, sigmoid and SiLU: fixed sequences of rounded operations, the same bits on every path.

use super::Simd;

/// `exp(x)`, within 2 units in the last place; 0 below about -103.97, infinity above about 88.72, NaN for NaN.
///
/// Range reduction by `ln 2` in two parts and the minimax polynomial of Cephes `expf` (Moshier).
#[inline(always)]
#[allow(clippy::excessive_precision)] // Cephes gives its coefficients so
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    // NaN stays, because max and min give their second operand then.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let t = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(MAGIC));
    let n = s.sub(t, s.splat(MAGIC));
    let r = s.fma(n, s.splat(-0.693_359_375), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_15e-4);
    p = s.fma(p, r, s.splat(1.398_199_950_7e-3));
    p = s.fma(p, r, s.splat(8.333_451_907_3e-3));
    p = s.fma(p, r, s.splat(4.166_579_589_4e-2));
    p = s.fma(p, r, s.splat(1.666_666_545_9e-1));
    p = s.fma(p, r, s.splat(5.000_000_120_1e-1));
    let y = s.fma(s.mul(r, r), p, r);
    s.scale_by_power(s.add(y, s.splat(1.0)), t)
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.zero(), x))))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}
