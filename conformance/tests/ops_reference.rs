//! The op suite on the reference itself, and on a reference that is broken in many ways: the suite must see each.

mod broken;
mod common;

use ampoule_conformance::ops::{
    Ignore, Problem, Report, Spec, SuiteOptions, run, run_against, specs,
};
use ampoule_reference::ReferenceBackend;
use broken::{Broken, Sabotage};

#[test]
fn the_reference_passes() {
    common::whole_suite(&ReferenceBackend, Vec::new());
}

#[test]
fn the_reference_passes_cases_of_random_shape() {
    common::random_cases(&ReferenceBackend, &[]);
}

fn sabotaged(sabotage: Sabotage, filter: &str) -> Report {
    let filter = filter.to_owned();
    let options = SuiteOptions { filter, random_cases: 0, ..SuiteOptions::default() };
    let report = run(&Broken(sabotage), &options);
    assert!(report.run > 0, "no case matches '{}'", options.filter);
    report
}

/// Every case that matches must fail, each of these checks must see it, and `reference` only if it is named.
#[track_caller]
fn caught(sabotage: Sabotage, filter: &str, checks: &[&str]) {
    let report = sabotaged(sabotage, filter);
    assert_eq!(report.passed, 0, "{sabotage:?} passes some of '{filter}':\n{report}");
    for check in checks {
        assert!(
            report.failures.iter().any(|f| f.check == *check),
            "{sabotage:?}: '{check}' does not see it:\n{report}"
        );
    }
    let reference = report.failures.iter().any(|f| f.check == "reference");
    assert_eq!(reference, checks.contains(&"reference"), "{sabotage:?}:\n{report}");
}

#[test]
fn a_flipped_bit_is_seen() {
    for filter in [
        "embed rows=5/",
        "linear/ rows=5/",
        "linear_add rows=4/",
        "rms_norm/ rows=5/",
        "gated_rms_norm rows=5/",
        "sigmoid_gate rows=5/",
        "swiglu rows=5/",
        "rope rows=5/",
        "attention rows=6/",
        "causal_conv rows=5/",
        "gated_delta/ rows=5/",
        "last_row rows=5/",
        "fill/ [4x8]",
        "copy/ rows=5/",
        "sample/ v=97",
        "decode/",
        "layer/ rows=5/",
    ] {
        caught(Sabotage::FlipBit, filter, &["reference"]);
    }
}

#[test]
fn an_error_of_one_in_a_thousand_is_seen_in_float32() {
    caught(Sabotage::Scale(1.001), "linear/ x=f32,out=f32 grid", &["reference"]);
    caught(Sabotage::Scale(1.001), "rope x=f32 rows=5/", &["reference"]);
    caught(Sabotage::Scale(1.001), "attention x=f32 out=f32 rows=1,", &["reference"]);
    // Less than bfloat16 can hold.
    assert!(sabotaged(Sabotage::Scale(1.0005), "linear/ out=bf16 grid").is_ok());
}

#[test]
fn float32_sums_in_tensor_float_32_are_seen() {
    // TensorFloat-32 keeps 10 bits of the operands: errors of about 2^-11 of the terms.
    caught(Sabotage::Noise(2e-4), "linear/ x=f32,out=f32 grid", &["reference"]);
}

#[test]
fn a_backend_held_against_another_must_give_its_bits() {
    let options =
        SuiteOptions { filter: "linear/ out=f32 grid".to_owned(), ..SuiteOptions::default() };
    let (whole, spoilt) = (ReferenceBackend, Broken(Sabotage::Scale(1.0000002)));
    assert!(run(&spoilt, &options).is_ok(), "the reference's tolerance allows it");
    assert!(run_against(&whole, &whole, &options).is_ok());
    assert_eq!(run_against(&spoilt, &whole, &options).passed, 0);
}

#[test]
fn nan_is_seen() {
    caught(Sabotage::Nan, "swiglu out=f32", &["reference"]);
    caught(Sabotage::Nan, "rms_norm/ out=bf16", &["reference"]);
}

#[test]
fn a_lost_state_write_is_seen() {
    for op in
        ["causal_conv", "gated_delta/", "observe rows=9", "advance", "fill", "kv_append", "layer/"]
    {
        let report = sabotaged(Sabotage::DropState, op);
        assert_eq!(report.passed, 0, "{op}: {report}");
        assert!(report.failures.iter().any(|f| f.check == "reference"), "{op}: {report}");
    }
}

