//! Elements of every type, to and from `f32`.

use ampoule_plan::{BLOCK, DType};
use half::{bf16, f16};

/// Reads the elements of rows stored as `dtype` back to back.
///
/// Integers become the nearest `f32`. Source of the block layouts: [`DType`].
///
/// # Panics
/// If the bytes are not whole blocks.
pub fn load_elements(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let half_at = |b: &[u8], at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let word = |b: &[u8]| [b[0], b[1], b[2], b[3]];
    assert!(bytes.len().is_multiple_of(dtype.block_bytes()), "whole blocks of {dtype}");
    let blocks = bytes.chunks_exact(dtype.block_bytes());
    match dtype {
        DType::F32 => blocks.map(|b| f32::from_le_bytes(word(b))).collect(),
        DType::I32 => blocks.map(|b| i32::from_le_bytes(word(b)) as f32).collect(),
        DType::U32 => blocks.map(|b| u32::from_le_bytes(word(b)) as f32).collect(),
        DType::U8 => blocks.map(|b| f32::from(b[0])).collect(),
        DType::F16 => blocks.map(|b| half_at(b, 0)).collect(),
        DType::BF16 => blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::Q8_0 => blocks
            .flat_map(|b| {
                (0..BLOCK).map(move |i| half_at(b, 0) * f32::from(b[2 + i].cast_signed()))
            })
            .collect(),
        DType::Q4_0 => blocks
            .flat_map(|b| {
                (0..BLOCK).map(move |i| half_at(b, 0) * (f32::from(nibble(&b[2..], i)) - 8.0))
            })
            .collect(),
        DType::Q4_1 => blocks
            .flat_map(|b| {
                (0..BLOCK)
                    .map(move |i| half_at(b, 0) * f32::from(nibble(&b[4..], i)) + half_at(b, 2))
            })
            .collect(),
    }
}

/// Element `i` of a block of 16 packed bytes.
fn nibble(packed: &[u8], i: usize) -> u8 {
    if i < BLOCK / 2 { packed[i] & 15 } else { packed[i - BLOCK / 2] >> 4 }
}

/// Stores elements as `dtype`, rounding to nearest even.
///
/// # Panics
/// If the type is quantised or an integer, or the sizes differ.
pub fn store_elements(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    assert_eq!(Some(bytes.len()), dtype.bytes_for(values.len()), "one element each");
    let slots = bytes.chunks_exact_mut(dtype.block_bytes());
    for (value, slot) in values.iter().zip(slots) {
        match dtype {
            DType::F32 => slot.copy_from_slice(&value.to_le_bytes()),
            DType::F16 => slot.copy_from_slice(&f16::from_f32(*value).to_le_bytes()),
            DType::BF16 => slot.copy_from_slice(&bf16::from_f32(*value).to_le_bytes()),
            _ => panic!("no op stores reals as {dtype}"),
        }
    }
}
