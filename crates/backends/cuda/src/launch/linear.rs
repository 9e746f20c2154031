//! Launches of matrix products: `gemv.cu` for decode, cuBLASLt or `gemm.cu` for everything else.

use std::ops::Range;

use ampoule_backend::BackendError;
use ampoule_plan::{BufferTable, CausalConv, DType, Op, Phase, Plan, Role, View};

use super::arguments::{CHAIN, Chain, Gemv, MatrixView, Mode, Segment, dtype_code, dtype_suffix};
use super::{BLOCK, DECODE_ROWS, Launcher, args};
use crate::fuse::{GemvGroup, Step, Then};
use crate::lt::ProductShape;
use crate::memory::{CHAIN_TURN, IN_SLOT, resident_dtype};

/// Shared memory for x that leaves room for two blocks on a multiprocessor, and that a block has everywhere (99 KiB on 8.6, 8.9
/// and 12.0, all told).
const GEMV_SHARED: usize = 98 << 10;
/// What its kernels have of shared memory besides x, at most.
const GEMV_STATIC: usize = 1 << 10;
/// Blocks of a multiprocessor that rows of more than one token leave room for, by their registers or shared memory.
const GEMV_RESIDENT: u32 = 2;

/// Whether the matrix-vector kernel can take rows of this width with weights of this type.
pub(crate) fn gemv_fits(rows: usize, k: usize, dtype: DType) -> bool {
    let lane = if dtype == DType::F32 { 4 } else { 8 };
    rows <= DECODE_ROWS && k.is_multiple_of(lane) && shared_bytes(1, k, dtype, 4) <= GEMV_SHARED
}

/// Whether a product goes by the matrix-vector kernel: in decode, and where one row is to go to State (the logits).
fn by_rows(phase: Phase, x: &View, weight: DType, to_state: bool) -> bool {
    (phase == Phase::Decode || x.height() == 1 && to_state)
        && gemv_fits(x.height(), x.width(), weight)
}

/// Of x with elements of so many bytes.
fn shared_bytes(rows: usize, k: usize, dtype: DType, element: usize) -> usize {
    let chunk = if dtype == DType::F32 { 128 } else { 256 };
    rows * k.next_multiple_of(chunk) * element
}

/// The product as cuBLASLt would do it, if it can: 16-bit operands of one type.
pub(crate) fn product_shape(
    table: &BufferTable,
    phase: Phase,
    op: &Op,
) -> Option<(ProductShape, View, View, View)> {
    let (x, weight, bias, out) = match op {
        Op::Linear(o) => (&o.x, &o.weight, &o.bias, &o.out),
        Op::LinearAdd(o) => (&o.x, &o.weight, &o.bias, &o.out),
        _ => return None,
    };
    let dtype = |v: &View| resident_dtype(table[v.buffer].dtype);
    let (xt, wt, ot) = (dtype(x), dtype(weight), dtype(out));
    // cuBLASLt knows addresses only, and State is where the slot of the replay is.
    let in_slot = |v: &View| table[v.buffer].role.is_state();
    if by_rows(phase, x, wt, in_slot(out)) || [x, weight, out].into_iter().any(in_slot) {
        return None;
    }
    let sixteen =
        matches!(wt, DType::BF16 | DType::F16) && xt == wt && (ot == wt || ot == DType::F32);
    // A bias is added by a kernel of its own, which is exact only in float32; and with LinearAdd, too late.
    let plain = bias.is_none() || (ot == DType::F32 && matches!(op, Op::Linear(_)));
    let ld = |v: &View| table[v.buffer].cols();
    // cuBLASLt wants 16-byte rows for its good algorithms; others go the float32 way at every size alike.
    let aligned = |v: &View, t: DType| {
        let e = t.block_bytes();
        (ld(v) * e).is_multiple_of(16) && (v.cols.start * e).is_multiple_of(16)
    };
    // The check at load overwrites x and out.
    let writable = [x, out].iter().all(|v| table[v.buffer].role != Role::Weight);
    let fits =
        sixteen && plain && writable && aligned(x, xt) && aligned(weight, wt) && aligned(out, ot);
    let shape = ProductShape {
        rows: x.height(),
        n: weight.height(),
        k: weight.width(),
        ld_x: ld(x),
        ld_out: ld(out),
        operand: wt,
        out: ot,
    };
    fits.then(|| (shape, x.clone(), weight.clone(), out.clone()))
}

