//! The kernels. Each says in its documentation in which order it sums; nothing else decides a result's bits.

pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod delta;
pub(crate) mod gemm;
pub(crate) mod gemv;
pub(crate) mod prefill_attention;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod sample;
pub(crate) mod weights;
