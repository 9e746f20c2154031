//! What the op tests of all backends share.

use ampoule_backend::Backend;
use ampoule_conformance::ops::{Choice, Ignore, SuiteOptions, run, run_specs};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// The whole suite with the default seed.
pub(crate) fn whole_suite(backend: &dyn Backend, ignore: Vec<Ignore>) {
    let report = run(backend, &SuiteOptions { ignore, random_cases: 0, ..SuiteOptions::default() });
    println!("{report}");
    assert!(report.is_ok(), "{report}");
    assert!(report.unused_ignores.is_empty(), "{report}");
    assert!(report.run > 1000, "the suite has shrunk: {report}");
}

fn choice() -> impl Strategy<Value = Choice> {
    let sizes = [0..10_000_usize, 0..10_000, 0..10_000];
    (0..12_usize, 0..40_usize, 0..20_usize, sizes, 0..10_000_usize, any::<u32>()).prop_map(
        |(op, rows, spare, sizes, position, variant)| Choice {
            op,
            rows,
            spare,
            sizes,
            position,
            variant: variant as usize,
        },
    )
}

/// Random shapes, a fixed number from a fixed seed; what fails is shrunk.
///
/// `AMPOULE_CONFORMANCE_CASES` asks for another number.
pub(crate) fn random_cases(backend: &dyn Backend, ignore: &[Ignore]) {
    let cases = std::env::var("AMPOULE_CONFORMANCE_CASES")
        .ok()
        .map_or(300, |text| text.parse().expect("a number of cases"));
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let strategy = (choice(), any::<u64>());
    let result = runner.run(&strategy, |(choice, seed)| {
        let options = SuiteOptions { seed, ignore: ignore.to_vec(), ..SuiteOptions::default() };
        let report = run_specs(backend, &[choice.spec()], &options, &mut |_| {});
        prop_assert!(report.is_ok(), "seed {seed}: {report}");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
