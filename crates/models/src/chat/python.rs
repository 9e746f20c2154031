//! What templates expect of Python: how values print, what counts as a sequence, methods of strings.

use std::fmt::Write;

use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::json;

/// Nesting deeper than this prints as `...`, as Python prints a list that holds itself.
const DEPTH: usize = 200;

/// Makes the environment behave as Jinja2 on Python where the two differ.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, _, value| {
        match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&text(value)),
        }
        .map_err(|_| Error::new(ErrorKind::WriteFailure, "out of memory"))
    });
    environment.add_filter("string", |value: &Value| -> Value {
        if value.kind() == ValueKind::String { value.clone() } else { Value::from(text(value)) }
    });
    // Python: everything with a length and items is a sequence, and so are mappings and strings.
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq
                | ValueKind::Map
                | ValueKind::String
                | ValueKind::Bytes
                | ValueKind::Undefined
        )
    });
    environment.add_test("iterable", |value: &Value| {
        let kind = value.kind();
        let plain =
            matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Bytes);
        plain || matches!(kind, ValueKind::Iterable | ValueKind::Undefined)
    });
    environment.set_unknown_method_callback(method);
}

/// Python's `str`.
fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => {
            let mut out = String::new();
            repr(&mut out, value, 0);
            out
        }
    }
}

/// Python's `repr`.
fn repr(out: &mut String, value: &Value, depth: usize) {
    if depth > DEPTH {
        out.push_str("...");
        return;
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&match json::number(value).as_str() {
            "NaN" => "nan".to_owned(),
            "Infinity" => "inf".to_owned(),
            "-Infinity" => "-inf".to_owned(),
            number => number.to_owned(),
        }),
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(out, &item, depth + 1);
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                repr(out, &key, depth + 1);
                out.push_str(": ");
                repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1);
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

/// A string literal as Python's `repr` writes it.
fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..0xa0).contains(&(c as u32)) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Methods of Python that templates use and that minijinja's own set lacks or sees otherwise.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                let from_left = name == "partition";
                let parts = if from_left {
                    text.split_once(separator)
                } else {
                    text.rsplit_once(separator)
                };
                return Ok(Value::from(
                    match parts {
                        Some((before, behind)) => [before, separator, behind],
                        None if from_left => [text, "", ""],
                        None => ["", "", text],
                    }
                    .map(Value::from)
                    .to_vec(),
                ));
            }
            "rsplit" => {
                let (separator, limit): (&str, Option<i64>) = from_args(args)?;
                if separator.is_empty() {
                    return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
                }
                let limit = limit
                    .and_then(|limit| usize::try_from(limit).ok())
                    .map_or(usize::MAX, |n| n.saturating_add(1));
                let mut parts: Vec<Value> =
                    text.rsplitn(limit, separator).map(Value::from).collect();
                parts.reverse();
                return Ok(Value::from(parts));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}
