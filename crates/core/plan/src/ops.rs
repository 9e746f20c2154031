//! The typed ops. Each op's documentation is its contract; `ampoule-reference` is its executable definition.
//!
//! Conventions: operands are [`View`]s; `T` is the number of token rows; arithmetic is float32 whatever the element
//! types, rounded once when an element is stored. `count` names the `u32[1, 1]` Input with the number of valid
//! rows; where it is absent all rows are valid. `cursor` names the `u32[1, 4]` Cursor whose first element is the
//! position of row 0.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::View;

/// How an op touches an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads the whole view.
    Read,
    /// Writes the whole view, reading nothing of it.
    Write,
    /// Reads and writes the whole view.
    Update,
    /// Of a Rows buffer, writes rows `position..position + count`.
    AppendRows,
    /// Of a Rows buffer, reads rows `0..position + count`.
    ReadRows,
}

impl Access {
    /// Whether anything is written.
    #[must_use]
    pub const fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::ReadRows)
    }
}

/// One operand of an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand<'a> {
    /// The field's name, as in the text form.
    pub field: &'static str,
    /// What it views.
    pub view: &'a View,
    /// How the op touches it.
    pub access: Access,
}

/// An attribute's value as the text form holds it.
pub(crate) trait Attribute: Sized {
    fn to_text(&self) -> String;
    fn from_text(text: &str) -> Option<Self>;
}

macro_rules! attribute_by_display {
    ($($type:ty),*) => {$(
        impl Attribute for $type {
            fn to_text(&self) -> String { self.to_string() }
            fn from_text(text: &str) -> Option<Self> { text.parse().ok() }
        }
    )*};
}
attribute_by_display!(usize, bool, u32, RopeStyle);

impl Attribute for f32 {
    fn to_text(&self) -> String {
        format!("{self:?}") // the shortest text that parses back to the same value
    }

    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

/// Which elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Elements `i` and `i + rotary / 2` (GPT-NeoX, Hugging Face `rotate_half`).
    Half,
    /// Elements `2 i` and `2 i + 1` (GPT-J; GGUF's permuted Llama weights).
    Interleaved,
}

impl fmt::Display for RopeStyle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Half => "half",
            Self::Interleaved => "interleaved",
        })
    }
}

impl FromStr for RopeStyle {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "half" => Ok(Self::Half),
            "interleaved" => Ok(Self::Interleaved),
            _ => Err(()),
        }
    }
}

/// Operands and attributes of an op, by field name, as read from text.
#[derive(Default)]
pub(crate) struct Fields {
    pub(crate) views: BTreeMap<String, View>,
    pub(crate) attributes: BTreeMap<String, String>,
}

impl Fields {
    fn view(&mut self, field: &str) -> Result<View, String> {
        self.views.remove(field).ok_or_else(|| format!("operand '{field}' is missing"))
    }

    fn attribute<A: Attribute>(&mut self, field: &str) -> Result<A, String> {
        let text = self
            .attributes
            .remove(field)
            .ok_or_else(|| format!("attribute '{field}' is missing"))?;
        A::from_text(&text).ok_or_else(|| format!("attribute '{field}' cannot be '{text}'"))
    }

    fn finish(self) -> Result<(), String> {
        match self.views.keys().chain(self.attributes.keys()).next() {
            Some(extra) => Err(format!("no field is called '{extra}'")),
            None => Ok(()),
        }
    }
}

macro_rules! access {
    (read) => {
        Access::Read
    };
    (write) => {
        Access::Write
    };
    (update) => {
        Access::Update
    };
    (append_rows) => {
        Access::AppendRows
    };
    (read_rows) => {
        Access::ReadRows
    };
    (maybe_read) => {
        Access::Read
    };
}

macro_rules! operand_type {
    (maybe_read) => { Option<View> };
    ($access:ident) => { View };
}

macro_rules! operand_push {
    ($list:ident, $op:ident, maybe_read, $field:ident) => {
        if let Some(view) = &$op.$field {
            $list.push(Operand { field: stringify!($field), view, access: Access::Read });
        }
    };
    ($list:ident, $op:ident, $access:ident, $field:ident) => {
        $list.push(Operand {
            field: stringify!($field),
            view: &$op.$field,
            access: access!($access),
        });
    };
}

