//! From messages to tokens: what the model's own template makes of them, and where boundaries are worth taking.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use ampoule::{Ampoule, ChatMessage, ChatTemplate, EncodeOptions, TokenKind, Tokenizer};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::cache::Space;
use crate::error::{ApiError, ApiResult};
use crate::fields::Fields;
use crate::grammar::Grammars;
use crate::pieces::Pieces;
use crate::recent::{Recent, Shown};

/// Stand-ins for control tokens that users wrote: characters of a private plane, so that no template changes them.
const MARKER: u32 = 0x0010_F800;
const MARKERS: u32 = 0x400;
/// Tokens that a boundary is worth at least.
const LEAST_GAP: u32 = 4;
/// Where nothing else divides a prompt, a boundary every so many tokens.
const GRID: u32 = 256;
/// Messages of a conversation at most.
pub(crate) const MESSAGE_LIMIT: usize = 8192;

/// A tool that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub name: String,
    /// The schema of its arguments.
    pub parameters: Value,
    /// As the template gets it.
    pub shown: Value,
}

/// A prompt, ready to read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prompt {
    pub tokens: Vec<u32>,
    /// Where messages end, calls of tools begin, and the like; ascending, none at 0 or at the end.
    pub marks: Vec<u32>,
    /// Whether the reply begins inside the model's thoughts.
    pub thinking: bool,
}

