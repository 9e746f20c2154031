//! The tokenizer of a Hugging Face folder.
//!
//! `tokenizer.json` is checked before the `tokenizers` crate sees it: only the parts of a byte-level BPE tokenizer
//! pass, and merges and ids that the crate would take on trust are verified.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::table::{TokenKind, TokenTable};
use super::{Parts, Tokenizer, TokenizerError};
use crate::error::shown;
use crate::weights_dir::{parse_json, read_bounded};

/// Largest `tokenizer.json`, in bytes; the largest published are about 40 MB.
const TOKENIZER_LIMIT: u64 = 256 << 20;
/// Largest of the other files, in bytes.
const CONFIG_LIMIT: u64 = 16 << 20;

/// The files of a tokenizer, for bytes that are in memory already.
#[derive(Clone, Debug, Default)]
pub struct TokenizerParts {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `generation_config.json`.
    pub generation_config: Option<Vec<u8>>,
    /// `chat_template.jinja`, which goes before the template in `tokenizer_config.json`.
    pub chat_template: Option<Vec<u8>>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they are there, `tokenizer_config.json`, `generation_config.json` and
    /// `chat_template.jinja`.
    ///
    /// # Errors
    /// [`TokenizerError`]: a file cannot be read, the tokenizer is not byte-level BPE, uses a part that is not
    /// supported, or contradicts itself.
    pub fn from_dir(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let optional = |name: &str| {
            let file = path.join(name);
            file.exists().then(|| read_bounded(&file, CONFIG_LIMIT)).transpose()
        };
        let parts = TokenizerParts {
            tokenizer: read_bounded(&path.join("tokenizer.json"), TOKENIZER_LIMIT)?,
            tokenizer_config: optional("tokenizer_config.json")?,
            generation_config: optional("generation_config.json")?,
            chat_template: optional("chat_template.jinja")?,
        };
        Self::from_dir_parts(path, &parts)
    }

