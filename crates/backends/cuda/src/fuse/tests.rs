//! Which ops the matcher joins, and which it must not.

use ampoule_plan::{
    Attention, Buffer, BufferTable, CausalConv, DType, GatedDelta, GatedRmsNorm, Growth, KvAppend,
    Linear, LinearAdd, Op, Phase, Plan, RmsNorm, Role, Rope, RopeStyle, ShapeKey, SigmoidGate,
    StateKind, SwiGlu, View,
};

use super::*;

struct Fixture {
    table: BufferTable,
    ops: Vec<Op>,
    phase: Phase,
    next: usize,
}

impl Fixture {
    fn new() -> Self {
        Self { table: BufferTable::default(), ops: Vec::new(), phase: Phase::Decode, next: 0 }
    }

    fn add(&mut self, role: Role, dtype: DType, shape: &[usize]) -> View {
        self.next += 1;
        let buffer = Buffer { name: format!("b{}", self.next), role, dtype, shape: shape.to_vec() };
        let id = self.table.add(buffer).unwrap();
        self.table.view(id)
    }

    fn scratch(&mut self, width: usize) -> View {
        self.add(Role::Scratch, DType::BF16, &[1, width])
    }

    fn weight(&mut self, n: usize, k: usize) -> View {
        self.add(Role::Weight, DType::BF16, &[n, k])
    }

    fn vector(&mut self, n: usize) -> View {
        self.add(Role::Weight, DType::F32, &[n])
    }

    fn state(&mut self, shape: &[usize]) -> View {
        let role = Role::State { kind: StateKind::Recurrent, growth: Growth::Fixed };
        self.add(role, DType::F32, shape)
    }

    fn norm(&mut self, x: &View, out: &View) {
        let weight = self.vector(x.width());
        let (x, out) = (x.clone(), out.clone());
        self.ops.push(RmsNorm { x, weight, out, eps: 1e-6, centered: false }.into());
    }

    fn linear(&mut self, x: &View, out: &View) {
        let weight = self.weight(out.width(), x.width());
        self.ops.push(Linear { x: x.clone(), weight, bias: None, out: out.clone() }.into());
    }

    fn linear_add(&mut self, x: &View, out: &View) {
        let weight = self.weight(out.width(), x.width());
        self.ops.push(LinearAdd { x: x.clone(), weight, bias: None, out: out.clone() }.into());
    }

    fn conv(&mut self, x: &View, out: &View) {
        let weight = self.add(Role::Weight, DType::F32, &[x.width(), 4]);
        let state = self.state(&[3, x.width()]);
        let (x, out) = (x.clone(), out.clone());
        self.ops.push(CausalConv { x, weight, bias: None, count: None, state, out }.into());
    }

    fn steps(&self) -> Vec<Step> {
        let key = ShapeKey { phase: self.phase, tokens: 1, slots: 1, context: 512 };
        for op in &self.ops {
            op.check(&self.table).unwrap();
        }
        let plan = Plan { key, count: None, ops: self.ops.clone() };
        let steps = steps(&self.table, &plan, true);
        let mut covered: Vec<usize> = steps.iter().flat_map(Step::ops).collect();
        covered.sort_unstable();
        assert_eq!(covered, (0..self.ops.len()).collect::<Vec<_>>(), "every op once");
        assert_eq!(super::steps(&self.table, &plan, false).len(), self.ops.len());
        steps
    }
}

const fn part(linear: usize, first: usize, rows: usize, then: Then) -> Part {
    Part { linear, first, rows, then }
}

#[test]
fn rows_of_one_weight_are_cut_where_ops_read_them() {
    let mut f = Fixture::new();
    let x = f.add(Role::Scratch, DType::F32, &[1, 64]);
    let (h, projected, mixed) = (f.scratch(64), f.scratch(140), f.scratch(96));
    f.norm(&x, &h);
    f.linear(&h, &projected);
    f.conv(&projected.columns(0, 96), &mixed);
    let parts = vec![part(1, 0, 96, Then::Conv { conv: 2 }), part(1, 96, 44, Then::Store)];
    assert_eq!(f.steps(), vec![Step::Gemv(GemvGroup { norm: Some(0), parts })]);

    let mut f = Fixture::new();
    let x = f.scratch(64);
    let (both, joined) = (f.scratch(160), f.scratch(80));
    f.linear(&x, &both);
    let (gate, up) = (both.columns(0, 80), both.columns(80, 80));
    f.ops.push(SwiGlu { gate, up, out: joined }.into());
    let parts = vec![part(0, 0, 80, Then::Pair { up: 0, first: 80, swiglu: 1 })];
    assert_eq!(f.steps(), vec![Step::Gemv(GemvGroup { norm: None, parts })]);

    // The other order, with rows left over on both sides.
    let mut f = Fixture::new();
    let x = f.scratch(64);
    let (all, joined) = (f.scratch(100), f.scratch(40));
    f.linear(&x, &all);
    let (gate, up) = (all.columns(50, 40), all.columns(4, 40));
    f.ops.push(SwiGlu { gate, up, out: joined }.into());
    let parts = vec![
        part(0, 0, 4, Then::Store),
        part(0, 44, 6, Then::Store),
        part(0, 50, 40, Then::Pair { up: 0, first: 4, swiglu: 1 }),
        part(0, 90, 10, Then::Store),
    ];
    assert_eq!(f.steps(), vec![Step::Gemv(GemvGroup { norm: None, parts })]);
}

