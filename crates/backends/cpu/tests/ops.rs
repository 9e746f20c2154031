//! Every op against the reference, and against itself: thread counts, instruction paths, numbers of rows.

mod harness;

use ampoule_cpu::{CpuBackend, Isa};
use ampoule_plan::{
    Advance, Attention, BeginReply, CausalConv, Copy, DType, Embed, GatedDelta, GatedRmsNorm,
    Growth, KvAppend, LastRow, Linear, LinearAdd, Observe, RmsNorm, Rope, RopeStyle, Sample,
    SigmoidGate, SwiGlu,
};
use ampoule_reference::{ReferenceBackend, load_elements};
use harness::{Case, Random};

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const MATRIX: [DType; 6] =
    [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1];

/// Runs on every thread count and path, which must agree bit for bit, and compares with the reference: elements may
/// differ by `tolerance` times the largest of their buffer, or by one rounding of their type. Returns the buffers.
fn check(what: &str, case: &Case, tolerance: f32) -> std::collections::BTreeMap<usize, Vec<u8>> {
    let result = case.run(&CpuBackend::new(1));
    for threads in [2, 3] {
        let other = case.run(&CpuBackend::new(threads));
        assert!(other == result, "{what}: {threads} threads give other bits");
    }
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let other = case.run(&CpuBackend::new(2).with_isa(isa));
        assert!(other == result, "{what}: {isa} gives other bits");
    }
    let wanted = case.run(&ReferenceBackend);
    for (index, wanted) in wanted {
        let dtype = case.dtype(index);
        if !dtype.is_float() {
            assert_eq!(result[&index], wanted, "{what}: buffer {index}");
            continue;
        }
        let (got, want) = (load_elements(dtype, &result[&index]), load_elements(dtype, &wanted));
        let largest = want.iter().filter(|w| w.is_finite()).fold(0.0, |a: f32, w| a.max(w.abs()));
        let rounding = match dtype {
            DType::F16 => 1.0 / 1024.0,
            DType::BF16 => 1.0 / 128.0,
            _ => 0.0,
        };
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let allowed = tolerance * largest + rounding * want.abs();
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(
                same || (got - want).abs() <= allowed,
                "{what}: buffer {index}, element {i}: {got} not {want}, largest {largest}"
            );
        }
    }
    result
}

/// A product of `rows` of `x` (of which `take` is run) with a weight; returns the output's bytes.
fn linear(
    seed: u64,
    [x_type, w_type, out_type]: [DType; 3],
    [rows, cols, outs]: [usize; 3],
    (add, bias): (bool, bool),
    only: Option<usize>,
) -> Vec<u8> {
    let mut random = Random(seed);
    let x_bytes = random.bytes(x_type, rows * cols, 1.0);
    let w_bytes = random.bytes(w_type, outs * cols, 0.3);
    let bias_bytes = random.bytes(DType::F32, outs, 1.0);
    let before = random.bytes(out_type, rows * outs, 1.0);
    let part = |bytes: &[u8], dtype: DType, cols: usize| match only {
        None => bytes.to_vec(),
        Some(row) => {
            let size = dtype.bytes_for(cols).unwrap();
            bytes[row * size..(row + 1) * size].to_vec()
        }
    };
    let mut case = Case::new();
    let n = if only.is_some() { 1 } else { rows };
    let x = case.input(x_type, n, cols, part(&x_bytes, x_type, cols));
    let weight = case.weight(w_type, outs, cols, w_bytes);
    let bias = bias.then(|| case.weight(DType::F32, 1, outs, bias_bytes));
    let out = case.output(out_type, n, outs);
    let index = out.buffer.index();
    if add {
        let source = case.input(out_type, n, outs, part(&before, out_type, outs));
        case.op(Copy { source, out: out.clone() });
        case.op(LinearAdd { x, weight, bias, out });
    } else {
        case.op(Linear { x, weight, bias, out });
    }
    let what = format!("{x_type} {w_type} {out_type} [{rows}, {cols}, {outs}] {only:?}");
    check(&what, &case, 1e-5).remove(&index).unwrap()
}

