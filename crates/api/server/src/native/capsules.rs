//! Capsules that clients asked for.

use std::ops::ControlFlow;
use std::sync::Arc;

use ampoule::Capsule;
use ampoule::store::CapsuleId;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::sessions::session;
use super::shelf::{find, found, own, tokens};
use super::{Answer, AppState, Caught, fields, forget, nothing, to_the_end};
use crate::app::{App, blocking, micros, new_id, now};
use crate::durable::Durable;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, Hints};
use crate::http::body;
use crate::named::{About, NamedCapsule, Origin};
use crate::start::to_hex;

/// Bytes of a capsule's name at most.
const NAME_BYTES: usize = 200;

fn capsule_object(app: &App, id: &str, named: &NamedCapsule) -> Value {
    let about = &named.about;
    let client = named.origin == Origin::Client;
    json!({
        "id": id, "object": "capsule", "created_at": client.then_some(named.created), "name": named.name,
        "parent": named.parent, "pinned": named.pinned, "shared": !client,
        "stored": app.vault.durable.is_some() && named.is_kept(),
        "position": about.position, "lineage": about.lineage,
        "bytes": { "fixed": about.fixed_bytes, "own_rows": about.own_row_bytes, "rows": about.row_bytes },
    })
}

/// A capsule that a client has made just now.
fn new_capsule(
    key: [u8; 32],
    (name, pinned): (Option<String>, bool),
    parent: Option<String>,
    capsule: Capsule,
) -> NamedCapsule {
    NamedCapsule {
        key,
        created: now(),
        order: micros(),
        name,
        parent,
        pinned,
        origin: Origin::Client,
        about: About::from(&capsule),
        capsule: Some(capsule),
        stored: None,
        misfit: None,
    }
}

/// Names that a new capsule's fields do not have.
const HINTS: Hints = &[
    ("pinned", "'pin' it is"),
    ("id", "the server gives ids; 'name' is yours"),
    ("title", "'name' it is"),
    ("label", "'name' it is"),
];

/// What a new capsule is called, and whether it is pinned.
fn name_and_pin(fields: &mut Fields) -> ApiResult<(Option<String>, bool)> {
    let name = fields.text("name", NAME_BYTES)?;
    if let Some(name) = &name
        && (name.trim().is_empty() || name.chars().any(char::is_control))
    {
        return Err(ApiError::param(
            "name",
            "'name' must have a letter or digit and no control characters",
        ));
    }
    Ok((name, fields.take::<bool>("pin")?.unwrap_or(false)))
}

pub(crate) async fn snapshot(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?.with_hints(HINTS);
    let called = name_and_pin(&mut fields)?;
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let capsule = session.lock().capsule().cloned();
    let capsule = capsule
        .ok_or_else(|| ApiError::conflict("this session is empty: there is nothing to freeze"))?;
    add_named(&app, new_capsule(caller.key, called, Some(id), capsule)).await
}

/// Runs what changes a key's capsules to its end, whether or not the client is still there, and one such change after the
/// other: memory and the store say the same of a name and a pin.
async fn change<T: Send + 'static>(
    app: &Arc<App>,
    key: [u8; 32],
    work: impl Future<Output = ApiResult<T>> + Send + 'static,
) -> ApiResult<T> {
    let turn = app.vault.turn(&key);
    to_the_end(async move {
        let _turn = turn.lock().await;
        work.await
    })
    .await
}

/// Adds a capsule; where there is a store, what has a name or is pinned is there before this returns. A name moves: a
/// capsule that had it keeps its id, and its place in the store only if it is pinned.
async fn add_named(app: &Arc<App>, mut named: NamedCapsule) -> Answer {
    let here = Arc::clone(app);
    let object = change(app, named.key, async move {
        let id = new_id("cap_");
        here.vault.room_for_capsule(&named.key)?;
        // The last to have its turn has the name, in the store as well.
        named.order = micros();
        if named.is_kept() {
            named.stored = keep(&here, &id, &named).await?;
        }
        let replaced = here.vault.capsules.add(&id, named.clone());
        let mut object = capsule_object(&here, &id, &named);
        object["replaced"] = json!(replaced.as_ref().map(|(old, _)| old));
        if let Some((old, replaced)) = replaced {
            let replaced = leave_store(&here, &old, replaced);
            let let_go = move |durable: &Durable| Ok(let_name_go(durable, &old, &replaced)?);
            if let Err(error) = with_store(&here, let_go).await {
                // The next start lets it go: the later of two has the name.
                tracing::warn!(?error, "the record of a capsule was not changed");
            }
        }
        Ok(object)
    });
    Ok((StatusCode::CREATED, Json(object.await?)).into_response())
}