    /// As [`from_dir`](Self::from_dir), from bytes; `name` stands for the folder in messages.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir), without the system's errors.
    pub fn from_dir_parts(
        name: impl AsRef<Path>,
        parts: &TokenizerParts,
    ) -> Result<Self, TokenizerError> {
        let dir = name.as_ref();
        let reader = Reader { file: dir.join("tokenizer.json") };
        let json = parse_json(&reader.file, "the tokenizer", &parts.tokenizer)?;
        reader.check_parts(&json)?;
        let vocab = reader.check_model(&json)?;
        let added = reader.check_added(&json, &vocab)?;
        let (prefix, suffix) = reader.affixes(&json)?;

        // From the value that was checked: text with repeated keys could say something else the second time.
        let inner: tokenizers::Tokenizer =
            serde_json::from_value(json).map_err(|e| reader.invalid(shown(&e.to_string())))?;
        if let Some(token) =
            added.iter().find(|token| inner.token_to_id(&token.text) != Some(token.id))
        {
            let (text, id) = (shown(&token.text), token.id);
            return Err(reader.invalid(format!(
                "added token '{text}' has id {id}, which leaves a gap behind the vocabulary"
            )));
        }
        let table = reader.table(&vocab, &added)?;
        if let Some(id) = prefix.iter().chain(&suffix).find(|&&id| id as usize >= table.len()) {
            return Err(reader.invalid(format!(
                "post_processor adds token {id}, which is not in the vocabulary"
            )));
        }

        let config = |name: &str, bytes: &Option<Vec<u8>>| -> Result<Value, TokenizerError> {
            match bytes {
                Some(bytes) => Ok(parse_json(&dir.join(name), "the configuration", bytes)?),
                None => Ok(Value::Null),
            }
        };
        let tokenizer_config = config("tokenizer_config.json", &parts.tokenizer_config)?;
        let generation = config("generation_config.json", &parts.generation_config)?;
        let variables = special_tokens(&tokenizer_config);
        let id_of = |variable: &str| {
            let text = variables.get(variable)?.as_str()?;
            added
                .iter()
                .find(|token| token.text == text)
                .map(|token| token.id)
                .or_else(|| vocab.get(text).copied())
        };

        let mut eos = Vec::new();
        match generation.get("eos_token_id") {
            Some(Value::Array(ids)) => eos.extend(ids.iter().filter_map(Value::as_u64)),
            Some(id) => eos.extend(id.as_u64()),
            None => {}
        }
        let mut eos: Vec<u32> = eos.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
        eos.retain(|&id| (id as usize) < table.len());
        eos.extend(id_of("eos_token"));

        let chat_template = match &parts.chat_template {
            Some(bytes) => {
                let file = dir.join("chat_template.jinja");
                let text = String::from_utf8(bytes.clone());
                Some(text.map_err(|_| TokenizerError::Invalid {
                    file,
                    reason: "not UTF-8".to_owned(),
                })?)
            }
            None => template_in_config(&tokenizer_config),
        };
        let bos = id_of("bos_token");
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

/// One entry of `added_tokens`.
struct Added {
    id: u32,
    text: String,
    special: bool,
}

struct Reader {
    file: PathBuf,
}

impl Reader {
    fn invalid(&self, reason: impl Into<String>) -> TokenizerError {
        TokenizerError::Invalid { file: self.file.clone(), reason: reason.into() }
    }

    /// Every part must be of a kind whose effect on bytes is known.
    fn check_parts(&self, json: &Value) -> Result<(), TokenizerError> {
        const PARTS: [(&str, &[&str], &str, &str); 4] = [
            (
                "normalizer",
                &["NFC", "NFD", "NFKC", "NFKD"],
                "normalizers",
                "none, NFC, NFD, NFKC and NFKD are",
            ),
            (
                "pre_tokenizer",
                &["ByteLevel", "Split", "Digits"],
                "pretokenizers",
                "ByteLevel, Split and Digits are",
            ),
            ("decoder", &["ByteLevel"], "decoders", "ByteLevel is"),
            (
                "post_processor",
                &["ByteLevel", "TemplateProcessing"],
                "processors",
                "none, ByteLevel and TemplateProcessing are",
            ),
        ];
        for (part, known, list, supported) in PARTS {
            let kinds = leaves(json.get(part).unwrap_or(&Value::Null), list);
            if let Some(name) = kinds.iter().find(|name| !known.contains(&name.as_str())) {
                return Err(TokenizerError::UnsupportedPart {
                    file: self.file.clone(),
                    part,
                    name: shown(name),
                    supported,
                });
            }
            if matches!(part, "pre_tokenizer" | "decoder")
                && !kinds.iter().any(|name| name == "ByteLevel")
            {
                let name = kinds.first().map_or("null", String::as_str);
                return Err(TokenizerError::UnsupportedPart {
                    file: self.file.clone(),
                    part,
                    name: shown(name),
                    supported,
                });
            }
        }
        Ok(())
    }

    /// Checks the BPE model and returns its vocabulary.
    fn check_model(&self, json: &Value) -> Result<HashMap<String, u32>, TokenizerError> {
        let model = json.get("model").unwrap_or(&Value::Null);
        let kind = model.get("type").and_then(Value::as_str).unwrap_or("unnamed");
        if kind != "BPE" {
            return Err(TokenizerError::UnsupportedModel {
                file: self.file.clone(),
                model: shown(kind),
                supported: "BPE",
            });
        }
        for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if model.get(affix).and_then(Value::as_str).is_some_and(|text| !text.is_empty()) {
                return Err(self
                    .invalid(format!("model.{affix} is set, which byte-level BPE does not have")));
            }
        }
        if model
            .get("dropout")
            .is_some_and(|dropout| !dropout.is_null() && dropout.as_f64() != Some(0.0))
        {
            return Err(
                self.invalid("model.dropout is set: the same text would not give the same tokens")
            );
        }
        if model.get("byte_fallback").and_then(Value::as_bool).unwrap_or(false) {
            return Err(
                self.invalid("model.byte_fallback is set, which byte-level BPE does not have")
            );
        }
        let entries = model
            .get("vocab")
            .and_then(Value::as_object)
            .ok_or_else(|| self.invalid("model.vocab is missing"))?;
        let mut vocab = HashMap::with_capacity(entries.len());
        for (token, id) in entries {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id
                .ok_or_else(|| self.invalid(format!("token '{}' has no valid id", shown(token))))?;
            vocab.insert(token.clone(), id);
        }
        let merges = model
            .get("merges")
            .and_then(Value::as_array)
            .ok_or_else(|| self.invalid("model.merges is missing"))?;
        for (rank, merge) in merges.iter().enumerate() {
            let halves = match merge {
                Value::String(text) => text.split_once(' '),
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(left), Value::String(right)] => {
                        Some((left.as_str(), right.as_str()))
                    }
                    _ => None,
                },
                _ => None,
            };
            let sound = halves.is_some_and(|(left, right)| {
                vocab.contains_key(left)
                    && vocab.contains_key(right)
                    && vocab.contains_key(&format!("{left}{right}"))
            });
            if !sound {
                return Err(self.invalid(format!(
                    "merge {rank} does not make a token of two tokens: {}",
                    shown(&merge.to_string())
                )));
            }
        }
        Ok(vocab)
    }

    /// Checks the added tokens: the library would give a token another id than the file says, with a warning only.
    fn check_added(
        &self,
        json: &Value,
        vocab: &HashMap<String, u32>,
    ) -> Result<Vec<Added>, TokenizerError> {
        let entries = match json.get("added_tokens") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(entries)) => entries,
            Some(_) => return Err(self.invalid("added_tokens is not a list")),
        };
        let mut added: Vec<Added> = Vec::with_capacity(entries.len());
        let mut texts = HashMap::new();
        for entry in entries {
            let id = entry.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
            let text = entry.get("content").and_then(Value::as_str);
            let (Some(id), Some(text)) = (id, text) else {
                return Err(self.invalid(format!(
                    "added token without id or content: {}",
                    shown(&entry.to_string())
                )));
            };
            if text.is_empty() {
                return Err(self.invalid(format!("added token {id} is empty")));
            }
            let other = vocab.get(text).or_else(|| texts.get(text));
            if other.is_some_and(|&other| other != id) {
                return Err(self.invalid(format!("added token '{}' has two ids", shown(text))));
            }
            texts.insert(text.to_owned(), id);
            let special = entry.get("special").and_then(Value::as_bool).unwrap_or(false);
            added.push(Added { id, text: text.to_owned(), special });
        }
        Ok(added)
    }

    /// The ids that the post-processor puts before and behind a text.
    fn affixes(&self, json: &Value) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
        let post = json.get("post_processor").unwrap_or(&Value::Null);
        let processors = match post.get("processors") {
            Some(Value::Array(list)) => list.iter().collect(),
            _ => vec![post],
        };
        let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
        for processor in processors {
            if processor.get("type").and_then(Value::as_str) != Some("TemplateProcessing") {
                continue;
            }
            let pieces = processor.get("single").and_then(Value::as_array);
            let pieces = pieces.ok_or_else(|| self.invalid("post_processor has no template"))?;
            let (mut before, mut behind) = (Vec::new(), Vec::new());
            let mut text_seen = false;
            for piece in pieces {
                if piece.get("Sequence").is_some() {
                    text_seen = true;
                    continue;
                }
                let ids =
                    piece.pointer("/SpecialToken/id").and_then(Value::as_str).and_then(|name| {
                        processor.get("special_tokens")?.get(name)?.get("ids")?.as_array()
                    });
                let ids: Option<Vec<u32>> = ids.and_then(|ids| {
                    ids.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
                });
                let ids = ids.ok_or_else(|| {
                    self.invalid(format!(
                        "post_processor has a piece without ids: {}",
                        shown(&piece.to_string())
                    ))
                })?;
                if text_seen { behind.extend(ids) } else { before.extend(ids) }
            }
            // A later processor wraps what an earlier one made.
            before.append(&mut prefix);
            prefix = before;
            suffix.append(&mut behind);
        }
        Ok((prefix, suffix))
    }

    fn table(
        &self,
        vocab: &HashMap<String, u32>,
        added: &[Added],
    ) -> Result<TokenTable, TokenizerError> {
        let count = vocab.len() + added.len();
        let largest = vocab.values().chain(added.iter().map(|token| &token.id)).max();
        let size = largest.map_or(0, |&id| id as usize + 1);
        // Published vocabularies have few gaps; a huge id would only make a huge table.
        if size > 4 * count + 65536 {
            return Err(
                self.invalid(format!("the largest id is {} with only {count} tokens", size - 1))
            );
        }
        let mut by_id: Vec<(&str, TokenKind)> = vec![("", TokenKind::Unused); size];
        for (token, &id) in vocab {
            if let Some(slot) = by_id.get_mut(id as usize) {
                if slot.1 != TokenKind::Unused {
                    return Err(self.invalid(format!(
                        "tokens '{}' and '{}' share id {id}",
                        shown(slot.0),
                        shown(token)
                    )));
                }
                *slot = (token, TokenKind::Normal);
            }
        }
        for token in added {
            if let Some(slot) = by_id.get_mut(token.id as usize) {
                if slot.1 != TokenKind::Unused && slot.0 != token.text {
                    let (a, b, id) = (shown(slot.0), shown(&token.text), token.id);
                    return Err(self.invalid(format!("tokens '{a}' and '{b}' share id {id}")));
                }
                *slot = (
                    &token.text,
                    if token.special { TokenKind::Special } else { TokenKind::Added },
                );
            }
        }
        let mut table = TokenTable::default();
        for (text, kind) in by_id {
            table.push(text, kind);
        }
        Ok(table)
    }
}

/// The types of a part, sequences opened. None for `null`.
fn leaves(part: &Value, list: &str) -> Vec<String> {
    if part.is_null() {
        return Vec::new();
    }
    let kind = part.get("type").and_then(Value::as_str).unwrap_or("unnamed");
    match part.get(list).and_then(Value::as_array) {
        Some(parts) if kind == "Sequence" => {
            parts.iter().flat_map(|part| leaves(part, list)).collect()
        }
        _ => vec![kind.to_owned()],
    }
}

/// `bos_token`, `eos_token` and the like: each is a text, or an object with a `content`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let mut variables = Map::new();
    for name in
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
    {
        let token = config.get(name).unwrap_or(&Value::Null);
        if let Some(text) = token.as_str().or_else(|| token.get("content")?.as_str()) {
            variables.insert(name.to_owned(), Value::String(text.to_owned()));
        }
    }
    variables
}

/// The template in `tokenizer_config.json`: a text, or a list of named ones of which `default` is taken.
fn template_in_config(config: &Value) -> Option<String> {
    let template = config.get("chat_template")?;
    let named = || {
        let list = template.as_array()?;
        let default =
            list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
        default.or(list.first())?.get("template")?.as_str()
    };
    template.as_str().or_else(named).map(str::to_owned)
}
