//! The fields of a request: each is taken by name, and what nobody took is refused by name.

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
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

    /// Of a request's body, with one field beside it as it was sent, which is for the caller to read; `None` if there is none.
    pub(crate) fn parse_beside<'a>(
        body: &'a [u8],
        name: &'static str,
    ) -> ApiResult<(Self, Option<&'a str>)> {
        // No text is no JSON either.
        let text = std::str::from_utf8(body).unwrap_or_default();
        let mut reader = serde_json::Deserializer::from_str(text);
        let read = Beside(name).deserialize(&mut reader);
        match read.and_then(|read| reader.end().map(|()| read)) {
            Ok((map, beside)) => {
                let beside = beside.map(RawValue::get).filter(|text| *text != "null");
                Ok((Self { map, path: String::new() }, beside))
            }
            // What is wrong is said as everywhere.
            Err(_) => Self::parse(body).map(|all| (all, None)),
        }
    }

    /// A field, left where it is; `null` counts as absent.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Of a value that must be an object.
    pub(crate) fn of(value: Value, path: &str) -> ApiResult<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, path: path.to_owned() }),
            _ if path.is_empty() => Err(ApiError::invalid("the body is not a JSON object")),
            _ => Err(ApiError::param(path, format!("'{path}' must be an object"))),
        }
    }

    pub(crate) fn name(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A field as it is; `null` counts as absent.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
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

/// Reads an object, but for the field of this name.
struct Beside(&'static str);

impl<'de> DeserializeSeed<'de> for Beside {
    type Value = (Map<String, Value>, Option<&'de RawValue>);

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Self::Value, D::Error> {
        reader.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Beside {
    type Value = (Map<String, Value>, Option<&'de RawValue>);

    fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut all: A) -> Result<Self::Value, A::Error> {
        let (mut map, mut beside) = (Map::new(), None);
        while let Some(name) = all.next_key::<String>()? {
            if name == self.0 {
                beside = Some(all.next_value()?);
            } else {
                map.insert(name, all.next_value()?);
            }
        }
        Ok((map, beside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One field beside the others: what is refused, and with which words, is the same.
    #[test]
    fn a_body_with_one_field_beside() {
        let body = r#" {"b": {"a": 1}, "a" : [1, {"x": "\u00e9"} ] , "c": null} "#;
        let (fields, a) = Fields::parse_beside(body.as_bytes(), "a").unwrap();
        assert_eq!(a, Some(r#"[1, {"x": "\u00e9"} ]"#));
        let mut all = Fields::parse(body.as_bytes()).unwrap();
        assert!(all.value("a").is_some());
        assert_eq!(fields.map, all.map);
        let (fields, a) = Fields::parse_beside(br#"{"a": null, "b": 1}"#, "a").unwrap();
        assert!(a.is_none() && fields.peek("b").is_some() && fields.peek("a").is_none());
        // Of two with one name the later one counts, here as there.
        assert_eq!(Fields::parse_beside(br#"{"a": 1, "a": 2}"#, "a").unwrap().1, Some("2"));
        let wrong: [&[u8]; 9] = [
            b"",
            b"[]",
            b"5",
            b"{",
            br#"{"a": [}"#,
            br#"{"a": 1} x"#,
            br#"{"a": "\x"}"#,
            b"{\"a\": \"\xff\"}",
            br#"{"a": [1], "b": "\ud800"}"#,
        ];
        for body in wrong {
            let (Err(error), Err(expected)) =
                (Fields::parse_beside(body, "a"), Fields::parse(body))
            else {
                panic!("{} was taken", String::from_utf8_lossy(body));
            };
            assert_eq!(error.body(), expected.body());
        }
    }
}