#[test]
fn products() {
    let mut random = Random(3);
    for w_type in MATRIX {
        for (rows, cols, outs) in
            [(1, 576, 50), (7, 576, 37), (3, 1536, 5), (70, 64, 33), (13, 1312, 16)]
        {
            let x_type = FLOATS[random.below(3)];
            let out_type = FLOATS[random.below(3)];
            let flags = (random.below(2) == 0, random.below(2) == 0);
            let types = [x_type, w_type, out_type];
            let seed = random.word().into();
            let whole = linear(seed, types, [rows, cols, outs], flags, None);
            let size = out_type.bytes_for(outs).unwrap();
            for row in [0, rows / 2, rows - 1] {
                let one = linear(seed, types, [rows, cols, outs], flags, Some(row));
                assert!(
                    one == whole[row * size..(row + 1) * size],
                    "{w_type}: row {row} of {rows} differs from the row alone"
                );
            }
        }
    }
    for (rows, cols, outs) in [(1, 33, 20), (5, 40, 17), (8, 1, 1), (2, 7, 100), (200, 33, 13)] {
        for w_type in FLOATS {
            let types = [DType::F32, w_type, DType::F32];
            let whole = linear(9, types, [rows, cols, outs], (false, true), None);
            let one = linear(9, types, [rows, cols, outs], (false, true), Some(rows - 1));
            assert!(one == whole[(rows - 1) * outs * 4..], "[{rows}, {cols}, {outs}]");
        }
    }
}

#[test]
fn only_valid_rows_are_computed() {
    let mut random = Random(4);
    let run = |count: usize, random: &mut Random| {
        let mut case = Case::new();
        case.count(count);
        let x = case.input(DType::F32, 9, 64, random.bytes(DType::F32, 9 * 64, 1.0));
        let weight = case.weight(DType::Q8_0, 24, 64, random.bytes(DType::Q8_0, 24 * 64, 1.0));
        let out = case.output(DType::F32, 9, 24);
        case.op(Linear { x, weight, bias: None, out });
        check("count", &case, 1e-5).into_values().next_back().unwrap()
    };
    let all = run(9, &mut Random(random.0));
    for count in [0, 1, 2, 8] {
        let some = run(count, &mut Random(random.0));
        assert_eq!(some[..count * 96], all[..count * 96]);
        let poison = f32::from_bits(0x7fc0_7fc0);
        assert_eq!(some[count * 96..count * 96 + 4], poison.to_le_bytes());
    }
    random.word();
}

#[test]
fn embeddings_norms_and_gates() {
    let mut random = Random(5);
    for table_type in MATRIX {
        let mut case = Case::new();
        let tokens: Vec<u8> =
            [3_i32, 0, -1, 9, 10, 5].iter().flat_map(|t| t.to_le_bytes()).collect();
        let tokens = case.input(DType::I32, 6, 1, tokens);
        let table = case.weight(table_type, 10, 1056, random.bytes(table_type, 10_560, 1.0));
        for out_type in FLOATS {
            let out = case.output(out_type, 6, 1056);
            case.op(Embed { table: table.clone(), tokens: tokens.clone(), out });
        }
        let result = check("embed", &case, 0.0);
        let mut reference = case.run(&ReferenceBackend);
        assert!(result == reference, "{table_type}: look-ups are exact");
        reference.clear();
    }
    for (rows, groups, width) in [(1, 1, 576), (5, 3, 40), (40, 9, 64), (3, 2, 7), (70, 1, 33)] {
        let mut case = Case::new();
        let cols = groups * width;
        let weight = case.weight(DType::F32, 1, width, random.bytes(DType::F32, width, 1.0));
        for x_type in FLOATS {
            let out_type = FLOATS[random.below(3)];
            let x = case.input(x_type, rows, cols, random.bytes(x_type, rows * cols, 2.0));
            let gate = case.input(x_type, rows, cols, random.bytes(x_type, rows * cols, 9.0));
            let mut out = || case.output(out_type, rows, cols);
            let (a, b, c, d) = (out(), out(), out(), out());
            let centered = random.below(2) == 0;
            case.op(RmsNorm { x: x.clone(), weight: weight.clone(), out: a, eps: 1e-5, centered });
            let weight = weight.clone();
            case.op(GatedRmsNorm { x: x.clone(), gate: gate.clone(), weight, out: b, eps: 1e-6 });
            case.op(SigmoidGate { x: x.clone(), gate: gate.clone(), out: c });
            case.op(SwiGlu { gate, up: x, out: d });
        }
        check("norms and gates", &case, 1e-5);
    }
}

