//! `/v1/responses`: a stored response is a boundary. Continuing an older one is a fork.

use std::sync::Arc;

use ampoule::FinishReason;
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;

use crate::ahead::Ahead;
use crate::app::{
    self, App, Body, Caller, Generation, Prepared, Tally, Wanted, blocking, new_id, now,
};
use crate::chat::{Conversation, Format, logprob_entry, prepare};
use crate::durable::Record;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, Hints};
use crate::output::{Piece, Splitter};
use crate::prompt::content_text;
use crate::sse::{self, Events};
use crate::start::{from_hex, to_hex};
use crate::vault::{StoredResponse, Vault, lock};
use crate::worker::{End, OnEnd, Start, Step};

/// What an item may be.
const STATUS: [&str; 3] = ["in_progress", "completed", "incomplete"];

struct Request {
    conversation: Conversation,
    wanted: Wanted,
    input: Vec<Value>,
    instructions: Option<String>,
    previous: Option<String>,
    store: bool,
    stream: bool,
    /// What the response repeats of the request.
    echo: Map<String, Value>,
}

/// Names that a response does not have.
const HINTS: Hints = &[
    ("messages", "responses take 'input'; 'messages' are for /v1/chat/completions"),
    ("max_tokens", "responses take 'max_output_tokens'"),
    ("max_completion_tokens", "responses take 'max_output_tokens'"),
    ("response_format", "responses take 'text': {\"format\": ...}"),
    ("reasoning_effort", "responses take 'reasoning': {\"effort\": ...}"),
    ("logprobs", "responses take 'include': [\"message.output_text.logprobs\"] and 'top_logprobs'"),
    ("system", "responses take 'instructions'"),
    ("functions", "responses take 'tools'"),
];

