//! `/v1/sessions` and `/v1/capsules`: the verbs themselves.
//!
//! Between calls a session is a capsule; a call restores it into whatever slot is free, which costs the fixed state where
//! the slot held it last. While a call is under way others on the same session are refused with 409.

mod capsules;
mod heard;
mod history;
mod input;
mod saved;
mod sessions;
mod shelf;

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::json;

use crate::app::{App, Caller, QUICK, blocking, off_thread_if};
use crate::error::{ApiError, ApiResult, REQUEST};
use crate::fields::Fields;
use crate::http::body;

pub(crate) use capsules::{
    delete_capsule, export, import, list_capsules, pin, read_capsule, snapshot, tree, unpin,
};
pub(crate) use history::list_messages;
pub(crate) use saved::{bring_back, expire};
pub(crate) use sessions::{
    append, create_session, delete_session, fork, generate, interrupt, list_sessions, read_session,
    restore, rollback, truncate,
};
pub(crate) use shelf::{fill as fill_shelf, id_of, of_the_store};

type AppState = State<Arc<App>>;
type Caught = Extension<Caller>;
type Answer = ApiResult<Response>;

async fn fields(app: &App, request: Request) -> ApiResult<Fields> {
    let body = body(app, request).await?;
    if body.is_empty() {
        return Fields::of(json!({}), "");
    }
    off_thread_if(body.len() > QUICK, move || Fields::parse(&body)).await
}

/// For calls that take no fields: a body may be empty or `{}`.
async fn nothing(app: &App, request: Request) -> ApiResult<()> {
    fields(app, request).await?.finish()
}

/// Runs something to its end, whether or not the client is still there: what is half done in the store would come back with
/// the next process.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = ApiResult<T>> + Send + 'static,
) -> ApiResult<T> {
    let request = REQUEST.try_with(Clone::clone).unwrap_or_default();
    tokio::spawn(REQUEST.scope(request, work)).await.map_err(|_| ApiError::internal())?
}

async fn forget(app: &Arc<App>, kind: &'static str, id: String) -> ApiResult<()> {
    if app.vault.durable.is_none() {
        return Ok(());
    }
    let vault = Arc::clone(&app.vault);
    blocking(move || {
        if let Some(durable) = &vault.durable {
            durable.forget(kind, &id);
        }
        Ok(())
    })
    .await
}
