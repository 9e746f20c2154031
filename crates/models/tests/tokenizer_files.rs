//! Tokenizers from GGUF metadata and from Hugging Face folders: what is read, and what is refused.

mod support;

use ampoule_models::gguf::GgufFile;
use ampoule_models::tokenizer::{
    EncodeOptions, TokenKind, Tokenizer, TokenizerError, TokenizerParts,
};
use serde_json::{Value, json};
use support::{GgufWriter, Meta, Seeded, mutate};

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

fn strings(texts: &[&str]) -> Meta {
    Meta::Strs(texts.iter().copied().map(str::to_owned).collect())
}

/// A vocabulary of ten tokens: 0 to 5 text, 6 control, 7 user-defined, 8 unused, 9 control.
fn writer(pre: &str) -> GgufWriter {
    GgufWriter::default()
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", pre)
        .meta(
            "tokenizer.ggml.tokens",
            strings(&["a", "b", "ab", "Ġ", "Ã", "©", "<|im_end|>", "<think>", "[PAD]", "<s>"]),
        )
        .meta("tokenizer.ggml.token_type", Meta::I32s(vec![1, 1, 1, 1, 1, 1, 3, 4, 5, 3]))
        .meta("tokenizer.ggml.merges", strings(&["a b"]))
        .meta("tokenizer.ggml.bos_token_id", Meta::U32(9))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(7))
}

fn set(mut writer: GgufWriter, key: &str, value: Meta) -> GgufWriter {
    writer.metadata.retain(|(have, _)| have != key);
    writer.meta(key, value)
}

fn without(mut writer: GgufWriter, key: &str) -> GgufWriter {
    writer.metadata.retain(|(have, _)| have != key);
    writer
}

fn open(writer: &GgufWriter) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_gguf(&GgufFile::from_bytes("small.gguf", writer.write()).unwrap())
}

fn says(result: Result<Tokenizer, TokenizerError>, words: &[&str]) -> TokenizerError {
    let error = result.expect_err("must be refused");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "'{message}' does not say '{word}'");
    }
    error
}

#[test]
fn control_and_user_defined_tokens_are_found_as_asked() {
    let tokenizer = open(&writer("smollm")).unwrap();
    let text = "ab<|im_end|><think>a [PAD]";
    // [PAD] is unused: its letters have no tokens but a, which none of them is.
    assert_eq!(tokenizer.encode(text, EncodeOptions::TEMPLATE).unwrap(), [2, 6, 7, 0, 3]);
    assert_eq!(tokenizer.encode("ab<think>a", PLAIN).unwrap(), [2, 7, 0]);
    assert!(!tokenizer.encode(text, PLAIN).unwrap().contains(&6));
    assert_eq!(tokenizer.token_bytes(4), Some(&b"\xc3"[..]));
    assert_eq!(tokenizer.decode(&[4, 5, 4]), "é\u{fffd}");
    assert_eq!(tokenizer.encode("é", PLAIN).unwrap(), [4, 5]);
    assert_eq!((tokenizer.token_kind(8), tokenizer.token_bytes(8)), (TokenKind::Unused, None));
    assert_eq!(tokenizer.token_kind(7), TokenKind::Added);
    // Declared first, then what is known by name.
    assert_eq!(tokenizer.eos_ids(), [7, 6]);
    assert_eq!(tokenizer.vocab_size(), 10);
}

#[test]
fn tokens_around_a_text_are_added_as_the_file_says() {
    let ids = |writer: &GgufWriter| open(writer).unwrap().encode("a", EncodeOptions::TEXT).unwrap();
    let bos = |value| Meta::Bool(value);
    assert_eq!(ids(&writer("smollm")), [0]);
    assert_eq!(ids(&writer("llama-bpe")), [9, 0]);
    assert_eq!(ids(&set(writer("llama-bpe"), "tokenizer.ggml.add_bos_token", bos(false))), [0]);
    let both = set(writer("qwen2"), "tokenizer.ggml.add_bos_token", bos(true));
    assert_eq!(ids(&set(both, "tokenizer.ggml.add_eos_token", bos(true))), [9, 0, 7]);
    let none = without(writer("llama-bpe"), "tokenizer.ggml.bos_token_id");
    says(open(&none), &["small.gguf", "add_bos_token"]);
}

