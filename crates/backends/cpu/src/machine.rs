//! Plans over slots, op by op.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use ampoule_backend::host::{HostKernels, HostMemory};
use ampoule_backend::{BackendError, SlotId};
use ampoule_plan::{
    Attention, BufferTable, CausalConv, DType, GatedDelta, KvAppend, Op, Plan, Role, Rope,
    SEEN_AS_PROMPT, Sample, Sealed, View,
};

use crate::kernels::attention::{Block, Heads, KEYS, Merge};
use crate::kernels::conv::Conv;
use crate::kernels::delta::Delta;
use crate::kernels::gemm::{Gemm, PANEL, Tiling};
use crate::kernels::gemv::{Gemv, Sink};
use crate::kernels::prefill_attention::RowTile;
use crate::kernels::rope::{Turn, fill_angles};
use crate::kernels::rows::{ConvertRow, Gate, GateKind, Norm};
use crate::kernels::sample::Draw;
use crate::memory::AlignedBytes;
use crate::operands::{Mat, Operands};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Isa, Kernel, LANES, Verified, dispatch};

/// Elements below which a row-wise op is not worth other threads.
const SMALL: usize = 16_384;
/// Bytes of weights that are worth a task of their own.
const TASK_BYTES: usize = 24 << 10;
/// Products below which attention is not worth other threads.
const SMALL_ATTENTION: usize = 1 << 16;
/// Queries of one KV head from which on transposing its keys pays.
const MANY_QUERIES: usize = 8;

/// The kernels and what they need.
pub(crate) struct CpuKernels {
    isa: Verified,
    pool: Pool,
    scratch: Option<Scratch>,
}

impl CpuKernels {
    pub(crate) fn new(threads: usize, isa: Isa) -> Self {
        Self { isa: Verified::new(isa), pool: Pool::new(threads), scratch: None }
    }
}

impl HostKernels for CpuKernels {
    type Bytes = AlignedBytes;

    fn prepare(
        &mut self,
        model: &Sealed,
        memory: &mut HostMemory<AlignedBytes>,
    ) -> Result<(), BackendError> {
        self.scratch = Some(Scratch::new(model, memory, self.pool.threads())?);
        Ok(())
    }

    fn run(
        &mut self,
        model: &Sealed,
        plan: &Plan,
        slot: SlotId,
        memory: &mut HostMemory<AlignedBytes>,
    ) -> Result<(), BackendError> {
        let table = &model.model().buffers;
        let Some(scratch) = &mut self.scratch else {
            let problem = "run before prepare".to_owned();
            return Err(BackendError::Device { device: "cpu".to_owned(), problem });
        };
        let mut valid = usize::MAX;
        if let Some(count) = plan.count {
            valid = Operands::new(table, slot, memory).word(&table.view(count)) as usize;
        }
        let (isa, pool) = (self.isa, &mut self.pool);
        let mut machine = Machine { isa, pool, scratch, table, valid };
        for op in &plan.ops {
            machine.execute(op, Operands::new(table, slot, memory))?;
        }
        Ok(())
    }

    fn poison(&mut self) {
        if let Some(scratch) = &mut self.scratch {
            scratch.poison();
        }
    }

    /// One thread does not fill the memory bus, and the C library's streaming stores begin at larger sizes than a
    /// layer's rows have: so pieces of a copy go to all threads.
    fn copy(&mut self, from: &[u8], to: &mut [u8]) {
        let threads = self.pool.threads();
        if threads == 1 || to.len() < COPY_ALONE {
            return to.copy_from_slice(from);
        }
        let each = to.len().div_ceil(2 * threads).next_multiple_of(4096);
        let pieces: Vec<_> = to.chunks_mut(each).zip(from.chunks(each)).map(Mutex::new).collect();
        self.pool.run(pieces.len(), &|_, index| {
            let mut piece = pieces[index].lock().unwrap_or_else(PoisonError::into_inner);
            let (to, from) = &mut *piece;
            to.copy_from_slice(from);
        });
    }
}

