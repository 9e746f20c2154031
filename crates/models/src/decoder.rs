//! Builds the plans of a decoder: attention or gated-delta mixers, SwiGLU, pre-norms, and the sampler.

use ampoule_plan::{
    Advance, Attention, BeginReply, Buffer, BufferId, BufferTable, CausalConv, Copy, DType, Embed,
    Fill, GatedDelta, GatedRmsNorm, Growth, KvAppend, LastRow, Linear, LinearAdd, Model, Observe,
    Op, Phase, Plan, RmsNorm, Role, Rope, RopeStyle, Sample, SealError, Sealed, ShapeKey,
    SigmoidGate, StateKind, SwiGlu, TableError, View, sampler_params,
};

use crate::error::ModelFileError;
use crate::source::{Part, PartSource, WeightData};

/// What mixes tokens in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    /// Softmax attention over the KV cache.
    Attention,
    /// Causal convolution and the gated delta rule.
    GatedDelta,
}

/// Sizes of the gated delta layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Query and key heads.
    pub key_heads: usize,
    /// Value heads.
    pub value_heads: usize,
    /// Elements of a key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Taps of the convolution; at least 2.
    pub taps: usize,
}

impl DeltaShape {
    const fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    const fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }
}

/// The shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderShape {
    /// What the model calls itself.
    pub name: String,
    /// Tokens.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// The layers' mixers, first layer first.
    pub mixers: Vec<Mixer>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Whether queries and keys are normed head by head.
    pub qk_norm: bool,
    /// Whether attention's output is gated.
    pub output_gate: bool,
    /// Whether norm weights (but the delta norm's) are stored minus one.
    pub norm_centered: bool,
    /// Epsilon of all norms.
    pub norm_eps: f32,
    /// Radians per position of each rotating pair.
    pub frequencies: Vec<f32>,
    /// Which elements rotate together.
    pub rope_style: RopeStyle,
    /// Sizes of the gated delta layers, if there are any.
    pub delta: Option<DeltaShape>,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Longest context the model was made for.
    pub context: usize,
}

/// Element types of what a plan computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Inputs and outputs of matrix products. The residual stream and the logits are always f32.
    pub activation: DType,
    /// Keys and values.
    pub kv_cache: DType,
}

/// What to build plans for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildOptions {
    /// Positions a slot holds.
    pub context: usize,
    /// Token buckets of prefill, ascending.
    pub prefill: Vec<usize>,
    /// Token bucket of scoring.
    pub score: usize,
    /// Context buckets of decode, ascending; the last is raised to `context`.
    pub decode_contexts: Vec<usize>,
    /// Element types.
    pub precision: Precision,
}

/// Entries of the logit bias.
pub const BIAS_ENTRIES: usize = 512;

