//! Kernel parameters, laid out as the structs of the same name in `kernels/*.cu`.

use ampoule_plan::DType;

/// `View`: a rectangle of floats.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MatrixView {
    pub(crate) at: u64,
    pub(crate) ld: i64,
    pub(crate) dtype: i32,
    pub(crate) vec: i32,
}

/// The code of a float type in the kernels.
pub(crate) const fn dtype_code(dtype: DType) -> i32 {
    match dtype {
        DType::BF16 => 1,
        DType::F16 => 2,
        _ => 0,
    }
}

/// The part of a kernel's name that says the type.
pub(crate) const fn dtype_suffix(code: i32) -> &'static str {
    match code {
        1 => "bf16",
        2 => "f16",
        _ => "f32",
    }
}

impl MatrixView {
    /// A view at an address; finds out whether groups of four are aligned.
    pub(crate) fn new(at: u64, ld: usize, dtype: DType) -> Self {
        let quad = 4 * dtype.block_bytes() as u64;
        let vec = at.is_multiple_of(quad) && ld.is_multiple_of(4);
        Self { at, ld: ld as i64, dtype: dtype_code(dtype), vec: i32::from(vec) }
    }

    /// Bytes of an element.
    pub(crate) const fn element(&self) -> u64 {
        if self.dtype == 0 { 4 } else { 2 }
    }

    /// The same view from row `row` on.
    pub(crate) const fn at_row(mut self, row: usize) -> Self {
        self.at += row as u64 * self.ld as u64 * self.element();
        self
    }
}

/// `Words`: a rectangle of 32-bit words.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WordView {
    pub(crate) at: u64,
    pub(crate) ld: i64,
}

/// Most linears in one launch of the matrix-vector kernel.
pub(crate) const SEGMENTS: usize = 6;

/// What the matrix-vector kernel does with a row's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Store = 0,
    Add = 1,
    Conv = 2,
    Pair = 3,
}

/// `Segment` of `products.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) w: u64,
    pub(crate) w2: u64,
    pub(crate) bias: u64,
    pub(crate) bias2: u64,
    pub(crate) out: MatrixView,
    pub(crate) out2: MatrixView,
    pub(crate) out3: MatrixView,
    pub(crate) conv_weight: u64,
    pub(crate) conv_bias: u64,
    pub(crate) conv_state: u64,
    pub(crate) rows: i32,
    pub(crate) mode: i32,
    pub(crate) taps: i32,
    pub(crate) first_unit: i32,
}

/// `Gemv` of `products.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gemv {
    pub(crate) x: MatrixView,
    pub(crate) normed: MatrixView,
    pub(crate) norm_weight: u64,
    pub(crate) eps: f32,
    pub(crate) centered: i32,
    pub(crate) k: i32,
    pub(crate) segments: i32,
    pub(crate) units: i32,
    pub(crate) pad: i32,
    pub(crate) segment: [Segment; SEGMENTS],
}

/// Most products in one launch: `CHAIN` in `chain.cu`.
pub(crate) const CHAIN: usize = 4;

/// `Chain` of `chain.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chain {
    pub(crate) turn: u64,
    pub(crate) phases: i32,
    pub(crate) depth: i32,
    pub(crate) near: i32,
    pub(crate) x_bytes: i32,
    pub(crate) phase: [Gemv; CHAIN],
}

/// `HeadNorm` of `elementwise.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HeadNorm {
    pub(crate) x: MatrixView,
    pub(crate) out: MatrixView,
    pub(crate) weight: u64,
    pub(crate) heads: i32,
    pub(crate) centered: i32,
    pub(crate) eps: f32,
    pub(crate) pad: i32,
}

/// `Attention` of `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AttentionArgs {
    pub(crate) query: MatrixView,
    pub(crate) key: MatrixView,
    pub(crate) value: MatrixView,
    pub(crate) out: MatrixView,
    pub(crate) gate: MatrixView,
    pub(crate) gated: MatrixView,
    pub(crate) cursor: u64,
    pub(crate) count: u64,
    pub(crate) sums: u64,
    pub(crate) partial: u64,
    pub(crate) cache_rows: i64,
    pub(crate) rows: i32,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) splits: i32,
    pub(crate) vec: i32,
    pub(crate) scale: f32,
    pub(crate) parts: i32,
    pub(crate) stages: i32,
    pub(crate) early: i32,
    pub(crate) pack: i32,
    pub(crate) pad: i32,
}

/// `Delta` of `recurrent.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeltaArgs {
    pub(crate) qkv: MatrixView,
    pub(crate) decay: MatrixView,
    pub(crate) beta: MatrixView,
    pub(crate) out: MatrixView,
    pub(crate) a_log: u64,
    pub(crate) dt_bias: u64,
    pub(crate) count: u64,
    pub(crate) state: u64,
    pub(crate) rows: i32,
    pub(crate) key_heads: i32,
    pub(crate) value_heads: i32,
    pub(crate) key_dim: i32,
    pub(crate) value_dim: i32,
    pub(crate) columns: i32,
    pub(crate) gate: MatrixView,
    pub(crate) normed: MatrixView,
    pub(crate) norm_weight: u64,
    pub(crate) done: u64,
    pub(crate) eps: f32,
    pub(crate) early: i32,
}

/// `Sample` of `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SampleArgs {
    pub(crate) logits: u64,
    pub(crate) params: u64,
    pub(crate) seed: u64,
    pub(crate) bias_tokens: u64,
    pub(crate) bias_values: u64,
    pub(crate) cursor: u64,
    pub(crate) forced: u64,
    pub(crate) counts: u64,
    pub(crate) adjusted: u64,
    pub(crate) token: u64,
    pub(crate) mirror: u64,
    pub(crate) work: u64,
    pub(crate) vocabulary: i32,
    pub(crate) biases: i32,
    pub(crate) slice: i32,
    pub(crate) pad: i32,
}

/// `Piece` of `memory.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Piece {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernels() {
        assert_eq!(size_of::<MatrixView>(), 24);
        assert_eq!(size_of::<Segment>(), 4 * 8 + 3 * 24 + 3 * 8 + 16);
        assert_eq!(size_of::<Chain>(), 24 + CHAIN * size_of::<Gemv>());
        // A kernel's parameters have 4 KiB.
        assert!(size_of::<Chain>() <= 4096);
        assert_eq!(size_of::<Gemv>(), 80 + SEGMENTS * size_of::<Segment>());
        assert_eq!(size_of::<HeadNorm>(), 72);
        assert_eq!(size_of::<AttentionArgs>(), 6 * 24 + 5 * 8 + 12 * 4);
        assert_eq!(size_of::<DeltaArgs>(), 4 * 24 + 4 * 8 + 6 * 4 + 2 * 24 + 2 * 8 + 8);
        assert_eq!(size_of::<SampleArgs>(), 12 * 8 + 16);
        assert!(size_of::<Gemv>() <= 4096);
    }

    #[test]
    fn alignment_of_groups_of_four_is_seen() {
        assert_eq!(MatrixView::new(256, 8, DType::BF16).vec, 1);
        assert_eq!(MatrixView::new(258, 8, DType::BF16).vec, 0);
        assert_eq!(MatrixView::new(264, 8, DType::F32).vec, 0);
        assert_eq!(MatrixView::new(256, 6, DType::F32).vec, 0);
    }
}
