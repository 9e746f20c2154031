//! Named shapes with random weights, the same bits everywhere, for benchmarks and tests.

use ampoule_plan::{DType, RandomFill, RopeStyle};

use crate::decoder::{DecoderShape, DeltaShape, Mixer};
use crate::error::ModelFileError;
use crate::source::{Matrix, Part, PartSource, WeightData};

/// Names that [`shape`] knows, without the `random:` before them.
pub const NAMES: [&str; 4] = ["qwen3.5-9b", "qwen3.5-4b", "qwen3.5-0.8b", "qwen3.5-tiny"];

/// The shape of that name.
///
/// Sizes of the 9B, 4B and 0.8B shapes are those of the published Qwen3.5 configurations; `tiny` is ours.
pub fn shape(name: &str) -> Option<DecoderShape> {
    let big = DeltaShape { key_heads: 16, value_heads: 32, key_dim: 128, value_dim: 128, taps: 4 };
    let (hidden, intermediate, layers, heads, kv_heads, delta, tied) = match name {
        "qwen3.5-9b" => (4096, 12_288, 32, 16, 4, big, false),
        "qwen3.5-4b" => (2560, 9216, 32, 16, 4, big, true),
        "qwen3.5-0.8b" => (1024, 3584, 24, 8, 2, DeltaShape { value_heads: 16, ..big }, true),
        "qwen3.5-tiny" => {
            let delta =
                DeltaShape { key_heads: 2, value_heads: 4, key_dim: 16, value_dim: 16, taps: 4 };
            (64, 160, 4, 4, 2, delta, true)
        }
        _ => return None,
    };
    let tiny = name == "qwen3.5-tiny";
    let (head_dim, vocabulary) = if tiny { (32, 512) } else { (256, 248_320) };
    let rotary = head_dim / 4;
    let theta = 1e7_f32;
    Some(DecoderShape {
        name: format!("random:{name}"),
        vocabulary,
        hidden,
        intermediate,
        mixers: (1..=layers)
            .map(|i| if i % 4 == 0 { Mixer::Attention } else { Mixer::GatedDelta })
            .collect(),
        heads,
        kv_heads,
        head_dim,
        qk_norm: true,
        output_gate: true,
        norm_centered: true,
        norm_eps: 1e-6,
        frequencies: (0..rotary / 2)
            .map(|i| 1.0 / theta.powf(2.0 * i as f32 / rotary as f32))
            .collect(),
        rope_style: RopeStyle::Half,
        delta: Some(delta),
        tied,
        context: 32_768,
    })
}

/// Random contents for every part.
pub struct RandomParts {
    /// Seed of all contents.
    pub seed: u64,
    /// Element type of the matrices.
    pub dtype: DType,
}

impl RandomParts {
    fn fill(&self, centre: f32, half_width: f32) -> WeightData {
        WeightData::Random(RandomFill { seed: self.seed, centre, half_width })
    }
}

impl PartSource for RandomParts {
    fn matrix(
        &self,
        part: Part,
        _: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Matrix, ModelFileError> {
        // Outputs of unit variance for inputs of unit variance: half_width^2 / 3 = 1 / cols. The embedding feeds a
        // residual stream, not a product.
        let half_width = if part == Part::Embedding { 0.5 } else { (3.0 / cols as f32).sqrt() };
        Ok(Matrix { dtype: self.dtype, rows, data: self.fill(0.0, half_width) })
    }

    fn vector(&self, part: Part, _: usize, _: usize) -> Result<WeightData, ModelFileError> {
        Ok(match part {
            Part::Convolution => self.fill(0.0, 0.8),
            Part::DecayLog => self.fill(0.0, 1.5),
            Part::DecayBias => self.fill(-3.0, 2.0),
            Part::DeltaNorm => self.fill(1.0, 0.2),
            _ => self.fill(0.0, 0.2),
        })
    }

    fn bias(&self, _: Part, _: usize, _: usize) -> Result<Option<WeightData>, ModelFileError> {
        Ok(None)
    }
}
