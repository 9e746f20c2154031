//! Sessions: what is said in them, and the ways back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ampoule::{Capsule, FinishReason};
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::heard::heard;
use super::history::message_end;
use super::input::{CREATE, FORK, HINTS, Input, RESTORE, ROLLBACK, TRUNCATE, read_input};
use super::shelf::found;
use super::{Answer, AppState, Caught, fields, forget, nothing, saved, to_the_end};
use crate::app::{App, Caller, Generation, Tally, Wanted, blocking, new_id, now};
use crate::error::{ApiError, ApiResult};
use crate::fields::Fields;
use crate::prompt::ModelInfo;
use crate::sse::{self, Events};
use crate::vault::{LastReply, Mark, MessageEnd, Parked, Session, SessionState};
use crate::worker::{End, OnEnd, Start, Step};

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
    closed: bool,
) {
    let (id, kind, messages) = (new_id("bnd_"), kind.to_owned(), state.messages.len());
    let mark = Mark { id, kind, capsule, end_token, messages, closed, waypoints: None };
    state.marks.push(mark);
    if state.marks.len() > MARKS {
        state.marks.remove(0);
    }
}

/// Makes a session one that begins with a capsule.
fn begin_with(state: &mut SessionState, capsule: Capsule) {
    state.marks.clear();
    state.cut_messages(0);
    state.reply = None;
    state.origin = capsule.position();
    add_mark(state, "capsule", capsule, None, false);
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

/// One that lies in the store alone: its boundaries are known when it is called.
fn parked_object(id: &str, parked: &Parked) -> Value {
    json!({
        "id": id, "object": "session", "created_at": parked.created, "parent": parked.parent,
        "position": parked.position, "busy": false, "messages": parked.messages, "boundaries": [],
        "reply_tokens": parked.reply_tokens,
    })
}

pub(crate) async fn list_sessions(State(app): AppState, Extension(caller): Caught) -> Answer {
    let (here, parked) = app.vault.sessions(&caller.key);
    let here = here.iter().map(|(id, s)| (s.created, id, session_object(id, s)));
    let parked = parked.iter().map(|(id, p)| (p.created, id, parked_object(id, p)));
    let mut all: Vec<(u64, &String, Value)> = here.chain(parked).collect();
    all.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
    let list: Vec<Value> = all.into_iter().map(|(_, _, object)| object).collect();
    Ok(Json(json!({ "object": "list", "data": list })).into_response())
}

pub(crate) async fn create_session(
    State(app): AppState,
    Extension(caller): Caught,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(CREATE);
    let from = fields.text("capsule", 256)?;
    let tools = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
    fields.finish()?;
    ModelInfo::tools(tools.clone())?;
    app.vault.room_for_session(&caller.key, app.config.session_idle)?;
    let mut state = SessionState { tools, ..SessionState::default() };
    let mut parent = None;
    if let Some(which) = from {
        let (id, capsule) = found(&app, &caller, &which).await?;
        begin_with(&mut state, capsule);
        parent = Some(id);
    }
    let id = new_id("sess_");
    let session = add(&app, &id, Session::new(caller.key, now(), parent, state)).await?;
    Ok((StatusCode::CREATED, Json(session_object(&id, &session))).into_response())
}

/// Adds a session, which the store has by then, where there is one.
async fn add(app: &Arc<App>, id: &str, session: Session) -> ApiResult<Arc<Session>> {
    let (app, id) = (Arc::clone(app), id.to_owned());
    to_the_end(async move {
        saved::save(&app, &id, &session).await?;
        Ok(app.vault.add_session(&id, session))
    })
    .await
}

/// Saves a session that a call has changed, and lets others have it.
async fn save_and_free(
    app: &Arc<App>,
    id: &str,
    session: &Arc<Session>,
    busy: Busy,
) -> ApiResult<()> {
    let (app, id, session) = (Arc::clone(app), id.to_owned(), Arc::clone(session));
    to_the_end(async move {
        let saved = saved::save(&app, &id, &session).await;
        drop(busy);
        saved.map_err(ApiError::unsaved)
    })
    .await
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
    match app.vault.remove_session(&caller.key, &id) {
        Some(found) => {
            if let Some(interrupt) = &found.lock().interrupt {
                interrupt.store(true, Ordering::Relaxed);
            }
        }
        // Its state, which may be damaged or another model's, is not needed.
        None => drop(saved::owned(&app, &caller, &id).await?),
    }
    forget(&app, "session", id.clone()).await?;
    // A call that came beside this one may have fetched it from the store before it was forgotten.
    app.vault.remove_session(&caller.key, &id);
    Ok(Json(json!({ "id": id, "object": "session", "deleted": true })).into_response())
}

/// Tells of a reply's end to its session, wherever the client is; `done` hears whether the session has it.
fn commit(
    busy: Arc<Busy>,
    info: Arc<ModelInfo>,
    input: Input,
    kind: &'static str,
    done: oneshot::Sender<ApiResult<()>>,
) -> OnEnd {
    Box::new(move |end: ApiResult<End>| {
        let session = Arc::clone(&busy.0);
        let outcome = end.map(|end| {
            let mut state = session.lock();
            let chat = matches!(input, Input::Messages(_));
            let position = end.capsule.position();
            let start = position - end.reply.len() as u32;
            let ended = |position| Some(MessageEnd { position, closed: false });
            if let Input::Messages(new) = input {
                state.messages.extend(new);
                let count = state.messages.len();
                state.ends.resize(count - 1, None);
                state.ends.push(ended(start));
            }
            state.reply = (kind == "reply").then(|| LastReply { start, tokens: end.reply.clone() });
            if !end.reply.is_empty() {
                if let Some(asked) = end.asked {
                    add_mark(&mut state, "input", asked, None, false);
                }
                state.drop_waypoints();
                if chat || !state.messages.is_empty() {
                    let words: Vec<u32> =
                        end.reply.iter().copied().filter(|t| !info.tokenizer.is_eos(*t)).collect();
                    let said = info.tokenizer.decode(&words);
                    state.messages.push(json!({ "role": "assistant", "content": said }));
                    state.ends.push(ended(position));
                }
            }
            add_mark(&mut state, kind, end.capsule, end.eos, false);
            if let Some(mark) = state.marks.last_mut().filter(|_| !end.reply.is_empty()) {
                mark.waypoints = end.waypoints;
            }
        });
        // After the state has changed others may work on it.
        drop(busy);
        let _ = done.send(outcome);
    })
}

pub(crate) async fn append(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(HINTS);
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
    let launched = launch(&app, &caller, &id, input, wanted, "append").await?;
    let session = Arc::clone(&launched.session);
    let (read, settled) = carry_out(&app, &id, launched, |_, _| {}).await?;
    read?;
    settled.outcome?;
    settled.saved.map_err(ApiError::unsaved)?;
    Ok(Json(session_object(&id, &session)).into_response())
}

/// A call on a session that the engine works on.
struct Launched {
    generation: Generation,
    session: Arc<Session>,
    busy: Arc<Busy>,
    /// Told when the session stands where the call left it.
    ended: oneshot::Receiver<ApiResult<()>>,
}

/// That a session has what a call added.
async fn committed(ended: oneshot::Receiver<ApiResult<()>>) -> ApiResult<()> {
    ended.await.map_err(|_| ApiError::stopping())?
}

/// How a call on a session ended.
struct Settled {
    outcome: ApiResult<()>,
    saved: ApiResult<()>,
}

/// That a call has ended, told to whoever waits for it.
struct Delivered {
    settled: Settled,
    /// Others have the session when this goes.
    busy: Arc<Busy>,
}

/// Waits until the session stands where a call leaves it and saves it, whether or not the client is still there. If nobody
/// takes what this tells, nobody got the reply, and the session is left where it begins.
fn settle(
    app: &Arc<App>,
    id: &str,
    session: &Arc<Session>,
    busy: Arc<Busy>,
    ended: oneshot::Receiver<ApiResult<()>>,
) -> oneshot::Receiver<Delivered> {
    let (app, id, session) = (Arc::clone(app), id.to_owned(), Arc::clone(session));
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let outcome = committed(ended).await;
        let added = outcome.is_ok();
        let saved = saved::save(&app, &id, &session).await;
        let delivered = Delivered { settled: Settled { outcome, saved }, busy };
        let Err(untold) = tell.send(delivered) else { return };
        if added && leave_at(&app, &session, 0).await {
            save_or_log(&app, &id, &session).await;
        }
        drop(untold.busy);
    });
    told
}

