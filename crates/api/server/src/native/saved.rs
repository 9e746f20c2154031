//! Sessions that lie in the store: saved after every turn, fetched when somebody comes back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ampoule::Capsule;
use serde_json::{Value, json};

use super::capsules::let_name_go;
use super::forget;
use super::sessions::add_mark;
use super::shelf::about;
use crate::ahead::Ahead;
use crate::app::{App, Caller, blocking};
use crate::durable::{Durable, Record};
use crate::error::{ApiError, ApiResult};
use crate::named::{NamedCapsule, Origin};
use crate::start::{from_hex, to_hex};
use crate::vault::{LastReply, MessageEnd, Parked, Session, SessionState, Vault};
use crate::worker::Worker;

/// How often what was removed from the store is deleted.
const COLLECT: Duration = Duration::from_secs(300);

/// What a session is, and its state; none where nothing was read yet.
fn record(session: &Session) -> (Value, Option<Capsule>) {
    let state = session.lock();
    let mark = state.marks.last();
    let reply = state.reply.as_ref().map(|r| json!({ "start": r.start, "tokens": r.tokens }));
    let record = json!({
        "key": to_hex(&session.key), "created": session.created, "parent": session.parent,
        "messages": state.messages, "ends": state.ends, "origin": state.origin, "tools": state.tools, "reply": reply,
        "closed": mark.is_some_and(|m| m.closed),
        "position": mark.map_or(0, |m| m.capsule.position()), "end_token": mark.and_then(|m| m.end_token),
    });
    (record, mark.map(|m| m.capsule.clone()))
}

/// The session that a record and its state make.
fn session(record: &Value, capsule: Option<Capsule>) -> Option<Session> {
    let key = record["key"].as_str().and_then(from_hex)?;
    let list = |name: &str| record[name].as_array().cloned().unwrap_or_default();
    let tokens = serde_json::from_value::<Vec<u32>>(record["reply"]["tokens"].clone()).ok();
    let start = record["reply"]["start"].as_u64().map(|start| start as u32);
    let position = capsule.as_ref().map_or(0, Capsule::position);
    let messages = list("messages");
    let mut ends: Vec<Option<MessageEnd>> =
        serde_json::from_value(record["ends"].clone()).unwrap_or_default();
    ends.retain(|end| end.is_none_or(|end| end.position <= position));
    ends.resize(messages.len(), None);
    let mut state = SessionState {
        messages,
        ends,
        origin: record["origin"].as_u64().map_or(0, |origin| origin as u32).min(position),
        tools: list("tools"),
        reply: start.zip(tokens).map(|(start, tokens)| LastReply { start, tokens }),
        ..SessionState::default()
    };
    let end = record["end_token"].as_u64().map(|t| t as u32);
    if let Some(capsule) = capsule {
        add_mark(&mut state, "parked", capsule, end, record["closed"] == true);
    }
    let created = record["created"].as_u64().unwrap_or_default();
    let parent = record["parent"].as_str().map(str::to_owned);
    let session = Session::new(key, created, parent, state);
    session.set_saved(true);
    Some(session)
}

/// Saves a session as it stands, where there is a store: on return it survives the process.
pub(super) async fn save(app: &Arc<App>, id: &str, session: &Session) -> ApiResult<()> {
    if app.vault.durable.is_none() || session.is_deleted() {
        return Ok(());
    }
    session.set_saved(false);
    let (record, capsule) = record(session);
    let detached = match capsule {
        Some(capsule) => Some(app.call(move |worker| Ok(worker.model.detach(&capsule)?)).await?),
        None => None,
    };
    let (vault, id, gone) = (Arc::clone(&app.vault), id.to_owned(), id.to_owned());
    blocking(move || {
        let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
        Ok(durable.save("session", &id, detached.as_ref(), record).map(drop)?)
    })
    .await?;
    if session.is_deleted() {
        // While it was being saved.
        return forget(app, "session", gone).await;
    }
    session.set_saved(true);
    Ok(())
}

/// What the store has of a session of the caller's that is not in memory.
pub(super) async fn owned(app: &Arc<App>, caller: &Caller, id: &str) -> ApiResult<Value> {
    if app.vault.durable.is_none() {
        return Err(app.vault.no_session(&caller.key, id, app.config.session_idle));
    }
    let record = stored(app, id).await?;
    let mine = record.filter(|r| r["key"].as_str().and_then(from_hex) == Some(caller.key));
    mine.ok_or_else(|| ApiError::not_found("session"))
}

