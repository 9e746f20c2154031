//! The Qwen3.5 family from a Hugging Face folder: `Qwen3_5ForCausalLM`, and the text half of
//! `Qwen3_5ForConditionalGeneration`.
//!
//! Facts (names, shapes, defaults, precedence of keys): Hugging Face transformers 5.17, `models/qwen3_5`. Tensors of
//! the vision tower are ignored and `mtp.*` tensors set aside.

use std::path::Path;

use ampoule_plan::RopeStyle;
use serde_json::Value;

use crate::decoder::{DecoderShape, DeltaShape, Mixer};
use crate::error::ModelFileError;
use crate::source::{Matrix, Part, PartSource, RowSpan, WeightData, floats, matrix_dtype};
use crate::tensors::TensorSource;
use crate::weights_dir::WeightsDir;

const LIMIT: u64 = 1 << 24;

/// The text part of a configuration.
struct Config<'a> {
    path: &'a Path,
    text: &'a Value,
    root: &'a Value,
}

impl Config<'_> {
    fn bad(&self, key: &str, reason: impl Into<String>) -> ModelFileError {
        ModelFileError::KeyValue {
            file: self.path.join("config.json"),
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    /// The key's value; `null` counts as absent.
    fn key(&self, key: &str) -> Option<&Value> {
        self.text.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str, default: usize) -> Result<usize, ModelFileError> {
        let Some(value) = self.key(key) else { return Ok(default) };
        match value.as_u64() {
            Some(n) if (1..=LIMIT).contains(&n) => Ok(n as usize),
            _ => {
                Err(self.bad(key, format!("must be a whole number from 1 to {LIMIT}, not {value}")))
            }
        }
    }

    fn number(
        &self,
        key: &str,
        value: Option<&Value>,
        default: f64,
    ) -> Result<f64, ModelFileError> {
        let Some(value) = value else { return Ok(default) };
        let number = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        number.ok_or_else(|| self.bad(key, format!("must be a positive number, not {value}")))
    }

    fn flag(&self, root: &Value, key: &str, default: bool) -> Result<bool, ModelFileError> {
        let Some(value) = root.get(key).filter(|v| !v.is_null()) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.bad(key, format!("must be true or false, not {value}")))
    }

    fn mixers(&self) -> Result<Vec<Mixer>, ModelFileError> {
        let layers = self.size("num_hidden_layers", 32)?;
        if layers > 1024 {
            return Err(self
                .bad("num_hidden_layers", format!("{layers} layers are more than anything real")));
        }
        let Some(types) = self.key("layer_types") else {
            let interval = self.size("full_attention_interval", 4)?;
            let mixer = |i: usize| {
                if (i + 1).is_multiple_of(interval) { Mixer::Attention } else { Mixer::GatedDelta }
            };
            return Ok((0..layers).map(mixer).collect());
        };
        let list = types.as_array().ok_or_else(|| self.bad("layer_types", "must be a list"))?;
        if list.len() != layers {
            let reason = format!("lists {} layers, but num_hidden_layers is {layers}", list.len());
            return Err(self.bad("layer_types", reason));
        }
        let mixer = |value: &Value| match value.as_str() {
            Some("linear_attention") => Ok(Mixer::GatedDelta),
            Some("full_attention") => Ok(Mixer::Attention),
            _ => Err(self.bad(
                "layer_types",
                format!("{value} is not supported; linear_attention and full_attention are"),
            )),
        };
        list.iter().map(mixer).collect()
    }

    /// `theta^(-2 i / rotary)` over the rotating part of a head.
    fn frequencies(&self, head_dim: usize) -> Result<Vec<f32>, ModelFileError> {
        let nested =
            self.key("rope_scaling").filter(|v| v.as_object().is_some_and(|o| !o.is_empty()));
        let nested = nested.or_else(|| self.key("rope_parameters"));
        let inner = |key: &str| nested.and_then(|n| n.get(key)).filter(|v| !v.is_null());
        let kind = inner("rope_type").or_else(|| inner("type"));
        if kind.is_some_and(|k| k.as_str() != Some("default")) {
            return Err(self.bad("rope_parameters", "only rope_type 'default' is supported"));
        }
        let find = |key: &str| inner(key).or_else(|| self.key(key));
        let theta = self.number("rope_theta", find("rope_theta"), 10_000.0)?;
        let factor = self.number("partial_rotary_factor", find("partial_rotary_factor"), 0.25)?;
        let rotary = (head_dim as f64 * factor) as usize;
        if rotary < 2 || rotary > head_dim || !rotary.is_multiple_of(2) {
            let reason = format!("rotates {rotary} elements of a head of {head_dim}");
            return Err(self.bad("partial_rotary_factor", reason));
        }
        // In f32, as the reference computes it.
        Ok((0..rotary / 2)
            .map(|i| 1.0 / (theta as f32).powf(2.0 * i as f32 / rotary as f32))
            .collect())
    }
}

