//! `/v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::app::{
    App, Body, Caller, Generation, Prepared, QUICK, Tally, Wanted, finish_word, new_id, now,
    off_thread_if, read,
};
use crate::cache::Space;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, Hints};
use crate::grammar::{Constraint, Trigger};
use crate::output::{Piece, Splitter};
use crate::prompt::{ModelInfo, Prompt, Tool, messages};
use crate::recent::Shown;
use crate::sse;
use crate::worker::{Start, Step, TokenLogprobs};

/// What the model may do with tools.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ToolChoice {
    Auto,
    None,
    Required,
    Named(String),
}

/// The form of the reply's content.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Format {
    Text,
    /// JSON of this schema; `None` is any object.
    Json(Option<Value>),
}

/// The parts of a request that make prompt and grammar.
#[derive(Clone)]
pub(crate) struct Conversation {
    pub messages: Vec<Value>,
    /// The messages as the template takes them; `messages` is empty then.
    pub shown: Option<Shown>,
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
    pub parallel: bool,
    pub format: Format,
    pub extra: Map<String, Value>,
}

impl Conversation {
    /// The grammar that the reply must follow, if any.
    pub(crate) fn constraint(
        &self,
        info: &ModelInfo,
        prompt: &Prompt,
    ) -> ApiResult<Option<Constraint>> {
        let grammars = || {
            let missing = || {
                ApiError::unsupported(
                    "response_format",
                    "this model's tokenizer names no end token",
                )
            };
            info.grammars.as_ref().ok_or_else(missing)
        };
        // Thoughts are free: the grammar holds for what comes after them.
        let trigger = match info.think {
            Some((_, close)) if prompt.thinking => Trigger::After(close),
            _ => Trigger::Now,
        };
        let pairs = |tools: &[&Tool]| -> Vec<(String, Value)> {
            tools.iter().map(|t| (t.name.clone(), t.parameters.clone())).collect()
        };
        match &self.choice {
            ToolChoice::Required => {
                let all: Vec<&Tool> = self.tools.iter().collect();
                return grammars()?.calls(&pairs(&all), self.parallel, false, trigger).map(Some);
            }
            ToolChoice::Named(name) => {
                let one: Vec<&Tool> = self.tools.iter().filter(|t| t.name == *name).collect();
                return grammars()?.calls(&pairs(&one), false, false, trigger).map(Some);
            }
            ToolChoice::Auto | ToolChoice::None => {}
        }
        if let Format::Json(schema) = &self.format {
            let any = json!({ "type": "object" });
            let schema = schema.as_ref().unwrap_or(&any);
            return grammars()?.json(schema, "response_format", trigger).map(Some);
        }
        // A call that the model begins on its own is held to its tool's schema.
        if let (ToolChoice::Auto, Some(open), false, false) =
            (&self.choice, info.tool_open, self.tools.is_empty(), info.xml_calls)
            && let Some(grammars) = &info.grammars
        {
            let all: Vec<&Tool> = self.tools.iter().collect();
            return Ok(grammars.calls(&pairs(&all), false, true, Trigger::EachTime(open)).ok());
        }
        Ok(None)
    }

    /// Whether calls are looked for in the reply.
    pub(crate) fn calls(&self) -> bool {
        !self.tools.is_empty() && self.choice != ToolChoice::None
    }

