//! Launches of `elementwise.cu`.

use ampoule_backend::BackendError;
use ampoule_plan::{
    Advance, BeginReply, Copy, Embed, Fill, GatedRmsNorm, KvAppend, LastRow, Observe, Op, Plan,
    RmsNorm, Rope, RopeStyle, SigmoidGate, SwiGlu, View,
};

use super::arguments::HeadNorm;
use super::{BLOCK, Launcher, args};
use crate::fuse::NormRopeAppend;
use crate::memory::bytes_of;

/// Groups up to this many columns are normalised by one warp: `WARP_ROWS` in `common.cuh`.
const WARP_ROWS: usize = 512;

impl Launcher<'_> {
    pub(super) fn embed(&self, o: &Embed) -> Result<(), BackendError> {
        let (table, tokens, out) =
            (self.matrix(&o.table), self.words(&o.tokens), self.matrix(&o.out));
        let (vocabulary, width) = (o.table.height() as i32, o.table.width() as i32);
        let how = self.early(self.row_grid(o.out.height(), o.out.width()), BLOCK);
        self.go("embed", how, args![table, tokens, out, vocabulary, width])
    }

    pub(super) fn rms_norm(&self, o: &RmsNorm) -> Result<(), BackendError> {
        let (x, out) = (self.matrix(&o.x), self.matrix(&o.out));
        let weight = self.address(&o.weight);
        let n = o.weight.width();
        let (rows, groups) = (o.x.height(), o.x.width() / n);
        let (n_arg, eps, centered) = (n as i32, o.eps, i32::from(o.centered));
        if n > WARP_ROWS {
            let how = self.early([rows as u32, groups as u32, 1], BLOCK);
            return self.go("rms_norm_block", how, args![x, weight, out, n_arg, eps, centered]);
        }
        let total = (rows * groups) as i64;
        let groups = groups as i32;
        let blocks = (total as usize).div_ceil(BLOCK as usize / 32) as u32;
        let how = self.early([blocks, 1, 1], BLOCK);
        self.go("rms_norm_warp", how, args![x, weight, out, n_arg, groups, total, eps, centered])
    }

    pub(super) fn gated_rms_norm(&self, o: &GatedRmsNorm) -> Result<(), BackendError> {
        let (x, gate, out) = (self.matrix(&o.x), self.matrix(&o.gate), self.matrix(&o.out));
        let weight = self.address(&o.weight);
        let n = o.weight.width();
        let (rows, groups) = (o.x.height(), o.x.width() / n);
        let (n_arg, eps) = (n as i32, o.eps);
        if n > WARP_ROWS {
            let how = self.early([rows as u32, groups as u32, 1], BLOCK);
            return self.go("gated_rms_norm_block", how, args![x, gate, weight, out, n_arg, eps]);
        }
        let total = (rows * groups) as i64;
        let groups = groups as i32;
        let blocks = (total as usize).div_ceil(BLOCK as usize / 32) as u32;
        let how = self.early([blocks, 1, 1], BLOCK);
        self.go("gated_rms_norm_warp", how, args![x, gate, weight, out, n_arg, groups, total, eps])
    }

    pub(super) fn sigmoid_gate(&self, o: &SigmoidGate) -> Result<(), BackendError> {
        self.gate("sigmoid_gate", &o.x, &o.gate, &o.out)
    }

    pub(super) fn swiglu(&self, o: &SwiGlu) -> Result<(), BackendError> {
        self.gate("swiglu", &o.gate, &o.up, &o.out)
    }

    fn gate(&self, name: &str, a: &View, b: &View, out: &View) -> Result<(), BackendError> {
        let n = out.width() as i32;
        let how = self.early(self.row_grid(out.height(), out.width()), BLOCK);
        let (a, b, out) = (self.matrix(a), self.matrix(b), self.matrix(out));
        self.go(name, how, args![a, b, out, n])
    }

    pub(super) fn rope(&self, o: &Rope) -> Result<(), BackendError> {
        let x = self.matrix(&o.x);
        let (cursor, frequencies) = (self.address(&o.cursor), self.address(&o.frequencies));
        let heads = o.x.width() / o.head_dim;
        let pairs = o.frequencies.width();
        let style = style_code(o.style);
        let grid = self.row_grid(o.x.height(), heads * pairs * 4);
        let (heads, head_dim, pairs) = (heads as i32, o.head_dim as i32, pairs as i32);
        let how = self.early(grid, BLOCK);
        self.go("rope", how, args![x, cursor, frequencies, heads, head_dim, pairs, style])
    }

    pub(super) fn kv_append(&self, o: &KvAppend) -> Result<(), BackendError> {
        let (key, value) = (self.matrix(&o.key), self.matrix(&o.value));
        let (key_cache, value_cache) = (self.matrix(&o.key_cache), self.matrix(&o.value_cache));
        let (cursor, count) = (self.address(&o.cursor), self.optional(o.count.as_ref()));
        let (rows, width) = (o.key.height() as i32, o.key.width() as i32);
        let cache_rows = o.key_cache.height() as i64;
        let how = self.early(self.row_grid(o.key.height(), o.key.width()), BLOCK);
        self.go(
            "kv_append",
            how,
            args![key, value, cursor, count, key_cache, value_cache, rows, width, cache_rows],
        )
    }

    pub(super) fn norm_rope_append(
        &self,
        plan: &Plan,
        fused: &NormRopeAppend,
    ) -> Result<(), BackendError> {
        let wrong = || self.unsupported("the fusion does not fit the plan".to_owned());
        let (Op::Rope(query_rope), Op::Rope(key_rope), Op::KvAppend(append)) =
            (&plan.ops[fused.query_rope], &plan.ops[fused.key_rope], &plan.ops[fused.append])
        else {
            return Err(wrong());
        };
        let head_dim = query_rope.head_dim;
        let head_norm = |norm: Option<usize>, rope: &Rope| {
            let heads = (rope.x.width() / head_dim) as i32;
            let out = self.matrix(&rope.x);
            Ok(match norm.map(|index| &plan.ops[index]) {
                None => HeadNorm { x: out, out, heads, ..HeadNorm::default() },
                Some(Op::RmsNorm(n)) => HeadNorm {
                    x: self.matrix(&n.x),
                    out,
                    weight: self.address(&n.weight),
                    heads,
                    centered: i32::from(n.centered),
                    eps: n.eps,
                    pad: 0,
                },
                Some(_) => return Err(wrong()),
            })
        };
        let query = head_norm(fused.query_norm, query_rope)?;
        let key = head_norm(fused.key_norm, key_rope)?;
        let value = self.matrix(&append.value);
        let (cursor, count) = (self.address(&append.cursor), self.optional(append.count.as_ref()));
        let frequencies = self.address(&query_rope.frequencies);
        let (key_cache, value_cache) =
            (self.matrix(&append.key_cache), self.matrix(&append.value_cache));
        let rows = append.key.height();
        let units = rows * (query.heads + 2 * key.heads) as usize;
        let how = self.early([units.div_ceil(BLOCK as usize / 32) as u32, 1, 1], BLOCK);
        let (rows, head_dim) = (rows as i32, head_dim as i32);
        let pairs = query_rope.frequencies.width() as i32;
        let style = style_code(query_rope.style);
        let cache_rows = append.key_cache.height() as i64;
        self.go(
            "norm_rope_append",
            how,
            args![
                query,
                key,
                value,
                cursor,
                count,
                frequencies,
                key_cache,
                value_cache,
                rows,
                head_dim,
                pairs,
                style,
                cache_rows
            ],
        )
    }

    pub(super) fn last_row(&self, o: &LastRow) -> Result<(), BackendError> {
        let (x, out) = (self.matrix(&o.x), self.matrix(&o.out));
        let count = self.optional(o.count.as_ref());
        let (rows, n) = (o.x.height() as i32, o.x.width() as i32);
        let how = self.early([self.blocks_for(o.x.width().div_ceil(4)), 1, 1], BLOCK);
        self.go("last_row", how, args![x, count, out, rows, n])
    }

    pub(super) fn observe(&self, o: &Observe) -> Result<(), BackendError> {
        let tokens = self.words(&o.tokens);
        let (count, counts) = (self.optional(o.count.as_ref()), self.address(&o.counts));
        let (rows, vocabulary) = (o.tokens.height() as i32, o.counts.width() as i32);
        let blocks = o.tokens.height().div_ceil(BLOCK as usize) as u32;
        let how = self.early([blocks, 1, 1], BLOCK);
        self.go("observe", how, args![tokens, count, counts, rows, vocabulary])
    }

    pub(super) fn begin_reply(&self, o: &BeginReply) -> Result<(), BackendError> {
        let (counts, vocabulary) = (self.address(&o.counts), o.counts.width() as i32);
        let how = self.early([self.blocks_for(o.counts.width()), 1, 1], BLOCK);
        self.go("begin_reply", how, args![counts, vocabulary])
    }

    pub(super) fn advance(&self, o: &Advance) -> Result<(), BackendError> {
        let (cursor, count) = (self.address(&o.cursor), self.optional(o.count.as_ref()));
        self.go("advance", self.early([1, 1, 1], 1), args![cursor, count])
    }

    pub(super) fn fill(&self, o: &Fill) -> Result<(), BackendError> {
        let out = self.words(&o.out);
        let (rows, cols, bits) = (o.out.height() as i64, o.out.width() as i64, o.bits);
        let how = self.early([self.blocks_for(o.out.height() * o.out.width()), 1, 1], BLOCK);
        self.go("fill", how, args![out, rows, cols, bits])
    }

    pub(super) fn copy(&self, o: &Copy) -> Result<(), BackendError> {
        let buffer = |v: &View| self.resident.model.buffer(v.buffer);
        let (from, to) = (buffer(&o.source), buffer(&o.out));
        let place = self.resident.layout.place(o.source.buffer);
        if place.dtype != self.resident.layout.place(o.out.buffer).dtype {
            return Err(self.unsupported(format!(
                "'{}' is held as {} on this device and cannot be copied out as {}",
                from.name, place.dtype, to.dtype
            )));
        }
        let bytes_of = |elements| bytes_of(place.dtype, elements);
        let (source, out) = (self.address(&o.source), self.address(&o.out));
        let rows = o.source.height() as i64;
        let bytes = bytes_of(o.source.width()) as i64;
        let source_stride = bytes_of(from.cols()) as i64;
        let out_stride = bytes_of(to.cols()) as i64;
        let parts = [source as i64, out as i64, bytes, source_stride, out_stride];
        let unit =
            [16, 4, 2].into_iter().find(|&u| parts.iter().all(|p| p % u == 0)).unwrap_or(1) as i32;
        let threads = rows as usize * bytes as usize / unit as usize;
        let how = self.early([self.blocks_for(threads), 1, 1], BLOCK);
        self.go("copy_rows", how, args![source, out, rows, bytes, source_stride, out_stride, unit])
    }
}

const fn style_code(style: RopeStyle) -> i32 {
    match style {
        RopeStyle::Half => 0,
        RopeStyle::Interleaved => 1,
    }
}