#[test]
fn rope() {
    let mut random = Random(6);
    for (rows, heads, head_dim, pairs) in
        [(1, 9, 64, 32), (7, 2, 80, 16), (40, 3, 33, 5), (3, 16, 256, 32)]
    {
        let mut case = Case::new();
        let cursor = case.position(1000 + rows);
        let frequencies: Vec<u8> = (0..pairs)
            .flat_map(|f| 10_000_f32.powf(-(f as f32) / pairs as f32).to_le_bytes())
            .collect();
        let frequencies = case.weight(DType::F32, 1, pairs, frequencies);
        for dtype in FLOATS {
            for style in [RopeStyle::Half, RopeStyle::Interleaved] {
                let cols = heads * head_dim;
                let source = case.input(dtype, rows, cols, random.bytes(dtype, rows * cols, 1.0));
                let x = case.output(dtype, rows, cols);
                case.op(Copy { source, out: x.clone() });
                let (cursor, frequencies) = (cursor.clone(), frequencies.clone());
                case.op(Rope { x, cursor, frequencies, head_dim, style });
            }
        }
        case.op(Advance { count: None, cursor });
        let result = check("rope", &case, 0.0);
        assert!(result == case.run(&ReferenceBackend), "rotations are exact");
    }
}

/// Appends `rows` rows at `position` and attends; returns the output.
fn attend(
    seed: u64,
    [x_type, kv_type]: [DType; 2],
    [heads, kv_heads, head_dim]: [usize; 3],
    position: usize,
    rows: usize,
    only: Option<usize>,
) -> Vec<u8> {
    let mut random = Random(seed);
    let (width, kv_width, context) = (heads * head_dim, kv_heads * head_dim, position + rows + 3);
    let query = random.bytes(x_type, rows * width, 2.0);
    let fresh: Vec<_> = (0..2).map(|_| random.bytes(x_type, rows * kv_width, 2.0)).collect();
    let old: Vec<_> = (0..2).map(|_| random.bytes(kv_type, context * kv_width, 2.0)).collect();
    let mut case = Case::new();
    let (n, at) = only.map_or((rows, position), |row| (1, position + row));
    let part = |bytes: &[u8], cols: usize| {
        let size = x_type.bytes_for(cols).unwrap();
        only.map_or(bytes.to_vec(), |row| bytes[row * size..(row + 1) * size].to_vec())
    };
    let cursor = case.position(at);
    let count = case.count(n);
    let query = case.input(
        x_type,
        n + 2,
        width,
        [part(&query, width), vec![0; 2 * x_type.bytes_for(width).unwrap()]].concat(),
    );
    let mut side = |which: usize| {
        let pad = vec![0xff; 2 * x_type.bytes_for(kv_width).unwrap()];
        let bytes = [part(&fresh[which], kv_width), pad].concat();
        let rows = case.input(x_type, n + 2, kv_width, bytes);
        let mut cache = old[which].clone();
        // What lies past the valid rows must not matter, and rows before this one are as a prefill left them.
        let size = kv_type.bytes_for(kv_width).unwrap();
        cache[(at + n) * size..].fill(0xff);
        if let Some(row) = only {
            let values = load_elements(x_type, &fresh[which]);
            let to = &mut cache[position * size..(position + row) * size];
            ampoule_reference::store_elements(kv_type, &values[..row * kv_width], to);
        }
        (rows, case.state(Growth::Rows, kv_type, context, kv_width, cache))
    };
    let ((key, key_cache), (value, value_cache)) = (side(0), side(1));
    let out = case.output(x_type, n + 2, width);
    let index = out.buffer.index();
    case.op(KvAppend {
        key,
        value,
        cursor: cursor.clone(),
        count: Some(count.clone()),
        key_cache: key_cache.clone(),
        value_cache: value_cache.clone(),
    });
    let scale = 1.0 / (head_dim as f32).sqrt();
    let count = Some(count);
    case.op(Attention {
        query,
        key_cache,
        value_cache,
        cursor,
        count,
        out,
        heads,
        kv_heads,
        head_dim,
        scale,
    });
    let what = format!("{x_type} {kv_type} {heads}/{kv_heads} x {head_dim} @{at} + {n}");
    let mut out = check(&what, &case, 1e-5).remove(&index).unwrap();
    out.truncate(n * x_type.bytes_for(width).unwrap());
    out
}