    /// Tools and how they are chosen, as the chat API has them; `flat` names the function beside the type.
    pub(crate) fn take_tools(
        fields: &mut Fields,
        flat: bool,
    ) -> ApiResult<(Vec<Tool>, ToolChoice, bool)> {
        let tools = ModelInfo::tools(fields.take("tools")?.unwrap_or_default())?;
        let parallel = fields.take::<bool>("parallel_tool_calls")?.unwrap_or(true);
        let choice = match fields.value("tool_choice") {
            None => ToolChoice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "auto" => ToolChoice::Auto,
                "none" => ToolChoice::None,
                "required" => ToolChoice::Required,
                _ => {
                    return Err(ApiError::param(
                        "tool_choice",
                        "'tool_choice' is auto, none, required or a function",
                    ));
                }
            },
            Some(value) => {
                let mut choice = Fields::of(value, "tool_choice")?;
                choice.only("type", &[json!("function")], "it names a function")?;
                let name = if flat {
                    choice.require::<String>("name")?
                } else {
                    let mut function =
                        Fields::of(choice.require("function")?, "tool_choice.function")?;
                    let name = function.require("name")?;
                    function.finish()?;
                    name
                };
                choice.finish()?;
                ToolChoice::Named(name)
            }
        };
        match &choice {
            ToolChoice::Required if tools.is_empty() => {
                return Err(ApiError::param(
                    "tool_choice",
                    "'tool_choice' asks for a call, and there are no tools",
                ));
            }
            ToolChoice::Named(name) if !tools.iter().any(|t| t.name == *name) => {
                return Err(ApiError::param(
                    "tool_choice",
                    format!("'tool_choice' names '{name}', which is not in tools"),
                ));
            }
            _ => {}
        }
        Ok((tools, choice, parallel))
    }

    /// A response format, as the chat API has it.
    pub(crate) fn take_format(value: Option<Value>, path: &str, flat: bool) -> ApiResult<Format> {
        let Some(value) = value else { return Ok(Format::Text) };
        let mut fields = Fields::of(value, path)?;
        let kind: String = fields.require("type")?;
        let format = match kind.as_str() {
            "text" => Format::Text,
            "json_object" => Format::Json(None),
            "json_schema" => {
                let mut inner = if flat {
                    std::mem::replace(&mut fields, Fields::of(json!({}), path)?)
                } else {
                    Fields::of(fields.require("json_schema")?, &format!("{path}.json_schema"))?
                };
                inner.ignore(&["name", "description", "strict"]);
                let schema = inner.require::<Value>("schema")?;
                inner.finish()?;
                Format::Json(Some(schema))
            }
            _ => {
                return Err(ApiError::unsupported(
                    format!("{path}.type"),
                    "there are text, json_object and json_schema",
                ));
            }
        };
        fields.finish()?;
        Ok(format)
    }
}

struct Request {
    conversation: Conversation,
    wanted: Wanted,
    stream: bool,
    usage: bool,
}

/// Names that a chat does not have.
const HINTS: Hints = &[
    ("input", "chat takes 'messages'; 'input' is for /v1/responses"),
    ("prompt", "chat takes 'messages'; 'prompt' is for /v1/completions"),
    ("max_output_tokens", "chat takes 'max_completion_tokens' or 'max_tokens'"),
    ("n_predict", "chat takes 'max_completion_tokens' or 'max_tokens'"),
    ("instructions", "chat takes a message of the role 'system'"),
    ("system", "chat takes a message of the role 'system'"),
    ("text", "chat takes 'response_format'; 'text' is for /v1/responses"),
    ("reasoning", "chat takes 'reasoning_effort'"),
    (
        "previous_response_id",
        "chat takes the whole conversation in 'messages'; /v1/responses continues stored ones",
    ),
    ("stop_sequences", "chat takes 'stop'"),
];

/// The messages of a request, of which `list` is the text: as the template takes them, or, where that cannot be, as they are.
fn take_messages(
    app: &App,
    caller: &Caller,
    body: &[u8],
    fields: &mut Fields,
    list: Option<&str>,
) -> ApiResult<(Vec<Value>, Option<Shown>)> {
    let Some(list) = list else { return Ok((messages(fields.list("messages")?)?, None)) };
    let key = ["cache_salt", "prompt_cache_key"].iter().find_map(|name| fields.peek(name));
    let space = caller.space(key.and_then(Value::as_str));
    let tools = fields.peek("tools").and_then(Value::as_array).is_some_and(|t| !t.is_empty());
    if let Some(shown) = app.info.shown(&space, list, tools) {
        return Ok((Vec::new(), Some(shown?)));
    }
    let Ok(value) = serde_json::from_str(list) else {
        // The text of a string is no Unicode: the whole says where.
        let error = Fields::parse(body).err();
        return Err(error.unwrap_or_else(|| ApiError::invalid("the body is not JSON")));
    };
    fields.put("messages", Some(value));
    Ok((messages(fields.list("messages")?)?, None))
}

