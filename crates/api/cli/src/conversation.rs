//! Conversations as text, and reading only what a template adds to it.

use ampoule::{Ampoule, EncodeOptions, EngineError, SlotId};
use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::commands::read;
use crate::output::Progress;

/// The stand-in for a history that is known as text alone.
const STAND_IN: &str = "ampoule-stand-in";

/// The messages of a conversation, perhaps after a text that came from a capsule.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    /// Text of the capsule that this conversation goes on from.
    pub before: Option<String>,
    /// What was said since.
    pub messages: Vec<Value>,
}

impl Conversation {
    /// Adds a message.
    pub(crate) fn push(&mut self, role: &str, content: &str) {
        self.messages.push(json!({ "role": role, "content": content }));
    }

    /// The whole text, up to where the model's reply begins.
    ///
    /// # Errors
    /// If the template refuses the conversation, or cannot continue a text that it has not made.
    pub(crate) fn prompt(&self, model: &Ampoule) -> anyhow::Result<String> {
        let Some(before) = &self.before else {
            return render(model, &self.messages, true);
        };
        // What the template adds does not depend on what was said before, in the templates there are; where it does,
        // the history that stands in is no prefix, and that is an error.
        let mut messages = vec![
            json!({ "role": "user", "content": STAND_IN }),
            json!({ "role": "assistant", "content": STAND_IN }),
        ];
        let history = render(model, &messages, false)?;
        messages.extend(self.messages.iter().cloned());
        let whole = render(model, &messages, true)?;
        let added = whole.strip_prefix(&history);
        let added = added.context(
            "this model's chat template rewrites history, so a loaded capsule cannot be continued as a chat",
        )?;
        let closing = history.rfind(STAND_IN).map_or("", |at| &history[at + STAND_IN.len()..]);
        Ok(format!("{}{added}", close(before, closing)))
    }
}

/// The text with as much of `closing` as it does not end with yet.
fn close(text: &str, closing: &str) -> String {
    let ends = closing.char_indices().map(|(at, c)| at + c.len_utf8()).chain([0]);
    let there = ends.filter(|&end| text.ends_with(&closing[..end])).max().unwrap_or(0);
    format!("{text}{}", &closing[there..])
}

fn render(model: &Ampoule, messages: &[Value], prompt: bool) -> anyhow::Result<String> {
    let messages = Value::Array(messages.to_vec());
    Ok(model.template()?.render(&messages, None, prompt, &Map::new())?)
}

/// How a text got into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Advance {
    /// Tokens that the slot held already and kept.
    pub cached: usize,
    /// Tokens that were read.
    pub read: usize,
}

/// Makes a slot that holds `seen` hold `wanted`, reading no token twice that need not be.
///
/// Where the template only added to the text, only the addition is read. Where it rewrote history, the slot goes back
/// to the last token that both texts have in common and reads on from there.
pub(crate) fn advance(
    model: &mut Ampoule,
    slot: SlotId,
    seen: &str,
    wanted: &str,
    progress: Progress,
) -> anyhow::Result<Advance> {
    let tokenizer = model.tokenizer()?.clone();
    if let Some(added) = wanted.strip_prefix(seen) {
        let tokens = tokenizer.encode(added, EncodeOptions::TEMPLATE)?;
        let cached = model.engine.position(slot)? as usize;
        read(model, slot, &tokens, progress)?;
        return Ok(Advance { cached, read: tokens.len() });
    }
    let tokens = tokenizer.encode(wanted, EncodeOptions::TEMPLATE)?;
    let held = model.engine.tokens(slot)?;
    let mut common = held.iter().zip(&tokens).take_while(|(h, t)| h == t).count();
    match model.engine.rollback(slot, common as u32) {
        Ok(()) => {}
        // A capsule from a file without a journal cannot be gone behind: read all of it.
        Err(EngineError::NoJournal { .. }) => {
            model.engine.reset(slot)?;
            common = 0;
        }
        Err(error) => return Err(error.into()),
    }
    read(model, slot, &tokens[common..], progress)?;
    Ok(Advance { cached: common, read: tokens.len() - common })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_is_added_once() {
        assert_eq!(close("hi", "<|im_end|>\n"), "hi<|im_end|>\n");
        assert_eq!(close("hi<|im_end|>", "<|im_end|>\n"), "hi<|im_end|>\n");
        assert_eq!(close("hi<|im_end|>\n", "<|im_end|>\n"), "hi<|im_end|>\n");
        assert_eq!(close("hi", ""), "hi");
    }
}
