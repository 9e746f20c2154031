//! Sessions: what is said in them, and the ways back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ampoule::{Capsule, EncodeOptions, FinishReason};
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use super::capsules::named;
use super::{Answer, AppState, Caught, fields, forget, saved};
use crate::app::{App, Caller, Generation, Tally, blocking, new_id, now};
use crate::cache::Space;
use crate::error::{ApiError, ApiResult};
use crate::fields::Fields;
use crate::prompt::{ModelInfo, Prompt, messages};
use crate::sse::{self, Events};
use crate::vault::{LastReply, Mark, Session, SessionState};
use crate::worker::{End, OnEnd, Start};

/// Marks of a session at most: older ones go.
const MARKS: usize = 256;
const FORKS: u32 = 64;

/// A session of the caller's: in memory, or parked in the store.
pub(super) async fn session(app: &Arc<App>, caller: &Caller, id: &str) -> ApiResult<Arc<Session>> {
    match app.vault.session(&caller.key, id) {
        Some(session) => Ok(session),
        None => saved::fetch(app, caller, id).await,
    }
}

/// A session that this call alone works on.
struct Busy(Arc<Session>);

impl Busy {
    fn take(session: &Arc<Session>) -> ApiResult<Self> {
        let mut state = session.lock();
        if state.busy {
            return Err(ApiError::conflict(
                "another call is under way on this session; interrupt it or wait",
            ));
        }
        state.busy = true;
        drop(state);
        Ok(Self(Arc::clone(session)))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.busy = false;
        state.interrupt = None;
    }
}

pub(super) fn add_mark(
    state: &mut SessionState,
    kind: &str,
    capsule: Capsule,
    end_token: Option<u32>,
) -> String {
    let id = new_id("bnd_");
    let messages = state.messages.len();
    state.marks.push(Mark { id: id.clone(), kind: kind.to_owned(), capsule, end_token, messages });
    if state.marks.len() > MARKS {
        state.marks.remove(0);
    }
    id
}

pub(super) fn session_object(id: &str, session: &Session) -> Value {
    let state = session.lock();
    let marks: Vec<Value> = state
        .marks
        .iter()
        .map(|m| json!({ "id": m.id, "kind": m.kind, "position": m.capsule.position(), "messages": m.messages }))
        .collect();
    json!({
        "id": id, "object": "session", "created_at": session.created, "parent": session.parent,
        "position": state.capsule().map_or(0, Capsule::position), "busy": state.busy,
        "messages": state.messages.len(), "boundaries": marks,
        "reply_tokens": state.reply.as_ref().map(|reply| reply.tokens.len()),
    })
}

pub(crate) async fn list_sessions(State(app): AppState, Extension(caller): Caught) -> Answer {
    let all = app.vault.sessions(Some(&caller.key));
    let list: Vec<Value> = all.iter().map(|(id, s)| session_object(id, s)).collect();
    Ok(Json(json!({ "object": "list", "data": list })).into_response())
}

pub(crate) async fn create_session(
    State(app): AppState,
    Extension(caller): Caught,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let from = fields.text("capsule", 256)?;
    let tools = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
    fields.finish()?;
    ModelInfo::tools(tools.clone())?;
    app.vault.room_for_session(&caller.key, app.config.session_idle)?;
    let mut state = SessionState { tools, ..SessionState::default() };
    let mut parent = None;
    if let Some(which) = from {
        let (id, named) = named(&app, &caller, &which)?;
        add_mark(&mut state, "capsule", named.capsule, None);
        parent = Some(id);
    }
    let id = new_id("sess_");
    let session = Session::new(caller.key, now(), parent, state);
    saved::save(&app, &id, &session).await?;
    let session = app.vault.add_session(&id, session);
    Ok((StatusCode::CREATED, Json(session_object(&id, &session))).into_response())
}

pub(crate) async fn read_session(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let session = session(&app, &caller, &id).await?;
    Ok(Json(session_object(&id, &session)).into_response())
}

