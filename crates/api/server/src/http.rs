//! Connections, routes, keys and limits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::app::{App, Caller, read};
use crate::error::{ApiError, ApiResult, REQUEST};
use crate::fields::{Fields, percent_decoded};
use crate::patience::{Hold, Patient};
use crate::{chat, completions, native, openapi, responses};

/// Bytes and fields of the head of a request.
const HEAD_BYTES: usize = 32 << 10;
const HEAD_FIELDS: usize = 64;

/// For who connects where all connections are taken.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

type AppState = State<Arc<App>>;
type Caught = Extension<Caller>;

/// All routes.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(document));
    let closed = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/v1/responses", post(create_response))
        .route("/v1/responses/{id}", get(read_response).delete(delete_response))
        .route("/v1/responses/{id}/input_items", get(input_items))
        .route("/v1/sessions", get(native::list_sessions).post(native::create_session))
        .route("/v1/sessions/{id}", get(native::read_session).delete(native::delete_session))
        .route("/v1/sessions/{id}/messages", get(native::list_messages))
        .route("/v1/sessions/{id}/append", post(native::append))
        .route("/v1/sessions/{id}/generate", post(native::generate))
        .route("/v1/sessions/{id}/interrupt", post(native::interrupt))
        .route("/v1/sessions/{id}/truncate", post(native::truncate))
        .route("/v1/sessions/{id}/snapshot", post(native::snapshot))
        .route("/v1/sessions/{id}/restore", post(native::restore))
        .route("/v1/sessions/{id}/rollback", post(native::rollback))
        .route("/v1/sessions/{id}/fork", post(native::fork))
        .route("/v1/capsules", get(native::list_capsules))
        .route("/v1/capsules/tree", get(native::tree))
        .route("/v1/capsules/import", post(native::import))
        .route("/v1/capsules/{id}", get(native::read_capsule).delete(native::delete_capsule))
        .route("/v1/capsules/{id}/pin", post(native::pin))
        .route("/v1/capsules/{id}/pin", delete(native::unpin))
        .route("/v1/capsules/{id}/export", get(native::export))
        .layer(middleware::from_fn_with_state(Arc::clone(app), authorise));
    open.merge(closed)
        .fallback(|request: Request| async move { openapi::no_path(request.uri().path()) })
        .method_not_allowed_fallback(|request: Request| async move {
            openapi::no_method(request.method(), request.uri().path())
        })
        .layer(middleware::from_fn_with_state(Arc::clone(app), outer))
        .with_state(Arc::clone(app))
}

/// Request ids, CORS where asked for, and a line in the log.
async fn outer(State(app): AppState, mut request: Request, next: Next) -> Response {
    let number = app.requests.fetch_add(1, Ordering::Relaxed) + 1;
    let id = app.request_id(number);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let origin = app.config.cors.as_deref().and_then(|o| HeaderValue::from_str(o).ok());
    // Clients in browsers send headers of their own; which ones changes nothing here.
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let begun = std::time::Instant::now();
    let fault = app.config.faults && request.headers().contains_key("x-ampoule-fault");
    request.extensions_mut().insert(Caller {
        key: [0; 32],
        request: number,
        fault,
        arrived: begun,
    });
    let mut response = if method == Method::OPTIONS && origin.is_some() {
        StatusCode::NO_CONTENT.into_response()
    } else if let Err(error) = foreign(&app, &request) {
        error.into_response()
    } else {
        REQUEST.scope(id.clone(), next.run(request)).await
    };
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(HeaderName::from_static("x-request-id"), value);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        let usual = HeaderValue::from_static("authorization, content-type");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.unwrap_or(usual));
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, retry-after"),
        );
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("GET, POST, DELETE"),
        );
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    }
    let status = response.status().as_u16();
    let micros = begun.elapsed().as_micros() as u64;
    tracing::info!(request = id, %method, path, status, micros, "answered");
    response
}