/// A matrix-vector product with its operands.
#[derive(Clone, Copy)]
struct Ready {
    gemv: Gemv,
    rows: usize,
    dtype: DType,
    /// Whether no op writes its matrices: the kernels read them before they wait.
    weights_only: bool,
}

impl Ready {
    /// With its rows of weights numbered.
    fn counted(mut self) -> Self {
        let mut units = 0;
        for segment in &mut self.gemv.segment[..self.gemv.segments as usize] {
            segment.first_unit = units;
            units += segment.rows;
        }
        self.gemv.units = units;
        self
    }
}

/// `CHAIN_WARPS`, `PIECE` and `MOST_DEPTH` of `chain.cu`, and what its chains have of shared memory besides x and rings.
const CHAIN_WARPS: usize = 16;
const PIECE: usize = 4096;
const MOST_DEPTH: usize = 8;
const CHAIN_STATIC: usize = 4 << 10;
/// What aligning the rings may take.
const ALIGNED: usize = 128;
/// Bytes of weights from which on a lone product is worth a chain of its own.
const LONE_CHAIN: usize = 32 << 20;

/// Bytes of shared memory that a chain's x takes, in the type of the weights.
fn chain_x(product: &Ready) -> usize {
    (product.gemv.k as usize).next_multiple_of(256) * 2
}

