//! Shapes and types of every op's operands. Backends rely on this check for the safety of their kernels.

use crate::{Access, Buffer, BufferTable, DType, Growth, Op, View};

/// An op does not fit its operands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {problem}")]
pub struct OpError {
    /// The op's name.
    pub op: &'static str,
    /// What does not fit, naming buffers and shapes.
    pub problem: String,
}

struct Checker<'a> {
    table: &'a BufferTable,
    op: &'static str,
}

impl Checker<'_> {
    fn fail<T>(&self, problem: String) -> Result<T, OpError> {
        Err(OpError { op: self.op, problem })
    }

    fn describe(&self, view: &View) -> String {
        let b = &self.table[view.buffer];
        format!("'{}' {}[{}, {}]", b.name, b.dtype, view.height(), view.width())
    }

    fn buffer(&self, view: &View) -> &Buffer {
        &self.table[view.buffer]
    }

    /// The view lies in its buffer, is not empty, and cuts no quantised block.
    fn bounds(&self, field: &str, view: &View) -> Result<(), OpError> {
        let Some(b) = self.table.lookup(view.buffer) else {
            return self.fail(format!(
                "operand '{field}' names buffer {} of another table",
                view.buffer.0
            ));
        };
        let inside = |r: &std::ops::Range<usize>, n: usize| r.start < r.end && r.end <= n;
        if !inside(&view.rows, b.rows()) || !inside(&view.cols, b.cols()) {
            return self.fail(format!(
                "operand '{field}' views rows {:?} and columns {:?} of '{}', which has {} rows and {} columns",
                view.rows, view.cols, b.name, b.rows(), b.cols()
            ));
        }
        let block = b.dtype.block_elements();
        if !view.cols.start.is_multiple_of(block) || !view.cols.end.is_multiple_of(block) {
            return self
                .fail(format!("operand '{field}' cuts a block of '{}' ({})", b.name, b.dtype));
        }
        Ok(())
    }

    fn shape(&self, field: &str, view: &View, rows: usize, cols: usize) -> Result<(), OpError> {
        if (view.height(), view.width()) == (rows, cols) {
            return Ok(());
        }
        self.fail(format!(
            "operand '{field}' is {}, but must be [{rows}, {cols}]",
            self.describe(view)
        ))
    }

    fn dtype(&self, field: &str, view: &View, allowed: &[DType]) -> Result<(), OpError> {
        if allowed.contains(&self.buffer(view).dtype) {
            return Ok(());
        }
        let names: Vec<_> = allowed.iter().map(|d| d.name()).collect();
        self.fail(format!(
            "operand '{field}' is {}, but must be {}",
            self.describe(view),
            names.join(" or ")
        ))
    }

    fn typed(
        &self,
        field: &str,
        view: &View,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<(), OpError> {
        self.dtype(field, view, &[dtype])?;
        self.shape(field, view, rows, cols)
    }

    fn activation(
        &self,
        field: &str,
        view: &View,
        rows: usize,
        cols: usize,
    ) -> Result<(), OpError> {
        self.dtype(field, view, ACTIVATION)?;
        self.shape(field, view, rows, cols)
    }

    fn cursor(&self, view: &View) -> Result<(), OpError> {
        self.typed("cursor", view, DType::U32, 1, 4)
    }

    fn count(&self, view: Option<&View>) -> Result<(), OpError> {
        view.map_or(Ok(()), |v| self.typed("count", v, DType::U32, 1, 1))
    }

    fn whole(&self, field: &str, view: &View) -> Result<(), OpError> {
        if *view == self.table.view(view.buffer) {
            return Ok(());
        }
        self.fail(format!("operand '{field}' must be the whole of '{}'", self.buffer(view).name))
    }

    fn vector(&self, field: &str, view: &View, len: usize) -> Result<(), OpError> {
        self.typed(field, view, DType::F32, 1, len)
    }

    /// A product of attributes, which may be anything.
    fn product(&self, factors: &[usize]) -> Result<usize, OpError> {
        let product = factors
            .iter()
            .try_fold(1_usize, |n, &f| n.checked_mul(f))
            .filter(|&n| isize::try_from(n).is_ok());
        product.ok_or_else(|| OpError {
            op: self.op,
            problem: format!("sizes {factors:?} multiply to more than memory"),
        })
    }

    fn divides(&self, what: &str, part: usize, whole: usize) -> Result<(), OpError> {
        if part > 0 && whole.is_multiple_of(part) {
            return Ok(());
        }
        self.fail(format!("{what}: {part} does not divide {whole}"))
    }

    fn linear(
        &self,
        x: &View,
        weight: &View,
        bias: Option<&View>,
        out: &View,
    ) -> Result<(), OpError> {
        self.dtype("x", x, ACTIVATION)?;
        self.dtype("weight", weight, MATRIX)?;
        self.whole("weight", weight)?;
        self.shape("weight", weight, out.width(), x.width())?;
        self.activation("out", out, x.height(), weight.height())?;
        bias.map_or(Ok(()), |b| self.vector("bias", b, weight.height()))
    }
}

