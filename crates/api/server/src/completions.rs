//! `/v1/completions`, `/tokenize` and `/detokenize`.

use std::collections::BTreeMap;
use std::sync::Arc;

use ampoule::EncodeOptions;
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::app::{App, Body, Caller, Generation, Tally, blocking, finish_word, new_id, now, read};
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, Hints};
use crate::prompt::messages;
use crate::sse;
use crate::worker::{Start, Step, TokenLogprobs};

/// Tokens of a completion where nobody says how many.
const DEFAULT_TOKENS: usize = 16;

enum Text {
    Words(String),
    Tokens(Vec<u32>),
}

fn prompt(value: Value) -> ApiResult<Text> {
    let wrong = || {
        ApiError::param(
            "prompt",
            "'prompt' must be a text or a list of token ids; one prompt at a time",
        )
    };
    match value {
        Value::String(text) => Ok(Text::Words(text)),
        Value::Array(mut list) if list.len() == 1 && !list[0].is_number() => prompt(list.remove(0)),
        list @ Value::Array(_) => {
            serde_json::from_value(list).map(Text::Tokens).map_err(|_| wrong())
        }
        _ => Err(wrong()),
    }
}

/// Names that a completion does not have.
const HINTS: Hints = &[
    ("messages", "/v1/completions takes 'prompt'; 'messages' are for /v1/chat/completions"),
    ("input", "/v1/completions takes 'prompt'"),
    ("text", "/v1/completions takes 'prompt'"),
    ("max_completion_tokens", "/v1/completions takes 'max_tokens'"),
    ("max_output_tokens", "/v1/completions takes 'max_tokens'"),
    ("n_predict", "/v1/completions takes 'max_tokens'"),
    ("tools", "tools are for /v1/chat/completions"),
    ("response_format", "formats are for /v1/chat/completions"),
];

/// Names that /tokenize and /detokenize do not have.
const TOKENIZE: Hints = &[
    ("text", "/tokenize takes 'prompt' (or 'content'), or 'messages'"),
    ("input", "/tokenize takes 'prompt' (or 'content'), or 'messages'"),
    ("inputs", "/tokenize takes 'prompt' (or 'content'), or 'messages'"),
    ("add_special", "/tokenize takes 'add_special_tokens'"),
];
const DETOKENIZE: Hints = &[
    ("ids", "/detokenize takes 'tokens'"),
    ("token_ids", "/detokenize takes 'tokens'"),
    ("input_ids", "/detokenize takes 'tokens'"),
];

pub(crate) async fn handle(app: Arc<App>, caller: Caller, body: Body) -> ApiResult<Response> {
    let fields = read(&app, caller, &body, |_, _, body| Fields::parse(body)).await?;
    let mut fields = fields.with_hints(HINTS);
    app.check_model(&mut fields)?;
    let text = prompt(fields.require("prompt")?)?;
    let mut wanted = app.wanted(&mut fields, &caller, &["max_tokens"], Some(DEFAULT_TOKENS))?;
    wanted.input = "prompt";
    wanted.logprobs = fields.within("logprobs", 0..=20_usize)?;
    let echo = fields.take::<bool>("echo")?.unwrap_or(false);
    let stream = fields.take::<bool>("stream")?.unwrap_or(false);
    wanted.stream = stream;
    let mut usage = false;
    if let Some(options) = fields.value("stream_options") {
        let mut options = Fields::of(options, "stream_options")?;
        usage = options.take::<bool>("include_usage")?.unwrap_or(false);
        options.ignore(&["include_obfuscation"]);
        options.finish()?;
    }
    fields.ignore(&["user"]);
    fields.only("suffix", &[json!("")], "the model continues, it does not fill in")?;
    fields.only("best_of", &[json!(1)], "ask for n and choose")?;
    fields.finish()?;
    let permit = app.place()?;
    let info = Arc::clone(&app.info);
    let (tokens, said) = blocking(move || match text {
        Text::Words(text) => {
            let tokens = info
                .tokenizer
                .encode(&text, EncodeOptions::PROMPT)
                .map_err(ampoule::Error::from)?;
            Ok((tokens, text))
        }
        Text::Tokens(tokens) => {
            info.known(&tokens, "prompt")?;
            let text = info.tokenizer.decode(&tokens);
            Ok((tokens, text))
        }
    })
    .await?;
    let echoed = if echo { said } else { String::new() };
    let (count, with_logprobs) = (wanted.choices, wanted.logprobs.is_some());
    let marks = app.info.marks(&tokens);
    let generation =
        app.generate(&caller, permit, wanted, Start::Prompt { marks }, tokens, None, None)?;
    let head = Head { id: new_id("cmpl-"), created: now(), app };
    if stream {
        return Ok(streamed(head, generation, echoed, count, with_logprobs, usage));
    }
    collect(&head, generation, &echoed, count, with_logprobs).await
}

struct Head {
    id: String,
    created: u64,
    app: Arc<App>,
}

impl Head {
    fn object(&self, choices: &Value) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.app.info.name,
            "system_fingerprint": self.app.fingerprint, "choices": choices,
        })
    }
}

/// The old form of log probabilities: lists side by side.
#[derive(Default)]
struct Lists {
    tokens: Vec<Value>,
    values: Vec<Value>,
    tops: Vec<Value>,
    offsets: Vec<usize>,
    at: usize,
}

impl Lists {
    fn take_step(&mut self, app: &App, tally: &mut Tally, step: &Step) {
        let Some(token) = step.token else { return };
        tally.token(step.at, false);
        if let Some(logprobs) = &step.logprobs {
            self.push(app, token, logprobs);
        }
    }