/// How the state ends that messages are added to.
#[derive(Clone, Copy)]
pub(crate) enum Before<'a> {
    /// It is empty.
    Nothing,
    /// After these messages.
    Message(&'a [Value]),
    /// After the reply at the end of these messages, and its end token, if that was read.
    Reply(&'a [Value], Option<u32>),
}

/// What the HTTP side must know of the model.
pub(crate) struct ModelInfo {
    pub name: String,
    pub created: u64,
    pub context: usize,
    pub vocabulary: usize,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
    pub grammars: Option<Grammars>,
    /// `<think>`, `</think>`.
    pub think: Option<(u32, u32)>,
    /// `<tool_call>`, where it is one token.
    pub tool_open: Option<u32>,
    /// Control tokens by their text.
    special: Vec<String>,
    /// Bytes with which a control token or its stand-in begins.
    suspicious: [bool; 256],
    /// Tokens of texts that were seen before, where such texts can be cut.
    pieces: Option<Pieces>,
    /// Messages that were seen before.
    pub recent: Recent,
    /// Whether the template shows tools.
    tools_shown: bool,
    /// Whether it shows calls and their results.
    calls_shown: bool,
    /// Whether it writes calls as XML and not as JSON.
    pub xml_calls: bool,
}

impl ModelInfo {
    pub(crate) fn new(model: &Ampoule, name: Option<String>) -> Result<Self, ampoule::Error> {
        let tokenizer = Arc::clone(model.tokenizer()?);
        let template = model.template().ok().cloned();
        let vocabulary = model.engine.vocabulary();
        let ids = 0..tokenizer.vocab_size() as u32;
        let special: Vec<String> = ids
            .filter(|&id| tokenizer.token_kind(id) == TokenKind::Special)
            .filter_map(|id| tokenizer.token_text(id).map(String::from))
            .filter(|text| !text.is_empty())
            .take(MARKERS as usize)
            .collect();
        let mut suspicious = [false; 256];
        let marker = char::from_u32(MARKER).map(|c| c.encode_utf8(&mut [0; 4]).as_bytes()[0]);
        for byte in special.iter().filter_map(|s| s.bytes().next()).chain(marker) {
            suspicious[usize::from(byte)] = true;
        }
        let think = tokenizer.id_of("<think>").zip(tokenizer.id_of("</think>"));
        let grammars = Grammars::new(&tokenizer, vocabulary);
        let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let mut info = Self {
            name: name.unwrap_or_else(|| model.name().to_owned()),
            created: created.map_or(0, |d| d.as_secs()),
            context: model.engine.context(),
            vocabulary,
            tool_open: tokenizer.id_of("<tool_call>"),
            pieces: Pieces::new(&tokenizer, &special),
            tokenizer,
            template,
            grammars,
            think,
            special,
            suspicious,
            recent: Recent::default(),
            tools_shown: false,
            calls_shown: false,
            xml_calls: false,
        };
        info.probe();
        Ok(info)
    }

    /// What the template knows, by what it makes of a small conversation.
    fn probe(&mut self) {
        let Some(template) = &self.template else { return };
        let tool = json!([{ "type": "function", "function": {
            "name": "probe_tool", "description": "d", "parameters": { "type": "object", "properties": {} },
        }}]);
        let user = json!({ "role": "user", "content": "probe_user" });
        let plain = json!([user]);
        let render = |messages: &Value, tools| template.render(messages, tools, true, &Map::new());
        self.tools_shown = render(&plain, Some(&tool)).is_ok_and(|t| t.contains("probe_tool"));
        let calls = json!([
            user,
            { "role": "assistant", "content": "", "tool_calls": [{ "id": "c", "type": "function", "function": {
                "name": "probe_call", "arguments": { "probe_argument": 1 },
            }}]},
            { "role": "tool", "content": "probe_result", "tool_call_id": "c", "name": "probe_call" },
        ]);
        if let Ok(text) = render(&calls, Some(&tool)) {
            self.calls_shown =
                ["probe_call", "probe_argument", "probe_result"].iter().all(|w| text.contains(w));
            self.xml_calls = text.contains("<function=probe_call>");
        }
    }

    /// Whether any text in it has a byte with which control tokens or their stand-ins begin: most have none.
    fn doubtful(&self, value: &Value) -> bool {
        match value {
            Value::String(text) => text.bytes().any(|byte| self.suspicious[usize::from(byte)]),
            Value::Array(list) => list.iter().any(|v| self.doubtful(v)),
            Value::Object(map) => map.values().any(|v| self.doubtful(v)),
            _ => false,
        }
    }

    /// A field's texts, without control tokens that a user wrote.
    fn guard(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if text.chars().any(|c| (MARKER..MARKER + MARKERS).contains(&(c as u32))) {
                    let plain = |c: char| {
                        if (MARKER..MARKER + MARKERS).contains(&(c as u32)) {
                            '\u{FFFD}'
                        } else {
                            c
                        }
                    };
                    *text = text.chars().map(plain).collect();
                }
                for (index, special) in self.special.iter().enumerate() {
                    if text.contains(special.as_str())
                        && let Some(marker) = char::from_u32(MARKER + index as u32)
                    {
                        *text = text.replace(special.as_str(), marker.encode_utf8(&mut [0; 4]));
                    }
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|v| self.guard(v)),
            Value::Object(map) => map.values_mut().for_each(|v| self.guard(v)),
            _ => {}
        }
    }

    /// As [`guard`](Self::guard), for one message.
    pub(crate) fn guard_message(&self, message: &mut Value) {
        if self.doubtful(message) {
            self.guard(message);
        }
    }

    /// The tokens of a template's text: what stands for a control token that a user wrote becomes its letters.
    fn encode(&self, space: &Space, text: &str) -> ApiResult<Vec<u32>> {
        let letters = EncodeOptions { add_special: false, parse_special: false };
        let marker = |c: char| (MARKER..MARKER + MARKERS).contains(&(c as u32));
        let encode = |text: &str, options| {
            self.tokenizer
                .encode(text, options)
                .map_err(|e| ApiError::from(ampoule::Error::from(e)))
        };
        let mut tokens = Vec::new();
        for piece in text.split_inclusive(marker) {
            let last = piece.chars().next_back().filter(|c| marker(*c));
            let plain = &piece[..piece.len() - last.map_or(0, char::len_utf8)];
            tokens.extend(match &self.pieces {
                Some(pieces) => pieces
                    .encode(&self.tokenizer, space, plain)
                    .map_err(|e| ApiError::from(ampoule::Error::from(e)))?,
                None => encode(plain, EncodeOptions::TEMPLATE)?,
            });
            if let Some(special) = last.and_then(|c| self.special.get((c as u32 - MARKER) as usize))
            {
                tokens.extend(encode(special, letters)?);
            }
        }
        Ok(tokens)
    }

    fn render(
        &self,
        messages: &[Value],
        tools: &[Tool],
        prompt: bool,
        extra: &Map<String, Value>,
    ) -> ApiResult<String> {
        let template = self.template.as_ref().ok_or(ampoule::Error::NoChatTemplate)?;
        let (mut messages, tools) = self.adapt(messages, tools);
        if messages.iter().any(|message| self.doubtful(message)) {
            messages.to_mut().iter_mut().for_each(|message| self.guard(message));
        }
        self.fill(template, &*messages, tools, prompt, extra)
    }

    fn fill<M: Serialize + ?Sized>(
        &self,
        template: &ChatTemplate,
        messages: &M,
        tools: Vec<Value>,
        prompt: bool,
        extra: &Map<String, Value>,
    ) -> ApiResult<String> {
        let tools = (!tools.is_empty()).then(|| {
            let mut shown = Value::Array(tools);
            self.guard(&mut shown);
            shown
        });
        let text = template.render(messages, tools.as_ref(), prompt, extra);
        text.map_err(|error| ampoule::Error::from(error).into())
    }

    /// Says what the template cannot say in plain messages.
    fn adapt<'a>(&self, messages: &'a [Value], tools: &[Tool]) -> (Cow<'a, [Value]>, Vec<Value>) {
        let shown: Vec<Value> = tools.iter().map(|tool| tool.shown.clone()).collect();
        if self.calls_shown && (self.tools_shown || tools.is_empty()) {
            return (Cow::Borrowed(messages), shown);
        }
        let mut out: Vec<Value> = messages.to_vec();
        if !self.calls_shown {
            for message in &mut out {
                plain_calls(message);
            }
        }
        if self.tools_shown || tools.is_empty() {
            return (Cow::Owned(out), shown);
        }
        let list: Vec<String> = shown.iter().map(Value::to_string).collect();
        let preamble = format!(
            "You can call these functions, one JSON object a line:\n{}\nTo call one, write only\n<tool_call>\n{{\"name\": \
             NAME, \"arguments\": {{...}}}}\n</tool_call>\nThe result comes back between <tool_response> tags.",
            list.join("\n")
        );
        match out.first_mut() {
            Some(first) if first["role"] == "system" => {
                let text =
                    format!("{}\n\n{preamble}", first["content"].as_str().unwrap_or_default());
                first["content"] = json!(text);
            }
            _ => out.insert(0, json!({ "role": "system", "content": preamble })),
        }
        (Cow::Owned(out), Vec::new())
    }

    /// Bytes of texts whose tokens are kept.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.pieces.as_ref().map_or(0, Pieces::bytes) + self.recent.bytes()
    }

    /// Refuses ids that the model has no token for.
    pub(crate) fn known(&self, tokens: &[u32], param: &str) -> ApiResult<()> {
        match tokens.iter().find(|token| **token as usize >= self.vocabulary) {
            Some(token) => {
                let text =
                    format!("token {token} is outside the vocabulary of {}", self.vocabulary);
                Err(ApiError::param(param, text))
            }
            None => Ok(()),
        }
    }

    /// A conversation, up to where the reply begins.
    pub(crate) fn chat(
        &self,
        space: &Space,
        messages: &[Value],
        tools: &[Tool],
        extra: &Map<String, Value>,
    ) -> ApiResult<Prompt> {
        let text = self.render(messages, tools, true, extra)?;
        self.prompt(space, &text)
    }

    /// The messages of a list as the template takes them, those that were seen before as they are kept. `None` where the list
    /// has to be read in full: to say what is wrong with it, or because the template cannot show all of it.
    ///
    /// # Errors
    /// As [`messages`].
    pub(crate) fn shown(&self, space: &Space, list: &str, tools: bool) -> Option<ApiResult<Shown>> {
        let fit = self.template.is_some() && self.calls_shown && (self.tools_shown || !tools);
        if fit { self.recent.messages(self, space, list) } else { None }
    }

    /// As [`chat`](Self::chat), of messages that [`shown`](Self::shown) gave.
    pub(crate) fn chat_shown(
        &self,
        space: &Space,
        messages: &[ChatMessage],
        tools: &[Tool],
        extra: &Map<String, Value>,
    ) -> ApiResult<Prompt> {
        let template = self.template.as_ref().ok_or(ampoule::Error::NoChatTemplate)?;
        let tools = tools.iter().map(|tool| tool.shown.clone()).collect();
        let text = self.fill(template, messages, tools, true, extra)?;
        self.prompt(space, &text)
    }

    fn prompt(&self, space: &Space, text: &str) -> ApiResult<Prompt> {
        let tokens = self.encode(space, text)?;
        let marks = self.marks(&tokens);
        let thinking = self.think.is_some() && text.trim_end().ends_with("<think>");
        Ok(Prompt { tokens, marks, thinking })
    }

    /// What the template adds to a state that ends after the reply at the end of `history`, for `new` messages and the
    /// reply to them; `None` where it rewrites history. `ended` says whether the reply's end token was read.
    pub(crate) fn continuation(
        &self,
        space: &Space,
        history: &[Value],
        new: &[Value],
        tools: &[Tool],
        extra: &Map<String, Value>,
        end: Option<u32>,
    ) -> ApiResult<Option<Prompt>> {
        self.added(space, Before::Reply(history, end), new, tools, extra, true)
    }

    /// What the template adds to a state for `new` messages, and for the reply to them if `reply`; `None` where it rewrites
    /// what was said before.
    pub(crate) fn added(
        &self,
        space: &Space,
        before: Before<'_>,
        new: &[Value],
        tools: &[Tool],
        extra: &Map<String, Value>,
        reply: bool,
    ) -> ApiResult<Option<Prompt>> {
        const STAND_IN: &str = "stand-in of a reply";
        let (history, end) = match before {
            Before::Nothing => {
                let text = self.render(new, tools, reply, extra)?;
                return self.prompt(space, &text).map(Some);
            }
            Before::Message(history) => (history, None),
            Before::Reply(history, end) => (history, end),
        };
        let mut seen = history.to_vec();
        let replied = matches!(before, Before::Reply(..));
        if replied {
            // The model's own words are in the state already: only what closes them matters.
            match seen.last_mut() {
                Some(last) if last["role"] == "assistant" => {
                    *last = json!({ "role": "assistant", "content": STAND_IN });
                }
                _ => return Ok(None),
            }
        }
        let mut whole = seen.clone();
        whole.extend_from_slice(new);
        let seen = self.render(&seen, tools, false, extra)?;
        let wanted = self.render(&whole, tools, reply, extra)?;
        let Some(added) = wanted.strip_prefix(&seen) else { return Ok(None) };
        if !replied {
            return self.prompt(space, added).map(Some);
        }
        let Some(at) = seen.rfind(STAND_IN) else { return Ok(None) };
        let mut closing = &seen[at + STAND_IN.len()..];
        // Of what closes a reply the end token has been read, if the model drew it.
        let end = end.and_then(|id| self.tokenizer.token_text(id));
        if let Some(rest) = end.and_then(|end| closing.strip_prefix(&*end).map(str::to_owned)) {
            closing = &closing[closing.len() - rest.len()..];
        }
        Ok(Some(self.prompt(space, &format!("{closing}{added}"))?))
    }

    /// Where a boundary is worth taking: before control tokens that begin something, before calls of tools, before the
    /// last line of the last messages, which is where dates and the like stand.
    pub(crate) fn marks(&self, tokens: &[u32]) -> Vec<u32> {
        let opens = |&id: &u32| {
            (self.tokenizer.is_special(id) && !self.tokenizer.is_eos(id))
                || Some(id) == self.tool_open
        };
        let mut marks: Vec<u32> = tokens
            .iter()
            .enumerate()
            .skip(1)
            .filter(|(_, id)| opens(id))
            .map(|(at, _)| at as u32)
            .collect();
        let newline = |id: u32| self.tokenizer.token_bytes(id).is_some_and(|b| b.contains(&b'\n'));
        for ends in marks.iter().rev().take(2).copied().collect::<Vec<_>>() {
            let begins = marks.iter().copied().filter(|m| *m < ends).max().unwrap_or(0);
            // Not the line break behind the message itself.
            let body = (begins + LEAST_GAP).min(ends)..ends.saturating_sub(LEAST_GAP);
            let last = body.rev().find(|&at| newline(tokens[at as usize]));
            marks.extend(last.map(|at| at + 1));
        }
        marks.sort_unstable();
        marks.dedup();
        marks
    }

    /// The tools of a request.
    pub(crate) fn tools(list: Vec<Value>) -> ApiResult<Vec<Tool>> {
        let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
        for (index, tool) in list.into_iter().enumerate() {
            let path = format!("tools[{index}]");
            let mut shown = tool.clone();
            let mut fields = Fields::of(tool, &path)?;
            let kind: String = fields.require("type")?;
            if kind != "function" {
                return Err(ApiError::unsupported(format!("{path}.type"), "tools are functions"));
            }
            let mut function = match fields.value("function") {
                Some(function) => Fields::of(function, &format!("{path}.function"))?,
                // The Responses API has the function's fields beside the type.
                None => {
                    shown = json!({ "type": "function", "function": shown });
                    if let Some(map) = shown["function"].as_object_mut() {
                        map.shift_remove("type");
                    }
                    std::mem::replace(&mut fields, Fields::of(json!({}), &path)?)
                }
            };
            let name: String = function.require("name")?;
            let good = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            if name.is_empty() || name.len() > 128 || !name.chars().all(good) {
                let param = function.name("name");
                return Err(ApiError::param(
                    &param,
                    format!("'{param}' must be letters, digits, _ - . and at most 128"),
                ));
            }
            if tools.iter().any(|tool| tool.name == name) {
                return Err(ApiError::param(
                    function.name("name"),
                    format!("two tools are called '{name}'"),
                ));
            }
            function.text("description", 64 << 10)?;
            function.take::<bool>("strict")?;
            let parameters = function
                .value("parameters")
                .unwrap_or_else(|| json!({ "type": "object", "properties": {} }));
            if !parameters.is_object() {
                return Err(ApiError::param(
                    function.name("parameters"),
                    "'parameters' must be a JSON schema",
                ));
            }
            function.finish()?;
            fields.finish()?;
            tools.push(Tool { name, parameters, shown });
        }
        Ok(tools)
    }
}

