//! Ops that treat every token row alone.

use ampoule_plan::{
    DType, Embed, GatedRmsNorm, LastRow, Linear, LinearAdd, Op, RandomFill, RmsNorm, Rope,
    RopeStyle, SigmoidGate, SwiGlu,
};

use super::build::{Build, Layout, Tokens};
use super::case::{Case, Reading, Tolerance, Weight};
use super::rng::{Rng, Values};
use super::spec::Family;

const NEAR: Tolerance = Tolerance::Relative(1.0);

/// What cases of row ops have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    pub(crate) tokens: Tokens,
    /// Of what is read.
    pub(crate) x: DType,
    /// Of what is written.
    pub(crate) out: DType,
    pub(crate) layout: Layout,
}

impl Common {
    pub(crate) fn name(&self) -> String {
        format!("{},x={},out={},{}", self.tokens, self.x, self.out, self.layout)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct EmbedCase {
    pub(crate) common: Common,
    pub(crate) table: DType,
    pub(crate) vocabulary: usize,
    pub(crate) width: usize,
    /// The table comes as a recipe that the device may run itself.
    pub(crate) recipe: bool,
}

impl Family for EmbedCase {
    fn op(&self) -> &'static str {
        "embed"
    }

    fn detail(&self) -> String {
        let source = if self.recipe { ",recipe" } else { "" };
        format!(
            "{},table={},v={},n={}{source}",
            self.common.name(),
            self.table,
            self.vocabulary,
            self.width
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let Common { tokens, out, layout, .. } = self.common;
        let mut b = Build::new(tokens, rng);
        let shape = [self.vocabulary, self.width];
        let table = if self.recipe {
            let fill = RandomFill { seed: b.rng.word(), centre: 0.25, half_width: 1.5 };
            b.weight_by("table", self.table, shape, Weight::Recipe(fill, self.table))
        } else {
            b.weight("table", self.table, shape, Values::Normal(1.0))
        };
        let ids = b.operand("tokens", DType::I32, 1, layout, Values::Tokens(self.vocabulary));
        let out = b.result("out", out, self.width, layout, Tolerance::Value);
        b.finish(|rows| {
            vec![Embed { table: table.clone(), tokens: ids.at(rows), out: out.at(rows) }.into()]
        })
    }
}

/// Which of the element-wise and norm ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unary {
    RmsNorm { centered: bool },
    GatedRmsNorm,
    SigmoidGate,
    SwiGlu,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct UnaryCase {
    pub(crate) common: Common,
    pub(crate) op: Unary,
    pub(crate) groups: usize,
    pub(crate) width: usize,
    /// `out` is the view `x`.
    pub(crate) in_place: bool,
    /// With outliers that saturate the gates.
    pub(crate) wide: bool,
}

impl Family for UnaryCase {
    fn op(&self) -> &'static str {
        match self.op {
            Unary::RmsNorm { .. } => "rms_norm",
            Unary::GatedRmsNorm => "gated_rms_norm",
            Unary::SigmoidGate => "sigmoid_gate",
            Unary::SwiGlu => "swiglu",
        }
    }

    fn detail(&self) -> String {
        let flag = |on: bool, text| if on { text } else { "" };
        format!(
            "{},groups={},n={}{}{}{}",
            self.common.name(),
            self.groups,
            self.width,
            flag(self.op == Unary::RmsNorm { centered: true }, ",centered"),
            flag(self.in_place, ",in place"),
            flag(self.wide, ",wide")
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let Common { tokens, x: x_type, out: out_type, layout } = self.common;
        let mut b = Build::new(tokens, rng);
        let cols = self.groups * self.width;
        let values = if self.wide { Values::Wide(2.0) } else { Values::Normal(2.0) };
        let weight = match self.op {
            Unary::RmsNorm { .. } | Unary::GatedRmsNorm => {
                Some(b.vector("weight", self.width, Values::Normal(1.0)))
            }
            Unary::SigmoidGate | Unary::SwiGlu => None,
        };
        let gate = (!matches!(self.op, Unary::RmsNorm { .. }))
            .then(|| b.operand("gate", x_type, cols, layout, values));
        let (x, out) = if self.in_place {
            let both = b.updated("x", out_type, cols, layout, values, NEAR);
            (both.clone(), both)
        } else {
            let x = b.operand("x", x_type, cols, layout, values);
            (x, b.result("out", out_type, cols, layout, NEAR))
        };
        b.finish(|rows| {
            let (x, out) = (x.at(rows), out.at(rows));
            let weight = || weight.clone().expect("a norm's weight");
            let gate = || gate.as_ref().expect("a gate").at(rows);
            vec![match self.op {
                Unary::RmsNorm { centered } => {
                    RmsNorm { x, weight: weight(), out, eps: 1e-6, centered }.into()
                }
                Unary::GatedRmsNorm => {
                    GatedRmsNorm { x, gate: gate(), weight: weight(), out, eps: 1e-5 }.into()
                }
                Unary::SigmoidGate => SigmoidGate { x, gate: gate(), out }.into(),
                Unary::SwiGlu => SwiGlu { gate: gate(), up: x, out }.into(),
            }]
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearCase {
    pub(crate) common: Common,
    pub(crate) weight: DType,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) bias: bool,
    pub(crate) add: bool,
}

/// Sums of float32 products round about once a term, in random directions: errors grow with `sqrt(K)`. The base
/// tolerance holds up to 1024 terms; scaling from the first term on would let TensorFloat-32 pass.
pub(crate) fn product_tolerance(k: usize) -> Tolerance {
    Tolerance::Relative((k as f64 / 1024.0).sqrt().max(1.0))
}

impl Family for LinearCase {
    fn op(&self) -> &'static str {
        if self.add { "linear_add" } else { "linear" }
    }

    fn detail(&self) -> String {
        let bias = if self.bias { ",bias" } else { "" };
        format!("{},w={},k={},n={}{bias}", self.common.name(), self.weight, self.k, self.n)
    }

    fn build(&self, rng: Rng) -> Case {
        let Common { tokens, x, out, layout } = self.common;
        let mut b = Build::new(tokens, rng);
        let scale = 1.0 / (self.k as f32).sqrt();
        let weight = b.weight("weight", self.weight, [self.n, self.k], Values::Normal(scale));
        let bias = self.bias.then(|| b.vector("bias", self.n, Values::Normal(0.5)));
        let x = b.operand("x", x, self.k, layout, Values::Normal(1.0));
        let tolerance = product_tolerance(self.k);
        let out = if self.add {
            b.updated("out", out, self.n, layout, Values::Normal(1.0), tolerance)
        } else {
            b.result("out", out, self.n, layout, tolerance)
        };
        b.finish(|rows| {
            let (x, weight, bias, out) = (x.at(rows), weight.clone(), bias.clone(), out.at(rows));
            vec![if self.add {
                LinearAdd { x, weight, bias, out }.into()
            } else {
                Linear { x, weight, bias, out }.into()
            }]
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeCase {
    pub(crate) tokens: Tokens,
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) frequencies: usize,
    pub(crate) style: RopeStyle,
    pub(crate) position: usize,
}

/// Frequencies as models have them: `base^(-f / F)`.
pub(crate) fn rope_frequencies(count: usize) -> Vec<u8> {
    let frequency = |f: usize| 10_000_f32.powf(-(f as f32) / count as f32);
    (0..count).flat_map(|f| frequency(f).to_le_bytes()).collect()
}

impl Family for RopeCase {
    fn op(&self) -> &'static str {
        "rope"
    }

    fn detail(&self) -> String {
        format!(
            "{},x={},{},heads={},d={},f={},{},position={}",
            self.tokens,
            self.dtype,
            self.layout,
            self.heads,
            self.head_dim,
            self.frequencies,
            self.style,
            self.position
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        let stored = Weight::Stored(rope_frequencies(self.frequencies));
        let frequencies = b.weight_by("frequencies", DType::F32, [1, self.frequencies], stored);
        let cursor = b.cursor(self.position);
        let width = self.heads * self.head_dim;
        let x = b.updated("x", self.dtype, width, self.layout, Values::Normal(1.0), NEAR);
        b.finish(|rows| {
            vec![
                Rope {
                    x: x.at(rows),
                    cursor: cursor.clone(),
                    frequencies: frequencies.clone(),
                    head_dim: self.head_dim,
                    style: self.style,
                }
                .into(),
            ]
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LastRowCase {
    pub(crate) common: Common,
    pub(crate) width: usize,
}

impl Family for LastRowCase {
    fn op(&self) -> &'static str {
        "last_row"
    }

    fn detail(&self) -> String {
        format!("{},n={}", self.common.name(), self.width)
    }

    fn build(&self, rng: Rng) -> Case {
        let Common { tokens, x, out, layout } = self.common;
        let mut b = Build::new(tokens, rng);
        let x = b.operand("x", x, self.width, layout, Values::Normal(1.0));
        let out = b.output("out", out, [1, self.width], Reading::Last, Tolerance::Value);
        let (out, count) = (b.table.view(out), b.count());
        b.finish(|rows| -> Vec<Op> {
            vec![LastRow { x: x.at(rows), count: count.clone(), out: out.clone() }.into()]
        })
    }
}
