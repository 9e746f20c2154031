//! `ampoule tokenize` and `ampoule detokenize`.

use ampoule::{Ampoule, EncodeOptions};
use anyhow::ensure;
use serde::Serialize;

use crate::args::{DetokenizeArgs, TokenList, TokenizeArgs};
use crate::output;

#[derive(Debug, Serialize)]
struct Tokenized {
    count: usize,
    tokens: Vec<u32>,
    /// Each token's text; bytes that are no whole characters become U+FFFD.
    pieces: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Detokenized {
    text: String,
}

pub(crate) fn tokenize(args: &TokenizeArgs) -> anyhow::Result<()> {
    let text = match (&args.text, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => output::read_text(path)?,
        (None, None) => String::new(),
    };
    let tokenizer = Ampoule::tokenizer_of(&args.model.model.resolve()?)?;
    let options = EncodeOptions { add_special: args.special, parse_special: args.special };
    let tokens = tokenizer.encode(&text, options)?;
    if !args.json {
        return output::line(TokenList(tokens).to_string());
    }
    let pieces = tokens.iter().map(|&t| tokenizer.decode(&[t])).collect();
    output::json(&Tokenized { count: tokens.len(), tokens, pieces })
}

pub(crate) fn detokenize(args: &DetokenizeArgs) -> anyhow::Result<()> {
    let tokenizer = Ampoule::tokenizer_of(&args.model.model.resolve()?)?;
    let tokens = &args.tokens.0;
    if let Some(&token) = tokens.iter().find(|&&t| tokenizer.token_bytes(t).is_none()) {
        let size = tokenizer.vocab_size();
        ensure!((token as usize) < size, "token {token} is outside the vocabulary of {size}");
    }
    let text = tokenizer.decode(tokens);
    if args.json { output::json(&Detokenized { text }) } else { output::line(text) }
}