/// Calls and results as text, for templates that know neither.
fn plain_calls(message: &mut Value) {
    if message["role"] == "tool" {
        let text = message["content"].as_str().unwrap_or_default();
        *message = json!({
            "role": "user", "content": format!("<tool_response>\n{text}\n</tool_response>"),
        });
        return;
    }
    let Some(calls) = message.get("tool_calls").and_then(Value::as_array).cloned() else { return };
    let mut text = message["content"].as_str().unwrap_or_default().to_owned();
    for call in calls {
        let function = &call["function"];
        if !text.is_empty() {
            text.push('\n');
        }
        let _ = write!(
            text,
            "<tool_call>\n{{\"name\": {}, \"arguments\": {}}}\n</tool_call>",
            function["name"], function["arguments"]
        );
    }
    message["content"] = json!(text);
    if let Some(map) = message.as_object_mut() {
        map.shift_remove("tool_calls");
    }
}

/// Messages of the chat API as templates want them.
pub(crate) fn messages(list: Vec<Value>) -> ApiResult<Vec<Value>> {
    if list.is_empty() {
        return Err(ApiError::param("messages", "'messages' is empty"));
    }
    if list.len() > MESSAGE_LIMIT {
        return Err(ApiError::param(
            "messages",
            format!("there are more than {MESSAGE_LIMIT} messages"),
        ));
    }
    let mut names: HashMap<String, String> = HashMap::new();
    let mut out = Vec::with_capacity(list.len());
    for (index, message) in list.into_iter().enumerate() {
        out.push(self::message(message, &format!("messages[{index}]"), &mut names)?);
    }
    Ok(out)
}

