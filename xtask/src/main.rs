//! Project chores: dependency arrows, goldens, bundles.
#![forbid(unsafe_code)]
fn main() {}
