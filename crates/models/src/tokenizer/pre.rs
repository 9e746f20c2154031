//! The pre-tokenizers that `tokenizer.ggml.pre` names.
//!
//! A GGUF file holds vocabulary and merges, but only the *name* of how text is split before merging. A wrong split
//! gives wrong tokens without any error, so a name that is not in this table is refused.

use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

/// How the text between special tokens becomes words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    /// The values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    splitter: Splitter,
    /// Whether text is brought to Unicode's composed form first.
    nfc: bool,
    /// Whether a word that is in the vocabulary is taken whole, without merging.
    pub(super) ignore_merges: bool,
    /// Whether a beginning-of-text token goes first where the file does not say.
    pub(super) add_bos: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Splitter {
    /// GPT-2's pattern, which the ByteLevel pre-tokenizer has built in.
    Gpt2,
    /// Each digit alone, then GPT-2's pattern.
    DigitsGpt2,
    /// This pattern.
    Pattern(&'static str),
}

/// Source: `tokenizer.json` of the models that carry the name (SmolLM2, GPT-2, Llama 3, Qwen2 to Qwen3, Qwen3.5).
const TABLE: [PreTokenizer; 5] = [
    PreTokenizer {
        names: &["smollm"],
        splitter: Splitter::DigitsGpt2,
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["gpt-2", "gpt2"],
        splitter: Splitter::Gpt2,
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        splitter: Splitter::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["qwen2"],
        splitter: Splitter::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        // As qwen2, but combining marks belong to the words.
        names: &["qwen35"],
        splitter: Splitter::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
];

/// All names, for the message that refuses another.
pub(super) fn known() -> String {
    TABLE.iter().flat_map(|row| row.names).copied().collect::<Vec<_>>().join(", ")
}

pub(super) fn by_name(name: &str) -> Option<PreTokenizer> {
    TABLE.into_iter().find(|row| row.names.contains(&name))
}

impl PreTokenizer {
    pub(super) fn normalizer(self) -> Option<NormalizerWrapper> {
        self.nfc.then_some(NormalizerWrapper::NFC(NFC))
    }

    pub(super) fn build(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let byte_level =
            |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, use_regex));
        let first = match self.splitter {
            Splitter::Gpt2 => return Ok(byte_level(true)),
            Splitter::DigitsGpt2 => {
                let parts = vec![PreTokenizerWrapper::Digits(Digits::new(true)), byte_level(true)];
                return Ok(PreTokenizerWrapper::Sequence(Sequence::new(parts)));
            }
            Splitter::Pattern(pattern) => {
                let pattern = SplitPattern::Regex(pattern.to_owned());
                PreTokenizerWrapper::Split(Split::new(
                    pattern,
                    SplitDelimiterBehavior::Isolated,
                    false,
                )?)
            }
        };
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(vec![first, byte_level(false)])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{
        NormalizedString, Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString,
        PreTokenizer as _,
    };

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut pre = PreTokenizedString::from(text);
        by_name(name).unwrap().build().unwrap().pre_tokenize(&mut pre).unwrap();
        let splits = pre.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(_, (start, end), _)| text[*start..*end].to_owned()).collect()
    }

    #[test]
    fn digits_split_as_each_model_splits_them() {
        assert_eq!(words("smollm", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
        assert_eq!(words("gpt-2", "a 1234"), ["a", " 1234"]);
        assert_eq!(words("llama-bpe", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(words("qwen2", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
    }

    #[test]
    fn marks_are_the_difference_between_qwen2_and_qwen35() {
        // DEVANAGARI KA, VOWEL SIGN AA (a mark), MA.
        assert_eq!(words("qwen2", "\u{915}\u{93e}\u{92e}"), ["\u{915}", "\u{93e}\u{92e}"]);
        assert_eq!(words("qwen35", "\u{915}\u{93e}\u{92e}"), ["\u{915}\u{93e}\u{92e}"]);
    }

    #[test]
    fn contractions_ignore_case_where_the_model_does() {
        assert_eq!(words("gpt-2", "I'LL"), ["I", "'", "LL"]);
        assert_eq!(words("qwen35", "I'LL"), ["I", "'LL"]);
    }

    /// Against the same rules on another regular expression engine (scripts/golden_tokenizer.py).
    #[test]
    fn words_equal_the_reference() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../conformance/golden/tokenizer/pre.json");
        let golden: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let texts = golden["texts"].as_array().unwrap();
        for (name, words) in golden["words"].as_object().unwrap() {
            let pre = by_name(if name == "llama3" { "llama-bpe" } else { name }).unwrap();
            let splitter = pre.build().unwrap();
            for (text, words) in texts.iter().zip(words.as_array().unwrap()) {
                let mut normalized = NormalizedString::from(text.as_str().unwrap());
                if let Some(normalizer) = pre.normalizer() {
                    normalizer.normalize(&mut normalized).unwrap();
                }
                let mut pieces = PreTokenizedString::from(normalized);
                splitter.pre_tokenize(&mut pieces).unwrap();
                let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
                let ours: Vec<&str> =
                    splits.iter().map(|split| split.0).filter(|word| !word.is_empty()).collect();
                let reference: Vec<&str> =
                    words.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
                assert_eq!(ours, reference, "{name}: {text}");
            }
        }
    }

    #[test]
    fn names_are_unique_and_unknown_ones_are_not_guessed() {
        let names = known();
        let mut list: Vec<_> = names.split(", ").collect();
        list.sort_unstable();
        let total = list.len();
        list.dedup();
        assert_eq!(list.len(), total);
        assert!(by_name("default").is_none());
        assert!(by_name("").is_none());
    }
}
