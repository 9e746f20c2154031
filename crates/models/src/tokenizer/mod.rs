//! Text to tokens and back.
//!
//! Byte-level BPE over the `tokenizers` crate, from a GGUF file's metadata ([`Tokenizer::from_gguf`]) or from a
//! Hugging Face folder ([`Tokenizer::from_dir`]). Decoding is ours, byte by byte: a token may end in the middle
//! of a character, and streaming and constrained decoding need its true bytes.

mod from_dir;
mod from_gguf;
mod pre;
mod stand_in;
mod stream;
mod table;

use std::borrow::Cow;
use std::path::PathBuf;

use serde_json::{Map, Value};
use tokenizers::tokenizer::{Model, PreTokenizer};
use tokenizers::{AddedVocabulary, OffsetReferential, OffsetType};

pub use self::from_dir::TokenizerParts;
pub use self::stream::{Passed, StopMatcher, StreamDecoder};
pub use self::table::TokenKind;
use self::table::TokenTable;
use crate::error::ModelFileError;

/// A tokenizer could not be built or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] ModelFileError),
    /// The vocabulary is of a kind that is not read here.
    #[error("{file}: tokenizer model '{model}' is not supported; byte-level BPE is, called '{supported}' here", file = file.display())]
    UnsupportedModel {
        /// The file.
        file: PathBuf,
        /// The kind as the file names it.
        model: String,
        /// How this format names the supported kind.
        supported: &'static str,
    },
    /// A GGUF file names a pre-tokenizer that is not known. Guessing one would give wrong tokens silently.
    #[error("{file}: pre-tokenizer '{name}' (tokenizer.ggml.pre) is not known; known are {known}. Use the model's Hugging Face folder, whose tokenizer.json spells it out",
            file = file.display())]
    UnknownPreTokenizer {
        /// The file.
        file: PathBuf,
        /// The name.
        name: String,
        /// The names that are known.
        known: String,
    },
    /// A `tokenizer.json` uses a part that is not supported.
    #[error("{file}: {part} '{name}' is not supported; {supported}", file = file.display())]
    UnsupportedPart {
        /// The file.
        file: PathBuf,
        /// Which part: normalizer, pre_tokenizer, decoder, post_processor.
        part: &'static str,
        /// Its type.
        name: String,
        /// What is supported.
        supported: &'static str,
    },
    /// The vocabulary contradicts itself.
    #[error("{file}: {reason}", file = file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A text could not be split.
    #[error("the text cannot be tokenized: {reason}")]
    Encode {
        /// What the library says.
        reason: String,
    },
}

/// What [`Tokenizer::encode`] does about special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Whether to add the tokens that the model wants around a text, such as a beginning-of-text token.
    pub add_special: bool,
    /// Whether special tokens written in the text become these tokens. If not, `<|im_end|>` in a text is text:
    /// what a user typed cannot end a turn.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// For text from outside: special tokens are added around it, none are taken from it.
    pub const TEXT: Self = Self { add_special: true, parse_special: false };
    /// For the output of a chat template, which holds all special tokens that there should be.
    pub const TEMPLATE: Self = Self { add_special: false, parse_special: true };
    /// For a raw prompt by somebody who writes special tokens by hand.
    pub const PROMPT: Self = Self { add_special: true, parse_special: true };
}

/// A byte-level BPE tokenizer. Immutable; share it among threads.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens as `inner` has them, but leaving special tokens in the text alone.
    unparsed: AddedVocabulary,
    /// Ids that go before and behind a text where special tokens are added.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    table: TokenTable,
    bos: Option<u32>,
    eos: Vec<u32>,
    chat_template: Option<String>,
    variables: Map<String, Value>,
}

/// What the two readers gather.
struct Parts {
    inner: tokenizers::Tokenizer,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    table: TokenTable,
    bos: Option<u32>,
    eos: Vec<u32>,
    chat_template: Option<String>,
    variables: Map<String, Value>,
}

impl Tokenizer {
    fn from_parts(parts: Parts) -> Self {
        let Parts { inner, prefix, suffix, table, bos, mut eos, chat_template, variables } = parts;
        let mut unparsed = inner.get_added_vocabulary().clone();
        unparsed.set_encode_special_tokens(true);
        let mut seen = Vec::new();
        eos.retain(|id| {
            !seen.contains(id) && {
                seen.push(*id);
                true
            }
        });
        Self { inner, unparsed, prefix, suffix, table, bos, eos, chat_template, variables }
    }

    /// The ids of a text.
    ///
    /// Bytes that the vocabulary has no token for are left out, as the model's own tokenizer does (SmolLM2 lacks
    /// some that do not occur in UTF-8).
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] when the library gives up on the text.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        let failed =
            |error: tokenizers::Error| TokenizerError::Encode { reason: error.to_string() };
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_special {
            ids.extend_from_slice(&self.prefix);
        }
        let added =
            if options.parse_special { self.inner.get_added_vocabulary() } else { &self.unparsed };
        let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.inner.get_model();
        pieces.tokenize(|word| model.tokenize(word.get())).map_err(failed)?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        if options.add_special {
            ids.extend_from_slice(&self.suffix);
        }
        Ok(ids)
    }

    /// The text of ids, special tokens included. Bytes that are not UTF-8 become U+FFFD; ids that stand for
    /// nothing are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> =
            ids.iter().filter_map(|&id| self.token_bytes(id)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of ids without special tokens.
    pub fn decode_without_special(&self, ids: &[u32]) -> String {
        let kept: Vec<u32> = ids.iter().copied().filter(|&id| !self.is_special(id)).collect();
        self.decode(&kept)
    }

    /// The bytes that an id stands for: perhaps a part of a character only. `None` for ids that stand for nothing.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.table.bytes(id)
    }

    /// The text that an id stands for, with U+FFFD where its bytes are not UTF-8.
    pub fn token_text(&self, id: u32) -> Option<Cow<'_, str>> {
        self.token_bytes(id).map(String::from_utf8_lossy)
    }

    /// How an id takes part in text.
    pub fn token_kind(&self, id: u32) -> TokenKind {
        self.table.kind(id)
    }

    /// Whether an id is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.token_kind(id) == TokenKind::Special
    }

    /// The id of a special or added token by its text, such as `<|im_end|>`.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.unparsed.get_vocab().get(text).copied()
    }

    /// One more than the largest id. The model's output may be longer: rows are often padded.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// The beginning-of-text token, if the model has one. Whether [`encode`](Self::encode) adds it is another
    /// matter, which the file decides.
    pub const fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a generation. The first is the one that the file names first.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Whether the id ends a generation.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    /// The source of the model's chat template, if the file has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The variables that chat templates expect of the tokenizer: `bos_token`, `eos_token` and the like.
    pub const fn template_variables(&self) -> &Map<String, Value> {
        &self.variables
    }
}
