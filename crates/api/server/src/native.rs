//! stub
use crate::error::*; use crate::vault::Vault; use crate::durable::Durable; use crate::worker::Worker;
pub(crate) async fn list_sessions() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn create_session() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn read_session() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn delete_session() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn append() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn generate() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn interrupt() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn truncate() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn snapshot() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn restore() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn rollback() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn fork() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn list_capsules() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn tree() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn import() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn read_capsule() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn delete_capsule() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn pin() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn unpin() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) async fn export() -> ApiResult<()> { Err(ApiError::internal()) }
pub(crate) fn bring_back(_: &mut Worker, _: &Vault, _: &Durable) {}
pub(crate) fn park(_: &Worker, _: &Vault, _: &Durable) {}
