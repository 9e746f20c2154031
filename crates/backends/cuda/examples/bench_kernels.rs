//! Times kernels and whole steps on the GPU at hand, against their floors. Prints one JSON object a line.
//!
//! ```text
//! cargo run --release -p ampoule-cuda --example bench_kernels -- [gemv|launch|copy|attention|delta|sample|model]...
//! ```
//!
//! With `model`, `AMPOULE_BENCH_MODEL` names a random shape (default `qwen3.5-9b`), `AMPOULE_BENCH_LENGTHS` the prompts.
//! `profile` runs a decode step and a short prefill between the marks of `ncu --profile-from-start off`.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ampoule_backend::{Backend, BackendError, LoadOptions, Program, Region, SlotId, StateRegions};
use ampoule_cuda::{CudaBackend, CudaOptions, bench};
use ampoule_models::decoder::{BuildOptions, Precision};
use ampoule_models::model::ModelFiles;
use ampoule_plan::{
    Advance, Attention, Buffer, BufferId, BufferTable, Copy, DType, Fill, GatedDelta, Growth,
    KvAppend, Linear, Model, Op, Phase, Plan, RandomFill, Role, Sample, ShapeKey, StateKind, View,
    WeightError, WeightSource,
};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Random weights for every buffer.
struct Random;

impl WeightSource for Random {
    fn random(&self, buffer: BufferId) -> Option<RandomFill> {
        Some(RandomFill { seed: u64::from(buffer.0), centre: 0.0, half_width: 0.02 })
    }

    fn read(&self, _: BufferId, _: usize, into: &mut [u8]) -> Result<(), WeightError> {
        into.fill(0);
        Ok(())
    }
}

/// A model with a reset plan and one decode plan.
struct Bench {
    table: BufferTable,
    ops: Vec<Op>,
    reset: HashMap<BufferId, u32>,
    context: usize,
}

impl Bench {
    fn new(context: usize) -> Self {
        Self { table: BufferTable::default(), ops: Vec::new(), reset: HashMap::new(), context }
    }

    fn add(&mut self, role: Role, dtype: DType, shape: &[usize]) -> View {
        let name = format!("b{}", self.table.len());
        let id = self.table.add(Buffer { name, role, dtype, shape: shape.to_vec() }).expect("fits");
        self.table.view(id)
    }

    fn state(&mut self, kind: StateKind, growth: Growth, dtype: DType, shape: &[usize]) -> View {
        self.add(Role::State { kind, growth }, dtype, shape)
    }

    fn cursor(&mut self, position: u32) -> View {
        let view = self.state(StateKind::Cursor, Growth::Fixed, DType::U32, &[1, 4]);
        self.reset.insert(view.buffer, position);
        view
    }

    fn load(
        self,
        backend: &CudaBackend,
        capsule_bytes: usize,
    ) -> Result<(Box<dyn Program>, SlotId), Failure> {
        let fills = self.table.iter().filter(|(_, b)| b.growth() == Some(Growth::Fixed));
        let fills = fills.map(|(id, _)| {
            Fill { out: self.table.view(id), bits: self.reset.get(&id).copied().unwrap_or(0) }
                .into()
        });
        let key = |phase| ShapeKey { phase, tokens: 1, slots: 1, context: self.context };
        let plans = vec![
            Plan { key: key(Phase::Reset), count: None, ops: fills.collect() },
            Plan { key: key(Phase::Decode), count: None, ops: self.ops },
        ];
        let sealed = Model { name: "bench".to_owned(), buffers: self.table, plans }.seal()?;
        let options = LoadOptions { slots: 1, capsule_bytes };
        let mut program = backend.load(Arc::new(sealed), &Random, options, &mut |_, _| {})?;
        let slot = program.create_slot()?;
        program.run(slot, 0)?;
        program.synchronize()?;
        Ok((program, slot))
    }
}