#[test]
fn attention() {
    let mut random = Random(7);
    for (shape, position, rows) in [
        ([9, 3, 64], 0, 1),
        ([9, 3, 64], 300, 1),
        ([9, 3, 64], 0, 70),
        ([9, 3, 64], 120, 20),
        ([4, 4, 33], 130, 5),
        ([4, 1, 80], 255, 9),
        ([8, 2, 16], 126, 3),
        ([2, 1, 256], 100, 60),
        ([3, 1, 40], 1000, 2),
    ] {
        let types = [FLOATS[random.below(3)], FLOATS[random.below(3)]];
        for types in [[DType::F32, DType::F32], types] {
            let seed = random.word().into();
            let whole = attend(seed, types, shape, position, rows, None);
            let size = types[0].bytes_for(shape[0] * shape[2]).unwrap();
            for row in [0, rows / 2, rows - 1] {
                let one = attend(seed, types, shape, position, rows, Some(row));
                assert!(
                    one == whole[row * size..(row + 1) * size],
                    "{types:?} {shape:?} @{position}: row {row} of {rows} differs from the row alone"
                );
            }
        }
    }
}

#[test]
fn convolution() {
    let mut random = Random(8);
    for (rows, channels, taps, count) in
        [(1, 48, 4, 1), (6, 33, 4, 2), (5, 20, 2, 5), (40, 700, 4, 33), (3, 17, 3, 0)]
    {
        for dtype in FLOATS {
            let mut case = Case::new();
            let x = case.input(dtype, rows, channels, random.bytes(dtype, rows * channels, 2.0));
            let weight = random.bytes(DType::F32, channels * taps, 1.0);
            let weight = case.weight(DType::F32, channels, taps, weight);
            let bias = random.bytes(DType::F32, channels, 1.0);
            let bias = (taps > 2).then(|| case.weight(DType::F32, 1, channels, bias));
            let count = Some(case.count(count));
            let state = random.bytes(DType::F32, (taps - 1) * channels, 1.0);
            let state = case.state(Growth::Fixed, DType::F32, taps - 1, channels, state);
            let out = case.output(FLOATS[random.below(3)], rows, channels);
            case.op(CausalConv { x, weight, bias, count, state, out });
            check("convolution", &case, 1e-5);
        }
    }
}