pub(crate) async fn delete_session(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let found = session(&app, &caller, &id).await?;
    app.vault.remove_session(&caller.key, &id);
    if let Some(interrupt) = &found.lock().interrupt {
        interrupt.store(true, Ordering::Relaxed);
    }
    forget(&app, "session", id.clone()).await?;
    Ok(Json(json!({ "id": id, "object": "session", "deleted": true })).into_response())
}

/// What a call adds to a session.
enum Input {
    Nothing,
    Text(String),
    Tokens(Vec<u32>),
    Messages(Vec<Value>),
}

impl Input {
    fn take(fields: &mut Fields) -> ApiResult<Self> {
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
fn read_input(
    info: &ModelInfo,
    space: &Space,
    state: &SessionState,
    input: &Input,
) -> ApiResult<Prompt> {
    let plain = |tokens: Vec<u32>| Prompt { marks: info.marks(&tokens), tokens, thinking: false };
    match input {
        Input::Nothing => Ok(Prompt::default()),
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
            let tools = ModelInfo::tools(state.tools.clone())?;
            let Some(mark) = state.marks.last() else {
                return info.chat(space, new, &tools, &Map::new());
            };
            let mut known = state.messages.clone();
            if known.last().is_none_or(|m| m["role"] != "assistant") {
                // A state that came as text or as a capsule: any conversation stands for it.
                known = vec![
                    json!({ "role": "user", "content": "stand-in" }),
                    json!({ "role": "assistant", "content": "stand-in" }),
                ];
            }
            let prompt =
                info.continuation(space, &known, new, &tools, &Map::new(), mark.end_token)?;
            prompt.ok_or_else(|| {
                ApiError::conflict("the chat template rewrites what was said before, so these messages cannot follow this state")
            })
        }
    }
}

/// Tells of a reply's end to its session, wherever the client is.
fn commit(busy: Arc<Busy>, info: Arc<ModelInfo>, input: Input, kind: &'static str) -> OnEnd {
    Box::new(move |end: ApiResult<End>| {
        let session = Arc::clone(&busy.0);
        if let Ok(end) = end {
            let mut state = session.lock();
            let chat = matches!(input, Input::Messages(_));
            if let Input::Messages(new) = input {
                state.messages.extend(new);
            }
            if let Some(asked) = end.asked
                && !end.reply.is_empty()
            {
                let start = asked.position();
                add_mark(&mut state, "input", asked, None);
                state.reply = Some(LastReply { start, tokens: end.reply.clone() });
            }
            if !end.reply.is_empty() && (chat || !state.messages.is_empty()) {
                let words: Vec<u32> =
                    end.reply.iter().copied().filter(|t| !info.tokenizer.is_eos(*t)).collect();
                state
                    .messages
                    .push(json!({ "role": "assistant", "content": info.tokenizer.decode(&words) }));
            }
            add_mark(&mut state, kind, end.capsule, end.eos);
        }
        // After the state has changed others may work on it.
        drop(busy);
    })
}

pub(crate) async fn append(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let input = Input::take(&mut fields)?;
    fields.finish()?;
    if matches!(input, Input::Nothing) {
        return Err(ApiError::param(
            "text",
            "there is nothing to append: give 'text', 'tokens' or 'messages'",
        ));
    }
    let mut wanted = app.wanted(&mut Fields::of(json!({}), "")?, &caller, &[], Some(0))?;
    wanted.reply.max_tokens = 0;
    let (mut generation, session, busy) =
        launch(&app, &caller, &id, input, wanted, "append").await?;
    let mut tally = Tally::new(&generation);
    while generation.step(&mut tally).await?.is_some() {}
    saved::save(&app, &id, &session).await?;
    drop(busy);
    Ok(Json(session_object(&id, &session)).into_response())
}

async fn launch(
    app: &Arc<App>,
    caller: &Caller,
    id: &str,
    input: Input,
    wanted: crate::app::Wanted,
    kind: &'static str,
) -> ApiResult<(Generation, Arc<Session>, Arc<Busy>)> {
    let permit = app.place()?;
    let session = session(app, caller, id).await?;
    let busy = Arc::new(Busy::take(&session)?);
    let (info, state) = (Arc::clone(&app.info), session.lock().clone());
    let space = wanted.space;
    let (prompt, input) = blocking(move || {
        let prompt = read_input(&info, &space, &state, &input)?;
        Ok((prompt, input))
    })
    .await?;
    let start = match session.lock().capsule() {
        Some(capsule) => Start::After(capsule.clone()),
        None => Start::Prompt { marks: prompt.marks },
    };
    let on_end = commit(Arc::clone(&busy), Arc::clone(&app.info), input, kind);
    let generation =
        app.generate(caller, permit, wanted, start, prompt.tokens, None, Some(on_end))?;
    session.lock().interrupt = Some(Arc::clone(&generation.interrupt));
    Ok((generation, session, busy))
}

pub(crate) async fn generate(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let input = Input::take(&mut fields)?;
    let wanted = app.wanted(&mut fields, &caller, &["max_tokens"], None)?;
    if wanted.choices != 1 {
        return Err(ApiError::unsupported("n", "fork the session instead"));
    }
    let stream = fields.take::<bool>("stream")?.unwrap_or(false);
    fields.finish()?;
    let (mut generation, session, busy) =
        launch(&app, &caller, &id, input, wanted, "reply").await?;
    let mut tally = Tally::new(&generation);
    let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), None);
    if !stream {
        while let Some(step) = generation.step(&mut tally).await? {
            if let Some(token) = step.token {
                tally.token(step.at, false);
                tokens.push(token);
            }
            text.push_str(&step.text);
            finish = step.finished.or(finish);
        }
        saved::save(&app, &id, &session).await?;
        drop(busy);
        let finish = finish.ok_or_else(ApiError::stopping)?;
        let mut object = reply_object(&id, &session, &tally, finish);
        object["text"] = json!(text);
        object["tokens"] = json!(tokens);
        return Ok(Json(object).into_response());
    }
    let sent = Arc::clone(&generation.sent);
    let (events, response) = sse::response(Arc::clone(&sent));
    tokio::spawn(async move {
        let delivered = deliver(&app, &id, &session, generation, &events).await;
        drop(events);
        if !delivered {
            // The reply may have ended before anybody saw that the client had gone. Its state has changed once the engine
            // has let go of the session; then it is cut to what went out.
            while Arc::strong_count(&busy) > 1 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let reply = session.lock().reply.clone();
            let sent = sent.load(Ordering::Acquire) as usize;
            if let Some(reply) = reply.filter(|reply| reply.tokens.len() > sent)
                && let Err(error) = shorten(&app, &session, &reply, sent).await
            {
                tracing::warn!(?error, "a session could not be cut to what was sent");
            }
            if let Err(error) = saved::save(&app, &id, &session).await {
                tracing::warn!(?error, "a session could not be saved");
            }
        }
        drop(busy);
    });
    Ok(response)
}

