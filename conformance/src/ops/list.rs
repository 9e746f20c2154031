//! The cases chosen by hand: every op, odd shapes, every type, every layout.

use ampoule_plan::{DType, RopeStyle, SEEN_AS_PROMPT};

use super::build::{Layout, Tokens};
use super::rows::{Common, EmbedCase, LastRowCase, LinearCase, RopeCase, Unary, UnaryCase};
use super::sampling::{DecodeCase, Logits, SampleCase};
use super::sequence::{AttentionCase, ConvCase, DeltaCase, LayerCase};
use super::spec::{Family, Spec};
use super::words::{AdvanceCase, CopyCase, CountsCase, FillCase};

use DType::{BF16, F16, F32, I32, Q4_0, Q4_1, Q8_0, U8, U32};
use Layout::{Fused, Odd, Plain};

pub(crate) const MATRIX: [DType; 6] = [F32, F16, BF16, Q8_0, Q4_0, Q4_1];

/// Types read and written together; float32 and bfloat16 most of all.
pub(crate) const PAIRS: [(DType, DType); 7] =
    [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F16)];

const fn of(rows: usize, bucket: usize) -> Tokens {
    Tokens::Of { rows, bucket }
}

/// Goes round a list: enough variety without every combination.
struct Wheel(usize);

impl Wheel {
    fn turn<T: Copy>(&mut self, from: &[T]) -> T {
        self.0 += 1;
        from[(self.0 - 1) % from.len()]
    }
}

struct List(Vec<Spec>);

impl List {
    fn push(&mut self, family: impl Family + 'static) {
        self.0.push(Spec::new(family));
    }
}

/// Every case chosen by hand.
pub(crate) fn all() -> Vec<Spec> {
    let mut list = List(Vec::new());
    embed(&mut list);
    unary(&mut list);
    linear(&mut list);
    rope(&mut list);
    attention(&mut list);
    conv(&mut list);
    delta(&mut list);
    simple(&mut list);
    sample(&mut list);
    layers(&mut list);
    list.0
}

fn embed(list: &mut List) {
    let mut layouts = Wheel(0);
    for table in MATRIX {
        for (tokens, vocabulary, width) in [
            (Tokens::All(1), 1000, 576),
            (of(5, 16), 97, 32),
            (of(65, 65), 20_000, 64),
            (Tokens::All(9), 100, 160),
        ] {
            for out in [F32, BF16, F16] {
                let common = Common { tokens, x: I32, out, layout: layouts.turn(&Layout::ALL) };
                list.push(EmbedCase { common, table, vocabulary, width, recipe: false });
            }
        }
    }
    for table in [F32, F16, BF16] {
        let common = Common { tokens: of(33, 64), x: I32, out: F32, layout: Plain };
        list.push(EmbedCase { common, table, vocabulary: 301, width: 33, recipe: true });
        list.push(EmbedCase { common, table, vocabulary: 97, width: 5, recipe: false });
    }
    let common = Common { tokens: Tokens::Grid(130), x: I32, out: BF16, layout: Fused };
    list.push(EmbedCase { common, table: Q8_0, vocabulary: 500, width: 96, recipe: false });
}

const UNARY: [Unary; 5] = [
    Unary::RmsNorm { centered: false },
    Unary::RmsNorm { centered: true },
    Unary::GatedRmsNorm,
    Unary::SigmoidGate,
    Unary::SwiGlu,
];

fn unary(list: &mut List) {
    let shapes = [
        (Tokens::All(1), 1, 1),
        (of(2, 4), 1, 5),
        (of(3, 3), 1, 16),
        (of(5, 16), 1, 33),
        (Tokens::All(6), 3, 40),
        (Tokens::All(1), 1, 576),
        (of(7, 8), 1, 1000),
        (Tokens::All(1), 16, 64),
        (of(9, 16), 8, 128),
        (of(63, 64), 2, 256),
        (of(64, 64), 4, 24),
        (of(65, 128), 1, 130),
        (Tokens::All(130), 2, 32),
        (Tokens::All(1), 1, 4096),
    ];
    let (mut layouts, mut pairs) = (Wheel(0), Wheel(0));
    for op in UNARY {
        for (tokens, groups, width) in shapes {
            let pair = pairs.turn(&PAIRS);
            for (x, out) in [pair, if pair == (F32, F32) { (BF16, BF16) } else { (F32, F32) }] {
                let common = Common { tokens, x, out, layout: layouts.turn(&Layout::ALL) };
                list.push(UnaryCase { common, op, groups, width, in_place: false, wide: false });
            }
        }
        for (x, layout) in [(F32, Plain), (F32, Odd), (BF16, Fused), (F16, Fused), (BF16, Odd)] {
            let common = Common { tokens: of(6, 16), x, out: x, layout };
            list.push(UnaryCase { common, op, groups: 3, width: 48, in_place: false, wide: true });
            if op != Unary::SwiGlu {
                list.push(UnaryCase {
                    common,
                    op,
                    groups: 4,
                    width: 40,
                    in_place: true,
                    wide: false,
                });
            }
        }
        for (x, out) in [(F32, F32), (BF16, BF16), (F32, BF16)] {
            let common =
                Common { tokens: Tokens::Grid(70), x, out, layout: layouts.turn(&Layout::ALL) };
            list.push(UnaryCase { common, op, groups: 2, width: 80, in_place: false, wide: false });
        }
    }
}