/// Refuses what no client sends on purpose: requests that a page of somebody else's makes a browser send to this machine,
/// bodies that say they are no JSON, and paths that are no text.
fn foreign(app: &App, request: &Request) -> ApiResult<()> {
    let text = |name: HeaderName| request.headers().get(name).map(|v| v.to_str().unwrap_or(""));
    let forbidden =
        |message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, "permission_error", message));
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    // Browsers say where a page came from. Clients that are no browsers do not.
    if let Some(origin) = text(header::ORIGIN)
        && changes
        && app.config.cors.as_deref().is_none_or(|allowed| allowed != "*" && allowed != origin)
    {
        return forbidden(
            "requests from this origin are not allowed; --cors names the one that is",
        );
    }
    // A name that was made to point here makes a page's requests look like those of the same origin.
    if app.config.keys.is_empty()
        && app.config.address.ip().is_loopback()
        && let Some(host) = text(header::HOST)
        && !local(host)
    {
        return forbidden(
            "this server answers to names of this machine; with API keys it answers to any",
        );
    }
    let import = request.uri().path() == "/v1/capsules/import";
    if changes
        && !import
        && let Some(kind) = text(header::CONTENT_TYPE)
        && !kind.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case("application/json")
    {
        let message =
            "the body must be JSON, and say so: send the header 'content-type: application/json'";
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(ApiError::new(status, "invalid_request_error", message));
    }
    if !is_text(request.uri().path()) {
        return Err(ApiError::invalid("the path is not UTF-8"));
    }
    Ok(())
}

/// Whether a path is UTF-8 once its percent signs are resolved.
fn is_text(path: &str) -> bool {
    std::str::from_utf8(&percent_decoded(path)).is_ok()
}

/// Whether a host is an address, or a name that nobody can own on the Internet.
fn local(host: &str) -> bool {
    if host.parse::<SocketAddr>().is_ok() || host.parse::<std::net::IpAddr>().is_ok() {
        return true;
    }
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let bracketed = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
    bracketed.is_some()
        || name.parse::<std::net::IpAddr>().is_ok()
        || name
            .rsplit_once('.')
            .is_none_or(|(_, last)| matches!(last, "localhost" | "local" | "internal"))
}

/// Lets only keys in that are known.
async fn authorise(State(app): AppState, mut request: Request, next: Next) -> Response {
    if !app.config.keys.is_empty() {
        let Some(key) = known_key(&app, request.headers()) else {
            let mut error = ApiError::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                if request.headers().contains_key(header::AUTHORIZATION) {
                    "this API key is not one of the server's"
                } else {
                    "an API key is needed: Authorization: Bearer KEY"
                },
            );
            error.code = Some("invalid_api_key");
            return error.into_response();
        };
        if let Some(caller) = request.extensions_mut().get_mut::<Caller>() {
            caller.key = key;
        }
    }
    if let Err(error) = no_query(&request) {
        return error.into_response();
    }
    next.run(request).await
}

/// Refuses parameters in the address, where none are looked at: they would be ignored.
fn no_query(request: &Request) -> ApiResult<()> {
    let path = request.uri().path();
    match request.uri().query() {
        Some(query) if path != "/v1/capsules/import" && !path.ends_with("/input_items") => {
            Fields::query(query)?.finish()
        }
        _ => Ok(()),
    }
}

/// The digest of the request's key, if it is one of ours. Digests are compared, all of them, each in constant time.
fn known_key(app: &App, headers: &HeaderMap) -> Option<[u8; 32]> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let key = value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer "))?;
    let digest = crate::key_digest(key.trim());
    let mut found = None;
    for known in &app.config.keys {
        // blake3's equality takes the same time whatever differs.
        if blake3::Hash::from_bytes(*known) == blake3::Hash::from_bytes(digest) {
            found = Some(digest);
        }
    }
    found
}

/// A body within limits.
pub(crate) async fn body(app: &App, request: Request) -> ApiResult<axum::body::Bytes> {
    let large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!(
                "the body has more than {} bytes: --body-mib of the server sets how much it takes",
                app.config.body_bytes
            ),
        )
    };
    // Where the head says so there is nothing to wait for.
    let said = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok());
    if said.and_then(|v| v.parse().ok()).is_some_and(|n: u64| n > app.config.body_bytes as u64) {
        return Err(large());
    }
    let limited = Limited::new(request.into_body(), app.config.body_bytes);
    let collected = tokio::time::timeout(app.config.body_time, limited.collect()).await;
    let slow = || {
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            "the body did not arrive in time",
        )
    };
    match collected.map_err(|_| slow())? {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.downcast_ref::<LengthLimitError>().is_some() => Err(large()),
        Err(_) => Err(ApiError::invalid("the body ended early")),
    }
}

async fn health(State(app): AppState) -> Response {
    if app.stopping.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "stopping" })))
            .into_response();
    }
    let mut said = json!({ "status": "ok" });
    if app.config.keys.is_empty() {
        said["model"] = json!(app.info.name);
    }
    Json(said).into_response()
}

