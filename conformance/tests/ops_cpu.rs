//! The op suite on the CPU backend: near the reference, and the same bits whatever the threads and the instructions.

mod common;

use ampoule_conformance::ops::{SuiteOptions, run_against};
use ampoule_cpu::{CpuBackend, Isa};

#[test]
fn the_cpu_passes() {
    common::whole_suite(&CpuBackend::new(2), Vec::new());
}

#[test]
fn the_cpu_passes_cases_of_random_shape() {
    common::random_cases(&CpuBackend::new(3), &[]);
}

#[test]
fn instruction_paths_and_thread_counts_give_the_same_bits() {
    let options = SuiteOptions::default();
    let one = CpuBackend::new(1).with_isa(Isa::Portable);
    for (isa, threads) in [(Isa::Avx2, 2), (Isa::Avx512, 3)] {
        if isa.available() {
            let report = run_against(&CpuBackend::new(threads).with_isa(isa), &one, &options);
            assert!(report.is_ok(), "{isa}: {report}");
        }
    }
}
