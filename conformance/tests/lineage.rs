//! Random trees of boundaries, against a model that copies everything.

use ampoule::backends::{CpuBackend, ReferenceBackend};
use ampoule::{Ampoule, Backend, EngineOptions, LoadOptions};
use ampoule_conformance::lineage::{TreeOptions, random_trees};

fn load(backend: &dyn Backend, slots: usize) -> Ampoule {
    let engine = EngineOptions { slots, ..EngineOptions::default() };
    let options = LoadOptions { context: 128, engine, ..LoadOptions::default() };
    Ampoule::load_on(backend, "random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap()
}

fn grow(backend: &dyn Backend, operations: usize) {
    let options = TreeOptions { operations, ..TreeOptions::default() };
    let (mut model, mut naive) = (load(backend, options.sessions), load(backend, options.sessions));
    let report = random_trees(&mut model, &mut naive, &options, &mut |_, _| {}).unwrap();
    println!("{report:?}");
    assert!(report.operations.iter().all(|(_, times)| *times > 0), "an operation never ran");
    assert_eq!(report.left_bytes, 0, "memory stays behind");
    assert_eq!(naive.engine.capsule_bytes().0, 0, "memory stays behind in the naive model");
}

#[test]
fn random_trees_on_the_cpu() {
    grow(&CpuBackend::new(1), 100_000);
}

#[test]
fn random_trees_on_the_reference() {
    grow(&ReferenceBackend, 2_000);
}