pub(crate) fn message(
    message: Value,
    path: &str,
    names: &mut HashMap<String, String>,
) -> ApiResult<Value> {
    let mut fields = Fields::of(message, path)?;
    let role: String = fields.require("role")?;
    let role = match role.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        other => {
            let what = format!(
                "there are system, developer, user, assistant and tool, not '{}'",
                short(other)
            );
            return Err(ApiError::param(format!("{path}.role"), what));
        }
    };
    let content =
        fields.value("content").map(|c| content_text(c, &format!("{path}.content"))).transpose()?;
    let mut out = Map::new();
    out.insert("role".to_owned(), json!(role));
    let name = fields.text("name", 256)?;
    let mut calls = Vec::new();
    match role {
        "assistant" => {
            fields.only("audio", &[], "there is no audio")?;
            fields.only("function_call", &[], "use tool_calls")?;
            fields.ignore(&["refusal", "annotations"]);
            let thoughts = fields.text("reasoning_content", usize::MAX)?;
            let thoughts = thoughts.or(fields.text("reasoning", usize::MAX)?);
            if let Some(thoughts) = thoughts.filter(|t| !t.is_empty()) {
                out.insert("reasoning_content".to_owned(), json!(thoughts));
            }
            for (at, call) in
                fields.take::<Vec<Value>>("tool_calls")?.into_iter().flatten().enumerate()
            {
                calls.push(tool_call(call, &format!("{path}.tool_calls[{at}]"), names)?);
            }
            if content.is_none() && calls.is_empty() {
                let param = format!("{path}.content");
                return Err(ApiError::param(
                    &param,
                    format!("'{param}' is missing, and there are no tool_calls"),
                ));
            }
        }
        "tool" => {
            let id: String = fields.require("tool_call_id")?;
            if let Some(name) = names.get(&id) {
                out.insert("name".to_owned(), json!(name));
            }
            out.insert("tool_call_id".to_owned(), json!(id));
        }
        _ => {}
    }
    if role != "assistant" && content.is_none() {
        return Err(ApiError::param(
            format!("{path}.content"),
            format!("'{path}.content' is missing"),
        ));
    }
    fields.finish()?;
    if let Some(name) = name {
        out.entry("name").or_insert(json!(name));
    }
    out.insert("content".to_owned(), json!(content.unwrap_or_default()));
    if !calls.is_empty() {
        out.insert("tool_calls".to_owned(), Value::Array(calls));
    }
    Ok(Value::Object(out))
}

