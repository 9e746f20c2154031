//! A reply, token by token, until something stops it.

use serde::Serialize;

use crate::{Engine, EngineError, SlotId};

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// An end token was drawn, or a stop string found.
    Stop,
    /// The most tokens asked for were generated.
    Length,
    /// The context is full.
    Context,
    /// Whoever asked gave up.
    Cancelled,
}

/// When a reply ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopRules {
    /// Tokens that end it. They are read into the state, but are no part of the text.
    pub end_tokens: Vec<u32>,
    /// Tokens to generate at most.
    pub max_tokens: usize,
}

/// One reply under way. Every token it yields has been read into the slot, so the slot always stands exactly at what
/// was generated, wherever the reply is broken off.
#[derive(Debug)]
pub struct Generation {
    rules: StopRules,
    generated: usize,
    finished: Option<FinishReason>,
}

impl Generation {
    /// Starts a reply in the slot.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn begin(engine: &mut Engine, slot: SlotId, rules: StopRules) -> Result<Self, EngineError> {
        engine.begin_reply(slot)?;
        Ok(Self { rules, generated: 0, finished: None })
    }

    /// The next token, or `None` where the reply has ended; [`Generation::finished`] then says why.
    ///
    /// # Errors
    /// If the device fails or nothing has been read yet.
    pub fn next(&mut self, engine: &mut Engine, slot: SlotId) -> Result<Option<u32>, EngineError> {
        if self.finished.is_some() {
            return Ok(None);
        }
        if self.generated >= self.rules.max_tokens {
            self.finished = Some(FinishReason::Length);
            return Ok(None);
        }
        if engine.position(slot)? as usize >= engine.context() {
            self.finished = Some(FinishReason::Context);
            return Ok(None);
        }
        let token = engine.step(slot)?;
        self.generated += 1;
        if self.rules.end_tokens.contains(&token) {
            self.finished = Some(FinishReason::Stop);
        }
        Ok(Some(token))
    }

    /// Ends the reply from outside: a stop string was found, or whoever asked gave up.
    pub const fn finish(&mut self, reason: FinishReason) {
        if self.finished.is_none() {
            self.finished = Some(reason);
        }
    }

    /// Why the reply ended, if it has.
    pub const fn finished(&self) -> Option<FinishReason> {
        self.finished
    }

    /// Tokens generated so far, the end token included.
    pub const fn generated(&self) -> usize {
        self.generated
    }
}
