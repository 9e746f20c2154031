//! Speed of the matrix kernels at the shapes of SmolLM2-135M: `cargo run --release -p ampoule-cpu --example cpu_bench`.
//!
//! Prints medians, and the best in parentheses. Products of one row run over so many weights that no cache holds them. Arguments: number of
//! threads (0: all cores), rounds, and which part to run (1 to 6; 0: all).

use std::sync::Arc;
use std::time::Instant;

use ampoule_backend::{Backend, LoadOptions, Program, SlotId, WeightError, WeightSource};
use ampoule_cpu::CpuBackend;
use ampoule_plan::{
    Attention, Buffer, BufferId, BufferTable, DType, Embed, Fill, Growth, KvAppend, LastRow,
    Linear, LinearAdd, Model, Op, Phase, Plan, RandomFill, RmsNorm, Role, Rope, RopeStyle, Sample,
    ShapeKey, StateKind, SwiGlu, View,
};

/// Plausible bytes for every type: small integers and scales.
struct Bytes(Vec<DType>);

impl WeightSource for Bytes {
    fn random(&self, _: BufferId) -> Option<RandomFill> {
        None
    }

    fn read(&self, buffer: BufferId, offset: usize, into: &mut [u8]) -> Result<(), WeightError> {
        let dtype = self.0[buffer.index()];
        for (i, byte) in into.iter_mut().enumerate() {
            let at = (offset + i) % dtype.block_bytes();
            let noise = ((offset + i) as u32).wrapping_mul(2_654_435_761) >> 24;
            // The high byte of every float is that of a small number.
            *byte = match (dtype, at) {
                (DType::F32, 3) | (DType::BF16, 1) => 0x3c | (noise as u8 & 0x80),
                (DType::F16, 1) => 0x24 | (noise as u8 & 0x80),
                (DType::Q8_0 | DType::Q4_0 | DType::Q4_1, 1) => 0x18,
                (DType::Q4_1, 3) => 0xa8,
                _ => noise as u8,
            };
        }
        Ok(())
    }
}

/// Numbers that spread as logits do: most near zero, the highest about 20.
fn make_logits(bytes: &mut [u8]) {
    let mut state = 1_u64;
    for (i, to) in bytes.chunks_exact_mut(4).enumerate() {
        let mut sum = 0.0_f32;
        for _ in 0..6 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            sum += (state >> 40) as f32 / 16_777_216.0 - 0.5;
        }
        let peak = if i % 5000 == 17 { 12.0 } else { 0.0 };
        to.copy_from_slice(&(3.0 * sum + peak).to_le_bytes());
    }
}

struct Bench {
    table: BufferTable,
    ops: Vec<Op>,
    /// Where the cursor stands.
    position: u32,
}

impl Bench {
    fn new() -> Self {
        Self { table: BufferTable::default(), ops: Vec::new(), position: 2047 }
    }

    fn add(&mut self, role: Role, dtype: DType, rows: usize, cols: usize) -> View {
        let name = format!("b{}", self.table.len());
        let id = self.table.add(Buffer { name, role, dtype, shape: vec![rows, cols] });
        self.table.view(id.expect("names are unique"))
    }

    fn state(&mut self, growth: Growth, dtype: DType, rows: usize, cols: usize) -> View {
        let kind = StateKind::Other("bench".to_owned());
        self.add(Role::State { kind, growth }, dtype, rows, cols)
    }

    fn cursor(&mut self) -> View {
        let role = Role::State { kind: StateKind::Cursor, growth: Growth::Fixed };
        self.add(role, DType::U32, 1, 4)
    }

