//! The capsule verbs where they are easy to get wrong: imports, dropped boundaries, failures in the middle.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use ampoule_backend::{
    Backend, BackendError, Counters, DeviceInfo, Frozen, LoadOptions, Part, Program, Progress,
    Region, SlotId, WeightSource,
};
use ampoule_engine::{Capsule, Engine, EngineError, EngineOptions, Identity, SamplingParams};
use ampoule_models::decoder::{BuildOptions, Precision};
use ampoule_models::model::ModelFiles;
use ampoule_plan::{BufferId, DType, Sealed};
use ampoule_reference::ReferenceBackend;

fn engine_on(backend: &dyn Backend, options: &EngineOptions) -> Engine {
    let files = ModelFiles::open("random:qwen3.5-tiny").unwrap();
    let precision = Precision { activation: DType::F32, kv_cache: DType::F32 };
    let build = BuildOptions {
        context: 128,
        prefill: vec![8],
        score: 4,
        decode_contexts: vec![64],
        precision,
    };
    let built = files.build(&build).unwrap();
    let identity = Identity {
        name: "tiny".to_owned(),
        weights: built.weights_digest,
        plan: built.plan_digest,
    };
    Engine::load(backend, built.sealed, &built.weights, &identity, options, &mut |_, _| {}).unwrap()
}

fn engine() -> Engine {
    engine_on(&ReferenceBackend, &EngineOptions::default())
}

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 7 + i * 31 + seed * 101) % 512) as u32).collect()
}

fn append(engine: &mut Engine, slot: SlotId, tokens: &[u32]) {
    engine.append(slot, tokens, &mut |_| ControlFlow::Continue(())).unwrap();
}

fn export(engine: &Engine, capsule: &Capsule) -> Vec<u8> {
    let mut bytes = Vec::new();
    engine
        .export(capsule, &mut |piece| {
            bytes.extend_from_slice(piece);
            ControlFlow::Continue(())
        })
        .unwrap();
    bytes
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_k: 50,
        presence_penalty: 0.2,
        seed,
        ..SamplingParams::default()
    }
}

#[test]
fn an_imported_capsule_exports_to_the_same_bytes() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(5, 1));
    let inner = engine.snapshot(slot).unwrap(); // a boundary inside one merged prefill segment
    append(&mut engine, slot, &tokens(6, 2));
    engine.begin_reply(slot).unwrap();
    engine.step(slot).unwrap();
    let capsule = engine.snapshot(slot).unwrap();
    drop(inner);
    let bytes = export(&engine, &capsule);
    let imported = engine.import(&bytes).unwrap();
    assert_eq!(imported.lineage(), capsule.lineage());
    assert!(export(&engine, &imported) == bytes, "an import changes the capsule");
    // And a descendant of the import can be exported and imported as well.
    engine.restore(slot, &imported).unwrap();
    engine.begin_reply(slot).unwrap();
    let marked = engine.snapshot(slot).unwrap();
    let marked = export(&engine, &marked);
    append(&mut engine, slot, &tokens(3, 3));
    let child = engine.snapshot(slot).unwrap();
    let child = export(&engine, &child);
    engine.import(&marked).unwrap();
    engine.import(&child).unwrap();
}

#[test]
fn a_rollback_behind_an_import_rebuilds_the_bytes_from_its_journal() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(9, 1));
    engine.configure(slot, &sampled(3)).unwrap();
    engine.begin_reply(slot).unwrap();
    for _ in 0..4 {
        engine.step(slot).unwrap();
    }
    engine.reseed(slot, 77).unwrap();
    let wanted = engine.state_bytes(slot).unwrap();
    for _ in 0..3 {
        engine.step(slot).unwrap();
    }
    let bytes = {
        let c = engine.snapshot(slot).unwrap();
        export(&engine, &c)
    };
    engine.reset(slot).unwrap();
    let imported = engine.import(&bytes).unwrap();
    engine.restore(slot, &imported).unwrap();
    engine.rollback(slot, 13).unwrap();
    assert!(engine.state_bytes(slot).unwrap() == wanted);
}