async fn metrics(State(app): AppState, headers: HeaderMap) -> Response {
    if !app.config.keys.is_empty() && known_key(&app, &headers).is_none() {
        return ApiError::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            "an API key is needed: Authorization: Bearer KEY",
        )
        .into_response();
    }
    app.metrics.text_bytes.set(app.info.kept_bytes());
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], app.metrics.render()).into_response()
}

async fn document() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], openapi::DOCUMENT).into_response()
}

fn model_object(app: &App) -> Value {
    json!({
        "id": app.info.name, "object": "model", "created": app.info.created, "owned_by": "ampoule",
        "max_model_len": app.info.context,
    })
}

async fn models(State(app): AppState) -> Json<Value> {
    Json(json!({ "object": "list", "data": [model_object(&app)] }))
}

async fn model(State(app): AppState, Path(id): Path<String>) -> ApiResult<Json<Value>> {
    if id == app.info.name {
        Ok(Json(model_object(&app)))
    } else {
        Err(ApiError::not_found("model"))
    }
}

macro_rules! with_body {
    ($($name:ident => $handler:path),* $(,)?) => {$(
        async fn $name(State(app): AppState, Extension(caller): Caught, request: Request) -> ApiResult<Response> {
            let body = body(&app, request).await?;
            $handler(app, caller, body).await
        }
    )*};
}

with_body! {
    chat_completions => chat::handle,
    text_completions => completions::handle,
    create_response => responses::create,
    tokenize => completions::tokenize,
}

async fn detokenize(
    State(app): AppState,
    Extension(caller): Caught,
    request: Request,
) -> ApiResult<Response> {
    let body = body(&app, request).await?;
    read(&app, caller, &body, completions::detokenize).await
}

async fn read_response(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> ApiResult<Response> {
    responses::read(&app, &caller, &id)
}

async fn delete_response(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
) -> ApiResult<Response> {
    responses::remove(app, &caller, id).await
}

async fn input_items(
    State(app): AppState,
    Extension(caller): Caught,
    Path(id): Path<String>,
    request: Request<Body>,
) -> ApiResult<Response> {
    responses::input_items(&app, &caller, &id, request.uri().query().unwrap_or_default())
}

/// Serves until told to stop; then lets what runs end, for at most `grace`.
pub(crate) async fn serve(
    app: Arc<App>,
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
    grace: Duration,
) -> std::io::Result<()> {
    let router = router(&app);
    let connections = Arc::new(Semaphore::new(app.config.connections));
    let graceful = hyper_util::server::graceful::GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let (stream, _): (TcpStream, SocketAddr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, say: those that are open go on.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Beyond the limit a connection is closed at once: nothing is held for it.
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            let _ = stream.try_write(FULL);
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (stream, phase) = Patient::new(stream, app.config.head_time);
        let routes = TowerToHyperService::new(router.clone());
        let service = service_fn(move |request| {
            phase.busy();
            let (answer, phase) = (routes.call(request), phase.clone());
            async move {
                let answer = answer.await;
                let hold = answer.as_ref().ok().and_then(|a| a.extensions().get::<Hold>());
                phase.answered(hold.cloned());
                answer
            }
        });
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(app.config.idle_time)
            .max_buf_size(HEAD_BYTES)
            .max_headers(HEAD_FIELDS);
        let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
        let metrics = Arc::clone(&app.metrics);
        tokio::spawn(async move {
            metrics.connections.add(1);
            let _ = connection.await;
            metrics.connections.add(-1);
            drop(permit);
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        let yes = [
            "localhost",
            "localhost:8080",
            "LOCALHOST.",
            "127.0.0.1",
            "127.0.0.1:8080",
            "[::1]:8080",
            "[::1]",
            "::1",
            "box",
            "box:80",
            "box.local",
            "host.docker.internal:1",
            "a.localhost",
        ];
        for host in yes {
            assert!(local(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "a.b:c",
        ] {
            assert!(!local(host), "{host}");
        }
    }

    #[test]
    fn paths_are_text() {
        for path in ["/v1/models/a%20b", "/v1/%E6%9D%B1", "/%zz", "/%", "/%4", "/100%25"] {
            assert!(is_text(path), "{path}");
        }
        for path in ["/%ff", "/v1/models/%E6%9D", "/a%C3(b"] {
            assert!(!is_text(path), "{path}");
        }
    }
}
