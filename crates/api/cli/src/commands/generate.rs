//! `ampoule generate`: one prompt, one reply.

use std::time::Instant;

use ampoule::{
    Ampoule, CapsuleStore, EncodeOptions, FinishReason, Reply, ReplyOptions, SamplingParams, SlotId,
};
use anyhow::Context;
use serde::Serialize;

use super::{load, read, store};
use crate::args::{GenerateArgs, GlobalArgs};
use crate::conversation::{Conversation, advance};
use crate::output::{self, Progress, Usage, ms};

/// What a reply took.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Timing {
    /// Opening, checking and restoring the capsule; absent without one.
    pub restore_ms: Option<f64>,
    /// Reading the prompt.
    pub prefill_ms: f64,
    /// From the start of the restore or the reading to the first token.
    pub ttft_ms: Option<f64>,
    /// Mean over the tokens after the first.
    pub decode_ms_per_token: Option<f64>,
}

/// What `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Generated {
    pub model: String,
    /// Tokens of the prompt that were read.
    pub prompt_tokens: usize,
    /// Tokens that came from the restored capsule.
    pub cached_tokens: usize,
    /// Ids of the reply's tokens, the end token included.
    pub tokens: Vec<u32>,
    /// The reply as text; empty where the model has no tokenizer.
    pub text: String,
    pub finish_reason: FinishReason,
    pub timing: Timing,
    /// Where the state stands now: all tokens read, the reply's included.
    pub position: u32,
    /// Where the state was saved.
    pub saved: Option<Saved>,
}

/// What was written: a file, or what a store lacked.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Saved {
    /// The file, or the name in the store.
    pub path: String,
    /// Bytes written.
    pub bytes: u64,
}

pub(crate) fn run(args: &GenerateArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let text = prompt_text(args)?;
    let nothing = text.as_deref().is_none_or(str::is_empty) && args.tokens.is_none();
    if nothing && args.restore.is_none() {
        return Err(Usage(
            "the prompt is empty: give some text, or --restore a capsule".to_owned(),
        )
        .into());
    }
    // What could not be saved at the end is refused before the work.
    let store = match (&args.store.store, &args.save) {
        (None, Some(path)) => {
            ampoule::check_writable(path)?;
            None
        }
        (Some(_), Some(_)) => Some(store::open(&args.store)?),
        (Some(_), None) => Some(store::open_read_only(&args.store)?),
        (None, None) => None,
    };
    let progress = Progress::new(args.json);
    let mut model = load(&args.model.model, global, None, progress)?;
    model.engine.check_sampling(&args.sampling.over(&SamplingParams::default()))?;
    let slot = model.engine.create_slot()?;

    let start = Instant::now();
    let restore_ms = restore(&mut model, slot, args, store.as_ref())?;
    let cached = model.engine.position(slot)? as usize;
    let started = Instant::now();
    let prompt_tokens =
        read_prompt(&mut model, slot, args, text.as_deref().filter(|t| !t.is_empty()), progress)?;
    let prefill_ms = ms(started.elapsed());

    let options = ReplyOptions {
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ignore_end: args.ignore_end,
    };
    // Without a prompt the capsule's reply goes on: what it generated still counts as this reply.
    let mut reply = if nothing {
        Reply::resume(&model, slot, &options)?
    } else {
        Reply::begin(&mut model, slot, &options)?
    };
    let (mut tokens, mut said, mut reason) = (Vec::new(), String::new(), FinishReason::Cancelled);
    let mut first = None;
    while let Some(step) = reply.step(&mut model)? {
        if step.token.is_some() && first.is_none() {
            first = Some(Instant::now());
        }
        if !args.json {
            show(&model, &step, tokens.is_empty())?;
        }
        tokens.extend(step.token);
        said.push_str(&step.text);
        reason = step.finished.unwrap_or(reason);
    }
    let rest = first.map(|first| ms(first.elapsed()) / (tokens.len() - 1).max(1) as f64);
    let timing = Timing {
        restore_ms,
        prefill_ms,
        ttft_ms: first.map(|first| ms(first - start)),
        decode_ms_per_token: rest.filter(|_| tokens.len() > 1),
    };
    if !args.json && !tokens.is_empty() {
        output::line("")?;
    }
    if !args.json && reason == FinishReason::Context {
        let context = model.engine.context();
        output::note(format!(
            "the context of {context} tokens is full; --context N makes it longer"
        ));
    }
    // A reply is not lost because it cannot be saved.
    let (saved, unsaved) = match save(&mut model, slot, args, store.as_ref()) {
        Ok(saved) => (saved, None),
        Err(error) => (None, Some(error)),
    };
    if args.json {
        let position = model.engine.position(slot)?;
        let model = model.name().to_owned();
        output::json(&Generated {
            model,
            prompt_tokens,
            cached_tokens: cached,
            tokens,
            text: said,
            finish_reason: reason,
            timing,
            position,
            saved,
        })?;
        return unsaved.map_or(Ok(()), Err);
    }
    if let Some(saved) = saved {
        output::note(format!("saved {} ({})", saved.path, output::bytes(saved.bytes)));
    }
    unsaved.map_or(Ok(()), Err)
}