/// Sends a reply as events; false if the client went away before its end. The session is saved before the client is told
/// that the reply is complete.
async fn deliver(
    app: &Arc<App>,
    id: &str,
    session: &Session,
    mut generation: Generation,
    events: &Events,
) -> bool {
    let mut tally = Tally::new(&generation);
    let mut finish = None;
    loop {
        let step = match generation.step_for(events, &mut tally).await {
            None => return false,
            Some(Err(error)) => {
                events.event("error", &error.body(), 0).await;
                return true;
            }
            Some(Ok(None)) => break,
            Some(Ok(Some(step))) => step,
        };
        finish = step.finished.or(finish);
        if step.token.is_some() {
            tally.token(step.at, false);
        }
        if step.token.is_none() && step.text.is_empty() {
            continue;
        }
        let tokens: Vec<u32> = step.token.into_iter().collect();
        let delta = json!({ "text": step.text, "tokens": tokens });
        if !events.event("delta", &delta, tally.generated as u64).await {
            return false;
        }
    }
    let object = match (finish, saved::save(app, id, session).await) {
        (Some(finish), Ok(())) => reply_object(id, session, &tally, finish),
        (None, _) => ApiError::stopping().body(),
        (_, Err(error)) => error.body(),
    };
    events.event("done", &object, tally.generated as u64).await
}

