//! The description of the API for machines, and what it says to those who ask for what is not there.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::http::{Method, StatusCode};
use serde_json::Value;

use crate::error::ApiError;

/// OpenAPI 3.1.
pub(crate) const DOCUMENT: &str = include_str!("openapi.json");

/// Every path with its methods.
static PATHS: LazyLock<BTreeMap<String, Vec<String>>> = LazyLock::new(|| {
    let document = serde_json::from_str::<Value>(DOCUMENT).unwrap_or_default();
    let paths = document["paths"].as_object().cloned().unwrap_or_default();
    let methods = |operations: &Value| -> Vec<String> {
        operations
            .as_object()
            .map(|o| o.keys().map(|m| m.to_uppercase()).collect())
            .unwrap_or_default()
    };
    paths.iter().map(|(path, operations)| (path.clone(), methods(operations))).collect()
});

/// Characters of a path that are compared.
const COMPARED: usize = 120;

/// A path of the document with its ids as they are in the other.
fn filled(template: &str, path: &str) -> Option<String> {
    let (parts, given): (Vec<&str>, Vec<&str>) =
        (template.split('/').collect(), path.split('/').collect());
    if parts.len() != given.len() {
        return None;
    }
    let filled: Vec<&str> =
        parts.iter().zip(&given).map(|(p, g)| if p.starts_with('{') { *g } else { *p }).collect();
    Some(filled.join("/"))
}

/// How many characters must be put in, left out or changed to make one text of another.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

/// The path of the document that is most like one that is not there, if any is.
fn likely(path: &str) -> Option<&'static str> {
    let path: String = path.trim_end_matches('/').chars().take(COMPARED).collect();
    let path = path.replace("/api/v1/", "/v1/").replace("/v1/v1/", "/v1/");
    let other = match path.strip_prefix("/v1") {
        Some(rest) => rest.to_owned(),
        None => format!("/v1{path}"),
    };
    let nearest = PATHS.keys().filter_map(|template| {
        let like = |path: &String| Some(distance(&filled(template, path)?, path));
        Some((like(&path).into_iter().chain(like(&other)).min()?, template.as_str()))
    });
    nearest.min().filter(|(distance, _)| *distance <= 3).map(|(_, template)| template)
}

/// 404 for a path that is not there.
pub(crate) fn no_path(path: &str) -> ApiError {
    let message = match likely(path) {
        Some(template) => {
            format!("there is no such path; there is {template}, and /openapi.json lists them all")
        }
        None => "there is no such path; /openapi.json lists them all".to_owned(),
    };
    ApiError { message, ..ApiError::not_found("path") }
}

/// 405 for a path that takes other methods.
pub(crate) fn no_method(method: &Method, path: &str) -> ApiError {
    let found = PATHS.iter().find(|(template, _)| filled(template, path).as_deref() == Some(path));
    let methods = found.map(|(_, methods)| methods.join(" and ")).unwrap_or_default();
    let message = if methods.is_empty() {
        "this path takes another method; /openapi.json has them".to_owned()
    } else {
        let method: String = method.as_str().chars().take(32).collect();
        format!("this path takes {methods}, not {method}")
    };
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likely_path_is_named() {
        for (path, wanted) in [
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/v1/chat/completion", Some("/v1/chat/completions")),
            ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
            ("/api/v1/models", Some("/v1/models")),
            ("/completion", Some("/v1/completions")),
            ("/v1/tokenize", Some("/tokenize")),
            ("/v1/session/sess_1/generate", Some("/v1/sessions/{id}/generate")),
            ("/v1/sessions/sess_1/rolback", Some("/v1/sessions/{id}/rollback")),
            ("/v1/models/", Some("/v1/models")),
            ("/healthz", Some("/health")),
            ("/v1/embeddings", None),
            ("/", None),
            ("/favicon.ico", None),
        ] {
            assert_eq!(likely(path), wanted, "{path}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert!(no_path(&"/x".repeat(5000)).message.len() < 200);
        let other = no_method(&Method::PUT, "/v1/sessions/a").message;
        assert_eq!(other, "this path takes GET and DELETE, not PUT");
    }
}