macro_rules! operand_take {
    ($fields:ident, maybe_read, $field:ident) => {
        $fields.views.remove(stringify!($field))
    };
    ($fields:ident, $access:ident, $field:ident) => {
        $fields.view(stringify!($field))?
    };
}

macro_rules! ops {
    ($(
        $(#[$doc:meta])*
        $name:ident = $text:literal {
            $( $(#[$field_doc:meta])* $access:ident $field:ident, )*
            $( ; $( $(#[$attr_doc:meta])* $attr:ident : $attr_type:ty, )* )?
        }
    )*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq)]
            pub struct $name {
                $( $(#[$field_doc])* pub $field: operand_type!($access), )*
                $( $( $(#[$attr_doc])* pub $attr: $attr_type, )* )?
            }

            impl From<$name> for Op {
                fn from(op: $name) -> Self { Self::$name(op) }
            }
        )*

        /// One step of a plan.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op {
            $( #[doc = concat!("See [`struct@", stringify!($name), "`].")] $name($name), )*
        }

        impl Op {
            /// Every op's name in the text form.
            pub const NAMES: &'static [&'static str] = &[$($text),*];

            /// The name in the text form.
            pub const fn name(&self) -> &'static str {
                match self { $( Self::$name(_) => $text, )* }
            }

            /// The operands, in the order of the op's fields.
            #[allow(clippy::vec_init_then_push)] // some fields are optional
            pub fn operands(&self) -> Vec<Operand<'_>> {
                match self { $( Self::$name(op) => {
                    let mut list = Vec::new();
                    $( operand_push!(list, op, $access, $field); )*
                    list
                } )* }
            }

            /// The attributes as text, in the order of the op's fields.
            pub(crate) fn attributes(&self) -> Vec<(&'static str, String)> {
                match self { $( Self::$name(op) => {
                    let _ = op;
                    vec![$( $( (stringify!($attr), op.$attr.to_text()), )* )?]
                } )* }
            }

            /// Builds the op called `name`; the error is a sentence.
            pub(crate) fn from_fields(name: &str, mut fields: Fields) -> Result<Self, String> {
                match name {
                    $( $text => {
                        let op = $name {
                            $( $field: operand_take!(fields, $access, $field), )*
                            $( $( $attr: fields.attribute(stringify!($attr))?, )* )?
                        };
                        fields.finish()?;
                        Ok(Self::$name(op))
                    } )*
                    other => Err(format!("no op is called '{other}'")),
                }
            }
        }
    };
}

ops! {
    /// Looks rows of a table up: `out[t] = table[tokens[t]]`.
    ///
    /// A token outside the table yields a row of zeros; the engine refuses such tokens before they get here.
    Embed = "embed" {
        /// `[V, H]`, any float type.
        read table,
        /// `i32 [T, 1]`.
        read tokens,
        /// `[T, H]`.
        write out,
    }

    /// Root-mean-square norm over groups of `N = weight` columns (Zhang and Sennrich 2019):
    /// `out = x / sqrt(mean(x^2) + eps) * scale`, `scale = weight`, or `1 + weight` where `centered`.
    ///
    /// `x` has `G * N` columns; each group of each row is normalised alone, so per-head norms are the same op.
    /// `out` may be the same view as `x`.
    RmsNorm = "rms_norm" {
        /// `[T, G * N]`.
        read x,
        /// `f32 [N]`.
        read weight,
        /// `[T, G * N]`.
        write out,
        ;
        /// Added to the mean square.
        eps: f32,
        /// Whether the weight is stored minus one.
        centered: bool,
    }

    /// Matrix product with a row-major weight: `out[t, n] = sum_k x[t, k] * weight[n, k] (+ bias[n])`.
    Linear = "linear" {
        /// `[T, K]`.
        read x,
        /// `[N, K]`, any float or quantised type.
        read weight,
        /// `f32 [N]`.
        maybe_read bias,
        /// `[T, N]`.
        write out,
    }

    /// [`Linear`] onto a residual: `out[t, n] += sum_k x[t, k] * weight[n, k] (+ bias[n])`.
    LinearAdd = "linear_add" {
        /// `[T, K]`.
        read x,
        /// `[N, K]`, any float or quantised type.
        read weight,
        /// `f32 [N]`.
        maybe_read bias,
        /// `[T, N]`.
        update out,
    }

    /// Rotary position embedding, in place (Su et al. 2021): the pair `(a, b)` of frequency `f` becomes
    /// `(a cos - b sin, b cos + a sin)` with angle `(position + t) * frequencies[f]` rounded to float32.
    ///
    /// The first `2 * F` elements of each head rotate; the rest stay.
    Rope = "rope" {
        /// `[T, heads * head_dim]`.
        update x,
        /// `u32 [1, 4]`.
        read cursor,
        /// `f32 [F]`, radians per position.
        read frequencies,
        ;
        /// Elements of one head.
        head_dim: usize,
        /// Which elements pair up.
        style: RopeStyle,
    }

    /// Appends keys and values: `cache[position + t] = row t`, for `t < count`.
    KvAppend = "kv_append" {
        /// `[T, W]`.
        read key,
        /// `[T, W]`.
        read value,
        /// `u32 [1, 4]`.
        read cursor,
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `[C, W]`.
        append_rows key_cache,
        /// `[C, W]`.
        append_rows value_cache,
    }

    /// Causal scaled dot-product attention over the cache (Vaswani et al. 2017), grouped queries (Ainslie et al.
    /// 2023): head `h` of row `t` attends with scale `scale` to positions `0..=position + t` of KV head
    /// `h / (heads / kv_heads)`.
    ///
    /// The result of a row does not depend on how many rows run with it.
    Attention = "attention" {
        /// `[T, heads * head_dim]`.
        read query,
        /// `[C, kv_heads * head_dim]`.
        read_rows key_cache,
        /// `[C, kv_heads * head_dim]`.
        read_rows value_cache,
        /// `u32 [1, 4]`.
        read cursor,
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `[T, heads * head_dim]`.
        write out,
        ;
        /// Query heads.
        heads: usize,
        /// Key and value heads; divides `heads`.
        kv_heads: usize,
        /// Elements of one head.
        head_dim: usize,
        /// Multiplies the dot products.
        scale: f32,
    }

    /// Depthwise causal convolution over time, then SiLU:
    /// `out[t, c] = silu(sum_j weight[c, j] * seq[t + j, c] (+ bias[c]))`, where `seq` is the `K - 1` rows of `state`
    /// followed by the rows of `x`. Afterwards `state` holds the last `K - 1` rows of `seq` up to `count`.
    CausalConv = "causal_conv" {
        /// `[T, C]`.
        read x,
        /// `f32 [C, K]`.
        read weight,
        /// `f32 [C]`.
        maybe_read bias,
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `f32 [K - 1, C]`, oldest first.
        update state,
        /// `[T, C]`.
        write out,
    }

    /// The gated delta rule (Yang, Kautz, Hatamizadeh 2024), one token after another. For value head `h`, with key
    /// head `h / (value_heads / key_heads)`, `q` and `k` divided by `sqrt(sum of squares + 1e-6)`, `q` then by
    /// `sqrt(key_dim)`:
    /// `g = exp(-exp(a_log) * softplus(decay + dt_bias))`, `b = sigmoid(beta)`,
    /// `S = g S`, `S += k ((v - S^T k) b)^T`, `out = S^T q`.
    GatedDelta = "gated_delta" {
        /// `[T, 2 * key_heads * key_dim + value_heads * value_dim]`: all queries, all keys, all values.
        read qkv,
        /// `[T, value_heads]`.
        read decay,
        /// `[T, value_heads]`.
        read beta,
        /// `f32 [value_heads]`.
        read a_log,
        /// `f32 [value_heads]`.
        read dt_bias,
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `f32 [value_heads * key_dim, value_dim]`.
        update state,
        /// `[T, value_heads * value_dim]`.
        write out,
        ;
        /// Query and key heads.
        key_heads: usize,
        /// Value heads; a multiple of `key_heads`.
        value_heads: usize,
        /// Elements of a query or key head.
        key_dim: usize,
        /// Elements of a value head.
        value_dim: usize,
    }

    /// Norm, then gate: `out = rms_norm(x) * weight * silu(gate)`, over groups of `N = weight` columns.
    /// `out` may be the same view as `x`.
    GatedRmsNorm = "gated_rms_norm" {
        /// `[T, G * N]`.
        read x,
        /// `[T, G * N]`.
        read gate,
        /// `f32 [N]`.
        read weight,
        /// `[T, G * N]`.
        write out,
        ;
        /// Added to the mean square.
        eps: f32,
    }

    /// Output gate: `out = x * sigmoid(gate)`. `out` may be the same view as `x`.
    SigmoidGate = "sigmoid_gate" {
        /// `[T, N]`.
        read x,
        /// `[T, N]`.
        read gate,
        /// `[T, N]`.
        write out,
    }

    /// SwiGLU (Shazeer 2020): `out = silu(gate) * up`.
    SwiGlu = "swiglu" {
        /// `[T, N]`.
        read gate,
        /// `[T, N]`.
        read up,
        /// `[T, N]`.
        write out,
    }

    /// The last valid row: `out[0] = x[count - 1]`.
    LastRow = "last_row" {
        /// `[T, N]`.
        read x,
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `[1, N]`.
        write out,
    }

    /// Notes tokens as read: sets bit 31 of `counts[tokens[t]]`, for `t < count`.
    Observe = "observe" {
        /// `i32 [T, 1]`.
        read tokens,
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `u32 [1, V]`: bit 31: the token was read as prompt; bits 0 to 30: how often it was generated since `begin`.
        update counts,
    }

    /// Starts a reply: every token generated so far becomes prompt (bit 31 set, count zero).
    BeginReply = "begin_reply" {
        /// `u32 [1, V]`, as in [`Observe`].
        update counts,
    }

    /// Draws the next token; see `docs/sampling.md` for the exact definition.
    ///
    /// Penalties, then bias, then: the highest logit (lowest index among equals) where the temperature is 0; else
    /// the highest `logit / temperature + gumbel` among the tokens that top-k, top-p and min-p keep, the noise
    /// being Philox4x32-10 (Salmon et al. 2011) keyed by `seed` and counted by token and position. Where
    /// `forced >= 0` that token is taken instead. The token taken is counted in `counts`.
    Sample = "sample" {
        /// `f32 [1, V]`.
        read logits,
        /// `f32 [1, 8]`: temperature, top-k, top-p, min-p, repetition, presence, frequency, reserved.
        read params,
        /// `u32 [1, 2]`.
        read seed,
        /// `i32 [1, B]`: tokens with a bias; -1 where unused.
        read bias_tokens,
        /// `f32 [1, B]`.
        read bias_values,
        /// `u32 [1, 4]`.
        read cursor,
        /// `i32 [1, 1]`.
        read forced,
        /// `u32 [1, V]`, as in [`Observe`].
        update counts,
        /// `f32 [1, V]`: the logits after penalties, bias and temperature.
        write adjusted,
        /// `i32 [1, 1]`.
        write token,
    }

    /// Moves the position: `cursor[0] += count` (1 where `count` is absent).
    Advance = "advance" {
        /// `u32 [1, 1]`.
        maybe_read count,
        /// `u32 [1, 4]`.
        update cursor,
    }

    /// Fills with one 32-bit pattern.
    Fill = "fill" {
        /// A buffer of a 4-byte type.
        write out,
        ;
        /// The pattern.
        bits: u32,
    }

    /// Copies between views of one type and shape.
    Copy = "copy" {
        /// Read.
        read source,
        /// Written.
        write out,
    }
}

impl Op {
    /// Whether the op has a `count` field.
    pub const fn takes_count(&self) -> bool {
        matches!(
            self,
            Self::KvAppend(_)
                | Self::Attention(_)
                | Self::CausalConv(_)
                | Self::GatedDelta(_)
                | Self::LastRow(_)
                | Self::Observe(_)
                | Self::Advance(_)
        )
    }
}

/// Indices into the `params` operand of [`Sample`].
pub mod sampler_params {
    /// Divides the logits; 0 takes the highest logit.
    pub const TEMPERATURE: usize = 0;
    /// How many of the highest logits stay; 0 keeps all.
    pub const TOP_K: usize = 1;
    /// Probability mass that stays; 1 keeps all.
    pub const TOP_P: usize = 2;
    /// Smallest probability kept, as a share of the highest; 0 keeps all.
    pub const MIN_P: usize = 3;
    /// Repetition penalty over everything read or generated; 1 is none.
    pub const REPETITION: usize = 4;
    /// Subtracted once from tokens generated in this reply.
    pub const PRESENCE: usize = 5;
    /// Subtracted per occurrence from tokens generated in this reply.
    pub const FREQUENCY: usize = 6;
    /// Number of parameters.
    pub const LEN: usize = 8;
}

/// In [`Observe`]'s counts: set where the token was read as prompt.
pub const SEEN_AS_PROMPT: u32 = 1 << 31;
