//! The backend on a real GPU. Without one every test prints why it is skipped; `AMPOULE_REQUIRE_GPU=1` makes that a failure.

use std::sync::Arc;

use ampoule::{
    Ampoule, Device, EngineOptions, LoadOptions as LoadForUse, SamplingParams, sample_tokens,
};
use ampoule_backend::{
    Backend, BackendError, Frozen, LoadOptions, Part, Program, Region, Residence, SlotId,
    StateRegions,
};
use ampoule_cuda::bench::DriverCalls;
use ampoule_cuda::{CudaBackend, CudaOptions, bench};
use ampoule_models::decoder::{BuildOptions, Precision};
use ampoule_models::model::{BuiltModel, ModelFiles};
use ampoule_plan::{
    Buffer, BufferId, BufferTable, DType, Fill, Growth, Linear, Model, Op, Phase, Plan, RandomFill,
    Role, ShapeKey, StateKind, View, WeightError, WeightSource,
};
use ampoule_reference::ReferenceBackend;

const VOCABULARY: usize = 512;

/// Those of the environment.
fn options() -> CudaOptions {
    CudaOptions::from_environment().unwrap()
}

/// The backend, or `None` after a sentence that says why not.
fn gpu(options: CudaOptions) -> Option<CudaBackend> {
    let opened = CudaBackend::discover().and_then(|found| {
        let ordinal = found.first().map_or(0, |g| g.ordinal);
        CudaBackend::with_options(ordinal, options)
    });
    match opened {
        Ok(backend) => Some(backend),
        Err(error) => {
            let required = std::env::var("AMPOULE_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "AMPOULE_REQUIRE_GPU=1, but {error}");
            println!("skipped: {error}");
            None
        }
    }
}

fn model(dtype: DType) -> BuiltModel {
    model_of("random:qwen3.5-tiny", dtype)
}

fn model_of(name: &str, dtype: DType) -> BuiltModel {
    model_with_context(name, dtype, 512)
}

fn model_with_context(name: &str, dtype: DType, context: usize) -> BuiltModel {
    let options = BuildOptions {
        context,
        prefill: vec![1, 32, 64],
        score: 32,
        decode_contexts: vec![256, context],
        precision: Precision { activation: dtype, kv_cache: dtype },
    };
    ModelFiles::open(name).unwrap().build(&options).unwrap()
}

struct Runner {
    program: Box<dyn Program>,
}

impl Runner {
    fn new(backend: &dyn Backend, built: &BuiltModel) -> Self {
        Self::with_slots(backend, built, 2)
    }

    fn with_slots(backend: &dyn Backend, built: &BuiltModel, slots: usize) -> Self {
        Self::of(backend, built, LoadOptions { slots, capsule_bytes: 4 << 20 })
    }

    fn of(backend: &dyn Backend, built: &BuiltModel, options: LoadOptions) -> Self {
        let model = Arc::clone(&built.sealed);
        let program = backend.load(model, &built.weights, options, &mut |_, _| {}).unwrap();
        Self { program }
    }

    fn buffer(&self, name: &str) -> BufferId {
        self.program.model().model().buffers.find(name).unwrap()
    }

    fn plan(&self, phase: Phase, tokens: usize, context: usize) -> usize {
        let plans = &self.program.model().model().plans;
        let fits = |k: &ampoule_plan::ShapeKey| {
            k.phase == phase
                && (tokens == 0 || k.tokens == tokens)
                && (context == 0 || k.context == context)
        };
        plans.iter().position(|p| fits(&p.key)).unwrap()
    }

    fn write(&mut self, name: &str, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.program.write_input(self.buffer(name), &bytes).unwrap();
    }

    fn reset(&mut self) -> SlotId {
        let slot = self.program.create_slot().unwrap();
        self.empty(slot);
        slot
    }

    fn empty(&mut self, slot: SlotId) {
        self.program.run(slot, self.plan(Phase::Reset, 0, 0)).unwrap();
        // Repetition 1, temperature 0: greedy.
        let params = [0.0_f32, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0].map(f32::to_bits);
        self.write("input.params", &params);
        self.write("input.seed", &[7, 9]);
        self.write("input.bias_tokens", &[u32::MAX; 512]);
        self.write("input.bias_values", &[0; 512]);
        self.write("input.forced", &[u32::MAX]);
        self.program.run(slot, self.plan(Phase::Configure, 0, 0)).unwrap();
    }

    fn prefill(&mut self, slot: SlotId, tokens: &[u32], bucket: usize) {
        let mut padded = tokens.to_vec();
        padded.resize(bucket, 77);
        self.write("input.tokens", &padded);
        self.write("input.count", &[tokens.len() as u32]);
        self.program.run(slot, self.plan(Phase::Prefill, bucket, 0)).unwrap();
    }

    fn decode(&mut self, slot: SlotId, context: usize) -> u32 {
        self.program.run(slot, self.plan(Phase::Decode, 1, context)).unwrap();
        let mut token = [0; 4];
        self.program.read_output(self.buffer("output.token"), 0, &mut token).unwrap();
        u32::from_le_bytes(token)
    }

    fn state(&mut self, slot: SlotId, name: &str, rows: std::ops::Range<usize>) -> Vec<u8> {
        let region = Region { buffer: self.buffer(name), rows };
        let mut bytes = vec![0; region.bytes(&self.program.model().model().buffers)];
        self.program.read_state(slot, &region, &mut bytes).unwrap();
        bytes
    }

    fn logits(&mut self, slot: SlotId) -> Vec<f32> {
        let bytes = self.state(slot, "sampler.logits", 0..1);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

/// Varied text: no token repeats soon.
fn text(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 193 + 41 + i * i * 7) % VOCABULARY as u32).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let difference: f64 = a.iter().zip(b).map(|(x, y)| square(f64::from(x - y))).sum();
    let size: f64 = b.iter().map(|y| square(f64::from(*y))).sum();
    (difference / size).sqrt()
}

#[test]
fn logits_are_those_of_the_reference() {
    let Some(backend) = gpu(options()) else { return };
    for (dtype, allowed) in [(DType::F32, 1e-4), (DType::BF16, 3e-2), (DType::F16, 1e-2)] {
        let built = model(dtype);
        let mut ours = Runner::new(&backend, &built);
        let mut theirs = Runner::new(&ReferenceBackend, &built);
        let (a, b) = (ours.reset(), theirs.reset());
        let tokens = text(23);
        ours.prefill(a, &tokens, 32);
        theirs.prefill(b, &tokens, 32);
        let error = distance(&ours.logits(a), &theirs.logits(b));
        println!("{dtype}: prefill error {error:e}");
        assert!(error < allowed, "{dtype}: prefill differs by {error}");
        for step in 0..8 {
            // The same token on both sides, whatever a near tie did.
            let token = step * 31 + 5;
            for (runner, slot) in [(&mut ours, a), (&mut theirs, b)] {
                runner.write("input.forced", &[token]);
                assert_eq!(runner.decode(slot, 256), token);
            }
            let error = distance(&ours.logits(a), &theirs.logits(b));
            assert!(error < allowed, "{dtype}: decode step {step} differs by {error}");
        }
    }
}

#[test]
fn fusion_chains_and_early_launch_change_no_bit() {
    let on = CudaOptions { chain: true, ..CudaOptions::default() };
    let variants = [
        on,
        CudaOptions { chain: false, ..on },
        CudaOptions { chain_depth: 2, chain_near: 2, ..on },
        CudaOptions { fusion: false, ..on },
        CudaOptions { programmatic_launch: false, ..on },
        CudaOptions {
            fusion: false,
            chain: false,
            programmatic_launch: false,
            gemv_blocks: 1,
            ..on
        },
    ];
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let built = model(dtype);
        let mut expected: Option<(Vec<u32>, Vec<f32>)> = None;
        for options in variants {
            let Some(backend) = gpu(options) else { return };
            let mut runner = Runner::new(&backend, &built);
            let slot = runner.reset();
            runner.prefill(slot, &text(40), 64);
            let tokens: Vec<u32> = (0..24).map(|_| runner.decode(slot, 256)).collect();
            let got = (tokens, runner.logits(slot));
            let expected = expected.get_or_insert_with(|| got.clone());
            assert_eq!(got.0, expected.0, "{options:?}");
            assert!(
                bits(&got.1) == bits(&expected.1),
                "{options:?}: {:e}",
                distance(&got.1, &expected.1)
            );
        }
    }
}