/// Steps a call to its end, and waits until its session is saved and free: also after an error, so that whoever gets that may
/// use the session at once.
async fn carry_out(
    app: &Arc<App>,
    id: &str,
    launched: Launched,
    mut each: impl FnMut(Step, &mut Tally),
) -> ApiResult<(ApiResult<Tally>, Settled)> {
    let Launched { mut generation, session, busy, ended } = launched;
    let mut tally = Tally::new(&generation);
    let settled = settle(app, id, &session, busy, ended);
    let told = loop {
        match generation.step(&mut tally).await {
            Ok(Some(step)) => each(step, &mut tally),
            Ok(None) => break Ok(tally),
            Err(error) => break Err(error),
        }
    };
    let Delivered { settled, busy } = settled.await.map_err(|_| ApiError::internal())?;
    drop(busy);
    Ok((told, settled))
}

/// Cuts the last reply to what its client got of it; whether that changed the session.
async fn leave_at(app: &Arc<App>, session: &Arc<Session>, got: usize) -> bool {
    let reply = session.lock().reply.clone();
    let Some(reply) = reply.filter(|reply| reply.tokens.len() > got) else { return false };
    let cut = match got {
        0 => unsay(app, session, &reply).await,
        _ => shorten(app, session, &reply, got).await,
    };
    if let Err(error) = &cut {
        tracing::warn!(?error, "a session could not be cut to what was sent");
    }
    cut.is_ok()
}