/// Bytes below which waking the other threads costs more than it saves.
const COPY_ALONE: usize = 128 << 10;

struct Machine<'a> {
    isa: Verified,
    pool: &'a mut Pool,
    scratch: &'a mut Scratch,
    table: &'a BufferTable,
    /// Valid token rows; rows past them are left as they are.
    valid: usize,
}

/// Runs a kernel on operands of a checked op.
fn launch<K: Kernel>(isa: Verified, kernel: K) -> K::Output {
    // SAFETY: kernels want operands as `Mat` says, which the seal of the model and the checks of `Machine` ensure,
    // and elements that nobody else touches: a call's tasks take rows, columns, heads or panels of their own.
    unsafe { dispatch(isa, kernel) }
}

impl Machine<'_> {
    /// Splits `rows` of `width` elements among threads where that pays.
    fn rows(&mut self, rows: usize, width: usize, task: impl Fn(Range<usize>) + Sync) {
        if rows * width < SMALL {
            return task(0..rows);
        }
        let each = rows.div_ceil(4 * self.pool.threads()).max(SMALL / 4 / width).max(1);
        self.pool.run(rows.div_ceil(each), &|_, i| task(i * each..((i + 1) * each).min(rows)));
    }

    /// Valid rows of an op with `rows` token rows and a count of its own.
    fn count(count: Option<&View>, rows: usize, operands: &mut Operands<'_>) -> usize {
        count.map_or(rows, |view| operands.word(view) as usize).min(rows)
    }

    fn execute(&mut self, op: &Op, mut operands: Operands<'_>) -> Result<(), BackendError> {
        let isa = self.isa;
        match op {
            Op::Embed(o) => {
                let (table, tokens) = (operands.mat(&o.table), operands.mat(&o.tokens));
                let out = operands.mat(&o.out);
                self.rows(out.rows.min(self.valid), out.cols, |rows| {
                    for to in rows {
                        // SAFETY: tokens is i32 `[T, 1]`.
                        let token = unsafe { tokens.row(to).cast::<u32>().read() } as usize;
                        let from = Some(token).filter(|t| *t < table.rows);
                        launch(isa, ConvertRow { source: table, from, out, to, padded: out.cols });
                    }
                });
            }
            Op::RmsNorm(o) => {
                let offset = if o.centered { 1.0 } else { 0.0 };
                self.norm(&mut operands, [&o.x, &o.weight, &o.out], None, o.eps, offset);
            }
            Op::GatedRmsNorm(o) => {
                let gate = Some(&o.gate);
                self.norm(&mut operands, [&o.x, &o.weight, &o.out], gate, o.eps, 0.0);
            }
            Op::SigmoidGate(o) => {
                self.gate(&mut operands, GateKind::Sigmoid, [&o.x, &o.gate, &o.out]);
            }
            Op::SwiGlu(o) => {
                self.gate(&mut operands, GateKind::SwiGlu, [&o.gate, &o.up, &o.out]);
            }
            Op::Linear(o) => {
                self.product(&mut operands, [&o.x, &o.weight, &o.out], o.bias.as_ref(), false);
            }
            Op::LinearAdd(o) => {
                self.product(&mut operands, [&o.x, &o.weight, &o.out], o.bias.as_ref(), true);
            }
            Op::Rope(o) => self.rope(o, &mut operands),
            Op::KvAppend(o) => self.kv_append(o, &mut operands)?,
            Op::Attention(o) => self.attention(o, &mut operands)?,
            Op::CausalConv(o) => self.causal_conv(o, &mut operands),
            Op::GatedDelta(o) => self.gated_delta(o, &mut operands),
            Op::LastRow(o) => {
                let count = Self::count(o.count.as_ref(), o.x.height(), &mut operands);
                let (source, out) = (operands.mat(&o.x), operands.mat(&o.out));
                let from = Some(count.max(1) - 1);
                launch(isa, ConvertRow { source, from, out, to: 0, padded: out.cols });
            }
            Op::Observe(o) => {
                let count = Self::count(o.count.as_ref(), o.tokens.height(), &mut operands);
                let tokens = operands.mat(&o.tokens);
                let counts = operands.mat(&o.counts);
                // SAFETY: tokens is i32 `[T, 1]`, counts u32 `[1, V]`, and they do not overlap.
                let counts: &mut [u32] = unsafe { row_mut(&counts, 0) };
                for t in 0..count {
                    // SAFETY: as above.
                    let token = unsafe { tokens.row(t).cast::<u32>().read() };
                    if let Some(entry) = counts.get_mut(token as usize) {
                        *entry |= SEEN_AS_PROMPT;
                    }
                }
            }
            Op::BeginReply(o) => {
                // SAFETY: counts is u32 `[1, V]`, the op's only operand.
                let counts: &mut [u32] = unsafe { row_mut(&operands.mat(&o.counts), 0) };
                for entry in counts {
                    *entry = if *entry == 0 { 0 } else { SEEN_AS_PROMPT };
                }
            }
            Op::Sample(o) => self.sample(o, &mut operands),
            Op::Advance(o) => {
                let by = o.count.as_ref().map_or(1, |view| operands.word(view));
                // SAFETY: the cursor is one u32.
                let cursor: &mut [u32] = unsafe { row_mut(&operands.mat(&o.cursor), 0) };
                cursor[0] = cursor[0].wrapping_add(by);
            }
            Op::Fill(o) => {
                let out = operands.mat(&o.out);
                for row in 0..out.rows {
                    // SAFETY: a checked view of 4-byte elements, which the op alone touches.
                    let words: &mut [u32] = unsafe { row_mut(&out, row) };
                    words.fill(o.bits);
                }
            }
            Op::Copy(o) => {
                let (source, out) = (operands.mat(&o.source), operands.mat(&o.out));
                let bytes = source.dtype.bytes_for(source.cols).expect("views cut no block");
                for row in 0..source.rows {
                    // SAFETY: checked views of one type and shape that do not overlap.
                    unsafe {
                        std::ptr::copy_nonoverlapping(source.row(row), out.row(row), bytes);
                    }
                }
            }
        }
        Ok(())
    }

    fn norm(
        &mut self,
        operands: &mut Operands<'_>,
        [x, weight, out]: [&View; 3],
        gate: Option<&View>,
        eps: f32,
        offset: f32,
    ) {
        let isa = self.isa;
        let (x, weight, out) = (operands.mat(x), operands.mat(weight), operands.mat(out));
        let gate = operands.maybe(gate);
        self.rows(x.rows.min(self.valid), x.cols, |rows| {
            launch(isa, Norm { x, gate, weight, out, eps, offset, rows });
        });
    }

    fn gate(&mut self, operands: &mut Operands<'_>, kind: GateKind, [a, b, out]: [&View; 3]) {
        let isa = self.isa;
        let (a, b, out) = (operands.mat(a), operands.mat(b), operands.mat(out));
        // Exponentials weigh as much as several plain operations.
        self.rows(out.rows.min(self.valid), 2 * out.cols, |rows| {
            launch(isa, Gate { kind, a, b, out, rows });
        });
    }

    fn product(
        &mut self,
        operands: &mut Operands<'_>,
        [x, weight, out]: [&View; 3],
        bias: Option<&View>,
        add: bool,
    ) {
        let isa = self.isa;
        let (mut x, weight) = (operands.mat(x), operands.mat(weight));
        let sink = Sink { out: operands.mat(out), bias: operands.maybe(bias), add };
        let rows = x.rows.min(self.valid);
        if rows == 0 {
            return;
        }
        if x.dtype != DType::F32 {
            let padded = x.cols.next_multiple_of(LANES);
            let to = Mat::of_f32(self.scratch.widened(), padded, rows, x.cols);
            self.rows(rows, x.cols, |rows| {
                for row in rows {
                    let from = Some(row);
                    launch(isa, ConvertRow { source: x, from, out: to, to: row, padded });
                }
            });
            x = to;
        }
        if rows == 1 {
            let groups = weight.rows.div_ceil(LANES);
            let tasks = if self.pool.threads() == 1 { 1 } else { 8 * self.pool.threads() };
            let tasks = (weight.rows * weight.stride / TASK_BYTES).clamp(1, tasks);
            let each = groups.div_ceil(tasks) * LANES;
            self.pool.run(weight.rows.div_ceil(each), &|_, i| {
                let (from, to) = (i * each, ((i + 1) * each).min(weight.rows));
                launch(isa, Gemv { x: x.row(0).cast(), weight, sink, row: 0, from, to });
            });
            return;
        }
        let tiling = Tiling::new(rows, x.cols);
        let panels = weight.rows.div_ceil(PANEL);
        let scratch = self.scratch.per_thread();
        self.pool.run(rows.div_ceil(tiling.tokens) * panels, &|thread, i| {
            let first = i / panels * tiling.tokens;
            let tokens = first..(first + tiling.tokens).min(rows);
            let from = i % panels * PANEL;
            let scratch = scratch.of(thread);
            launch(isa, Gemm { tiling, x, weight, sink, tokens, from, scratch });
        });
    }

    fn rope(&mut self, o: &Rope, operands: &mut Operands<'_>) {
        let isa = self.isa;
        let position = operands.word(&o.cursor) as usize;
        let (x, frequencies) = (operands.mat(&o.x), operands.mat(&o.frequencies));
        let rows = x.rows.min(self.valid);
        let pairs = frequencies.cols;
        let angles = &mut self.scratch.angles;
        let data = angles.data.address().cast::<f32>();
        let held = angles
            .holds
            .as_ref()
            .is_some_and(|(view, at, n)| *view == o.frequencies && *at == position && *n >= rows);
        if !held {
            // SAFETY: scratch has room for all rows of every such op, and frequencies is f32 `[F]`.
            let (table, frequencies) = unsafe {
                (
                    std::slice::from_raw_parts_mut(data, 2 * pairs * rows),
                    std::slice::from_raw_parts(frequencies.row(0).cast::<f32>(), pairs),
                )
            };
            fill_angles(table, frequencies, position);
            let constant = self.table[o.frequencies.buffer].role == Role::Weight;
            // Replacing it frees nothing: views hold no heap memory.
            angles.holds = constant.then(|| (o.frequencies.clone(), position, rows));
        }
        let angles = Mat::of_f32(data, 2 * pairs, rows.max(1), 2 * pairs);
        let (head_dim, style) = (o.head_dim, o.style);
        self.rows(rows, x.cols, |rows| {
            let angles = angles.row(0).cast::<f32>().cast_const();
            launch(isa, Turn { x, angles, pairs, head_dim, style, rows });
        });
    }

    /// That rows `0..end` of a cache exist.
    fn in_cache(&self, cache: &View, end: usize) -> Result<(), BackendError> {
        if end <= cache.height() {
            return Ok(());
        }
        let buffer = self.table[cache.buffer].name.clone();
        let problem = format!("has {} rows, and the replay would reach {end}", cache.height());
        Err(BackendError::WrongBuffer { buffer, problem })
    }

    fn kv_append(&mut self, o: &KvAppend, operands: &mut Operands<'_>) -> Result<(), BackendError> {
        let isa = self.isa;
        let position = operands.word(&o.cursor) as usize;
        let count = Self::count(o.count.as_ref(), o.key.height(), operands);
        self.in_cache(&o.key_cache, position + count)?;
        let key = (operands.mat(&o.key), operands.mat(&o.key_cache));
        let value = (operands.mat(&o.value), operands.mat(&o.value_cache));
        self.rows(count, 2 * o.key.width(), |rows| {
            for row in rows {
                for (source, out) in [key, value] {
                    let (from, to) = (Some(row), position + row);
                    launch(isa, ConvertRow { source, from, out, to, padded: out.cols });
                }
            }
        });
        Ok(())
    }

    fn attention(
        &mut self,
        o: &Attention,
        operands: &mut Operands<'_>,
    ) -> Result<(), BackendError> {
        let isa = self.isa;
        let position = operands.word(&o.cursor) as usize;
        let count = Self::count(o.count.as_ref(), o.query.height(), operands);
        self.in_cache(&o.key_cache, position + count)?;
        let shape =
            Heads { heads: o.heads, kv_heads: o.kv_heads, head_dim: o.head_dim, scale: o.scale };
        let (keys, values) = (operands.mat(&o.key_cache), operands.mat(&o.value_cache));
        let (query, out) = (operands.mat(&o.query), operands.mat(&o.out));
        let scratch = self.scratch.per_thread();
        if count * shape.group() >= MANY_QUERIES {
            let each = shape.tile_rows();
            let tiles = count.div_ceil(each);
            self.pool.run(tiles * shape.kv_heads, &|thread, i| {
                // The last rows see most keys: they go first.
                let tile = tiles - 1 - i / shape.kv_heads;
                let rows = tile * each..((tile + 1) * each).min(count);
                let (kv_head, scratch) = (i % shape.kv_heads, scratch.of(thread));
                let tile =
                    RowTile { shape, query, keys, values, out, position, rows, kv_head, scratch };
                launch(isa, tile);
            });
            return Ok(());
        }
        let partials = Mat::of_f32(self.scratch.partials(), shape.partial(), 1, shape.partial());
        for row in 0..count {
            let seen = position + row + 1;
            let blocks = seen.div_ceil(KEYS);
            let partial_stride = (blocks + 1) * shape.partial();
            let head_partials =
                |head: usize| partials.row(0).cast::<f32>().wrapping_add(head * partial_stride);
            // Whole rows of the caches where there are blocks enough for all threads.
            let together = if blocks >= 2 * self.pool.threads() { shape.kv_heads } else { 1 };
            let parts = shape.kv_heads / together;
            let block = |thread: usize, i: usize| {
                let (index, part) = (i / parts, i % parts);
                let start = index * KEYS;
                let block = Block {
                    shape,
                    query,
                    keys,
                    values,
                    row,
                    kv_heads: part * together..(part + 1) * together,
                    start,
                    count: (seen - start).min(KEYS),
                    scratch: scratch.of(thread),
                    partials: head_partials(0).wrapping_add(index * shape.partial()),
                    partial_stride,
                };
                launch(isa, block);
            };
            let merge = |_: usize, head: usize| {
                let partials = head_partials(head);
                launch(isa, Merge { shape, partials, blocks, out, row, head });
            };
            if seen * shape.heads * shape.padded() < SMALL_ATTENTION {
                (0..blocks * parts).for_each(|i| block(0, i));
            } else {
                self.pool.run(blocks * parts, &block);
            }
            if blocks * shape.heads * shape.padded() < SMALL {
                (0..shape.heads).for_each(|head| merge(0, head));
            } else {
                self.pool.run(shape.heads, &merge);
            }
        }
        Ok(())
    }

    fn causal_conv(&mut self, o: &CausalConv, operands: &mut Operands<'_>) {
        let isa = self.isa;
        let count = Self::count(o.count.as_ref(), o.x.height(), operands);
        let weight = operands.mat(&o.weight);
        let known = self.scratch.taps.iter_mut().find(|(id, _)| *id == o.weight.buffer);
        let (_, taps) = known.expect("prepare has seen every op");
        let taps = taps.refreshed(&weight);
        let (x, state, out) = (operands.mat(&o.x), operands.mat(&o.state), operands.mat(&o.out));
        let bias = operands.maybe(o.bias.as_ref());
        // Channels are what tasks share out here, in whole vectors.
        let vectors = x.cols.div_ceil(LANES);
        self.rows(vectors, LANES * 4 * count, |range| {
            let channels = range.start * LANES..(range.end * LANES).min(x.cols);
            launch(isa, Conv { x, taps, bias, state, out, count, channels });
        });
    }

    fn gated_delta(&mut self, o: &GatedDelta, operands: &mut Operands<'_>) {
        let isa = self.isa;
        let count = Self::count(o.count.as_ref(), o.qkv.height(), operands);
        let (qkv, decay, beta) =
            (operands.mat(&o.qkv), operands.mat(&o.decay), operands.mat(&o.beta));
        let (a_log, dt_bias) = (operands.mat(&o.a_log), operands.mat(&o.dt_bias));
        let (state, out) = (operands.mat(&o.state), operands.mat(&o.out));
        let scratch = self.scratch.per_thread();
        let head = |thread: usize, head: usize| {
            let delta = Delta {
                qkv,
                decay,
                beta,
                a_log,
                dt_bias,
                state,
                out,
                count,
                key_heads: o.key_heads,
                value_heads: o.value_heads,
                key_dim: o.key_dim,
                value_dim: o.value_dim,
                head,
                scratch: scratch.of(thread),
            };
            launch(isa, delta);
        };
        if count * o.value_heads * o.key_dim * o.value_dim < SMALL {
            (0..o.value_heads).for_each(|h| head(0, h));
        } else {
            self.pool.run(o.value_heads, &head);
        }
    }

    fn sample(&mut self, o: &Sample, operands: &mut Operands<'_>) {
        let position = operands.word(&o.cursor);
        let forced = operands.word(&o.forced).cast_signed();
        let [logits, params, seed] = [&o.logits, &o.params, &o.seed].map(|v| operands.mat(v));
        let [bias_tokens, bias_values] = [&o.bias_tokens, &o.bias_values].map(|v| operands.mat(v));
        let [adjusted, counts, out] =
            [&o.adjusted, &o.counts, &o.token].map(|view| operands.mat(view));
        // SAFETY: single rows of the types the op asks for; what it writes (`adjusted`, `counts`, `token`) overlaps
        // no other operand, and those it only reads are never borrowed mutably.
        let draw = unsafe {
            let seed: &[u32] = row(&seed);
            Draw {
                logits: row(&logits),
                counts: row(&counts),
                params: row(&params),
                seed: [seed[0], seed[1]],
                bias_tokens: row(&bias_tokens),
                bias_values: row(&bias_values),
                position,
                draw: forced < 0,
                adjusted: row_mut(&adjusted, 0),
            }
        };
        let drawn = self.scratch.sampler.sample(self.pool, self.isa, draw);
        let token = usize::try_from(forced).unwrap_or(drawn);
        // SAFETY: as above; the draw's borrows have ended.
        let (counts, out) = unsafe { (row_mut::<u32>(&counts, 0), row_mut::<u32>(&out, 0)) };
        if let Some(entry) = counts.get_mut(token)
            && *entry & !SEEN_AS_PROMPT < !SEEN_AS_PROMPT
        {
            *entry += 1;
        }
        out[0] = token as u32;
    }
}

/// An element of 4 bytes for which every pattern of bits is a value.
trait Word: Copy {}
impl Word for u32 {}
impl Word for i32 {}
impl Word for f32 {}

/// The only row of an operand.
///
/// # Safety
/// The operand must be a checked view of 4-byte elements, and nobody write the row while the slice lives.
unsafe fn row<'a, T: Word>(mat: &Mat) -> &'a [T] {
    debug_assert_eq!((mat.rows, mat.dtype.block_bytes()), (1, 4));
    // SAFETY: the caller's promise; elements lie at multiples of their size.
    unsafe { std::slice::from_raw_parts(mat.row(0).cast(), mat.cols) }
}

/// One row of an operand, to be changed.
///
/// # Safety
/// The operand must be a checked view of 4-byte elements, and nobody else use the row while the slice lives.
unsafe fn row_mut<'a, T: Word>(mat: &Mat, row: usize) -> &'a mut [T] {
    debug_assert_eq!(mat.dtype.block_bytes(), 4);
    // SAFETY: the caller's promise; elements lie at multiples of their size.
    unsafe { std::slice::from_raw_parts_mut(mat.row(row).cast(), mat.cols) }
}
