//! Ops that carry State from row to row: attention over a cache, causal convolution, the gated delta rule.

use ampoule_plan::{
    Attention, CausalConv, DType, GatedDelta, GatedRmsNorm, KvAppend, Linear, LinearAdd, Op,
    RmsNorm, Rope, RopeStyle, SigmoidGate, StateKind, SwiGlu,
};

use super::build::{Build, Layout, Tokens};
use super::case::{Case, Tolerance, Weight};
use super::rng::{Rng, Values, random_bytes};
use super::rows::rope_frequencies;
use super::spec::Family;

const NEAR: Tolerance = Tolerance::Relative(1.0);

/// `kv_append`, and `attention` over what it appended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionCase {
    pub(crate) tokens: Tokens,
    /// Of queries, keys and values.
    pub(crate) x: DType,
    pub(crate) cache: DType,
    pub(crate) out: DType,
    pub(crate) layout: Layout,
    pub(crate) kv_heads: usize,
    /// Query heads for each KV head.
    pub(crate) share: usize,
    pub(crate) head_dim: usize,
    pub(crate) position: usize,
    /// Only the append.
    pub(crate) append_only: bool,
}

impl Family for AttentionCase {
    fn op(&self) -> &'static str {
        if self.append_only { "kv_append" } else { "attention" }
    }

    fn detail(&self) -> String {
        format!(
            "{},x={},kv={},out={},{},kv_heads={},share={},d={},position={}",
            self.tokens,
            self.x,
            self.cache,
            self.out,
            self.layout,
            self.kv_heads,
            self.share,
            self.head_dim,
            self.position
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let (x, layout) = (self.x, self.layout);
        let mut b = Build::new(self.tokens, rng);
        let width = self.kv_heads * self.head_dim;
        let capacity = self.position + b.bucket() + 5;
        let cursor = b.cursor(self.position);
        let key_cache = b.cache("key_cache", self.cache, [capacity, width], self.position);
        let value_cache = b.cache("value_cache", self.cache, [capacity, width], self.position);
        let key = b.operand("key", x, width, layout, Values::Normal(1.0));
        let value = b.operand("value", x, width, layout, Values::Normal(1.0));
        let heads = self.kv_heads * self.share;
        let wide = heads * self.head_dim;
        let attention = (!self.append_only).then(|| {
            let query = b.operand("query", x, wide, layout, Values::Normal(1.0));
            (query, b.result("out", self.out, wide, layout, NEAR))
        });
        let count = b.count();
        b.finish(|rows| {
            let append = KvAppend {
                key: key.at(rows),
                value: value.at(rows),
                cursor: cursor.clone(),
                count: count.clone(),
                key_cache: key_cache.clone(),
                value_cache: value_cache.clone(),
            };
            let mut ops = vec![Op::from(append)];
            if let Some((query, out)) = &attention {
                let attention = Attention {
                    query: query.at(rows),
                    key_cache: key_cache.clone(),
                    value_cache: value_cache.clone(),
                    cursor: cursor.clone(),
                    count: count.clone(),
                    out: out.at(rows),
                    heads,
                    kv_heads: self.kv_heads,
                    head_dim: self.head_dim,
                    // Some heads attend sharply, some broadly.
                    scale: 1.5 / (self.head_dim as f32).sqrt(),
                };
                ops.push(attention.into());
            }
            ops
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvCase {
    pub(crate) tokens: Tokens,
    pub(crate) x: DType,
    pub(crate) out: DType,
    pub(crate) layout: Layout,
    pub(crate) channels: usize,
    pub(crate) taps: usize,
    pub(crate) bias: bool,
}

impl Family for ConvCase {
    fn op(&self) -> &'static str {
        "causal_conv"
    }

    fn detail(&self) -> String {
        let bias = if self.bias { ",bias" } else { "" };
        format!(
            "{},x={},out={},{},channels={},taps={}{bias}",
            self.tokens, self.x, self.out, self.layout, self.channels, self.taps
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        let (channels, taps) = (self.channels, self.taps);
        let weight = b.weight("weight", DType::F32, [channels, taps], Values::Normal(0.7));
        let bias = self.bias.then(|| b.vector("bias", channels, Values::Normal(0.5)));
        let before =
            random_bytes(&mut b.rng, DType::F32, (taps - 1) * channels, Values::Normal(1.0));
        let state = b.state("state", StateKind::Conv, DType::F32, [taps - 1, channels], before);
        let x = b.operand("x", self.x, channels, self.layout, Values::Normal(1.0));
        let out = b.result("out", self.out, channels, self.layout, NEAR);
        let count = b.count();
        b.finish(|rows| -> Vec<Op> {
            vec![
                CausalConv {
                    x: x.at(rows),
                    weight: weight.clone(),
                    bias: bias.clone(),
                    count: count.clone(),
                    state: state.clone(),
                    out: out.at(rows),
                }
                .into(),
            ]
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct DeltaCase {
    pub(crate) tokens: Tokens,
    pub(crate) x: DType,
    pub(crate) out: DType,
    pub(crate) layout: Layout,
    pub(crate) key_heads: usize,
    pub(crate) value_heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
}

impl Family for DeltaCase {
    fn op(&self) -> &'static str {
        "gated_delta"
    }

    fn detail(&self) -> String {
        format!(
            "{},x={},out={},{},heads={}/{},dims={}/{}",
            self.tokens,
            self.x,
            self.out,
            self.layout,
            self.key_heads,
            self.value_heads,
            self.key_dim,
            self.value_dim
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        let (hk, hv, dk, dv) = (self.key_heads, self.value_heads, self.key_dim, self.value_dim);
        let a_log = b.vector("a_log", hv, Values::Uniform(-3.0, 2.5));
        let dt_bias = b.vector("dt_bias", hv, Values::Normal(1.0));
        let before = random_bytes(&mut b.rng, DType::F32, hv * dk * dv, Values::Normal(0.3));
        let state = b.state("state", StateKind::Recurrent, DType::F32, [hv * dk, dv], before);
        b.set_tolerance(&state, NEAR);
        let width = 2 * hk * dk + hv * dv;
        let qkv = b.operand("qkv", self.x, width, self.layout, Values::Normal(1.0));
        // Reaches beyond 20, where softplus is the identity.
        let decay = b.operand("decay", self.x, hv, self.layout, Values::Wide(1.5));
        let beta = b.operand("beta", self.x, hv, self.layout, Values::Wide(1.5));
        let out = b.result("out", self.out, hv * dv, self.layout, NEAR);
        let count = b.count();
        b.finish(|rows| -> Vec<Op> {
            vec![
                GatedDelta {
                    qkv: qkv.at(rows),
                    decay: decay.at(rows),
                    beta: beta.at(rows),
                    a_log: a_log.clone(),
                    dt_bias: dt_bias.clone(),
                    count: count.clone(),
                    state: state.clone(),
                    out: out.at(rows),
                    key_heads: hk,
                    value_heads: hv,
                    key_dim: dk,
                    value_dim: dv,
                }
                .into(),
            ]
        })
    }
}

/// A layer of a decoder: what one op leaves in Scratch the next reads, through views of fused buffers, in place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerCase {
    pub(crate) tokens: Tokens,
    /// Of everything but the residual, which is float32.
    pub(crate) x: DType,
    pub(crate) weight: DType,
    pub(crate) position: usize,
    /// Gated delta rule instead of attention.
    pub(crate) recurrent: bool,
}

const HIDDEN: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD: usize = 16;
const TAPS: usize = 4;

impl Family for LayerCase {
    fn op(&self) -> &'static str {
        "layer"
    }

    fn detail(&self) -> String {
        let kind = if self.recurrent { "recurrent" } else { "attention" };
        format!("{},x={},w={},{kind},position={}", self.tokens, self.x, self.weight, self.position)
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        let residual = self.tolerance(DType::F32);
        let residual =
            b.updated("hidden", DType::F32, HIDDEN, Layout::Plain, Values::Normal(1.0), residual);
        let normed = b.scratch("normed", self.x, HIDDEN);
        let linear = Values::Normal(1.0 / (HIDDEN as f32).sqrt());
        let norm = b.vector("norm", HIDDEN, Values::Uniform(0.5, 1.5));
        let (mixer, mixed): (Box<dyn Fn(usize) -> Vec<Op>>, _) =
            if self.recurrent { self.delta(&mut b) } else { self.attend(&mut b) };
        let width = 2 * HIDDEN;
        let projection = if self.recurrent {
            2 * KV_HEADS * HEAD + 2 * HEADS * HEAD + 2 * HEADS
        } else {
            (2 * HEADS + 2 * KV_HEADS) * HEAD
        };
        let fused = mixed.0.clone();
        let w_in = b.weight("w_in", self.weight, [projection, HIDDEN], linear);
        let w_out = b.weight("w_out", self.weight, [HIDDEN, HEADS * HEAD], linear);
        let w_up = b.weight("w_up", self.weight, [2 * width, HIDDEN], linear);
        let w_down = b.weight("w_down", self.weight, [HIDDEN, width], linear);
        let up = b.scratch("up", self.x, 2 * width);
        let active = b.scratch("active", self.x, width);
        b.finish(|rows| {
            let norm_op = || RmsNorm {
                x: residual.at(rows),
                weight: norm.clone(),
                out: normed.at(rows),
                eps: 1e-6,
                centered: false,
            };
            let project = |x, weight: &ampoule_plan::View, out| Linear {
                x,
                weight: weight.clone(),
                bias: None,
                out,
            };
            let mut ops: Vec<Op> =
                vec![norm_op().into(), project(normed.at(rows), &w_in, fused.at(rows)).into()];
            ops.extend(mixer(rows));
            let back = |x, weight: &ampoule_plan::View| LinearAdd {
                x,
                weight: weight.clone(),
                bias: None,
                out: residual.at(rows),
            };
            ops.push(back(mixed.1.at(rows), &w_out).into());
            ops.push(norm_op().into());
            ops.push(project(normed.at(rows), &w_up, up.at(rows)).into());
            let (gate, up) = (up.columns(0, width).at(rows), up.columns(width, width).at(rows));
            ops.push(SwiGlu { gate, up, out: active.at(rows) }.into());
            ops.push(back(active.at(rows), &w_down).into());
            ops
        })
    }
}

type Rows = super::build::Rows;
/// The ops of a mixer for so many rows; the buffer it projects into and the one it leaves its result in.
type Mixer = (Box<dyn Fn(usize) -> Vec<Op>>, (Rows, Rows));

impl LayerCase {
    /// Where intermediates are rounded to bfloat16, a sum that rounds the other way moves everything after it: an
    /// element of 8 by a sixteenth. Such layers test how ops fit together; the ops' own cases are the sharp ones.
    fn tolerance(&self, of: DType) -> Tolerance {
        Tolerance::Relative(match (self.x, of) {
            (DType::F32, _) => 2.0,
            (_, DType::F32) => 2500.0,
            _ => 3.0,
        })
    }

    fn attend(&self, b: &mut Build) -> Mixer {
        let (q, kv) = (HEADS * HEAD, KV_HEADS * HEAD);
        let cursor = b.cursor(self.position);
        let capacity = self.position + b.bucket() + 3;
        let key_cache = b.cache("key_cache", self.x, [capacity, kv], self.position);
        let value_cache = b.cache("value_cache", self.x, [capacity, kv], self.position);
        for cache in [&key_cache, &value_cache] {
            b.set_tolerance(cache, self.tolerance(self.x).over_stale());
        }
        let fused = b.scratch("qkvg", self.x, 2 * q + 2 * kv);
        let out = b.scratch("attended", self.x, q);
        b.show("attended.out", &out, self.tolerance(self.x));
        let head_norm = b.vector("head_norm", HEAD, Values::Uniform(0.5, 1.5));
        let stored = Weight::Stored(rope_frequencies(HEAD / 4));
        let frequencies = b.weight_by("frequencies", DType::F32, [1, HEAD / 4], stored);
        let count = b.count();
        let result = out.clone();
        let project = fused.clone();
        let ops = move |rows: usize| -> Vec<Op> {
            let (query, key) = (fused.columns(0, q).at(rows), fused.columns(q, kv).at(rows));
            let value = fused.columns(q + kv, kv).at(rows);
            let gate = fused.columns(q + 2 * kv, q).at(rows);
            let mut ops: Vec<Op> = Vec::new();
            for x in [&query, &key] {
                ops.push(
                    RmsNorm {
                        x: x.clone(),
                        weight: head_norm.clone(),
                        out: x.clone(),
                        eps: 1e-6,
                        centered: true,
                    }
                    .into(),
                );
                ops.push(
                    Rope {
                        x: x.clone(),
                        cursor: cursor.clone(),
                        frequencies: frequencies.clone(),
                        head_dim: HEAD,
                        style: RopeStyle::Half,
                    }
                    .into(),
                );
            }
            ops.push(
                KvAppend {
                    key,
                    value,
                    cursor: cursor.clone(),
                    count: count.clone(),
                    key_cache: key_cache.clone(),
                    value_cache: value_cache.clone(),
                }
                .into(),
            );
            ops.push(
                Attention {
                    query,
                    key_cache: key_cache.clone(),
                    value_cache: value_cache.clone(),
                    cursor: cursor.clone(),
                    count: count.clone(),
                    out: out.at(rows),
                    heads: HEADS,
                    kv_heads: KV_HEADS,
                    head_dim: HEAD,
                    scale: 0.25,
                }
                .into(),
            );
            ops.push(SigmoidGate { x: out.at(rows), gate, out: out.at(rows) }.into());
            ops
        };
        (Box::new(ops), (project, result))
    }

    fn delta(&self, b: &mut Build) -> Mixer {
        let (keys, values) = (KV_HEADS * HEAD, HEADS * HEAD);
        let channels = 2 * keys + values;
        let fused = b.scratch("qkvzba", self.x, channels + values + 2 * HEADS);
        let mixed = b.scratch("mixed", self.x, channels);
        let out = b.scratch("read", self.x, values);
        b.show("read.out", &out, self.tolerance(self.x));
        let weight = b.weight("taps", DType::F32, [channels, TAPS], Values::Normal(0.7));
        let before =
            random_bytes(&mut b.rng, DType::F32, (TAPS - 1) * channels, Values::Normal(1.0));
        let conv = b.state("conv", StateKind::Conv, DType::F32, [TAPS - 1, channels], before);
        let before = random_bytes(&mut b.rng, DType::F32, HEADS * HEAD * HEAD, Values::Normal(0.3));
        let recurrent =
            b.state("recurrent", StateKind::Recurrent, DType::F32, [HEADS * HEAD, HEAD], before);
        b.set_tolerance(&conv, self.tolerance(DType::F32));
        b.set_tolerance(&recurrent, self.tolerance(DType::F32));
        let a_log = b.vector("a_log", HEADS, Values::Uniform(-3.0, 1.0));
        let dt_bias = b.vector("dt_bias", HEADS, Values::Normal(1.0));
        let head_norm = b.vector("head_norm", HEAD, Values::Uniform(0.5, 1.5));
        let count = b.count();
        let result = out.clone();
        let project = fused.clone();
        let ops = move |rows: usize| -> Vec<Op> {
            let part = |start, width| fused.columns(start, width).at(rows);
            let (read, end) = (out.at(rows), channels + values);
            vec![
                CausalConv {
                    x: part(0, channels),
                    weight: weight.clone(),
                    bias: None,
                    count: count.clone(),
                    state: conv.clone(),
                    out: mixed.at(rows),
                }
                .into(),
                GatedDelta {
                    qkv: mixed.at(rows),
                    decay: part(end, HEADS),
                    beta: part(end + HEADS, HEADS),
                    a_log: a_log.clone(),
                    dt_bias: dt_bias.clone(),
                    count: count.clone(),
                    state: recurrent.clone(),
                    out: read.clone(),
                    key_heads: KV_HEADS,
                    value_heads: HEADS,
                    key_dim: HEAD,
                    value_dim: HEAD,
                }
                .into(),
                GatedRmsNorm {
                    x: read.clone(),
                    gate: part(channels, values),
                    weight: head_norm.clone(),
                    out: read,
                    eps: 1e-6,
                }
                .into(),
            ]
        };
        (Box::new(ops), (project, result))
    }
}