fn parse(app: &App, caller: &Caller, body: &[u8]) -> ApiResult<Request> {
    let (mut fields, list) = Fields::parse_beside(body, "messages")?;
    fields = fields.with_hints(HINTS);
    app.check_model(&mut fields)?;
    let (messages, shown) = take_messages(app, caller, body, &mut fields, list)?;
    let (tools, choice, parallel) = Conversation::take_tools(&mut fields, false)?;
    let format =
        Conversation::take_format(fields.value("response_format"), "response_format", false)?;
    let mut wanted =
        app.wanted(&mut fields, caller, &["max_tokens", "max_completion_tokens"], None)?;
    let logprobs = fields.take::<bool>("logprobs")?.unwrap_or(false);
    let top = fields.within("top_logprobs", 0..=20_usize)?;
    if top.is_some_and(|t| t > 0) && !logprobs {
        return Err(ApiError::param("top_logprobs", "'top_logprobs' needs logprobs: true"));
    }
    wanted.logprobs = logprobs.then(|| top.unwrap_or(0));
    let stream = fields.take::<bool>("stream")?.unwrap_or(false);
    wanted.stream = stream;
    let mut usage = false;
    if let Some(options) = fields.value("stream_options") {
        if !stream {
            return Err(ApiError::param("stream_options", "'stream_options' needs stream: true"));
        }
        let mut options = Fields::of(options, "stream_options")?;
        usage = options.take::<bool>("include_usage")?.unwrap_or(false);
        options.ignore(&["include_obfuscation"]);
        options.finish()?;
    }
    let mut extra = fields.take::<Map<String, Value>>("chat_template_kwargs")?.unwrap_or_default();
    for reserved in ["messages", "tools", "add_generation_prompt"] {
        extra.shift_remove(reserved);
    }
    fields.effort("reasoning_effort", &mut extra)?;
    fields.ignore(&["user", "metadata", "safety_identifier", "prompt_cache_retention"]);
    fields.only(
        "store",
        &[json!(false)],
        "chat completions are not stored; /v1/responses stores",
    )?;
    fields.only("service_tier", &[json!("auto"), json!("default")], "there is one tier")?;
    fields.only("modalities", &[json!(["text"])], "there is text alone")?;
    fields.only("audio", &[], "there is no audio")?;
    fields.only("prediction", &[], "outputs are not predicted")?;
    fields.only("functions", &[], "use tools")?;
    fields.only("function_call", &[], "use tool_choice")?;
    fields.only("web_search_options", &[], "there is no search")?;
    fields.only("verbosity", &[json!("medium")], "the model has one verbosity")?;
    fields.finish()?;
    let conversation = Conversation { messages, shown, tools, choice, parallel, format, extra };
    Ok(Request { conversation, wanted, stream, usage })
}

/// Makes prompt and grammar. `bytes` is how large the conversation is.
pub(crate) async fn prepare(
    app: &Arc<App>,
    conversation: Conversation,
    space: Space,
    bytes: usize,
) -> ApiResult<Prepared> {
    let info = Arc::clone(&app.info);
    // Grammars of large schemas take long to make.
    let plain = conversation.format == Format::Text && conversation.tools.is_empty();
    off_thread_if(!plain || bytes > QUICK, move || {
        let Conversation { messages, shown, tools, extra, .. } = &conversation;
        let prompt = match shown {
            Some(shown) => info.chat_shown(&space, shown, tools, extra)?,
            None => info.chat(&space, messages, tools, extra)?,
        };
        if prompt.tokens.len() >= info.context {
            return Err(ApiError::context(prompt.tokens.len(), info.context).of("messages"));
        }
        let constraint = conversation.constraint(&info, &prompt)?;
        Ok(Prepared { prompt, constraint })
    })
    .await
}