    fn program(self, threads: usize) -> (Box<dyn Program>, SlotId) {
        let key = |phase| ShapeKey { phase, tokens: 1, slots: 1, context: 1 };
        let fixed = self.table.iter().filter(|(_, b)| b.growth() == Some(Growth::Fixed));
        let bits = |d: DType| if d == DType::U32 { self.position } else { 0 };
        let reset = fixed
            .map(|(id, b)| Fill { out: self.table.view(id), bits: bits(b.dtype) }.into())
            .collect();
        let types = Bytes(self.table.iter().map(|(_, b)| b.dtype).collect());
        let plans = vec![
            Plan { key: key(Phase::Reset), count: None, ops: reset },
            Plan { key: key(Phase::Decode), count: None, ops: self.ops },
        ];
        let inputs: Vec<BufferId> =
            self.table.iter().filter(|(_, b)| b.role == Role::Input).map(|(id, _)| id).collect();
        let model = Model { name: "bench".to_owned(), buffers: self.table, plans };
        let sealed = Arc::new(model.seal().expect("the bench's plans are sound"));
        let options = LoadOptions { slots: 1, capsule_bytes: 0 };
        let backend = CpuBackend::new(threads);
        let mut program = backend
            .load(Arc::clone(&sealed), &types, options, &mut |_, _| ())
            .expect("memory suffices");
        let slot = program.create_slot().expect("one slot");
        program.run(slot, 0).expect("reset runs");
        for input in inputs {
            let mut bytes = vec![0; sealed.buffer(input).bytes()];
            types.read(input, 0, &mut bytes).expect("bytes for every type");
            if sealed.buffer(input).cols() >= 49152 {
                make_logits(&mut bytes);
            }
            program.write_input(input, &bytes).expect("it is an input");
        }
        (program, slot)
    }