fn linear(list: &mut List) {
    let shapes: [(Tokens, usize, usize); 21] = [
        (Tokens::All(1), 1, 1),
        (Tokens::All(1), 33, 5),
        (Tokens::All(1), 576, 576),
        (Tokens::All(1), 1000, 1000),
        (Tokens::All(1), 4096, 40),
        (of(1, 16), 256, 130),
        (of(2, 2), 16, 5),
        (of(3, 16), 40, 33),
        (of(4, 4), 130, 16),
        (of(5, 8), 576, 40),
        (Tokens::All(6), 64, 1000),
        (of(7, 16), 1000, 7),
        (of(8, 8), 128, 65),
        (of(9, 16), 96, 130),
        (of(16, 16), 320, 192),
        (of(63, 64), 64, 63),
        (of(64, 64), 160, 64),
        (of(65, 256), 96, 48),
        (Tokens::All(130), 128, 33),
        (Tokens::All(1), 2048, 1536),
        (of(32, 64), 1024, 384),
    ];
    let (mut layouts, mut pairs, mut biases) = (Wheel(0), Wheel(0), Wheel(0));
    for weight in MATRIX {
        for (index, (tokens, k, n)) in shapes.into_iter().enumerate() {
            let k = if weight.is_quantized() { k.next_multiple_of(32) } else { k };
            let pair = pairs.turn(&PAIRS);
            for (x, out) in [pair, if pair == (F32, F32) { (BF16, BF16) } else { (F32, F32) }] {
                let common = Common { tokens, x, out, layout: layouts.turn(&Layout::ALL) };
                let bias = biases.turn(&[false, true, false]);
                list.push(LinearCase { common, weight, k, n, bias, add: false });
                if (index + usize::from(x == F32)) % 2 == 0 {
                    list.push(LinearCase { common, weight, k, n, bias: !bias, add: true });
                }
            }
        }
        for (x, out, add) in
            [(F32, F32, false), (BF16, BF16, false), (BF16, F32, true), (F32, F32, true)]
        {
            let common =
                Common { tokens: Tokens::Grid(70), x, out, layout: layouts.turn(&Layout::ALL) };
            list.push(LinearCase { common, weight, k: 96, n: 72, bias: false, add });
        }
    }
    for (x, weight, k) in
        [(BF16, BF16, 576), (F32, F32, 577), (F32, Q8_0, 1024), (BF16, Q4_0, 1024)]
    {
        let common = Common { tokens: Tokens::Grid(66), x, out: x, layout: Plain };
        list.push(LinearCase { common, weight, k, n: 40, bias: true, add: false });
    }
}

fn rope(list: &mut List) {
    let mut layouts = Wheel(0);
    let shapes = [
        (Tokens::All(1), 1, 8, 4, 0),
        (Tokens::All(1), 8, 128, 64, 1000),
        (of(2, 4), 3, 16, 8, 1),
        (of(5, 16), 2, 24, 6, 63),
        (of(9, 9), 4, 64, 16, 64),
        (Tokens::All(6), 2, 256, 32, 65),
        (of(65, 128), 1, 32, 16, 500),
        (of(7, 8), 5, 80, 37, 4000),
        (Tokens::All(1), 2, 64, 32, 262_144),
    ];
    for (tokens, heads, head_dim, frequencies, position) in shapes {
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            for dtype in [F32, BF16, F16] {
                let layout = layouts.turn(&Layout::ALL);
                list.push(RopeCase {
                    tokens,
                    dtype,
                    layout,
                    heads,
                    head_dim,
                    frequencies,
                    style,
                    position,
                });
            }
        }
    }
    for (dtype, style) in [(F32, RopeStyle::Half), (BF16, RopeStyle::Interleaved)] {
        let (tokens, layout) = (Tokens::Grid(70), Fused);
        let (heads, head_dim, frequencies, position) = (3, 32, 12, 77);
        list.push(RopeCase {
            tokens,
            dtype,
            layout,
            heads,
            head_dim,
            frequencies,
            style,
            position,
        });
    }
}

