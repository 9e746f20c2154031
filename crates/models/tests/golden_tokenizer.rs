//! SmolLM2's tokenizer against the reference (scripts/golden_tokenizer.py).

mod support;

use ampoule_models::chat::ChatTemplate;
use ampoule_models::gguf::GgufFile;
use ampoule_models::tokenizer::{EncodeOptions, StreamDecoder, TokenKind, Tokenizer};
use serde_json::{Map, Value};

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

fn tokenizer() -> Option<Tokenizer> {
    let path = support::smollm2()?;
    Some(Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).unwrap())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_and_texts_equal_the_reference() {
    let Some(tokenizer) = tokenizer() else { return };
    let golden = support::golden("smollm2.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 60);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let parsed = tokenizer.encode(text, EncodeOptions::TEMPLATE).unwrap();
        assert_eq!(parsed, ids(&case["ids"]), "{text:?}");
        assert_eq!(
            tokenizer.encode(text, PLAIN).unwrap(),
            ids(&case["ids_without_special"]),
            "{text:?}"
        );
        assert_eq!(tokenizer.decode(&parsed), case["decoded"].as_str().unwrap(), "{text:?}");
        // This model adds nothing around a text.
        assert_eq!(tokenizer.encode(text, EncodeOptions::PROMPT).unwrap(), parsed);
        assert_eq!(
            tokenizer.encode(text, EncodeOptions::TEXT).unwrap(),
            ids(&case["ids_without_special"])
        );

        let mut stream = StreamDecoder::new();
        let mut streamed: String =
            parsed.iter().map(|&id| stream.push(tokenizer.token_bytes(id).unwrap())).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, case["decoded"].as_str().unwrap());
    }
}

#[test]
fn special_tokens_are_as_published() {
    let Some(tokenizer) = tokenizer() else { return };
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (Some(1), &[2, 0][..]));
    assert!(tokenizer.is_eos(2) && tokenizer.is_eos(0) && !tokenizer.is_eos(1));
    assert_eq!(tokenizer.id_of("<|im_end|>"), Some(2));
    assert_eq!(tokenizer.id_of("hello"), None);
    assert_eq!(tokenizer.token_text(1).unwrap(), "<|im_start|>");
    assert_eq!(tokenizer.token_kind(16), TokenKind::Special);
    assert_eq!(tokenizer.token_kind(17), TokenKind::Normal);
    assert_eq!(tokenizer.token_bytes(49152), None);
    assert_eq!(tokenizer.decode(&[1, 19556, 2, 99999]), "<|im_start|>Hello<|im_end|>");
    assert_eq!(tokenizer.decode_without_special(&[1, 19556, 2]), "Hello");
    assert_eq!(tokenizer.template_variables()["eos_token"], "<|im_end|>");
}

#[test]
fn every_byte_has_its_token_but_those_that_the_reference_lacks() {
    let Some(tokenizer) = tokenizer() else { return };
    let missing = ids(&support::golden("smollm2.json")["bytes_without_token"]);
    let mut single = [false; 256];
    for id in 0..tokenizer.vocab_size() as u32 {
        let bytes = tokenizer.token_bytes(id).unwrap();
        assert!(!bytes.is_empty());
        if let [byte] = bytes {
            assert!(
                !std::mem::replace(&mut single[usize::from(*byte)], true),
                "two tokens for byte {byte}"
            );
        }
    }
    for byte in 0..256 {
        assert_eq!(single[byte], !missing.contains(&(byte as u32)), "byte {byte}");
    }
}

#[test]
fn conversations_render_as_in_the_reference() {
    let Some(tokenizer) = tokenizer() else { return };
    let golden = support::golden("smollm2.json");
    let template = ChatTemplate::new(tokenizer.chat_template().unwrap()).unwrap();
    let template = template.with_variables(tokenizer.template_variables().clone());
    for case in golden["chat"].as_array().unwrap() {
        let prompt = case["add_generation_prompt"].as_bool().unwrap_or(false);
        let text = template.render(&case["messages"], None, prompt, &Map::new()).unwrap();
        assert_eq!(text, case["expected"]["text"].as_str().unwrap());
    }
}

#[test]
fn long_texts_are_split_to_their_end() {
    let Some(tokenizer) = tokenizer() else { return };
    let golden = support::golden("smollm2.json");
    for case in golden["long"].as_array().unwrap() {
        let repeat = case["repeat"].as_u64().unwrap() as usize;
        let text = case["piece"].as_str().unwrap().repeat(repeat) + case["tail"].as_str().unwrap();
        let ids = tokenizer.encode(&text, PLAIN).unwrap();
        let checksum = ids
            .iter()
            .zip(1_u32..)
            .fold(0_u32, |sum, (&id, at)| sum.wrapping_add(at.wrapping_mul(id)));
        assert_eq!(ids.len() as u64, case["count"].as_u64().unwrap(), "{}", case["piece"]);
        assert_eq!(u64::from(checksum), case["checksum"].as_u64().unwrap(), "{}", case["piece"]);
    }
}