impl Launcher<'_> {
    pub(super) fn linear(
        &self,
        index: usize,
        x: &View,
        weight: &View,
        bias: Option<&View>,
        out: &View,
        add: bool,
    ) -> Result<(), BackendError> {
        let dtype = self.resident.layout.place(weight.buffer).dtype;
        let to_state = self.resident.model.buffer(out.buffer).role.is_state();
        if by_rows(self.phase, x, dtype, to_state) {
            return self.gemv(&self.single(x, weight, bias, out, add));
        }
        if let Some(product) = self.products.and_then(|p| p.find(self.plan, index)) {
            let device = &self.resident.device;
            if let Some(lt) = &device.lt {
                let (x, w, o) = (self.address(x), self.address(weight), self.address(out));
                // SAFETY: the addresses are those of the op's views, whose shapes the product was made for.
                unsafe { lt.multiply(product, x, w, o, add, self.resident)? };
            }
            if let Some(bias) = bias {
                let (view, bias, n) = (self.matrix(out), self.address(bias), out.width() as i32);
                let how = self.early(self.row_grid(out.height(), out.width()), BLOCK);
                self.go("add_bias", how, args![view, bias, n])?;
            }
            return Ok(());
        }
        self.gemm(x, weight, bias, out, add)
    }

    /// One linear as a matrix-vector product.
    fn single(&self, x: &View, weight: &View, bias: Option<&View>, out: &View, add: bool) -> Ready {
        let part = if add { Mode::Add } else { Mode::Store };
        let mut gemv = Gemv { x: self.matrix(x), k: x.width() as i32, ..Gemv::default() };
        gemv.segment[0] = self.segment(weight, bias, out, &(0..weight.height()), part);
        gemv.segments = 1;
        Ready {
            gemv,
            rows: x.height(),
            dtype: self.resident.layout.place(weight.buffer).dtype,
            weights_only: self.is_weight(weight),
        }
        .counted()
    }

    fn gemm(
        &self,
        x: &View,
        weight: &View,
        bias: Option<&View>,
        out: &View,
        add: bool,
    ) -> Result<(), BackendError> {
        let wm = self.matrix(weight);
        let name = format!("gemm_{}", dtype_suffix(wm.dtype));
        let (w, bias, add) = (wm.at, self.optional(bias), i32::from(add));
        let (rows, n, k) = (x.height(), weight.height(), weight.width());
        let grid = [n.div_ceil(64) as u32, rows.div_ceil(64) as u32, 1];
        let (x, out) = (self.matrix(x), self.matrix(out));
        let (rows, n, k) = (rows as i32, n as i32, k as i32);
        self.go(&name, self.early(grid, BLOCK), args![x, w, bias, out, rows, n, k, add])
    }

    /// Some rows of a linear.
    fn segment(
        &self,
        weight: &View,
        bias: Option<&View>,
        out: &View,
        rows: &Range<usize>,
        mode: Mode,
    ) -> Segment {
        let dtype = self.resident.layout.place(weight.buffer).dtype;
        let before = rows.start * weight.width() * dtype.block_bytes();
        let count = rows.end - rows.start;
        Segment {
            w: self.address(weight) + before as u64,
            bias: bias.map_or(0, |b| self.address(b) + 4 * rows.start as u64),
            out: self.matrix(&out.columns(rows.start, count)),
            rows: count as i32,
            mode: mode as i32,
            ..Segment::default()
        }
    }

    /// Several linears of one x in one launch.
    pub(super) fn gemv_group(&self, plan: &Plan, group: &GemvGroup) -> Result<(), BackendError> {
        let ready = self.group(plan, group)?;
        let weights = ready.gemv.units as usize * ready.gemv.k as usize * 2;
        if self.may_chain() && weights >= LONE_CHAIN && self.chains(&[], &ready) {
            return self.chain_of(&[ready]);
        }
        self.gemv(&ready)
    }

    fn may_chain(&self) -> bool {
        self.phase == Phase::Decode && self.options.chain && self.resident.device.limits.bulk
    }

    /// The steps of a plan, cut into launches: chains of products, and every other step by itself.
    pub(crate) fn launches(&self, plan: &Plan, steps: &[Step]) -> Vec<Range<usize>> {
        let may = self.may_chain();
        let mut launches = Vec::new();
        let mut at = 0;
        while at < steps.len() {
            let mut chain = Vec::new();
            if may {
                for step in steps[at..].iter().take(CHAIN) {
                    match self.product(plan, step) {
                        Ok(Some(ready)) if self.chains(&chain, &ready) => chain.push(ready),
                        _ => break,
                    }
                }
            }
            let end = at + chain.len().max(1);
            launches.push(at..end);
            at = end;
        }
        launches
    }

    /// Whether a chain can take the product after these.
    fn chains(&self, before: &[Ready], ready: &Ready) -> bool {
        let Ready { gemv, dtype, .. } = ready;
        let code = dtype_code(*dtype);
        let normed = gemv.norm_weight != 0;
        let aligned = |at: u64| at.is_multiple_of(16);
        let segments = &gemv.segment[..gemv.segments as usize];
        // A chain asks where the slot is for logits and for the state of convolutions alone.
        let in_slot = |view: &MatrixView| view.at & IN_SLOT != 0;
        let elsewhere = |s: &Segment| {
            (s.mode == Mode::Store as i32 || !in_slot(&s.out))
                && !in_slot(&s.out2)
                && !in_slot(&s.out3)
        };
        ready.rows == 1
            && !in_slot(&gemv.x)
            && !in_slot(&gemv.normed)
            && segments.iter().all(elsewhere)
            && ready.weights_only
            && matches!(dtype, DType::BF16 | DType::F16)
            && before.first().is_none_or(|first| first.dtype == *dtype)
            && (gemv.x.dtype == code || normed && gemv.x.dtype == 0)
            && (!normed || gemv.normed.dtype == code)
            && gemv.x.vec == 1
            && aligned(gemv.x.at)
            && aligned(gemv.norm_weight)
            && segments.iter().all(|s| aligned(s.w) && aligned(s.w2))
            && self.ring_depth(before.iter().chain([ready])).is_some()
    }

    /// Pieces of a warp's ring for a chain of these products, if there is room for enough of them.
    fn ring_depth<'a>(&self, products: impl Iterator<Item = &'a Ready>) -> Option<usize> {
        let room = self.resident.device.limits.shared_per_block as usize;
        let rings = room.checked_sub(CHAIN_STATIC + ALIGNED + products.map(chain_x).max()?)?;
        let depth = (rings / (CHAIN_WARPS * PIECE)).min(self.options.chain_depth as usize);
        (depth >= 2).then_some(depth.min(MOST_DEPTH))
    }

    /// The step as a matrix-vector product, if it is one.
    fn product(&self, plan: &Plan, step: &Step) -> Result<Option<Ready>, BackendError> {
        let single = |x: &View, weight: &View, bias: Option<&View>, out: &View, add| {
            let dtype = self.resident.layout.place(weight.buffer).dtype;
            gemv_fits(x.height(), x.width(), dtype).then(|| self.single(x, weight, bias, out, add))
        };
        Ok(match step {
            Step::Gemv(group) => Some(self.group(plan, group)?),
            Step::Op(index) => match &plan.ops[*index] {
                Op::Linear(o) => single(&o.x, &o.weight, o.bias.as_ref(), &o.out, false),
                Op::LinearAdd(o) => single(&o.x, &o.weight, o.bias.as_ref(), &o.out, true),
                _ => None,
            },
            _ => None,
        })
    }

    /// Enqueues as one chain steps that [`Self::launches`] has found together.
    pub(super) fn chain(&self, plan: &Plan, steps: &[Step]) -> Result<(), BackendError> {
        let wrong = || self.unsupported("the chain does not fit the plan".to_owned());
        let mut products = Vec::new();
        for step in steps {
            products.push(self.product(plan, step)?.ok_or_else(wrong)?);
        }
        self.chain_of(&products)
    }

    fn chain_of(&self, products: &[Ready]) -> Result<(), BackendError> {
        let wrong = || self.unsupported("the chain does not fit the plan".to_owned());
        let depth = self.ring_depth(products.iter()).ok_or_else(wrong)?;
        let x_bytes = products.iter().map(chain_x).max().unwrap_or(0);
        let mut chain = Chain {
            turn: self.resident.sample_work.at() + CHAIN_TURN as u64,
            phases: products.len() as i32,
            depth: depth as i32,
            near: depth.min(self.options.chain_near.max(1) as usize) as i32,
            x_bytes: x_bytes as i32,
            ..Chain::default()
        };
        for (phase, product) in chain.phase.iter_mut().zip(products) {
            *phase = product.gemv;
        }
        let blocks = self.resident.device.limits.multiprocessors;
        let mut how = self.early([blocks, 1, 1], CHAIN_WARPS as u32 * 32);
        how.shared = (ALIGNED + x_bytes + depth * CHAIN_WARPS * PIECE) as u32;
        let name = format!("chain_{}", dtype_suffix(dtype_code(products[0].dtype)));
        self.go(&name, how, args![chain])
    }

    fn group(&self, plan: &Plan, group: &GemvGroup) -> Result<Ready, BackendError> {
        let wrong = || self.unsupported("the fusion does not fit the plan".to_owned());
        let mut gemv = Gemv::default();
        let mut first: Option<View> = None;
        let mut dtype = DType::F32;
        let mut weights_only = true;
        for (slot, part) in group.parts.iter().enumerate() {
            let (x, weight, bias, out) = match &plan.ops[part.linear] {
                Op::Linear(o) => (&o.x, &o.weight, o.bias.as_ref(), &o.out),
                Op::LinearAdd(o) => (&o.x, &o.weight, o.bias.as_ref(), &o.out),
                _ => return Err(wrong()),
            };
            let rows = part.first..part.first + part.rows;
            let mut segment = self.segment(weight, bias, out, &rows, Mode::Store);
            match part.then {
                Then::Store => {}
                Then::Add => segment.mode = Mode::Add as i32,
                Then::Conv { conv } => {
                    let Op::CausalConv(conv) = &plan.ops[conv] else { return Err(wrong()) };
                    segment = self.conv_segment(segment, conv);
                }
                Then::Pair { up, first, swiglu } => {
                    let (Op::Linear(up), Op::SwiGlu(swiglu)) = (&plan.ops[up], &plan.ops[swiglu])
                    else {
                        return Err(wrong());
                    };
                    weights_only &= self.is_weight(&up.weight);
                    let rows = first..first + part.rows;
                    let second =
                        self.segment(&up.weight, up.bias.as_ref(), &up.out, &rows, Mode::Pair);
                    segment = Segment {
                        w2: second.w,
                        bias2: second.bias,
                        out2: second.out,
                        out3: self.matrix(&swiglu.out),
                        mode: Mode::Pair as i32,
                        ..segment
                    };
                }
            }
            dtype = self.resident.layout.place(weight.buffer).dtype;
            weights_only &= self.is_weight(weight);
            gemv.segment[slot] = segment;
            gemv.segments = slot as i32 + 1;
            first.get_or_insert_with(|| x.clone());
        }
        let Some(x) = first else { return Err(wrong()) };
        gemv.k = x.width() as i32;
        gemv.x = self.matrix(&x);
        if let Some(norm) = group.norm {
            let Op::RmsNorm(norm) = &plan.ops[norm] else { return Err(wrong()) };
            gemv.x = self.matrix(&norm.x);
            gemv.normed = self.matrix(&norm.out);
            gemv.norm_weight = self.address(&norm.weight);
            gemv.eps = norm.eps;
            gemv.centered = i32::from(norm.centered);
        }
        Ok(Ready { gemv, rows: x.height(), dtype, weights_only }.counted())
    }

    fn conv_segment(&self, linear: Segment, conv: &CausalConv) -> Segment {
        Segment {
            out2: self.matrix(&conv.out),
            mode: Mode::Conv as i32,
            conv_weight: self.address(&conv.weight),
            conv_bias: self.optional(conv.bias.as_ref()),
            conv_state: self.address(&conv.state),
            taps: conv.weight.width() as i32,
            ..linear
        }
    }

    /// Launches for 1, 2, 4 or 8 rows at a time; a row's bits do not depend on how they are grouped.
    fn gemv(&self, ready: &Ready) -> Result<(), BackendError> {
        let Ready { gemv, rows, dtype, weights_only } = *ready;
        let units = gemv.units;
        let k = gemv.k as usize;
        let limits = &self.resident.device.limits;
        // What is staged has the weights' type: several rows of it stay as they are.
        let code = dtype_code(dtype);
        let staged = if gemv.norm_weight == 0 { gemv.x.dtype } else { gemv.normed.dtype };
        let packs = code != 0 && staged == code;
        let element = |m: usize| if packs && m > 1 { 2 } else { 4 };
        let room = |m: usize| {
            let alone = limits.shared_per_block as usize - GEMV_STATIC;
            if packs && m == 8 { alone } else { GEMV_SHARED }
        };
        let mut done = 0;
        while done < rows {
            let take = [8, 4, 2, 1]
                .into_iter()
                .find(|&m| {
                    m <= rows - done && (m == 1 || shared_bytes(m, k, dtype, element(m)) <= room(m))
                })
                .unwrap_or(1);
            let mut part = gemv;
            let shift = |v: &mut MatrixView| *v = v.at_row(done);
            shift(&mut part.x);
            shift(&mut part.normed);
            for segment in &mut part.segment {
                shift(&mut segment.out);
                shift(&mut segment.out2);
                shift(&mut segment.out3);
            }
            let packed = if element(take) == 2 { "packed_" } else { "" };
            let name = format!("gemv_{}_{packed}{take}", dtype_suffix(code));
            let shared = shared_bytes(take, k, dtype, element(take));
            let resident = match take {
                1 => self.options.gemv_blocks.max(1),
                _ if shared > GEMV_SHARED => 1,
                _ => GEMV_RESIDENT.min(self.options.gemv_blocks.max(1)),
            };
            let most = limits.multiprocessors * resident;
            let blocks = (units as u32).div_ceil(BLOCK / 32).clamp(1, most);
            let mut how = self.early([blocks, 1, 1], BLOCK);
            how.shared = shared as u32;
            // The kernel reads weights before it waits: only if no op can have written them.
            how.programmatic &= weights_only;
            self.go(&name, how, args![part])?;
            done += take;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::SOURCES;

    #[test]
    fn constants_are_those_of_the_kernel() {
        let (_, text) = SOURCES.iter().find(|(name, _)| *name == "chain").unwrap();
        for (name, value) in [
            ("CHAIN", CHAIN),
            ("CHAIN_WARPS", CHAIN_WARPS),
            ("PIECE", PIECE),
            ("MOST_DEPTH", MOST_DEPTH),
            ("SEGMENTS", crate::launch::arguments::SEGMENTS),
        ] {
            assert!(text.contains(&format!("#define {name} {value}\n")), "{name}");
        }
    }
}