    fn push(&mut self, app: &App, token: u32, logprobs: &TokenLogprobs) {
        let text =
            |token: u32| app.info.tokenizer.token_text(token).unwrap_or_default().into_owned();
        let said = text(token);
        self.offsets.push(self.at);
        self.at += said.chars().count();
        self.tokens.push(json!(said));
        self.values.push(json!(logprobs.logprob));
        let top: Map<String, Value> =
            logprobs.top.iter().map(|(t, v)| (text(*t), json!(v))).collect();
        self.tops.push(Value::Object(top));
    }

    fn take(&mut self) -> Value {
        let (tokens, values) = (std::mem::take(&mut self.tokens), std::mem::take(&mut self.values));
        let (tops, offsets) = (std::mem::take(&mut self.tops), std::mem::take(&mut self.offsets));
        json!({ "tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets })
    }
}

async fn collect(
    head: &Head,
    mut generation: Generation,
    echoed: &str,
    count: u32,
    with_logprobs: bool,
) -> ApiResult<Response> {
    let mut choices: BTreeMap<u32, (String, Lists, Option<&str>)> =
        (0..count).map(|i| (i, (echoed.to_owned(), Lists::default(), None))).collect();
    let mut tally = Tally::new(&generation);
    while let Some(step) = generation.step(&mut tally).await? {
        let Some((text, lists, finish)) = choices.get_mut(&step.choice) else { continue };
        text.push_str(&step.text);
        lists.take_step(&head.app, &mut tally, &step);
        *finish = step.finished.map(|reason| finish_word(reason, false)).or(*finish);
    }
    if choices.values().any(|(.., finish)| finish.is_none()) {
        return Err(ApiError::stopping());
    }
    let list: Vec<Value> = choices
        .into_iter()
        .map(|(index, (text, mut lists, finish))| {
            let logprobs = if with_logprobs { lists.take() } else { Value::Null };
            json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish })
        })
        .collect();
    let mut object = head.object(&Value::Array(list));
    object["usage"] = tally.usage();
    object["timings"] = tally.timings();
    Ok(Json(object).into_response())
}

fn streamed(
    head: Head,
    mut generation: Generation,
    echoed: String,
    count: u32,
    with_logprobs: bool,
    usage: bool,
) -> Response {
    let (events, response) = sse::response(Arc::clone(&generation.sent));
    let run = async move {
        let mut lists: Vec<Lists> = (0..count).map(|_| Lists::default()).collect();
        let mut tally = Tally::new(&generation);
        let mut open = count;
        if !echoed.is_empty() {
            for index in 0..count {
                let choice = json!({ "index": index, "text": echoed, "logprobs": null, "finish_reason": null });
                events.data(&head.object(&json!([choice])), 0).await;
            }
        }
        loop {
            let step = match generation.step_for(&events, &mut tally).await {
                None => return,
                Some(Err(error)) => return events.fail(&error).await,
                Some(Ok(None)) => break,
                Some(Ok(Some(step))) => step,
            };
            let Some(lists) = lists.get_mut(step.choice as usize) else { continue };
            lists.take_step(&head.app, &mut tally, &step);
            let finish = step.finished.map(|reason| finish_word(reason, false));
            open -= u32::from(finish.is_some());
            if step.text.is_empty() && finish.is_none() {
                continue;
            }
            let logprobs = if with_logprobs { lists.take() } else { Value::Null };
            let choice = json!({ "index": step.choice, "text": step.text, "logprobs": logprobs, "finish_reason": finish });
            if !events.data(&head.object(&json!([choice])), tally.generated as u64).await {
                return;
            }
        }
        if open > 0 {
            return events.fail(&ApiError::stopping()).await;
        }
        events.end(usage.then(|| head.object(&json!([]))), &tally).await;
    };
    tokio::spawn(run);
    response
}

pub(crate) async fn tokenize(app: Arc<App>, caller: Caller, body: Body) -> ApiResult<Response> {
    let fields = read(&app, caller, &body, |_, _, body| Fields::parse(body)).await?;
    let mut fields = fields.with_hints(TOKENIZE);
    app.check_model(&mut fields)?;
    let text = fields.text("prompt", usize::MAX)?;
    let text = fields.text("content", usize::MAX)?.map_or(text, Some);
    let list = fields.take::<Vec<Value>>("messages")?;
    let special = fields.take::<bool>("add_special_tokens")?.unwrap_or(true);
    fields.finish()?;
    let (info, space) = (Arc::clone(&app.info), caller.space(None));
    let tokens = blocking(move || match (text, list) {
        (Some(text), None) => {
            let options = EncodeOptions { add_special: special, parse_special: special };
            Ok(info.tokenizer.encode(&text, options).map_err(ampoule::Error::from)?)
        }
        (None, Some(list)) => Ok(info.chat(&space, &messages(list)?, &[], &Map::new())?.tokens),
        _ => Err(ApiError::param("prompt", "give either 'prompt' or 'messages'")),
    })
    .await?;
    Ok(Json(json!({ "count": tokens.len(), "max_model_len": app.info.context, "tokens": tokens }))
        .into_response())
}

/// The text of tokens.
pub(crate) fn detokenize(app: &App, _: &Caller, body: &[u8]) -> ApiResult<Response> {
    let mut fields = Fields::parse(body)?.with_hints(DETOKENIZE);
    app.check_model(&mut fields)?;
    let tokens: Vec<u32> = fields.require("tokens")?;
    fields.finish()?;
    app.info.known(&tokens, "tokens")?;
    let text = app.info.tokenizer.decode(&tokens);
    Ok(Json(json!({ "prompt": text })).into_response())
}
