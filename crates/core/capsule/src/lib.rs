//! Execution-state capsules: what one is, and its file format.
#![forbid(unsafe_code)]
