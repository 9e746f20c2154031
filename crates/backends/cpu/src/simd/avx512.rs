//! Sixteen lanes in one AVX-512 register.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::{Kernel, LANES, Simd};

/// Proof that the CPU has AVX-512 F, BW, VL, DQ, AVX2, FMA and F16C: only [`run`] makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// # Safety
/// The CPU must have the features; else as [`Kernel::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.run(Avx512(())) }
}

/// Intrinsics that need nothing but the features.
macro_rules! featured {
    ($body:expr) => {{
        // SAFETY: a value of `Avx512` proves that the CPU has the features.
        unsafe { $body }
    }};
}

/// The two halves added crosswise: `[a0 + a2, a1 + a3, b0 + b2, b1 + b3]` in blocks of four lanes.
#[inline(always)]
fn fold8(_: Avx512, a: __m512, b: __m512) -> __m512 {
    featured!(_mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b)))
}

#[inline(always)]
fn fold4(_: Avx512, a: __m512, b: __m512) -> __m512 {
    featured!(_mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b)))
}

#[inline(always)]
fn fold2(_: Avx512, a: __m512, b: __m512) -> __m512 {
    featured!(_mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xEE>(a, b)))
}

#[inline(always)]
fn fold1(_: Avx512, a: __m512, b: __m512) -> __m512 {
    featured!(_mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b)))
}

/// Four lanes each of vectors `i`, `i + 4`, `i + 8`, `i + 12`.
#[inline(always)]
fn quad(s: Avx512, v: &[__m512; LANES], i: usize) -> __m512 {
    fold4(s, fold8(s, v[i], v[i + 4]), fold8(s, v[i + 8], v[i + 12]))
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    if n >= LANES { !0 } else { (1_u16 << n) - 1 }
}

impl Simd for Avx512 {
    type V = __m512;

    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        featured!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        featured!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        featured!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        featured!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        featured!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        featured!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        featured!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        featured!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn scale_by_power(self, y: __m512, t: __m512) -> __m512 {
        featured!({
            let n = _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(0x4b40_0000));
            let half = _mm512_srai_epi32::<1>(n);
            let bias = _mm512_set1_epi32(127);
            let first = _mm512_slli_epi32::<23>(_mm512_add_epi32(half, bias));
            let rest = _mm512_add_epi32(_mm512_sub_epi32(n, half), bias);
            let second = _mm512_slli_epi32::<23>(rest);
            let y = _mm512_mul_ps(y, _mm512_castsi512_ps(first));
            _mm512_mul_ps(y, _mm512_castsi512_ps(second))
        })
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        featured!({
            let s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps::<1>(s8));
            let s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
            _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps::<1>(s2, s2)))
        })
    }

    #[inline(always)]
    fn sum16(self, v: &[__m512; LANES]) -> __m512 {
        let even = fold2(self, quad(self, v, 0), quad(self, v, 1));
        let odd = fold2(self, quad(self, v, 2), quad(self, v, 3));
        fold1(self, even, odd)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's promise, and the features.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        // SAFETY: the caller's promise, and the features.
        unsafe { _mm512_storeu_ps(p, a) };
    }

    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: the caller's promise, and the features; masked lanes are not touched.
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }

    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, a: __m512, n: usize) {
        // SAFETY: the caller's promise, and the features; masked lanes are not touched.
        unsafe { _mm512_mask_storeu_ps(p, mask(n), a) };
    }

    #[inline(always)]
    fn highest(self, a: __m512) -> f32 {
        featured!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller's promise, and the features.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, a: __m512) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: __m512) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let bits = _mm512_castps_si512(a);
            let upper = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            let bump = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bump));
            let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
            let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(chosen));
        }
    }

    #[inline(always)]
    unsafe fn widen4(self, p: *const u8, out: &mut [f32; 4]) {
        // SAFETY: the caller's promise, and the features.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_cvtph_ps(_mm_loadl_epi64(p.cast()))) };
    }

    #[inline(always)]
    unsafe fn decode8(self, p: *const u8, d: f32) -> __m512 {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let q = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
            _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(d))
        }
    }

    #[inline(always)]
    unsafe fn decode4_0(self, p: *const u8, d: f32) -> (__m512, __m512) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let steps = _mm512_setr_ps(
                -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
                7.0,
            );
            lookup(p, _mm512_mul_ps(steps, _mm512_set1_ps(d)))
        }
    }

    #[inline(always)]
    unsafe fn decode4_1(self, p: *const u8, d: f32, m: f32) -> (__m512, __m512) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let steps = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0,
                15.0,
            );
            lookup(p, _mm512_fmadd_ps(steps, _mm512_set1_ps(d), _mm512_set1_ps(m)))
        }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [__m512; LANES]) {
        featured!({
            let mut t = *rows;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..4 {
                // Four rows to columns, within each block of four lanes.
                u[4 * i] = _mm512_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 1] = _mm512_shuffle_ps::<0xEE>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                u[4 * i + 3] = _mm512_shuffle_ps::<0xEE>(t[4 * i + 1], t[4 * i + 3]);
            }
            for i in 0..4 {
                // u[4 g + i] holds, in block b, column 4 b + i of rows 4 g .. 4 g + 4.
                let low = _mm512_shuffle_f32x4::<0x88>(u[i], u[4 + i]);
                let low_odd = _mm512_shuffle_f32x4::<0xDD>(u[i], u[4 + i]);
                let high = _mm512_shuffle_f32x4::<0x88>(u[8 + i], u[12 + i]);
                let high_odd = _mm512_shuffle_f32x4::<0xDD>(u[8 + i], u[12 + i]);
                rows[i] = _mm512_shuffle_f32x4::<0x88>(low, high);
                rows[8 + i] = _mm512_shuffle_f32x4::<0xDD>(low, high);
                rows[4 + i] = _mm512_shuffle_f32x4::<0x88>(low_odd, high_odd);
                rows[12 + i] = _mm512_shuffle_f32x4::<0xDD>(low_odd, high_odd);
            }
        });
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        featured!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}

/// The entries of a table of 16 for the low and the high nibbles of 16 bytes.
///
/// # Safety
/// `p` must hold 16 readable bytes, and the CPU have the features.
#[inline(always)]
unsafe fn lookup(p: *const u8, table: __m512) -> (__m512, __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        // The permutation looks at the low four bits of an index alone.
        let low = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        let high = _mm512_srli_epi32::<4>(low);
        (_mm512_permutexvar_ps(low, table), _mm512_permutexvar_ps(high, table))
    }
}