fn prompt_text(args: &GenerateArgs) -> anyhow::Result<Option<String>> {
    match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Ok(Some(text.clone())),
        (_, Some(path)) => Ok(Some(output::read_text(path)?)),
        _ => Ok(None),
    }
}

/// Restores the capsule asked for and sets the sampler; returns what the restore took.
fn restore(
    model: &mut Ampoule,
    slot: SlotId,
    args: &GenerateArgs,
    store: Option<&CapsuleStore>,
) -> anyhow::Result<Option<f64>> {
    let mut time = None;
    if let Some(path) = &args.restore {
        let start = Instant::now();
        let capsule = match store {
            Some(store) => store::fetch(store, model, name(path)?, Progress::new(args.json))?,
            None => model.open_capsule(path)?,
        };
        model.engine.restore(slot, &capsule)?;
        time = Some(ms(start.elapsed()));
    }
    if args.restore.is_none() || args.sampling.beyond_seed() {
        model.engine.configure(slot, &args.sampling.over(&SamplingParams::default()))?;
    } else if let Some(seed) = args.sampling.seed {
        model.engine.reseed(slot, seed)?;
    }
    Ok(time)
}

/// Reads the prompt; returns how many tokens it had.
fn read_prompt(
    model: &mut Ampoule,
    slot: SlotId,
    args: &GenerateArgs,
    text: Option<&str>,
    progress: Progress,
) -> anyhow::Result<usize> {
    let restored = args.restore.is_some();
    let tokens = match (&args.tokens, text) {
        (Some(tokens), _) => tokens.0.clone(),
        (None, None) => return Ok(0),
        (None, Some(text)) if args.chat => {
            let held = model.engine.tokens(slot)?;
            let seen = model.tokenizer()?.decode(&held);
            let before = restored.then(|| seen.clone());
            let mut conversation = Conversation { before, messages: Vec::new() };
            conversation.push("user", text);
            let wanted = conversation.prompt(model)?;
            return Ok(advance(model, slot, &seen, &wanted, progress)?.read);
        }
        // What follows a capsule is not the beginning of a text.
        (None, Some(text)) => {
            let options = EncodeOptions { add_special: !restored, parse_special: true };
            model.tokenizer()?.encode(text, options)?
        }
    };
    read(model, slot, &tokens, progress)?;
    Ok(tokens.len())
}

fn show(model: &Ampoule, step: &ampoule::ReplyStep, first: bool) -> anyhow::Result<()> {
    if model.tokenizer().is_ok() {
        return if step.text.is_empty() { Ok(()) } else { output::put(&step.text) };
    }
    let Some(token) = step.token else { return Ok(()) };
    output::put(&format!("{}{token}", if first { "" } else { " " }))
}

fn save(
    model: &mut Ampoule,
    slot: SlotId,
    args: &GenerateArgs,
    store: Option<&CapsuleStore>,
) -> anyhow::Result<Option<Saved>> {
    let Some(path) = &args.save else { return Ok(None) };
    let capsule = model.engine.snapshot(slot)?;
    let bytes = match store {
        Some(store) => {
            store::save(store, model, &capsule, name(path)?, Progress::new(args.json))?.written
        }
        None => model.save(&capsule, path)?,
    };
    Ok(Some(Saved { path: path.display().to_string(), bytes }))
}

/// A name in a store.
fn name(path: &std::path::Path) -> anyhow::Result<&str> {
    path.to_str().context("a capsule's name in a store is UTF-8")
}
