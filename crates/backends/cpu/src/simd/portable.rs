//! Sixteen lanes in plain Rust: the definition the other paths are held to.

use half::{bf16, f16};

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(super) struct Portable;

fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|l| f(a[l], b[l]))
}

/// # Safety
/// `p` must hold 16 readable bytes.
unsafe fn bytes(p: *const u8) -> [u8; 16] {
    // SAFETY: the caller's promise; arrays of bytes have no alignment.
    unsafe { p.cast::<[u8; 16]>().read() }
}

impl Simd for Portable {
    type V = [f32; LANES];

    const WIDE: bool = false;

    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }

    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }

    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }

    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }

    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|l| a[l].mul_add(b[l], c[l]))
    }

    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    fn scale_by_power(self, y: Self::V, t: Self::V) -> Self::V {
        zip(y, t, |y, t| {
            let n = (t.to_bits() as i32).wrapping_sub(0x4b40_0000);
            let half = n >> 1;
            let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
            y * power(half) * power(n.wrapping_sub(half))
        })
    }

    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }

    unsafe fn store(self, p: *mut f32, a: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(a) };
    }

    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32_const())
    }

    unsafe fn store_f16(self, p: *mut u16, a: Self::V) {
        let bits = a.map(|x| f16::from_f32_const(x).to_bits());
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) };
    }

    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }

    unsafe fn store_bf16(self, p: *mut u16, a: Self::V) {
        let bits = a.map(|x| bf16::from_f32(x).to_bits());
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) };
    }

    unsafe fn widen4(self, p: *const u8, out: &mut [f32; 4]) {
        // SAFETY: the caller's promise.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        *out = bits.map(|b| f16::from_bits(b).to_f32_const());
    }

    unsafe fn decode8(self, p: *const u8, d: f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { bytes(p) }.map(|q| d * f32::from(q.cast_signed()))
    }

    unsafe fn decode4_0(self, p: *const u8, d: f32) -> (Self::V, Self::V) {
        // SAFETY: the caller's promise.
        let packed = unsafe { bytes(p) };
        let value = |q: u8| d * (f32::from(q) - 8.0);
        (packed.map(|q| value(q & 15)), packed.map(|q| value(q >> 4)))
    }

    unsafe fn decode4_1(self, p: *const u8, d: f32, m: f32) -> (Self::V, Self::V) {
        // SAFETY: the caller's promise.
        let packed = unsafe { bytes(p) };
        let value = |q: u8| d * f32::from(q) + m;
        (packed.map(|q| value(q & 15)), packed.map(|q| value(q >> 4)))
    }
}