#[test]
fn a_delta_layer_is_five_launches() {
    let mut f = Fixture::new();
    let x = f.add(Role::Scratch, DType::F32, &[1, 64]);
    let h = f.scratch(64);
    let (qkv, z, beta, decay) = (f.scratch(96), f.scratch(32), f.scratch(2), f.scratch(2));
    let (mixed, heads, gated) = (f.scratch(96), f.scratch(32), f.scratch(32));
    let (up, gate, joined) = (f.scratch(128), f.scratch(128), f.scratch(128));
    f.norm(&x, &h);
    for out in [&qkv, &z, &beta, &decay] {
        f.linear(&h, out);
    }
    f.conv(&qkv, &mixed);
    let (a_log, dt_bias, state) = (f.vector(2), f.vector(2), f.state(&[32, 16]));
    let delta = GatedDelta {
        qkv: mixed,
        decay,
        beta,
        a_log,
        dt_bias,
        count: None,
        state,
        out: heads.clone(),
        key_heads: 2,
        value_heads: 2,
        key_dim: 16,
        value_dim: 16,
    };
    f.ops.push(delta.into());
    let weight = f.vector(16);
    f.ops.push(GatedRmsNorm { x: heads, gate: z, weight, out: gated.clone(), eps: 1e-6 }.into());
    f.linear_add(&gated, &x);
    f.norm(&x, &h);
    f.linear(&h, &gate);
    f.linear(&h, &up);
    f.ops.push(SwiGlu { gate, up, out: joined.clone() }.into());
    f.linear_add(&joined, &x);

    let steps = f.steps();
    let group =
        |norm, parts: &[Part]| Step::Gemv(GemvGroup { norm: Some(norm), parts: parts.to_vec() });
    assert_eq!(
        steps,
        vec![
            group(
                0,
                &[
                    part(1, 0, 96, Then::Conv { conv: 5 }),
                    part(2, 0, 32, Then::Store),
                    part(3, 0, 2, Then::Store),
                    part(4, 0, 2, Then::Store)
                ]
            ),
            Step::DeltaNorm { delta: 6, norm: 7 },
            Step::Op(8),
            group(9, &[part(10, 0, 128, Then::Pair { up: 11, first: 0, swiglu: 12 })]),
            Step::Op(13),
        ]
    );
    f.phase = Phase::Prefill;
    assert_eq!(f.steps().len(), 14, "prefill is not fused this way");
}

/// Queries and keys with norm and rotary embedding, then append, attention, gate.
fn attention_layer(f: &mut Fixture, in_place: bool) {
    let (q, k, v) = (f.scratch(64), f.scratch(32), f.scratch(32));
    let (qn, kn) = if in_place { (q.clone(), k.clone()) } else { (f.scratch(64), f.scratch(32)) };
    let cursor =
        f.add(Role::State { kind: StateKind::Cursor, growth: Growth::Fixed }, DType::U32, &[1, 4]);
    let cache = |f: &mut Fixture| {
        let role = Role::State { kind: StateKind::KvCache, growth: Growth::Rows };
        f.add(role, DType::BF16, &[512, 32])
    };
    let (key_cache, value_cache) = (cache(f), cache(f));
    for (from, to) in [(&q, &qn), (&k, &kn)] {
        let weight = f.vector(16);
        let (x, out) = (from.clone(), to.clone());
        f.ops.push(RmsNorm { x, weight, out, eps: 1e-6, centered: true }.into());
    }
    let frequencies = f.vector(4);
    for x in [&qn, &kn] {
        let (x, cursor, frequencies) = (x.clone(), cursor.clone(), frequencies.clone());
        f.ops.push(Rope { x, cursor, frequencies, head_dim: 16, style: RopeStyle::Half }.into());
    }
    let append = KvAppend {
        key: kn,
        value: v,
        cursor: cursor.clone(),
        count: None,
        key_cache: key_cache.clone(),
        value_cache: value_cache.clone(),
    };
    f.ops.push(append.into());
    let (out, gate) = (f.scratch(64), f.scratch(64));
    let attention = Attention {
        query: qn,
        key_cache,
        value_cache,
        cursor,
        count: None,
        out: out.clone(),
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        scale: 0.25,
    };
    f.ops.push(attention.into());
    f.ops.push(SigmoidGate { x: out.clone(), gate, out }.into());
}

