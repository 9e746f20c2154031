//! Tuned CPU kernels.
