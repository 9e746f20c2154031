//! Opening a model by path or name, and building its plans.

use std::path::Path;
use std::sync::Arc;

use ampoule_plan::{DType, Sealed};

use crate::decoder::{BuildError, BuildOptions, Built, DecoderShape, build};
use crate::error::ModelFileError;
use crate::gguf::GgufFile;
use crate::llama::{self, LlamaParts};
use crate::qwen35::{Qwen35, Qwen35Parts};
use crate::random::{self, RandomParts};
use crate::tensors::TensorSource;
use crate::tokenizer::{Tokenizer, TokenizerError, TokenizerParts};
use crate::weights::ModelWeights;
use crate::weights_dir::{WeightsDir, WeightsParts};

/// A model cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file is missing or wrong.
    #[error(transparent)]
    File(#[from] ModelFileError),
    /// The tokenizer cannot be made.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// No built-in shape has the name.
    #[error("there is no model 'random:{name}'; there are {}", random::NAMES.map(|n| format!("random:{n}")).join(", "))]
    UnknownRandom {
        /// The name.
        name: String,
    },
    /// The built-in model was left out of this program.
    #[error(
        "this program was built without the model '{NANO}' (feature 'nano'); build it with default features, or give \
         the folder assets/ampoule-nano, another Hugging Face folder, or a .gguf file"
    )]
    NotBuiltIn,
    /// The path leads nowhere.
    #[error(
        "{path}: no such file or folder; give '{NANO}', a .gguf file, a Hugging Face folder, or random:NAME"
    )]
    NotFound {
        /// The path.
        path: String,
    },
}

/// The name of the model that is part of the program (feature `nano`).
pub const NANO: &str = "ampoule-nano";

/// Opens the model that is part of the program.
#[cfg(feature = "nano")]
fn built_in() -> Result<ModelFiles, OpenError> {
    let weights = WeightsParts {
        config: ampoule_nano::CONFIG.to_vec(),
        index: None,
        files: vec![("model.safetensors".to_owned(), ampoule_nano::WEIGHTS.into())],
    };
    let tokenizer = TokenizerParts {
        tokenizer: ampoule_nano::TOKENIZER.to_vec(),
        tokenizer_config: Some(ampoule_nano::TOKENIZER_CONFIG.to_vec()),
        generation_config: Some(ampoule_nano::GENERATION_CONFIG.to_vec()),
        chat_template: None,
    };
    ModelFiles::from_parts(NANO, weights, Some(&tokenizer))
}

#[cfg(not(feature = "nano"))]
fn built_in() -> Result<ModelFiles, OpenError> {
    Err(OpenError::NotBuiltIn)
}

enum Weights {
    Gguf(Arc<GgufFile>),
    Folder(Arc<WeightsDir>, Box<Qwen35>),
    Random { seed: u64 },
}

/// A model's files: opened and checked, nothing of them copied.
pub struct ModelFiles {
    weights: Weights,
    shape: DecoderShape,
    tokenizer: Option<Arc<Tokenizer>>,
}

/// A model ready for a backend.
pub struct BuiltModel {
    /// The plans.
    pub sealed: Arc<Sealed>,
    /// The weights.
    pub weights: ModelWeights,
    /// BLAKE3 of the weights' content and the decoder's shape: the weight component of a fingerprint.
    pub weights_digest: [u8; 32],
    /// BLAKE3 of the plans as they would be for one fixed set of buckets: the plan component of a fingerprint. It
    /// depends on the ops and their types, but on neither context length nor buckets, which change no result.
    pub plan_digest: [u8; 32],
}

