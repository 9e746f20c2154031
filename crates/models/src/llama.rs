//! The Llama family from a GGUF file.
//!
//! Names, shapes and metadata keys: the GGUF specification, section "Standardized key-value pairs" and the tensor
//! names of the `llama` architecture. GGUF stores query and key rows permuted so that rotary pairs are neighbours.

use std::path::Path;

use ampoule_plan::RopeStyle;

use crate::decoder::{DecoderShape, Mixer};
use crate::error::ModelFileError;
use crate::gguf::GgufFile;
use crate::source::{Matrix, Part, PartSource, RowSpan, WeightData, floats, matrix_dtype};
use crate::tensors::TensorSource;

/// Largest count that any metadata may claim of layers, heads or elements.
const LIMIT: u64 = 1 << 24;

/// Reads the shape from the metadata.
///
/// # Errors
/// If the architecture is not `llama`, or a key is missing or impossible.
pub fn shape(file: &GgufFile) -> Result<DecoderShape, ModelFileError> {
    let architecture = file.require_string("general.architecture")?;
    if architecture != "llama" {
        let reason =
            format!("architecture '{architecture}' is not supported; from GGUF files 'llama' is");
        return Err(bad(file, "general.architecture", reason));
    }
    let size = |key: &str| -> Result<usize, ModelFileError> {
        let value = file.require_unsigned(key)?;
        if value == 0 || value > LIMIT {
            return Err(bad(file, key, format!("{value} is out of range")));
        }
        Ok(value as usize)
    };
    let optional = |key: &str| file.unsigned(key)?.map(|_| size(key)).transpose();
    for key in ["llama.expert_count", "llama.attention.sliding_window"] {
        if file.unsigned(key)?.is_some_and(|n| n > 0) {
            return Err(bad(
                file,
                key,
                "mixtures of experts and sliding windows are not supported".to_owned(),
            ));
        }
    }
    let hidden = size("llama.embedding_length")?;
    let heads = size("llama.attention.head_count")?;
    let head_dim = optional("llama.attention.key_length")?.unwrap_or(hidden / heads);
    let rotary = optional("llama.rope.dimension_count")?.unwrap_or(head_dim);
    let eps = file.require_float("llama.attention.layer_norm_rms_epsilon")?;
    let vocabulary = file.tensor("token_embd.weight")?.shape.first().copied().unwrap_or(0);
    Ok(DecoderShape {
        name: file.string("general.name")?.unwrap_or("llama").to_owned(),
        vocabulary,
        hidden,
        intermediate: size("llama.feed_forward_length")?,
        mixers: vec![Mixer::Attention; size("llama.block_count")?],
        heads,
        kv_heads: optional("llama.attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        qk_norm: false,
        output_gate: false,
        norm_centered: false,
        norm_eps: eps as f32,
        frequencies: frequencies(file, rotary)?,
        rope_style: RopeStyle::Interleaved,
        delta: None,
        tied: file.find("output.weight").is_none(),
        context: size("llama.context_length")?,
    })
}

/// `base^(-2 i / rotary)`, divided by the factors of `rope_freqs.weight` or by the linear scale, where present.
fn frequencies(file: &GgufFile, rotary: usize) -> Result<Vec<f32>, ModelFileError> {
    let base = file.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    if !rotary.is_multiple_of(2) || base.is_nan() || base <= 0.0 {
        return Err(bad(
            file,
            "llama.rope.dimension_count",
            format!("{rotary} elements with base {base} cannot rotate"),
        ));
    }
    let scale = match file.string("llama.rope.scaling.type")? {
        None | Some("none") => 1.0,
        Some("linear") => file.require_float("llama.rope.scaling.factor")?,
        Some(other) => {
            let reason = format!("'{other}' is not supported; 'none' and 'linear' are");
            return Err(bad(file, "llama.rope.scaling.type", reason));
        }
    };
    let factors = match file.find("rope_freqs.weight") {
        Some(_) => floats(file, "rope_freqs.weight", rotary / 2)?,
        None => vec![1.0; rotary / 2],
    };
    let frequency =
        |i: usize| base.powf(-2.0 * i as f64 / rotary as f64) / scale / f64::from(factors[i]);
    Ok((0..rotary / 2).map(|i| frequency(i) as f32).collect())
}

fn bad(file: &GgufFile, key: &str, reason: String) -> ModelFileError {
    ModelFileError::KeyValue { file: file.path().to_owned(), key: key.to_owned(), reason }
}

/// Finds the parts in a GGUF file.
pub struct LlamaParts<'a>(pub &'a GgufFile);

impl LlamaParts<'_> {
    fn name(part: Part, layer: usize) -> String {
        let block = |name: &str| format!("blk.{layer}.{name}.weight");
        match part {
            Part::Embedding => "token_embd.weight".to_owned(),
            Part::FinalNorm => "output_norm.weight".to_owned(),
            Part::Head => "output.weight".to_owned(),
            Part::InputNorm => block("attn_norm"),
            Part::PostNorm => block("ffn_norm"),
            Part::Query => block("attn_q"),
            Part::Key => block("attn_k"),
            Part::Value => block("attn_v"),
            Part::AttentionOut => block("attn_output"),
            Part::MlpGate => block("ffn_gate"),
            Part::MlpUp => block("ffn_up"),
            Part::MlpDown => block("ffn_down"),
            other => unreachable!("the llama family has no {other:?}"),
        }
    }
}

impl PartSource for LlamaParts<'_> {
    fn matrix(
        &self,
        part: Part,
        layer: usize,
        shape: [usize; 2],
    ) -> Result<Matrix, ModelFileError> {
        let tensor = Self::name(part, layer);
        let dtype = matrix_dtype(self.0, &tensor, shape)?;
        Ok(Matrix {
            dtype,
            rows: shape[0],
            data: WeightData::Rows(vec![RowSpan { tensor, rows: 0..shape[0] }]),
        })
    }

    fn vector(&self, part: Part, layer: usize, len: usize) -> Result<WeightData, ModelFileError> {
        Ok(WeightData::Floats(floats(self.0, &Self::name(part, layer), len)?))
    }

    fn bias(
        &self,
        part: Part,
        layer: usize,
        len: usize,
    ) -> Result<Option<WeightData>, ModelFileError> {
        let name = Self::name(part, layer).replace(".weight", ".bias");
        self.0.find(&name).map(|_| Ok(WeightData::Floats(floats(self.0, &name, len)?))).transpose()
    }
}

/// Whether a path looks like a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}