/// Microseconds of one replay: the median over batches of replays in a row.
fn time(
    program: &mut dyn Program,
    batch: usize,
    mut step: impl FnMut(&mut dyn Program) -> Result<(), BackendError>,
) -> Result<f64, BackendError> {
    for _ in 0..3 {
        step(program)?;
    }
    program.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..9 {
        let begun = Instant::now();
        for _ in 0..batch {
            step(program)?;
        }
        program.synchronize()?;
        times.push(begun.elapsed().as_secs_f64() * 1e6 / batch as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn say(value: &Value) {
    println!("{value}");
}

/// Chains of linears over more weights than the cache holds: time per linear, launch gaps included.
fn gemv(backend: &CudaBackend, label: &str) -> Result<(), Failure> {
    for (n, k) in [
        (12_352, 4096),
        (10_240, 4096),
        (4096, 4096),
        (24_576, 4096),
        (4096, 12_288),
        (248_320, 4096),
    ] {
        for rows in [1, 2, 4, 8] {
            let bytes = n * k * 2;
            let count = (3_usize << 30).div_ceil(bytes).clamp(2, 64);
            let mut b = Bench::new(1);
            let x = b.add(Role::Input, DType::BF16, &[rows, k]);
            let out = b.add(Role::Output, DType::BF16, &[rows, n]);
            for _ in 0..count {
                let weight = b.add(Role::Weight, DType::BF16, &[n, k]);
                b.ops.push(Linear { x: x.clone(), weight, bias: None, out: out.clone() }.into());
            }
            let (mut program, slot) = b.load(backend, 0)?;
            let us = time(program.as_mut(), 4, |p| p.run(slot, 1))? / count as f64;
            say(
                &json!({"bench": "gemv", "options": label, "rows": rows, "n": n, "k": k, "us": us, "TB/s": bytes as f64 / us / 1e6}),
            );
        }
    }
    Ok(())
}

/// Replays of plans of a few tiny kernels: what a launch and a kernel in a graph cost.
fn launch(backend: &CudaBackend, label: &str) -> Result<(), Failure> {
    let mut previous = 0.0;
    for kernels in [1, 101, 301] {
        let mut b = Bench::new(1);
        let cursor = b.cursor(0);
        for _ in 0..kernels {
            b.ops.push(Advance { count: None, cursor: cursor.clone() }.into());
        }
        let (mut program, slot) = b.load(backend, 0)?;
        let us = time(program.as_mut(), 64, |p| p.run(slot, 1))?;
        let begun = Instant::now();
        for _ in 0..64 {
            program.run(slot, 1)?;
        }
        let host = begun.elapsed().as_secs_f64() * 1e6 / 64.0;
        program.synchronize()?;
        let per_kernel = if kernels == 1 { 0.0 } else { (us - previous) / (kernels - 1) as f64 };
        if kernels == 1 {
            previous = us;
        }
        say(
            &json!({"bench": "launch", "options": label, "kernels": kernels, "us": us, "host_us": host, "us_per_kernel": per_kernel}),
        );
    }
    Ok(())
}

/// Freezing and thawing regions against one plain copy of the same bytes.
fn copy(backend: &CudaBackend) -> Result<(), Failure> {
    for (regions, kib) in [(64_usize, 1816_usize), (24, 2048), (16, 36_000), (300, 377)] {
        let bytes = regions * kib * 1024;
        let mut b = Bench::new(1);
        let cursor = b.cursor(0);
        b.ops.push(Advance { count: None, cursor }.into());
        let views: Vec<View> = (0..regions)
            .map(|_| b.state(StateKind::Recurrent, Growth::Fixed, DType::F32, &[kib, 256]))
            .collect();
        for pair in views.chunks(2) {
            if let [a, c] = pair {
                b.ops.push(Copy { source: a.clone(), out: c.clone() }.into());
            }
        }
        let (mut program, slot) = b.load(backend, 2 * bytes)?;
        let regions: Vec<Region> =
            views.iter().map(|v| Region { buffer: v.buffer, rows: v.rows.clone() }).collect();
        let freeze = time(program.as_mut(), 16, |p| p.freeze(slot, &regions).map(drop))?;
        let frozen = program.freeze(slot, &regions)?;
        let thaw = time(program.as_mut(), 16, |p| p.thaw(slot, std::slice::from_ref(&frozen)))?;
        drop(frozen);
        drop(program);
        let plain = bench::plain_copy(backend, bytes, 15)? * 1e3;
        say(&json!({
            "bench": "copy", "regions": regions.len(), "MiB": bytes >> 20, "freeze_us": freeze, "thaw_us": thaw,
            "plain_us": plain, "freeze_ratio": freeze / plain, "thaw_ratio": thaw / plain
        }));
    }
    Ok(())
}

/// Attention of one token over a long context, eight layers in a row.
fn attention(backend: &CudaBackend) -> Result<(), Failure> {
    for position in [128_u32, 2048, 16_384, 32_000] {
        let (heads, kv_heads, head_dim, context, layers) = (16, 4, 256, 32_768, 8);
        let mut b = Bench::new(context);
        let cursor = b.cursor(position);
        let query = b.add(Role::Input, DType::BF16, &[1, heads * head_dim]);
        let row = b.add(Role::Input, DType::BF16, &[1, kv_heads * head_dim]);
        let out = b.add(Role::Output, DType::BF16, &[1, heads * head_dim]);
        for _ in 0..layers {
            let mut cache = || {
                b.state(
                    StateKind::KvCache,
                    Growth::Rows,
                    DType::BF16,
                    &[context, kv_heads * head_dim],
                )
            };
            let (key_cache, value_cache) = (cache(), cache());
            b.ops.push(
                KvAppend {
                    key: row.clone(),
                    value: row.clone(),
                    cursor: cursor.clone(),
                    count: None,
                    key_cache: key_cache.clone(),
                    value_cache: value_cache.clone(),
                }
                .into(),
            );
            b.ops.push(
                Attention {
                    query: query.clone(),
                    key_cache,
                    value_cache,
                    cursor: cursor.clone(),
                    count: None,
                    out: out.clone(),
                    heads,
                    kv_heads,
                    head_dim,
                    scale: 0.0625,
                }
                .into(),
            );
        }
        let (mut program, slot) = b.load(backend, 0)?;
        let us = time(program.as_mut(), 16, |p| p.run(slot, 1))? / layers as f64;
        let bytes = f64::from(position + 1) * (2 * kv_heads * head_dim * 2) as f64;
        say(
            &json!({"bench": "attention", "position": position, "us": us, "TB/s": bytes / us / 1e6}),
        );
    }
    Ok(())
}

/// The gated delta rule for one token, 24 layers in a row.
fn delta(backend: &CudaBackend) -> Result<(), Failure> {
    let (key_heads, value_heads, dim, layers) = (16, 32, 128, 24);
    let mut b = Bench::new(1);
    let qkv = b.add(Role::Input, DType::BF16, &[1, 2 * key_heads * dim + value_heads * dim]);
    let decay = b.add(Role::Input, DType::BF16, &[1, value_heads]);
    let beta = b.add(Role::Input, DType::BF16, &[1, value_heads]);
    let a_log = b.add(Role::Weight, DType::F32, &[value_heads]);
    let dt_bias = b.add(Role::Weight, DType::F32, &[value_heads]);
    let out = b.add(Role::Output, DType::BF16, &[1, value_heads * dim]);
    for _ in 0..layers {
        let state =
            b.state(StateKind::Recurrent, Growth::Fixed, DType::F32, &[value_heads * dim, dim]);
        b.ops.push(
            GatedDelta {
                qkv: qkv.clone(),
                decay: decay.clone(),
                beta: beta.clone(),
                a_log: a_log.clone(),
                dt_bias: dt_bias.clone(),
                count: None,
                state,
                out: out.clone(),
                key_heads,
                value_heads,
                key_dim: dim,
                value_dim: dim,
            }
            .into(),
        );
    }
    let (mut program, slot) = b.load(backend, 0)?;
    let us = time(program.as_mut(), 16, |p| p.run(slot, 1))? / layers as f64;
    let bytes = (2 * value_heads * dim * dim * 4) as f64;
    say(&json!({"bench": "delta", "us": us, "TB/s": bytes / us / 1e6}));
    Ok(())
}

/// The sampler at the largest vocabulary, greedy and with every filter.
fn sample(backend: &CudaBackend) -> Result<(), Failure> {
    let v = 248_320;
    for (name, params) in [
        ("greedy", [0.0_f32, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        ("temperature", [0.8, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        ("top_k top_p", [0.8, 50.0, 0.9, 0.05, 1.1, 0.1, 0.1, 0.0]),
    ] {
        let mut b = Bench::new(1);
        let cursor = b.cursor(0);
        let logits = b.add(Role::Weight, DType::F32, &[1, v]);
        let params_in = b.add(Role::Input, DType::F32, &[1, 8]);
        let seed = b.add(Role::Input, DType::U32, &[1, 2]);
        let bias_tokens = b.add(Role::Input, DType::I32, &[1, 512]);
        let bias_values = b.add(Role::Input, DType::F32, &[1, 512]);
        let forced = b.add(Role::Input, DType::I32, &[1, 1]);
        let counts = b.state(StateKind::Sampler, Growth::Fixed, DType::U32, &[1, v]);
        let adjusted = b.add(Role::Scratch, DType::F32, &[1, v]);
        let token = b.add(Role::Output, DType::I32, &[1, 1]);
        let ids = (params_in.buffer, bias_tokens.buffer, forced.buffer, token.buffer);
        b.ops.push(
            Sample {
                logits,
                params: params_in,
                seed,
                bias_tokens,
                bias_values,
                cursor: cursor.clone(),
                forced,
                counts,
                adjusted,
                token,
            }
            .into(),
        );
        b.ops.push(Advance { count: None, cursor }.into());
        let (mut program, slot) = b.load(backend, 0)?;
        let bytes: Vec<u8> = params.iter().flat_map(|p| p.to_le_bytes()).collect();
        program.write_input(ids.0, &bytes)?;
        program.write_input(ids.1, &[0xff; 2048])?;
        program.write_input(ids.2, &[0xff; 4])?;
        let us = time(program.as_mut(), 32, |p| p.run(slot, 1))?;
        let turnaround = time(program.as_mut(), 32, |p| {
            p.run(slot, 1)?;
            p.read_output(ids.3, 0, &mut [0; 4])
        })?;
        say(
            &json!({"bench": "sample", "params": name, "us": us, "us_with_token_read": turnaround}),
        );
    }
    Ok(())
}

/// Whole steps of a random model: load, prefill, decode, snapshot.
fn model(backend: &CudaBackend, label: &str) -> Result<(), Failure> {
    let name = std::env::var("AMPOULE_BENCH_MODEL").unwrap_or_else(|_| "qwen3.5-9b".to_owned());
    let options = BuildOptions {
        context: 32_768,
        prefill: vec![32, 128, 512, 2048],
        score: 32,
        decode_contexts: vec![1024, 4096, 16_384, 32_768],
        precision: Precision { activation: DType::BF16, kv_cache: DType::BF16 },
    };
    let built = ModelFiles::open(&format!("random:{name}"))?.build(&options)?;
    let begun = Instant::now();
    let load = LoadOptions { slots: 2, capsule_bytes: 2 << 30 };
    let mut program =
        backend.load(Arc::clone(&built.sealed), &built.weights, load, &mut |_, _| {})?;
    say(
        &json!({"bench": "model load", "model": name, "s": begun.elapsed().as_secs_f64(), "captures": program.counters().captures}),
    );
    let find =
        |name: &str| built.sealed.model().buffers.find(name).ok_or(format!("no buffer {name}"));
    let plan = |phase, tokens, context| {
        let plans = &built.sealed.model().plans;
        let fits = |k: &ShapeKey| {
            k.phase == phase
                && (tokens == 0 || k.tokens == tokens)
                && (context == 0 || k.context == context)
        };
        plans.iter().position(|p| fits(&p.key)).ok_or(format!("no plan {phase} {tokens} {context}"))
    };
    let slot = program.create_slot()?;
    let (tokens, count, forced, token) =
        (find("input.tokens")?, find("input.count")?, find("input.forced")?, find("output.token")?);
    let params: Vec<u8> =
        [0.0_f32, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0].iter().flat_map(|p| p.to_le_bytes()).collect();
    program.write_input(find("input.params")?, &params)?;
    program.write_input(find("input.seed")?, &[1; 8])?;
    program.write_input(find("input.bias_tokens")?, &[0xff; 2048])?;
    program.write_input(find("input.bias_values")?, &[0; 2048])?;
    program.write_input(forced, &[0xff; 4])?;
    let ids: Vec<u8> =
        (0..2048_u32).flat_map(|i| ((i * 7919 + 13) % 200_000).to_le_bytes()).collect();
    program.write_input(tokens, &ids)?;
    let reset = plan(Phase::Reset, 0, 0)?;
    let configure = plan(Phase::Configure, 0, 0)?;
    let state = StateRegions::of(&built.sealed);
    let lengths = std::env::var("AMPOULE_BENCH_LENGTHS")
        .unwrap_or_else(|_| "128,2048,4096,8192,16384".to_owned());
    for length in lengths.split(',') {
        let length: usize = length.parse()?;
        let bucket = length.min(2048);
        program.run(slot, reset)?;
        program.run(slot, configure)?;
        program.write_input(count, &(bucket as u32).to_le_bytes())?;
        program.synchronize()?;
        let begun = Instant::now();
        for _ in 0..length / bucket {
            let prefill = plan(Phase::Prefill, if bucket == 128 { 128 } else { 2048 }, 0)?;
            program.run(slot, prefill)?;
        }
        program.synchronize()?;
        let prefill_ms = begun.elapsed().as_secs_f64() * 1e3;
        let regions = state.at(length);
        let freeze = time(program.as_mut(), 4, |p| p.freeze(slot, &regions).map(drop))?;
        let frozen = program.freeze(slot, &regions)?;
        let thaw = time(program.as_mut(), 4, |p| p.thaw(slot, std::slice::from_ref(&frozen)))?;
        if label == "profile" {
            let decode = plan(Phase::Decode, 1, if length < 900 { 1024 } else { 32_768 })?;
            program.run(slot, decode)?;
            program.synchronize()?;
            bench::profile(true)?;
            program.run(slot, decode)?;
            program.write_input(count, &24_u32.to_le_bytes())?;
            program.run(slot, plan(Phase::Prefill, 32, 0)?)?;
            program.synchronize()?;
            bench::profile(false)?;
            continue;
        }
        // A short suffix after a restore: the warm time to the first token, median of nine.
        program.write_input(count, &24_u32.to_le_bytes())?;
        let context =
            [1024, 4096, 16_384, 32_768].into_iter().find(|c| *c >= length + 256).unwrap_or(32_768);
        let decode = plan(Phase::Decode, 1, context)?;
        let mut warm = Vec::new();
        for _ in 0..9 {
            program.synchronize()?;
            let begun = Instant::now();
            program.thaw(slot, std::slice::from_ref(&frozen))?;
            program.run(slot, plan(Phase::Prefill, 32, 0)?)?;
            program.run(slot, decode)?;
            program.read_output(token, 0, &mut [0; 4])?;
            warm.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        warm.sort_by(f64::total_cmp);
        let warm_ms = warm[warm.len() / 2];
        for _ in 0..4 {
            program.run(slot, decode)?;
            program.read_output(token, 0, &mut [0; 4])?;
        }
        program.synchronize()?;
        let begun = Instant::now();
        for _ in 0..64 {
            program.run(slot, decode)?;
            program.read_output(token, 0, &mut [0; 4])?;
        }
        program.synchronize()?;
        let decode_ms = begun.elapsed().as_secs_f64() * 1e3 / 64.0;
        let bytes = frozen.bytes();
        say(&json!({
            "bench": "model", "model": name, "options": label, "length": length, "prefill_ms": prefill_ms, "warm_ttft_ms": warm_ms,
            "decode_ms": decode_ms, "freeze_us": freeze, "thaw_us": thaw, "capsule_MiB": bytes >> 20,
            "plain_copy_us": bench::plain_copy(backend, bytes, 9)? * 1e3
        }));
    }
    Ok(())
}

/// What can be asked for; all but the last where nothing is.
const PARTS: &[&str] =
    &["launch", "gemv", "copy", "attention", "delta", "sample", "model", "profile"];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|word| !PARTS.contains(&word.as_str())) {
        eprintln!(
            "error: there is no '{unknown}'\nusage: bench_kernels [PART...]  of {}",
            PARTS.join(", ")
        );
        return ExitCode::from(2);
    }
    match run(&wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn run(wanted: &[String]) -> Result<(), Failure> {
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    let on = CudaOptions::from_environment()?;
    let found = CudaBackend::discover()?;
    let ordinal = found.first().map_or(0, |g| g.ordinal);
    let backend = CudaBackend::with_options(ordinal, on)?;
    let info = backend.info();
    say(&json!({"device": info.class, "kernels": info.kernels, "description": info.description}));
    let plain =
        CudaBackend::with_options(ordinal, CudaOptions { programmatic_launch: false, ..on })?;
    if wants("launch") {
        launch(&backend, "early launch")?;
        launch(&plain, "plain")?;
    }
    if wants("gemv") {
        for blocks in [1, 2, 3, 4] {
            let tuned =
                CudaBackend::with_options(ordinal, CudaOptions { gemv_blocks: blocks, ..on })?;
            gemv(&tuned, &format!("early launch, {blocks} blocks"))?;
        }
        gemv(&plain, "plain")?;
    }
    if wants("copy") {
        copy(&backend)?;
    }
    if wants("attention") {
        attention(&backend)?;
    }
    if wants("delta") {
        delta(&backend)?;
    }
    if wants("sample") {
        sample(&backend)?;
    }
    if wants("model") {
        model(&backend, "all")?;
    }
    if wanted.iter().any(|w| w == "profile") {
        model(&backend, "profile")?;
    }
    Ok(())
}
