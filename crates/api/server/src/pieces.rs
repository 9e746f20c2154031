//! Tokens of what was tokenized before. A conversation that is sent again is tokenized only where it is new.
//!
//! A text is cut before each control token. Where the tokenizer takes control tokens out of the text before anything else,
//! the tokens of the whole are those of its pieces; whether it does is tried when the server starts.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use ampoule::{EncodeOptions, Tokenizer, TokenizerError};

use crate::cache::Space;

/// Tokens that are kept: as many again may be held by the generation before.
const KEPT: usize = 1 << 20;

type Digest = [u8; 32];

#[derive(Default)]
struct Known {
    young: HashMap<Digest, Vec<u32>>,
    /// What was young before; what is used again becomes young.
    old: HashMap<Digest, Vec<u32>>,
    size: usize,
}

impl Known {
    fn get(&mut self, digest: &Digest) -> Option<Vec<u32>> {
        if let Some(found) = self.young.get(digest) {
            return Some(found.clone());
        }
        let found = self.old.remove(digest)?;
        self.put(*digest, found.clone());
        Some(found)
    }

    fn put(&mut self, digest: Digest, tokens: Vec<u32>) {
        self.size += tokens.len() + 16;
        self.young.insert(digest, tokens);
        if self.size > KEPT {
            self.old = std::mem::take(&mut self.young);
            self.size = 0;
        }
    }
}

/// Pieces by namespace: how long a text takes tells nothing of other namespaces' texts.
pub(crate) struct Pieces {
    special: Vec<String>,
    /// Whether any of them begins with this byte.
    begins: [bool; 256],
    known: Mutex<Known>,
}

impl Pieces {
    /// `None` where the tokens of pieces are not those of the whole.
    pub(crate) fn new(tokenizer: &Tokenizer, special: &[String]) -> Option<Self> {
        let mut special = special.to_vec();
        // Of two that fit the longer one counts.
        special.sort_by_key(|s| std::cmp::Reverse(s.len()));
        let mut begins = [false; 256];
        for byte in special.iter().filter_map(|s| s.bytes().next()) {
            begins[usize::from(byte)] = true;
        }
        let pieces = Self { special, begins, known: Mutex::default() };
        let encode = |text: &str| tokenizer.encode(text, EncodeOptions::TEMPLATE).ok();
        for special in &pieces.special {
            for (before, after) in
                [("a", "b"), ("a ", " b"), ("\n\n", "\n"), ("é  ", "  \n x"), ("", "")]
            {
                let text = format!("{before}{special}{after}{special}{special}{after}{before}");
                let mut apart = Vec::new();
                for piece in pieces.cut(&text) {
                    apart.extend(encode(piece)?);
                }
                if encode(&text)? != apart {
                    tracing::info!(
                        "this tokenizer looks across control tokens: texts are tokenized whole"
                    );
                    return None;
                }
            }
        }
        Some(pieces)
    }

    /// The text in pieces: each but the first begins with a control token.
    fn cut<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let mut out = Vec::new();
        let (mut from, mut at) = (0, 0);
        let bytes = text.as_bytes();
        while at < bytes.len() {
            let fits = |s: &&String| bytes[at..].starts_with(s.as_bytes());
            let maybe = self.begins[usize::from(bytes[at])];
            match self.special.iter().find(|s| maybe && fits(s)) {
                Some(special) => {
                    if at > from {
                        out.push(&text[from..at]);
                        from = at;
                    }
                    at += special.len();
                }
                None => at += 1,
            }
        }
        if from < text.len() {
            out.push(&text[from..]);
        }
        out
    }

    /// The tokens of a text that a template made.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        space: &Space,
        text: &str,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::with_capacity(text.len() / 3);
        for piece in self.cut(text) {
            // Short ones as well: what closes a message comes once for each, and the tokenizer takes longer than a look.
            let digest =
                *blake3::Hasher::new_keyed(space).update(piece.as_bytes()).finalize().as_bytes();
            let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let found = known().get(&digest);
            let these = match found {
                Some(found) => found,
                None => {
                    let new = tokenizer.encode(piece, EncodeOptions::TEMPLATE)?;
                    known().put(digest, new.clone());
                    new
                }
            };
            tokens.extend(these);
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ampoule::{Ampoule, Device, LoadOptions, TEXTS};

    #[test]
    fn pieces_have_the_tokens_of_the_whole_and_namespaces_share_none() {
        let options = LoadOptions { device: Device::Cpu, context: 64, ..LoadOptions::default() };
        let model = Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap();
        let model = model.with_stand_in_tokenizer().unwrap();
        let tokenizer = model.tokenizer().unwrap();
        let special: Vec<String> = ["<|im_start|>", "<|im_end|>"].map(String::from).to_vec();
        let pieces = Pieces::new(tokenizer, &special).unwrap();
        let mut text = String::new();
        for (index, passage) in TEXTS.iter().enumerate() {
            text.extend([
                format!("<|im_start|>user {index}\n").as_str(),
                *passage,
                "<|im_end|>\n<|im_end|><|im_sta",
            ]);
            let whole = tokenizer.encode(&text, EncodeOptions::TEMPLATE).unwrap();
            for space in [[1; 32], [1; 32], [2; 32]] {
                assert_eq!(pieces.encode(tokenizer, &space, &text).unwrap(), whole);
            }
        }
        let known = pieces.known.lock().unwrap();
        // Each passage twice: once for each namespace.
        assert!(known.young.len() >= 2 * TEXTS.len(), "{}", known.young.len());
        assert_eq!(known.young.len() % 2, 0);
    }

    #[test]
    fn what_is_not_used_goes() {
        let mut known = Known::default();
        let piece = |n: u8| ([n; 32], vec![u32::from(n); KEPT / 4]);
        for n in 0..40 {
            let (digest, tokens) = piece(n);
            known.put(digest, tokens);
            assert!(known.get(&[0; 32]).is_some(), "used each time: {n}");
        }
        assert!(known.get(&[1; 32]).is_none());
        let held: usize = known.young.values().chain(known.old.values()).map(Vec::len).sum();
        assert!(held <= 2 * KEPT + KEPT / 2, "{held}");
    }
}