fn parse(app: &App, caller: &Caller, body: &[u8]) -> ApiResult<Request> {
    let mut fields = Fields::parse(body)?.with_hints(HINTS);
    app.check_model(&mut fields)?;
    let mut echo = Map::new();
    for name in [
        "tools",
        "tool_choice",
        "text",
        "metadata",
        "reasoning",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "temperature",
        "top_p",
        "top_logprobs",
        "max_output_tokens",
    ] {
        let value = fields.value(name);
        if let Some(value) = &value {
            echo.insert(name.to_owned(), value.clone());
        }
        fields.put(name, value);
    }
    let input = match fields.value("input") {
        Some(Value::String(text)) => {
            vec![json!({ "type": "message", "role": "user", "content": text })]
        }
        Some(Value::Array(items)) => items,
        Some(_) => {
            return Err(ApiError::param("input", "'input' must be a text or a list of items"));
        }
        None => return Err(fields.missing("input")),
    };
    let messages = items_to_messages(&input)?;
    let (tools, choice, parallel) = Conversation::take_tools(&mut fields, true)?;
    complete(&mut echo);
    let mut format = Format::Text;
    if let Some(text) = fields.value("text") {
        let mut text = Fields::of(text, "text")?;
        format = Conversation::take_format(text.value("format"), "text.format", true)?;
        text.only("verbosity", &[json!("medium")], "the model has one verbosity")?;
        text.finish()?;
    }
    let mut extra = fields.take::<Map<String, Value>>("chat_template_kwargs")?.unwrap_or_default();
    if let Some(reasoning) = fields.value("reasoning") {
        let mut reasoning = Fields::of(reasoning, "reasoning")?;
        reasoning.effort("effort", &mut extra)?;
        reasoning.ignore(&["summary", "generate_summary"]);
        reasoning.finish()?;
    }
    let mut wanted = app.wanted(&mut fields, caller, &["max_output_tokens"], None)?;
    wanted.input = "input";
    if wanted.choices != 1 {
        return Err(ApiError::unsupported("n", "continue one response several times instead"));
    }
    let mut logprobs = false;
    for (index, include) in fields.take::<Vec<String>>("include")?.into_iter().flatten().enumerate()
    {
        match include.as_str() {
            "message.output_text.logprobs" => logprobs = true,
            // There is nothing to encrypt: reasoning is given as it is.
            "reasoning.encrypted_content" => {}
            _ => {
                return Err(ApiError::unsupported(
                    format!("include[{index}]"),
                    "there are message.output_text.logprobs and reasoning.encrypted_content",
                ));
            }
        }
    }
    let top = fields.within("top_logprobs", 0..=20_usize)?;
    wanted.logprobs = (logprobs || top.is_some()).then(|| top.unwrap_or(0));
    let previous = fields.text("previous_response_id", 256)?;
    let instructions = fields.text("instructions", usize::MAX)?;
    let store = fields.take::<bool>("store")?.unwrap_or(true);
    let stream = fields.take::<bool>("stream")?.unwrap_or(false);
    wanted.stream = stream;
    if let Some(options) = fields.value("stream_options") {
        let mut options = Fields::of(options, "stream_options")?;
        options.ignore(&["include_obfuscation", "include_usage"]);
        options.finish()?;
    }
    if let Some(metadata) = fields.value("metadata")
        && !metadata.as_object().is_some_and(|m| m.len() <= 16 && m.values().all(Value::is_string))
    {
        return Err(ApiError::param("metadata", "'metadata' maps at most 16 names to texts"));
    }
    fields.text("user", 1024)?;
    fields.text("safety_identifier", 1024)?;
    fields.ignore(&["prompt_cache_retention"]);
    fields.only("truncation", &[json!("disabled")], "what does not fit the context is refused")?;
    fields.only("background", &[json!(false)], "responses are made while the client waits")?;
    fields.only("service_tier", &[json!("auto"), json!("default")], "there is one tier")?;
    fields.only("conversation", &[], "use previous_response_id")?;
    fields.only("prompt", &[], "there are no stored prompts; what is to be answered is 'input'")?;
    fields.only("max_tool_calls", &[], "the client runs the tools")?;
    fields.finish()?;
    let conversation =
        Conversation { messages, shown: None, tools, choice, parallel, format, extra };
    Ok(Request { conversation, wanted, input, instructions, previous, store, stream, echo })
}

/// Fills in what a client may leave out of tools and formats, and reads in every response.
fn complete(echo: &mut Map<String, Value>) {
    let fill = |value: &mut Value, name: &str, missing: Value| {
        if let Some(map) = value.as_object_mut() {
            map.entry(name).or_insert(missing);
        }
    };
    // A null stands for nothing given, whatever its name.
    let drop_nulls = |value: &mut Value| {
        if let Some(map) = value.as_object_mut() {
            map.retain(|_, value| !value.is_null());
        }
    };
    if let Some(text) = echo.get_mut("text") {
        drop_nulls(text);
        if let Some(format) = text.get_mut("format") {
            drop_nulls(format);
        }
    }
    for tool in echo.get_mut("tools").and_then(Value::as_array_mut).into_iter().flatten() {
        drop_nulls(tool);
        fill(tool, "strict", json!(true));
        fill(tool, "description", Value::Null);
        fill(tool, "parameters", Value::Null);
    }
    if let Some(text) = echo.get_mut("text") {
        fill(text, "format", json!({ "type": "text" }));
        if text["format"]["type"] == "json_schema" {
            fill(&mut text["format"], "strict", json!(true));
            fill(&mut text["format"], "description", Value::Null);
        }
    }
}

