//! The tokenizer in a GGUF file's metadata.

use std::collections::HashSet;

use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use super::table::{TokenKind, TokenTable};
use super::{Parts, Tokenizer, TokenizerError, pre};
use crate::error::{ModelFileError, shown};
use crate::gguf::GgufFile;
use crate::tensors::TensorSource;

/// Control tokens that end a turn or a text by their published meaning. A GGUF file names one or two of a model's
/// end tokens; the others are known by name, as in llama.cpp.
const END_TOKENS: [&str; 5] =
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"];

impl Tokenizer {
    /// Reads the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// [`TokenizerError`]: the vocabulary is not byte-level BPE (`gpt2`), the pre-tokenizer is not known, or the
    /// metadata is incomplete or contradicts itself.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self, TokenizerError> {
        let file = || gguf.path().to_owned();
        let invalid = |reason: String| TokenizerError::Invalid { file: file(), reason };
        let model = gguf.require_string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(TokenizerError::UnsupportedModel {
                file: file(),
                model: shown(model),
                supported: "gpt2",
            });
        }
        let name = gguf.require_string("tokenizer.ggml.pre")?;
        let pre = pre::by_name(name).ok_or_else(|| TokenizerError::UnknownPreTokenizer {
            file: file(),
            name: shown(name),
            known: pre::known(),
        })?;

        let tokens = gguf.require_strings("tokenizer.ggml.tokens")?;
        let kinds = kinds(gguf, tokens.len())?;
        let mut table = TokenTable::default();
        let mut vocab = Vocab::default();
        let mut added = Vec::new();
        for (id, (token, &kind)) in (0_u32..).zip(tokens.iter().zip(&kinds)) {
            table.push(token, kind);
            if kind == TokenKind::Unused {
                continue;
            }
            if let Some(first) = vocab.insert(token.clone(), id) {
                return Err(invalid(format!(
                    "tokens {first} and {id} are both '{}'",
                    shown(token)
                )));
            }
            if kind != TokenKind::Normal {
                added.push(
                    AddedToken::from(token.clone(), kind == TokenKind::Special).normalized(false),
                );
            }
        }
        let merges = merges(gguf, &vocab)?;
        let failed = |error: tokenizers::Error| invalid(shown(&error.to_string()));
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges);
        let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(failed)?);
        inner.with_normalizer(pre.normalizer()).map_err(failed)?;
        inner.with_pre_tokenizer(Some(pre.build().map_err(failed)?));
        inner.add_tokens(added).map_err(failed)?;

        let id = |key: &str| -> Result<Option<u32>, TokenizerError> {
            let Some(id) = gguf.unsigned(key)? else { return Ok(None) };
            match u32::try_from(id) {
                Ok(id) if (id as usize) < tokens.len() => Ok(Some(id)),
                _ => Err(invalid(format!("{key} is {id}, but there are {} tokens", tokens.len()))),
            }
        };
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos_token = id("tokenizer.ggml.eos_token_id")?;
        let mut eos: Vec<u32> = eos_token.into_iter().collect();
        eos.extend(id("tokenizer.ggml.eot_token_id")?);
        eos.extend(id("tokenizer.ggml.eom_token_id")?);
        for (id, (token, &kind)) in (0_u32..).zip(tokens.iter().zip(&kinds)) {
            if kind == TokenKind::Special && END_TOKENS.contains(&token.as_str()) {
                eos.push(id);
            }
        }
        let affix =
            |key: &str, default: bool, id: Option<u32>| -> Result<Vec<u32>, TokenizerError> {
                if !gguf.boolean(key)?.unwrap_or(default) {
                    return Ok(Vec::new());
                }
                id.map(|id| vec![id])
                    .ok_or_else(|| invalid(format!("{key} is set, but no such token is named")))
            };
        let prefix = affix("tokenizer.ggml.add_bos_token", pre.add_bos, bos)?;
        let suffix = affix("tokenizer.ggml.add_eos_token", false, eos_token)?;

        let mut variables = Map::new();
        for (variable, id) in [
            ("bos_token", bos),
            ("eos_token", eos_token),
            ("unk_token", id("tokenizer.ggml.unknown_token_id")?),
            ("pad_token", id("tokenizer.ggml.padding_token_id")?),
        ] {
            if let Some(text) = id.and_then(|id| tokens.get(id as usize)) {
                variables.insert(variable.to_owned(), Value::String(text.clone()));
            }
        }
        let chat_template = gguf.string("tokenizer.chat_template")?.map(str::to_owned);
        Ok(Self::from_parts(Parts {
            inner,
            prefix,
            suffix,
            table,
            bos,
            eos,
            chat_template,
            variables,
        }))
    }
}

/// The kind of every token, from `tokenizer.ggml.token_type`; without it all are normal.
fn kinds(gguf: &GgufFile, tokens: usize) -> Result<Vec<TokenKind>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let invalid = |reason: String| {
        let (file, key) = (gguf.path().to_owned(), KEY.to_owned());
        TokenizerError::File(ModelFileError::KeyValue { file, key, reason })
    };
    let Some(types) = gguf.unsigned_array(KEY)? else { return Ok(vec![TokenKind::Normal; tokens]) };
    if types.len() != tokens {
        return Err(invalid(format!("{} types for {tokens} tokens", types.len())));
    }
    let kind = |(id, number): (usize, &u64)| match number {
        1 => Ok(TokenKind::Normal),
        // Unknown and control.
        2 | 3 => Ok(TokenKind::Special),
        4 => Ok(TokenKind::Added),
        5 => Ok(TokenKind::Unused),
        _ => Err(invalid(format!(
            "token {id} has type {number}; a gpt2 vocabulary has types 1 to 5"
        ))),
    };
    types.iter().enumerate().map(kind).collect()
}

/// The merges, each checked to make a token of the vocabulary from two others: the library's builder relies on it.
fn merges(gguf: &GgufFile, vocab: &Vocab) -> Result<Merges, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.merges";
    let mut seen = HashSet::new();
    let mut merges = Merges::new();
    for (rank, text) in gguf.require_strings(KEY)?.iter().enumerate() {
        // Two tokens with a space between; tokens of a byte-level vocabulary hold no space themselves.
        let sound = text.split_once(' ').filter(|(left, right)| {
            vocab.contains_key(*left)
                && vocab.contains_key(*right)
                && vocab.contains_key(&format!("{left}{right}"))
        });
        let Some((left, right)) = sound.filter(|halves| seen.insert(*halves)) else {
            let reason = format!(
                "merge {rank} '{}' repeats another or does not make a token of two tokens",
                shown(text)
            );
            let (file, key) = (gguf.path().to_owned(), KEY.to_owned());
            return Err(ModelFileError::KeyValue { file, key, reason }.into());
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}