fn reply_object(id: &str, session: &Session, tally: &Tally, finish: FinishReason) -> Value {
    let state = session.lock();
    let finish = match finish {
        FinishReason::Stop => "stop",
        FinishReason::Cancelled => "cancelled",
        _ => "length",
    };
    json!({
        "object": "session.reply", "session": id, "boundary": state.marks.last().map(|m| m.id.clone()),
        "position": state.capsule().map_or(0, Capsule::position), "finish_reason": finish,
        "usage": tally.usage(), "timings": tally.timings(),
    })
}

pub(crate) async fn interrupt(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let session = session(&app, &caller, &id).await?;
    let state = session.lock();
    let running = state.interrupt.as_ref().is_some_and(|interrupt| {
        interrupt.store(true, Ordering::Relaxed);
        true
    });
    Ok(Json(json!({ "id": id, "object": "session", "interrupted": running })).into_response())
}

/// How many tokens of a reply lie within a text that was heard.
fn heard(info: &ModelInfo, tokens: &[u32], text: &str) -> ApiResult<usize> {
    let whole = info.tokenizer.decode(tokens);
    if !whole.starts_with(text) {
        return Err(ApiError::param("heard_text", "'heard_text' is not how the last reply begins"));
    }
    let fits = |n: &usize| info.tokenizer.decode(&tokens[..*n]).len() <= text.len();
    Ok((0..=tokens.len()).rev().find(fits).unwrap_or(0))
}

pub(crate) async fn truncate(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let count = fields.take::<usize>("heard_tokens")?;
    let text = fields.text("heard_text", usize::MAX)?;
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let busy = Busy::take(&session)?;
    let reply = session.lock().reply.clone();
    let reply = reply.ok_or_else(|| ApiError::conflict("this session has no reply to truncate"))?;
    let kept = match (count, text) {
        (Some(count), None) if count <= reply.tokens.len() => count,
        (Some(_), None) => {
            let text = format!("the last reply has {} tokens", reply.tokens.len());
            return Err(ApiError::param("heard_tokens", text));
        }
        (None, Some(text)) => heard(&app.info, &reply.tokens, &text)?,
        _ => {
            return Err(ApiError::param(
                "heard_tokens",
                "give one of 'heard_tokens' and 'heard_text'",
            ));
        }
    };
    shorten(&app, &session, &reply, kept).await?;
    saved::save(&app, &id, &session).await?;
    drop(busy);
    let mut object = session_object(&id, &session);
    object["heard_tokens"] = json!(kept);
    Ok(Json(object).into_response())
}

/// Cuts the last reply to its first tokens.
async fn shorten(
    app: &Arc<App>,
    session: &Arc<Session>,
    reply: &LastReply,
    kept: usize,
) -> ApiResult<()> {
    back_to(app, session, reply.start + kept as u32, "truncate").await?;
    let mut state = session.lock();
    let tokens = reply.tokens[..kept].to_vec();
    if let Some(last) = state.messages.last_mut().filter(|m| m["role"] == "assistant") {
        last["content"] = json!(app.info.tokenizer.decode(&tokens));
    }
    // The boundary was made before the message was known to be there.
    let known = state.messages.len();
    if let Some(mark) = state.marks.last_mut() {
        mark.messages = known;
    }
    state.reply = Some(LastReply { start: reply.start, tokens });
    Ok(())
}

