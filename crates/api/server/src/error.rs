//! What a client is told when something goes wrong, in the shape that OpenAI's clients understand.

use ampoule::store::{HeadError, LoadError, ReadError, SaveError};
use ampoule::{ChatError, EngineError, StoreError};
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// An error for a client. Its text says nothing of paths, keys or other clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub code: Option<&'static str>,
    pub param: Option<String>,
    pub message: String,
    /// Seconds.
    pub retry_after: Option<u64>,
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

const TOO_LONG: &str = "context_length_exceeded";

impl ApiError {
    pub(crate) fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, kind, code: None, param: None, message, retry_after: None }
    }

    /// 400: the request is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: a parameter is wrong.
    pub(crate) fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::invalid(message) }
    }

    /// 400: a parameter that is known, but not supported with this value.
    pub(crate) fn unsupported(param: impl Into<String>, what: &str) -> Self {
        let param = param.into();
        let message = format!("'{param}' is not supported here: {what}");
        Self { code: Some("unsupported_parameter"), ..Self::param(param, message) }
    }

    pub(crate) fn not_found(what: &str) -> Self {
        let message = format!("there is no such {what}, or it belongs to another key or to none");
        Self {
            code: Some("not_found"),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict_error", message)
    }

    /// 500: nothing that the client could change. What happened is in the log, by the request's id.
    pub(crate) fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "the server failed on this request; its log has the cause under the request's id",
        )
    }

    pub(crate) fn overloaded(retry_after: u64) -> Self {
        Self {
            code: Some("queue_full"),
            retry_after: Some(retry_after),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "the queue is full; try again after the time in Retry-After",
            )
        }
    }

    /// 507: all memory for capsules is in use by what must stay.
    pub(crate) fn no_room() -> Self {
        Self::new(
            StatusCode::INSUFFICIENT_STORAGE,
            "server_error",
            "there is no memory for another capsule: delete sessions or capsules",
        )
    }

    pub(crate) fn stopping() -> Self {
        Self {
            code: Some("stopping"),
            retry_after: Some(5),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "the server is stopping or its engine has ended",
            )
        }
    }

    pub(crate) fn deadline() -> Self {
        Self {
            code: Some("deadline_exceeded"),
            ..Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                "the request was not done before its deadline",
            )
        }
    }

    /// 400: too long. Whoever knows which parameter it was says so ([`of`](Self::of)).
    pub(crate) fn context(wanted: usize, context: usize) -> Self {
        Self {
            code: Some(TOO_LONG),
            ..Self::invalid(format!(
                "the request has {wanted} tokens and the context is {context}: there must be room for at least one more \
                 (--context of the server sets it, up to what the model was trained with)"
            ))
        }
    }

    /// Names the parameter of what was too long.
    pub(crate) fn of(mut self, param: &str) -> Self {
        if self.code == Some(TOO_LONG) {
            self.param = Some(param.to_owned());
        }
        self
    }

    /// 507: the store holds what it may.
    fn store_full() -> Self {
        Self {
            code: Some("store_full"),
            ..Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "server_error",
                "the store holds what --store-quota-mib allows: delete responses, sessions or capsules",
            )
        }
    }

    /// 500: what the store has of a state cannot be read.
    fn unreadable() -> Self {
        Self {
            code: Some("capsule_unreadable"),
            message: "the store's copy of this state is damaged: `ampoule capsule fsck` says what is wrong with it, and which others \
                      have the same rows"
                .to_owned(),
            ..Self::internal()
        }
    }

    /// What a call did to a session is in memory and not in the store.
    pub(crate) fn unsaved(self) -> Self {
        let message = format!(
            "{}. The session has what this call did, in memory alone: do not send it again, the next call that can be saved saves \
             it too",
            self.message
        );
        Self { code: Some("session_not_saved"), message, ..self }
    }

    pub(crate) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

tokio::task_local! {
    /// The id of the request that this task answers.
    pub(crate) static REQUEST: String;
}

impl From<ampoule::Error> for ApiError {
    fn from(error: ampoule::Error) -> Self {
        match &error {
            ampoule::Error::Engine(engine) => match engine {
                EngineError::ContextFull { position, wanted, context } => {
                    Self::context(*position as usize + wanted, *context)
                }
                EngineError::Sampling { name, .. } => Self::param(*name, engine.to_string()),
                EngineError::TokenRange { .. }
                | EngineError::NothingRead { .. }
                | EngineError::RollbackAhead { .. }
                | EngineError::NoJournal { .. }
                | EngineError::Capsule(_)
                | EngineError::CapsuleState { .. }
                | EngineError::Lineage(_) => Self::invalid(engine.to_string()),
                _ => internal(&error),
            },
            ampoule::Error::Chat(ChatError::Refused(words)) => {
                Self::param("messages", format!("the model's chat template refuses this: {words}"))
            }
            ampoule::Error::Chat(ChatError::Render(_)) => {
                Self::param("messages", "the model's chat template cannot render these messages")
            }
            ampoule::Error::NoChatTemplate => Self::invalid(error.to_string()),
            ampoule::Error::NothingAllowed { .. } => {
                Self::param("response_format", error.to_string())
            }
            ampoule::Error::Store(store) => match &**store {
                StoreError::Save(SaveError::Quota { .. }) => Self::store_full(),
                StoreError::Load(LoadError::Damaged { .. })
                | StoreError::Head(HeadError::Read(ReadError::Damaged(_))) => {
                    let _ = internal(&error);
                    Self::unreadable()
                }
                StoreError::Load(LoadError::NoSuchCapsule { .. } | LoadError::Removed { .. })
                | StoreError::Unknown { .. } => Self::not_found("capsule"),
                StoreError::Load(LoadError::Memory { .. }) => Self::no_room(),
                _ => internal(&error),
            },
            ampoule::Error::Tokenizer(_) => Self::invalid("the text cannot be tokenized"),
            _ => internal(&error),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        ampoule::Error::from(error).into()
    }
}

fn internal(error: &ampoule::Error) -> ApiError {
    let request = REQUEST.try_with(Clone::clone).unwrap_or_default();
    tracing::error!(request, %error, "request failed");
    ApiError::internal()
}