#[test]
fn rows_past_the_count_in_state_are_seen() {
    caught(Sabotage::AppendPastCount, "kv_append rows=6/16", &["reference"]);
    caught(Sabotage::AppendPastCount, "attention rows=3/16", &["reference"]);
}

#[test]
fn results_that_depend_on_the_count_are_seen() {
    let checks = ["split", "bucket 64", "bucket 16", "one by one", "uneven"];
    caught(Sabotage::ByCount, "linear/ grid out=f32", &checks);
    caught(Sabotage::ByCount, "rms_norm/ grid out=f32", &checks);
}

#[test]
fn results_that_differ_from_run_to_run_are_seen() {
    caught(Sabotage::EveryOther, "swiglu out=f32 rows=1,", &["repeat"]);
}

#[test]
fn results_that_depend_on_poison_are_seen() {
    caught(Sabotage::AfterPoison, "linear/ out=f32 rows=1,", &["poison"]);
}

#[test]
fn results_that_depend_on_later_rows_are_seen() {
    caught(Sabotage::LastInputRow, "swiglu x=f32,out=f32 rows=9/16", &["later rows"]);
}

#[test]
fn results_that_depend_on_stale_cache_rows_are_seen() {
    caught(Sabotage::StaleRow, "attention out=f32 rows=1,", &["stale rows"]);
}

#[test]
fn a_write_to_another_slot_is_seen() {
    caught(Sabotage::OtherSlot, "gated_delta/ rows=1,", &["bystander"]);
}

#[test]
fn a_wrong_token_is_seen() {
    let report = sabotaged(Sabotage::WrongToken, "sample/ t=1,top_k=0,top_p=1,");
    assert_eq!(report.passed, 0, "{report}");
    assert_eq!(report.near_ties, 0, "{report}");
}

#[test]
fn counting_and_allocating_replays_are_seen() {
    caught(Sabotage::Allocate, "sigmoid_gate rows=1,", &["counters"]);
}

#[test]
fn errors_and_panics_are_reported_and_the_suite_goes_on() {
    for sabotage in [Sabotage::Refuse, Sabotage::Panic] {
        let report = sabotaged(sabotage, "swiglu");
        assert_eq!(report.passed, 0);
        assert!(report.failures.iter().all(|f| f.check == "run"), "{report}");
        let Problem::Error(text) = &report.failures[0].problem else { panic!("{report}") };
        assert!(text.contains("sabotage"), "{text}");
    }
}

#[test]
fn ignored_cases_are_listed_with_reasons_and_stale_patterns_are_told() {
    let options = SuiteOptions {
        filter: "swiglu".to_owned(),
        random_cases: 0,
        ignore: vec![
            Ignore::new("swiglu x=f16", "no f16 here"),
            Ignore::new("swiglu x=q8_0", "never was"),
        ],
        ..SuiteOptions::default()
    };
    let report = run(&ReferenceBackend, &options);
    assert!(!report.skipped.is_empty() && report.is_ok());
    assert_eq!(report.run + report.skipped.len(), specs(&options).len());
    assert_eq!(report.unused_ignores, ["swiglu x=q8_0"]);
    let text = report.to_string();
    assert!(text.contains("no f16 here") && text.contains("remove it"), "{text}");
}

#[test]
fn every_op_has_cases_and_names_are_unique() {
    let specs = specs(&SuiteOptions { random_cases: 0, ..SuiteOptions::default() });
    for op in ampoule_plan::Op::NAMES {
        assert!(specs.iter().any(|s| s.op() == *op), "no case for {op}");
    }
    let mut names: Vec<&str> = specs.iter().map(Spec::name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), specs.len());
}

#[test]
fn expecting_bf16_weights_fails_a_backend_that_holds_them_quantised() {
    let report = |filter: &str| {
        let filter = filter.to_owned();
        let options =
            SuiteOptions { filter, random_cases: 0, bf16_weights: true, ..SuiteOptions::default() };
        let report = run(&ReferenceBackend, &options);
        assert!(report.run > 0, "no case matches '{}'", options.filter);
        report
    };
    let quantised = report("linear/ w=q8_0 out=f32");
    assert_eq!(quantised.passed, 0, "{quantised}");
    assert!(report("linear/ w=bf16 out=f32").is_ok());
}
