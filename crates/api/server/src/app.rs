//! What every handler shares, and the way of a request to the engine and back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use ampoule::{Capsule, FinishReason, ReplyOptions, SamplingParams};
use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::Config;
use crate::cache::Space;
use crate::error::{ApiError, ApiResult, REQUEST};
use crate::fields::Fields;
use crate::grammar::Constraint;
use crate::metrics::Metrics;
use crate::prompt::{ModelInfo, Prompt};
use crate::rewind::Cut;
use crate::sse::Events;
use crate::vault::Vault;
use crate::worker::{Begun, Command, Event, Job, OnEnd, Start, Step, Worker};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Digest of the key; all zero where no keys are asked for.
    pub key: [u8; 32],
    /// Number of the request.
    pub request: u64,
    /// Whether the test of faults was asked for.
    pub fault: bool,
    /// When the head of the request had been read.
    pub arrived: Instant,
}

impl Caller {
    /// Whose turn it is counted as.
    pub(crate) fn tenant(&self) -> u64 {
        u64::from_le_bytes(self.key[..8].try_into().unwrap_or_default())
    }

    /// The namespace of the caller's capsules under a cache key.
    pub(crate) fn space(&self, cache_key: Option<&str>) -> Space {
        space(&self.key, cache_key)
    }
}

/// The namespace of a key's capsules under a cache key.
pub(crate) fn space(key: &[u8; 32], cache_key: Option<&str>) -> Space {
    let mut hasher = blake3::Hasher::new_derive_key("ampoule server v1 namespace");
    hasher.update(key).update(cache_key.unwrap_or_default().as_bytes());
    *hasher.finalize().as_bytes()
}

/// The server's state.
pub(crate) struct App {
    pub config: Config,
    pub info: Arc<ModelInfo>,
    pub metrics: Arc<Metrics>,
    pub vault: Arc<Vault>,
    pub fingerprint: String,
    pub engine: mpsc::Sender<Command>,
    pub places: Arc<Semaphore>,
    /// Of those who read states from the store.
    pub readers: Arc<Semaphore>,
    pub stopping: AtomicBool,
    pub requests: AtomicU64,
}

/// How a request wants its replies, whatever the API.
pub(crate) struct Wanted {
    pub params: SamplingParams,
    pub reply: ReplyOptions,
    pub choices: u32,
    pub logprobs: Option<usize>,
    pub caching: bool,
    pub space: Space,
    /// The parameter that has what is read.
    pub input: &'static str,
    /// Whether each token goes out as it comes.
    pub stream: bool,
}

/// A generation under way.
pub(crate) struct Generation {
    events: UnboundedReceiver<Event>,
    pub sent: Arc<AtomicU64>,
    arrived: Instant,
    queued: Instant,
    pub interrupt: Arc<AtomicBool>,
    /// Whether what is read stays behind for later prompts.
    pub keeps: bool,
    /// The parameter that has what is read.
    input: &'static str,
}

impl Generation {
    /// The next step of any choice; `None` after the last. What the engine says of the prompt goes to the tally.
    pub(crate) async fn step(&mut self, tally: &mut Tally) -> ApiResult<Option<Step>> {
        loop {
            match self.events.recv().await {
                None => return Ok(None),
                Some(Event::Begun(begun)) => tally.begun = begun,
                Some(Event::Failed(error)) => return Err(error.of(self.input)),
                Some(Event::Step(step)) => return Ok(Some(step)),
            }
        }
    }

    /// As [`Generation::step`] for a stream; `None` where its client has gone.
    pub(crate) async fn step_for(
        &mut self,
        events: &Events,
        tally: &mut Tally,
    ) -> Option<ApiResult<Option<Step>>> {
        tokio::select! {
            step = self.step(tally) => Some(step),
            () = events.gone() => None,
        }
    }
}

impl App {
    /// What a client and the log call a request.
    pub(crate) fn request_id(&self, number: u64) -> String {
        format!("req_{:08x}{number:08x}", self.info.created as u32)
    }