#[test]
fn words_in_the_vocabulary_are_taken_whole_where_the_model_does_so() {
    // "ba" is in the vocabulary, but no merge makes it.
    let with = |pre: &str| {
        let tokens = strings(&["a", "b", "ab", "ba"]);
        let writer = without(
            without(set(writer(pre), "tokenizer.ggml.tokens", tokens), "tokenizer.ggml.token_type"),
            "tokenizer.ggml.bos_token_id",
        );
        set(
            without(writer, "tokenizer.ggml.eos_token_id"),
            "tokenizer.ggml.add_bos_token",
            Meta::Bool(false),
        )
    };
    assert_eq!(open(&with("llama-bpe")).unwrap().encode("ba", PLAIN).unwrap(), [3]);
    assert_eq!(open(&with("qwen2")).unwrap().encode("ba", PLAIN).unwrap(), [1, 0]);
}

#[test]
fn composed_form_is_used_where_the_model_does_so() {
    // U+0065 U+0301 composes to U+00E9, whose bytes are tokens 4 and 5.
    assert_eq!(open(&writer("qwen35")).unwrap().encode("e\u{301}", PLAIN).unwrap(), [4, 5]);
    assert!(open(&writer("smollm")).unwrap().encode("e\u{301}", PLAIN).unwrap().is_empty());
}

#[test]
fn added_tokens_are_found_in_the_text_as_written() {
    let tokens = strings(&["a", "b", "ab", "Ġ", "Ã", "©", "<|im_end|>", "<é>", "[PAD]", "<s>"]);
    let tokenizer = open(&set(writer("qwen35"), "tokenizer.ggml.tokens", tokens)).unwrap();
    assert_eq!(tokenizer.encode("<é>", PLAIN).unwrap(), [7]);
    assert!(!tokenizer.encode("<e\u{301}>", PLAIN).unwrap().contains(&7));
}

#[test]
fn unknown_vocabularies_are_refused_by_name() {
    let llama = set(writer("smollm"), "tokenizer.ggml.model", Meta::Str("llama".into()));
    says(open(&llama), &["small.gguf", "'llama'", "gpt2"]);
    for name in ["default", "deepseek-llm", "", "SmolLM"] {
        let error = says(
            open(&writer(name)),
            &["small.gguf", &format!("'{name}'"), "known are smollm", "tokenizer.json"],
        );
        assert!(matches!(error, TokenizerError::UnknownPreTokenizer { .. }));
    }
    for key in ["model", "pre", "tokens", "merges"].map(|key| format!("tokenizer.ggml.{key}")) {
        says(open(&without(writer("smollm"), &key)), &["small.gguf", &key, "missing"]);
    }
}

#[test]
fn contradictions_in_a_gguf_vocabulary_are_refused() {
    let with =
        |key: &str, value| open(&set(writer("smollm"), &format!("tokenizer.ggml.{key}"), value));
    says(with("token_type", Meta::I32s(vec![1; 9])), &["token_type", "9 types for 10 tokens"]);
    says(with("token_type", Meta::I32s(vec![6; 10])), &["token_type", "token 0 has type 6"]);
    says(with("token_type", Meta::I32s(vec![-1; 10])), &["token_type"]);
    says(with("bos_token_id", Meta::U32(10)), &["bos_token_id is 10", "10 tokens"]);
    says(with("eos_token_id", Meta::U64(1 << 32)), &["eos_token_id"]);
    says(
        with("tokens", strings(&["a", "b", "ab", "a", "c", "d", "e", "f", "g", "h"])),
        &["tokens 0 and 3 are both 'a'"],
    );
    for merge in ["a", "a c", "b a", "a b", "", " ", "a  b", "a b b"] {
        let result = with("merges", strings(&["a b", merge]));
        says(result, &["small.gguf", "tokenizer.ggml.merges", "merge 1", &format!("'{merge}'")]);
    }
}

