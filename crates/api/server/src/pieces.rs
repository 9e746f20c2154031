//! Tokens of what was tokenized before. A conversation that is sent again is tokenized only where it is new.
//!
//! A text is cut before each control token. Where the tokenizer takes control tokens out of the text before anything else,
//! the tokens of the whole are those of its pieces; whether it does is tried when the server starts.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use ampoule::{EncodeOptions, Tokenizer, TokenizerError};

use crate::cache::Space;

/// Bytes of pieces that are kept: as many again may be held by the generation before.
const KEPT: usize = 4 << 20;

/// What a piece takes beside its tokens: its place in the table, which is half empty at times, and what the allocator adds.
const PIECE: usize = 128;

/// Whole texts that are kept, and their bytes at most: conversations under way come again with more behind them.
const TEXTS: usize = 32;
const TEXT_BYTES: usize = 4 << 20;

type Digest = [u8; 32];

#[derive(Default)]
struct Known {
    young: HashMap<Digest, Vec<u32>>,
    /// What was young before; what is used again becomes young.
    old: HashMap<Digest, Vec<u32>>,
    /// Bytes of the young and of the old.
    size: usize,
    old_size: usize,
}

impl Known {
    fn get(&mut self, digest: &Digest) -> Option<Vec<u32>> {
        if let Some(found) = self.young.get(digest) {
            return Some(found.clone());
        }
        let found = self.old.remove(digest)?;
        self.old_size = self.old_size.saturating_sub(4 * found.len() + PIECE);
        self.put(*digest, found.clone());
        Some(found)
    }

    fn put(&mut self, digest: Digest, tokens: Vec<u32>) {
        self.size += 4 * tokens.len() + PIECE;
        self.young.insert(digest, tokens);
        if self.size > KEPT {
            self.old = std::mem::take(&mut self.young);
            self.old_size = std::mem::take(&mut self.size);
        }
    }
}

/// A text, and how many tokens it had before each cut, by the cut's place.
struct Whole {
    space: Space,
    text: String,
    cuts: Vec<(usize, usize)>,
    tokens: Vec<u32>,
}

impl Whole {
    fn bytes(&self) -> usize {
        self.text.len() + 4 * self.tokens.len() + 16 * self.cuts.len()
    }
}

/// The latest whole texts, latest last.
#[derive(Default)]
struct Wholes(VecDeque<Whole>);

impl Wholes {
    /// Of a text that begins as one that is kept does: where it may be cut, the tokens before, and the cuts there.
    ///
    /// What lies before a cut depends on no byte further behind it than the longest control token is long.
    fn known(
        &self,
        space: &Space,
        text: &str,
        longest: usize,
    ) -> (usize, Vec<u32>, Vec<(usize, usize)>) {
        let mut best: Option<(&Whole, usize)> = None;
        for whole in self.0.iter().rev().filter(|whole| whole.space == *space) {
            let same = common(whole.text.as_bytes(), text.as_bytes());
            if best.is_none_or(|(_, most)| same > most) {
                best = Some((whole, same));
            }
            if same == whole.text.len() {
                break;
            }
        }
        let Some((whole, same)) = best else { return (0, Vec::new(), Vec::new()) };
        let fit = whole.cuts.partition_point(|(at, _)| at + longest <= same);
        match fit.checked_sub(1).map(|last| whole.cuts[last]) {
            Some((at, tokens)) => {
                (at, whole.tokens[..tokens].to_vec(), whole.cuts[..fit - 1].to_vec())
            }
            None => (0, Vec::new(), Vec::new()),
        }
    }

    fn put(&mut self, whole: Whole) {
        if whole.bytes() > TEXT_BYTES / 4 {
            return;
        }
        // The text that this one goes on from will not come again, more likely than not.
        self.0.retain(|old| old.space != whole.space || !whole.text.starts_with(&old.text));
        self.0.push_back(whole);
        while self.0.len() > TEXTS || self.0.iter().map(Whole::bytes).sum::<usize>() > TEXT_BYTES {
            self.0.pop_front();
        }
    }
}

/// Bytes that both begin with.
pub(crate) fn common(a: &[u8], b: &[u8]) -> usize {
    const STRIDE: usize = 64;
    let strides = a.chunks_exact(STRIDE).zip(b.chunks_exact(STRIDE));
    let from = STRIDE * strides.take_while(|(a, b)| a == b).count();
    from + a[from..].iter().zip(&b[from..]).take_while(|(a, b)| a == b).count()
}

