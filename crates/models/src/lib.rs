//! Weights to plans: model families, file readers, tokenizer, chat template.
