//! The capsule suite: the exactness levels on every model and backend, and that the suite can fail.

use std::any::Any;
use std::sync::Arc;

use ampoule::{
    Ampoule, Backend, BackendError, DType, DeviceInfo, LoadOptions, VerifyOptions, VerifyReport,
};
use ampoule_backend::{Counters, Frozen, LoadOptions as Memory, Program, Progress, Region, SlotId};
use ampoule_cpu::CpuBackend;
use ampoule_plan::{BufferId, Sealed, WeightSource};
use ampoule_reference::ReferenceBackend;

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
    for checkpoint in
        ampoule_conformance::goldens::checkpoints(&ampoule_conformance::goldens::folder()).unwrap()
    {
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

/// A backend that loses one State buffer whenever a capsule is taken.
struct Forgetful {
    inner: CpuBackend,
    lost: &'static str,
}

struct ForgetfulProgram {
    inner: Box<dyn Program>,
    lost: BufferId,
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
        let names = model.state().iter().find(|&&id| model.buffer(id).name.contains(self.lost));
        let lost = *names.expect("the model has such a buffer");
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
        let kept: Vec<Region> = regions.iter().filter(|r| r.buffer != self.lost).cloned().collect();
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

#[test]
fn a_capsule_that_forgets_a_buffer_is_caught() {
    for lost in [
        "recurrent",
        "conv",
        "kv.key",
        "kv.value",
        "sampler.logits",
        "sampler.seed",
        "sampler.counts",
        "sampler.params",
        "cursor",
    ] {
        let backend = Forgetful { inner: CpuBackend::new(1), lost };
        let mut model = load(&backend, TINY);
        let options = VerifyOptions { trials: 6, ..VerifyOptions::default() };
        // A lost cursor may also end the run with an error: that is caught too.
        let caught = model.verify(&options, &mut |_, _| {}).map_or(true, |report| !report.passed());
        assert!(caught, "nobody missed '{lost}'");
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