fn attention(list: &mut List) {
    let (mut layouts, mut types) = (Wheel(0), Wheel(0));
    let types_of = [
        (F32, F32, F32),
        (BF16, BF16, BF16),
        (F32, BF16, F32),
        (F32, F16, F32),
        (BF16, F16, BF16),
        (BF16, F32, BF16),
        (F16, F16, F16),
        (F32, BF16, BF16),
    ];
    let mut push = |list: &mut List, tokens, kv_heads, share, head_dim, position| {
        let (x, cache, out) = types.turn(&types_of);
        let layout = layouts.turn(&Layout::ALL);
        for append_only in [false, true] {
            if !append_only || head_dim < 100 {
                let case = AttentionCase {
                    tokens,
                    x,
                    cache,
                    out,
                    layout,
                    kv_heads,
                    share,
                    head_dim,
                    position,
                    append_only,
                };
                list.push(case);
            }
        }
    };
    // Decode: every position and head size, groups of 1 to 8.
    for (i, position) in [0, 1, 63, 64, 65, 500, 1000].into_iter().enumerate() {
        for (j, head_dim) in [8, 16, 24, 32, 64, 128, 256].into_iter().enumerate() {
            let share = [1, 2, 3, 4, 8][(i + 2 * j) % 5];
            let kv_heads = if head_dim > 100 { 1 + (i + j) % 2 } else { 1 + (i + j) % 3 };
            push(list, Tokens::All(1), kv_heads, share, head_dim, position);
        }
    }
    // Prefill.
    for (tokens, kv_heads, share, head_dim, position) in [
        (of(1, 16), 2, 2, 32, 65),
        (of(2, 4), 1, 3, 24, 0),
        (of(3, 16), 2, 1, 8, 1),
        (of(4, 4), 1, 8, 64, 63),
        (Tokens::All(5), 2, 4, 16, 64),
        (of(6, 16), 3, 2, 32, 500),
        (of(7, 8), 1, 4, 128, 130),
        (of(8, 8), 1, 2, 256, 64),
        (of(9, 16), 2, 3, 64, 1000),
        (of(63, 64), 2, 2, 16, 0),
        (of(64, 64), 1, 4, 32, 64),
        (of(65, 128), 1, 2, 64, 1),
        (Tokens::All(130), 1, 2, 16, 0),
        (of(16, 16), 2, 8, 64, 0),
        (of(17, 64), 1, 1, 128, 47),
        (of(33, 64), 2, 2, 80, 31),
        (Tokens::All(1), 2, 4, 128, 5000),
        (of(40, 64), 1, 4, 64, 2000),
    ] {
        for _ in 0..3 {
            push(list, tokens, kv_heads, share, head_dim, position);
        }
    }
    // The same rows through every bucket.
    let mut grids = Vec::new();
    for (x, cache) in [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F16)] {
        grids.push((x, cache, 0, 2, 2, 16, Fused));
        grids.push((x, cache, 61, 1, 4, 32, Plain));
    }
    // On tensor cores: keys of more than one part, added by many blocks in narrow buckets and by one in wide ones.
    grids.push((BF16, BF16, 600, 9, 4, 256, Fused));
    grids.push((F16, F16, 600, 9, 4, 64, Fused));
    for (x, cache, position, kv_heads, share, head_dim, layout) in grids {
        list.push(AttentionCase {
            tokens: Tokens::Grid(70),
            x,
            cache,
            out: x,
            layout,
            kv_heads,
            share,
            head_dim,
            position,
            append_only: false,
        });
    }
}

