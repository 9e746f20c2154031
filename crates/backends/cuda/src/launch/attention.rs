//! Launches of `attention.cu`.

use ampoule_backend::BackendError;
use ampoule_plan::{Attention, BufferTable, DType, Op, Phase, Plan, SigmoidGate};

use super::arguments::{AttentionArgs, dtype_suffix};
use super::{BLOCK, DECODE_ROWS, Launcher, args};
use crate::driver::Launch;
use crate::memory::WorkspaceSizes;

/// Positions of one split: `SPLIT` in `attention.cu`.
const SPLIT: usize = 64;
/// Most splits the combining kernel can hold.
const MOST_SPLITS: usize = 4096;
/// Elements of a head that a block of the combining kernel takes.
const COMBINED: usize = 64;

/// Most splits that a block has under way: `wait_copies` in `attention.cu`.
const MOST_STAGES: usize = 3;

/// Keys of a part: `PART` in `attention.cu`.
const PART: usize = 512;
/// Query rows of a block of `attention_tiles`.
const TILE: usize = 64;
/// With at most so many blocks, each takes one part of the keys.
const FEW_BLOCKS: usize = 64;
/// Most bytes of parts.
const MOST_PARTED: usize = 256 << 20;

/// Parts of keys that `attention_tiles` takes side by side; 1 if a block takes all of them.
fn parts(o: &Attention) -> usize {
    let blocks = o.heads * o.query.height().div_ceil(TILE);
    let parts = o.key_cache.height().div_ceil(PART);
    let bytes = blocks * parts * TILE * o.head_dim * 4;
    if blocks <= FEW_BLOCKS && bytes <= MOST_PARTED { parts } else { 1 }
}

/// Whether the kernels for tensor cores take the op: they round queries and softmax weights to the caches' type, which
/// must then be the type of what goes in and out.
fn takes_tiles(table: &BufferTable, o: &Attention) -> bool {
    let dtype = |v: &ampoule_plan::View| table[v.buffer].dtype;
    let key_type = dtype(&o.key_cache);
    [&o.value_cache, &o.query, &o.out].iter().all(|v| dtype(v) == key_type)
        && aligned(table, o)
        && matches!(key_type, DType::BF16 | DType::F16)
        && matches!(o.head_dim, 64 | 128 | 256)
}

/// Whether the kernel for few rows takes the op.
pub(crate) fn decodes_by_splits(phase: Phase, o: &Attention) -> bool {
    phase == Phase::Decode && o.query.height() <= DECODE_ROWS && o.head_dim <= 256
}

fn splits(cache_rows: usize, context: usize) -> usize {
    let reach = if context == 0 { cache_rows } else { cache_rows.min(context) };
    reach.div_ceil(SPLIT).max(1)
}

/// Working memory for all attention ops of a plan.
pub(crate) fn attention_workspace(table: &BufferTable, plan: &Plan, sizes: &mut WorkspaceSizes) {
    for op in &plan.ops {
        let Op::Attention(o) = op else { continue };
        if takes_tiles(table, o) {
            let blocks = o.heads * o.query.height().div_ceil(TILE) * parts(o);
            sizes.attention_sums = sizes.attention_sums.max(blocks * 128 * 16);
            sizes.attention_partial = sizes.attention_partial.max(blocks * TILE * o.head_dim * 4);
        }
        if decodes_by_splits(plan.key.phase, o) {
            let parts = o.query.height() * o.heads * splits(o.key_cache.height(), plan.key.context);
            sizes.attention_sums = sizes.attention_sums.max(parts * 8);
            sizes.attention_partial = sizes.attention_partial.max(parts * o.head_dim * 4);
        }
    }
}

/// Whether 16-byte reads of cache rows are aligned.
fn aligned(table: &BufferTable, o: &Attention) -> bool {
    let element = table[o.key_cache.buffer].dtype.block_bytes();
    o.head_dim.is_multiple_of(8)
        && (table[o.key_cache.buffer].cols() * element).is_multiple_of(16)
        && table[o.value_cache.buffer].dtype == table[o.key_cache.buffer].dtype
}

/// Bytes of one split's keys and values in shared memory.
fn stage_bytes(o: &Attention) -> usize {
    SPLIT * o.head_dim * 2 * 2
}

