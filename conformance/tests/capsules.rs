//! The capsule suite on backends that need no GPU.

use ampoule::backends::{CpuBackend, ReferenceBackend};
use ampoule::{Ampoule, Backend, LoadOptions, VerifyOptions};
use ampoule_conformance::capsules::{self, CapsuleOptions};

const TINY: &str = "random:qwen3.5-tiny";

fn load(backend: &dyn Backend, model: &str) -> Ampoule {
    let options = LoadOptions { context: 512, ..LoadOptions::default() };
    Ampoule::load_on(backend, model, &options, &mut |_, _| {}).unwrap()
}

fn holds(found: Result<String, String>) {
    println!("{}", found.unwrap());
}

/// Runs the checks of this name.
fn check(backend: &dyn Backend, filter: &str, at_least: usize) {
    let options =
        CapsuleOptions { filter: filter.to_owned(), long_tokens: 700, ..CapsuleOptions::default() };
    let outcomes = capsules::run(backend, &options, &mut |_| {});
    assert!(outcomes.len() >= at_least, "{outcomes:?}");
    for outcome in outcomes {
        println!("{}: {:?}", outcome.check, outcome.found);
        assert!(outcome.found.is_ok(), "{outcome:?}");
    }
}

#[test]
fn tiny_hybrid_on_the_reference() {
    let options = VerifyOptions { trials: 12, max_tokens: 60, ..VerifyOptions::default() };
    holds(capsules::verify(&ReferenceBackend, TINY, &options, None));
}

#[test]
fn tiny_hybrid_on_the_cpu() {
    let options = VerifyOptions { trials: 500, max_tokens: 200, ..VerifyOptions::default() };
    holds(capsules::verify(&CpuBackend::new(2), TINY, &options, None));
}

#[test]
fn long_texts_on_the_cpu() {
    check(&CpuBackend::new(2), "long texts", 1);
}

#[test]
fn golden_checkpoints_on_the_cpu() {
    check(&CpuBackend::new(2), "golden", 10);
}

#[test]
fn llama_from_a_gguf_file() {
    check(&CpuBackend::new(2), "llama", 1);
    holds(capsules::from_gguf(&ReferenceBackend, 2));
}

#[test]
fn every_split_of_a_text_is_cold_on_the_cpu() {
    check(&CpuBackend::new(2), "every split", 1);
}

#[test]
fn every_split_of_a_text_is_cold_on_the_reference() {
    holds(capsules::every_split(&ReferenceBackend, TINY, 40));
}

#[test]
fn a_capsule_that_forgets_a_buffer_is_caught() {
    check(&CpuBackend::new(1), "forgotten", 1);
}

#[test]
fn lossy_kv_types_are_exact_too() {
    check(&CpuBackend::new(2), "KV", 2);
}

#[test]
fn one_and_two_threads_give_the_same_bits() {
    let trace = |threads| {
        let mut model = load(&CpuBackend::new(threads), TINY);
        let tokens = ampoule::sample_tokens(&model, 150, 11).unwrap();
        let slot = model.slot_with(&tokens).unwrap();
        for _ in 0..20 {
            model.engine.step(slot).unwrap();
        }
        model.engine.state_bytes(slot).unwrap()
    };
    let one = trace(1);
    assert!(one == trace(2) && one == trace(3));
}

#[test]
fn the_whole_capsule_answers_as_the_session_did_and_without_recurrent_state_it_does_not() {
    let mut model = load(&CpuBackend::new(2), TINY);
    let report = model.ablate(200, 48, 5).unwrap();
    println!("{report:?}");
    assert!(report.recurrent && report.passed(), "{report:?}");
}

#[test]
fn a_capsule_of_another_device_is_refused_and_both_are_named() {
    let mut made = load(&ReferenceBackend, TINY);
    let slot = made.slot_with(&[1, 2, 3]).unwrap();
    let capsule = made.engine.snapshot(slot).unwrap();
    let mut file = Vec::new();
    let keep = &mut |bytes: &[u8]| {
        file.extend_from_slice(bytes);
        std::ops::ControlFlow::Continue(())
    };
    made.engine.export(&capsule, keep).unwrap();
    let cpu = CpuBackend::new(1);
    // In another precision plans and layout differ, too: it is still the device that is named.
    for kv_cache in [None, Some(ampoule::DType::BF16)] {
        let options = LoadOptions { context: 512, kv_cache, ..LoadOptions::default() };
        let mut other = Ampoule::load_on(&cpu, TINY, &options, &mut |_, _| {}).unwrap();
        let refused = other.engine.import(&file).unwrap_err().to_string();
        for words in ["device", &ReferenceBackend.info().class, &cpu.info().class, "prefill again"]
        {
            assert!(refused.contains(words), "'{words}' is not in: {refused}");
        }
    }
}