/// Items as messages of the chat API.
fn items_to_messages(items: &[Value]) -> ApiResult<Vec<Value>> {
    let mut out: Vec<Value> = Vec::new();
    let mut names = std::collections::HashMap::new();
    for (index, item) in items.iter().enumerate() {
        let path = format!("input[{index}]");
        let mut fields = Fields::of(item.clone(), &path)?;
        let kind = fields.text("type", 64)?.unwrap_or_else(|| "message".to_owned());
        fields.text("id", 256)?;
        if fields.text("status", 16)?.is_some_and(|s| !STATUS.contains(&s.as_str())) {
            return Err(ApiError::param(
                format!("{path}.status"),
                "there are in_progress, completed and incomplete",
            ));
        }
        match kind.as_str() {
            "message" => {
                let role: String = fields.require("role")?;
                let role = match role.as_str() {
                    "system" | "developer" => "system",
                    "user" => "user",
                    "assistant" => "assistant",
                    _ => {
                        return Err(ApiError::param(
                            format!("{path}.role"),
                            "there are user, assistant, system and developer",
                        ));
                    }
                };
                fields.ignore(&["phase"]);
                let content = content_text(fields.require("content")?, &format!("{path}.content"))?;
                out.push(json!({ "role": role, "content": content }));
            }
            "function_call" => {
                let id: String = fields.require("call_id")?;
                let name: String = fields.require("name")?;
                let text: String = fields.require("arguments")?;
                fields.ignore(&["namespace"]);
                let opened = serde_json::from_str::<Value>(&text).ok().filter(Value::is_object);
                let arguments = opened.unwrap_or_else(|| json!(text));
                let call = json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
                names.insert(id, name);
                match out.last_mut() {
                    Some(last) if last["role"] == "assistant" => {
                        match last["tool_calls"].as_array_mut() {
                            Some(calls) => calls.push(call),
                            None => last["tool_calls"] = json!([call]),
                        }
                    }
                    _ => out
                        .push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
                }
            }
            "function_call_output" => {
                let id: String = fields.require("call_id")?;
                let content = content_text(fields.require("output")?, &format!("{path}.output"))?;
                let mut message = json!({ "role": "tool", "tool_call_id": id, "content": content });
                if let Some(name) = names.get(&id) {
                    message["name"] = json!(name);
                }
                out.push(message);
            }
            "reasoning" => fields.ignore(&["summary", "content", "encrypted_content"]),
            other => {
                let what = format!(
                    "there are message, function_call, function_call_output and reasoning, not '{}'",
                    other.chars().take(64).collect::<String>()
                );
                return Err(ApiError::unsupported(format!("{path}.type"), &what));
            }
        }
        fields.finish()?;
    }
    if out.is_empty() {
        return Err(ApiError::param("input", "'input' has no message"));
    }
    Ok(out)
}

/// The messages with the instructions before them.
fn instructed(instructions: Option<&str>, messages: &[Value]) -> Vec<Value> {
    let first = instructions.map(|text| json!({ "role": "system", "content": text }));
    first.into_iter().chain(messages.iter().cloned()).collect()
}