const ACTIVATION: &[DType] = &[DType::F32, DType::F16, DType::BF16];
const MATRIX: &[DType] =
    &[DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1];

/// Fields that may name the same view in one op, because each element is read before it is written.
const IN_PLACE: &[(&str, &str)] = &[("x", "out")];

impl Op {
    /// Checks bounds, shapes and types of all operands, and that nothing written overlaps another operand.
    ///
    /// # Errors
    /// If an operand does not fit, with its buffer's name and what would.
    pub fn check(&self, table: &BufferTable) -> Result<(), OpError> {
        let c = Checker { table, op: self.name() };
        let operands = self.operands();
        for o in &operands {
            c.bounds(o.field, o.view)?;
            if matches!(o.access, Access::AppendRows | Access::ReadRows) {
                c.whole(o.field, o.view)?;
            }
        }
        for (i, a) in operands.iter().enumerate() {
            for b in &operands[i + 1..] {
                let writes = |o: &crate::Operand<'_>| o.access.writes();
                let overlap = a.view.buffer == b.view.buffer
                    && ranges_meet(&a.view.rows, &b.view.rows)
                    && ranges_meet(&a.view.cols, &b.view.cols);
                let in_place = a.view == b.view
                    && IN_PLACE.contains(&(a.field, b.field))
                    && matches!(
                        self,
                        Self::RmsNorm(_) | Self::SigmoidGate(_) | Self::GatedRmsNorm(_)
                    );
                if overlap && (writes(a) || writes(b)) && !in_place {
                    let name = &table[a.view.buffer].name;
                    return c.fail(format!(
                        "operands '{}' and '{}' overlap in '{name}'",
                        a.field, b.field
                    ));
                }
            }
        }
        self.check_shapes(&c)
    }

