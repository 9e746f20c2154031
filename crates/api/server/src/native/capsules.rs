//! Capsules that clients asked for.

use std::ops::ControlFlow;
use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::sessions::session;
use super::{Answer, AppState, Caught, fields, forget};
use crate::app::{App, Caller, blocking, new_id, now};
use crate::error::{ApiError, ApiResult};
use crate::http::body;
use crate::start::to_hex;
use crate::vault::NamedCapsule;

fn capsule_object(id: &str, named: &NamedCapsule) -> Value {
    let c = &named.capsule;
    json!({
        "id": id, "object": "capsule", "created_at": named.created, "name": named.name, "parent": named.parent,
        "pinned": named.pinned, "position": c.position(), "lineage": c.lineage().to_string(),
        "bytes": { "fixed": c.fixed_bytes(), "own_rows": c.own_row_bytes(), "rows": c.row_bytes() },
    })
}

pub(crate) async fn snapshot(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let mut fields = fields(&app, request).await?;
    let name = fields.text("name", 200)?;
    let pinned = fields.take::<bool>("pin")?.unwrap_or(false);
    fields.finish()?;
    let session = session(&app, &caller, &id).await?;
    let capsule = session.lock().capsule().cloned();
    let capsule = capsule
        .ok_or_else(|| ApiError::conflict("this session is empty: there is nothing to freeze"))?;
    let named =
        NamedCapsule { key: caller.key, created: now(), name, parent: Some(id), pinned, capsule };
    add_named(&app, named).await
}

async fn add_named(app: &Arc<App>, named: NamedCapsule) -> Answer {
    let id = new_id("cap_");
    app.vault.room_for_capsule(&named.key)?;
    if named.pinned {
        keep(app, &id, &named).await?;
    }
    app.vault.add_capsule(&id, named.clone());
    Ok((StatusCode::CREATED, Json(capsule_object(&id, &named))).into_response())
}

/// Saves a pinned capsule where there is a store.
async fn keep(app: &Arc<App>, id: &str, named: &NamedCapsule) -> ApiResult<()> {
    if app.vault.durable.is_none() {
        return Ok(());
    }
    let record = json!({ "key": to_hex(&named.key), "created": named.created, "name": named.name, "parent": named.parent });
    let capsule = named.capsule.clone();
    let detached = app.call(move |worker| Ok(worker.model.detach(&capsule)?)).await?;
    let (vault, id) = (Arc::clone(&app.vault), id.to_owned());
    blocking(move || {
        let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
        Ok(durable.save("capsule", &id, Some(&detached), record)?)
    })
    .await
}

pub(crate) async fn list_capsules(State(app): AppState, Extension(caller): Caught) -> Answer {
    let all = app.vault.capsules(&caller.key);
    let list: Vec<Value> = all.iter().map(|(id, c)| capsule_object(id, c)).collect();
    Ok(Json(json!({ "object": "list", "data": list })).into_response())
}

/// Capsules below the capsules whose tokens they go on from.
pub(crate) async fn tree(State(app): AppState, Extension(caller): Caught) -> Answer {
    let all = app.vault.capsules(&caller.key);
    let answer = blocking(move || {
        let tokens: Vec<Vec<u32>> = all.iter().map(|(_, c)| c.capsule.tokens()).collect();
        let above = |index: usize| {
            let shorter = |&other: &usize| {
                let (a, b) = (&tokens[other], &tokens[index]);
                other != index && b.starts_with(a) && (a.len() < b.len() || other < index)
            };
            (0..all.len()).filter(shorter).max_by_key(|&other| (tokens[other].len(), other))
        };
        let nodes: Vec<Value> = all
            .iter()
            .enumerate()
            .map(|(index, (id, named))| {
                let mut node = capsule_object(id, named);
                node["below"] = json!(above(index).map(|other| all[other].0.clone()));
                node
            })
            .collect();
        Ok(json!({ "object": "capsule.tree", "data": nodes }))
    });
    Ok(Json(answer.await?).into_response())
}

/// A capsule of the caller's, by its id or name.
pub(super) fn named(app: &App, caller: &Caller, which: &str) -> ApiResult<(String, NamedCapsule)> {
    app.vault.capsule(&caller.key, which).ok_or_else(|| ApiError::not_found("capsule"))
}

pub(crate) async fn read_capsule(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, named) = named(&app, &caller, &id)?;
    Ok(Json(capsule_object(&id, &named)).into_response())
}

pub(crate) async fn delete_capsule(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, _) = named(&app, &caller, &id)?;
    app.vault.remove_capsule(&caller.key, &id);
    forget(&app, "capsule", id.clone()).await?;
    Ok(Json(json!({ "id": id, "object": "capsule", "deleted": true })).into_response())
}

pub(crate) async fn pin(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, named) = named(&app, &caller, &id)?;
    keep(&app, &id, &named).await?;
    let named =
        app.vault.pin(&caller.key, &id, true).ok_or_else(|| ApiError::not_found("capsule"))?;
    Ok(Json(capsule_object(&id, &named)).into_response())
}

pub(crate) async fn unpin(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (id, _) = named(&app, &caller, &id)?;
    let named =
        app.vault.pin(&caller.key, &id, false).ok_or_else(|| ApiError::not_found("capsule"))?;
    forget(&app, "capsule", id.clone()).await?;
    Ok(Json(capsule_object(&id, &named)).into_response())
}

pub(crate) async fn export(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> Answer {
    let (_, named) = named(&app, &caller, &id)?;
    let bytes = app
        .call(move |worker| {
            let mut bytes = Vec::new();
            worker.model.engine.export(&named.capsule, &mut |piece| {
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
    let body = body(&app, request).await?;
    if body.is_empty() {
        return Err(ApiError::invalid("the body must be a capsule file"));
    }
    let capsule = app
        .call(move |worker| worker.load(|worker| Ok(worker.model.engine.import(&body)?)))
        .await?;
    let named = NamedCapsule {
        key: caller.key,
        created: now(),
        name: None,
        parent: None,
        pinned: false,
        capsule,
    };
    add_named(&app, named).await
}
