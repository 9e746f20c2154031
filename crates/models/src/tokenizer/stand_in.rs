//! A tokenizer for models that have none: bytes, pairs of letters, and the control tokens of a chat.

use serde_json::{Map, Value, json};

use super::from_dir::TokenizerParts;
use super::table::stand_in;
use super::{Tokenizer, TokenizerError};

/// Control tokens: text, and whether they are special.
const CONTROL: [(&str, bool); 8] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<|pad|>", true),
    ("<think>", false),
    ("</think>", false),
    ("<tool_call>", false),
    ("</tool_call>", false),
];

/// Frequent letters of English: their pairs are tokens, as far as the vocabulary goes.
const LETTERS: &str = "etaoinshrdlcumfp";

/// Messages between control tokens; tools and calls as JSON; thoughts of earlier turns are left out.
const TEMPLATE: &str = r#"{%- if tools %}
<|im_start|>tools
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
Call one so: <tool_call>
{"name": NAME, "arguments": {...}}
</tool_call><|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.reasoning_content and loop.last %}
<think>
{{ message.reasoning_content }}
</think>
{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{ "\n<tool_call>\n" }}{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking %}
<think>
{% endif %}
{% endif %}
"#;

impl Tokenizer {
    /// Bytes, pairs of frequent letters, and ChatML's control tokens, with a chat template that knows tools and, with
    /// the variable `enable_thinking`, thoughts: for models of random weights, so that everything that takes text can be
    /// tried on them.
    ///
    /// # Errors
    /// If the vocabulary has fewer than 264 tokens.
    pub fn stand_in(vocabulary: usize) -> Result<Self, TokenizerError> {
        let name = "stand-in";
        let bytes = 256 + CONTROL.len();
        if vocabulary < bytes {
            return Err(TokenizerError::Invalid {
                file: name.into(),
                reason: format!("a vocabulary of {vocabulary} has no room for {bytes} tokens"),
            });
        }
        let mut vocab = Map::new();
        for byte in 0..=255_u8 {
            let c = char::from_u32(stand_in(byte)).unwrap_or_default();
            vocab.insert(c.to_string(), json!(byte));
        }
        let pairs = LETTERS.chars().flat_map(|a| LETTERS.chars().map(move |b| (a, b)));
        let mut merges = Vec::new();
        for (index, (a, b)) in pairs.take(vocabulary - bytes).enumerate() {
            vocab.insert(format!("{a}{b}"), json!(256 + index));
            merges.push(json!([a.to_string(), b.to_string()]));
        }
        // Behind the others: the library wants no gap before an added token.
        let first = vocab.len();
        let added: Vec<Value> = CONTROL
            .iter()
            .enumerate()
            .map(|(index, (text, special))| {
                json!({ "id": first + index, "content": text, "special": special, "single_word": false,
                        "lstrip": false, "rstrip": false, "normalized": false })
            })
            .collect();
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true },
            "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true },
            "model": { "type": "BPE", "vocab": vocab, "merges": merges },
        });
        let config = json!({ "eos_token": "<|im_end|>" });
        let parts = TokenizerParts {
            tokenizer: tokenizer.to_string().into_bytes(),
            tokenizer_config: Some(config.to_string().into_bytes()),
            generation_config: None,
            chat_template: Some(TEMPLATE.as_bytes().to_vec()),
        };
        Self::from_dir_parts(name, &parts)
    }
}

#[cfg(test)]
mod tests {
    use crate::chat::ChatTemplate;
    use crate::tokenizer::{EncodeOptions, Tokenizer};
    use serde_json::{Map, json};

    #[test]
    fn every_text_comes_back_and_a_conversation_is_whole() {
        let tokenizer = Tokenizer::stand_in(512).unwrap();
        let text = "the note, 東京 🚆 <tool_call> é\u{0}\n";
        let ids = tokenizer.encode(text, EncodeOptions::TEXT).unwrap();
        assert!(ids.iter().all(|&id| id < 512));
        assert_eq!(tokenizer.decode(&ids), text);
        assert!(Tokenizer::stand_in(100).is_err());

        let template = ChatTemplate::new(tokenizer.chat_template().unwrap()).unwrap();
        let call = json!({ "function": { "name": "look", "arguments": { "at": 3 } } });
        let messages = json!([
            { "role": "system", "content": "Be short." },
            { "role": "user", "content": "Hi" },
            { "role": "assistant", "content": "So.", "reasoning_content": "Hm", "tool_calls": [call] },
            { "role": "tool", "content": "4" },
        ]);
        let tools = json!([{ "type": "function", "function": { "name": "look" } }]);
        let said = template.render(&messages, Some(&tools), true, &Map::new()).unwrap();
        assert_eq!(
            said,
            "<|im_start|>tools\n{\"type\": \"function\", \"function\": {\"name\": \"look\"}}\nCall one so: <tool_call>\n\
             {\"name\": NAME, \"arguments\": {...}}\n</tool_call><|im_end|>\n<|im_start|>system\nBe short.<|im_end|>\n\
             <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nSo.\n<tool_call>\n{\"name\": \"look\", \"arguments\": \
             {\"at\": 3}}\n</tool_call><|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
        );
    }
}
