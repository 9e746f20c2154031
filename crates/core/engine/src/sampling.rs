//! Sampling parameters, and the changes of them that a history records.

use ampoule_plan::sampler_params as p;
use serde::{Deserialize, Serialize};

use crate::EngineError;

/// How tokens are drawn; see `docs/sampling.md` for the exact definition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the so many likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the likeliest tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens read or generated; 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens generated in this reply.
    pub presence_penalty: f32,
    /// Subtracted from them once per occurrence.
    pub frequency_penalty: f32,
    /// Key of the random stream.
    pub seed: u64,
    /// Added to the logits of these tokens; at most 512 entries.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    /// Greedy: temperature 0, no filter, no penalty.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Checks every parameter's range.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] names the first parameter out of range and what is allowed.
    pub fn check(&self, vocabulary: usize, bias_entries: usize) -> Result<(), EngineError> {
        let within = |name, value: f32, ok: bool, range| {
            if ok && value.is_finite() {
                Ok(())
            } else {
                Err(EngineError::Sampling { name, value: value.to_string(), range })
            }
        };
        let (t, r) = (self.temperature, self.repetition_penalty);
        within(
            "temperature",
            t,
            t == 0.0 || (1e-3..=100.0).contains(&t),
            "0, or from 0.001 to 100",
        )?;
        within("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, at most 1")?;
        within("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1")?;
        within("repetition_penalty", r, r > 0.0 && r <= 100.0, "above 0, at most 100")?;
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            within(name, value, (-100.0..=100.0).contains(&value), "from -100 to 100")?;
        }
        if self.logit_bias.len() > bias_entries {
            let value = format!("{} entries", self.logit_bias.len());
            return Err(EngineError::Sampling {
                name: "logit_bias",
                value,
                range: "at most 512 entries",
            });
        }
        for &(token, value) in &self.logit_bias {
            if token as usize >= vocabulary {
                return Err(EngineError::TokenRange { token, vocabulary });
            }
            within("logit_bias", value, (-1e4..=1e4).contains(&value), "from -10000 to 10000")?;
        }
        Ok(())
    }

    /// The settings that the buffers of the op `sample` hold, but for the seed; `None` if no settings could.
    pub(crate) fn from_buffer(
        values: &[f32],
        bias: impl Iterator<Item = (i32, f32)>,
    ) -> Option<Self> {
        let top_k = *values.get(p::TOP_K)?;
        if values.len() != p::LEN || !(0.0..=16_777_216.0).contains(&top_k) || top_k.fract() != 0.0
        {
            return None;
        }
        let bias = bias
            .filter(|(token, _)| *token >= 0)
            .map(|(token, value)| (token.cast_unsigned(), value));
        Some(Self {
            temperature: values[p::TEMPERATURE],
            top_k: top_k as u32,
            top_p: values[p::TOP_P],
            min_p: values[p::MIN_P],
            repetition_penalty: values[p::REPETITION],
            presence_penalty: values[p::PRESENCE],
            frequency_penalty: values[p::FREQUENCY],
            seed: 0,
            logit_bias: bias.collect(),
        })
    }

    /// The `params` buffer of the op `sample`, for a vocabulary of so many tokens.
    pub fn buffer(&self, vocabulary: usize) -> [f32; p::LEN] {
        let mut out = [0.0; p::LEN];
        out[p::TEMPERATURE] = self.temperature;
        // Beyond the vocabulary the filter keeps all; f32 holds every smaller count exactly.
        out[p::TOP_K] = if self.top_k as usize >= vocabulary { 0.0 } else { self.top_k as f32 };
        out[p::TOP_P] = self.top_p;
        out[p::MIN_P] = self.min_p;
        out[p::REPETITION] = self.repetition_penalty;
        out[p::PRESENCE] = self.presence_penalty;
        out[p::FREQUENCY] = self.frequency_penalty;
        out
    }
}

/// A change of sampler state that no token caused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Event {
    Configure(Box<SamplingParams>),
    Reseed(u64),
    Begin,
}

/// An event, and the position at which it happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stamped {
    pub(crate) position: u32,
    pub(crate) event: Event,
}