async fn save_or_log(app: &Arc<App>, id: &str, session: &Arc<Session>) {
    if let Err(error) = saved::save(app, id, session).await {
        tracing::warn!(?error, "a session could not be saved");
    }
}

async fn launch(
    app: &Arc<App>,
    caller: &Caller,
    id: &str,
    input: Input,
    mut wanted: Wanted,
    kind: &'static str,
) -> ApiResult<Launched> {
    wanted.input = match &input {
        Input::Nothing | Input::Text(_) => "text",
        Input::Tokens(_) => "tokens",
        Input::Messages(_) => "messages",
    };
    let permit = app.place()?;
    let session = session(app, caller, id).await?;
    let busy = Arc::new(Busy::take(&session)?);
    let (info, state) = (Arc::clone(&app.info), session.lock().clone());
    if matches!(input, Input::Nothing) && state.capsule().is_none() {
        return Err(ApiError::param(
            "text",
            "this session is empty: give 'text', 'tokens' or 'messages' to begin with",
        ));
    }
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
    let (done, ended) = oneshot::channel();
    let on_end = commit(Arc::clone(&busy), Arc::clone(&app.info), input, kind, done);
    let generation =
        app.generate(caller, permit, wanted, start, prompt.tokens, None, Some(on_end))?;
    session.lock().interrupt = Some(Arc::clone(&generation.interrupt));
    Ok(Launched { generation, session, busy, ended })
}