/// A call that the model made, its arguments opened where they are an object.
fn tool_call(call: Value, path: &str, names: &mut HashMap<String, String>) -> ApiResult<Value> {
    let mut fields = Fields::of(call, path)?;
    let id: Option<String> = fields.take("id")?;
    fields.only("type", &[json!("function")], "calls are of functions")?;
    fields.ignore(&["index"]);
    let function: Value = fields.require("function")?;
    fields.finish()?;
    let mut function = Fields::of(function, &format!("{path}.function"))?;
    let name: String = function.require("name")?;
    let arguments = function.take::<String>("arguments")?.unwrap_or_default();
    function.finish()?;
    let text = arguments;
    let opened = serde_json::from_str::<Value>(&text).ok().filter(Value::is_object);
    let arguments = if text.trim().is_empty() { Some(json!({})) } else { opened };
    // What the model wrote may be no JSON; a template then gets its text.
    let arguments = arguments.unwrap_or_else(|| json!(text));
    if let Some(id) = &id {
        names.insert(id.clone(), name.clone());
    }
    Ok(
        json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }),
    )
}

/// The text of a content: a string, or parts of text.
pub(crate) fn content_text(content: Value, path: &str) -> ApiResult<String> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => {
            return Err(ApiError::param(
                path,
                format!("'{path}' must be a text or a list of parts"),
            ));
        }
    };
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let mut fields = Fields::of(part, &path)?;
        let kind: String = fields.require("type")?;
        match kind.as_str() {
            "text" | "input_text" | "output_text" => {
                text.push_str(&fields.require::<String>("text")?);
                fields.ignore(&["annotations", "logprobs"]);
                fields.finish()?;
            }
            "refusal" => {
                text.push_str(&fields.require::<String>("refusal")?);
                fields.finish()?;
            }
            other => {
                let what = format!("this model reads text, not '{}'", short(other));
                return Err(ApiError::unsupported(format!("{path}.type"), &what));
            }
        }
    }
    Ok(text)
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Boundaries to take while a prompt is read from `from` on: at some marks, at a
/// grid where marks are far apart, and where the prompt leaves what was read before.
pub(crate) fn boundaries(marks: &[u32], from: u32, len: u32, diverges: Option<u32>) -> Vec<u32> {
    // The further from the end the fewer: a change costs what follows it and an eighth of that at most, and a long history
    // holds a few dozen boundaries. Always the first, which is where a system message ends.
    let ahead: Vec<u32> = marks.iter().copied().filter(|&m| m > from && m < len).collect();
    let mut stops: Vec<u32> = Vec::new();
    for &mark in ahead.iter().rev() {
        let gap = LEAST_GAP.max((len - mark) / 8);
        if stops.last().is_none_or(|last| last - mark >= gap) {
            stops.push(mark);
        }
    }
    stops.extend(ahead.first());
    stops.sort_unstable();
    stops.dedup();
    let mut out: Vec<u32> = Vec::new();
    let mut last = from;
    for stop in stops.into_iter().chain([len]) {
        while stop - last > GRID + GRID / 2 {
            last = (last / GRID + 1) * GRID;
            out.push(last);
        }
        if stop < len && (stop - last >= LEAST_GAP) {
            out.push(stop);
            last = stop;
        }
    }
    out.extend(diverges.filter(|&d| d > from && d < len));
    out.sort_unstable();
    out.dedup();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boundaries_are_few_and_within() {
        assert_eq!(boundaries(&[], 0, 100, None), Vec::<u32>::new());
        assert_eq!(boundaries(&[10, 12, 50], 0, 100, None), [10, 50]);
        assert_eq!(boundaries(&[10, 50], 10, 100, Some(70)), [50, 70]);
        assert_eq!(boundaries(&[], 0, 900, None), [256, 512, 768]);
        let many: Vec<u32> = (1..500).map(|i| i * 20).collect();
        let some = boundaries(&many, 0, 10_000, None);
        assert!(some.len() < 80 && some.contains(&20) && some.contains(&9980), "{some:?}");
        assert!(some.windows(2).all(|w| w[0] < w[1] && w[1] - w[0] <= GRID + GRID / 2));
    }
}