#[test]
fn rollback_passes_over_dropped_and_tokenless_boundaries() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(12, 5));
    let first = engine.snapshot(slot).unwrap();
    engine.configure(slot, &sampled(1)).unwrap();
    let tokenless = engine.snapshot(slot).unwrap();
    assert_eq!(first.position(), tokenless.position());
    engine.step(slot).unwrap();
    engine.step(slot).unwrap();
    let wanted = engine.state_bytes(slot).unwrap();
    let dropped = engine.snapshot(slot).unwrap();
    engine.step(slot).unwrap();
    engine.step(slot).unwrap();
    drop((first, tokenless, dropped));
    engine.rollback(slot, 14).unwrap();
    assert!(engine.state_bytes(slot).unwrap() == wanted, "rebuilt from the start");
    assert!(matches!(
        engine.rollback(slot, 15),
        Err(EngineError::RollbackAhead { position: 14, wanted: 15, .. })
    ));
}

/// Every State byte of a slot.
type State = Vec<(String, Vec<u8>)>;

/// A reply of 60 tokens with a waypoint every 8, settings changed in its middle; bytes and logits at every position.
fn reply_with_waypoints(engine: &mut Engine) -> (SlotId, Capsule, Vec<State>) {
    let slot = engine.create_slot().unwrap();
    append(engine, slot, &tokens(10, 2));
    let asked = engine.snapshot(slot).unwrap();
    engine.configure(slot, &sampled(4)).unwrap();
    engine.begin_reply(slot).unwrap();
    let mut states = vec![engine.state_bytes(slot).unwrap()];
    for n in 1..=60 {
        engine.step(slot).unwrap();
        if n == 24 || n == 37 {
            // After the waypoint at 24, at no waypoint at 37.
            if n == 24 {
                assert!(engine.add_waypoint(slot).unwrap());
            }
            engine.reseed(slot, 900 + n).unwrap();
        } else if n % 8 == 0 {
            assert!(engine.add_waypoint(slot).unwrap());
            assert!(!engine.add_waypoint(slot).unwrap(), "it is there");
        }
        states.push(engine.state_bytes(slot).unwrap());
    }
    (slot, asked, states)
}

fn launches(engine: &Engine) -> u64 {
    engine.counters().launches
}

#[test]
fn a_rollback_inside_a_reply_starts_from_a_waypoint_and_rebuilds_the_bytes() {
    for frozen in [false, true] {
        let mut engine = engine();
        let (slot, asked, states) = reply_with_waypoints(&mut engine);
        // Either the reply lies in the slot's tail, or a snapshot has made a node of it.
        let held = frozen.then(|| engine.snapshot(slot).unwrap());
        let passed = engine.waypoints(slot).unwrap().filter(|_| frozen);
        assert_eq!(passed.as_ref().map(|w| w.positions().len()), frozen.then_some(7));
        for kept in [59, 57, 40, 39, 25, 24, 23, 8, 7, 0] {
            if let Some(capsule) = &held {
                engine.restore(slot, capsule).unwrap();
            }
            let before = launches(&engine);
            engine.rollback(slot, 10 + kept as u32).unwrap();
            let read = launches(&engine) - before;
            // The tokens since the waypoint, and the settings.
            assert!(read <= 7 + 3, "{kept}: {read} launches");
            assert!(engine.state_bytes(slot).unwrap() == states[kept], "{kept}");
        }
        // What follows from such a state is of the same lineage as if nothing had been cut.
        if let Some(capsule) = &held {
            engine.restore(slot, capsule).unwrap();
            engine.rollback(slot, 10 + 44).unwrap();
            let cut = engine.snapshot(slot).unwrap();
            assert_eq!(engine.waypoints(slot).unwrap().unwrap().positions().len(), 5);
            let twin = engine.create_slot().unwrap();
            engine.restore(twin, &asked).unwrap();
            engine.configure(twin, &sampled(4)).unwrap();
            engine.begin_reply(twin).unwrap();
            for n in 1..=44 {
                engine.step(twin).unwrap();
                if n == 24 || n == 37 {
                    engine.reseed(twin, 900 + n).unwrap();
                }
            }
            let straight = engine.snapshot(twin).unwrap();
            assert!(export(&engine, &cut) == export(&engine, &straight), "file and journal");
        }
    }
}

