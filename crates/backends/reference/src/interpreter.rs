//! One plan over one slot, op by op.

use ampoule_backend::SlotId;
use ampoule_backend::host::HostMemory;
use ampoule_plan::{
    Attention, BufferTable, CausalConv, GatedDelta, KvAppend, Op, Plan, Rope, RopeStyle,
    SEEN_AS_PROMPT, Sample, Sealed, View,
};

use crate::elements::{load_elements, store_elements};
use crate::sample::{Draw, sample};

/// Rows of `f32`, copied out of a view.
struct Matrix {
    width: usize,
    data: Vec<f32>,
}

impl Matrix {
    fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..(index + 1) * self.width]
    }

    fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.data.chunks_exact(self.width)
    }
}

pub(crate) struct Machine<'a> {
    table: &'a BufferTable,
    slot: SlotId,
    memory: &'a mut HostMemory<Vec<u8>>,
    /// Valid token rows; rows past them are left as they are.
    valid: usize,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(
        model: &'a Sealed,
        plan: &Plan,
        slot: SlotId,
        memory: &'a mut HostMemory<Vec<u8>>,
    ) -> Self {
        let table = &model.model().buffers;
        let mut machine = Self { table, slot, memory, valid: usize::MAX };
        if let Some(count) = plan.count {
            machine.valid = machine.words(&table.view(count))[0] as usize;
        }
        machine
    }

    /// The view's rows, or the valid ones of them where it holds token rows.
    fn load(&self, view: &View) -> Matrix {
        self.load_rows(view, view.height())
    }

    fn load_rows(&self, view: &View, rows: usize) -> Matrix {
        let mut data = Vec::with_capacity(rows * view.width());
        for row in 0..rows {
            data.extend(load_elements(self.table[view.buffer].dtype, self.row_bytes(view, row)));
        }
        Matrix { width: view.width(), data }
    }

    fn span(&self, view: &View, row: usize) -> std::ops::Range<usize> {
        let buffer = &self.table[view.buffer];
        let bytes = |n: usize| buffer.dtype.bytes_for(n).expect("views cut no block");
        let start = (view.rows.start + row) * buffer.row_bytes() + bytes(view.cols.start);
        start..start + bytes(view.width())
    }

    fn row_bytes(&self, view: &View, row: usize) -> &[u8] {
        &self.memory.bytes(self.slot, view.buffer)[self.span(view, row)]
    }

    /// Stores rows from the view's first on; fewer rows than the view has leave the rest as it is.
    fn store(&mut self, view: &View, values: &[f32]) {
        let dtype = self.table[view.buffer].dtype;
        for (row, values) in values.chunks_exact(view.width()).enumerate() {
            let span = self.span(view, row);
            store_elements(dtype, values, &mut self.memory.bytes_mut(self.slot, view.buffer)[span]);
        }
    }

    fn words(&self, view: &View) -> Vec<u32> {
        let words = |row| {
            self.row_bytes(view, row)
                .chunks_exact(4)
                .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]))
        };
        (0..view.height()).flat_map(words).collect()
    }

    fn store_words(&mut self, view: &View, words: &[u32]) {
        for (row, words) in words.chunks_exact(view.width()).enumerate() {
            let span = self.span(view, row);
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            self.memory.bytes_mut(self.slot, view.buffer)[span].copy_from_slice(&bytes);
        }
    }

    fn position(&self, cursor: &View) -> usize {
        self.words(cursor)[0] as usize
    }

    /// Valid rows of an op with `rows` token rows.
    fn count(&self, count: Option<&View>, rows: usize) -> usize {
        count.map_or(rows, |view| self.words(view)[0] as usize).min(rows)
    }

    /// `out = f(rows of x)`, row by row.
    fn map_rows(&mut self, x: &View, out: &View, f: impl Fn(&[f32]) -> Vec<f32>) {
        let x = self.load_rows(x, x.height().min(self.valid));
        let values: Vec<f32> = x.rows().flat_map(f).collect();
        self.store(out, &values);
    }

    /// `out = f(a, b)`, element by element.
    fn zip(&mut self, a: &View, b: &View, out: &View, f: impl Fn(f32, f32) -> f32) {
        let rows = out.height().min(self.valid);
        let (a, b) = (self.load_rows(a, rows), self.load_rows(b, rows));
        let values: Vec<f32> = a.data.iter().zip(&b.data).map(|(&a, &b)| f(a, b)).collect();
        self.store(out, &values);
    }

    fn product(&mut self, x: &View, weight: &View, bias: Option<&View>, out: &View, add: bool) {
        let weight = self.load(weight);
        let bias = bias.map(|b| self.load(b).data);
        let before = if add { Some(self.load(out)) } else { None };
        let x = self.load_rows(x, x.height().min(self.valid));
        let mut values = Vec::new();
        for (t, x) in x.rows().enumerate() {
            for (n, w) in weight.rows().enumerate() {
                let dot: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                let biased = bias.as_ref().map_or(dot, |b| dot + b[n]);
                values.push(before.as_ref().map_or(biased, |b| b.row(t)[n] + biased));
            }
        }
        self.store(out, &values);
    }

    pub(crate) fn execute(&mut self, op: &Op) {
        match op {
            Op::Embed(o) => {
                let vocabulary = o.table.height();
                let tokens: Vec<u32> = self.words(&o.tokens).into_iter().take(self.valid).collect();
                for (t, token) in tokens.into_iter().enumerate() {
                    let row = if (token as usize) < vocabulary {
                        load_elements(
                            self.table[o.table.buffer].dtype,
                            self.row_bytes(&o.table, token as usize),
                        )
                    } else {
                        vec![0.0; o.table.width()]
                    };
                    let out = View {
                        rows: o.out.rows.start + t..o.out.rows.start + t + 1,
                        ..o.out.clone()
                    };
                    self.store(&out, &row);
                }
            }
            Op::RmsNorm(o) => {
                let weight = self.load(&o.weight).data;
                let (eps, offset) = (o.eps, if o.centered { 1.0 } else { 0.0 });
                self.map_rows(&o.x, &o.out, |row| rms_norm(row, &weight, eps, offset));
            }
            Op::Linear(o) => self.product(&o.x, &o.weight, o.bias.as_ref(), &o.out, false),
            Op::LinearAdd(o) => self.product(&o.x, &o.weight, o.bias.as_ref(), &o.out, true),
            Op::Rope(o) => self.rope(o),
            Op::KvAppend(o) => self.kv_append(o),
            Op::Attention(o) => self.attention(o),
            Op::CausalConv(o) => self.causal_conv(o),
            Op::GatedDelta(o) => self.gated_delta(o),
            Op::GatedRmsNorm(o) => {
                let weight = self.load(&o.weight).data;
                let eps = o.eps;
                let rows = o.x.height().min(self.valid);
                let gate = self.load_rows(&o.gate, rows);
                let x = self.load_rows(&o.x, rows);
                let values: Vec<f32> = (0..rows)
                    .flat_map(|t| {
                        let normed = rms_norm(x.row(t), &weight, eps, 0.0);
                        let gated: Vec<f32> =
                            normed.iter().zip(gate.row(t)).map(|(n, &g)| n * silu(g)).collect();
                        gated
                    })
                    .collect();
                self.store(&o.out, &values);
            }
            Op::SigmoidGate(o) => self.zip(&o.x, &o.gate, &o.out, |x, gate| x * sigmoid(gate)),
            Op::SwiGlu(o) => self.zip(&o.gate, &o.up, &o.out, |gate, up| silu(gate) * up),
            Op::LastRow(o) => {
                let last = self.count(o.count.as_ref(), o.x.height()).max(1) - 1;
                let row =
                    View { rows: o.x.rows.start + last..o.x.rows.start + last + 1, ..o.x.clone() };
                let row = self.load(&row).data;
                self.store(&o.out, &row);
            }
            Op::Observe(o) => {
                let count = self.count(o.count.as_ref(), o.tokens.height());
                let mut counts = self.words(&o.counts);
                for token in self.words(&o.tokens).into_iter().take(count) {
                    if let Some(entry) = counts.get_mut(token as usize) {
                        *entry |= SEEN_AS_PROMPT;
                    }
                }
                self.store_words(&o.counts, &counts);
            }
            Op::BeginReply(o) => {
                let counts: Vec<u32> = self
                    .words(&o.counts)
                    .into_iter()
                    .map(|c| if c == 0 { 0 } else { SEEN_AS_PROMPT })
                    .collect();
                self.store_words(&o.counts, &counts);
            }
            Op::Sample(o) => self.sample(o),
            Op::Advance(o) => {
                let by = o.count.as_ref().map_or(1, |view| self.words(view)[0]);
                let mut cursor = self.words(&o.cursor);
                cursor[0] += by;
                self.store_words(&o.cursor, &cursor);
            }
            Op::Fill(o) => {
                let words = vec![o.bits; o.out.height() * o.out.width()];
                self.store_words(&o.out, &words);
            }
            Op::Copy(o) => {
                for row in 0..o.source.height() {
                    let bytes = self.row_bytes(&o.source, row).to_vec();
                    let span = self.span(&o.out, row);
                    self.memory.bytes_mut(self.slot, o.out.buffer)[span].copy_from_slice(&bytes);
                }
            }
        }
    }

    fn rope(&mut self, o: &Rope) {
        let position = self.position(&o.cursor);
        let frequencies = self.load(&o.frequencies).data;
        let mut x = self.load_rows(&o.x, o.x.height().min(self.valid));
        for (t, row) in x.data.chunks_exact_mut(o.x.width()).enumerate() {
            for head in row.chunks_exact_mut(o.head_dim) {
                for (f, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = ((position + t) as f32 * frequency).sin_cos();
                    let (i, j) = match o.style {
                        RopeStyle::Half => (f, f + frequencies.len()),
                        RopeStyle::Interleaved => (2 * f, 2 * f + 1),
                    };
                    let (a, b) = (head[i], head[j]);
                    (head[i], head[j]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
        self.store(&o.x, &x.data);
    }

    fn kv_append(&mut self, o: &KvAppend) {
        let position = self.position(&o.cursor);
        let count = self.count(o.count.as_ref(), o.key.height());
        for (rows, cache) in [(&o.key, &o.key_cache), (&o.value, &o.value_cache)] {
            let rows = self.load_rows(rows, count);
            let place = View { rows: position..position + count, ..cache.clone() };
            self.store(&place, &rows.data);
        }
    }

    fn attention(&mut self, o: &Attention) {
        let position = self.position(&o.cursor);
        let count = self.count(o.count.as_ref(), o.query.height());
        let keys = self.load_rows(&o.key_cache, position + count);
        let values = self.load_rows(&o.value_cache, position + count);
        let queries = self.load_rows(&o.query, count);
        let mut out = Vec::new();
        for (t, query) in queries.rows().enumerate() {
            for (h, query) in query.chunks_exact(o.head_dim).enumerate() {
                let kv = h / (o.heads / o.kv_heads) * o.head_dim
                    ..(h / (o.heads / o.kv_heads) + 1) * o.head_dim;
                let dot = |s: usize| {
                    query.iter().zip(&keys.row(s)[kv.clone()]).map(|(q, k)| q * k).sum::<f32>()
                };
                let scores: Vec<f32> = (0..=position + t).map(|s| dot(s) * o.scale).collect();
                let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|s| (s - highest).exp()).collect();
                let sum: f32 = weights.iter().sum();
                let mut head = vec![0.0; o.head_dim];
                for (s, weight) in weights.iter().enumerate() {
                    for (acc, v) in head.iter_mut().zip(&values.row(s)[kv.clone()]) {
                        *acc += weight / sum * v;
                    }
                }
                out.extend(head);
            }
        }
        self.store(&o.out, &out);
    }

    fn causal_conv(&mut self, o: &CausalConv) {
        let count = self.count(o.count.as_ref(), o.x.height());
        let (channels, taps) = (o.weight.height(), o.weight.width());
        let weight = self.load(&o.weight);
        let bias = o.bias.as_ref().map(|b| self.load(b).data);
        let mut sequence = self.load(&o.state).data;
        sequence.extend(self.load_rows(&o.x, count).data);
        let mut out = Vec::new();
        for t in 0..count {
            for c in 0..channels {
                let dot: f32 =
                    (0..taps).map(|j| weight.row(c)[j] * sequence[(t + j) * channels + c]).sum();
                out.push(silu(bias.as_ref().map_or(dot, |b| dot + b[c])));
            }
        }
        self.store(&o.out, &out);
        self.store(&o.state, &sequence[count * channels..]);
    }

    fn gated_delta(&mut self, o: &GatedDelta) {
        let count = self.count(o.count.as_ref(), o.qkv.height());
        let (dk, dv) = (o.key_dim, o.value_dim);
        let qkv = self.load_rows(&o.qkv, count);
        let (decay, beta) = (self.load_rows(&o.decay, count), self.load_rows(&o.beta, count));
        let (a_log, dt_bias) = (self.load(&o.a_log).data, self.load(&o.dt_bias).data);
        let mut state = self.load(&o.state).data;
        let mut out = Vec::new();
        for t in 0..count {
            let (queries, rest) = qkv.row(t).split_at(o.key_heads * dk);
            let (keys, values) = rest.split_at(o.key_heads * dk);
            for h in 0..o.value_heads {
                let key_head = h / (o.value_heads / o.key_heads);
                let query = unit(&queries[key_head * dk..(key_head + 1) * dk]);
                let key = unit(&keys[key_head * dk..(key_head + 1) * dk]);
                let value = &values[h * dv..(h + 1) * dv];
                let state = &mut state[h * dk * dv..(h + 1) * dk * dv];
                let g = (-a_log[h].exp() * softplus(decay.row(t)[h] + dt_bias[h])).exp();
                let b = sigmoid(beta.row(t)[h]);
                for s in state.iter_mut() {
                    *s *= g;
                }
                for j in 0..dv {
                    let predicted: f32 = (0..dk).map(|i| state[i * dv + j] * key[i]).sum();
                    let delta = (value[j] - predicted) * b;
                    for i in 0..dk {
                        state[i * dv + j] += key[i] * delta;
                    }
                    let read: f32 =
                        (0..dk).map(|i| state[i * dv + j] * (query[i] / (dk as f32).sqrt())).sum();
                    out.push(read);
                }
            }
        }
        self.store(&o.out, &out);
        self.store(&o.state, &state);
    }

    fn sample(&mut self, o: &Sample) {
        let mut logits = self.load(&o.logits).data;
        let mut counts = self.words(&o.counts);
        let seed = self.words(&o.seed);
        let tokens = self.words(&o.bias_tokens);
        let bias =
            tokens.iter().map(|t| t.cast_signed()).zip(self.load(&o.bias_values).data).collect();
        let forced = self.words(&o.forced)[0].cast_signed();
        let drawn = sample(Draw {
            logits: &mut logits,
            params: &self.load(&o.params).data,
            seed: [seed[0], seed[1]],
            bias,
            position: self.position(&o.cursor) as u32,
            counts: &counts,
        });
        let token = usize::try_from(forced).unwrap_or(drawn);
        if let Some(entry) = counts.get_mut(token)
            && *entry & !SEEN_AS_PROMPT < !SEEN_AS_PROMPT
        {
            *entry += 1;
        }
        self.store(&o.adjusted, &logits);
        self.store_words(&o.counts, &counts);
        self.store_words(&o.token, &[token as u32]);
    }
}

fn rms_norm(row: &[f32], weight: &[f32], eps: f32, offset: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(row.len());
    for group in row.chunks_exact(weight.len()) {
        let mean = group.iter().map(|x| x * x).sum::<f32>() / group.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        out.extend(group.iter().zip(weight).map(|(x, w)| x * scale * (offset + w)));
    }
    out
}

/// Divided by `sqrt(sum of squares + 1e-6)`.
fn unit(vector: &[f32]) -> Vec<f32> {
    let scale = 1.0 / (vector.iter().map(|x| x * x).sum::<f32>() + 1e-6).sqrt();
    vector.iter().map(|x| x * scale).collect()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
