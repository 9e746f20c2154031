//! Elements of every type as vectors, and rows of weights decoded.

use ampoule_plan::{BLOCK, DType};

use crate::simd::{LANES, Simd};

/// A plain float type.
pub(crate) trait Float {
    const DTYPE: DType;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Float for F32 {
    const DTYPE: DType = DType::F32;
}
impl Float for F16 {
    const DTYPE: DType = DType::F16;
}
impl Float for Bf16 {
    const DTYPE: DType = DType::BF16;
}

/// Loads `n <= 16` elements of a float type from element `index` on; lanes past them are zero.
///
/// # Safety
/// The elements must be readable; the type must be f32, f16 or bf16.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd>(
    s: S,
    dtype: DType,
    row: *const u8,
    index: usize,
    n: usize,
) -> S::V {
    // SAFETY: the caller's promise; the arrays have 16 elements.
    unsafe {
        if dtype == DType::F32 {
            let p = row.cast::<f32>().add(index);
            return if n >= LANES { s.load(p) } else { s.load_n(p, n) };
        }
        let p = row.cast::<u16>().add(index);
        let mut lanes = [0_u16; LANES];
        let p = if n >= LANES {
            p
        } else {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            lanes.as_ptr()
        };
        if dtype == DType::F16 { s.load_f16(p) } else { s.load_bf16(p) }
    }
}

/// Stores the first `n <= 16` lanes as elements of a float type from element `index` on, rounding to nearest even.
///
/// # Safety
/// The elements must be writable; the type must be f32, f16 or bf16.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd>(
    s: S,
    dtype: DType,
    row: *mut u8,
    index: usize,
    n: usize,
    a: S::V,
) {
    // SAFETY: the caller's promise; the array has 16 elements.
    unsafe {
        if dtype == DType::F32 {
            let p = row.cast::<f32>().add(index);
            return if n >= LANES { s.store(p, a) } else { s.store_n(p, a, n) };
        }
        let p = row.cast::<u16>().add(index);
        let mut lanes = [0_u16; LANES];
        let whole = n >= LANES;
        let to = if whole { p } else { lanes.as_mut_ptr() };
        if dtype == DType::F16 {
            s.store_f16(to, a);
        } else {
            s.store_bf16(to, a);
        }
        if !whole {
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
}

/// Bytes from the start of a row to element `index`, which must be a block's first.
#[inline(always)]
pub(crate) const fn offset(dtype: DType, index: usize) -> usize {
    index / dtype.block_elements() * dtype.block_bytes()
}

/// Decodes elements `start..start + len` of a row, `start` being a multiple of [`BLOCK`], to vectors of `f32` that
/// lie `step` elements apart. Lanes past `len` are zero.
///
/// # Safety
/// The row must hold the elements, and `to` be writable for the vectors.
#[inline(always)]
pub(crate) unsafe fn decode<S: Simd>(
    s: S,
    dtype: DType,
    row: *const u8,
    start: usize,
    len: usize,
    to: *mut f32,
    step: usize,
) {
    // SAFETY: the caller's promise; blocks of quantised types are whole, and `widen4` reads 8 bytes of a block.
    unsafe {
        if !dtype.is_quantized() {
            for i in 0..len.div_ceil(LANES) {
                let n = (len - i * LANES).min(LANES);
                let a = load(s, dtype, row, start + i * LANES, n);
                s.store(to.add(i * step), a);
            }
            return;
        }
        let mut scale = [0.0; 4];
        for b in 0..len / BLOCK {
            let block = row.add(offset(dtype, start + b * BLOCK));
            s.widen4(block, &mut scale);
            let (low, high) = match dtype {
                DType::Q8_0 => {
                    (s.decode8(block.add(2), scale[0]), s.decode8(block.add(18), scale[0]))
                }
                DType::Q4_0 => s.decode4_0(block.add(2), scale[0]),
                _ => s.decode4_1(block.add(4), scale[0], scale[1]),
            };
            s.store(to.add(2 * b * step), low);
            s.store(to.add((2 * b + 1) * step), high);
        }
    }
}