pub(crate) async fn handle(app: Arc<App>, caller: Caller, body: Body) -> ApiResult<Response> {
    let request = read(&app, caller, &body, parse).await?;
    let bytes = body.len();
    drop(body);
    let permit = app.place()?;
    let calls = request.conversation.calls();
    let Prepared { prompt, constraint } =
        prepare(&app, request.conversation, request.wanted.space, bytes).await?;
    let (choices, with_logprobs) = (request.wanted.choices, request.wanted.logprobs.is_some());
    let splitter = Splitter::new(app.info.think.is_some(), prompt.thinking, calls);
    let start = Start::Prompt { marks: prompt.marks };
    let generation =
        app.generate(&caller, permit, request.wanted, start, prompt.tokens, constraint, None)?;
    let head = Head { id: new_id("chatcmpl-"), created: now(), app: Arc::clone(&app) };
    if request.stream {
        return Ok(stream(head, generation, splitter, choices, with_logprobs, request.usage));
    }
    collect(&head, generation, &splitter, choices, with_logprobs).await
}

/// What all objects of one response say.
struct Head {
    id: String,
    created: u64,
    app: Arc<App>,
}

impl Head {
    fn object(&self, kind: &str, choices: &Value) -> Value {
        json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.app.info.name,
            "system_fingerprint": self.app.fingerprint, "choices": choices,
        })
    }
}

/// One token's entry of `logprobs.content`.
pub(crate) fn logprob_entry(info: &ModelInfo, token: u32, logprobs: &TokenLogprobs) -> Value {
    let entry = |token: u32, value: f32| {
        let bytes = info.tokenizer.token_bytes(token).unwrap_or_default();
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": value, "bytes": bytes })
    };
    let mut out = entry(token, logprobs.logprob);
    out["top_logprobs"] = logprobs.top.iter().map(|(t, v)| entry(*t, *v)).collect();
    out
}

/// One choice as it comes.
struct Choice {
    splitter: Splitter,
    entries: Vec<Value>,
    finish: Option<&'static str>,
    message: Message,
}

#[derive(Default)]
struct Message {
    thoughts: String,
    content: String,
    calls: Vec<Value>,
}

impl Choice {
    fn new(splitter: &Splitter) -> Self {
        Self {
            splitter: splitter.clone(),
            entries: Vec::new(),
            finish: None,
            message: Message::default(),
        }
    }

    /// Takes a step; gives the pieces that are certain by now.
    fn step(&mut self, app: &App, tally: &mut Tally, step: &Step) -> Vec<Piece> {
        let mut pieces = self.splitter.push(&step.text);
        if let Some(token) = step.token {
            tally.token(step.at, self.splitter.in_thoughts());
            if let Some(logprobs) = &step.logprobs
                && !app.info.tokenizer.is_eos(token)
            {
                self.entries.push(logprob_entry(&app.info, token, logprobs));
            }
        }
        if let Some(reason) = step.finished {
            pieces.extend(self.splitter.finish());
            self.finish = Some(finish_word(reason, self.splitter.called > 0));
        }
        pieces
    }
}

fn call_value(name: &str, arguments: &str) -> Value {
    json!({ "id": new_id("call_"), "type": "function", "function": { "name": name, "arguments": arguments } })
}

