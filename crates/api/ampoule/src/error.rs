//! Everything that can go wrong behind the public API.

use std::path::PathBuf;

/// A device's name that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown device '{name}'; there are auto, cpu, cuda and reference")]
pub struct UnknownDevice {
    /// The name.
    pub name: String,
}

/// An operation of the public API failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model's files cannot be opened.
    #[error(transparent)]
    Open(#[from] ampoule_models::model::OpenError),
    /// The model's plans cannot be built.
    #[error(transparent)]
    Build(#[from] ampoule_models::decoder::BuildError),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] ampoule_engine::EngineError),
    /// A capsule file is damaged or does not fit.
    #[error("{path}: {source}", path = path.display())]
    CapsuleFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ampoule_engine::EngineError>,
    },
    /// The path of a capsule leads to a folder, a device or a pipe.
    #[error("{path}: not a regular file, but a folder, a device or a pipe; give the path of a file", path = path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A text cannot be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] ampoule_models::tokenizer::TokenizerError),
    /// The chat template failed or refused.
    #[error(transparent)]
    Chat(#[from] ampoule_models::chat::ChatError),
    /// The model has no tokenizer.
    #[error("this model has no tokenizer, so text cannot be read; give token ids instead")]
    NoTokenizer,
    /// A constraint leaves no token to draw.
    #[error("no token is allowed after position {position}: the constraint cannot be met")]
    NothingAllowed {
        /// Where the reply stands.
        position: u32,
    },
    /// The model has no chat template.
    #[error("this model has no chat template; use plain prompts instead")]
    NoChatTemplate,
    /// The device asked for is not there or cannot be used.
    #[error(transparent)]
    Device(#[from] ampoule_backend::BackendError),
    /// Something about a store of capsules went wrong.
    #[error(transparent)]
    Store(Box<crate::StoreError>),
    /// A cache of capsules refused.
    #[error(transparent)]
    Cache(#[from] crate::CacheError),
    /// The machine has not the memory for it.
    #[error(
        "{slots} slots of {context} tokens and the weights need {} MiB, and {} MiB of memory are free; ask for fewer \
         slots, a smaller context or a smaller model",
        wanted >> 20,
        available >> 20
    )]
    Memory {
        /// Slots asked for.
        slots: usize,
        /// Tokens a slot holds.
        context: usize,
        /// Bytes needed.
        wanted: u64,
        /// Bytes free.
        available: u64,
    },
    /// A file cannot be read or written.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
}