    /// Seconds of a replay: the median, and the best, which a busy machine blurs less.
    fn time(self, threads: usize, rounds: usize) -> [f64; 2] {
        let (mut program, slot) = self.program(threads);
        program.run(slot, 1).expect("the plan runs");
        let mut times: Vec<f64> = (0..rounds)
            .map(|_| {
                let start = Instant::now();
                program.run(slot, 1).expect("the plan runs");
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        [times[times.len() / 2], times[0]]
    }
}

fn linear(dtype: DType, rows: usize, cols: usize, outs: usize, copies: usize) -> Bench {
    let mut bench = Bench::new();
    let x = bench.add(Role::Input, DType::F32, rows, cols);
    let out = bench.add(Role::Output, DType::F32, rows, outs);
    for _ in 0..copies {
        let weight = bench.add(Role::Weight, dtype, outs, cols);
        bench.ops.push(Linear { x: x.clone(), weight, bias: None, out: out.clone() }.into());
    }
    bench
}

fn attention(dtype: DType, rows: usize, layers: usize) -> Bench {
    let (heads, kv_heads, head_dim) = (9, 3, 64);
    let context = 2048 + rows;
    let mut bench = Bench::new();
    let query = bench.add(Role::Input, DType::F32, rows, heads * head_dim);
    let fresh = bench.add(Role::Input, DType::F32, rows, kv_heads * head_dim);
    let cursor = bench.cursor();
    let out = bench.add(Role::Output, DType::F32, rows, heads * head_dim);
    for _ in 0..layers {
        let key_cache = bench.state(Growth::Rows, dtype, context, kv_heads * head_dim);
        let value_cache = bench.state(Growth::Rows, dtype, context, kv_heads * head_dim);
        let append = KvAppend {
            key: fresh.clone(),
            value: fresh.clone(),
            cursor: cursor.clone(),
            count: None,
            key_cache: key_cache.clone(),
            value_cache: value_cache.clone(),
        };
        bench.ops.push(append.into());
        let attention = Attention {
            query: query.clone(),
            key_cache,
            value_cache,
            cursor: cursor.clone(),
            count: None,
            out: out.clone(),
            heads,
            kv_heads,
            head_dim,
            scale: 0.125,
        };
        bench.ops.push(attention.into());
    }
    bench
}

/// The whole of SmolLM2-135M as it comes in its Q4_1 file, `rows` tokens at `position`.
fn smollm2(rows: usize, position: usize) -> Bench {
    let (hidden, inner, heads, kv_heads, head_dim, vocabulary) = (576, 1536, 9, 3, 64, 49152);
    let (context, kv) = (position + rows, kv_heads * head_dim);
    let mut bench = Bench { position: position as u32, ..Bench::new() };
    let tokens = bench.add(Role::Input, DType::I32, rows, 1);
    let cursor = bench.cursor();
    let mut scratch = |cols: usize| bench.add(Role::Scratch, DType::F32, rows, cols);
    let (x, h, projected) = (scratch(hidden), scratch(hidden), scratch(hidden + 2 * kv));
    let (mixed, gate_up, mlp) = (scratch(hidden), scratch(2 * inner), scratch(inner));
    let last = bench.add(Role::Scratch, DType::F32, 1, hidden);
    let logits = bench.add(Role::Output, DType::F32, 1, vocabulary);
    let table = bench.add(Role::Weight, DType::Q8_0, vocabulary, hidden);
    let frequencies = bench.add(Role::Weight, DType::F32, 1, head_dim / 2);
    let part = |view: &View, cols: std::ops::Range<usize>| View { cols, ..view.clone() };
    bench.ops.push(Embed { table: table.clone(), tokens, out: x.clone() }.into());
    for _ in 0..30 {
        let weight = bench.add(Role::Weight, DType::F32, 1, hidden);
        let norm: Op =
            RmsNorm { x: x.clone(), weight, out: h.clone(), eps: 1e-5, centered: false }.into();
        let mut matrix = |outs, cols| bench.add(Role::Weight, DType::Q4_1, outs, cols);
        let (qkv, out) = (matrix(hidden + 2 * kv, hidden), matrix(hidden, hidden));
        let (up, down) = (matrix(2 * inner, hidden), matrix(hidden, inner));
        let key_cache = bench.state(Growth::Rows, DType::F16, context, kv);
        let value_cache = bench.state(Growth::Rows, DType::F16, context, kv);
        let (query, key) = (part(&projected, 0..hidden), part(&projected, hidden..hidden + kv));
        let value = part(&projected, hidden + kv..hidden + 2 * kv);
        bench.ops.push(norm.clone());
        bench
            .ops
            .push(Linear { x: h.clone(), weight: qkv, bias: None, out: projected.clone() }.into());
        for x in [&query, &key] {
            let (x, cursor, frequencies) = (x.clone(), cursor.clone(), frequencies.clone());
            let style = RopeStyle::Interleaved;
            bench.ops.push(Rope { x, cursor, frequencies, head_dim, style }.into());
        }
        let append = KvAppend {
            key,
            value,
            cursor: cursor.clone(),
            count: None,
            key_cache: key_cache.clone(),
            value_cache: value_cache.clone(),
        };
        bench.ops.push(append.into());
        let attention = Attention {
            query,
            key_cache,
            value_cache,
            cursor: cursor.clone(),
            count: None,
            out: mixed.clone(),
            heads,
            kv_heads,
            head_dim,
            scale: 0.125,
        };
        bench.ops.push(attention.into());
        let add = |x: &View, weight: View, out: &View| -> Op {
            LinearAdd { x: x.clone(), weight, bias: None, out: out.clone() }.into()
        };
        bench.ops.push(add(&mixed, out, &x));
        bench.ops.push(norm);
        bench
            .ops
            .push(Linear { x: h.clone(), weight: up, bias: None, out: gate_up.clone() }.into());
        let (gate, up) = (part(&gate_up, 0..inner), part(&gate_up, inner..2 * inner));
        bench.ops.push(SwiGlu { gate, up, out: mlp.clone() }.into());
        bench.ops.push(add(&mlp, down, &x));
    }
    bench.ops.push(LastRow { x, count: None, out: last.clone() }.into());
    bench.ops.push(Linear { x: last, weight: table, bias: None, out: logits }.into());
    bench
}

fn sampling(vocabulary: usize, params: &[f32; 8]) -> Bench {
    let mut bench = Bench::new();
    let logits = bench.add(Role::Input, DType::F32, 1, vocabulary);
    let adjusted = bench.add(Role::Output, DType::F32, 1, vocabulary);
    let token = bench.add(Role::Output, DType::I32, 1, 1);
    let counts = bench.state(Growth::Fixed, DType::U32, 1, vocabulary);
    let cursor = bench.cursor();
    let mut filled = |dtype: DType, cols: usize, values: &[u32]| {
        let view = bench.add(Role::Output, dtype, 1, cols);
        for (i, &bits) in values.iter().enumerate() {
            let out = View { cols: i..i + 1, ..view.clone() };
            bench.ops.push(Fill { out, bits }.into());
        }
        view
    };
    let params = filled(DType::F32, 8, &params.map(f32::to_bits));
    let seed = filled(DType::U32, 2, &[1, 2]);
    let bias_tokens = filled(DType::I32, 1, &[u32::MAX]);
    let bias_values = filled(DType::F32, 1, &[0]);
    let forced = filled(DType::I32, 1, &[u32::MAX]);
    bench.ops.push(Fill { out: counts.clone(), bits: 0 }.into());
    let sample = Sample {
        logits,
        params,
        seed,
        bias_tokens,
        bias_values,
        cursor,
        forced,
        counts,
        adjusted,
        token,
    };
    bench.ops.push(sample.into());
    bench
}

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse().expect("arguments are numbers"));
    let (threads, rounds) = (args.next().unwrap_or(0), args.next().unwrap_or(21));
    println!("{}", CpuBackend::new(threads).info().description);
    let part: usize = args.next().unwrap_or(0);
    let wanted = |number: usize| part == 0 || part == number;
    if wanted(1) {
        one_row(threads, rounds);
    }
    if wanted(2) {
        many_rows(threads, rounds);
    }
    if wanted(3) {
        attend(threads, rounds);
    }
    if wanted(4) {
        sample(threads, rounds);
    }
    if wanted(5) {
        cached(threads, rounds);
    }
    if wanted(6) {
        model(threads, rounds);
    }
}

