//! The capsule suite: the exactness levels on every model and backend, and that the suite can fail.

use std::any::Any;
use std::sync::Arc;

// A backend of one's own needs nothing but the public crate.
use ampoule::backend::{
    Counters, Frozen, LoadOptions as Memory, Program, Progress, Region, SlotId,
};
use ampoule::backends::{CpuBackend, ReferenceBackend};
use ampoule::{
    Ampoule, Backend, BackendError, BufferId, DType, DeviceInfo, EngineError, Error, LoadOptions,
    Sealed, VerifyOptions, VerifyReport, WeightSource,
};

const TINY: &str = "random:qwen3.5-tiny";

fn load(backend: &dyn Backend, model: &str) -> Ampoule {
    let options = LoadOptions { context: 512, ..LoadOptions::default() };
    Ampoule::load_on(backend, model, &options, &mut |_, _| {}).unwrap()
}

fn print(report: &VerifyReport) {
    for level in &report.levels {
        println!(
            "{:16} {:5} checks {:4} mismatches {}",
            level.level,
            level.checks,
            level.mismatches,
            level.first.clone().unwrap_or_default()
        );
    }
}

fn verify(backend: &dyn Backend, model: &str, options: &VerifyOptions) {
    let mut model = load(backend, model);
    model.engine.poison_between_replays(true);
    let report = model.verify(options, &mut |_, _| {}).unwrap();
    print(&report);
    assert!(report.passed(), "{report:?}");
}

#[test]
fn tiny_hybrid_on_the_reference() {
    verify(
        &ReferenceBackend,
        TINY,
        &VerifyOptions { trials: 12, max_tokens: 60, ..VerifyOptions::default() },
    );
}

#[test]
fn tiny_hybrid_on_the_cpu() {
    verify(
        &CpuBackend::new(2),
        TINY,
        &VerifyOptions { trials: 500, max_tokens: 200, ..VerifyOptions::default() },
    );
}

#[test]
fn golden_checkpoints_on_the_cpu() {
    let checkpoints =
        ampoule_conformance::goldens::checkpoints(&ampoule_conformance::goldens::folder()).unwrap();
    assert!(checkpoints.len() >= 10, "the goldens are missing");
    for checkpoint in checkpoints {
        let model = checkpoint.to_str().unwrap();
        verify(
            &CpuBackend::new(2),
            model,
            &VerifyOptions { trials: 20, seed: 7, ..VerifyOptions::default() },
        );
    }
}

/// Every split point of one text, not a sample of them.
fn every_split(backend: &dyn Backend, model: &str, len: usize) {
    let mut model = load(backend, model);
    let tokens = ampoule::sample_tokens(&model, len, 3).unwrap();
    let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let cold = model.slot_with(&tokens).unwrap();
    let cold_logits = bits(model.engine.logits(cold).unwrap());
    let cold_bytes = model.engine.state_bytes(cold).unwrap();
    let warm = model.engine.create_slot().unwrap();
    for split in 1..len {
        model.engine.reset(warm).unwrap();
        model.append(warm, &tokens[..split]).unwrap();
        let capsule = model.engine.snapshot(warm).unwrap();
        // Another session passes through the slot.
        model.engine.reset(warm).unwrap();
        model.append(warm, &tokens[len - split..]).unwrap();
        model.engine.step(warm).unwrap();
        model.engine.restore(warm, &capsule).unwrap();
        model.append(warm, &tokens[split..]).unwrap();
        assert!(
            bits(model.engine.logits(warm).unwrap()) == cold_logits,
            "logits differ at split {split}"
        );
        assert!(
            model.engine.state_bytes(warm).unwrap() == cold_bytes,
            "state differs at split {split}"
        );
    }
}

#[test]
fn every_split_of_a_text_is_cold_on_the_cpu() {
    every_split(&CpuBackend::new(2), TINY, 200);
}

#[test]
fn every_split_of_a_text_is_cold_on_the_reference() {
    every_split(&ReferenceBackend, TINY, 40);
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

/// A backend that loses one State buffer, or none, whenever a capsule is taken.
struct Forgetful {
    inner: CpuBackend,
    lost: Option<String>,
}

struct ForgetfulProgram {
    inner: Box<dyn Program>,
    lost: Option<BufferId>,
}

struct Stub(Vec<Region>, Arc<dyn Frozen>, Vec<usize>);

impl Frozen for Stub {
    fn regions(&self) -> &[Region] {
        &self.0
    }
    fn bytes(&self) -> usize {
        self.1.bytes()
    }
    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        match self.2.get(index) {
            Some(&inner) if inner != usize::MAX => self.1.read(inner, into),
            _ => Ok(()),
        }
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Backend for Forgetful {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }
    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: Memory,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        let find = |name: &String| {
            let id = model.state().iter().find(|&&id| model.buffer(id).name == *name);
            *id.expect("the model has such a buffer")
        };
        let lost = self.lost.as_ref().map(find);
        let inner = self.inner.load(model, weights, options, progress)?;
        Ok(Box::new(ForgetfulProgram { inner, lost }))
    }
}