/// What has neither name nor pin any more need not be in the store, if it is in memory. If it is not, it stays in the store
/// until the next start.
fn leave_store(app: &App, id: &str, named: NamedCapsule) -> NamedCapsule {
    if named.is_kept() || named.capsule.is_none() {
        return named;
    }
    let left = app.vault.capsules.change(&named.key, id, |entry| {
        entry.capsule.clone_from(&named.capsule);
        entry.stored = None;
    });
    left.unwrap_or(named)
}

/// A key's own capsule as it is now.
fn current(app: &App, key: &[u8; 32], id: &str) -> ApiResult<NamedCapsule> {
    let found = app.vault.capsules.find(key, id).filter(|(found, c)| found == id && c.is_of(key));
    Ok(found.ok_or_else(|| ApiError::not_found("capsule"))?.1)
}

fn record(named: &NamedCapsule) -> Value {
    json!({
        "key": to_hex(&named.key), "created": named.created, "order": named.order, "name": named.name,
        "parent": named.parent, "pinned": named.pinned,
    })
}

/// Makes the store know that a capsule has lost its name or its pin. One with neither that is nowhere else stays there.
pub(super) fn let_name_go(
    durable: &Durable,
    id: &str,
    named: &NamedCapsule,
) -> Result<(), ampoule::Error> {
    if named.is_kept() || named.stored.is_some() {
        durable.save("capsule", id, None, record(named)).map(drop)
    } else {
        durable.forget("capsule", id);
        Ok(())
    }
}

/// Runs something with the store, if there is one, off the threads that serve connections.
async fn with_store<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&Durable) -> ApiResult<T> + Send + 'static,
) -> ApiResult<Option<T>> {
    if app.vault.durable.is_none() {
        return Ok(None);
    }
    let vault = Arc::clone(&app.vault);
    blocking(move || vault.durable.as_ref().map(work).transpose()).await
}

/// Saves a capsule where there is a store, or only what is said of it where that has its state; and says where it lies.
async fn keep(app: &Arc<App>, id: &str, named: &NamedCapsule) -> ApiResult<Option<CapsuleId>> {
    if app.vault.durable.is_none() {
        return Ok(None);
    }
    let unsaved = named.capsule.clone().filter(|_| named.stored.is_none());
    let detached = match unsaved {
        Some(capsule) => Some(app.call(move |worker| Ok(worker.model.detach(&capsule)?)).await?),
        None => None,
    };
    let (which, record) = (id.to_owned(), record(named));
    let save =
        move |durable: &Durable| Ok(durable.save("capsule", &which, detached.as_ref(), record)?);
    Ok(with_store(app, save).await?.flatten().or(named.stored))
}

pub(crate) async fn list_capsules(State(app): AppState, Extension(caller): Caught) -> Answer {
    let all = app.vault.capsules.list(&caller.key);
    let list: Vec<Value> = all.iter().map(|(id, named)| capsule_object(&app, id, named)).collect();
    Ok(Json(json!({ "object": "list", "data": list })).into_response())
}