async fn collect(
    head: &Head,
    mut generation: Generation,
    splitter: &Splitter,
    count: u32,
    with_logprobs: bool,
) -> ApiResult<Response> {
    let mut choices: BTreeMap<u32, Choice> =
        (0..count).map(|i| (i, Choice::new(splitter))).collect();
    let mut tally = Tally::new(&generation);
    while let Some(step) = generation.step(&mut tally).await? {
        let Some(choice) = choices.get_mut(&step.choice) else { continue };
        for piece in choice.step(&head.app, &mut tally, &step) {
            match piece {
                Piece::Thought(text) => choice.message.thoughts.push_str(&text),
                Piece::Content(text) => choice.message.content.push_str(&text),
                Piece::Call { name, arguments } => {
                    choice.message.calls.push(call_value(&name, &arguments));
                }
            }
        }
    }
    if choices.values().any(|c| c.finish.is_none()) {
        return Err(ApiError::stopping());
    }
    let list: Vec<Value> = choices
        .into_iter()
        .map(|(index, choice)| {
            let Message { thoughts, content, calls } = choice.message;
            let none = content.is_empty() && !calls.is_empty();
            let content = if none { Value::Null } else { json!(content) };
            let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
            if !thoughts.is_empty() {
                message["reasoning_content"] = json!(thoughts);
            }
            if !calls.is_empty() {
                message["tool_calls"] = Value::Array(calls);
            }
            let logprobs =
                if with_logprobs { json!({ "content": choice.entries, "refusal": null }) } else { Value::Null };
            json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish })
        })
        .collect();
    let mut object = head.object("chat.completion", &Value::Array(list));
    object["usage"] = tally.usage();
    object["timings"] = tally.timings();
    Ok(Json(object).into_response())
}

fn stream(
    head: Head,
    mut generation: Generation,
    splitter: Splitter,
    count: u32,
    with_logprobs: bool,
    usage: bool,
) -> Response {
    let (events, response) = sse::response(Arc::clone(&generation.sent));
    let run = async move {
        let chunk = |index: u32, delta: Value, logprobs: Value, finish: Option<&str>| {
            let choice = json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
            let mut object = head.object("chat.completion.chunk", &json!([choice]));
            if usage {
                object["usage"] = Value::Null;
            }
            object
        };
        let mut choices: Vec<Choice> = (0..count).map(|_| Choice::new(&splitter)).collect();
        let mut tally = Tally::new(&generation);
        let mut calls = vec![0_usize; choices.len()];
        for index in 0..count {
            let delta = json!({ "role": "assistant", "content": "" });
            if !events.data(&chunk(index, delta, Value::Null, None), 0).await {
                return;
            }
        }
        loop {
            let step = match generation.step_for(&events, &mut tally).await {
                None => return,
                Some(Err(error)) => return events.fail(&error).await,
                Some(Ok(None)) => break,
                Some(Ok(Some(step))) => step,
            };
            let index = step.choice;
            let Some(choice) = choices.get_mut(index as usize) else { continue };
            let pieces = choice.step(&head.app, &mut tally, &step);
            let mut entries = |some: bool| {
                if with_logprobs && some {
                    json!({ "content": std::mem::take(&mut choice.entries), "refusal": null })
                } else {
                    Value::Null
                }
            };
            let mut alive = true;
            for piece in pieces {
                let (delta, some) = match piece {
                    Piece::Thought(text) => (json!({ "reasoning_content": text }), true),
                    Piece::Content(text) => (json!({ "content": text }), true),
                    Piece::Call { name, arguments } => {
                        let mut call = call_value(&name, &arguments);
                        call["index"] = json!(calls[index as usize]);
                        calls[index as usize] += 1;
                        (json!({ "tool_calls": [call] }), true)
                    }
                };
                alive = alive
                    && events
                        .data(&chunk(index, delta, entries(some), None), tally.generated as u64)
                        .await;
            }
            if choice.finish.is_some() {
                let rest = if choice.entries.is_empty() {
                    Value::Null
                } else {
                    json!({ "content": std::mem::take(&mut choice.entries), "refusal": null })
                };
                let mut last = chunk(index, json!({}), rest, choice.finish);
                last["timings"] = tally.timings();
                alive = alive && events.data(&last, tally.generated as u64).await;
            }
            if !alive {
                return;
            }
        }
        if choices.iter().any(|c| c.finish.is_none()) {
            return events.fail(&ApiError::stopping()).await;
        }
        events.end(usage.then(|| head.object("chat.completion.chunk", &json!([]))), &tally).await;
    };
    tokio::spawn(run);
    response
}
