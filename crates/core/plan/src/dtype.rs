//! Element types, with the exact byte layouts of the quantised blocks.

use std::fmt;
use std::str::FromStr;

/// The element type of a buffer.
///
/// All multi-byte values are little-endian. The three block types are GGML's: a block holds
/// [`BLOCK`] consecutive elements of a row (source: the GGUF specification and `ggml-common.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE-754 binary32.
    F32,
    /// IEEE-754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// 32-bit signed integer.
    I32,
    /// 32-bit unsigned integer.
    U32,
    /// One byte.
    U8,
    /// 34 bytes a block: f16 scale `d`, then 32 signed bytes `q`; value = `d * q`.
    Q8_0,
    /// 18 bytes a block: f16 scale `d`, then 16 bytes; byte `i` holds element `i` in its low and element
    /// `i + 16` in its high nibble; value = `d * (nibble - 8)`.
    Q4_0,
    /// 20 bytes a block: f16 scale `d`, f16 minimum `m`, then 16 bytes as in `Q4_0`; value = `d * nibble + m`.
    Q4_1,
}

/// Elements in one quantised block.
pub const BLOCK: usize = 32;

impl DType {
    /// Every type, in the order of the enum.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::U32,
        Self::U8,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
    ];

    /// Elements that share one block: 1 for plain types, [`BLOCK`] for quantised ones.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => BLOCK,
            _ => 1,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 => 1,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
        }
    }

    /// Bytes of `elements` consecutive elements, or `None` when they do not fill whole blocks or overflow.
    pub const fn bytes_for(self, elements: usize) -> Option<usize> {
        let per_block = self.block_elements();
        if !elements.is_multiple_of(per_block) {
            return None;
        }
        (elements / per_block).checked_mul(self.block_bytes())
    }

    /// Whether the type holds real numbers (as opposed to integers).
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::I32 | Self::U32 | Self::U8)
    }

    /// Whether the type is a quantised block type.
    pub const fn is_quantized(self) -> bool {
        self.block_elements() > 1
    }

    /// The lower-case name used in the plan's text form and in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::U8 => "u8",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no element type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown element type '{0}'; known are f32 f16 bf16 i32 u32 u8 q8_0 q4_0 q4_1")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|d| d.name() == text)
            .ok_or_else(|| UnknownDType(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_blocks_are_ggml_sizes() {
        for d in DType::ALL {
            assert_eq!(d.name().parse::<DType>().unwrap(), d);
        }
        assert_eq!(DType::Q4_1.bytes_for(64), Some(40));
        assert_eq!(DType::Q8_0.bytes_for(32), Some(34));
        assert_eq!(DType::Q4_0.bytes_for(33), None);
        assert_eq!(DType::F32.bytes_for(usize::MAX), None);
        assert!("q4_k".parse::<DType>().is_err());
    }
}
