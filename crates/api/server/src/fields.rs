//! The fields of a request: each is taken by name, and what nobody took is refused by name.

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult};

/// What a field can be: how that is said, and whether a value is it.
pub(crate) trait Plain: DeserializeOwned {
    const WHAT: &'static str;

    fn fits(value: &Value) -> bool;
}

macro_rules! plain {
    ($($kind:ty, $what:literal, $fits:expr;)*) => {$(
        impl Plain for $kind {
            const WHAT: &'static str = $what;

            fn fits(value: &Value) -> bool {
                let fits: fn(&Value) -> bool = $fits;
                fits(value)
            }
        }
    )*};
}

plain! {
    usize, "a whole number from 0 on", Value::is_u64;
    u32, "a whole number from 0 to 4294967295", |v| v.as_u64().is_some_and(|n| u32::try_from(n).is_ok());
    i64, "a whole number of at most 63 bits", Value::is_i64;
    f32, "a number", Value::is_number;
    bool, "true or false", Value::is_boolean;
    String, "text", Value::is_string;
    Value, "a value", |_| true;
    Map<String, Value>, "an object", Value::is_object;
    Vec<u32>, "a list of whole numbers from 0 to 4294967295", |v| v.as_array().is_some_and(|l| l.iter().all(u32::fits));
    Vec<String>, "a list of texts", |v| v.as_array().is_some_and(|l| l.iter().all(String::fits));
    Vec<Value>, "a list", Value::is_array;
}

/// A value in an error, where it is short enough to be read.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) if text.chars().count() > 40 => {
            format!("{} and so on", json!(text.chars().take(40).collect::<String>()))
        }
        Value::Array(_) => "a list of other things".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        short => short.to_string(),
    }
}

/// `reasoning_effort` in the official clients of November 2026.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Names that a call does not have, and what it has in their place.
pub(crate) type Hints = &'static [(&'static str, &'static str)];

/// An object under examination.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Before the names in messages.
    path: String,
    hints: Hints,
}

impl Fields {
    /// Of a request's body.
    pub(crate) fn parse(body: &[u8]) -> ApiResult<Self> {
        let text =
            std::str::from_utf8(body).map_err(|_| ApiError::invalid("the body is not UTF-8"))?;
        if text.trim_start().is_empty() {
            return Err(ApiError::invalid("the body is empty: it must be a JSON object"));
        }
        let value: Value = serde_json::from_str(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            ApiError::invalid(match error.classify() {
                Category::Eof => {
                    format!("the body is not JSON: it ends in the middle, at line {line} column {column}")
                }
                _ => format!("the body is not JSON: line {line} column {column} is wrong"),
            })
        })?;
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
                Ok((Self { map, path: String::new(), hints: &[] }, beside))
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
            Value::Object(map) => Ok(Self { map, path: path.to_owned(), hints: &[] }),
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
        Ok(Self { map, path: String::new(), hints: &[] })
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

    pub(crate) fn take<T: Plain>(&mut self, name: &str) -> ApiResult<Option<T>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let wrong = |but: &str| {
            let name = self.name(name);
            ApiError::param(&name, format!("'{name}' must be {}{but}", T::WHAT))
        };
        if !T::fits(&value) {
            return Err(wrong(&format!(", not {}", shown(&value))));
        }
        serde_json::from_value(value).map(Some).map_err(|_| wrong(""))
    }

    pub(crate) fn require<T: Plain>(&mut self, name: &str) -> ApiResult<T> {
        match self.take(name)? {
            Some(value) => Ok(value),
            None => Err(self.missing(name)),
        }
    }

    /// That a field is missing; where another stands for it under a name that is known elsewhere, what it is called here.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let elsewhere = self.map.iter().find(|(n, v)| !v.is_null() && self.hint(n).is_some());
        if let Some((other, _)) = elsewhere {
            return self.unknown(other);
        }
        let path = self.name(name);
        ApiError::param(&path, format!("'{path}' is missing"))
    }

    /// With hints for names that other APIs have.
    pub(crate) fn with_hints(mut self, hints: Hints) -> Self {
        self.hints = hints;
        self
    }

    fn hint(&self, name: &str) -> Option<&'static str> {
        self.hints.iter().find(|(other, _)| *other == name).map(|(_, hint)| *hint)
    }

    fn unknown(&self, name: &str) -> ApiError {
        let short: String = name.chars().take(64).collect();
        let hint = self.hint(name).unwrap_or("there is no such parameter");
        let error = ApiError::unsupported(self.name(&short), hint);
        ApiError { code: Some("unknown_parameter"), ..error }
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
        T: Plain + PartialOrd + std::fmt::Display,
    {
        let path = self.name(name);
        let outside = |value: &dyn std::fmt::Display| {
            let (least, most) = (range.start(), range.end());
            let message = format!("'{path}' must be from {least} to {most}, not {value}");
            Err(ApiError::param(&path, message))
        };
        // Kinds of numbers that know none below zero would be asked for by another range.
        if let Some(value) = self.peek(name)
            && value.as_i64().is_some_and(|n| n < 0)
            && !T::fits(value)
        {
            return outside(value);
        }
        match self.take::<T>(name)? {
            Some(value) if !range.contains(&value) => outside(&value),
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

    /// How much to think, by the names that OpenAI's clients know, as the variable that templates know: a model thinks or
    /// does not.
    pub(crate) fn effort(
        &mut self,
        name: &str,
        variables: &mut Map<String, Value>,
    ) -> ApiResult<()> {
        let path = self.name(name);
        let Some(effort) = self.take::<String>(name)? else { return Ok(()) };
        if !EFFORTS.contains(&effort.as_str()) {
            let known = EFFORTS.join(", ");
            let message = format!("'{path}' must be one of {known}, not {}", shown(&json!(effort)));
            return Err(ApiError::param(&path, message));
        }
        variables.entry("enable_thinking").or_insert(json!(effort != "none"));
        Ok(())
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
            Some((name, _)) => Err(self.unknown(name)),
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