pub(crate) async fn generate(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(HINTS);
    app.check_model(&mut fields)?;
    let input = Input::take(&mut fields)?;
    let mut wanted = app.wanted(&mut fields, &caller, &["max_tokens"], None)?;
    if wanted.choices != 1 {
        return Err(ApiError::unsupported("n", "fork the session instead"));
    }
    let stream = fields.take::<bool>("stream")?.unwrap_or(false);
    wanted.stream = stream;
    fields.finish()?;
    let launched = launch(&app, &caller, &id, input, wanted, "reply").await?;
    let session = Arc::clone(&launched.session);
    if !stream {
        let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), None);
        let each = |step: Step, tally: &mut Tally| {
            if let Some(token) = step.token {
                tally.token(step.at, false);
                tokens.push(token);
            }
            text.push_str(&step.text);
            finish = step.finished.or(finish);
        };
        let (told, settled) = carry_out(&app, &id, launched, each).await?;
        let tally = told?;
        // An interruption that came before the prompt was read leaves the session as it was.
        if tally.generated > 0 || finish != Some(FinishReason::Cancelled) {
            settled.outcome?;
        }
        settled.saved.map_err(ApiError::unsaved)?;
        let finish = finish.ok_or_else(ApiError::stopping)?;
        let mut object = reply_object(&id, &session, &tally, finish);
        object["text"] = json!(text);
        object["tokens"] = json!(tokens);
        return Ok(Json(object).into_response());
    }
    let Launched { generation, busy, ended, .. } = launched;
    let sent = Arc::clone(&generation.sent);
    let (events, response) = sse::response(Arc::clone(&sent));
    tokio::spawn(async move {
        let mut tally = Tally::new(&generation);
        let told = deltas(generation, &mut tally, &events).await;
        // The session stands where the engine left it: at the end, or, if it saw that the client had gone, at what went out.
        let outcome = committed(ended).await;
        let added = outcome.is_ok();
        let begun = tally.generated > 0 || !matches!(told, Some(Ok(FinishReason::Cancelled)));
        let here = match (told, outcome) {
            (None, _) => false,
            (Some(Err(error)), _) => events.event("error", &error.body(), 0).await,
            (Some(Ok(_)), Err(error)) if begun => events.event("error", &error.body(), 0).await,
            (Some(Ok(finish)), _) => {
                // Saved before the client is told that the reply is complete.
                let object = match saved::save(&app, &id, &session).await {
                    Ok(()) => reply_object(&id, &session, &tally, finish),
                    Err(error) => error.unsaved().body(),
                };
                events.event("done", &object, tally.generated as u64).await
            }
        };
        drop(events);
        if !here {
            // The reply may have ended before anybody saw that the client had gone.
            if added {
                leave_at(&app, &session, sent.load(Ordering::Acquire) as usize).await;
            }
            save_or_log(&app, &id, &session).await;
        }
        drop(busy);
    });
    Ok(response)
}