fn model(threads: usize, rounds: usize) {
    println!("SmolLM2-135M Q4_1, KV cache f16: tokens per second");
    for (rows, position) in [(1, 0), (1, 2047), (24, 512), (512, 0), (512, 2048)] {
        let seconds = smollm2(rows, position).time(threads, rounds);
        let [median, best] = seconds.map(|s| rows as f64 / s);
        println!("  {rows:3} tokens @{position:4}  {median:6.1} ({best:6.1})");
    }
}

const TYPES: [DType; 6] =
    [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1];

fn one_row(threads: usize, rounds: usize) {
    println!("one row: GB/s of weights");
    for dtype in TYPES {
        print!("{:>6}", dtype.name());
        for (cols, outs) in [(576, 576), (576, 1536), (1536, 576), (576, 49152)] {
            let bytes = dtype.bytes_for(cols).expect("whole blocks") * outs;
            let copies = (256_usize << 20).div_ceil(bytes);
            let seconds = linear(dtype, 1, cols, outs, copies).time(threads, rounds);
            let [median, best] = seconds.map(|s| (bytes * copies) as f64 / s / 1e9);
            print!("  {cols}x{outs} {median:5.1} ({best:4.1})");
        }
        println!();
    }
}

fn cached(threads: usize, rounds: usize) {
    println!("one row, weights in a cache: GB/s");
    for dtype in TYPES {
        print!("{:>6}", dtype.name());
        for (cols, outs) in [(576, 576), (1536, 576)] {
            let bytes = dtype.bytes_for(cols).expect("whole blocks") * outs;
            let seconds = linear(dtype, 1, cols, outs, 1).time(threads, 50 * rounds);
            let [median, best] = seconds.map(|s| bytes as f64 / s / 1e9);
            print!("  {cols}x{outs} {median:5.1} ({best:4.1})");
        }
        println!();
    }
}

fn many_rows(threads: usize, rounds: usize) {
    println!("many rows: GFLOP/s");
    for dtype in TYPES {
        print!("{:>6}", dtype.name());
        for (rows, cols, outs) in
            [(512, 576, 576), (512, 576, 1536), (512, 1536, 576), (64, 576, 1536), (8, 576, 1536)]
        {
            let copies = 8;
            let seconds = linear(dtype, rows, cols, outs, copies).time(threads, rounds);
            let flops = 2 * rows * cols * outs * copies;
            let [median, best] = seconds.map(|s| flops as f64 / s / 1e9);
            print!("  {rows}x{cols}x{outs} {median:5.1} ({best:5.1})");
        }
        println!();
    }
}

fn attend(threads: usize, rounds: usize) {
    println!("attention over 2048 positions, 9/3 heads of 64: microseconds a layer");
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        print!("{:>6}", dtype.name());
        for rows in [1, 8, 512] {
            let layers = if rows > 64 { 2 } else { 30 };
            let seconds = attention(dtype, rows, layers).time(threads, rounds);
            let [median, best] = seconds.map(|s| s / layers as f64 * 1e6);
            print!("  {rows} rows {median:7.1} ({best:7.1})");
        }
        println!();
    }
}

fn sample(threads: usize, rounds: usize) {
    println!("sampling: microseconds");
    for vocabulary in [49152, 248_320] {
        for (what, params) in [
            ("greedy", [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
            ("t=0.8", [0.8, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
            ("t=0.8 k=40 p=0.95", [0.8, 40.0, 0.95, 0.0, 1.1, 0.0, 0.0, 0.0]),
            ("t=0.8 p=0.95", [0.8, 0.0, 0.95, 0.0, 1.0, 0.0, 0.0, 0.0]),
        ] {
            let seconds = sampling(vocabulary, &params).time(threads, rounds);
            let [median, best] = seconds.map(|s| s * 1e6);
            print!("  {vocabulary} {what} {median:.0} ({best:.0})");
        }
        println!();
    }
}
