//! stub
use std::sync::Arc;
use axum::response::Response;
use crate::app::*; use crate::error::*; use crate::vault::Vault; use crate::durable::Durable;
pub(crate) async fn create(_: Arc<App>, _: Caller, _: Body) -> ApiResult<Response> { Err(ApiError::internal()) }
pub(crate) fn read(_: &App, _: &Caller, _: &str) -> ApiResult<Response> { Err(ApiError::internal()) }
pub(crate) async fn remove(_: Arc<App>, _: &Caller, _: String) -> ApiResult<Response> { Err(ApiError::internal()) }
pub(crate) fn input_items(_: &App, _: &Caller, _: &str, _: &str) -> ApiResult<Response> { Err(ApiError::internal()) }
pub(crate) fn bring_back(_: &Vault, _: &Durable) {}
