//! The fields of a request: each is taken by name, and what nobody took is refused by name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult};

/// An object under examination.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Before the names in messages.
    path: String,
}

impl Fields {
    /// Of a request's body.
    pub(crate) fn parse(body: &[u8]) -> ApiResult<Self> {
        let text =
            std::str::from_utf8(body).map_err(|_| ApiError::invalid("the body is not UTF-8"))?;
        let value: Value = serde_json::from_str(text)
            .map_err(|error| ApiError::invalid(format!("the body is not JSON: {error}")))?;
        Self::of(value, "")
    }

    /// Of a value that must be an object.
    pub(crate) fn of(value: Value, path: &str) -> ApiResult<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, path: path.to_owned() }),
            _ if path.is_empty() => Err(ApiError::invalid("the body is not a JSON object")),
            _ => Err(ApiError::param(path, format!("'{path}' must be an object"))),
        }
    }

    /// Of the part of an address behind the question mark: all of it is text.
    pub(crate) fn query(query: &str) -> ApiResult<Self> {
        let mut map = Map::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let plain = |text: &str| {
                let bytes = percent_decoded(&text.replace('+', " "));
                String::from_utf8(bytes).map_err(|_| ApiError::invalid("the query is not UTF-8"))
            };
            let (name, value) = (plain(name)?, Value::String(plain(value)?));
            if map.insert(name.clone(), value).is_some() {
                let short: String = name.chars().take(64).collect();
                return Err(ApiError::param(&short, format!("'{short}' is there more than once")));
            }
        }
        Ok(Self { map, path: String::new() })
    }

    pub(crate) fn name(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A field as it is; `null` counts as absent.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Makes the texts `true` and `false` what they say: in a query all is text.
    pub(crate) fn flag(&mut self, name: &str) {
        if let Some(value) = self.map.get_mut(name)
            && let Some(flag) = value.as_str().and_then(|text| text.parse::<bool>().ok())
        {
            *value = Value::Bool(flag);
        }
    }

    /// Puts a value back, for whoever takes it later.
    pub(crate) fn put(&mut self, name: &str, value: Option<Value>) {
        if let Some(value) = value {
            self.map.insert(name.to_owned(), value);
        }
    }

    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> ApiResult<Option<T>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let wrong = |error: serde_json::Error| {
            let name = self.name(name);
            ApiError::param(&name, format!("'{name}' is not what it should be: {error}"))
        };
        serde_json::from_value(value).map(Some).map_err(wrong)
    }

    pub(crate) fn require<T: DeserializeOwned>(&mut self, name: &str) -> ApiResult<T> {
        let path = self.name(name);
        self.take(name)?.ok_or_else(|| ApiError::param(&path, format!("'{path}' is missing")))
    }

    /// A list that must be there. What is in it is moved: [`require`](Self::require) would build every value anew.
    pub(crate) fn list(&mut self, name: &str) -> ApiResult<Vec<Value>> {
        match self.value(name) {
            Some(Value::Array(list)) => Ok(list),
            other => {
                self.put(name, other);
                self.require(name)
            }
        }
    }

    /// A number in a range.
    pub(crate) fn within<T>(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<T>,
    ) -> ApiResult<Option<T>>
    where
        T: DeserializeOwned + PartialOrd + std::fmt::Display,
    {
        let path = self.name(name);
        match self.take::<T>(name)? {
            Some(value) if !range.contains(&value) => Err(ApiError::param(
                &path,
                format!("'{path}' must be from {} to {}, not {value}", range.start(), range.end()),
            )),
            value => Ok(value),
        }
    }

    /// A text of at most `limit` bytes.
    pub(crate) fn text(&mut self, name: &str, limit: usize) -> ApiResult<Option<String>> {
        let path = self.name(name);
        match self.take::<String>(name)? {
            Some(text) if text.len() > limit => Err(ApiError::param(
                &path,
                format!("'{path}' has {} bytes; at most {limit} are taken", text.len()),
            )),
            text => Ok(text),
        }
    }

    /// Fields that change nothing for anybody, such as an end user's name.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.shift_remove(*name);
        }
    }

    /// A field of which only some values are supported: those that ask for nothing.
    pub(crate) fn only(&mut self, name: &str, allowed: &[Value], what: &str) -> ApiResult<()> {
        match self.value(name) {
            Some(value) if !allowed.contains(&value) => {
                Err(ApiError::unsupported(self.name(name), what))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what is left.
    pub(crate) fn finish(self) -> ApiResult<()> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => {
                let short: String = name.chars().take(64).collect();
                let mut error =
                    ApiError::unsupported(self.name(&short), "there is no such parameter");
                error.code = Some("unknown_parameter");
                Err(error)
            }
            None => Ok(()),
        }
    }
}

/// Text with its percent signs resolved; one that begins no code stands for itself.
pub(crate) fn percent_decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| *first == b'%');
        let code = hex.and_then(|h| std::str::from_utf8(h).ok());
        let (byte, used) = match code.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) => (byte, 3),
            None => (*first, 1),
        };
        bytes.push(byte);
        rest = &rest[used..];
    }
    bytes
}