/// A session that is not in memory.
pub(super) async fn fetch(app: &Arc<App>, caller: &Caller, id: &str) -> ApiResult<Arc<Session>> {
    let missing = || ApiError::not_found("session");
    // Two would read the same, and what the slower has read might be older than what the faster has saved since.
    let _turn = app.vault.fetch_turn(id).await;
    if let Some(session) = app.vault.session(&caller.key, id) {
        return Ok(session);
    }
    let record = owned(app, caller, id).await?;
    app.vault.room_for_session(&caller.key, app.config.session_idle)?;
    let which = id.to_owned();
    let capsule = if record["position"].as_u64() == Some(0) {
        None
    } else {
        let find = move |durable: &Durable| durable.find("session", &which).map(Some);
        let ahead = Ahead::read(app, find).await?.ok_or_else(missing)?;
        Some(ahead.load(app).await?)
    };
    let session = session(&record, capsule).ok_or_else(missing)?;
    // Others may have come meanwhile.
    app.vault.room_for_session(&caller.key, app.config.session_idle)?;
    let session = app.vault.add_session(id, session);
    // Deleted meanwhile: whoever deleted it did not find it in memory.
    if stored(app, id).await?.is_none() {
        app.vault.remove_session(&caller.key, id);
        return Err(missing());
    }
    app.vault.metrics.sessions_fetched.add(1);
    Ok(session)
}

/// What the store has of a session.
async fn stored(app: &Arc<App>, id: &str) -> ApiResult<Option<Value>> {
    let (vault, id) = (Arc::clone(&app.vault), id.to_owned());
    blocking(move || match &vault.durable {
        Some(durable) => Ok(durable.record("session", &id)?),
        None => Ok(None),
    })
    .await
}

/// Lets sessions go that nobody used for a while, from time to time, for as long as the server runs.
pub(crate) async fn expire(app: Arc<App>) {
    let idle = app.config.session_idle;
    let pause = (idle / 8).clamp(Duration::from_millis(50), Duration::from_secs(60));
    let mut collected = Instant::now();
    loop {
        tokio::time::sleep(pause).await;
        app.vault.expire(idle);
        if app.vault.durable.is_some() && collected.elapsed() >= COLLECT {
            let vault = Arc::clone(&app.vault);
            let _ = blocking(move || {
                if let Some(durable) = &vault.durable {
                    durable.gc();
                    durable.count();
                }
                Ok(())
            })
            .await;
            collected = Instant::now();
        }
    }
}

/// Capsules and sessions that the store has. Their states stay there until somebody asks for them. Says how many there are that
/// another model made.
pub(crate) fn bring_back(
    worker: &Worker,
    vault: &Vault,
    durable: &Durable,
    records: &[Record],
) -> usize {
    let mut others = 0;
    let of = |kind: &'static str| records.iter().filter(move |r| r.kind == kind);
    let mut capsules: Vec<&Record> = of("capsule").collect();
    // The latest of one name has it.
    capsules.sort_by_key(|r| (r.value["order"].as_u64(), r.value["created"].as_u64()));
    for Record { id, value: record, .. } in capsules {
        let Some(key) = record["key"].as_str().and_then(from_hex) else { continue };
        let Some(stored) = durable.id_of("capsule", id) else { continue };
        let (about, misfit) = match about(worker, durable, stored) {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(%error, "a capsule was not brought back");
                continue;
            }
        };
        let text = |name: &str| record[name].as_str().map(str::to_owned);
        let named = NamedCapsule {
            key,
            created: record["created"].as_u64().unwrap_or_default(),
            order: record["order"].as_u64().unwrap_or_default(),
            name: text("name"),
            parent: text("parent"),
            // What was saved before names were durable was saved because it was pinned.
            pinned: record["pinned"].as_bool().unwrap_or(true),
            origin: Origin::Client,
            about,
            capsule: None,
            stored: Some(stored),
            misfit,
        };
        if !named.is_kept() {
            // It had lost its name or its pin, and was kept for the process that ended.
            durable.forget("capsule", id);
            continue;
        }
        others += usize::from(named.misfit.is_some());
        let Some((old, replaced)) = vault.capsules.add(id, named) else { continue };
        if !replaced.is_kept() {
            vault.capsules.remove(&key, &old);
            durable.forget("capsule", &old);
        } else if let Err(error) = let_name_go(durable, &old, &replaced) {
            tracing::warn!(%error, "the record of a capsule was not changed");
        }
    }
    for Record { id, value: record, .. } in of("session") {
        match parked(worker, durable, id, record) {
            Ok(Some(parked)) => vault.add_parked(id, parked),
            Ok(None) => others += 1,
            Err(error) => tracing::warn!(%error, "a session was not brought back"),
        }
    }
    others
}

/// What a record says of a session; none if it is of another model.
fn parked(
    worker: &Worker,
    durable: &Durable,
    id: &str,
    record: &Value,
) -> Result<Option<Parked>, ampoule::Error> {
    let Some(key) = record["key"].as_str().and_then(from_hex) else { return Ok(None) };
    let position = record["position"].as_u64().unwrap_or_default() as u32;
    if position > 0
        && let Some(stored) = durable.id_of("session", id)
        && about(worker, durable, stored)?.1.is_some()
    {
        return Ok(None);
    }
    Ok(Some(Parked {
        key,
        created: record["created"].as_u64().unwrap_or_default(),
        parent: record["parent"].as_str().map(str::to_owned),
        position,
        messages: record["messages"].as_array().map_or(0, Vec::len),
        reply_tokens: record["reply"]["tokens"].as_array().map(Vec::len),
    }))
}
