//! Weights to plans: model families, file readers, tokenizer, chat template.
#![deny(unsafe_code)]

pub mod chat;
pub mod decoder;
pub mod error;
pub mod gguf;
pub mod llama;
pub mod mapped;
pub mod model;
pub mod qwen35;
pub mod random;
pub mod source;
pub mod tensors;
pub mod tokenizer;
pub mod weights;
pub mod weights_dir;
