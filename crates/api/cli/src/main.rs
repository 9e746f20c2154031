//! The ampoule command.
#![forbid(unsafe_code)]
fn main() {}