impl ModelFiles {
    /// Opens [`NANO`], `random:NAME`, `random:NAME@SEED`, a `.gguf` file or a Hugging Face folder. A name goes before a
    /// folder of the same name, which is opened as `./ampoule-nano`.
    ///
    /// # Errors
    /// If nothing is there, or what is there cannot be understood; the message names file and tensor or key.
    pub fn open(reference: &str) -> Result<Self, OpenError> {
        if let Some(name) = reference.strip_prefix("random:") {
            let unknown = || OpenError::UnknownRandom { name: name.to_owned() };
            let (base, seed) = match name.split_once('@') {
                Some((base, seed)) => (base, seed.parse().map_err(|_| unknown())?),
                None => (name, 0),
            };
            let shape = random::shape(base).ok_or_else(unknown)?;
            return Ok(Self { weights: Weights::Random { seed }, shape, tokenizer: None });
        }
        if reference == NANO {
            return built_in();
        }
        let path = Path::new(reference);
        if path.is_dir() {
            let folder = WeightsDir::open(path)?;
            let tokenizer = path
                .join("tokenizer.json")
                .exists()
                .then(|| Tokenizer::from_dir(path))
                .transpose()?;
            return Self::folder(folder, tokenizer);
        }
        if !path.exists() {
            return Err(OpenError::NotFound { path: reference.to_owned() });
        }
        let file = GgufFile::open(path)?;
        let shape = llama::shape(&file)?;
        let tokenizer = Some(Arc::new(Tokenizer::from_gguf(&file)?));
        Ok(Self { weights: Weights::Gguf(Arc::new(file)), shape, tokenizer })
    }

    /// A Hugging Face folder whose files are in memory already; `name` stands for the folder, and the model is called by
    /// it.
    ///
    /// # Errors
    /// As [`open`](Self::open), without the system's errors.
    pub fn from_parts(
        name: &str,
        weights: WeightsParts,
        tokenizer: Option<&TokenizerParts>,
    ) -> Result<Self, OpenError> {
        let folder = WeightsDir::from_parts(name, weights)?;
        let tokenizer = tokenizer.map(|t| Tokenizer::from_dir_parts(name, t)).transpose()?;
        Self::folder(folder, tokenizer)
    }

    fn folder(folder: WeightsDir, tokenizer: Option<Tokenizer>) -> Result<Self, OpenError> {
        let model = Qwen35::open(&folder)?;
        let shape = model.shape.clone();
        let weights = Weights::Folder(Arc::new(folder), Box::new(model));
        Ok(Self { weights, shape, tokenizer: tokenizer.map(Arc::new) })
    }

    /// The decoder's shape.
    pub const fn shape(&self) -> &DecoderShape {
        &self.shape
    }

    /// Whether the weights are quantised blocks or halves from a GGUF file.
    pub const fn is_gguf(&self) -> bool {
        matches!(self.weights, Weights::Gguf(_))
    }

    /// The tokenizer, if the model has one.
    pub const fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// Builds and seals the plans. Weights are read later, by the backend.
    ///
    /// # Errors
    /// If a tensor is missing or wrong, or the options fit no plan.
    pub fn build(&self, options: &BuildOptions) -> Result<BuiltModel, BuildError> {
        let (sealed, data) = self.plans(&self.shape, options)?;
        let canonical = BuildOptions {
            context: 1024,
            prefill: vec![16],
            score: 16,
            decode_contexts: Vec::new(),
            precision: options.precision,
        };
        // Neither a folder's name nor the longest context changes a result.
        let nameless = DecoderShape { name: "model".to_owned(), context: 0, ..self.shape.clone() };
        let plan_digest = self.plans(&nameless, &canonical)?.0.digest();
        let content = match &self.weights {
            Weights::Gguf(file) => file.digest().to_vec(),
            Weights::Folder(folder, _) => folder.digest().to_vec(),
            Weights::Random { seed } => format!("ampoule.random.v1 {seed}").into_bytes(),
        };
        // The shape holds what the configuration adds to the tensors, such as the rotary frequencies.
        let mut hasher = blake3::Hasher::new();
        hasher.update(&content).update(format!("{nameless:?}").as_bytes());
        let weights_digest = *hasher.finalize().as_bytes();
        let tensors: Option<Arc<dyn TensorSource + Send + Sync>> = match &self.weights {
            Weights::Gguf(file) => Some(Arc::clone(file) as _),
            Weights::Folder(folder, _) => Some(Arc::clone(folder) as _),
            Weights::Random { .. } => None,
        };
        let weights = ModelWeights::new(sealed.model().buffers.clone(), data, tensors);
        Ok(BuiltModel { sealed: Arc::new(sealed), weights, weights_digest, plan_digest })
    }

    fn plans(&self, shape: &DecoderShape, options: &BuildOptions) -> Result<Built, BuildError> {
        match &self.weights {
            Weights::Gguf(file) => build(shape, &LlamaParts(file), options),
            Weights::Folder(folder, model) => build(shape, &Qwen35Parts { model, folder }, options),
            Weights::Random { seed } => {
                build(shape, &RandomParts { seed: *seed, dtype: DType::BF16 }, options)
            }
        }
    }
}