impl Program for ForgetfulProgram {
    fn model(&self) -> &Arc<Sealed> {
        self.inner.model()
    }
    fn create_slot(&mut self) -> Result<SlotId, BackendError> {
        self.inner.create_slot()
    }
    fn drop_slot(&mut self, slot: SlotId) -> Result<(), BackendError> {
        self.inner.drop_slot(slot)
    }
    fn write_input(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), BackendError> {
        self.inner.write_input(buffer, bytes)
    }
    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError> {
        self.inner.run(slot, plan)
    }
    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.inner.read_output(buffer, offset, into)
    }
    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.inner.read_state(slot, region, into)
    }
    fn freeze(
        &mut self,
        slot: SlotId,
        regions: &[Region],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let kept: Vec<Region> =
            regions.iter().filter(|r| Some(r.buffer) != self.lost).cloned().collect();
        let inner = self.inner.freeze(slot, &kept)?;
        let place = |r: &Region| kept.iter().position(|k| k == r).unwrap_or(usize::MAX);
        let map = regions.iter().map(place).collect();
        Ok(Arc::new(Stub(regions.to_vec(), inner, map)))
    }
    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        let own = |p: &Arc<dyn Frozen>| {
            p.as_any().downcast_ref::<Stub>().map_or_else(|| Arc::clone(p), |s| Arc::clone(&s.1))
        };
        let parts: Vec<_> = parts.iter().map(own).collect();
        self.inner.thaw(slot, &parts)
    }
    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        self.inner.freeze_bytes(regions, bytes)
    }
    fn poison(&mut self) -> Result<(), BackendError> {
        self.inner.poison()
    }
    fn synchronize(&mut self) -> Result<(), BackendError> {
        self.inner.synchronize()
    }
    fn counters(&self) -> Counters {
        self.inner.counters()
    }
    fn frozen_bytes(&self) -> (usize, usize) {
        self.inner.frozen_bytes()
    }
}

/// Verifies a model whose capsules lack the buffer.
fn without(lost: Option<String>) -> Result<VerifyReport, Error> {
    let mut model = load(&Forgetful { inner: CpuBackend::new(1), lost }, TINY);
    // A slot's own session leaves other bytes in every buffer, so each trial must miss each buffer.
    let options =
        VerifyOptions { trials: 3, max_tokens: 60, decode: 4, ..VerifyOptions::default() };
    model.verify(&options, &mut |_, _| {})
}

#[test]
fn a_capsule_that_forgets_a_buffer_is_caught() {
    let model = load(&CpuBackend::new(1), TINY);
    let sealed = model.engine.model();
    let names: Vec<String> =
        sealed.state().iter().map(|&id| sealed.buffer(id).name.clone()).collect();
    for kind in ["recurrent", "conv", "kv.key", "kv.value"] {
        let layers = names.iter().filter(|n| n.contains(kind)).count();
        assert!(layers >= 1, "no layer has '{kind}': {names:?}");
    }
    for name in ["logits", "params", "seed", "counts", "bias_tokens", "bias_values"] {
        assert!(names.contains(&format!("sampler.{name}")), "{names:?}");
    }
    assert!(names.iter().any(|n| n == "cursor"), "{names:?}");

    // The machinery of this test loses nothing by itself.
    let control = without(None).unwrap();
    assert!(control.passed(), "{control:?}");
    for lost in names {
        match without(Some(lost.clone())) {
            Ok(report) => {
                assert!(!report.passed(), "nobody missed '{lost}'");
                let state = &report.levels[0];
                let first = state.first.as_deref().unwrap_or_default();
                println!("{lost:24} {} of {}: {first}", state.mismatches, state.checks);
                assert!(first.contains(&lost), "E1 names another state than '{lost}': {first}");
            }
            // The engine knows where a slot stands: a state that says otherwise ends the run.
            Err(_) if lost == "cursor" => {}
            // A file without sampler settings holds zeros there, which nobody can have set: import refuses it.
            Err(Error::Engine(EngineError::Sampling { .. })) if lost == "sampler.params" => {}
            Err(error) => panic!("without '{lost}': {error}"),
        }
    }
}

#[test]
fn the_whole_capsule_answers_as_the_session_did_and_without_recurrent_state_it_does_not() {
    let mut model = load(&CpuBackend::new(2), TINY);
    let report = model.ablate(200, 48, 5).unwrap();
    println!("{report:?}");
    assert!(report.recurrent && report.passed(), "{report:?}");
}

#[test]
fn lossy_kv_types_are_exact_too() {
    for kv in [DType::F16, DType::BF16] {
        let options = LoadOptions { context: 512, kv_cache: Some(kv), ..LoadOptions::default() };
        let mut model =
            Ampoule::load_on(&CpuBackend::new(2), TINY, &options, &mut |_, _| {}).unwrap();
        let report = model
            .verify(&VerifyOptions { trials: 20, ..VerifyOptions::default() }, &mut |_, _| {})
            .unwrap();
        assert!(report.passed(), "{report:?}");
    }
}