/// Pieces by namespace: how long a text takes tells nothing of other namespaces' texts.
pub(crate) struct Pieces {
    special: Vec<String>,
    /// Whether any of them begins with this byte.
    begins: [bool; 256],
    longest: usize,
    known: Mutex<Known>,
    wholes: Mutex<Wholes>,
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
        let longest = special.first().map_or(0, String::len);
        let (known, wholes) = (Mutex::default(), Mutex::default());
        let pieces = Self { special, begins, longest, known, wholes };
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

    /// Bytes of what is kept, about.
    pub(crate) fn bytes(&self) -> usize {
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.size + known.old_size
        };
        let wholes = self.wholes.lock().unwrap_or_else(PoisonError::into_inner);
        known + wholes.0.iter().map(Whole::bytes).sum::<usize>()
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
        let wholes = || self.wholes.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut tokens, mut cuts) = wholes().known(space, text, self.longest);
        for piece in self.cut(&text[at..]) {
            cuts.push((at, tokens.len()));
            at += piece.len();
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
        let text = text.to_owned();
        wholes().put(Whole { space: *space, text, cuts, tokens: tokens.clone() });
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ampoule::{Ampoule, Device, LoadOptions, TEXTS};

    fn tiny() -> (Ampoule, Pieces) {
        let options = LoadOptions { device: Device::Cpu, context: 64, ..LoadOptions::default() };
        let model = Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap();
        let model = model.with_stand_in_tokenizer().unwrap();
        let special: Vec<String> = ["<|im_start|>", "<|im_end|>"].map(String::from).to_vec();
        let pieces = Pieces::new(model.tokenizer().unwrap(), &special).unwrap();
        (model, pieces)
    }

    #[test]
    fn pieces_have_the_tokens_of_the_whole_and_namespaces_share_none() {
        let (model, pieces) = tiny();
        let tokenizer = model.tokenizer().unwrap();
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

    /// Conversations that grow, are cut off, are changed anywhere and branch: always the tokens of the whole text.
    #[test]
    fn texts_that_begin_alike_have_the_tokens_of_the_whole() {
        let (model, pieces) = tiny();
        let tokenizer = model.tokenizer().unwrap();
        let mut dice = 11_u64;
        let mut next = |n: usize| {
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) as usize % n
        };
        let parts = [
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>\n",
            "<|im_sta",
            "rt|>",
            "<|im_e",
            "nd|>",
            "<",
            " a",
            "\n\n",
            "é  ",
            "東京",
            TEXTS[1],
        ];
        let mut texts = vec![String::new()];
        let (mut spared, mut all) = (0, 0);
        for round in 0..600 {
            let mut text = texts[next(texts.len())].clone();
            if next(3) == 0 {
                let mut end = next(text.len() + 1);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                if next(2) == 0 {
                    text.truncate(end);
                } else {
                    text.insert_str(end, parts[next(parts.len())]);
                }
            }
            for _ in 0..next(6) {
                text.push_str(parts[next(parts.len())]);
            }
            let space = [next(2) as u8; 32];
            spared += pieces.wholes.lock().unwrap().known(&space, &text, pieces.longest).0;
            all += text.len();
            let whole = tokenizer.encode(&text, EncodeOptions::TEMPLATE).unwrap();
            assert_eq!(pieces.encode(tokenizer, &space, &text).unwrap(), whole, "{round}: {text}");
            texts.push(text);
            if texts.len() > 12 {
                texts.remove(next(12));
            }
        }
        assert!(spared > all / 4, "{spared} of {all} bytes");
        let wholes = pieces.wholes.lock().unwrap();
        assert!(wholes.0.len() <= super::TEXTS);
        let other = |space: u8| wholes.0.iter().filter(|w| w.space == [space; 32]).count();
        assert!(other(0) > 0 && other(1) > 0);
        assert_eq!(wholes.known(&[9; 32], &texts[3], pieces.longest).0, 0, "not across namespaces");
    }

    #[test]
    fn what_is_not_used_goes() {
        let mut known = Known::default();
        let piece = |n: u8| ([n; 32], vec![u32::from(n); KEPT / 16]);
        for n in 0..40 {
            let (digest, tokens) = piece(n);
            known.put(digest, tokens);
            assert!(known.get(&[0; 32]).is_some(), "used each time: {n}");
        }
        assert!(known.get(&[1; 32]).is_none());
        let bytes = |tokens: &Vec<u32>| 4 * tokens.len() + PIECE;
        let held: usize = known.young.values().chain(known.old.values()).map(bytes).sum();
        assert!(held <= 2 * KEPT + KEPT / 2, "{held}");
        assert_eq!(held, known.size + known.old_size);
    }
}