#[test]
fn gated_delta() {
    let mut random = Random(9);
    for (rows, count, key_heads, value_heads, key_dim, value_dim) in [
        (1, 1, 2, 4, 128, 128),
        (20, 19, 1, 3, 33, 40),
        (4, 4, 2, 2, 16, 7),
        (35, 35, 1, 2, 64, 96),
    ] {
        // The last token's state and output must be those of a run cut in two.
        let cols = 2 * key_heads * key_dim + value_heads * value_dim;
        let dtype = FLOATS[random.below(3)];
        let qkv = random.bytes(dtype, rows * cols, 1.0);
        let decay = random.bytes(DType::F32, rows * value_heads, 3.0);
        let beta = random.bytes(DType::F32, rows * value_heads, 3.0);
        let a_log = random.bytes(DType::F32, value_heads, 1.0);
        let dt_bias = random.bytes(DType::F32, value_heads, 1.0);
        let state = random.bytes(DType::F32, value_heads * key_dim * value_dim, 1.0);
        let run = |from: usize, to: usize, state: Vec<u8>| {
            let mut case = Case::new();
            let slice = |bytes: &[u8], cols: usize, dtype: DType| {
                let size = dtype.bytes_for(cols).unwrap();
                bytes[from * size..(rows.min(to + 1)) * size].to_vec()
            };
            let n = rows.min(to + 1) - from;
            let qkv = case.input(dtype, n, cols, slice(&qkv, cols, dtype));
            let decay =
                case.input(DType::F32, n, value_heads, slice(&decay, value_heads, DType::F32));
            let beta =
                case.input(DType::F32, n, value_heads, slice(&beta, value_heads, DType::F32));
            let a_log = case.weight(DType::F32, 1, value_heads, a_log.clone());
            let dt_bias = case.weight(DType::F32, 1, value_heads, dt_bias.clone());
            let count = Some(case.count(to - from));
            let state =
                case.state(Growth::Fixed, DType::F32, value_heads * key_dim, value_dim, state);
            let out = case.output(DType::F32, n, value_heads * value_dim);
            let (s, o) = (state.buffer.index(), out.buffer.index());
            case.op(GatedDelta {
                qkv,
                decay,
                beta,
                a_log,
                dt_bias,
                count,
                state,
                out,
                key_heads,
                value_heads,
                key_dim,
                value_dim,
            });
            let mut result = check("gated delta", &case, 3e-5);
            (result.remove(&s).unwrap(), result.remove(&o).unwrap())
        };
        let (whole_state, whole_out) = run(0, count, state.clone());
        if count > 1 {
            let (middle, _) = run(0, count / 2, state);
            let (end, out) = run(count / 2, count, middle);
            assert!(end == whole_state, "the state of two runs is that of one");
            let row = 4 * value_heads * value_dim;
            assert!(out[..row] == whole_out[count / 2 * row..(count / 2 + 1) * row]);
        }
    }
}

#[test]
fn tokens() {
    let mut random = Random(10);
    for round in 0..20 {
        let vocabulary = [5, 40, 49_152][round % 3];
        let mut case = Case::new();
        let read: Vec<u8> =
            (0..6).flat_map(|_| (random.below(vocabulary + 2) as i32 - 1).to_le_bytes()).collect();
        let read = case.input(DType::I32, 6, 1, read);
        let count = case.count(4);
        let x = case.input(DType::BF16, 6, 33, random.bytes(DType::BF16, 6 * 33, 1.0));
        let last = case.output(DType::F32, 1, 33);
        case.op(LastRow { x, count: Some(count.clone()), out: last });
        let counts = (0..vocabulary)
            .flat_map(|_| if random.below(9) == 0 { random.word() % 4 } else { 0 }.to_le_bytes())
            .collect();
        let counts = case.state(Growth::Fixed, DType::U32, 1, vocabulary, counts);
        let logits = random.bytes(DType::F32, vocabulary, 8.0);
        let logits = case.input(DType::F32, 1, vocabulary, logits);
        let params = [[0.0, 0.8][round % 2], 20.0, 0.9, 0.01, 1.2, 0.1, 0.2, 0.0];
        let params: Vec<u8> = params.iter().flat_map(|p: &f32| p.to_le_bytes()).collect();
        let params = case.input(DType::F32, 1, 8, params);
        let seed = case.words(&[random.word(), random.word()]);
        let bias_tokens = [3_i32, -1].iter().flat_map(|t| t.to_le_bytes()).collect();
        let bias_tokens = case.input(DType::I32, 1, 2, bias_tokens);
        let bias_values = case.input(DType::F32, 1, 2, random.bytes(DType::F32, 2, 5.0));
        let forced = if round % 5 == 4 { 2_i32 } else { -1 };
        let forced = case.input(DType::I32, 1, 1, forced.to_le_bytes().to_vec());
        let cursor = case.position(round * 31);
        let adjusted = case.output(DType::F32, 1, vocabulary);
        let token = case.output(DType::I32, 1, 1);
        case.op(Observe { tokens: read, count: Some(count.clone()), counts: counts.clone() });
        case.op(Sample {
            logits,
            params,
            seed,
            bias_tokens,
            bias_values,
            cursor: cursor.clone(),
            forced,
            counts: counts.clone(),
            adjusted,
            token,
        });
        if round % 2 == 0 {
            case.op(BeginReply { counts });
        }
        case.op(Advance { count: Some(count), cursor });
        let result = check("tokens", &case, 0.0);
        assert!(result == case.run(&ReferenceBackend));
    }
}