/// Sends a reply as events; how it ended, and `None` if the client went away before that.
async fn deltas(
    mut generation: Generation,
    tally: &mut Tally,
    events: &Events,
) -> Option<ApiResult<FinishReason>> {
    let mut finish = None;
    loop {
        let step = match generation.step_for(events, tally).await? {
            Err(error) => return Some(Err(error)),
            Ok(None) => return Some(finish.ok_or_else(ApiError::stopping)),
            Ok(Some(step)) => step,
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
            return None;
        }
    }
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

/// How long `interrupt` waits for the reply to end.
const INTERRUPT_WAIT: Duration = Duration::from_secs(2);

pub(crate) async fn interrupt(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    nothing(&app, request).await?;
    let session = session(&app, &caller, &id).await?;
    let running = session.lock().interrupt.clone();
    if let Some(interrupt) = &running {
        interrupt.store(true, Ordering::Relaxed);
        // What comes next finds the session free. A client that reads its stream no further does not hold this one up.
        let same = || session.lock().interrupt.as_ref().is_some_and(|i| Arc::ptr_eq(i, interrupt));
        let begun = Instant::now();
        while same() && begun.elapsed() < INTERRUPT_WAIT {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let interrupted = running.is_some();
    Ok(Json(json!({ "id": id, "object": "session", "interrupted": interrupted })).into_response())
}

pub(crate) async fn truncate(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(TRUNCATE);
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
        (None, Some(text)) => {
            let (info, tokens) = (Arc::clone(&app.info), reply.tokens.clone());
            blocking(move || heard(&info, &tokens, &text)).await?
        }
        _ => {
            return Err(ApiError::param(
                "heard_tokens",
                "give one of 'heard_tokens' and 'heard_text'",
            ));
        }
    };
    let replayed = shorten(&app, &session, &reply, kept).await?;
    save_and_free(&app, &id, &session, busy).await?;
    let mut object = session_object(&id, &session);
    object["heard_tokens"] = json!(kept);
    object["tokens_replayed"] = json!(replayed);
    Ok(Json(object).into_response())
}

/// Cuts the last reply to its first tokens; returns how many were read again.
async fn shorten(
    app: &Arc<App>,
    session: &Arc<Session>,
    reply: &LastReply,
    kept: usize,
) -> ApiResult<u32> {
    let place = MessageEnd { position: reply.start + kept as u32, closed: false };
    let known = session.lock().messages.len();
    let replayed = back_to(app, session, place, known, "truncate").await?;
    let mut state = session.lock();
    let tokens = reply.tokens[..kept].to_vec();
    if let Some(last) = state.messages.last_mut().filter(|m| m["role"] == "assistant") {
        last["content"] = json!(app.info.tokenizer.decode(&tokens));
        if let Some(end) = state.ends.last_mut() {
            *end = Some(place);
        }
    }
    state.reply = Some(LastReply { start: reply.start, tokens });
    Ok(replayed)
}

/// Takes the last reply back as a whole: the session stands where an engine leaves it that saw its client go before the first
/// token, and has no message of the reply.
async fn unsay(app: &Arc<App>, session: &Arc<Session>, reply: &LastReply) -> ApiResult<u32> {
    let place = MessageEnd { position: reply.start, closed: false };
    let said = {
        let state = session.lock();
        let last = state.messages.last().is_some_and(|m| m["role"] == "assistant");
        state.messages.len() - usize::from(last)
    };
    let replayed = back_to(app, session, place, said, "reply").await?;
    session.lock().reply = Some(LastReply { start: reply.start, tokens: Vec::new() });
    Ok(replayed)
}

/// Rolls a session back to a place of its own branch, where it had `messages` messages; returns how many tokens were read
/// again.
async fn back_to(
    app: &Arc<App>,
    session: &Arc<Session>,
    place: MessageEnd,
    messages: usize,
    kind: &'static str,
) -> ApiResult<u32> {
    let MessageEnd { position, closed } = place;
    let head = session.lock().capsule().cloned();
    let head = head.ok_or_else(|| ApiError::conflict("this session is empty"))?;
    if position > head.position() {
        let text = format!("the session stands at {}", head.position());
        return Err(ApiError::param("tokens", text));
    }
    if position == head.position() && !closed {
        let mut state = session.lock();
        state.cut_messages(messages);
        return Ok(0);
    }
    let cut = match position {
        0 => None,
        _ => Some(app.rewind(head, position).await?),
    };
    let mut state = session.lock();
    state.marks.retain(|m| m.capsule.position() < position);
    state.cut_messages(messages);
    state.origin = state.origin.min(position);
    let Some(cut) = cut else { return Ok(0) };
    let last = cut.capsule.tokens().last().copied();
    let end = last.filter(|token| !closed && app.info.tokenizer.is_eos(*token));
    add_mark(&mut state, kind, cut.capsule, end, closed);
    if let Some(mark) = state.marks.last_mut() {
        mark.waypoints = cut.waypoints;
    }
    Ok(cut.replayed)
}

/// Rolls a session back to where it had so many messages.
async fn back_to_message(
    app: &Arc<App>,
    caller: &Caller,
    session: &Arc<Session>,
    message: usize,
) -> ApiResult<u32> {
    let state = session.lock().clone();
    let known = state.messages.len();
    if message > known {
        let text = format!("'message' is at most {known}: the session has so many");
        return Err(ApiError::param("message", text));
    }
    let (info, space) = (Arc::clone(&app.info), caller.space(None));
    let here = state.capsule().map_or(0, Capsule::position);
    let place = blocking(move || message_end(&info, &space, &state, message)).await?;
    if message == known && place.position == here {
        return Ok(0);
    }
    let replayed = {
        let mut state = session.lock();
        let is = |m: &Mark| (m.capsule.position(), m.closed) == (place.position, place.closed);
        // The first of several: later ones have settings of the call that followed.
        match state.marks.iter().position(is) {
            Some(at) => {
                state.marks.truncate(at + 1);
                state.cut_messages(message);
                Some(0)
            }
            None if place.position == 0 && state.marks.is_empty() => Some(0),
            None => None,
        }
    };
    let replayed = match replayed {
        Some(replayed) => replayed,
        None => back_to(app, session, place, message, "rollback").await?,
    };
    let mut state = session.lock();
    state.reply = None;
    if let Some(mark) = state.marks.last_mut() {
        mark.messages = message;
    }
    if let Some(end) = message.checked_sub(1).and_then(|last| state.ends.get_mut(last)) {
        *end = Some(place);
    }
    Ok(replayed)
}

pub(crate) async fn rollback(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(ROLLBACK);
    let boundary = fields.text("boundary", 256)?;
    let message = fields.take::<usize>("message")?;
    let tokens = fields.take::<u32>("tokens")?;
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let busy = Busy::take(&session)?;
    let replayed = match (boundary, message, tokens) {
        (Some(boundary), None, None) => {
            let mut state = session.lock();
            let at = state.marks.iter().position(|m| m.id == boundary);
            let at = at.ok_or_else(|| ApiError::not_found("boundary"))?;
            state.marks.truncate(at + 1);
            let known = state.marks.last().map_or(0, |m| m.messages);
            state.cut_messages(known);
            state.reply = None;
            0
        }
        (None, Some(message), None) => back_to_message(&app, &caller, &session, message).await?,
        (None, None, Some(position)) => {
            let (known, closed) = {
                let state = session.lock();
                let ends = state.ends.iter().enumerate().rev();
                let mut before = ends
                    .filter_map(|(at, e)| Some((at, (*e)?)))
                    .filter(|(_, e)| e.position <= position);
                before.next().map_or((0, false), |(at, end)| {
                    (at + 1, end.closed && end.position == position)
                })
            };
            let place = MessageEnd { position, closed };
            let replayed = back_to(&app, &session, place, known, "rollback").await?;
            session.lock().reply = None;
            replayed
        }
        _ => {
            return Err(ApiError::param(
                "boundary",
                "give one of 'boundary', 'message' and 'tokens'",
            ));
        }
    };
    save_and_free(&app, &id, &session, busy).await?;
    let mut object = session_object(&id, &session);
    object["tokens_replayed"] = json!(replayed);
    Ok(Json(object).into_response())
}

pub(crate) async fn fork(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(FORK);
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
        let fork = add(&app, &new, fork).await?;
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
    let mut fields = fields(&app, request).await?.with_hints(RESTORE);
    let which: String = fields.require("capsule")?;
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let (_, capsule) = found(&app, &caller, &which).await?;
    let busy = Busy::take(&session)?;
    {
        let mut state = session.lock();
        begin_with(&mut state, capsule);
    }
    save_and_free(&app, &id, &session, busy).await?;
    Ok(Json(session_object(&id, &session)).into_response())
}
