//! Random trees of boundaries, against a model that copies everything.

use ampoule::backends::{CpuBackend, ReferenceBackend};
use ampoule_conformance::capsules::trees;

#[test]
fn random_trees_on_the_cpu() {
    println!("{}", trees(&CpuBackend::new(1), 100_000).unwrap());
}

#[test]
fn random_trees_on_the_reference() {
    println!("{}", trees(&ReferenceBackend, 2_000).unwrap());
}
