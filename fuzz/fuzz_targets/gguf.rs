//! GGUF from bytes: whatever opens has tensors of the size that they claim, and a tokenizer that does not panic.
#![no_main]

use ampoule_models::chat::ChatTemplate;
use ampoule_models::gguf::GgufFile;
use ampoule_models::tensors::TensorSource;
use ampoule_models::tokenizer::{EncodeOptions, Tokenizer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let file = match GgufFile::from_bytes("fuzz.gguf", data.to_vec()) {
        Ok(file) => file,
        Err(error) => {
            assert!(error.to_string().contains("fuzz.gguf"));
            return;
        }
    };
    let mut ranges = Vec::new();
    for name in file.names() {
        let view = file.tensor(name).expect("a name that the file lists");
        let elements = view.shape.iter().product();
        assert_eq!(view.dtype.bytes_for(elements), Some(view.bytes.len()));
        ranges.push(view.bytes.as_ptr_range());
    }
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "tensors share bytes");
    file.digest();
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        for text in
            ["ab 12 <|im_end|>\n", &String::from_utf8_lossy(&data[data.len().saturating_sub(64)..])]
        {
            for options in [EncodeOptions::TEXT, EncodeOptions::PROMPT] {
                if let Ok(ids) = tokenizer.encode(text, options) {
                    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                    tokenizer.decode(&ids);
                }
            }
        }
        // Compiled only: a template that runs for hours is a slow template, not a fault of the reader.
        let _ = tokenizer.chat_template().map(ChatTemplate::new);
    }
});