fn conv(list: &mut List) {
    let (mut layouts, mut pairs, mut biases) = (Wheel(0), Wheel(0), Wheel(0));
    for taps in [2, 3, 4] {
        for (tokens, channels) in [
            (Tokens::All(1), 1),
            (Tokens::All(1), 1000),
            (of(1, 16), 33),
            (of(2, 2), 16),
            (of(3, 16), 5),
            (Tokens::All(4), 40),
            (of(5, 8), 576),
            (of(64, 64), 64),
            (of(65, 128), 33),
            (of(130, 256), 40),
        ] {
            let pair = pairs.turn(&PAIRS);
            for (x, out) in [pair, if pair == (F32, F32) { (BF16, BF16) } else { (F32, F32) }] {
                let (layout, bias) =
                    (layouts.turn(&Layout::ALL), biases.turn(&[true, false, false]));
                list.push(ConvCase { tokens, x, out, layout, channels, taps, bias });
            }
        }
        for (x, layout) in [(F32, Plain), (BF16, Fused)] {
            let tokens = Tokens::Grid(70);
            list.push(ConvCase { tokens, x, out: x, layout, channels: 48, taps, bias: false });
        }
    }
}

fn delta(list: &mut List) {
    let (mut layouts, mut pairs) = (Wheel(0), Wheel(0));
    for (tokens, key_heads, value_heads, key_dim, value_dim) in [
        (Tokens::All(1), 1, 1, 8, 8),
        (Tokens::All(1), 2, 4, 128, 128),
        (Tokens::All(1), 1, 3, 24, 40),
        (Tokens::All(1), 2, 2, 64, 256),
        (of(1, 16), 2, 4, 32, 64),
        (of(2, 2), 1, 2, 16, 8),
        (of(3, 16), 4, 4, 64, 32),
        (of(5, 8), 2, 6, 24, 16),
        (Tokens::All(9), 1, 1, 128, 128),
        (of(17, 64), 1, 2, 33, 5),
        (of(63, 64), 1, 2, 32, 32),
        (of(64, 64), 2, 2, 16, 24),
        (of(65, 128), 1, 1, 64, 64),
        (of(130, 256), 1, 2, 16, 16),
        (of(7, 16), 1, 8, 16, 32),
        (Tokens::All(1), 16, 32, 128, 128),
        (of(12, 16), 4, 8, 128, 128),
    ] {
        let pair = pairs.turn(&PAIRS);
        for (x, out) in [pair, if pair == (F32, F32) { (BF16, BF16) } else { (F32, F32) }] {
            let layout = layouts.turn(&Layout::ALL);
            list.push(DeltaCase {
                tokens,
                x,
                out,
                layout,
                key_heads,
                value_heads,
                key_dim,
                value_dim,
            });
        }
    }
    for (x, layout) in [(F32, Plain), (BF16, Fused)] {
        for (key_heads, value_heads, key_dim, value_dim) in
            [(1, 2, 32, 16), (2, 2, 16, 64), (1, 2, 128, 128), (1, 2, 200, 40)]
        {
            let tokens = Tokens::Grid(70);
            list.push(DeltaCase {
                tokens,
                x,
                out: x,
                layout,
                key_heads,
                value_heads,
                key_dim,
                value_dim,
            });
        }
    }
}

fn simple(list: &mut List) {
    let (mut layouts, mut pairs) = (Wheel(0), Wheel(0));
    for (tokens, width) in [
        (Tokens::All(1), 1),
        (Tokens::All(7), 33),
        (of(1, 16), 576),
        (of(5, 16), 5),
        (of(16, 16), 1000),
        (of(65, 128), 40),
    ] {
        for _ in 0..3 {
            let (x, out) = pairs.turn(&PAIRS);
            let common = Common { tokens, x, out, layout: layouts.turn(&Layout::ALL) };
            list.push(LastRowCase { common, width });
        }
    }
    for vocabulary in [97, 1000, 32_000, 50_000] {
        let layout = layouts.turn(&Layout::ALL);
        list.push(CountsCase { tokens: Tokens::All(1), vocabulary, begin: true, layout: Plain });
        for tokens in
            [Tokens::All(1), Tokens::All(9), of(1, 16), of(9, 16), of(64, 64), of(130, 256)]
        {
            list.push(CountsCase { tokens, vocabulary, begin: false, layout });
        }
    }
    list.push(CountsCase {
        tokens: Tokens::Grid(130),
        vocabulary: 150,
        begin: false,
        layout: Plain,
    });
    for tokens in [Tokens::All(1), Tokens::All(3), of(1, 16), of(16, 16), of(70, 256)] {
        list.push(AdvanceCase { tokens, position: 0 });
        list.push(AdvanceCase { tokens, position: 100_000 });
    }
    for (dtype, bits) in [
        (F32, 0),
        (F32, 0x7fc0_1234),
        (I32, 0xffff_ffff),
        (U32, SEEN_AS_PROMPT),
        (F32, 0x3f80_0000),
    ] {
        for (rows, cols) in [(1, 1), (1, 1000), (3, 5), (4, 8), (65, 33), (130, 64)] {
            list.push(FillCase { dtype, bits, rows, cols });
        }
    }
    for dtype in [F32, F16, BF16, I32, U32, U8] {
        for (tokens, width) in
            [(Tokens::All(1), 1), (of(5, 16), 33), (Tokens::All(9), 576), (of(65, 65), 40)]
        {
            let (from, to) = (layouts.turn(&Layout::ALL), Layout::ALL[width % 3]);
            list.push(CopyCase { tokens, dtype, from, to, width, to_state: false });
        }
        if !matches!(dtype, F16 | BF16 | U8) {
            list.push(CopyCase {
                tokens: Tokens::All(1),
                dtype,
                from: Plain,
                to: Plain,
                width: 8,
                to_state: true,
            });
            list.push(CopyCase {
                tokens: Tokens::All(3),
                dtype,
                from: Plain,
                to: Plain,
                width: 1001,
                to_state: true,
            });
        }
    }
    for dtype in [Q8_0, Q4_0, Q4_1] {
        for (from, to) in [(Plain, Plain), (Fused, Plain), (Plain, Fused)] {
            list.push(CopyCase {
                tokens: Tokens::All(5),
                dtype,
                from,
                to,
                width: 96,
                to_state: false,
            });
        }
    }
}

