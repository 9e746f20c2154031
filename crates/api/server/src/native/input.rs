//! What calls add to sessions, and what they call it.

use ampoule::EncodeOptions;
use serde_json::{Map, Value, json};

use crate::cache::Space;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, Hints};
use crate::prompt::{Before, ModelInfo, Prompt, messages};
use crate::vault::SessionState;

/// Names that calls on sessions do not have.
pub(super) const HINTS: Hints = &[
    ("prompt", "sessions take 'text', 'tokens' or 'messages'"),
    ("input", "sessions take 'text', 'tokens' or 'messages'"),
    ("content", "sessions take 'text', 'tokens' or 'messages'"),
    ("message", "sessions take 'messages', a list"),
    ("max_output_tokens", "sessions take 'max_tokens'"),
    ("max_completion_tokens", "sessions take 'max_tokens'"),
    ("n_predict", "sessions take 'max_tokens'"),
    ("system", "sessions take a message of the role 'system' in 'messages'"),
    ("tools", "tools are given when the session is made"),
    ("response_format", "formats are for /v1/chat/completions and /v1/responses"),
    ("logprobs", "log probabilities are for the other APIs"),
];
pub(super) const CREATE: Hints = &[
    ("name", "a session has no name; 'capsule' is the id or name of what it begins with"),
    ("id", "the server gives ids; 'capsule' is the id or name of what the session begins with"),
    ("messages", "a session begins empty or with 'capsule'; /append and /generate take 'messages'"),
    ("text", "a session begins empty or with 'capsule'; /append and /generate take 'text'"),
    ("prompt", "a session begins empty or with 'capsule'; /append and /generate take 'text'"),
];
pub(super) const TRUNCATE: Hints = &[
    ("text", "truncate takes 'heard_text' or 'heard_tokens'"),
    ("tokens", "truncate takes 'heard_tokens' or 'heard_text'"),
    ("heard", "truncate takes 'heard_text' or 'heard_tokens'"),
];
pub(super) const ROLLBACK: Hints = &[
    ("messages", "rollback takes 'message': how many messages stay"),
    ("position", "rollback takes 'tokens': how many tokens stay"),
    ("token", "rollback takes 'tokens': how many tokens stay"),
    ("id", "rollback takes 'boundary', 'message' or 'tokens'"),
    ("capsule", "a session goes to a capsule by /restore"),
];
pub(super) const FORK: Hints = &[("count", "fork takes 'n'"), ("forks", "fork takes 'n'")];
pub(super) const RESTORE: Hints = &[
    ("id", "restore takes 'capsule': an id or a name"),
    ("name", "restore takes 'capsule': an id or a name"),
];

/// What a call adds to a session.
pub(super) enum Input {
    Nothing,
    Text(String),
    Tokens(Vec<u32>),
    Messages(Vec<Value>),
}

impl Input {
    pub(super) fn take(fields: &mut Fields) -> ApiResult<Self> {
        let text = fields.text("text", usize::MAX)?;
        let tokens = fields.take::<Vec<u32>>("tokens")?;
        let list = fields.take::<Vec<Value>>("messages")?;
        match (text, tokens, list) {
            (None, None, None) => Ok(Self::Nothing),
            (Some(text), None, None) => Ok(Self::Text(text)),
            (None, Some(tokens), None) => Ok(Self::Tokens(tokens)),
            (None, None, Some(list)) => Ok(Self::Messages(messages(list)?)),
            _ => Err(ApiError::param("text", "give one of 'text', 'tokens' and 'messages'")),
        }
    }
}

/// The tokens that an input is in a session's state.
pub(super) fn read_input(
    info: &ModelInfo,
    space: &Space,
    state: &SessionState,
    input: &Input,
) -> ApiResult<Prompt> {
    let plain = |tokens: Vec<u32>| Prompt { marks: info.marks(&tokens), tokens, thinking: false };
    match input {
        // Behind a message that was gone back to: what opens a reply.
        Input::Nothing => match state.marks.last() {
            Some(mark) if mark.closed => {
                let end = Some((mark.end_token, true));
                let opened = added(info, space, state, state.messages.len(), end, &[], true)?;
                opened.ok_or_else(|| {
                    ApiError::conflict("the chat template opens no reply here; give 'messages'")
                })
            }
            _ => Ok(Prompt::default()),
        },
        Input::Tokens(tokens) => {
            info.known(tokens, "tokens")?;
            Ok(plain(tokens.clone()))
        }
        Input::Text(text) => {
            let first = state.capsule().is_none();
            let options = EncodeOptions { add_special: first, parse_special: true };
            Ok(plain(info.tokenizer.encode(text, options).map_err(ampoule::Error::from)?))
        }
        Input::Messages(new) => {
            let last = state.marks.last();
            let end = last.map(|mark| (mark.end_token, mark.closed));
            added(info, space, state, state.messages.len(), end, new, true)?.ok_or_else(|| {
                ApiError::conflict("the chat template rewrites what was said before, so these messages cannot follow this state")
            })
        }
    }
}

/// What the template adds for `new` messages to a session's state after its first `known` ones, and for the reply to them if
/// `reply`. `end` is how that state ends: the end token of a reply, and whether a message is whole there; `None` where it is
/// empty.
pub(super) fn added(
    info: &ModelInfo,
    space: &Space,
    state: &SessionState,
    known: usize,
    end: Option<(Option<u32>, bool)>,
    new: &[Value],
    reply: bool,
) -> ApiResult<Option<Prompt>> {
    let tools = ModelInfo::tools(state.tools.clone())?;
    let known = &state.messages[..known];
    // A state that came as text or as a capsule: any conversation stands for it.
    let stand_in = [
        json!({ "role": "user", "content": "stand-in" }),
        json!({ "role": "assistant", "content": "stand-in" }),
    ];
    let before = match end {
        None => Before::Nothing,
        Some((_, true)) => Before::Message(known),
        Some((token, false)) => {
            let replied = known.last().is_some_and(|m| m["role"] == "assistant");
            Before::Reply(if replied { known } else { &stand_in }, token)
        }
    };
    info.added(space, before, new, &tools, &Map::new(), reply)
}