    fn check_shapes(&self, c: &Checker<'_>) -> Result<(), OpError> {
        match self {
            Self::Embed(o) => {
                c.dtype("table", &o.table, MATRIX)?;
                c.whole("table", &o.table)?;
                c.typed("tokens", &o.tokens, DType::I32, o.out.height(), 1)?;
                c.activation("out", &o.out, o.tokens.height(), o.table.width())
            }
            Self::RmsNorm(o) => {
                c.vector("weight", &o.weight, o.weight.width())?;
                c.divides("group", o.weight.width(), o.x.width())?;
                c.dtype("x", &o.x, ACTIVATION)?;
                c.activation("out", &o.out, o.x.height(), o.x.width())
            }
            Self::Linear(o) => c.linear(&o.x, &o.weight, o.bias.as_ref(), &o.out),
            Self::LinearAdd(o) => c.linear(&o.x, &o.weight, o.bias.as_ref(), &o.out),
            Self::Rope(o) => {
                c.dtype("x", &o.x, ACTIVATION)?;
                c.divides("head_dim", o.head_dim, o.x.width())?;
                c.vector("frequencies", &o.frequencies, o.frequencies.width())?;
                if o.frequencies.width() > o.head_dim / 2 {
                    return c.fail(format!(
                        "{} frequencies turn more than {} elements",
                        o.frequencies.width(),
                        o.head_dim
                    ));
                }
                c.cursor(&o.cursor)
            }
            Self::KvAppend(o) => {
                c.dtype("key", &o.key, ACTIVATION)?;
                c.activation("value", &o.value, o.key.height(), o.key.width())?;
                for (field, cache) in [("key_cache", &o.key_cache), ("value_cache", &o.value_cache)]
                {
                    c.activation(field, cache, o.key_cache.height(), o.key.width())?;
                }
                c.cursor(&o.cursor)?;
                c.count(o.count.as_ref())
            }
            Self::Attention(o) => {
                c.divides("kv_heads", o.kv_heads, o.heads)?;
                let (query_width, row_width) =
                    (c.product(&[o.heads, o.head_dim])?, c.product(&[o.kv_heads, o.head_dim])?);
                c.activation("query", &o.query, o.out.height(), query_width)?;
                c.activation("out", &o.out, o.query.height(), query_width)?;
                for (field, cache) in [("key_cache", &o.key_cache), ("value_cache", &o.value_cache)]
                {
                    c.activation(field, cache, o.key_cache.height(), row_width)?;
                }
                c.cursor(&o.cursor)?;
                c.count(o.count.as_ref())
            }
            Self::CausalConv(o) => {
                let (channels, taps) = (o.x.width(), o.weight.width());
                if taps < 2 {
                    return c.fail("a kernel of one tap has no state: leave the op out".to_owned());
                }
                c.dtype("x", &o.x, ACTIVATION)?;
                c.whole("weight", &o.weight)?;
                c.typed("weight", &o.weight, DType::F32, channels, taps)?;
                o.bias.as_ref().map_or(Ok(()), |b| c.vector("bias", b, channels))?;
                c.whole("state", &o.state)?;
                c.typed("state", &o.state, DType::F32, taps - 1, channels)?;
                c.count(o.count.as_ref())?;
                c.activation("out", &o.out, o.x.height(), channels)
            }
            Self::GatedDelta(o) => {
                c.divides("key_heads", o.key_heads, o.value_heads)?;
                let rows = o.out.height();
                let values = c.product(&[o.value_heads, o.value_dim])?;
                let keys = c.product(&[2, o.key_heads, o.key_dim])?;
                let state_rows = c.product(&[o.value_heads, o.key_dim])?;
                c.activation("qkv", &o.qkv, rows, keys + values)?;
                c.activation("decay", &o.decay, rows, o.value_heads)?;
                c.activation("beta", &o.beta, rows, o.value_heads)?;
                c.vector("a_log", &o.a_log, o.value_heads)?;
                c.vector("dt_bias", &o.dt_bias, o.value_heads)?;
                c.whole("state", &o.state)?;
                c.typed("state", &o.state, DType::F32, state_rows, o.value_dim)?;
                c.count(o.count.as_ref())?;
                c.activation("out", &o.out, rows, values)
            }
            Self::GatedRmsNorm(o) => {
                c.vector("weight", &o.weight, o.weight.width())?;
                c.divides("group", o.weight.width(), o.x.width())?;
                c.activation("x", &o.x, o.out.height(), o.out.width())?;
                c.activation("gate", &o.gate, o.out.height(), o.out.width())?;
                c.dtype("out", &o.out, ACTIVATION)
            }
            Self::SigmoidGate(o) => {
                c.activation("x", &o.x, o.out.height(), o.out.width())?;
                c.activation("gate", &o.gate, o.out.height(), o.out.width())?;
                c.dtype("out", &o.out, ACTIVATION)
            }
            Self::SwiGlu(o) => {
                c.activation("gate", &o.gate, o.out.height(), o.out.width())?;
                c.activation("up", &o.up, o.out.height(), o.out.width())?;
                c.dtype("out", &o.out, ACTIVATION)
            }
            Self::LastRow(o) => {
                c.dtype("x", &o.x, ACTIVATION)?;
                c.count(o.count.as_ref())?;
                c.activation("out", &o.out, 1, o.x.width())
            }
            Self::Observe(o) => {
                c.typed("tokens", &o.tokens, DType::I32, o.tokens.height(), 1)?;
                c.count(o.count.as_ref())?;
                c.whole("counts", &o.counts)?;
                c.typed("counts", &o.counts, DType::U32, 1, o.counts.width())
            }
            Self::BeginReply(o) => {
                c.whole("counts", &o.counts)?;
                c.typed("counts", &o.counts, DType::U32, 1, o.counts.width())
            }
            Self::Sample(o) => {
                let vocabulary = o.logits.width();
                c.typed("logits", &o.logits, DType::F32, 1, vocabulary)?;
                c.typed("params", &o.params, DType::F32, 1, crate::sampler_params::LEN)?;
                c.typed("seed", &o.seed, DType::U32, 1, 2)?;
                c.typed("bias_tokens", &o.bias_tokens, DType::I32, 1, o.bias_values.width())?;
                c.typed("bias_values", &o.bias_values, DType::F32, 1, o.bias_tokens.width())?;
                c.cursor(&o.cursor)?;
                c.typed("forced", &o.forced, DType::I32, 1, 1)?;
                c.typed("counts", &o.counts, DType::U32, 1, vocabulary)?;
                c.typed("adjusted", &o.adjusted, DType::F32, 1, vocabulary)?;
                c.typed("token", &o.token, DType::I32, 1, 1)
            }
            Self::Advance(o) => {
                c.count(o.count.as_ref())?;
                c.cursor(&o.cursor)
            }
            Self::Fill(o) => {
                if c.buffer(&o.out).growth() == Some(Growth::Rows) {
                    return c.fail(format!(
                        "'{}' grows by rows; an empty slot has none",
                        c.buffer(&o.out).name
                    ));
                }
                c.dtype("out", &o.out, &[DType::F32, DType::I32, DType::U32])
            }
            Self::Copy(o) => {
                c.shape("out", &o.out, o.source.height(), o.source.width())?;
                c.dtype("out", &o.out, &[c.buffer(&o.source).dtype])
            }
        }
    }
}

pub(crate) fn ranges_meet(a: &std::ops::Range<usize>, b: &std::ops::Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}