/// A decoder cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A weight is missing or wrong.
    #[error(transparent)]
    Weights(#[from] ModelFileError),
    /// A size is impossible.
    #[error("{name}: {problem}")]
    Shape {
        /// The model.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A buffer cannot be declared.
    #[error(transparent)]
    Buffer(#[from] TableError),
    /// The plans do not seal: a defect of the builder.
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// Plans, and the contents of their weights by buffer.
pub type Built = (Sealed, Vec<Option<WeightData>>);

/// Builds and seals the plans.
///
/// # Errors
/// If sizes are impossible, a weight is missing or wrong, or the options fit no plan.
pub fn build(
    shape: &DecoderShape,
    source: &dyn PartSource,
    options: &BuildOptions,
) -> Result<Built, BuildError> {
    check(shape, options)?;
    let mut b = Builder { table: BufferTable::default(), data: Vec::new(), shape, source, options };
    let weights = b.weights()?;
    let memory = b.memory()?;
    let plans = plans(shape, options, &weights, &memory, &b.table);
    let model = Model { name: shape.name.clone(), buffers: b.table, plans };
    Ok((model.seal()?, b.data))
}

fn check(shape: &DecoderShape, options: &BuildOptions) -> Result<(), BuildError> {
    let fail = |problem: &str| {
        Err(BuildError::Shape { name: shape.name.clone(), problem: problem.to_owned() })
    };
    let positive = [
        shape.vocabulary,
        shape.hidden,
        shape.intermediate,
        shape.mixers.len(),
        options.context,
        options.score,
    ];
    if positive.contains(&0) || options.prefill.is_empty() || options.prefill.contains(&0) {
        return fail("a size is zero");
    }
    let limit = 1 << 24;
    if options.context > limit {
        return fail(&format!(
            "a context of {} tokens is larger than any: at most {limit}",
            options.context
        ));
    }
    if positive.iter().chain(&options.prefill).any(|&n| n > limit) || shape.mixers.len() > 1024 {
        return fail("a size is larger than anything real: check the configuration");
    }
    let has = |mixer| shape.mixers.contains(&mixer);
    if has(Mixer::Attention) {
        if shape.heads == 0 || shape.kv_heads == 0 || shape.head_dim == 0 {
            return fail("attention has no heads");
        }
        if !shape.heads.is_multiple_of(shape.kv_heads) {
            return fail("the key heads do not divide the query heads");
        }
        if shape.heads > limit
            || shape.head_dim > limit
            || 2 * shape.frequencies.len() > shape.head_dim
        {
            return fail("the rotary part is larger than a head, or a head impossibly large");
        }
        if shape.frequencies.is_empty() {
            return fail("no part of a head rotates, which this builder does not support");
        }
    }
    match shape.delta {
        None if has(Mixer::GatedDelta) => fail("linear layers have no sizes"),
        Some(d) if has(Mixer::GatedDelta) => {
            let sizes = [d.key_heads, d.value_heads, d.key_dim, d.value_dim];
            if sizes.contains(&0)
                || sizes.iter().any(|&n| n > limit)
                || !d.value_heads.is_multiple_of(d.key_heads)
            {
                return fail("the sizes of the linear layers are impossible");
            }
            if !(2..=64).contains(&d.taps) {
                return fail("the convolution must have 2 to 64 taps");
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Projections that share an input: matrices whose outputs lie side by side in one buffer.
struct Group {
    /// Weight, bias, first column, columns.
    parts: Vec<(View, Option<View>, usize, usize)>,
    width: usize,
}

enum MixerWeights {
    Attention { qkv: Group, out: Group, norms: Option<(View, View)> },
    Delta { input: Group, conv: View, a_log: View, dt_bias: View, norm: View, out: Group },
}

struct LayerWeights {
    input_norm: View,
    mixer: MixerWeights,
    post_norm: View,
    gate_up: Group,
    down: Group,
}

struct Weights {
    embedding: View,
    layers: Vec<LayerWeights>,
    final_norm: View,
    head: View,
    frequencies: Option<View>,
}

enum MixerState {
    Attention { key: View, value: View },
    Delta { conv: View, recurrent: View },
}

/// Every buffer that is not a weight.
struct Memory {
    tokens: View,
    count: View,
    forced: View,
    new_params: View,
    new_seed: View,
    new_bias_tokens: View,
    new_bias_values: View,
    token: View,
    score: View,
    x: View,
    h: View,
    projected: View,
    mixed: View,
    conv: Option<View>,
    gate_up: View,
    mlp: View,
    last: View,
    adjusted: View,
    cursor: View,
    logits: View,
    params: View,
    seed: View,
    counts: View,
    bias_tokens: View,
    bias_values: View,
    mixers: Vec<MixerState>,
}

struct Builder<'a> {
    table: BufferTable,
    data: Vec<Option<WeightData>>,
    shape: &'a DecoderShape,
    source: &'a dyn PartSource,
    options: &'a BuildOptions,
}

impl Builder<'_> {
    fn add(
        &mut self,
        name: &str,
        role: Role,
        dtype: DType,
        shape: &[usize],
    ) -> Result<View, TableError> {
        let id =
            self.table.add(Buffer { name: name.to_owned(), role, dtype, shape: shape.to_vec() })?;
        self.data.push(None);
        Ok(self.table.view(id))
    }

    fn weight(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[usize],
        data: WeightData,
    ) -> Result<View, TableError> {
        let view = self.add(name, Role::Weight, dtype, shape)?;
        self.data[view.buffer.index()] = Some(data.named(name));
        Ok(view)
    }

    fn vector(
        &mut self,
        name: &str,
        part: Part,
        layer: usize,
        len: usize,
    ) -> Result<View, BuildError> {
        let data = self.source.vector(part, layer, len)?;
        Ok(self.weight(name, DType::F32, &[len], data)?)
    }

    /// Matrices that read the same `cols` inputs; neighbours of one element type and without bias become one.
    fn group(
        &mut self,
        name: &str,
        layer: usize,
        parts: &[(Part, usize)],
        cols: usize,
    ) -> Result<Group, BuildError> {
        let mut group = Group { parts: Vec::new(), width: 0 };
        let mut open: Option<(DType, usize, WeightData)> = None;
        for &(part, rows) in parts {
            let matrix = self.source.matrix(part, layer, [rows, cols])?;
            let bias = self.source.bias(part, layer, rows)?;
            open = match (open, matrix.data) {
                (Some((dtype, before, WeightData::Rows(mut spans))), WeightData::Rows(more))
                    if dtype == matrix.dtype && bias.is_none() =>
                {
                    spans.extend(more);
                    Some((dtype, before + rows, WeightData::Rows(spans)))
                }
                (Some((dtype, before, WeightData::Random(fill))), WeightData::Random(_))
                    if bias.is_none() =>
                {
                    Some((dtype, before + rows, WeightData::Random(fill)))
                }
                (before, data) => {
                    self.close(name, cols, before, None, &mut group)?;
                    Some((matrix.dtype, rows, data))
                }
            };
            if bias.is_some() {
                self.close(name, cols, open.take(), bias, &mut group)?;
            }
        }
        self.close(name, cols, open, None, &mut group)?;
        Ok(group)
    }

    fn close(
        &mut self,
        name: &str,
        cols: usize,
        open: Option<(DType, usize, WeightData)>,
        bias: Option<WeightData>,
        group: &mut Group,
    ) -> Result<(), BuildError> {
        let Some((dtype, rows, data)) = open else { return Ok(()) };
        let index = group.parts.len();
        let name = if index == 0 { name.to_owned() } else { format!("{name}.{index}") };
        let weight = self.weight(&format!("{name}.weight"), dtype, &[rows, cols], data)?;
        let bias = bias
            .map(|b| self.weight(&format!("{name}.bias"), DType::F32, &[rows], b))
            .transpose()?;
        group.parts.push((weight, bias, group.width, rows));
        group.width += rows;
        Ok(())
    }

    fn weights(&mut self) -> Result<Weights, BuildError> {
        let s = self.shape;
        let table = self.source.matrix(Part::Embedding, 0, [s.vocabulary, s.hidden])?;
        let embedding =
            self.weight("embedding.weight", table.dtype, &[s.vocabulary, s.hidden], table.data)?;
        let frequencies = if s.mixers.contains(&Mixer::Attention) {
            let data = WeightData::Floats(s.frequencies.clone());
            Some(self.weight("rope.frequencies", DType::F32, &[s.frequencies.len()], data)?)
        } else {
            None
        };
        let mut layers = Vec::with_capacity(s.mixers.len());
        for (layer, mixer) in s.mixers.iter().enumerate() {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let input_norm = self.vector(&name("input_norm"), Part::InputNorm, layer, s.hidden)?;
            let mixer = match (mixer, s.delta) {
                (Mixer::GatedDelta, Some(d)) => {
                    let parts = [
                        (Part::DeltaQkv, d.channels()),
                        (Part::DeltaGate, d.values()),
                        (Part::DeltaBeta, d.value_heads),
                        (Part::DeltaDecay, d.value_heads),
                    ];
                    let conv =
                        self.source.vector(Part::Convolution, layer, d.channels() * d.taps)?;
                    MixerWeights::Delta {
                        input: self.group(&name("delta.in"), layer, &parts, s.hidden)?,
                        conv: self.weight(
                            &name("delta.conv"),
                            DType::F32,
                            &[d.channels(), d.taps],
                            conv,
                        )?,
                        a_log: self.vector(
                            &name("delta.a_log"),
                            Part::DecayLog,
                            layer,
                            d.value_heads,
                        )?,
                        dt_bias: self.vector(
                            &name("delta.dt_bias"),
                            Part::DecayBias,
                            layer,
                            d.value_heads,
                        )?,
                        norm: self.vector(
                            &name("delta.norm"),
                            Part::DeltaNorm,
                            layer,
                            d.value_dim,
                        )?,
                        out: self.group(
                            &name("delta.out"),
                            layer,
                            &[(Part::DeltaOut, s.hidden)],
                            d.values(),
                        )?,
                    }
                }
                _ => {
                    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
                    let gate = s.output_gate.then_some((Part::OutputGate, q));
                    let parts: Vec<_> = [(Part::Query, q), (Part::Key, kv), (Part::Value, kv)]
                        .into_iter()
                        .chain(gate)
                        .collect();
                    let qkv = self.group(&name("attention.in"), layer, &parts, s.hidden)?;
                    let norms = if s.qk_norm {
                        let query = self.vector(
                            &name("attention.query_norm"),
                            Part::QueryNorm,
                            layer,
                            s.head_dim,
                        )?;
                        Some((
                            query,
                            self.vector(
                                &name("attention.key_norm"),
                                Part::KeyNorm,
                                layer,
                                s.head_dim,
                            )?,
                        ))
                    } else {
                        None
                    };
                    let out = self.group(
                        &name("attention.out"),
                        layer,
                        &[(Part::AttentionOut, s.hidden)],
                        q,
                    )?;
                    MixerWeights::Attention { qkv, out, norms }
                }
            };
            let post_norm = self.vector(&name("post_norm"), Part::PostNorm, layer, s.hidden)?;
            let parts = [(Part::MlpGate, s.intermediate), (Part::MlpUp, s.intermediate)];
            let gate_up = self.group(&name("mlp.in"), layer, &parts, s.hidden)?;
            let down =
                self.group(&name("mlp.out"), layer, &[(Part::MlpDown, s.hidden)], s.intermediate)?;
            layers.push(LayerWeights { input_norm, mixer, post_norm, gate_up, down });
        }
        let final_norm = self.vector("final_norm", Part::FinalNorm, 0, s.hidden)?;
        let head = if s.tied {
            embedding.clone()
        } else {
            let head = self.source.matrix(Part::Head, 0, [s.vocabulary, s.hidden])?;
            self.weight("head.weight", head.dtype, &[s.vocabulary, s.hidden], head.data)?
        };
        Ok(Weights { embedding, layers, final_norm, head, frequencies })
    }

    fn memory(&mut self) -> Result<Memory, TableError> {
        let (s, o) = (self.shape, self.options);
        let rows = o.prefill.iter().copied().max().unwrap_or(1).max(o.score);
        let act = o.precision.activation;
        let fixed = |kind| Role::State { kind, growth: Growth::Fixed };
        let sampler = || fixed(StateKind::Sampler);
        let mut mixers = Vec::new();
        for (layer, mixer) in s.mixers.iter().enumerate() {
            mixers.push(match (mixer, s.delta) {
                (Mixer::GatedDelta, Some(d)) => MixerState::Delta {
                    conv: self.add(
                        &format!("layers.{layer}.conv"),
                        fixed(StateKind::Conv),
                        DType::F32,
                        &[d.taps - 1, d.channels()],
                    )?,
                    recurrent: self.add(
                        &format!("layers.{layer}.recurrent"),
                        fixed(StateKind::Recurrent),
                        DType::F32,
                        &[d.value_heads * d.key_dim, d.value_dim],
                    )?,
                },
                _ => {
                    let role = Role::State { kind: StateKind::KvCache, growth: Growth::Rows };
                    let shape = [o.context, s.kv_heads * s.head_dim];
                    let mut cache = |part| {
                        self.add(
                            &format!("layers.{layer}.kv.{part}"),
                            role.clone(),
                            o.precision.kv_cache,
                            &shape,
                        )
                    };
                    MixerState::Attention { key: cache("key")?, value: cache("value")? }
                }
            });
        }
        let has = |mixer| s.mixers.contains(&mixer);
        let attention = if has(Mixer::Attention) { s.heads * s.head_dim } else { 0 };
        let attention_in = if has(Mixer::Attention) {
            attention * if s.output_gate { 2 } else { 1 } + 2 * s.kv_heads * s.head_dim
        } else {
            0
        };
        let delta = s.delta.filter(|_| has(Mixer::GatedDelta));
        let (delta_in, delta_out) =
            delta.map_or((0, 0), |d| (d.channels() + d.values() + 2 * d.value_heads, d.values()));
        let v = s.vocabulary;
        Ok(Memory {
            tokens: self.add("input.tokens", Role::Input, DType::I32, &[rows, 1])?,
            count: self.add("input.count", Role::Input, DType::U32, &[1, 1])?,
            forced: self.add("input.forced", Role::Input, DType::I32, &[1, 1])?,
            new_params: self.add(
                "input.params",
                Role::Input,
                DType::F32,
                &[1, sampler_params::LEN],
            )?,
            new_seed: self.add("input.seed", Role::Input, DType::U32, &[1, 2])?,
            new_bias_tokens: self.add(
                "input.bias_tokens",
                Role::Input,
                DType::I32,
                &[1, BIAS_ENTRIES],
            )?,
            new_bias_values: self.add(
                "input.bias_values",
                Role::Input,
                DType::F32,
                &[1, BIAS_ENTRIES],
            )?,
            token: self.add("output.token", Role::Output, DType::I32, &[1, 1])?,
            score: self.add("output.logits", Role::Output, DType::F32, &[o.score, v])?,
            x: self.add("x", Role::Scratch, DType::F32, &[rows, s.hidden])?,
            h: self.add("h", Role::Scratch, act, &[rows, s.hidden])?,
            projected: self.add(
                "projected",
                Role::Scratch,
                act,
                &[rows, attention_in.max(delta_in)],
            )?,
            mixed: self.add("mixed", Role::Scratch, act, &[rows, attention.max(delta_out)])?,
            conv: delta
                .map(|d| self.add("convolved", Role::Scratch, act, &[rows, d.channels()]))
                .transpose()?,
            gate_up: self.add("gate_up", Role::Scratch, act, &[rows, 2 * s.intermediate])?,
            mlp: self.add("mlp", Role::Scratch, act, &[rows, s.intermediate])?,
            last: self.add("last", Role::Scratch, DType::F32, &[1, s.hidden])?,
            adjusted: self.add("adjusted", Role::Scratch, DType::F32, &[1, v])?,
            cursor: self.add("cursor", fixed(StateKind::Cursor), DType::U32, &[1, 4])?,
            logits: self.add("sampler.logits", sampler(), DType::F32, &[1, v])?,
            params: self.add("sampler.params", sampler(), DType::F32, &[1, sampler_params::LEN])?,
            seed: self.add("sampler.seed", sampler(), DType::U32, &[1, 2])?,
            counts: self.add("sampler.counts", sampler(), DType::U32, &[1, v])?,
            bias_tokens: self.add(
                "sampler.bias_tokens",
                sampler(),
                DType::I32,
                &[1, BIAS_ENTRIES],
            )?,
            bias_values: self.add(
                "sampler.bias_values",
                sampler(),
                DType::F32,
                &[1, BIAS_ENTRIES],
            )?,
            mixers,
        })
    }
}

impl WeightData {
    /// Random contents get a stream of their own from the buffer's name.
    fn named(self, name: &str) -> Self {
        match self {
            Self::Random(mut fill) => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&fill.seed.to_le_bytes());
                hasher.update(name.as_bytes());
                let mut head = [0; 8];
                head.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
                fill.seed = u64::from_le_bytes(head);
                Self::Random(fill)
            }
            other => other,
        }
    }
}

/// How a forward pass ends.
enum Ending {
    /// Logits of the last valid row, into State.
    Last,
    /// Those, and logits of every row, into Output.
    All,
}

struct Pass<'a> {
    shape: &'a DecoderShape,
    weights: &'a Weights,
    memory: &'a Memory,
    tokens: usize,
    count: Option<View>,
    ops: Vec<Op>,
}

fn plans(
    shape: &DecoderShape,
    options: &BuildOptions,
    weights: &Weights,
    memory: &Memory,
    table: &BufferTable,
) -> Vec<Plan> {
    let m = memory;
    let key = |phase, tokens, context| ShapeKey { phase, tokens, slots: 1, context };
    let plain = |phase, ops| Plan { key: key(phase, 0, options.context), count: None, ops };
    let copy = |source: &View, out: &View| Copy { source: source.clone(), out: out.clone() }.into();
    let fixed_state = table.iter().filter(|(_, b)| b.growth() == Some(Growth::Fixed));
    let reset = fixed_state
        .map(|(id, _)| Fill { out: table.view(id), bits: reset_bits(id, m) }.into())
        .collect();
    let seed = copy(&m.new_seed, &m.seed);
    let configure = vec![
        copy(&m.new_params, &m.params),
        copy(&m.new_seed, &m.seed),
        copy(&m.new_bias_tokens, &m.bias_tokens),
        copy(&m.new_bias_values, &m.bias_values),
    ];
    let mut plans = vec![
        plain(Phase::Reset, reset),
        plain(Phase::Configure, configure),
        plain(Phase::Reseed, vec![seed]),
        plain(Phase::Begin, vec![BeginReply { counts: m.counts.clone() }.into()]),
    ];
    let prefill = |phase, tokens, ending| {
        let count = Some(m.count.clone());
        let mut pass =
            Pass { shape, weights, memory, tokens, count: count.clone(), ops: Vec::new() };
        let ids = m.tokens.first_rows(tokens);
        pass.op(Observe { tokens: ids.clone(), count, counts: m.counts.clone() });
        pass.forward(&ids, &ending);
        Plan {
            key: key(phase, tokens, options.context),
            count: Some(m.count.buffer),
            ops: pass.ops,
        }
    };
    plans.extend(
        options.prefill.iter().map(|&tokens| prefill(Phase::Prefill, tokens, Ending::Last)),
    );
    plans.push(prefill(Phase::Score, options.score, Ending::All));
    let mut contexts: Vec<usize> =
        options.decode_contexts.iter().copied().filter(|&c| c < options.context).collect();
    contexts.push(options.context);
    for context in contexts {
        let mut pass = Pass { shape, weights, memory, tokens: 1, count: None, ops: Vec::new() };
        pass.op(Sample {
            logits: m.logits.clone(),
            params: m.params.clone(),
            seed: m.seed.clone(),
            bias_tokens: m.bias_tokens.clone(),
            bias_values: m.bias_values.clone(),
            cursor: m.cursor.clone(),
            forced: m.forced.clone(),
            counts: m.counts.clone(),
            adjusted: m.adjusted.clone(),
            token: m.token.clone(),
        });
        pass.forward(&m.token, &Ending::Last);
        plans.push(Plan { key: key(Phase::Decode, 1, context), count: None, ops: pass.ops });
    }
    plans
}

/// Zero, but for the bias tokens, where -1 marks an unused entry.
fn reset_bits(id: BufferId, memory: &Memory) -> u32 {
    if id == memory.bias_tokens.buffer { u32::MAX } else { 0 }
}

impl Pass<'_> {
    fn op(&mut self, op: impl Into<Op>) {
        self.ops.push(op.into());
    }

    fn norm(&mut self, x: &View, weight: &View, out: &View) {
        let (eps, centered) = (self.shape.norm_eps, self.shape.norm_centered);
        self.op(RmsNorm { x: x.clone(), weight: weight.clone(), out: out.clone(), eps, centered });
    }

    /// Projects `x` into the first columns of `out`.
    fn project(&mut self, x: &View, group: &Group, out: &View) {
        for (weight, bias, start, width) in &group.parts {
            let out = out.columns(*start, *width);
            self.op(Linear { x: x.clone(), weight: weight.clone(), bias: bias.clone(), out });
        }
    }

    /// Projects `x` onto the residual.
    fn project_add(&mut self, x: &View, group: &Group, out: &View) {
        for (weight, bias, start, width) in &group.parts {
            let out = out.columns(*start, *width);
            self.op(LinearAdd { x: x.clone(), weight: weight.clone(), bias: bias.clone(), out });
        }
    }

    fn forward(&mut self, tokens: &View, ending: &Ending) {
        let (w, m) = (self.weights, self.memory);
        let (x, h) = (m.x.first_rows(self.tokens), m.h.first_rows(self.tokens));
        self.op(Embed { table: w.embedding.clone(), tokens: tokens.clone(), out: x.clone() });
        for (layer, state) in w.layers.iter().zip(&m.mixers) {
            self.norm(&x, &layer.input_norm, &h);
            match (&layer.mixer, state) {
                (
                    MixerWeights::Attention { qkv, out, norms },
                    MixerState::Attention { key, value },
                ) => {
                    self.attention(&h, &x, (qkv, out), norms.as_ref(), (key, value));
                }
                (MixerWeights::Delta { .. }, MixerState::Delta { conv, recurrent }) => {
                    self.delta(&h, &x, &layer.mixer, conv, recurrent);
                }
                _ => unreachable!("weights and state are made from one list of mixers"),
            }
            self.norm(&x, &layer.post_norm, &h);
            let gate_up = m.gate_up.first_rows(self.tokens);
            let (width, mlp) = (self.shape.intermediate, m.mlp.first_rows(self.tokens));
            self.project(&h, &layer.gate_up, &gate_up);
            self.op(SwiGlu {
                gate: gate_up.columns(0, width),
                up: gate_up.columns(width, width),
                out: mlp.clone(),
            });
            self.project_add(&mlp, &layer.down, &x);
        }
        if matches!(ending, Ending::All) {
            self.norm(&x, &w.final_norm, &h);
            let out = m.score.first_rows(self.tokens);
            self.op(Linear { x: h.clone(), weight: w.head.clone(), bias: None, out });
        }
        let last = if self.tokens == 1 {
            x
        } else {
            self.op(LastRow { x, count: self.count.clone(), out: m.last.clone() });
            m.last.clone()
        };
        let h = h.first_rows(1);
        self.norm(&last, &w.final_norm, &h);
        self.op(Linear { x: h, weight: w.head.clone(), bias: None, out: m.logits.clone() });
        self.op(Advance { count: self.count.clone(), cursor: m.cursor.clone() });
    }

    fn attention(
        &mut self,
        h: &View,
        x: &View,
        (qkv, out): (&Group, &Group),
        norms: Option<&(View, View)>,
        (key_cache, value_cache): (&View, &View),
    ) {
        let (s, m) = (self.shape, self.memory);
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let projected = m.projected.first_rows(self.tokens).columns(0, qkv.width);
        self.project(h, qkv, &projected);
        let (query, key, value) =
            (projected.columns(0, q), projected.columns(q, kv), projected.columns(q + kv, kv));
        if let Some((query_norm, key_norm)) = norms {
            self.norm(&query, query_norm, &query);
            self.norm(&key, key_norm, &key);
        }
        let frequencies = self.weights.frequencies.clone().expect("made where there is attention");
        for x in [&query, &key] {
            let (cursor, frequencies) = (m.cursor.clone(), frequencies.clone());
            self.op(Rope {
                x: x.clone(),
                cursor,
                frequencies,
                head_dim: s.head_dim,
                style: s.rope_style,
            });
        }
        self.op(KvAppend {
            key,
            value,
            cursor: m.cursor.clone(),
            count: self.count.clone(),
            key_cache: key_cache.clone(),
            value_cache: value_cache.clone(),
        });
        let mixed = m.mixed.first_rows(self.tokens).columns(0, q);
        self.op(Attention {
            query,
            key_cache: key_cache.clone(),
            value_cache: value_cache.clone(),
            cursor: m.cursor.clone(),
            count: self.count.clone(),
            out: mixed.clone(),
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            scale: 1.0 / (s.head_dim as f32).sqrt(),
        });
        if s.output_gate {
            let gate = projected.columns(q + 2 * kv, q);
            self.op(SigmoidGate { x: mixed.clone(), gate, out: mixed.clone() });
        }
        self.project_add(&mixed, out, x);
    }

    fn delta(
        &mut self,
        h: &View,
        x: &View,
        weights: &MixerWeights,
        conv_state: &View,
        recurrent: &View,
    ) {
        let MixerWeights::Delta { input, conv, a_log, dt_bias, norm, out } = weights else {
            return;
        };
        let (m, d) = (self.memory, self.shape.delta.expect("checked with the mixers"));
        let projected = m.projected.first_rows(self.tokens).columns(0, input.width);
        self.project(h, input, &projected);
        let convolved =
            m.conv.as_ref().expect("made where there is a delta layer").first_rows(self.tokens);
        self.op(CausalConv {
            x: projected.columns(0, d.channels()),
            weight: conv.clone(),
            bias: None,
            count: self.count.clone(),
            state: conv_state.clone(),
            out: convolved.clone(),
        });
        let mixed = m.mixed.first_rows(self.tokens).columns(0, d.values());
        let at = d.channels() + d.values();
        self.op(GatedDelta {
            qkv: convolved,
            decay: projected.columns(at + d.value_heads, d.value_heads),
            beta: projected.columns(at, d.value_heads),
            a_log: a_log.clone(),
            dt_bias: dt_bias.clone(),
            count: self.count.clone(),
            state: recurrent.clone(),
            out: mixed.clone(),
            key_heads: d.key_heads,
            value_heads: d.value_heads,
            key_dim: d.key_dim,
            value_dim: d.value_dim,
        });
        self.op(GatedRmsNorm {
            x: mixed.clone(),
            gate: projected.columns(d.channels(), d.values()),
            weight: norm.clone(),
            out: mixed.clone(),
            eps: self.shape.norm_eps,
        });
        self.project_add(&mixed, out, x);
    }
}