#[test]
fn waypoints_go_with_whoever_holds_them_and_count() {
    let mut engine = engine();
    let (slot, asked, states) = reply_with_waypoints(&mut engine);
    let with = engine.capsule_bytes().0;
    engine.keep_waypoints(slot, |position| position % 16 == 10).unwrap();
    let fixed = asked.fixed_bytes();
    assert_eq!(with - engine.capsule_bytes().0, 4 * fixed);
    let capsule = engine.snapshot(slot).unwrap();
    let held = engine.waypoints(slot).unwrap().unwrap();
    assert_eq!((held.positions(), held.bytes()), (vec![26, 42, 58], 3 * fixed));
    engine.restore(slot, &asked).unwrap();
    assert!(engine.waypoints(slot).unwrap().is_none());
    let with = engine.capsule_bytes().0;
    drop(held);
    assert_eq!(with - engine.capsule_bytes().0, 3 * fixed);
    // Without them the reply is read again from its beginning, to the same bytes.
    engine.restore(slot, &capsule).unwrap();
    let before = launches(&engine);
    engine.rollback(slot, 10 + 40).unwrap();
    assert!(launches(&engine) - before >= 40);
    assert!(engine.state_bytes(slot).unwrap() == states[40]);
}

#[test]
fn a_rollback_goes_step_by_step_and_others_go_on_between() {
    let mut engine = engine();
    let (slot, _asked, states) = reply_with_waypoints(&mut engine);
    engine.keep_waypoints(slot, |_| false).unwrap();
    let other = engine.create_slot().unwrap();
    append(&mut engine, other, &tokens(5, 8));
    let mut rollback = engine.begin_rollback(slot, 10 + 30).unwrap();
    let mut steps = 0;
    while engine.advance(&mut rollback).unwrap() {
        steps += 1;
        assert_eq!(rollback.left(), 30 - steps);
        engine.step(other).unwrap();
    }
    assert_eq!(steps, 29);
    assert!(engine.state_bytes(slot).unwrap() == states[30]);
    let mut broken = engine.begin_rollback(slot, 10 + 5).unwrap();
    engine.advance(&mut broken).unwrap();
    engine.step(slot).unwrap();
    assert!(matches!(
        engine.advance(&mut broken),
        Err(EngineError::RollbackBroken { position: 12, expected: 11, .. })
    ));
}

#[test]
fn an_unchanged_slot_snapshots_to_the_same_capsule_and_memory_returns() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(20, 1));
    let a = engine.snapshot(slot).unwrap();
    let used = engine.capsule_bytes().0;
    let b = engine.snapshot(slot).unwrap();
    assert_eq!((engine.capsule_bytes().0, a.lineage()), (used, b.lineage()));
    drop((a, b));
    for _ in 0..100 {
        drop(engine.snapshot(slot).unwrap());
    }
    engine.reset(slot).unwrap();
    engine.drop_slot(slot).unwrap();
    assert_eq!(engine.capsule_bytes().0, 0, "capsules and slots are gone, and so are their bytes");
}

#[test]
fn a_budget_refuses_and_the_slot_goes_on() {
    let mut free = engine();
    let slot = free.create_slot().unwrap();
    append(&mut free, slot, &tokens(10, 1));
    let size = free.snapshot(slot).map(|c| c.fixed_bytes() + c.row_bytes()).unwrap();
    let options = EngineOptions { capsule_bytes: size - 1, ..EngineOptions::default() };
    let mut engine = engine_on(&ReferenceBackend, &options);
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(10, 1));
    let before = engine.state_bytes(slot).unwrap();
    let refused = engine.snapshot(slot).unwrap_err();
    assert!(
        matches!(refused, EngineError::Backend(BackendError::CapsuleBudget { .. })),
        "{refused}"
    );
    assert_eq!(engine.capsule_bytes().0, 0);
    assert!(engine.state_bytes(slot).unwrap() == before);
    engine.step(slot).unwrap();
}

