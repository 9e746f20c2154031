//! Sixteen lanes in two AVX2 registers.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof that the CPU has AVX2, FMA and F16C: only [`run`] makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// # Safety
/// The CPU must have the features; else as [`Kernel::run`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.run(Avx2(())) }
}

/// Lanes 0 to 7 and 8 to 15.
#[derive(Clone, Copy)]
pub(super) struct Pair(__m256, __m256);

/// Intrinsics that need nothing but the features.
macro_rules! featured {
    ($body:expr) => {{
        // SAFETY: a value of `Avx2` proves that the CPU has the features.
        unsafe { $body }
    }};
}

macro_rules! lanewise {
    ($($name:ident($($arg:ident),*) = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Pair),*) -> Pair {
            featured!(Pair($intrinsic($($arg.0),*), $intrinsic($($arg.1),*)))
        }
    )*};
}

#[inline(always)]
fn scale_half(_: Avx2, y: __m256, t: __m256) -> __m256 {
    featured!({
        let n = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(0x4b40_0000));
        let half = _mm256_srai_epi32::<1>(n);
        let bias = _mm256_set1_epi32(127);
        let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
        let rest = _mm256_add_epi32(_mm256_sub_epi32(n, half), bias);
        let second = _mm256_slli_epi32::<23>(rest);
        let y = _mm256_mul_ps(y, _mm256_castsi256_ps(first));
        _mm256_mul_ps(y, _mm256_castsi256_ps(second))
    })
}

/// Eight floats as bfloat16 in the low half of each 32-bit lane.
#[inline(always)]
fn narrow_half(_: Avx2, a: __m256) -> __m256i {
    featured!({
        let bits = _mm256_castps_si256(a);
        let upper = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        let bump = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bump));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
        _mm256_blendv_epi8(rounded, quiet, nan)
    })
}

/// Sixteen bytes, each below 16, as floats.
#[inline(always)]
fn floats(_: Avx2, q: __m128i) -> Pair {
    featured!(Pair(
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q)),
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(q))),
    ))
}

/// The low and the high nibbles of 16 bytes as floats.
///
/// # Safety
/// `p` must hold 16 readable bytes.
#[inline(always)]
unsafe fn nibbles(s: Avx2, p: *const u8) -> (Pair, Pair) {
    // SAFETY: the caller's promise, and the features.
    unsafe {
        let packed = _mm_loadu_si128(p.cast());
        let low = _mm_set1_epi8(15);
        (
            floats(s, _mm_and_si128(packed, low)),
            floats(s, _mm_and_si128(_mm_srli_epi16::<4>(packed), low)),
        )
    }
}

impl Simd for Avx2 {
    type V = Pair;

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        featured!(Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }

    lanewise! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        max(a, b) = _mm256_max_ps;
        min(a, b) = _mm256_min_ps;
        fma(a, b, c) = _mm256_fmadd_ps;
    }

    #[inline(always)]
    fn scale_by_power(self, y: Pair, t: Pair) -> Pair {
        Pair(scale_half(self, y.0, t.0), scale_half(self, y.1, t.1))
    }

    #[inline(always)]
    fn sum(self, a: Pair) -> f32 {
        featured!({
            let s8 = _mm256_add_ps(a.0, a.1);
            let s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps::<1>(s8));
            let s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
            _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps::<1>(s2, s2)))
        })
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Pair {
        // SAFETY: the caller's promise, and the features.
        unsafe { Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Pair) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            _mm256_storeu_ps(p, a.0);
            _mm256_storeu_ps(p.add(8), a.1);
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Pair {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            Pair(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, a: Pair) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a.1));
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Pair {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: Pair) {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let packed = _mm256_packus_epi32(narrow_half(self, a.0), narrow_half(self, a.1));
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }

    #[inline(always)]
    unsafe fn widen4(self, p: *const u8, out: &mut [f32; 4]) {
        // SAFETY: the caller's promise, and the features.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_cvtph_ps(_mm_loadl_epi64(p.cast()))) };
    }

    #[inline(always)]
    unsafe fn decode8(self, p: *const u8, d: f32) -> Pair {
        // SAFETY: the caller's promise, and the features.
        unsafe {
            let q = _mm_loadu_si128(p.cast());
            let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
            let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(q)));
            self.mul(Pair(low, high), self.splat(d))
        }
    }

    #[inline(always)]
    unsafe fn decode4_0(self, p: *const u8, d: f32) -> (Pair, Pair) {
        // SAFETY: the caller's promise.
        let (low, high) = unsafe { nibbles(self, p) };
        let (d, eight) = (self.splat(d), self.splat(8.0));
        (self.mul(self.sub(low, eight), d), self.mul(self.sub(high, eight), d))
    }

    #[inline(always)]
    unsafe fn decode4_1(self, p: *const u8, d: f32, m: f32) -> (Pair, Pair) {
        // SAFETY: the caller's promise.
        let (low, high) = unsafe { nibbles(self, p) };
        let (d, m) = (self.splat(d), self.splat(m));
        (self.fma(low, d, m), self.fma(high, d, m))
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        featured!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}