#[test]
fn norms_rope_and_append_join_in_place_and_apart() {
    for in_place in [false, true] {
        let mut f = Fixture::new();
        attention_layer(&mut f, in_place);
        let fused = NormRopeAppend {
            query_norm: Some(0),
            key_norm: Some(1),
            query_rope: 2,
            key_rope: 3,
            append: 4,
        };
        assert_eq!(
            f.steps(),
            vec![Step::NormRopeAppend(fused), Step::AttentionGate { attention: 5, gate: 6 }]
        );
    }
}

#[test]
fn rope_and_append_join_without_norms() {
    let mut f = Fixture::new();
    attention_layer(&mut f, true);
    f.ops.drain(..2);
    assert!(matches!(
        &f.steps()[0],
        Step::NormRopeAppend(NormRopeAppend { query_norm: None, key_norm: None, .. })
    ));
}

#[test]
fn a_norm_in_place_is_not_read_while_it_is_written() {
    let mut f = Fixture::new();
    let x = f.scratch(64);
    let out = f.scratch(32);
    f.norm(&x.clone(), &x);
    f.linear(&x, &out);
    assert_eq!(f.steps(), vec![Step::Op(0), Step::Op(1)]);
}

#[test]
fn linears_that_depend_on_each_other_stay_apart() {
    let mut f = Fixture::new();
    let x = f.scratch(64);
    let (a, b) = (f.scratch(64), f.scratch(64));
    f.linear(&x, &a);
    f.linear(&a, &b);
    assert_eq!(f.steps(), vec![Step::Op(0), Step::Op(1)]);

    // The second overwrites what the first has written.
    let mut f = Fixture::new();
    let x = f.scratch(64);
    let a = f.scratch(64);
    f.linear(&x, &a);
    f.linear(&x, &a);
    assert_eq!(f.steps(), vec![Step::Op(0), Step::Op(1)]);
}

#[test]
fn swiglu_of_the_wrong_buffers_or_in_place_is_not_joined() {
    let mut f = Fixture::new();
    let x = f.scratch(64);
    let (gate, up, other, out) = (f.scratch(32), f.scratch(32), f.scratch(32), f.scratch(32));
    f.linear(&x, &gate);
    f.linear(&x, &up);
    f.ops.push(SwiGlu { gate: gate.clone(), up: other, out }.into());
    let parts = vec![part(0, 0, 32, Then::Store), part(1, 0, 32, Then::Store)];
    let both = Step::Gemv(GemvGroup { norm: None, parts });
    assert_eq!(f.steps(), vec![both, Step::Op(2)]);
}

#[test]
fn odd_widths_and_many_rows_go_their_own_way() {
    let mut f = Fixture::new();
    let x = f.scratch(60); // no whole 16-byte loads of bf16
    let (a, b) = (f.scratch(8), f.scratch(8));
    f.linear(&x, &a);
    f.linear(&x, &b);
    assert_eq!(f.steps().len(), 2);

    let mut f = Fixture::new();
    let x = f.add(Role::Scratch, DType::BF16, &[9, 64]);
    let (a, b) =
        (f.add(Role::Scratch, DType::BF16, &[9, 8]), f.add(Role::Scratch, DType::BF16, &[9, 8]));
    f.linear(&x, &a);
    f.linear(&x, &b);
    assert_eq!(f.steps().len(), 2);
}

#[test]
fn more_linears_than_a_launch_holds_are_split() {
    let mut f = Fixture::new();
    let x = f.scratch(64);
    for _ in 0..8 {
        let out = f.scratch(16);
        f.linear(&x, &out);
    }
    let steps = f.steps();
    assert_eq!(steps.len(), 2);
    assert!(matches!(&steps[0], Step::Gemv(g) if g.parts.len() == SEGMENTS));
}

#[test]
fn a_real_decode_plan_has_five_launches_a_layer_or_seven_with_attention() {
    use ampoule_models::decoder::{BuildOptions, Precision};
    use ampoule_models::model::ModelFiles;
    let options = BuildOptions {
        context: 4096,
        prefill: vec![32],
        score: 32,
        decode_contexts: Vec::new(),
        precision: Precision { activation: DType::BF16, kv_cache: DType::BF16 },
    };
    let built = ModelFiles::open("random:qwen3.5-9b").unwrap().build(&options).unwrap();
    let model = built.sealed.model();
    let decode = model.plans.iter().find(|p| p.key.phase == Phase::Decode).unwrap();
    let steps = steps(&model.buffers, decode, true);
    // Attention is two kernels: six steps a layer. Besides: sample, embed, norm and head, advance.
    assert_eq!(steps.len(), 24 * 5 + 8 * 6 + 4, "{steps:#?}");
    let prefill = model.plans.iter().find(|p| p.key.phase == Phase::Prefill).unwrap();
    let joined = super::steps(&model.buffers, prefill, true);
    assert_eq!(joined.iter().filter(|s| matches!(s, Step::NormRopeAppend(_))).count(), 8);
}