fn sample(list: &mut List) {
    const OPEN: [f32; 8] = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0];
    let all = [
        OPEN,
        [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [0.7, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [2.5, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 40.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 1e6, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.9, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.3, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.999, 0.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.05, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        [0.8, 50.0, 0.95, 0.02, 1.1, 0.0, 0.0, 0.0],
        [1.3, 20.0, 0.8, 0.1, 0.8, 0.5, -0.3, 0.0],
        [1.0, 0.0, 1.0, 0.0, 1.3, 0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0, 1.0, 0.7, 0.25, 0.0],
        [0.0, 5.0, 0.5, 0.2, 1.3, 0.7, 0.25, 0.0],
    ];
    for (i, params) in all.into_iter().enumerate() {
        for (j, vocabulary) in [97, 1000, 4001].into_iter().enumerate() {
            let logits = [Logits::Plain, Logits::Tied, Logits::Peaked, Logits::Broken][(i + j) % 4];
            let bias = [0, 1, 7, 300][(i + 2 * j) % 4];
            list.push(SampleCase { vocabulary, params, logits, bias, forced: false, draws: 8 });
        }
        if i % 3 == 0 {
            let (vocabulary, logits) = (1000, Logits::Plain);
            list.push(SampleCase { vocabulary, params, logits, bias: 3, forced: true, draws: 4 });
        }
    }
    for (params, logits) in [
        (OPEN, Logits::Plain),
        (all[13], Logits::Plain),
        (all[7], Logits::Tied),
        (all[5], Logits::Peaked),
        (all[1], Logits::Tied),
    ] {
        for vocabulary in [32_000, 50_000] {
            list.push(SampleCase { vocabulary, params, logits, bias: 4, forced: false, draws: 3 });
        }
    }
    for params in [OPEN, all[1], all[13]] {
        let logits = Logits::Lost;
        list.push(SampleCase { vocabulary: 97, params, logits, bias: 0, forced: false, draws: 2 });
    }
    // Many draws: that near ties are rare is a statement about all of them.
    for (params, logits) in
        [(OPEN, Logits::Plain), (all[13], Logits::Plain), (all[8], Logits::Tied)]
    {
        list.push(SampleCase {
            vocabulary: 1537,
            params,
            logits,
            bias: 0,
            forced: false,
            draws: 150,
        });
    }
}

fn layers(list: &mut List) {
    for recurrent in [false, true] {
        for (x, weight) in [(F32, F32), (F32, Q8_0), (F32, BF16), (BF16, BF16), (BF16, Q4_0)] {
            for (tokens, position) in
                [(Tokens::All(1), 100), (of(5, 16), 0), (of(33, 64), 7), (Tokens::Grid(70), 3)]
            {
                list.push(LayerCase { tokens, x, weight, position, recurrent });
            }
        }
    }
    for weight in [F32, BF16, Q8_0, Q4_1] {
        list.push(DecodeCase { vocabulary: 301, weight, steps: 6 });
    }
}
