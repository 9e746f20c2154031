//! The files of `assets/ampoule-nano`, as bytes within the program: a Hugging Face folder of the Qwen3.5 family, 25.5 MB
//! of weights in bf16. `docs/nano.md` is its datasheet.
//!
//! A crate of its own, so that these bytes are compiled once and nothing else is compiled with them. The weights lie in
//! the program's read-only data: the system reads them from its file page by page, when they are first touched.
#![no_std]
#![forbid(unsafe_code)]

/// `config.json`.
pub static CONFIG: &[u8] = include_bytes!("../../../assets/ampoule-nano/config.json");

/// `model.safetensors`.
pub static WEIGHTS: &[u8] = include_bytes!("../../../assets/ampoule-nano/model.safetensors");

/// `tokenizer.json`.
pub static TOKENIZER: &[u8] = include_bytes!("../../../assets/ampoule-nano/tokenizer.json");

/// `tokenizer_config.json`, with the chat template.
pub static TOKENIZER_CONFIG: &[u8] =
    include_bytes!("../../../assets/ampoule-nano/tokenizer_config.json");

/// `generation_config.json`.
pub static GENERATION_CONFIG: &[u8] =
    include_bytes!("../../../assets/ampoule-nano/generation_config.json");