#[test]
fn what_the_budget_refuses_is_refused_whole_and_no_part_is_made() {
    let mut free = engine();
    let slot = free.create_slot().unwrap();
    append(&mut free, slot, &tokens(10, 1));
    let capsule = free.snapshot(slot).unwrap();
    let (fixed, rows) = (capsule.fixed_bytes(), capsule.row_bytes());
    let file = export(&free, &capsule);
    assert!(fixed > 0 && rows > 0);
    // Either part would fit alone.
    let budget = fixed + rows - 1;
    let copied = Arc::new(AtomicUsize::new(0));
    let backend = Faulty { left: Arc::new(AtomicI64::new(i64::MAX)), copied: Arc::clone(&copied) };
    let options = EngineOptions { capsule_bytes: budget, ..EngineOptions::default() };
    let mut engine = engine_on(&backend, &options);
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(10, 1));
    let wants_all = |error: EngineError| match error {
        EngineError::Backend(BackendError::CapsuleBudget { wanted, used, budget: of }) => {
            assert_eq!((wanted, used, of), (fixed + rows, 0, budget));
        }
        other => panic!("{other}"),
    };
    wants_all(engine.snapshot(slot).unwrap_err());
    wants_all(engine.import(&file).unwrap_err());
    assert_eq!((copied.load(Ordering::Relaxed), engine.capsule_bytes().0), (0, 0));
    // The same call counts what it copies where there is room.
    let mut roomy = engine_on(&backend, &EngineOptions::default());
    let slot = roomy.create_slot().unwrap();
    append(&mut roomy, slot, &tokens(10, 1));
    roomy.snapshot(slot).unwrap();
    assert_eq!(copied.load(Ordering::Relaxed), fixed + rows);
}

#[test]
fn capsules_of_others_are_refused() {
    let (mut one, mut two) = (engine(), engine());
    let (a, b) = (one.create_slot().unwrap(), two.create_slot().unwrap());
    append(&mut one, a, &tokens(4, 1));
    let capsule = one.snapshot(a).unwrap();
    assert!(matches!(two.restore(b, &capsule), Err(EngineError::ForeignCapsule)));
    let bytes = export(&one, &capsule);
    two.import(&bytes).unwrap();
    let salted = EngineOptions { salt: b"another tenant".to_vec(), ..EngineOptions::default() };
    let mut other = engine_on(&ReferenceBackend, &salted);
    let refused = other.import(&bytes).unwrap_err().to_string();
    assert!(refused.contains("tenant"), "{refused}");
}

#[test]
fn an_experiment_makes_no_capsule() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(10, 1));
    let capsule = engine.snapshot(slot).unwrap();
    engine
        .restore_with_other_state(slot, &capsule, None, &|name| name.contains("recurrent"))
        .unwrap();
    assert!(matches!(engine.snapshot(slot), Err(EngineError::Tainted { .. })));
    engine.step(slot).unwrap();
    assert!(matches!(engine.rollback(slot, 3), Err(EngineError::Tainted { .. })));
    engine.restore(slot, &capsule).unwrap();
    engine.snapshot(slot).unwrap();
}

#[test]
fn requests_that_cannot_be_met_change_nothing() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    assert!(matches!(engine.step(slot), Err(EngineError::NothingRead { .. })));
    append(&mut engine, slot, &tokens(100, 1));
    let before = engine.state_bytes(slot).unwrap();
    let mut go = |_| ControlFlow::Continue(());
    assert!(matches!(
        engine.append(slot, &tokens(29, 2), &mut go),
        Err(EngineError::ContextFull { .. })
    ));
    assert!(matches!(
        engine.append(slot, &[3, 512], &mut go),
        Err(EngineError::TokenRange { token: 512, .. })
    ));
    assert!(matches!(engine.step_forced(slot, 512), Err(EngineError::TokenRange { .. })));
    for bad in [f32::NAN, -1.0, 1e9] {
        let params = SamplingParams { temperature: bad, ..SamplingParams::default() };
        assert!(matches!(
            engine.configure(slot, &params),
            Err(EngineError::Sampling { name: "temperature", .. })
        ));
    }
    assert!(engine.state_bytes(slot).unwrap() == before);
    append(&mut engine, slot, &tokens(28, 2));
    assert!(matches!(engine.step(slot), Err(EngineError::ContextFull { position: 128, .. })));
}

#[test]
fn a_prefill_can_be_stopped_between_chunks() {
    let mut engine = engine();
    let slot = engine.create_slot().unwrap();
    let text = tokens(30, 4);
    let mut chunks = 0;
    let read = engine.append(slot, &text, &mut |_| {
        chunks += 1;
        if chunks == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((read.unwrap(), engine.position(slot).unwrap()), (16, 16), "two chunks of eight");
    append(&mut engine, slot, &text[16..]);
    let stopped = engine.state_bytes(slot).unwrap();
    engine.reset(slot).unwrap();
    append(&mut engine, slot, &text);
    assert!(engine.state_bytes(slot).unwrap() == stopped);
}

/// Fails the n-th call that reaches the device, and counts the bytes that became frozen state.
struct Faulty {
    left: Arc<AtomicI64>,
    copied: Arc<AtomicUsize>,
}

struct FaultyProgram {
    inner: Box<dyn Program>,
    left: Arc<AtomicI64>,
    copied: Arc<AtomicUsize>,
}

impl FaultyProgram {
    fn tick(&self) -> Result<(), BackendError> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            return Err(BackendError::Device {
                device: "test".to_owned(),
                problem: "it broke".to_owned(),
            });
        }
        Ok(())
    }
}

