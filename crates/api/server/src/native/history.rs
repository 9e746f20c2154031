//! What was said in a session, and where each message lies in its state.

use std::sync::Arc;

use ampoule::Capsule;
use axum::extract::{Path, State};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::input::added;
use super::sessions::session;
use super::{Answer, AppState, Caught};
use crate::app::blocking;
use crate::cache::Space;
use crate::error::{ApiError, ApiResult};
use crate::prompt::ModelInfo;
use crate::vault::{Listed, MessageEnd, Session, SessionState, lock};

/// Messages in the middle of a call whose places are looked for in one listing: each takes a rendering of those before it.
const LOOKED_FOR: usize = 256;

/// Where the first `message` messages of a session end.
pub(super) fn message_end(
    info: &ModelInfo,
    space: &Space,
    state: &SessionState,
    message: usize,
) -> ApiResult<MessageEnd> {
    let end = |count: usize| match count {
        0 => Some(MessageEnd { position: state.origin, closed: false }),
        _ => state.ends.get(count - 1).copied().flatten(),
    };
    if let Some(end) = end(message) {
        return Ok(end);
    }
    // It came with others in one call: what the template made of it and those before it is read in the state.
    let found = (0..message).rev().find_map(|count| Some((count, end(count)?)));
    let (known, from) = found.ok_or_else(ApiError::internal)?;
    let tokens = state.capsule().map(Capsule::tokens).unwrap_or_default();
    let at = from.position as usize;
    let last = at.checked_sub(1).and_then(|last| tokens.get(last)).copied();
    let ends = last.map(|token| (Some(token).filter(|t| info.tokenizer.is_eos(*t)), from.closed));
    let new = &state.messages[known..message];
    let prompt = added(info, space, state, known, ends, new, false)?;
    match (prompt, tokens.get(at..)) {
        (Some(prompt), Some(read)) if read.starts_with(&prompt.tokens) => {
            let position = from.position + prompt.tokens.len() as u32;
            Ok(MessageEnd { position, closed: true })
        }
        _ => Err(ApiError::conflict(format!(
            "message {message} came with others in one call, and the chat template writes it otherwise where it is the last; \
             roll back to {known}, where that call began"
        ))),
    }
}

/// Where each message ends, so far as that can be told.
fn ends(info: &ModelInfo, space: &Space, state: &mut SessionState) -> Vec<Option<u32>> {
    let mut left = LOOKED_FOR;
    let mut out = Vec::with_capacity(state.messages.len());
    for count in 1..=state.messages.len() {
        let known = state.ends.get(count - 1).copied().flatten();
        let end = known.or_else(|| {
            left = left.checked_sub(1)?;
            message_end(info, space, state, count).ok()
        });
        // The next one is looked for from here.
        if let Some(slot) = state.ends.get_mut(count - 1) {
            *slot = end;
        }
        out.push(end.map(|end| end.position));
    }
    out
}

/// As [`ends`], which are looked for once in a session that stays as it is.
fn ends_listed(
    info: &ModelInfo,
    space: &Space,
    session: &Session,
    state: &mut SessionState,
) -> Vec<Option<u32>> {
    let Some(mark) = state.marks.last().map(|mark| mark.id.clone()) else {
        return ends(info, space, state);
    };
    let count = state.messages.len();
    // Held while they are looked for: who asks at the same time gets what is found.
    let mut listed = lock(&session.listed);
    if let Some(listed) = listed.as_ref()
        && listed.mark == mark
        && listed.ends.len() == count
    {
        return listed.ends.clone();
    }
    let found = ends(info, space, state);
    *listed = Some(Listed { mark, ends: found.clone() });
    found
}

/// A message as clients write it.
fn shown(message: &Value) -> Value {
    let mut message = message.clone();
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let arguments = &mut call["function"]["arguments"];
        if !arguments.is_string() {
            *arguments = json!(arguments.to_string());
        }
    }
    message
}

pub(crate) async fn list_messages(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let session = session(&app, &caller, &id).await?;
    let mut state = session.lock().clone();
    let (info, space) = (Arc::clone(&app.info), caller.space(None));
    let list = blocking(move || {
        let mut start = Some(state.origin);
        let ends = ends_listed(&info, &space, &session, &mut state);
        let place = |(index, (message, end)): (usize, (&Value, Option<u32>))| {
            let mut object = shown(message);
            object["object"] = json!("session.message");
            object["message"] = json!(index + 1);
            object["start"] = json!(start);
            object["end"] = json!(end);
            start = end;
            object
        };
        let list = state.messages.iter().zip(ends).enumerate().map(place);
        Ok(json!({ "object": "list", "data": list.collect::<Vec<_>>() }))
    });
    Ok(Json(list.await?).into_response())
}
