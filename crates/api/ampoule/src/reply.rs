//! Replies as text: tokens decoded as they come, stop strings found across tokens.

use ampoule_engine::{FinishReason, SlotId};
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
    decoder: StreamDecoder,
    matcher: StopMatcher,
    end_tokens: Vec<u32>,
    max_tokens: usize,
    generated: usize,
    done: bool,
}

impl Reply {
    /// Starts a reply in a slot that has read its prompt.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn begin(model: &mut Ampoule, slot: SlotId, options: &ReplyOptions) -> Result<Self, Error> {
        model.engine.begin_reply(slot)?;
        Self::resume(model, slot, options)
    }

    /// Goes on with the reply that the slot's state is in the middle of: what was generated still counts as this
    /// reply for the presence and frequency penalties. `max_tokens` counts from here.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn resume(model: &Ampoule, slot: SlotId, options: &ReplyOptions) -> Result<Self, Error> {
        model.engine.position(slot)?;
        Ok(Self {
            slot,
            decoder: StreamDecoder::new(),
            matcher: StopMatcher::new(&options.stop),
            end_tokens: if options.ignore_end { Vec::new() } else { model.end_tokens() },
            max_tokens: options.max_tokens,
            generated: 0,
            done: false,
        })
    }

    /// The next token and the text that became certain with it; `None` after the reply has ended.
    ///
    /// # Errors
    /// If the device fails or the slot has read nothing.
    pub fn step(&mut self, model: &mut Ampoule) -> Result<Option<ReplyStep>, Error> {
        self.step_with(model, |model, slot| Ok(model.engine.step(slot)?))
    }

    /// As [`Reply::step`], with only the tokens that `allowed` holds for; see [`Ampoule::step_where`].
    ///
    /// # Errors
    /// As [`Ampoule::step_where`].
    pub fn step_where(
        &mut self,
        model: &mut Ampoule,
        allowed: &dyn Fn(u32) -> bool,
    ) -> Result<Option<ReplyStep>, Error> {
        self.step_with(model, |model, slot| model.step_where(slot, allowed))
    }

    /// The first step of a reply whose first token is known by [`Ampoule::first_draw`], before that token is read: what it
    /// says. If the step has a token it must be read by
    /// [`Engine::step_forced`](crate::Engine::step_forced) before anything else is done with the slot.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn announce(&mut self, model: &Ampoule, token: u32) -> Result<ReplyStep, Error> {
        let (token, finished) = match self.over(model)? {
            Some(reason) => (None, Some(reason)),
            None => (Some(token), None),
        };
        Ok(self.take(model, token, finished))
    }

    fn step_with(
        &mut self,
        model: &mut Ampoule,
        draw: impl FnOnce(&mut Ampoule, SlotId) -> Result<u32, Error>,
    ) -> Result<Option<ReplyStep>, Error> {
        if self.done {
            return Ok(None);
        }
        let (token, finished) = match self.over(model)? {
            Some(reason) => (None, Some(reason)),
            None => (Some(draw(model, self.slot)?), None),
        };
        Ok(Some(self.take(model, token, finished)))
    }

    /// Why there can be no further token, if so.
    fn over(&self, model: &Ampoule) -> Result<Option<FinishReason>, Error> {
        Ok(if self.generated >= self.max_tokens {
            Some(FinishReason::Length)
        } else if model.engine.position(self.slot)? as usize >= model.engine.context() {
            Some(FinishReason::Context)
        } else {
            None
        })
    }

    fn take(
        &mut self,
        model: &Ampoule,
        token: Option<u32>,
        mut finished: Option<FinishReason>,
    ) -> ReplyStep {
        self.generated += usize::from(token.is_some());
        let mut text = String::new();
        match token {
            // Of an end token the model sees the token, the reader nothing.
            Some(token) if self.end_tokens.contains(&token) => finished = Some(FinishReason::Stop),
            Some(token) => {
                let bytes = model.tokenizer.as_deref().and_then(|t| t.token_bytes(token));
                let passed = self.matcher.push(&self.decoder.push(bytes.unwrap_or_default()));
                text = passed.text;
                if passed.stopped.is_some() {
                    finished = Some(FinishReason::Stop);
                    self.done = true;
                    return ReplyStep { token: Some(token), text, finished };
                }
            }
            None => {}
        }
        if finished.is_some() {
            self.done = true;
            let passed = self.matcher.push(&self.decoder.finish());
            text.push_str(&passed.text);
            text.push_str(&self.matcher.finish());
        }
        ReplyStep { token, text, finished }
    }

    /// Runs to the end; returns tokens, text and reason.
    ///
    /// # Errors
    /// As [`Reply::step`].
    pub fn finish(
        mut self,
        model: &mut Ampoule,
    ) -> Result<(Vec<u32>, String, FinishReason), Error> {
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
