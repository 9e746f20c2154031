//! Replies as text: tokens decoded as they come, stop strings found across tokens.

use ampoule_engine::{EngineError, FinishReason, Generation, SlotId, StopRules};
use ampoule_models::tokenizer::{StopMatcher, StreamDecoder};

use crate::{Ampoule, Error};

/// When a reply ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyOptions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Strings that end it; they are no part of the text.
    pub stop: Vec<String>,
    /// Whether the model's end tokens are ignored.
    pub ignore_end: bool,
}

impl Default for ReplyOptions {
    fn default() -> Self {
        Self { max_tokens: 256, stop: Vec::new(), ignore_end: false }
    }
}

/// One step of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyStep {
    /// The token read, if there was one.
    pub token: Option<u32>,
    /// Text that is certain by now: whole characters, and no part of a stop string.
    pub text: String,
    /// Why the reply ended, if it has. There is no step after this one.
    pub finished: Option<FinishReason>,
}

/// A reply under way in a slot.
///
/// The slot always stands exactly after the tokens this reply has yielded, wherever it is broken off.
pub struct Reply {
    slot: SlotId,
    generation: Generation,
    decoder: StreamDecoder,
    matcher: StopMatcher,
    end_tokens: Vec<u32>,
    done: bool,
}

impl Reply {
    /// Starts a reply in a slot that has read its prompt.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn begin(model: &mut Ampoule, slot: SlotId, options: &ReplyOptions) -> Result<Self, Error> {
        let end_tokens = if options.ignore_end { Vec::new() } else { model.end_tokens() };
        let rules = StopRules { end_tokens: end_tokens.clone(), max_tokens: options.max_tokens };
        Ok(Self {
            slot,
            generation: Generation::begin(&mut model.engine, slot, rules)?,
            decoder: StreamDecoder::new(),
            matcher: StopMatcher::new(&options.stop),
            end_tokens,
            done: false,
        })
    }

    /// The next token and the text that became certain with it; `None` after the reply has ended.
    ///
    /// # Errors
    /// If the device fails or the slot has read nothing.
    pub fn step(&mut self, model: &mut Ampoule) -> Result<Option<ReplyStep>, Error> {
        if self.done {
            return Ok(None);
        }
        let token = self.generation.next(&mut model.engine, self.slot).map_err(|e: EngineError| Error::Engine(e))?;
        let mut text = String::new();
        // Of an end token the model sees the token, the reader nothing.
        if let Some(token) = token.filter(|t| !self.end_tokens.contains(t)) {
            let bytes = model.tokenizer.as_deref().and_then(|t| t.token_bytes(token)).unwrap_or_default();
            let passed = self.matcher.push(&self.decoder.push(bytes));
            text = passed.text;
            if passed.stopped.is_some() {
                self.generation.finish(FinishReason::Stop);
                self.done = true;
                return Ok(Some(ReplyStep { token: Some(token), text, finished: Some(FinishReason::Stop) }));
            }
        }
        let finished = self.generation.finished();
        if finished.is_some() {
            self.done = true;
            let passed = self.matcher.push(&self.decoder.finish());
            text.push_str(&passed.text);
            text.push_str(&self.matcher.finish());
        }
        Ok(Some(ReplyStep { token, text, finished }))
    }

    /// Runs to the end; returns tokens, text and reason.
    ///
    /// # Errors
    /// As [`Reply::step`].
    pub fn finish(mut self, model: &mut Ampoule) -> Result<(Vec<u32>, String, FinishReason), Error> {
        let (mut tokens, mut text) = (Vec::new(), String::new());
        let mut reason = FinishReason::Cancelled;
        while let Some(step) = self.step(model)? {
            tokens.extend(step.token);
            text.push_str(&step.text);
            reason = step.finished.unwrap_or(reason);
        }
        Ok((tokens, text, reason))
    }
}
