//! The description of the API for machines.

/// OpenAPI 3.1.
pub(crate) const DOCUMENT: &str = include_str!("openapi.json");