    /// A place in the queue, or 429.
    pub(crate) fn place(&self) -> ApiResult<OwnedSemaphorePermit> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::stopping());
        }
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            self.metrics.rejected.add(1);
            // About one reply's time for each that waits before.
            let waiting = self.metrics.queue_depth.value().max(0) as u64;
            ApiError::overloaded((1 + waiting / 4).min(60))
        })
    }

    /// Hands a request to the engine.
    pub(crate) fn generate(
        &self,
        caller: &Caller,
        permit: OwnedSemaphorePermit,
        wanted: Wanted,
        start: Start,
        tokens: Vec<u32>,
        constraint: Option<Constraint>,
        on_end: Option<OnEnd>,
    ) -> ApiResult<Generation> {
        if matches!(start, Start::Prompt { .. }) {
            let input = wanted.input;
            if tokens.is_empty() {
                let words =
                    format!("'{input}' is empty: a reply needs at least one token to begin with");
                return Err(ApiError::param(input, words));
            }
            if tokens.len() >= self.info.context {
                return Err(ApiError::context(tokens.len(), self.info.context).of(input));
            }
        }
        let (out, events) = unbounded_channel();
        let (sent, interrupt) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (arrived, queued) = (caller.arrived, Instant::now());
        let (caching, input) = (wanted.caching && self.config.caching, wanted.input);
        let job = Job {
            space: wanted.space,
            tenant: caller.tenant(),
            request: self.request_id(caller.request),
            start,
            tokens,
            choices: wanted.choices,
            params: wanted.params,
            reply: wanted.reply,
            constraint,
            logprobs: wanted.logprobs,
            caching,
            stream: wanted.stream,
            on_end,
            arrived,
            queued,
            deadline: arrived + self.config.deadline,
            out,
            sent: Some(Arc::clone(&sent)),
            interrupt: Arc::clone(&interrupt),
            fault: caller.fault,
            _place: permit,
        };
        self.engine.send(Command::Generate(Box::new(job))).map_err(|_| ApiError::stopping())?;
        Ok(Generation { events, sent, arrived, queued, interrupt, keeps: caching, input })
    }

    /// Runs something on the engine's thread.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker) -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let (tell, told) = oneshot::channel();
        let request = REQUEST.try_with(Clone::clone).unwrap_or_default();
        let scope = request.clone();
        let command = Command::Call(Box::new(move |worker| {
            let _ = tell.send(REQUEST.sync_scope(scope, || work(worker)));
        }));
        self.engine.send(command).map_err(|_| ApiError::stopping())?;
        told.await.map_err(|_| {
            tracing::error!(request, "the engine gave no answer");
            ApiError::internal()
        })?
    }

    /// Brings a state back to an earlier position of its branch, a step at a time between other requests'.
    ///
    /// # Errors
    /// 429 if too many wait already.
    pub(crate) async fn rewind(&self, from: Capsule, position: u32) -> ApiResult<Cut> {
        let place = self.place()?;
        let (tell, told) = oneshot::channel();
        // Dropped with this future: whoever asked has gone then.
        let (here, gone) = mpsc::channel::<()>();
        let command = Command::Call(Box::new(move |worker| {
            let then = Box::new(move |cut| {
                drop(place);
                let _ = tell.send(cut);
            });
            let gone = Box::new(move || gone.try_recv() == Err(mpsc::TryRecvError::Disconnected));
            worker.rewind(from, position, gone, then);
        }));
        self.engine.send(command).map_err(|_| ApiError::stopping())?;
        let cut = told.await.map_err(|_| ApiError::internal())?;
        drop(here);
        cut
    }

    /// That the request is for the model there is.
    pub(crate) fn check_model(&self, fields: &mut Fields) -> ApiResult<()> {
        match fields.text("model", 1024)? {
            Some(name) if name != self.info.name => {
                let short: String = name.chars().take(128).collect();
                let message = format!("there is no model '{short}'; there is '{}'", self.info.name);
                Err(ApiError {
                    status: axum::http::StatusCode::NOT_FOUND,
                    code: Some("model_not_found"),
                    ..ApiError::param("model", message)
                })
            }
            _ => Ok(()),
        }
    }

    /// Sampling and length: what all APIs have in common. `names` are those of the length, later ones first.
    pub(crate) fn wanted(
        &self,
        fields: &mut Fields,
        caller: &Caller,
        lengths: &[&str],
        default_length: Option<usize>,
    ) -> ApiResult<Wanted> {
        let mut max_tokens = default_length;
        for name in lengths {
            if let Some(n) = fields.within::<usize>(name, 1..=1 << 30)? {
                max_tokens = Some(n);
            }
        }
        let mut stop = match fields.value("stop") {
            None => Vec::new(),
            Some(Value::String(text)) => vec![text],
            Some(list) => serde_json::from_value::<Vec<String>>(list)
                .map_err(|_| ApiError::param("stop", "'stop' must be a text or a list of texts"))?,
        };
        if stop.len() > 16 || stop.iter().any(|s| s.len() > 1024) {
            return Err(ApiError::param(
                "stop",
                "'stop' takes at most 16 texts of at most 1024 bytes",
            ));
        }
        stop.retain(|s| !s.is_empty());
        let mut logit_bias = Vec::new();
        if let Some(map) = fields.take::<serde_json::Map<String, Value>>("logit_bias")? {
            for (token, value) in map {
                let pair = token.parse::<u32>().ok().zip(value.as_f64());
                let pair =
                    pair.filter(|(t, v)| (*t as usize) < self.info.vocabulary && v.abs() <= 100.0);
                let (token, value) = pair.ok_or_else(|| {
                    ApiError::param(
                        "logit_bias",
                        "'logit_bias' maps token ids to numbers from -100 to 100",
                    )
                })?;
                logit_bias.push((token, value as f32));
            }
            if logit_bias.len() > 512 {
                return Err(ApiError::param("logit_bias", "'logit_bias' takes at most 512 tokens"));
            }
        }
        let temperature = fields.within("temperature", 0.0..=2.0_f32)?.unwrap_or(1.0);
        let top_p = fields.within("top_p", 0.0..=1.0_f32)?.unwrap_or(1.0);
        let seed = match fields.take::<i64>("seed")? {
            Some(seed) => seed.cast_unsigned(),
            None => random(),
        };
        let params = SamplingParams {
            // Below this a division would overflow: it is greedy all the same.
            temperature: if temperature < 1e-3 { 0.0 } else { temperature },
            top_k: fields.within("top_k", -1_i64..=1 << 24)?.map_or(0, |k| k.max(0) as u32),
            top_p: top_p.max(1e-6),
            min_p: fields.within("min_p", 0.0..=1.0_f32)?.unwrap_or(0.0),
            repetition_penalty: fields
                .within("repetition_penalty", 0.01..=100.0_f32)?
                .unwrap_or(1.0),
            presence_penalty: fields.within("presence_penalty", -2.0..=2.0_f32)?.unwrap_or(0.0),
            frequency_penalty: fields.within("frequency_penalty", -2.0..=2.0_f32)?.unwrap_or(0.0),
            seed,
            logit_bias,
        };
        let ignore_end = fields.take::<bool>("ignore_eos")?.unwrap_or(false);
        let key = fields.text("prompt_cache_key", 1024)?;
        let key = fields.text("cache_salt", 1024)?.map_or(key, Some);
        Ok(Wanted {
            params,
            reply: ReplyOptions {
                max_tokens: max_tokens.unwrap_or(self.info.context),
                stop,
                ignore_end,
            },
            choices: fields.within("n", 1..=64_u32)?.unwrap_or(1),
            logprobs: None,
            caching: fields.take::<bool>("cache_prompt")?.unwrap_or(true),
            space: caller.space(key.as_deref()),
            input: "messages",
            stream: false,
        })
    }
}

