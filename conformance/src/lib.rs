//! One op suite for every backend, one capsule suite for every model.
#![forbid(unsafe_code)]

pub mod capsules;
pub mod llama;
pub mod ops;

pub mod goldens;
pub mod lineage;
pub mod nano;