pub(crate) async fn create(app: Arc<App>, caller: Caller, body: Body) -> ApiResult<Response> {
    let mut request = app::read(&app, caller, &body, parse).await?;
    drop(body);
    let previous = match &request.previous {
        None => None,
        Some(id) => Some((
            id.clone(),
            app.vault.response(&caller.key, id).ok_or_else(|| ApiError {
                code: Some("previous_response_not_found"),
                param: Some("previous_response_id".to_owned()),
                message: format!(
                    "there is no such response, or it belongs to another key or to none: only those made with 'store': true can be \
                     continued, the latest {} of them, and after a restart where the server has a --store{}",
                    app.config.responses,
                    app.vault.or_damaged()
                ),
                ..ApiError::not_found("response")
            })?,
        )),
    };
    let permit = app.place()?;
    let new = std::mem::take(&mut request.conversation.messages);
    let before = previous.as_ref().map_or(&[][..], |(_, p)| &p.history);
    let history: Vec<Value> = before.iter().chain(&new).cloned().collect();
    let instructions = request.instructions.as_deref();
    request.conversation.messages = instructed(instructions, &history);
    let mut started = None;
    if let Some((id, previous)) = &previous
        && same_frame(&previous.body, &request)
        && let Some(capsule) = state(&app, id, previous).await
    {
        let (info, conversation) = (Arc::clone(&app.info), request.conversation.clone());
        let (known, end) = (instructed(instructions, before), previous.end_token);
        let space = request.wanted.space;
        started = blocking(move || {
            let extra = &conversation.extra;
            let prompt =
                info.continuation(&space, &known, &new, &conversation.tools, extra, end)?;
            let Some(prompt) = prompt else { return Ok(None) };
            let constraint = conversation.constraint(&info, &prompt)?;
            Ok(Some((Start::After(capsule), Prepared { prompt, constraint })))
        })
        .await?;
    }
    let (start, prepared) = match started {
        Some(started) => started,
        None => {
            let conversation = request.conversation.clone();
            let prepared = prepare(&app, conversation, request.wanted.space, usize::MAX).await;
            let mut prepared = prepared.map_err(|error| error.of("input"))?;
            let marks = std::mem::take(&mut prepared.prompt.marks);
            (Start::Prompt { marks }, prepared)
        }
    };
    let Prepared { prompt, constraint } = prepared;
    let calls = request.conversation.calls();
    let splitter = Splitter::new(app.info.think.is_some(), prompt.thinking, calls);
    let (tell, ended) = oneshot::channel();
    let on_end: Option<OnEnd> = request.store.then(|| {
        Box::new(move |end| {
            let _ = tell.send(end);
        }) as OnEnd
    });
    let (id, with_logprobs) = (new_id("resp_"), request.wanted.logprobs.is_some());
    let body = blank(&app, &id, &request);
    let generation =
        app.generate(&caller, permit, request.wanted, start, prompt.tokens, constraint, on_end)?;
    let keep =
        request.store.then_some(Keep { key: caller.key, input: request.input, history, ended });
    let builder = Builder::new(Arc::clone(&app), body, splitter, with_logprobs, &generation);
    if request.stream {
        let (events, response) = sse::response(Arc::clone(&generation.sent));
        tokio::spawn(stream(builder, generation, keep, events));
        return Ok(response);
    }
    let body = collect(builder, generation, keep).await?;
    Ok(Json(body).into_response())
}

/// Whether instructions and tools are those of the response that is continued: else its state began otherwise.
fn same_frame(body: &Value, request: &Request) -> bool {
    let tools = request.echo.get("tools").cloned().unwrap_or_else(|| json!([]));
    body["instructions"].as_str() == request.instructions.as_deref() && body["tools"] == tools
}

/// The state after a response, from memory or from the store.
async fn state(app: &App, id: &str, response: &Arc<StoredResponse>) -> Option<ampoule::Capsule> {
    if let Some(capsule) = lock(&response.end).clone() {
        return Some(capsule);
    }
    app.vault.durable.as_ref()?;
    let (id, here) = (id.to_owned(), Arc::clone(response));
    let ahead = Ahead::read(app, move |durable| {
        let there = lock(&here.end).is_some();
        if there { Ok(None) } else { durable.find("response", &id).map(Some) }
    });
    let Some(ahead) = ahead.await.ok()? else { return lock(&response.end).clone() };
    let capsule = ahead.load(app).await.ok()?;
    *lock(&response.end) = Some(capsule.clone());
    Some(capsule)
}