/// A `tokenizer.json` with the vocabulary above.
fn folder() -> Value {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [
            {"id": 6, "content": "<|im_end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 7, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false},
            {"id": 8, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+|[^\s\p{L}]+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
        ]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [8], "tokens": ["<s>"]}}}
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ã": 4, "©": 5},
            "merges": [["a", "b"]]
        }
    })
}

fn parts(json: &Value) -> TokenizerParts {
    TokenizerParts {
        tokenizer: json.to_string().into_bytes(),
        tokenizer_config: Some(
            br#"{"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "from the configuration"}"#.to_vec(),
        ),
        generation_config: Some(br#"{"eos_token_id": [7, 6, 500]}"#.to_vec()),
        chat_template: None,
    }
}

fn load(json: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_dir_parts("folder", &parts(json))
}

#[test]
fn a_folder_is_read() {
    let tokenizer = load(&folder()).unwrap();
    let text = "ab<|im_end|><think>a e\u{301}";
    assert_eq!(tokenizer.encode(text, EncodeOptions::PROMPT).unwrap(), [8, 2, 6, 7, 0, 3, 4, 5]);
    assert_eq!(tokenizer.encode(text, EncodeOptions::TEMPLATE).unwrap(), [2, 6, 7, 0, 3, 4, 5]);
    assert_eq!(tokenizer.encode("ab<think>a", PLAIN).unwrap(), [2, 7, 0]);
    assert_eq!(tokenizer.decode(&[2, 6, 4, 5]), "ab<|im_end|>é");
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos_ids(), tokenizer.vocab_size()),
        (Some(8), &[7, 6][..], 9)
    );
    assert_eq!(tokenizer.template_variables()["bos_token"], "<s>");
    assert_eq!(tokenizer.chat_template(), Some("from the configuration"));
    assert_eq!((tokenizer.id_of("<think>"), tokenizer.token_kind(7)), (Some(7), TokenKind::Added));
}