/// Rolls a session back to a position of its own branch.
async fn back_to(
    app: &Arc<App>,
    session: &Arc<Session>,
    position: u32,
    kind: &'static str,
) -> ApiResult<()> {
    let head = session.lock().capsule().cloned();
    let head = head.ok_or_else(|| ApiError::conflict("this session is empty"))?;
    if position > head.position() {
        let text = format!("the session stands at {}", head.position());
        return Err(ApiError::param("tokens", text));
    }
    let capsule = app
        .call(move |worker| {
            if position == 0 {
                return Ok(None);
            }
            worker.with_slot(Some(&head), |worker, slot| {
                worker.model.engine.rollback(slot, position)?;
                worker.snapshot(slot)?.map(Some).ok_or_else(ApiError::no_room)
            })
        })
        .await?;
    let mut state = session.lock();
    state.marks.retain(|m| m.capsule.position() < position);
    if let Some(capsule) = capsule {
        add_mark(&mut state, kind, capsule, None);
    }
    Ok(())
}

pub(crate) async fn rollback(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let boundary = fields.text("boundary", 256)?;
    let message = fields.take::<usize>("message")?;
    let tokens = fields.take::<u32>("tokens")?;
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let busy = Busy::take(&session)?;
    let to_mark = |state: &mut SessionState, at: usize| {
        state.marks.truncate(at + 1);
        let known = state.marks.last().map_or(0, |m| m.messages);
        state.messages.truncate(known);
        state.reply = None;
    };
    match (boundary, message, tokens) {
        (Some(boundary), None, None) => {
            let mut state = session.lock();
            let at = state.marks.iter().position(|m| m.id == boundary);
            let at = at.ok_or_else(|| ApiError::not_found("boundary"))?;
            to_mark(&mut state, at);
        }
        (None, Some(message), None) => {
            let mut state = session.lock();
            let at = state.marks.iter().rposition(|m| m.messages == message && m.kind != "input");
            let at = at.ok_or_else(|| {
                ApiError::param(
                    "message",
                    "no boundary of this session lies after so many messages",
                )
            })?;
            to_mark(&mut state, at);
        }
        (None, None, Some(tokens)) => {
            back_to(&app, &session, tokens, "rollback").await?;
            let mut state = session.lock();
            state.reply = None;
            // What was said is known only up to a boundary.
            let known = state.marks.iter().rev().nth(1).map_or(0, |m| m.messages);
            state.messages.truncate(known);
        }
        _ => {
            return Err(ApiError::param(
                "boundary",
                "give one of 'boundary', 'message' and 'tokens'",
            ));
        }
    }
    saved::save(&app, &id, &session).await?;
    drop(busy);
    Ok(Json(session_object(&id, &session)).into_response())
}

pub(crate) async fn fork(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let count = fields.within("n", 1..=FORKS)?.unwrap_or(1);
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let busy = Busy::take(&session)?;
    let mut state = session.lock().clone();
    drop(busy);
    (state.busy, state.interrupt) = (false, None);
    let mut list = Vec::new();
    for _ in 0..count {
        let new = new_id("sess_");
        app.vault.room_for_session(&caller.key, app.config.session_idle)?;
        let fork = Session::new(caller.key, now(), Some(id.clone()), state.clone());
        saved::save(&app, &new, &fork).await?;
        let fork = app.vault.add_session(&new, fork);
        list.push(session_object(&new, &fork));
    }
    Ok((StatusCode::CREATED, Json(json!({ "object": "list", "data": list }))).into_response())
}

pub(crate) async fn restore(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let which: String = fields.require("capsule")?;
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let (_, named) = named(&app, &caller, &which)?;
    let busy = Busy::take(&session)?;
    {
        let mut state = session.lock();
        state.marks.clear();
        state.messages.clear();
        state.reply = None;
        add_mark(&mut state, "capsule", named.capsule, None);
    }
    saved::save(&app, &id, &session).await?;
    drop(busy);
    Ok(Json(session_object(&id, &session)).into_response())
}
