//! Launches of matrix products: `gemv.cu` for decode, cuBLASLt or `gemm.cu` for everything else.

use std::ops::Range;

use ampoule_backend::BackendError;
use ampoule_plan::{BufferTable, CausalConv, DType, Op, Phase, Plan, Role, View};

use super::arguments::{Gemv, MatrixView, Mode, Segment, dtype_suffix};
use super::{BLOCK, DECODE_ROWS, Launcher, args};
use crate::fuse::{GemvGroup, Then};
use crate::lt::ProductShape;
use crate::memory::resident_dtype;

/// Shared memory for x that leaves room for two blocks on a multiprocessor.
const GEMV_SHARED: usize = 100 << 10;

/// Whether the matrix-vector kernel can take rows of this width with weights of this type.
pub(crate) fn gemv_fits(rows: usize, k: usize, dtype: DType) -> bool {
    let lane = if dtype == DType::F32 { 4 } else { 8 };
    rows <= DECODE_ROWS && k.is_multiple_of(lane) && shared_bytes(1, k, dtype) <= GEMV_SHARED
}

fn shared_bytes(rows: usize, k: usize, dtype: DType) -> usize {
    let chunk = if dtype == DType::F32 { 128 } else { 256 };
    rows * k.next_multiple_of(chunk) * 4
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
    if phase == Phase::Decode && gemv_fits(x.height(), x.width(), wt) {
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
        if self.phase == Phase::Decode && gemv_fits(x.height(), x.width(), dtype) {
            let part = if add { Mode::Add } else { Mode::Store };
            let segment = self.segment(weight, bias, out, &(0..weight.height()), part);
            let mut gemv = Gemv { x: self.matrix(x), k: x.width() as i32, ..Gemv::default() };
            gemv.segment[0] = segment;
            gemv.segments = 1;
            return self.gemv(&gemv, x.height(), dtype, self.is_weight(weight));
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
        self.gemv(&gemv, x.height(), dtype, weights_only)
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
    fn gemv(
        &self,
        gemv: &Gemv,
        rows: usize,
        dtype: DType,
        weights_only: bool,
    ) -> Result<(), BackendError> {
        let mut units = 0;
        let mut gemv = *gemv;
        for segment in &mut gemv.segment[..gemv.segments as usize] {
            segment.first_unit = units;
            units += segment.rows;
        }
        gemv.units = units;
        let k = gemv.k as usize;
        let limits = &self.resident.device.limits;
        let most = limits.multiprocessors * self.options.gemv_blocks;
        let blocks = (units as u32).div_ceil(BLOCK / 32).clamp(1, most);
        let mut done = 0;
        while done < rows {
            let take = [8, 4, 2, 1]
                .into_iter()
                .find(|&m| m <= rows - done && (m == 1 || shared_bytes(m, k, dtype) <= GEMV_SHARED))
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
            let name = format!("gemv_{}_{take}", dtype_suffix(super::arguments::dtype_code(dtype)));
            let mut how = self.early([blocks, 1, 1], BLOCK);
            how.shared = shared_bytes(take, k, dtype) as u32;
            // The kernel reads weights before it waits: only if no op can have written them.
            how.programmatic &= weights_only;
            self.go(&name, how, args![part])?;
            done += take;
        }
        Ok(())
    }
}
