//! Plans: typed ops over named static buffers, checked and sealed.
#![forbid(unsafe_code)]

mod dtype;

pub use dtype::{BLOCK, DType, UnknownDType};