/// Capsules below the capsules whose tokens they go on from.
pub(crate) async fn tree(State(app): AppState, Extension(caller): Caught) -> Answer {
    let all = app.vault.capsules.list(&caller.key);
    let answer = blocking(move || {
        let tokens: Vec<Option<Vec<u32>>> =
            all.iter().map(|(_, named)| tokens(&app, named)).collect();
        // What cannot be read is below nothing, and nothing is below it.
        let above = |index: usize| {
            let below = tokens[index].as_ref()?;
            let shorter = |other: usize| {
                let of = tokens[other].as_ref().filter(|_| other != index)?;
                let above = below.starts_with(of) && (of.len() < below.len() || other < index);
                above.then_some((of.len(), other))
            };
            (0..all.len()).filter_map(shorter).max().map(|(_, other)| other)
        };
        let nodes: Vec<Value> = all
            .iter()
            .enumerate()
            .map(|(index, (id, named))| {
                let mut node = capsule_object(&app, id, named);
                node["below"] = json!(above(index).map(|other| all[other].0.clone()));
                node
            })
            .collect();
        Ok(json!({ "object": "capsule.tree", "data": nodes }))
    });
    Ok(Json(answer.await?).into_response())
}

pub(crate) async fn read_capsule(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, named) = find(&app, &caller, &id)?;
    Ok(Json(capsule_object(&app, &id, &named)).into_response())
}

pub(crate) async fn delete_capsule(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, _) = own(&app, &caller, &id)?;
    let here = Arc::clone(&app);
    let object = change(&app, caller.key, async move {
        if !here.vault.capsules.remove(&caller.key, &id) {
            return Err(ApiError::not_found("capsule"));
        }
        forget(&here, "capsule", id.clone()).await?;
        Ok(json!({ "id": id, "object": "capsule", "deleted": true }))
    });
    Ok(Json(object.await?).into_response())
}

pub(crate) async fn pin(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    nothing(&app, request).await?;
    let (id, named) = find(&app, &caller, &id)?;
    if !named.is_of(&caller.key) {
        // The store has it already.
        return Ok(Json(capsule_object(&app, &id, &named)).into_response());
    }
    let here = Arc::clone(&app);
    let object = change(&app, caller.key, async move {
        let mut named = current(&here, &caller.key, &id)?;
        named.pinned = true;
        let stored = keep(&here, &id, &named).await?;
        let pinned = here.vault.capsules.change(&caller.key, &id, |named| {
            named.pinned = true;
            named.stored = stored;
        });
        Ok(capsule_object(&here, &id, &pinned.ok_or_else(ApiError::internal)?))
    });
    Ok(Json(object.await?).into_response())
}

pub(crate) async fn unpin(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, _) = own(&app, &caller, &id)?;
    let here = Arc::clone(&app);
    let object = change(&app, caller.key, async move {
        let mut named = current(&here, &caller.key, &id)?;
        named.pinned = false;
        if !named.is_kept() && named.capsule.is_some() {
            // It leaves the store: memory must say so before.
            here.vault.capsules.change(&caller.key, &id, |entry| entry.pinned = false);
            named = leave_store(&here, &id, named);
        }
        let (which, unpinned) = (id.clone(), named.clone());
        with_store(&here, move |durable| Ok(let_name_go(durable, &which, &unpinned)?)).await?;
        here.vault.capsules.change(&caller.key, &id, |entry| entry.pinned = false);
        Ok(capsule_object(&here, &id, &named))
    });
    Ok(Json(object.await?).into_response())
}

pub(crate) async fn export(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (_, capsule) = found(&app, &caller, &id).await?;
    let bytes = app
        .call(move |worker| {
            let mut bytes = Vec::new();
            worker.model.engine.export(&capsule, &mut |piece| {
                bytes.extend_from_slice(piece);
                ControlFlow::Continue(())
            })?;
            Ok(bytes)
        })
        .await?;
    let kind = HeaderValue::from_static("application/octet-stream");
    Ok(([(header::CONTENT_TYPE, kind)], bytes).into_response())
}

pub(crate) async fn import(
    State(app): AppState,
    Extension(caller): Caught,
    request: Request,
) -> Answer {
    let mut query = Fields::query(request.uri().query().unwrap_or_default())?.with_hints(HINTS);
    query.flag("pin");
    let called = name_and_pin(&mut query)?;
    query.finish()?;
    let body = body(&app, request).await?;
    if body.is_empty() {
        return Err(ApiError::invalid("the body must be a capsule file"));
    }
    let capsule = app
        .call(move |worker| worker.load(|worker| Ok(worker.model.engine.import(&body)?)))
        .await?;
    add_named(&app, new_capsule(caller.key, called, None, capsule)).await
}