/// A Qwen3.5 folder, understood.
pub struct Qwen35 {
    /// The decoder's shape.
    pub shape: DecoderShape,
    prefix: &'static str,
    biased: bool,
}

impl Qwen35 {
    /// Reads the configuration and finds the weights' prefix.
    ///
    /// # Errors
    /// If the architecture is another, or a key is impossible; the message names file and key.
    pub fn open(folder: &WeightsDir) -> Result<Self, ModelFileError> {
        let root = folder.config();
        let text = root.get("text_config").filter(|v| v.is_object()).unwrap_or(root);
        let config = Config { path: folder.path(), text, root };
        let architecture = root.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let kind = root.get("model_type").and_then(Value::as_str);
        let known = match architecture {
            Some(a) => ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"].contains(&a),
            None => kind.is_some_and(|k| ["qwen3_5", "qwen3_5_text"].contains(&k)),
        };
        if !known {
            let found = architecture.or(kind).unwrap_or("nothing");
            let reason = format!(
                "'{found}' is not supported; from Hugging Face folders Qwen3_5ForCausalLM and \
                 Qwen3_5ForConditionalGeneration are"
            );
            return Err(config.bad("architectures", reason));
        }
        let prefixes = ["model.language_model.", "model.", "language_model.model."];
        let prefix = prefixes
            .into_iter()
            .find(|p| folder.find(&format!("{p}embed_tokens.weight")).is_some());
        let shape = Self::shape(&config, folder)?;
        let biased = config.flag(text, "attention_bias", false)?;
        Ok(Self { shape, prefix: prefix.unwrap_or("model."), biased })
    }

    fn shape(config: &Config<'_>, folder: &WeightsDir) -> Result<DecoderShape, ModelFileError> {
        let text = config.text;
        if config.key("hidden_act").is_some_and(|a| a.as_str() != Some("silu")) {
            return Err(config.bad("hidden_act", "only 'silu' is supported"));
        }
        if !config.flag(text, "attn_output_gate", true)? {
            return Err(
                config.bad("attn_output_gate", "attention without an output gate is not supported")
            );
        }
        let hidden = config.size("hidden_size", 4096)?;
        let heads = config.size("num_attention_heads", 16)?;
        let explicit_null = text.get("head_dim").is_some_and(Value::is_null);
        let head_dim = if explicit_null { hidden / heads } else { config.size("head_dim", 256)? };
        let eps = config.number("rms_norm_eps", config.key("rms_norm_eps"), 1e-6)?;
        // The file's own head wins over the flag, as in the reference.
        let tied = config.flag(config.root, "tie_word_embeddings", false)?
            && folder.find("lm_head.weight").is_none();
        let name = folder
            .path()
            .file_name()
            .map_or_else(|| "qwen3.5".into(), |n| n.to_string_lossy().into_owned());
        Ok(DecoderShape {
            name,
            vocabulary: config.size("vocab_size", 248_320)?,
            hidden,
            intermediate: config.size("intermediate_size", 12_288)?,
            mixers: config.mixers()?,
            heads,
            kv_heads: config.size("num_key_value_heads", 4)?,
            head_dim,
            qk_norm: true,
            output_gate: true,
            norm_centered: true,
            norm_eps: eps as f32,
            frequencies: config.frequencies(head_dim)?,
            rope_style: RopeStyle::Half,
            delta: Some(DeltaShape {
                key_heads: config.size("linear_num_key_heads", 16)?,
                value_heads: config.size("linear_num_value_heads", 32)?,
                key_dim: config.size("linear_key_head_dim", 128)?,
                value_dim: config.size("linear_value_head_dim", 128)?,
                taps: config.size("linear_conv_kernel_dim", 4)?,
            }),
            tied,
            context: config.size("max_position_embeddings", 32_768)?,
        })
    }

