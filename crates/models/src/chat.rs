//! Chat templates: Jinja as `transformers` runs it.
//!
//! A model's template was written against Python's Jinja2 with the settings of `transformers`: blocks are trimmed,
//! `tojson` is `json.dumps` without escapes, Python's methods work on strings and mappings, and
//! `raise_exception` refuses a conversation. [`ChatTemplate`] gives the same text for the same conversation.

mod json;
mod python;
mod time;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

/// The name under which the template is kept and appears in errors.
const NAME: &str = "chat template";

/// A chat template could not be compiled or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The template does not parse.
    #[error("the chat template does not parse: {0}")]
    Syntax(String),
    /// The template refused the conversation with `raise_exception`; the text is the template's own.
    #[error("{0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the chat template failed: {0}")]
    Render(String),
}

/// Where `strftime_now` takes the time from.
type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// A compiled chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    variables: Map<String, Value>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("variables", &self.variables).finish_non_exhaustive()
    }
}

/// The error that `raise_exception` leaves, to tell it from failures of the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// A message in the form that templates work on. One that is rendered again and again, as those of a conversation are, is
/// converted once that way; copies are cheap. It serializes as the message that it was made of.
#[derive(Clone, Debug)]
pub struct ChatMessage(minijinja::Value);

impl ChatMessage {
    /// Converts a message, or any part of one.
    pub fn new(message: &Value) -> Self {
        Self(minijinja::Value::from(minijinja::value::Serde(message)))
    }
}

impl Serialize for ChatMessage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The engine takes its own values as they are.
        self.0.serialize(serializer)
    }
}

impl ChatTemplate {
    /// Compiles a template. `strftime_now` gives the system's time, in UTC.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] when it does not parse.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        Self::with_clock(source, SystemTime::now)
    }

    /// Compiles a template whose `strftime_now` asks this clock, so that a prompt can be the same every day.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] when it does not parse.
    pub fn with_clock(
        source: &str,
        clock: impl Fn() -> SystemTime + Send + Sync + 'static,
    ) -> Result<Self, ChatError> {
        let syntax = |error: minijinja::Error| ChatError::Syntax(describe(&error));
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(syntax)?,
        );
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        python::install(&mut environment);
        environment.add_filter("tojson", json::tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone())
                    .with_source(Raised(message)))
            },
        );
        let clock: Clock = Arc::new(clock);
        environment.add_function("strftime_now", move |format: String| {
            time::format(clock(), &format)
                .map_err(|reason| minijinja::Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_template_owned(NAME, without_generation(source)).map_err(syntax)?;
        Ok(Self { environment, variables: Map::new() })
    }

    /// Sets variables for every rendering, such as [`Tokenizer::template_variables`].
    ///
    /// [`Tokenizer::template_variables`]: crate::tokenizer::Tokenizer::template_variables
    #[must_use]
    pub fn with_variables(mut self, variables: Map<String, Value>) -> Self {
        self.variables = variables;
        self
    }

    /// The text of a conversation.
    ///
    /// `messages` is a list of objects with `role` and `content`, as chat APIs have it, or of [`ChatMessage`]; `tools` a
    /// list of tool schemas. `extra` are further variables, such as `enable_thinking`; they go before the ones of
    /// [`with_variables`](Self::with_variables). A variable that is not set is undefined: it prints as nothing,
    /// is false, and has no attributes.
    ///
    /// # Errors
    /// [`ChatError::Refused`] with the template's own words when it calls `raise_exception`, else
    /// [`ChatError::Render`].
    pub fn render<M: Serialize + ?Sized>(
        &self,
        messages: &M,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, ChatError> {
        let context =
            Variables { settings: &self.variables, extra, messages, tools, add_generation_prompt };
        let context = minijinja::Value::from(minijinja::value::Serde(context));
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| ChatError::Render(describe(&error)))?;
        template.render(context).map_err(|error| {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(this) = cause {
                if let Some(Raised(message)) = this.downcast_ref() {
                    return ChatError::Refused(message.clone());
                }
                cause = this.source();
            }
            ChatError::Render(describe(&error))
        })
    }
}

/// The variables of one rendering, as they are: a long conversation is not copied for them.
struct Variables<'a, M: ?Sized> {
    settings: &'a Map<String, Value>,
    extra: &'a Map<String, Value>,
    messages: &'a M,
    tools: Option<&'a Value>,
    add_generation_prompt: bool,
}

impl<M: Serialize + ?Sized> Serialize for Variables<'_, M> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        // Of two values with one name the later one counts.
        map.serialize_entry("documents", &Value::Null)?;
        for (name, value) in self.settings.iter().chain(self.extra) {
            map.serialize_entry(name, value)?;
        }
        map.serialize_entry("messages", self.messages)?;
        map.serialize_entry("tools", self.tools.unwrap_or(&Value::Null))?;
        map.serialize_entry("add_generation_prompt", &self.add_generation_prompt)?;
        map.end()
    }
}

/// An error of the engine with its line.
fn describe(error: &minijinja::Error) -> String {
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    format!("{}{detail}{line}", error.kind())
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark a trainer's text and are no Jinja, by a block
/// that does nothing. Whitespace control stays as written.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inside = tag.trim_start_matches("{%").trim_end_matches("%}");
        let open = if inside.starts_with(['-', '+']) { &inside[..1] } else { "" };
        let close = if inside.len() > open.len() && inside.ends_with(['-', '+']) {
            &inside[inside.len() - 1..]
        } else {
            ""
        };
        match inside.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&["{%", open, " with ", close, "%}"].concat()),
            "endgeneration" => out.push_str(&["{%", open, " endwith ", close, "%}"].concat()),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_go_and_their_whitespace_control_stays() {
        let source = "a{%- generation -%} b {% endgeneration +%}\nc{% if x %}{% endif %}{% open";
        let expected = "a{%- with -%} b {% endwith +%}\nc{% if x %}{% endif %}{% open";
        assert_eq!(without_generation(source), expected);
    }
}