impl Launcher<'_> {
    /// Splits that a block of `attention_stream` can have under way; 0 where that kernel does not take the op.
    fn stages(&self, o: &Attention, a: &AttentionArgs, name: &str) -> Result<usize, BackendError> {
        let takes = a.vec == 1
            && matches!(a.key.dtype, 1 | 2)
            && matches!(o.head_dim, 64 | 128 | 256)
            && a.query.at.is_multiple_of(16)
            && (a.query.ld as u64 * a.query.element()).is_multiple_of(16)
            && (o.key_cache.cols.start * 2).is_multiple_of(16)
            && (o.value_cache.cols.start * 2).is_multiple_of(16);
        if !takes {
            return Ok(0);
        }
        let limit = self.resident.device.kernels.find(name)?.shared_limit as usize;
        Ok((limit / stage_bytes(o)).min(MOST_STAGES))
    }

    /// Whether the cursor, and the rows of the caches below it, are until this op what they were when the replay began.
    fn settled(&self, o: &Attention) -> bool {
        let ops = &self.resident.model.model().plans[self.plan].ops;
        let before = ops.iter().take_while(|op| !matches!(op, Op::Attention(a) if a == o));
        before.into_iter().all(|op| {
            let appends = matches!(op, Op::KvAppend(append) if append.cursor == o.cursor);
            op.operands().iter().all(|p| {
                let writes = p.access.writes();
                let cache =
                    [o.key_cache.buffer, o.value_cache.buffer].contains(&p.view.buffer) && !appends;
                let count = o.count.as_ref().is_some_and(|c| c.buffer == p.view.buffer);
                !writes || !(cache || count || p.view.buffer == o.cursor.buffer)
            })
        })
    }

    pub(super) fn attention(
        &self,
        o: &Attention,
        gate: Option<&SigmoidGate>,
    ) -> Result<(), BackendError> {
        if o.head_dim > 256 {
            return Err(self.unsupported(format!("heads of {} elements; at most 256", o.head_dim)));
        }
        let table = &self.resident.model.model().buffers;
        let key_type = table[o.key_cache.buffer].dtype;
        let same = table[o.value_cache.buffer].dtype == key_type;
        let rows = o.query.height();
        let splits = splits(o.key_cache.height(), self.context);
        let mut a = AttentionArgs {
            query: self.matrix(&o.query),
            key: self.matrix(&o.key_cache),
            value: self.matrix(&o.value_cache),
            out: self.matrix(&o.out),
            cursor: self.address(&o.cursor),
            count: self.optional(o.count.as_ref()),
            sums: self.resident.attention_sums.at(),
            partial: self.resident.attention_partial.at(),
            cache_rows: o.key_cache.height() as i64,
            rows: rows as i32,
            heads: o.heads as i32,
            kv_heads: o.kv_heads as i32,
            head_dim: o.head_dim as i32,
            splits: splits as i32,
            vec: i32::from(aligned(table, o)),
            scale: o.scale,
            ..AttentionArgs::default()
        };
        if decodes_by_splits(self.phase, o) && splits <= MOST_SPLITS && same {
            if let Some(gate) = gate {
                a.gate = self.matrix(&gate.gate);
                a.gated = self.matrix(&gate.out);
            }
            let shared = o.heads / o.kv_heads;
            let group = [4, 2, 1].into_iter().find(|g| shared.is_multiple_of(*g)).unwrap_or(1);
            let groups = o.heads / group;
            let suffix = dtype_suffix(a.key.dtype);
            let name = format!("attention_stream_{suffix}_{}_{group}", o.head_dim);
            a.stages = self.stages(o, &a, &name)? as i32;
            if a.stages > 0 {
                a.early = i32::from(self.settled(o));
                // One block a multiprocessor, shared out among the heads.
                let most = self.resident.device.limits.multiprocessors as usize;
                let across = (most / (groups * rows)).clamp(1, splits);
                let how = Launch {
                    shared: (a.stages as usize * stage_bytes(o)) as u32,
                    ..self.early([across as u32, groups as u32, rows as u32], BLOCK)
                };
                self.go(&name, how, args![a])?;
            } else {
                let name = format!("attention_split_{suffix}_{group}");
                let grid = [splits as u32, groups as u32, rows as u32];
                self.go(&name, self.early(grid, BLOCK), args![a])?;
            }
            let parts = o.head_dim.div_ceil(COMBINED) as u32;
            let how = self.early([o.heads as u32, parts, rows as u32], BLOCK);
            return self.go("attention_combine", how, args![a]);
        }
        if takes_tiles(table, o) {
            let parts = parts(o);
            a.parts = i32::from(parts > 1);
            // Rows of a tile: with few tokens, those of all query heads of a key head.
            let pack = if parts > 1 { o.heads / o.kv_heads } else { 1 };
            a.pack = pack as i32;
            let (heads, tiles) = (o.heads / pack, (rows * pack).div_ceil(TILE));
            // Keys of a tile, and tiles at a time.
            let (keys, stages) = if o.head_dim == 256 { (32, 2) } else { (64, 1) };
            let name = format!("attention_tiles_{}_{}", dtype_suffix(a.key.dtype), o.head_dim);
            let how = Launch {
                shared: ((64 + 2 * stages * keys) * (o.head_dim + 8) * 2) as u32,
                ..self.early([heads as u32, tiles as u32, parts as u32], 128)
            };
            self.go(&name, how, args![a])?;
            if parts > 1 {
                let grid = [heads as u32, tiles as u32, (o.head_dim / 8) as u32];
                self.go("attention_parts", self.early(grid, 128), args![a])?;
            }
        } else {
            let floats = (16 + 32) * (o.head_dim + 1) + 16 * 33;
            let how = Launch {
                shared: (floats * 4) as u32,
                ..self.early([o.heads as u32, rows.div_ceil(16) as u32, 1], 128)
            };
            self.go("attention_rows", how, args![a])?;
        }
        gate.map_or(Ok(()), |gate| self.sigmoid_gate(gate))
    }
}