fn blank(app: &App, id: &str, request: &Request) -> Value {
    let echo = |name: &str, other: Value| request.echo.get(name).cloned().unwrap_or(other);
    json!({
        "id": id, "object": "response", "created_at": now(), "status": "in_progress", "background": false,
        "error": null, "incomplete_details": null, "instructions": request.instructions,
        "max_output_tokens": echo("max_output_tokens", Value::Null), "model": app.info.name, "output": [],
        "parallel_tool_calls": request.conversation.parallel, "previous_response_id": request.previous,
        "reasoning": echo("reasoning", json!({ "effort": null, "summary": null })), "store": request.store,
        "temperature": echo("temperature", json!(1.0)), "text": echo("text", json!({ "format": { "type": "text" } })),
        "tool_choice": echo("tool_choice", json!("auto")), "tools": echo("tools", json!([])),
        "top_p": echo("top_p", json!(1.0)), "truncation": "disabled", "usage": null, "completed_at": null,
        "top_logprobs": echo("top_logprobs", json!(0)), "service_tier": "default",
        "prompt_cache_key": echo("prompt_cache_key", Value::Null),
        "safety_identifier": echo("safety_identifier", Value::Null),
        "user": echo("user", Value::Null), "metadata": echo("metadata", json!({})),
    })
}

/// What is needed to keep a response.
struct Keep {
    key: [u8; 32],
    input: Vec<Value>,
    history: Vec<Value>,
    ended: oneshot::Receiver<ApiResult<End>>,
}

impl Keep {
    /// Keeps the response: in memory, and in the store before the client is told that it is complete.
    async fn keep(self, app: &Arc<App>, body: &Value, message: Value) -> ApiResult<()> {
        let end = self.ended.await.map_err(|_| ApiError::stopping())??;
        let mut history = self.history;
        history.push(message);
        let id = body["id"].as_str().unwrap_or_default().to_owned();
        let stored = StoredResponse::new(
            self.key,
            body.clone(),
            self.input,
            history,
            end.eos,
            Some(end.capsule.clone()),
        );
        if app.vault.durable.is_some() {
            let record = json!({
                "key": to_hex(&stored.key), "body": stored.body, "input": stored.input, "history": stored.history,
                "end_token": stored.end_token,
            });
            let detached = app.call(move |worker| Ok(worker.model.detach(&end.capsule)?)).await?;
            let (vault, id) = (Arc::clone(&app.vault), id.clone());
            blocking(move || {
                let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
                Ok(durable.save("response", &id, Some(&detached), record)?)
            })
            .await?;
        }
        app.vault.add_response(&id, stored);
        Ok(())
    }
}

/// Makes output items and events of pieces.
struct Builder {
    app: Arc<App>,
    body: Value,
    splitter: Splitter,
    with_logprobs: bool,
    /// Of the item under way.
    entries: Vec<Value>,
    /// How many of them a delta has told of.
    told: usize,
    items: Vec<Value>,
    open: Option<Open>,
    events: Vec<(&'static str, Value)>,
    sequence: u64,
    tally: Tally,
    finished: Option<FinishReason>,
}

/// The item under way.
struct Open {
    item: Value,
    thoughts: bool,
    text: String,
}

impl Builder {
    fn new(
        app: Arc<App>,
        body: Value,
        splitter: Splitter,
        with_logprobs: bool,
        generation: &Generation,
    ) -> Self {
        Self {
            app,
            body,
            splitter,
            with_logprobs,
            entries: Vec::new(),
            told: 0,
            items: Vec::new(),
            open: None,
            events: Vec::new(),
            sequence: 0,
            tally: Tally::new(generation),
            finished: None,
        }
    }

    fn emit(&mut self, kind: &'static str, mut value: Value) {
        value["type"] = json!(kind);
        value["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        self.events.push((kind, value));
    }

    fn begin(&mut self) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.body.clone();
            self.emit(kind, json!({ "response": response }));
        }
    }

    /// Where the item's part is.
    fn place(&self, item: &Value) -> Value {
        json!({ "item_id": item["id"], "output_index": self.items.len(), "content_index": 0 })
    }

    fn with(place: &Value, name: &str, value: Value) -> Value {
        let mut out = place.clone();
        out[name] = value;
        out
    }

