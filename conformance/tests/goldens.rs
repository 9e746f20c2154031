//! Hugging Face goldens on the reference and the CPU backend.

use ampoule::Backend;
use ampoule_conformance::goldens;
use ampoule_cpu::CpuBackend;
use ampoule_reference::ReferenceBackend;

fn hold(backend: &dyn Backend) {
    let checkpoints = goldens::checkpoints(&goldens::folder()).unwrap();
    assert!(checkpoints.len() >= 10, "the goldens are missing");
    let mut wrong = Vec::new();
    for checkpoint in checkpoints {
        let report = goldens::run(backend, &checkpoint, None).unwrap();
        println!(
            "{:18} {:4} rows  max error {:.1e}  frobenius {:.1e}  greedy {}/{}",
            report.name,
            report.rows,
            report.max_error,
            report.frobenius,
            report.greedy - report.greedy_differ,
            report.greedy
        );
        assert!(report.rows >= 20 && report.greedy == 64, "{} compares too little", report.name);
        // Weights of 16 bits are compared with what transformers made of them in 32.
        let half = ["f16", "bf16"].iter().any(|t| report.name.ends_with(t));
        let most = if half { 1e-2 } else { 1e-4 };
        if !(report.max_error <= 1e-4 && report.frobenius <= most && report.greedy_differ == 0) {
            wrong.push(report.name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?} differ from transformers");
}

#[test]
fn reference_equals_transformers() {
    hold(&ReferenceBackend);
}

#[test]
fn cpu_equals_transformers() {
    hold(&CpuBackend::new(2));
}

#[test]
fn a_folder_without_checkpoints_is_no_success() {
    let empty = tempfile::tempdir().unwrap();
    let error = goldens::checkpoints(empty.path()).unwrap_err();
    assert!(error.contains("expected.safetensors"), "{error}");
    assert!(goldens::checkpoints(&empty.path().join("none")).is_err());
    let one = goldens::folder().join("base");
    assert_eq!(goldens::checkpoints(&one).unwrap(), [one]);
}