/// Heads of 256 elements, several query heads for each key head, keys of more than one part: what the kernel for tensor cores
/// takes, and the tiny model does not have.
#[test]
fn prefill_of_wide_heads_is_near_decode() {
    let Some(backend) = gpu(options()) else { return };
    let built = model_with_context("random:qwen3.5-0.8b", DType::BF16, 1024);
    let mut runner = Runner::new(&backend, &built);
    let (read, decoded) = (runner.reset(), runner.reset());
    let tokens = text(600);
    for part in tokens.chunks(64) {
        runner.prefill(read, part, 64);
    }
    runner.prefill(decoded, &tokens[..1], 1);
    for &token in &tokens[1..] {
        runner.write("input.forced", &[token]);
        assert_eq!(runner.decode(decoded, 1024), token);
    }
    let error = distance(&runner.logits(read), &runner.logits(decoded));
    println!("prefill against decode: {error:e}");
    assert!(error < 5e-2, "prefill differs from decode by {error}");
}

/// Rows of several pieces, several rows a warp, norms by a whole block: none of which the tiny model has.
#[test]
fn chains_of_large_shapes_change_no_bit() {
    for name in ["random:qwen3.5-0.8b", "random:qwen3.5-9b"] {
        let built = model_of(name, DType::BF16);
        let mut expected: Option<(Vec<u32>, Vec<u32>, usize)> = None;
        for chain in [false, true] {
            let options = CudaOptions { chain, ..CudaOptions::default() };
            let Some(backend) = gpu(options) else { return };
            let mut runner = Runner::new(&backend, &built);
            let slot = runner.reset();
            runner.prefill(slot, &text(40), 64);
            let tokens: Vec<u32> = (0..24).map(|_| runner.decode(slot, 256)).collect();
            let logits = bits(&runner.logits(slot));
            let decode = runner.plan(Phase::Decode, 1, 256);
            let launches = runner.program.time_steps(slot, decode, 64).unwrap().len();
            let Some(single) = expected.replace((tokens.clone(), logits.clone(), launches)) else {
                continue;
            };
            assert_eq!(tokens, single.0, "{name}");
            assert!(logits == single.1, "{name}: logits differ");
            if (9..=10).contains(&backend.gpu().capability.0) {
                assert!(launches < single.2, "{name}: no chains: {launches} launches");
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Random weights for every buffer.
struct Random;

impl WeightSource for Random {
    fn random(&self, buffer: BufferId) -> Option<RandomFill> {
        Some(RandomFill { seed: u64::from(buffer.0), centre: 0.0, half_width: 0.1 })
    }

    fn read(&self, _: BufferId, _: usize, into: &mut [u8]) -> Result<(), WeightError> {
        into.fill(0);
        Ok(())
    }
}

/// Up to eight rows go through a matrix-vector product together; each must get the bits that it gets alone.
#[test]
fn a_row_of_a_product_has_the_bits_it_has_alone() {
    let Some(backend) = gpu(options()) else { return };
    let (bf16, f16, f32) = (DType::BF16, DType::F16, DType::F32);
    for (weights, operand) in [(bf16, bf16), (f16, f16), (bf16, f32), (f32, f32), (f16, bf16)] {
        for (n, k) in [(700, 264), (512, 4096), (130, 12_288)] {
            for rows in [2, 3, 5, 7, 8] {
                let mut table = BufferTable::default();
                let mut add = |name: &str, role, dtype, shape: &[usize]| {
                    let (name, shape) = (name.to_owned(), shape.to_vec());
                    let id = table.add(Buffer { name, role, dtype, shape }).unwrap();
                    table.view(id)
                };
                let x = add("x", Role::Input, operand, &[rows, k]);
                let weight = add("weight", Role::Weight, weights, &[n, k]);
                let together = add("together", Role::Output, f32, &[rows, n]);
                let alone = add("alone", Role::Output, f32, &[rows, n]);
                let row = |view: &View, r: usize| View { rows: r..r + 1, ..view.clone() };
                let linear = |x: View, out: View| -> Op {
                    Linear { x, weight: weight.clone(), bias: None, out }.into()
                };
                let mut ops = vec![linear(x.clone(), together.clone())];
                ops.extend((0..rows).map(|r| linear(row(&x, r), row(&alone, r))));
                let key = |phase| ShapeKey { phase, tokens: 1, slots: 1, context: 1 };
                let plans = vec![
                    Plan { key: key(Phase::Reset), count: None, ops: Vec::new() },
                    Plan { key: key(Phase::Decode), count: None, ops },
                ];
                let model = Model { name: "rows".to_owned(), buffers: table, plans };
                let sealed = Arc::new(model.seal().unwrap());
                let load = LoadOptions { slots: 1, capsule_bytes: 0 };
                let mut program = backend.load(sealed, &Random, load, &mut |_, _| {}).unwrap();
                let slot = program.create_slot().unwrap();
                let fill = RandomFill { seed: 77, centre: 0.0, half_width: 2.0 };
                let value = |i: usize| fill.value(i as u64).to_bits();
                let bytes: Vec<u8> = match operand {
                    DType::F32 => (0..rows * k).flat_map(|i| value(i).to_le_bytes()).collect(),
                    // The upper half of a float is a bf16, and some half-precision number, too.
                    _ => (0..rows * k)
                        .flat_map(|i| ((value(i) >> 16) as u16).to_le_bytes())
                        .collect(),
                };
                program.write_input(x.buffer, &bytes).unwrap();
                program.run(slot, 1).unwrap();
                let mut read = |view: &View| {
                    let mut bytes = vec![0; rows * n * 4];
                    program.read_output(view.buffer, 0, &mut bytes).unwrap();
                    bytes
                };
                let (together, alone) = (read(&together), read(&alone));
                assert!(together == alone, "{weights} x {operand}, {rows} rows, {n} x {k}");
                assert!(together.iter().any(|b| *b != 0));
            }
        }
    }
}

#[test]
fn prefill_does_not_depend_on_how_it_is_cut() {
    let Some(backend) = gpu(options()) else { return };
    for dtype in [DType::F32, DType::BF16] {
        let built = model(dtype);
        let mut runner = Runner::new(&backend, &built);
        let slot = runner.reset();
        let tokens = text(50);
        let mut expected: Option<Vec<u32>> = None;
        for cuts in [
            &[(50, 64)][..],
            &[(32, 32), (18, 32)],
            &[(1, 1), (17, 64), (32, 32)],
            &[(7, 32), (43, 64)],
        ] {
            runner.empty(slot);
            runner.program.poison().unwrap();
            let mut done = 0;
            for &(count, bucket) in cuts {
                runner.prefill(slot, &tokens[done..done + count], bucket);
                done += count;
            }
            let got = bits(&runner.logits(slot));
            assert!(got == *expected.get_or_insert_with(|| got.clone()), "{dtype}, cut {cuts:?}");
        }
    }
}

#[test]
fn decode_does_not_depend_on_the_context_bucket() {
    let Some(backend) = gpu(options()) else { return };
    let built = model(DType::BF16);
    let mut runner = Runner::new(&backend, &built);
    let slot = runner.reset();
    let mut runs = Vec::new();
    for context in [256, 512] {
        runner.empty(slot);
        runner.prefill(slot, &text(60), 64);
        let tokens: Vec<u32> = (0..16).map(|_| runner.decode(slot, context)).collect();
        runs.push((tokens, bits(&runner.logits(slot))));
    }
    assert!(runs[0] == runs[1]);
}

#[test]
fn a_thawed_slot_goes_on_as_if_nothing_had_happened() {
    let Some(backend) = gpu(options()) else { return };
    let built = model(DType::BF16);
    let mut runner = Runner::new(&backend, &built);
    let (first, second) = (runner.reset(), runner.reset());
    runner.prefill(first, &text(45), 64);
    let regions = StateRegions::of(&built.sealed).at(45);
    let frozen = runner.program.freeze(first, &regions).unwrap();
    let expected: Vec<u32> = (0..12).map(|_| runner.decode(first, 256)).collect();
    let logits = bits(&runner.logits(first));

    runner.program.thaw(second, std::slice::from_ref(&frozen)).unwrap();
    let got: Vec<u32> = (0..12).map(|_| runner.decode(second, 256)).collect();
    assert_eq!(got, expected);
    assert!(bits(&runner.logits(second)) == logits);

    // Out to the host and in again.
    let bytes: Vec<Vec<u8>> = regions
        .iter()
        .enumerate()
        .map(|(i, r)| {
            let mut bytes = vec![0; r.bytes(&built.sealed.model().buffers)];
            frozen.read(i, &mut bytes).unwrap();
            bytes
        })
        .collect();
    let parts: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    let imported = runner.program.freeze_bytes(&regions, &parts).unwrap();
    runner.program.thaw(first, &[imported]).unwrap();
    for (region, bytes) in regions.iter().zip(&bytes) {
        let name = built.sealed.buffer(region.buffer).name.clone();
        assert!(runner.state(first, &name, region.rows.clone()) == *bytes, "{name}");
    }
}

#[test]
fn the_capsule_budget_is_kept_and_given_back() {
    let Some(backend) = gpu(options()) else { return };
    let built = model(DType::F32);
    let mut runner = Runner::new(&backend, &built);
    let slot = runner.reset();
    let state = StateRegions::of(&built.sealed);
    let regions = state.fixed();
    let mut alive: Vec<Arc<dyn Frozen>> = Vec::new();
    let refused = loop {
        match runner.program.freeze(slot, regions) {
            Ok(frozen) => alive.push(frozen),
            Err(error) => break error,
        }
    };
    let (used, budget) = runner.program.frozen_bytes();
    assert!(matches!(refused, BackendError::CapsuleBudget { .. }), "{refused}");
    assert_eq!(used, alive.iter().map(|f| f.bytes()).sum::<usize>());
    assert_eq!(alive.len(), budget / alive[0].bytes());
    alive.pop();
    // Room for one part, not for two: neither is made.
    let used = runner.program.frozen_bytes().0;
    let part = Part { regions, settled: false };
    match runner.program.freeze_parts(slot, &[part, part]) {
        Err(BackendError::CapsuleBudget { wanted, .. }) => assert_eq!(wanted, 2 * alive[0].bytes()),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("more than the budget"),
    }
    assert_eq!(runner.program.frozen_bytes().0, used);
    alive.push(runner.program.freeze(slot, regions).unwrap());
    alive.clear();
    assert_eq!(runner.program.frozen_bytes().0, 0);
}

/// Counted at the driver, with chains and everything else as they are loaded for use, sampled, in one session and then in
/// turns between four.
#[test]
fn a_step_of_the_engine_is_one_graph_and_nothing_else() {
    if gpu(options()).is_none() {
        return;
    }
    let options = LoadForUse {
        device: Device::Cuda,
        context: 32_768,
        engine: EngineOptions { slots: 4, capsule_bytes: 64 << 20, ..EngineOptions::default() },
        ..LoadForUse::default()
    };
    let before = bench::driver_calls();
    let mut model = Ampoule::load("random:qwen3.5-0.8b", &options, &mut |_, _| {}).unwrap();
    let captures = bench::driver_calls().captures - before.captures;
    println!("{captures} captures for four slots of 32768 tokens");
    assert!(captures <= 24, "{captures} captures");
    let sampled = SamplingParams { temperature: 0.8, top_p: 0.9, ..SamplingParams::default() };
    let mut slots = Vec::new();
    for number in 0..4 {
        let tokens = sample_tokens(&model, 100 + 40 * number, number as u64).unwrap();
        let slot = model.slot_with(&tokens).unwrap();
        model.engine.configure(slot, &sampled).unwrap();
        slots.push(slot);
    }
    for _ in 0..2 {
        for &slot in &slots {
            model.engine.step(slot).unwrap();
        }
    }
    for (sessions, switches) in [(&slots[..1], 1), (&slots[..], 256)] {
        let before = bench::driver_calls();
        for step in 0..256 {
            model.engine.step(sessions[step % sessions.len()]).unwrap();
        }
        let after = bench::driver_calls();
        assert_eq!(after.graphs - before.graphs, 256);
        // Eight bytes on the device where another slot's turn begins.
        assert!(after.copies - before.copies <= switches, "{before:?} {after:?}");
        let rest = |c: DriverCalls| (c.kernels, c.allocations, c.captures, c.waits);
        assert_eq!(rest(after), rest(before), "{} sessions", sessions.len());
    }
}

/// Four sessions take turns on one set of graphs; each must be what it is alone, in a program with one slot.
#[test]
fn slots_share_graphs_and_nothing_else() {
    let Some(backend) = gpu(options()) else { return };
    for dtype in [DType::F32, DType::BF16] {
        let built = model(dtype);
        let texts: Vec<Vec<u32>> = (0..4)
            .map(|n| text(60).iter().map(|t| (t + 7 * n) % VOCABULARY as u32).collect())
            .collect();
        let alone: Vec<(Vec<u32>, Vec<u32>)> = texts
            .iter()
            .map(|tokens| {
                let mut runner = Runner::with_slots(&backend, &built, 1);
                let slot = runner.reset();
                runner.prefill(slot, &tokens[..40], 64);
                runner.prefill(slot, &tokens[40..], 32);
                let drawn = (0..20).map(|_| runner.decode(slot, 256)).collect();
                (drawn, bits(&runner.logits(slot)))
            })
            .collect();
        let mut runner = Runner::with_slots(&backend, &built, 4);
        let slots: Vec<SlotId> = (0..4).map(|_| runner.reset()).collect();
        for (&slot, tokens) in slots.iter().zip(&texts) {
            runner.prefill(slot, &tokens[..40], 64);
        }
        for (&slot, tokens) in slots.iter().zip(&texts).rev() {
            runner.prefill(slot, &tokens[40..], 32);
        }
        let mut drawn = vec![Vec::new(); 4];
        for step in 0..20 {
            for turn in 0..4 {
                let which = (turn * 3 + step) % 4;
                drawn[which].push(runner.decode(slots[which], 256));
            }
        }
        for (which, (tokens, logits)) in alone.iter().enumerate() {
            assert_eq!(drawn[which], *tokens, "{dtype}, slot {which}");
            assert!(bits(&runner.logits(slots[which])) == *logits, "{dtype}, slot {which}");
        }
        let plans = built.sealed.model().plans.len() as u64;
        assert_eq!(runner.program.counters().captures, plans);
    }
}

/// Rows of a snapshot are copied while replays go on: what is frozen must be what stood there when it was asked for, whatever
/// overwrites the rows, or takes the room of what was dropped, right afterwards.
#[test]
fn rows_copied_beside_replays_are_those_of_the_boundary() {
    let Some(backend) = gpu(options()) else { return };
    let context = 8192;
    let built = model_with_context("random:qwen3.5-0.8b", DType::BF16, context);
    let options = LoadOptions { slots: 2, capsule_bytes: 768 << 20 };
    let mut runner = Runner::of(&backend, &built, options);
    let (slot, other) = (runner.reset(), runner.reset());
    let table = &built.sealed.model().buffers;
    let state = StateRegions::of(&built.sealed);
    let fixed = state.fixed();
    // Rows of all the context, each of a text of its own, filled without reading 8192 tokens.
    let whole = state.rows(&(0..context));
    let pattern = |round: u64, region: &Region| -> Vec<u8> {
        let word = |i: usize| {
            (i as u64 * 0x9e37_79b9 + round * 7919 + u64::from(region.buffer.0)) as u8 & 0x3f
        };
        (0..region.bytes(table)).map(word).collect()
    };
    for round in 0..12_u64 {
        let bytes: Vec<Vec<u8>> = whole.iter().map(|r| pattern(round, r)).collect();
        let parts: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        let filled = runner.program.freeze_bytes(&whole, &parts).unwrap();
        runner.program.thaw(slot, &[filled]).unwrap();
        let parts =
            [Part { regions: fixed, settled: false }, Part { regions: &whole, settled: true }];
        let mut frozen = runner.program.freeze_parts(slot, &parts).unwrap();
        let rows = frozen.pop().unwrap();
        match round % 3 {
            // The slot begins anew and overwrites its first rows.
            0 => {
                runner.empty(slot);
                for _ in 0..4 {
                    runner.prefill(slot, &text(64), 64);
                }
            }
            // Other state is thawed over them.
            1 => {
                let zeros: Vec<Vec<u8>> = whole.iter().map(|r| vec![0; r.bytes(table)]).collect();
                let zeros: Vec<&[u8]> = zeros.iter().map(Vec::as_slice).collect();
                let nothing = runner.program.freeze_bytes(&whole, &zeros).unwrap();
                runner.program.thaw(slot, &[nothing]).unwrap();
            }
            // The state is thawed elsewhere at once, and what was copied a moment ago is dropped and its room taken.
            _ => {
                let again = runner.program.freeze_parts(slot, &parts[1..]).unwrap();
                runner.program.thaw(other, &[Arc::clone(&rows)]).unwrap();
                drop(again);
                runner.program.freeze(other, &whole).unwrap();
                for (region, expected) in whole.iter().zip(&bytes) {
                    let name = &table[region.buffer].name;
                    let got = runner.state(other, name, region.rows.clone());
                    assert!(got == *expected, "round {round}: '{name}' elsewhere");
                }
            }
        }
        let got = contents(&rows, table);
        assert!(got == bytes.concat(), "round {round}");
    }
}

/// Regions of all sizes at all addresses, few and many of them: every byte of theirs is copied and none beside them.
#[test]
fn regions_of_any_size_are_copied_whole_and_nothing_else_is() {
    copy_regions_of_any_size(&ReferenceBackend, 200);
    for bulk_copies in [true, false] {
        let options = CudaOptions { bulk_copies, ..options() };
        let Some(backend) = gpu(options) else { return };
        // More than all multiprocessors' rings of a bulk copy hold.
        copy_regions_of_any_size(&backend, 16_000);
    }
}

fn copy_regions_of_any_size(backend: &dyn Backend, large: usize) {
    // Rows of 4, 28, 68 and 4096 bytes, up to several tiles of a copy.
    let shapes = [(3000, 1), (900, 7), (4000, 17), (large, 1024), (1, 70_001), (1, 3)];
    let mut buffers = BufferTable::default();
    let ids = shapes.map(|(rows, cols)| {
        let kind = StateKind::Other("any".to_owned());
        let role = Role::State { kind, growth: Growth::Fixed };
        let (name, shape) = (format!("state.{rows}x{cols}"), vec![rows, cols]);
        buffers.add(Buffer { name, role, dtype: DType::F32, shape }).unwrap()
    });
    let ops = ids.map(|b| -> Op { Fill { out: buffers.view(b), bits: 0 }.into() }).to_vec();
    let key = ShapeKey { phase: Phase::Reset, tokens: 1, slots: 1, context: 1 };
    let plans = vec![Plan { key, count: None, ops }];
    let sealed = Arc::new(Model { name: "regions".to_owned(), buffers, plans }.seal().unwrap());
    let options = LoadOptions { slots: 2, capsule_bytes: 256 << 20 };
    let mut program = backend.load(Arc::clone(&sealed), &Random, options, &mut |_, _| {}).unwrap();
    let (from, to) = (program.create_slot().unwrap(), program.create_slot().unwrap());
    let table = &sealed.model().buffers;
    let all: Vec<Region> =
        ids.iter().map(|&buffer| Region { buffer, rows: 0..table[buffer].rows() }).collect();
    let mut seed = 5_u64;
    let mut pick = move |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    // Pieces of a copy: 8, 96 and 960 at most a launch.
    for count in [1, 3, 8, 9, 40, 96, 97, 700, 1100] {
        let filled = |salt: usize| -> Vec<Vec<u8>> {
            let byte = |i: usize| ((i * 31 + i / 251 + salt) ^ (i >> 7)) as u8;
            all.iter().map(|r| (0..r.bytes(table)).map(byte).collect()).collect()
        };
        let (source, mut expected) = (filled(count), filled(count + 77));
        for (slot, bytes) in [(from, &source), (to, &expected)] {
            let bytes: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
            let frozen = program.freeze_bytes(&all, &bytes).unwrap();
            program.thaw(slot, &[frozen]).unwrap();
        }
        // Disjoint: cut one buffer after another at random places, and take every second stretch.
        let mut regions = Vec::new();
        for (index, region) in all.iter().enumerate() {
            let rows = region.rows.end;
            let cuts = (2 * count / 3).min(rows);
            let mut at: Vec<usize> = (0..cuts).map(|_| pick(rows + 1)).collect();
            at.sort_unstable();
            for pair in at.chunks_exact(2).filter(|pair| pair[0] < pair[1]) {
                regions.push(Region { buffer: region.buffer, rows: pair[0]..pair[1] });
                let row = table[region.buffer].row_bytes();
                let bytes = pair[0] * row..pair[1] * row;
                expected[index][bytes.clone()].copy_from_slice(&source[index][bytes]);
            }
        }
        // And two whole neighbours.
        for index in [4, 5] {
            regions.retain(|r| r.buffer != ids[index]);
            regions.push(all[index].clone());
            expected[index].copy_from_slice(&source[index]);
        }
        let frozen = program.freeze(from, &regions).unwrap();
        for (index, region) in regions.iter().enumerate() {
            let at = ids.iter().position(|&b| b == region.buffer).unwrap();
            let row = table[region.buffer].row_bytes();
            let mut got = vec![0; region.bytes(table)];
            frozen.read(index, &mut got).unwrap();
            let wanted = &source[at][region.rows.start * row..region.rows.end * row];
            assert!(got == wanted, "{count}: {region:?} as frozen");
        }
        program.thaw(to, &[frozen]).unwrap();
        for (region, wanted) in all.iter().zip(&expected) {
            let mut got = vec![0; wanted.len()];
            program.read_state(to, region, &mut got).unwrap();
            let differs = got.iter().zip(wanted).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{} regions: {region:?}", regions.len());
        }
    }
}

#[test]
fn a_decode_step_is_one_launch_and_one_wait() {
    let Some(backend) = gpu(options()) else { return };
    let built = model(DType::BF16);
    let mut runner = Runner::new(&backend, &built);
    let slot = runner.reset();
    runner.prefill(slot, &text(20), 32);
    runner.decode(slot, 256);
    runner.program.synchronize().unwrap();
    let before = runner.program.counters();
    for _ in 0..50 {
        runner.write("input.forced", &[u32::MAX]);
        runner.decode(slot, 256);
    }
    let after = runner.program.counters();
    assert_eq!(after.launches - before.launches, 50);
    assert_eq!(after.synchronizations - before.synchronizations, 50);
    assert_eq!((after.allocations, after.captures), (before.allocations, before.captures));
}

/// Kilobytes of a line of /proc/self/status.
fn status_kib(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(name));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

/// All bytes of frozen state.
fn contents(frozen: &Arc<dyn Frozen>, table: &BufferTable) -> Vec<u8> {
    let mut all = Vec::new();
    for (index, region) in frozen.regions().iter().enumerate() {
        let mut bytes = vec![0; region.bytes(table)];
        frozen.read(index, &mut bytes).unwrap();
        all.extend(bytes);
    }
    all
}

#[test]
fn ten_thousand_capsules_leave_no_trace() {
    let Some(backend) = gpu(options()) else { return };
    let built = model(DType::BF16);
    let mut runner = Runner::new(&backend, &built);
    let slot = runner.reset();
    let table = &built.sealed.model().buffers;
    // On the device, and in page-locked host memory.
    // Room for some ten capsules of a slot's size: most cycles stand at the budget.
    let (mut alive, mut waiting) = (Vec::<Arc<dyn Frozen>>::new(), Vec::<Arc<dyn Frozen>>::new());
    let mut seed = 1_u64;
    let mut pick = move |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    let mut before = None;
    let mut refused = 0;
    let at_load = runner.program.counters().allocations;
    // As much page-locked memory as will ever be wanted: what is locked stays so.
    let state = StateRegions::of(&built.sealed);
    let largest = runner.program.freeze(slot, &state.at(500)).unwrap();
    for _ in 0..210 {
        waiting.push(runner.program.relocate(&largest, Residence::Host).unwrap());
    }
    drop(largest);
    waiting.clear();
    for cycle in 0..11_000 {
        if cycle == 1000 {
            // Everything that is made once has been made.
            alive.clear();
            waiting.clear();
            runner.program.synchronize().unwrap();
            let counters = runner.program.counters();
            let host = status_kib("VmRSS");
            before = Some((bench::free_memory(&backend).unwrap(), counters.allocations, host));
        }
        match runner.program.freeze(slot, &state.at(1 + pick(500))) {
            Ok(frozen) => alive.push(frozen),
            Err(BackendError::CapsuleBudget { .. }) => {
                refused += 1;
                alive.swap_remove(pick(alive.len()));
            }
            Err(error) => panic!("cycle {cycle}: {error}"),
        }
        if !alive.is_empty() {
            let part = Arc::clone(&alive[pick(alive.len())]);
            runner.program.thaw(slot, &[part]).unwrap();
        }
        if !alive.is_empty() && pick(4) == 0 {
            let one = alive.swap_remove(pick(alive.len()));
            let moved = runner.program.relocate(&one, Residence::Host).unwrap();
            assert!(
                cycle % 50 != 0 || contents(&moved, table) == contents(&one, table),
                "cycle {cycle}"
            );
            waiting.push(moved);
        }
        while waiting.len() > 200 {
            waiting.swap_remove(pick(waiting.len()));
        }
        if waiting.len() > pick(256) {
            let one = waiting.swap_remove(pick(waiting.len()));
            match runner.program.relocate(&one, Residence::Device) {
                Ok(moved) => {
                    assert!(
                        cycle % 50 != 0 || contents(&moved, table) == contents(&one, table),
                        "cycle {cycle}"
                    );
                    alive.push(moved);
                }
                Err(BackendError::CapsuleBudget { .. }) => refused += 1,
                Err(error) => panic!("cycle {cycle}: {error}"),
            }
        }
        if alive.len() > pick(64) {
            alive.swap_remove(pick(alive.len()));
        }
    }
    alive.clear();
    waiting.clear();
    runner.program.synchronize().unwrap();
    let (free, allocations, host) = before.unwrap();
    assert_eq!(runner.program.frozen_bytes().0, 0);
    assert_eq!(bench::free_memory(&backend).unwrap(), free);
    assert_eq!(runner.program.counters().allocations, allocations);
    let grown = status_kib("VmRSS").saturating_sub(host);
    assert!(grown < 8 << 10, "the process grew by {grown} KiB");
    assert!(refused > 1000, "{refused} over budget: no pressure");
    let slabs = allocations - at_load;
    assert!(slabs > 1, "{slabs} slabs of page-locked memory");
    println!("10000 cycles, {refused} over budget, {slabs} slabs, grown by {grown} KiB");
}

#[test]
fn launches_are_timed_and_cover_the_plan() {
    let Some(backend) = gpu(options()) else { return };
    let built = model(DType::BF16);
    let mut runner = Runner::new(&backend, &built);
    let slot = runner.reset();
    let plan = runner.plan(Phase::Decode, 1, 256);
    let times = runner.program.time_steps(slot, plan, 100).unwrap();
    let mut ops: Vec<usize> = times.iter().flat_map(|t| t.ops.clone()).collect();
    ops.sort_unstable();
    ops.dedup();
    assert_eq!(ops, (0..built.sealed.model().plans[plan].ops.len()).collect::<Vec<_>>());
    assert!(times.iter().all(|t| t.milliseconds > 0.0));
    // Tokens still arrive.
    runner.empty(slot);
    runner.prefill(slot, &text(20), 32);
    runner.decode(slot, 256);
}