    fn text(&mut self, text: &str, thoughts: bool) {
        if self.open.as_ref().is_some_and(|open| open.thoughts != thoughts) {
            self.close("completed");
        }
        if self.open.is_none() {
            let item = if thoughts {
                json!({ "id": new_id("rs_"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress" })
            } else {
                json!({ "id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant", "content": [] })
            };
            let index = self.items.len();
            self.emit("response.output_item.added", json!({ "output_index": index, "item": item }));
            let place = self.place(&item);
            self.emit(
                "response.content_part.added",
                Self::with(&place, "part", part("", thoughts, &[])),
            );
            self.open = Some(Open { item, thoughts, text: String::new() });
        }
        let Some(open) = &mut self.open else { return };
        open.text.push_str(text);
        let item = open.item.clone();
        let mut delta = Self::with(&self.place(&item), "delta", json!(text));
        if thoughts {
            self.emit("response.reasoning_text.delta", delta);
        } else {
            delta["logprobs"] = json!(self.entries[self.told..]);
            self.told = self.entries.len();
            self.emit("response.output_text.delta", delta);
        }
    }

    fn close(&mut self, status: &str) {
        let Some(Open { mut item, thoughts, text }) = self.open.take() else { return };
        let entries = if thoughts { Vec::new() } else { std::mem::take(&mut self.entries) };
        self.told = 0;
        let place = self.place(&item);
        let mut done = Self::with(&place, "text", json!(text));
        let part = part(&text, thoughts, &entries);
        if thoughts {
            self.emit("response.reasoning_text.done", done);
        } else {
            done["logprobs"] = json!(entries);
            self.emit("response.output_text.done", done);
        }
        self.emit("response.content_part.done", Self::with(&place, "part", part.clone()));
        item["content"] = json!([part]);
        item["status"] = json!(status);
        self.finish_item(item);
    }

    fn finish_item(&mut self, item: Value) {
        let done = json!({ "output_index": self.items.len(), "item": item });
        self.items.push(item);
        self.emit("response.output_item.done", done);
    }

    fn call(&mut self, name: &str, arguments: &str) {
        self.close("completed");
        let mut item = json!({
            "id": new_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": new_id("call_"), "name": name,
            "arguments": "",
        });
        let index = self.items.len();
        self.emit("response.output_item.added", json!({ "output_index": index, "item": item }));
        let place = json!({ "item_id": item["id"], "output_index": index });
        self.emit(
            "response.function_call_arguments.delta",
            Self::with(&place, "delta", json!(arguments)),
        );
        let mut done = Self::with(&place, "arguments", json!(arguments));
        done["name"] = json!(name);
        self.emit("response.function_call_arguments.done", done);
        item["arguments"] = json!(arguments);
        item["status"] = json!("completed");
        self.finish_item(item);
    }

    /// Takes a step of the reply.
    fn take(&mut self, step: &Step) {
        let mut pieces = self.splitter.push(&step.text);
        if let Some(token) = step.token {
            self.tally.token(step.at, self.splitter.in_thoughts());
            if let Some(logprobs) = step.logprobs.as_ref().filter(|_| self.with_logprobs)
                && !self.app.info.tokenizer.is_eos(token)
                && !self.splitter.in_thoughts()
            {
                self.entries.push(logprob_entry(&self.app.info, token, logprobs));
            }
        }
        if step.finished.is_some() {
            pieces.extend(self.splitter.finish());
        }
        for piece in pieces {
            match piece {
                Piece::Thought(text) => self.text(&text, true),
                Piece::Content(text) => self.text(&text, false),
                Piece::Call { name, arguments } => self.call(&name, &arguments),
            }
        }
        self.finished = step.finished.or(self.finished);
    }

    /// Ends the response: its body, and its message in the chat API's words.
    fn end(&mut self) -> ApiResult<Value> {
        let reason = self.finished.ok_or_else(ApiError::stopping)?;
        let whole = matches!(reason, FinishReason::Stop);
        if self.items.is_empty() && self.open.is_none() {
            self.text("", false);
        }
        self.close(if whole { "completed" } else { "incomplete" });
        self.body["output"] = Value::Array(self.items.clone());
        self.body["status"] = json!(if whole { "completed" } else { "incomplete" });
        if whole {
            self.body["completed_at"] = json!(now());
        } else {
            self.body["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        let tally = &self.tally;
        self.body["usage"] = json!({
            "input_tokens": tally.begun.prompt_tokens,
            "input_tokens_details": tally.cache_details(),
            "output_tokens": tally.generated,
            "output_tokens_details": { "reasoning_tokens": tally.reasoning },
            "total_tokens": tally.begun.prompt_tokens + tally.generated,
        });
        self.body["timings"] = tally.timings();
        let mut message = json!({ "role": "assistant", "content": "" });
        let (mut content, mut calls) = (String::new(), Vec::new());
        for item in &self.items {
            match item["type"].as_str() {
                Some("message") => {
                    content.push_str(item["content"][0]["text"].as_str().unwrap_or_default());
                }
                Some("function_call") => {
                    let text = item["arguments"].as_str().unwrap_or_default();
                    let arguments = serde_json::from_str(text).unwrap_or_else(|_| json!(text));
                    calls.push(json!({ "id": item["call_id"], "type": "function", "function": {
                        "name": item["name"], "arguments": arguments,
                    }}));
                }
                _ => {}
            }
        }
        message["content"] = json!(content);
        if !calls.is_empty() {
            message["tool_calls"] = Value::Array(calls);
        }
        Ok(message)
    }
}

fn part(text: &str, thoughts: bool, entries: &[Value]) -> Value {
    if thoughts {
        json!({ "type": "reasoning_text", "text": text })
    } else {
        json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": entries })
    }
}

async fn collect(
    mut builder: Builder,
    mut generation: Generation,
    keep: Option<Keep>,
) -> ApiResult<Value> {
    while let Some(step) = generation.step(&mut builder.tally).await? {
        builder.take(&step);
        builder.events.clear();
    }
    let message = builder.end()?;
    if let Some(keep) = keep {
        keep.keep(&builder.app, &builder.body, message).await?;
    }
    Ok(builder.body)
}

async fn stream(
    mut builder: Builder,
    mut generation: Generation,
    keep: Option<Keep>,
    events: Events,
) {
    builder.begin();
    let failed = loop {
        for (name, value) in std::mem::take(&mut builder.events) {
            if !events.event(name, &value, builder.tally.generated as u64).await {
                return;
            }
        }
        match generation.step_for(&events, &mut builder.tally).await {
            None => return,
            Some(Ok(None)) => break None,
            Some(Ok(Some(step))) => builder.take(&step),
            Some(Err(error)) => break Some(error),
        }
    };
    let ended = match failed {
        Some(error) => Err(error),
        None => match builder.end() {
            Ok(message) => match keep {
                Some(keep) => keep.keep(&builder.app, &builder.body, message).await,
                None => Ok(()),
            },
            Err(error) => Err(error),
        },
    };
    match ended {
        Ok(()) => {
            let whole = builder.body["status"] == "completed";
            let response = builder.body.clone();
            builder.emit(
                if whole { "response.completed" } else { "response.incomplete" },
                json!({ "response": response }),
            );
        }
        Err(error) => {
            builder.body["status"] = json!("failed");
            builder.body["error"] = json!({ "code": failure(&error), "message": error.message });
            let response = builder.body.clone();
            builder.emit("response.failed", json!({ "response": response }));
        }
    }
    for (name, value) in std::mem::take(&mut builder.events) {
        if !events.event(name, &value, builder.tally.generated as u64).await {
            return;
        }
    }
}

/// An error in the few words that a failed response has for it.
fn failure(error: &ApiError) -> &'static str {
    match error.status.as_u16() {
        400 => "invalid_prompt",
        429 => "rate_limit_exceeded",
        _ => "server_error",
    }
}

pub(crate) fn read(app: &App, caller: &Caller, id: &str) -> ApiResult<Response> {
    let found =
        app.vault.response(&caller.key, id).ok_or_else(|| ApiError::not_found("response"))?;
    Ok(Json(found.body.clone()).into_response())
}

pub(crate) async fn remove(app: Arc<App>, caller: &Caller, id: String) -> ApiResult<Response> {
    if !app.vault.remove_response(&caller.key, &id) {
        return Err(ApiError::not_found("response"));
    }
    if app.vault.durable.is_some() {
        let (vault, id) = (Arc::clone(&app.vault), id.clone());
        blocking(move || {
            if let Some(durable) = &vault.durable {
                durable.forget_response(&id);
            }
            Ok(())
        })
        .await?;
    }
    Ok(Json(json!({ "id": id, "object": "response", "deleted": true })).into_response())
}

pub(crate) fn input_items(
    app: &App,
    caller: &Caller,
    id: &str,
    query: &str,
) -> ApiResult<Response> {
    let found =
        app.vault.response(&caller.key, id).ok_or_else(|| ApiError::not_found("response"))?;
    let (mut limit, mut descending, mut after) = (20_usize, true, None);
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        match pair.split_once('=') {
            Some(("limit", n)) => {
                limit = n
                    .parse()
                    .ok()
                    .filter(|n| (1..=100).contains(n))
                    .ok_or_else(|| ApiError::param("limit", "'limit' must be from 1 to 100"))?;
            }
            Some(("order", "asc")) => descending = false,
            Some(("order", "desc")) => {}
            Some(("after", item)) => after = Some(item.to_owned()),
            _ => {
                return Err(ApiError::unsupported(
                    pair.chars().take(32).collect::<String>(),
                    "there are limit, order and after",
                ));
            }
        }
    }
    let mut items: Vec<Value> = Vec::new();
    for (index, item) in found.input.iter().enumerate() {
        let mut item = item.clone();
        if let Some(map) = item.as_object_mut() {
            map.retain(|_, value| !value.is_null());
            map.entry("type").or_insert(json!("message"));
            map.entry("id")
                .or_insert(json!(format!("item_{}_{index}", id.trim_start_matches("resp_"))));
            if let Some(Value::String(text)) = map.get("content").cloned() {
                let part = if map.get("role").is_some_and(|r| r == "assistant") {
                    json!({ "type": "output_text", "text": text, "annotations": [] })
                } else {
                    json!({ "type": "input_text", "text": text })
                };
                map.insert("content".to_owned(), json!([part]));
            }
            map.entry("status").or_insert(json!("completed"));
        }
        items.push(item);
    }
    if descending {
        items.reverse();
    }
    if let Some(after) = after {
        let at = items.iter().position(|i| i["id"] == after.as_str());
        let at =
            at.ok_or_else(|| ApiError::param("after", "'after' names no item of this response"))?;
        items.drain(..=at);
    }
    let more = items.len() > limit;
    items.truncate(limit);
    let (first, last) =
        (items.first().map(|i| i["id"].clone()), items.last().map(|i| i["id"].clone()));
    Ok(Json(json!({ "object": "list", "data": items, "first_id": first, "last_id": last, "has_more": more })).into_response())
}

/// Responses of the store; their states are loaded when somebody continues them.
pub(crate) fn bring_back(vault: &Vault, records: &[Record]) {
    for Record { id, value: record, .. } in records.iter().filter(|r| r.kind == "response") {
        let Some(key) = record["key"].as_str().and_then(from_hex) else { continue };
        let list = |name: &str| record[name].as_array().cloned().unwrap_or_default();
        let end = record["end_token"].as_u64().map(|t| t as u32);
        let stored = StoredResponse::new(
            key,
            record["body"].clone(),
            list("input"),
            list("history"),
            end,
            None,
        );
        vault.add_response(id, stored);
    }
}