#[test]
fn the_other_files_of_a_folder_take_their_place() {
    let with = |change: &dyn Fn(&mut TokenizerParts)| {
        let mut parts = parts(&folder());
        change(&mut parts);
        Tokenizer::from_dir_parts("folder", &parts)
    };
    let own = with(&|p| p.chat_template = Some(b"from its own file".to_vec())).unwrap();
    assert_eq!(own.chat_template(), Some("from its own file"));
    let list = br#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    let named = with(&|p| p.tokenizer_config = Some(list.to_vec())).unwrap();
    assert_eq!((named.chat_template(), named.bos()), (Some("d"), None));
    let one = with(&|p| p.generation_config = Some(br#"{"eos_token_id": 7}"#.to_vec())).unwrap();
    assert_eq!(one.eos_ids(), [7, 6]);
    let bare = with(&|p| (p.tokenizer_config, p.generation_config) = (None, None)).unwrap();
    assert_eq!((bare.eos_ids(), bare.chat_template()), (&[][..], None));
    says(with(&|p| p.tokenizer_config = Some(b"{".to_vec())), &["tokenizer_config.json"]);
    says(with(&|p| p.generation_config = Some(b"[".to_vec())), &["generation_config.json"]);
    says(with(&|p| p.chat_template = Some(vec![0xff])), &["chat_template.jinja", "UTF-8"]);

    let dir = tempfile::tempdir().unwrap();
    says(Tokenizer::from_dir(dir.path()), &["tokenizer.json", "cannot open"]);
    std::fs::write(dir.path().join("tokenizer.json"), folder().to_string()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "on disk").unwrap();
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().chat_template(), Some("on disk"));
}

#[test]
fn parts_of_other_tokenizers_are_refused_by_name() {
    let with = |pointer: &str, value: Value| {
        let mut json = folder();
        *json.pointer_mut(pointer).unwrap() = value;
        load(&json)
    };
    let file = "tokenizer.json";
    says(with("/model/type", json!("Unigram")), &[file, "'Unigram'", "BPE"]);
    says(with("/normalizer", json!({"type": "Lowercase"})), &[file, "normalizer 'Lowercase'"]);
    says(
        with(
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace"}]}),
        ),
        &["'Replace'"],
    );
    says(with("/pre_tokenizer", json!({"type": "Metaspace"})), &["pre_tokenizer 'Metaspace'"]);
    says(
        with("/pre_tokenizer", json!({"type": "Digits", "individual_digits": true})),
        &["pre_tokenizer 'Digits'"],
    );
    says(with("/pre_tokenizer", Value::Null), &["pre_tokenizer 'null'"]);
    says(with("/decoder", json!({"type": "WordPiece"})), &["decoder 'WordPiece'"]);
    says(with("/decoder", Value::Null), &["decoder 'null'"]);
    says(
        with("/post_processor", json!({"type": "BertProcessing"})),
        &["post_processor 'BertProcessing'"],
    );
    says(with("/model/dropout", json!(0.1)), &["dropout"]);
    says(with("/model/byte_fallback", json!(true)), &["byte_fallback"]);
    says(with("/model/end_of_word_suffix", json!("</w>")), &["end_of_word_suffix"]);
    assert!(with("/normalizer", Value::Null).is_ok());
    assert!(with("/post_processor", Value::Null).is_ok());
}

#[test]
fn contradictions_in_a_folder_are_refused() {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut json = folder();
        change(&mut json);
        load(&json)
    };
    let file = "tokenizer.json";
    says(with(&|j| j["model"]["vocab"]["b"] = json!(0)), &[file, "share id 0"]);
    says(with(&|j| j["model"]["vocab"]["b"] = json!(-1)), &[file, "'b'"]);
    says(with(&|j| j["model"]["vocab"]["b"] = json!(4_000_000_000_u32)), &[file, "largest id"]);
    says(with(&|j| j["added_tokens"][0]["id"] = json!(2)), &[file, "<|im_end|>"]);
    says(with(&|j| j["added_tokens"][0]["id"] = json!(4_000_000_000_u32)), &[file, "<|im_end|>"]);
    says(with(&|j| j["added_tokens"][2]["id"] = json!(20)), &[file, "'<s>' has id 20"]);
    says(with(&|j| j["added_tokens"][0]["content"] = json!("")), &[file, "empty"]);
    says(with(&|j| j["added_tokens"][0]["content"] = json!("ab")), &[file, "'ab' has two ids"]);
    // The library's builder trusts that the joined token is in the vocabulary, and panics where it is longer than any.
    says(with(&|j| j["model"]["merges"] = json!([["ab", "ab"]])), &[file, "merge 0"]);
    says(with(&|j| j["model"]["merges"] = json!(["a b", "b"])), &[file, "merge 1"]);
    let ids = "/post_processor/processors/1/special_tokens/<s>/ids";
    says(with(&|j| *j.pointer_mut(ids).unwrap() = json!([500])), &[file, "adds token 500"]);
    says(with(&|j| *j.pointer_mut(ids).unwrap() = json!([-1])), &[file, "without ids"]);
    assert!(with(&|j| j["model"]["merges"] = json!(["a b"])).is_ok());
}

#[test]
fn ten_thousand_mutations_of_a_folder_never_panic() {
    let original = folder().to_string().into_bytes();
    let mut seeded = Seeded(20_261_121);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..10_000 {
        let mutated =
            TokenizerParts { tokenizer: mutate(&mut seeded, &original), ..parts(&folder()) };
        match Tokenizer::from_dir_parts("folder", &mutated) {
            Ok(tokenizer) => {
                opened += 1;
                let ids =
                    tokenizer.encode("ab <|im_end|> é \u{301}", EncodeOptions::PROMPT).unwrap();
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                let _ = tokenizer.decode(&ids);
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("tokenizer.json"), "{error}");
            }
        }
    }
    assert!(
        opened > 200 && refused > 1000,
        "{opened} opened, {refused} refused: the mutations test nothing"
    );
}