impl Backend for Faulty {
    fn info(&self) -> DeviceInfo {
        ReferenceBackend.info()
    }
    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        let inner = ReferenceBackend.load(model, weights, options, progress)?;
        let (left, copied) = (Arc::clone(&self.left), Arc::clone(&self.copied));
        Ok(Box::new(FaultyProgram { inner, left, copied }))
    }
}

impl Program for FaultyProgram {
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
        self.tick()?;
        self.inner.write_input(buffer, bytes)
    }
    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError> {
        self.tick()?;
        self.inner.run(slot, plan)
    }
    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.tick()?;
        self.inner.read_output(buffer, offset, into)
    }
    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.tick()?;
        self.inner.read_state(slot, region, into)
    }
    fn freeze_parts(
        &mut self,
        slot: SlotId,
        parts: &[Part<'_>],
    ) -> Result<Vec<Arc<dyn Frozen>>, BackendError> {
        self.tick()?;
        let parts = self.inner.freeze_parts(slot, parts)?;
        self.copied.fetch_add(parts.iter().map(|p| p.bytes()).sum(), Ordering::Relaxed);
        Ok(parts)
    }
    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        self.tick()?;
        self.inner.thaw(slot, parts)
    }
    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let frozen = self.inner.freeze_bytes(regions, bytes)?;
        self.copied.fetch_add(frozen.bytes(), Ordering::Relaxed);
        Ok(frozen)
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

type Verb = fn(&mut Engine, SlotId, &Capsule) -> Result<(), EngineError>;

#[test]
fn a_device_failure_empties_the_slot_and_a_restore_brings_it_back() {
    let left = Arc::new(AtomicI64::new(0));
    let mut engine = engine_on(
        &Faulty { left: Arc::clone(&left), copied: Arc::default() },
        &EngineOptions::default(),
    );
    let slot = engine.create_slot().unwrap();
    append(&mut engine, slot, &tokens(10, 1));
    engine.configure(slot, &sampled(9)).unwrap();
    engine.step(slot).unwrap();
    let capsule = engine.snapshot(slot).unwrap();
    let wanted = engine.state_bytes(slot).unwrap();
    let verbs: [(&str, Verb); 7] = [
        ("append", |e, s, _| {
            e.append(s, &tokens(20, 2), &mut |_| ControlFlow::Continue(())).map(|_| ())
        }),
        ("step", |e, s, _| e.step(s).map(|_| ())),
        ("configure", |e, s, _| e.configure(s, &sampled(2))),
        ("snapshot", |e, s, _| e.begin_reply(s).and_then(|()| e.snapshot(s).map(|_| ()))),
        ("restore", |e, s, c| e.restore(s, c)),
        ("rollback", |e, s, _| e.rollback(s, 4)),
        ("reset", |e, s, _| e.reset(s)),
    ];
    for (name, verb) in verbs {
        let mut failed = 0;
        for nth in 1..40 {
            engine.restore(slot, &capsule).unwrap();
            left.store(nth, Ordering::Relaxed);
            let result = verb(&mut engine, slot, &capsule);
            let fired = left.swap(0, Ordering::Relaxed) <= 0;
            if !fired {
                assert!(result.is_ok(), "{name} failed by itself: {result:?}");
                break;
            }
            failed += 1;
            assert!(
                matches!(result, Err(EngineError::Backend(_))),
                "{name}, call {nth}: {result:?}"
            );
            assert!(
                matches!(engine.step(slot), Err(EngineError::SlotEmpty { .. })),
                "{name}, call {nth}"
            );
            engine.restore(slot, &capsule).unwrap();
            assert!(engine.state_bytes(slot).unwrap() == wanted, "{name}, call {nth}");
        }
        assert!(failed > 0, "{name} never reached the device");
    }
}