    fn name(&self, part: Part, layer: usize) -> String {
        let p = self.prefix;
        let block = |name: &str| format!("{p}layers.{layer}.{name}");
        match part {
            Part::Embedding => format!("{p}embed_tokens.weight"),
            Part::FinalNorm => format!("{p}norm.weight"),
            Part::Head => "lm_head.weight".to_owned(),
            Part::InputNorm => block("input_layernorm.weight"),
            Part::PostNorm => block("post_attention_layernorm.weight"),
            Part::Query | Part::OutputGate => block("self_attn.q_proj.weight"),
            Part::Key => block("self_attn.k_proj.weight"),
            Part::Value => block("self_attn.v_proj.weight"),
            Part::AttentionOut => block("self_attn.o_proj.weight"),
            Part::QueryNorm => block("self_attn.q_norm.weight"),
            Part::KeyNorm => block("self_attn.k_norm.weight"),
            Part::DeltaQkv => block("linear_attn.in_proj_qkv.weight"),
            Part::DeltaGate => block("linear_attn.in_proj_z.weight"),
            Part::DeltaBeta => block("linear_attn.in_proj_b.weight"),
            Part::DeltaDecay => block("linear_attn.in_proj_a.weight"),
            Part::Convolution => block("linear_attn.conv1d.weight"),
            Part::DecayLog => block("linear_attn.A_log"),
            Part::DecayBias => block("linear_attn.dt_bias"),
            Part::DeltaNorm => block("linear_attn.norm.weight"),
            Part::DeltaOut => block("linear_attn.out_proj.weight"),
            Part::MlpGate => block("mlp.gate_proj.weight"),
            Part::MlpUp => block("mlp.up_proj.weight"),
            Part::MlpDown => block("mlp.down_proj.weight"),
        }
    }

    /// Queries and gates are stored head by head, a head's query before its gate; here all queries come first.
    fn half_of_heads(&self, part: Part) -> Vec<std::ops::Range<usize>> {
        let (heads, d) = (self.shape.heads, self.shape.head_dim);
        let offset = if part == Part::OutputGate { d } else { 0 };
        (0..heads).map(|h| h * 2 * d + offset..h * 2 * d + offset + d).collect()
    }
}

/// Finds the parts in a folder.
pub struct Qwen35Parts<'a> {
    /// The folder, understood.
    pub model: &'a Qwen35,
    /// The folder.
    pub folder: &'a WeightsDir,
}

impl PartSource for Qwen35Parts<'_> {
    fn matrix(
        &self,
        part: Part,
        layer: usize,
        shape: [usize; 2],
    ) -> Result<Matrix, ModelFileError> {
        let tensor = self.model.name(part, layer);
        let interleaved = matches!(part, Part::Query | Part::OutputGate);
        let stored = if interleaved { [2 * shape[0], shape[1]] } else { shape };
        let dtype = matrix_dtype(self.folder, &tensor, stored)?;
        let rows = if interleaved {
            self.model.half_of_heads(part)
        } else {
            std::iter::once(0..shape[0]).collect()
        };
        let spans = rows.into_iter().map(|rows| RowSpan { tensor: tensor.clone(), rows }).collect();
        Ok(Matrix { dtype, rows: shape[0], data: WeightData::Rows(spans) })
    }

    fn vector(&self, part: Part, layer: usize, len: usize) -> Result<WeightData, ModelFileError> {
        Ok(WeightData::Floats(floats(self.folder, &self.model.name(part, layer), len)?))
    }

    fn bias(
        &self,
        part: Part,
        layer: usize,
        len: usize,
    ) -> Result<Option<WeightData>, ModelFileError> {
        let attention = matches!(
            part,
            Part::Query | Part::OutputGate | Part::Key | Part::Value | Part::AttentionOut
        );
        if !self.model.biased || !attention {
            return Ok(None);
        }
        let name = self.model.name(part, layer).replace(".weight", ".bias");
        if !matches!(part, Part::Query | Part::OutputGate) {
            return Ok(Some(WeightData::Floats(floats(self.folder, &name, len)?)));
        }
        let all = floats(self.folder, &name, 2 * len)?;
        let half = self
            .model
            .half_of_heads(part)
            .into_iter()
            .flat_map(|rows| all[rows].to_vec())
            .collect();
        Ok(Some(WeightData::Floats(half)))
    }
}