/// Runs what takes the CPU for long off the threads that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    let request = REQUEST.try_with(Clone::clone).unwrap_or_default();
    let work = move || REQUEST.sync_scope(request, work);
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
}

/// As [`blocking`] for what is quick: where it is, a change of threads would cost more than it saves.
pub(crate) async fn off_thread_if<T: Send + 'static>(
    long: bool,
    work: impl FnOnce() -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    if long {
        return blocking(work).await;
    }
    // A panic must not end the connection's task without an answer.
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    caught.map_err(|_| ApiError::internal())?
}

/// Bytes of a body that is worked on without a change of threads: a few milliseconds of work at most.
pub(crate) const QUICK: usize = 64 << 10;

/// Reads the body of a request: a long one off the threads that serve connections.
pub(crate) async fn read<T: Send + 'static>(
    app: &Arc<App>,
    caller: Caller,
    body: &Body,
    parse: impl FnOnce(&App, &Caller, &[u8]) -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    let (app, long, body) = (Arc::clone(app), body.len() > QUICK, body.clone());
    off_thread_if(long, move || parse(&app, &caller, &body)).await
}

pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        // Without the system's randomness time has to do: this chooses tokens, it guards nothing.
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64),
    }
}

/// An id that nobody can guess.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", random(), random())
}

pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Microseconds since 1970.
pub(crate) fn micros() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_micros() as u64)
}

/// Counts tokens and time of a generation.
pub(crate) struct Tally {
    pub begun: Begun,
    arrived: Instant,
    queued: Instant,
    keeps: bool,
    first: Option<Instant>,
    last: Instant,
    pub generated: usize,
    pub reasoning: usize,
}

impl Tally {
    pub(crate) fn new(generation: &Generation) -> Self {
        Self {
            begun: Begun::default(),
            arrived: generation.arrived,
            queued: generation.queued,
            keeps: generation.keeps,
            first: None,
            last: generation.queued,
            generated: 0,
            reasoning: 0,
        }
    }

    /// Tokens that a capsule brought, and those that were read and left behind for later prompts.
    pub(crate) fn cache_details(&self) -> Value {
        let read = self.begun.prompt_tokens - self.begun.cached_tokens;
        json!({
            "cached_tokens": self.begun.cached_tokens,
            "cache_write_tokens": if self.keeps { read } else { 0 },
        })
    }

    pub(crate) fn token(&mut self, at: Instant, thought: bool) {
        self.last = at;
        self.first.get_or_insert(self.last);
        self.generated += 1;
        self.reasoning += usize::from(thought);
    }

    pub(crate) fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.begun.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.begun.prompt_tokens + self.generated,
            "prompt_tokens_details": self.cache_details(),
            "completion_tokens_details": { "reasoning_tokens": self.reasoning },
        })
    }

    pub(crate) fn timings(&self) -> Value {
        let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        let first = self.first.unwrap_or(self.last);
        json!({
            "prepare_ms": ms(self.queued - self.arrived),
            "queue_ms": ms(self.begun.queue),
            "match_ms": ms(self.begun.matching),
            "restore_ms": ms(self.begun.restore),
            "prefill_ms": ms(self.begun.prefill),
            "ttft_ms": ms(first - self.arrived),
            "decode_ms": ms(self.last - first),
            "prompt_tokens_read": self.begun.prompt_tokens - self.begun.cached_tokens,
            "tokens_generated": self.generated,
        })
    }
}

/// Why a reply ended, in the words of the chat API.
pub(crate) const fn finish_word(reason: FinishReason, called: bool) -> &'static str {
    match reason {
        FinishReason::Length | FinishReason::Context => "length",
        _ if called => "tool_calls",
        _ => "stop",
    }
}

/// A prompt and its constraint, made off the connection's thread.
pub(crate) struct Prepared {
    pub prompt: Prompt,
    pub constraint: Option<Constraint>,
}

/// The body of a request.
pub(crate) type Body = Bytes;
