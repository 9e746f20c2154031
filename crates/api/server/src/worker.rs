//! The engine's thread: it alone touches the model. Requests come by a channel and answers leave by one each, so that
//! nothing on the HTTP side ever waits for the engine, and a slow client never holds it up.
//!
//! Every round gives each reply under way one token and one prompt under way one chunk, so a long prompt delays a stream by
//! one chunk at most. What one request breaks (a panic included) ends with that request.

mod first;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ampoule::store::tiers::{Budgets, Tier};
use ampoule::{
    Ampoule, CacheOptions, Capsule, CapsuleCache, FinishReason, Reply, ReplyOptions, Residence,
    SamplingParams, SlotId, Waypoints,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::cache::{Cache, Space};
use crate::error::{ApiError, ApiResult};
use crate::grammar::Constraint;
use crate::memory::Relief;
use crate::metrics::Metrics;
use crate::prompt::{ModelInfo, boundaries};
use crate::rewind::{Cut, Rewinds};
use first::{First, Talk};

/// Tokens of a prompt that are read before other requests get their turn.
const CHUNK: usize = 512;

/// Tokens that a prompt may add to a conversation without boundaries in them: no more than these are read again if the
/// next prompt departs from this one after all.
const AT_ONCE: usize = 192;

/// What is asked of the engine.
pub(crate) enum Command {
    Generate(Box<Job>),
    Call(Box<dyn FnOnce(&mut Worker) + Send>),
    Stop,
}

/// Where a reply begins.
pub(crate) enum Start {
    /// At the end of a prompt: as much of it as possible comes from capsules.
    Prompt { marks: Vec<u32> },
    /// After this boundary and the tokens.
    After(Capsule),
}

/// What to do with the state at the end of the first choice: told even where the client has gone.
pub(crate) type OnEnd = Box<dyn FnOnce(ApiResult<End>) + Send>;

/// The state that a reply left behind.
pub(crate) struct End {
    pub capsule: Capsule,
    /// The state before the reply.
    pub asked: Option<Capsule>,
    /// The tokens of the reply that were delivered and are in the state.
    pub reply: Vec<u32>,
    /// The end token, if the reply ended with one.
    pub eos: Option<u32>,
    /// Places within the reply that it can be cut at.
    pub waypoints: Option<Waypoints>,
}

/// A request for replies.
pub(crate) struct Job {
    pub space: Space,
    /// Whose turn it is counted as.
    pub tenant: u64,
    /// What the log calls it.
    pub request: String,
    pub start: Start,
    /// The prompt, or what is read after the boundary.
    pub tokens: Vec<u32>,
    pub choices: u32,
    pub params: SamplingParams,
    pub reply: ReplyOptions,
    pub constraint: Option<Constraint>,
    /// How many alternatives to tell of.
    pub logprobs: Option<usize>,
    /// Whether boundaries may be used and left behind.
    pub caching: bool,
    /// Whether each token goes out as it comes.
    pub stream: bool,
    pub on_end: Option<OnEnd>,
    /// When the request came, and when it was handed to the engine.
    pub arrived: Instant,
    pub queued: Instant,
    pub deadline: Instant,
    pub out: UnboundedSender<Event>,
    /// Tokens of the first choice that went out to the client.
    pub sent: Option<Arc<AtomicU64>>,
    pub interrupt: Arc<AtomicBool>,
    /// For tests: panics when the first token is due.
    pub fault: bool,
    /// Its place in the queue, given back when it ends.
    pub _place: OwnedSemaphorePermit,
}

/// What a client's stream is made of.
pub(crate) enum Event {
    Begun(Begun),
    Step(Step),
    Failed(ApiError),
}

/// The prompt has been read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Begun {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub queue: Duration,
    pub matching: Duration,
    pub restore: Duration,
    pub prefill: Duration,
}

/// One step of a choice.
pub(crate) struct Step {
    pub choice: u32,
    pub token: Option<u32>,
    pub text: String,
    pub logprobs: Option<TokenLogprobs>,
    pub finished: Option<FinishReason>,
    /// When it was drawn.
    pub at: Instant,
}

/// Natural logarithms of probabilities, before temperature and filters.
pub(crate) struct TokenLogprobs {
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// What all choices of a job share.
struct Shared {
    job: Job,
    begun: Begun,
    left: u32,
    /// When the first and the latest token were sent, and how many there were.
    first: Option<Instant>,
    latest: Option<Instant>,
    told: u32,
    /// The state before the replies.
    asked: Option<Capsule>,
}

enum Phase {
    Prefill { at: usize, stops: VecDeque<u32>, started: Instant },
    Decode { reply: Box<Reply>, constraint: Option<Box<Constraint>>, said: Vec<u32>, last: Instant },
}

struct Sequence {
    job: u64,
    choice: u32,
    slot: SlotId,
    phase: Phase,
}

/// The engine's thread and all it holds.
pub(crate) struct Worker {
    pub model: Ampoule,
    pub info: Arc<ModelInfo>,
    pub cache: Cache,
    /// Where capsules lie. Those that nobody else holds go.
    pub(crate) tiers: CapsuleCache,
    pub metrics: Arc<Metrics>,
    /// Whether rows made by decode are, bit for bit, those of prefill, so that a reply need not be read when it comes back.
    replies_exact: bool,
    free: Vec<SlotId>,
    /// For the verbs of the native API, so that they need not wait for a reply to end.
    spare: Option<SlotId>,
    queues: VecDeque<(u64, VecDeque<Box<Job>>)>,
    jobs: std::collections::HashMap<u64, Shared>,
    next_job: u64,
    /// Choices that wait for a slot.
    choices: VecDeque<(u64, u32)>,
    running: Vec<Sequence>,
    turn: usize,
    pub(crate) rewinds: Rewinds,
    /// Asked to drop a capsule that somebody outside keeps; false if there is none.
    pub(crate) relieve: Box<dyn FnMut(Relief) -> bool + Send>,
}

impl Worker {
    /// Takes all slots of the model.
    pub(crate) fn new(
        mut model: Ampoule,
        slots: usize,
        info: Arc<ModelInfo>,
        metrics: Arc<Metrics>,
        host_bytes: u64,
        relieve: Box<dyn FnMut(Relief) -> bool + Send>,
    ) -> Result<Self, ampoule::Error> {
        let replies_exact = model.decode_reads_as_prefill()?;
        let mut free = Vec::new();
        for _ in 0..slots.max(1) {
            free.push(model.engine.create_slot()?);
        }
        let spare = model.engine.create_slot().ok();
        let own = model.engine.capsule_bytes().1 as u64;
        let host = match model.engine.residence() {
            Residence::Device => host_bytes,
            Residence::Host => own,
        };
        let budgets = Budgets { device: own, host, disk: 0 };
        let tiers = CapsuleCache::new(&model, None, CacheOptions { budgets, forget: false });
        metrics.device_budget.set(tiers.budgets().device as usize);
        metrics.host_budget.set(tiers.budgets().host as usize);
        Ok(Self {
            model,
            info,
            cache: Cache::default(),
            tiers,
            metrics,
            replies_exact,
            free,
            spare,
            queues: VecDeque::new(),
            jobs: std::collections::HashMap::new(),
            next_job: 0,
            choices: VecDeque::new(),
            running: Vec::new(),
            turn: 0,
            rewinds: Rewinds::default(),
            relieve,
        })
    }

    /// Runs until it is told to stop; what runs then ends with an error.
    pub(crate) fn run(mut self, commands: &mpsc::Receiver<Command>) -> Self {
        loop {
            let idle = self.running.is_empty()
                && self.queues.is_empty()
                && self.choices.is_empty()
                && self.rewinds.is_empty();
            let mut next = if idle {
                self.drop_unheld();
                self.count();
                match commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return self.end(),
                }
            } else {
                commands.try_recv().ok()
            };
            while let Some(command) = next {
                match command {
                    Command::Generate(job) => self.enqueue(job),
                    Command::Call(call) => {
                        if catch_unwind(AssertUnwindSafe(|| call(&mut self))).is_err() {
                            self.metrics.panics.add(1);
                            tracing::error!("a call panicked");
                        }
                    }
                    Command::Stop => return self.end(),
                }
                next = commands.try_recv().ok();
            }
            self.admit_rewinds();
            self.admit();
            self.round();
            self.advance_rewinds();
            self.count();
        }
    }

    fn count(&mut self) {
        let moved = self.tiers.take_events().len();
        self.metrics.moves.add(moved as u64);
        let waiting = self.queues.iter().map(|(_, q)| q.len()).sum::<usize>() + self.choices.len();
        self.metrics.queue_depth.set(waiting);
        self.metrics.running.set(self.running.len());
        self.metrics.boundaries.set(self.cache.len());
        let own = self.model.engine.capsule_bytes().0;
        let (device, host) = match self.model.engine.residence() {
            Residence::Device => (own, self.tiers.usage(Tier::Host).total() as usize),
            Residence::Host => (0, own),
        };
        self.metrics.device_bytes.set(device);
        self.metrics.host_bytes.set(host);
    }

    fn end(mut self) -> Self {
        for sequence in std::mem::take(&mut self.running) {
            self.stop(sequence, &Err(ApiError::stopping()));
        }
        for (_, queue) in std::mem::take(&mut self.queues) {
            for job in queue {
                refuse(*job, ApiError::stopping());
            }
        }
        self.rewinds.give_up();
        self
    }

    fn enqueue(&mut self, job: Box<Job>) {
        match self.queues.iter_mut().find(|(tenant, _)| *tenant == job.tenant) {
            Some((_, queue)) => queue.push_back(job),
            None => self.queues.push_back((job.tenant, VecDeque::from([job]))),
        }
    }

    /// The next job: tenants take turns.
    fn next(&mut self) -> Option<Box<Job>> {
        let (tenant, mut queue) = self.queues.pop_front()?;
        let job = queue.pop_front();
        if !queue.is_empty() {
            self.queues.push_back((tenant, queue));
        }
        job
    }

    /// Whether replies wait for a slot.
    pub(crate) fn do_replies_wait(&self) -> bool {
        !self.queues.is_empty() || !self.choices.is_empty()
    }

    fn admit(&mut self) {
        let now = Instant::now();
        for (_, queue) in &mut self.queues {
            for index in (0..queue.len()).rev() {
                let late = queue[index].deadline <= now;
                if (late || queue[index].out.is_closed())
                    && let Some(job) = queue.remove(index)
                {
                    self.metrics.cancelled.add(1);
                    refuse(*job, ApiError::deadline());
                }
            }
        }
        self.queues.retain(|(_, queue)| !queue.is_empty());
        while !self.free.is_empty() {
            if let Some((job, choice)) = self.choices.pop_front() {
                self.begin_choice(job, choice);
            } else if let Some(job) = self.next() {
                self.begin(*job);
            } else {
                return;
            }
        }
    }

    /// The free slot that holds most of the capsule's rows already.
    pub(crate) fn slot_for(&mut self, capsule: Option<&Capsule>) -> Option<SlotId> {
        let held = |slot: &SlotId| {
            capsule.map_or(0, |c| self.model.engine.held(*slot, c).unwrap_or_default())
        };
        let best = (0..self.free.len()).max_by_key(|&i| (held(&self.free[i]), i))?;
        Some(self.free.remove(best))
    }

    fn begin(&mut self, mut job: Job) {
        self.metrics.requests.add(1);
        let queue = job.queued.elapsed();
        self.metrics.queue_time.observe(queue);
        let start = Instant::now();
        let (capsule, known) = match &job.start {
            Start::Prompt { .. } if job.caching => {
                let found = self.cache.find(&job.space, &job.tokens);
                (found.capsule, Some((found.common as u32, found.continues)))
            }
            Start::Prompt { .. } => (None, None),
            Start::After(capsule) => (Some(capsule.clone()), None),
        };
        let matching = start.elapsed();
        let cached = capsule.as_ref().map_or(0, |c| c.position() as usize);
        let (at, total) = match &job.start {
            Start::Prompt { .. } => (cached, job.tokens.len()),
            Start::After(_) => (0, cached + job.tokens.len()),
        };
        let context = self.model.engine.context();
        if total >= context {
            return refuse(job, ApiError::context(total, context));
        }
        let Some(slot) = self.slot_for(capsule.as_ref()) else {
            return refuse(job, ApiError::internal());
        };
        let start = Instant::now();
        let ready = self.guard(|worker| match &capsule {
            Some(capsule) => worker.restore(slot, capsule),
            None => Ok(worker.model.engine.reset(slot)?),
        });
        let restore = start.elapsed();
        if capsule.is_some() {
            self.metrics.restores.add(1);
            self.metrics.restore_time.observe(restore);
        }
        let stops = match &mut job.start {
            Start::Prompt { marks } => match known {
                // What only continues a conversation is read in one piece: each boundary on the way would delay the
                // first token, and the next prompt will begin with all of this one.
                Some((_, true)) if total - cached <= AT_ONCE => Vec::new(),
                Some((common, _)) => boundaries(marks, cached as u32, total as u32, Some(common)),
                None => Vec::new(),
            },
            Start::After(_) => Vec::new(),
        };
        self.metrics.prompt_tokens.add(total as u64);
        self.metrics.cached_tokens.add(cached as u64);
        let begun = Begun {
            prompt_tokens: total,
            cached_tokens: cached,
            queue,
            matching,
            restore,
            prefill: Duration::ZERO,
        };
        let id = self.next_job;
        self.next_job += 1;
        let left = job.choices;
        self.jobs.insert(
            id,
            Shared { job, begun, left, first: None, latest: None, told: 0, asked: None },
        );
        let phase = Phase::Prefill { at, stops: stops.into(), started: Instant::now() };
        let sequence = Sequence { job: id, choice: 0, slot, phase };
        match ready {
            Ok(()) => self.running.push(sequence),
            Err(error) => self.stop(sequence, &Err(error)),
        }
    }

    /// One of several choices: from the boundary before the first.
    fn begin_choice(&mut self, id: u64, choice: u32) {
        let Some(capsule) = self.jobs.get(&id).and_then(|shared| shared.asked.clone()) else {
            return;
        };
        let Some(slot) = self.slot_for(Some(&capsule)) else { return };
        let started = self.guard(|worker| {
            worker.restore(slot, &capsule)?;
            worker.metrics.restores.add(1);
            worker.reply(id, choice, slot)
        });
        let dummy = Phase::Prefill { at: 0, stops: VecDeque::new(), started: Instant::now() };
        match started {
            Ok(phase) => self.running.push(Sequence { job: id, choice, slot, phase }),
            Err(error) => self.stop(Sequence { job: id, choice, slot, phase: dummy }, &Err(error)),
        }
    }

    /// Runs something for one request: a panic becomes its error.
    pub(crate) fn guard<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> ApiResult<T>,
    ) -> ApiResult<T> {
        catch_unwind(AssertUnwindSafe(|| work(self))).unwrap_or_else(|panic| {
            self.metrics.panics.add(1);
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
            tracing::error!(panic = text, "the engine panicked; the request is isolated");
            Err(ApiError::internal())
        })
    }

    fn round(&mut self) {
        let prompts =
            self.running.iter().filter(|s| matches!(s.phase, Phase::Prefill { .. })).count();
        self.turn = self.turn.wrapping_add(1);
        let chosen = if prompts == 0 { 0 } else { self.turn % prompts };
        let mut prompt = 0;
        for mut sequence in std::mem::take(&mut self.running) {
            let reading = matches!(sequence.phase, Phase::Prefill { .. });
            if reading {
                prompt += 1;
                if prompt - 1 != chosen {
                    self.running.push(sequence);
                    continue;
                }
            }
            let outcome = match self.gone(&sequence) {
                Some(outcome) => outcome.map(Some),
                None if reading => self.guard(|worker| worker.read(&mut sequence)),
                None => self.guard(|worker| worker.decode(&mut sequence)),
            };
            match outcome {
                Ok(None) => self.running.push(sequence),
                Ok(Some(reason)) => self.stop(sequence, &Ok(reason)),
                Err(error) => self.stop(sequence, &Err(error)),
            }
        }
    }

    /// Whether nobody wants the reply any more.
    fn gone(&self, sequence: &Sequence) -> Option<ApiResult<FinishReason>> {
        let job = &self.jobs.get(&sequence.job)?.job;
        if job.out.is_closed() || job.interrupt.load(Ordering::Relaxed) {
            Some(Ok(FinishReason::Cancelled))
        } else if Instant::now() >= job.deadline {
            Some(Err(ApiError::deadline()))
        } else {
            None
        }
    }

    /// Reads a chunk of the prompt; after the last one the replies begin.
    fn read(&mut self, sequence: &mut Sequence) -> ApiResult<Option<FinishReason>> {
        let Phase::Prefill { at, stops, started } = &mut sequence.phase else { return Ok(None) };
        let shared = self.jobs.get_mut(&sequence.job).ok_or_else(ApiError::internal)?;
        let slot = sequence.slot;
        let total = shared.job.tokens.len();
        if *at < total {
            let stop = stops.front().map_or(total, |s| (*s as usize).min(total));
            let end = stop.min(*at + CHUNK);
            let begin = Instant::now();
            let tokens = &shared.job.tokens[*at..end];
            let mut left = CHUNK;
            let read = self.model.engine.append(slot, tokens, &mut |progress| {
                left = CHUNK.saturating_sub(progress.done);
                // A stream waits for a chunk of the engine's, not for all of ours.
                std::ops::ControlFlow::Break(())
            })?;
            *at += read;
            shared.begun.prefill += begin.elapsed();
            self.metrics.read_tokens.add(read as u64);
            if stops.front().is_some_and(|stop| *at >= *stop as usize) {
                stops.pop_front();
                let (space, tokens) = (shared.job.space, shared.job.tokens[..*at].to_vec());
                if let Some(capsule) = self.snapshot(slot)? {
                    self.cache.keep(&space, &tokens, capsule);
                }
            }
            let shared = self.jobs.get(&sequence.job).ok_or_else(ApiError::internal)?;
            if *at < shared.job.tokens.len() {
                return Ok(None);
            }
        }
        self.metrics.prefill_time.observe(started.elapsed());
        let (id, choice) = (sequence.job, sequence.choice);
        let choices = self.jobs.get(&id).ok_or_else(ApiError::internal)?.job.choices;
        // Other choices start from the boundary, so that has to be there before anything is said.
        let first = if choices == 1 { self.first(id, choice, slot)? } else { None };
        if first.is_none() {
            self.tell_begun(id);
        }
        self.keep_asked(id, slot)?;
        self.choices.extend((1..choices).map(|choice| (id, choice)));
        let Some(First { phase, token, finished }) = first else {
            sequence.phase = self.reply(id, choice, slot)?;
            return Ok(None);
        };
        self.start(id, choice, slot)?;
        if let Some(token) = token {
            self.model.engine.step_forced(slot, token)?;
        }
        sequence.phase = phase;
        Ok(finished)
    }

    fn decode(&mut self, sequence: &mut Sequence) -> ApiResult<Option<FinishReason>> {
        let Phase::Decode { reply, constraint, said, last } = &mut sequence.phase else {
            return Ok(None);
        };
        let shared = self.jobs.get_mut(&sequence.job).ok_or_else(ApiError::internal)?;
        assert!(!shared.job.fault, "a fault that was asked for");
        let logits = match shared.job.logprobs {
            Some(_) => Some(self.model.engine.logits(sequence.slot)?),
            None => None,
        };
        let mask = constraint.as_mut().map(|constraint| constraint.mask()).transpose()?.flatten();
        let step = match &mask {
            Some(mask) => reply.step_where(&mut self.model, &|token| mask.is_allowed(token))?,
            None => reply.step(&mut self.model)?,
        };
        let Some(step) = step else { return Ok(Some(FinishReason::Stop)) };
        let finished = step.finished;
        let cut_later = shared.job.on_end.is_some() && step.token.is_some();
        let talk = Talk { choice: sequence.choice, constraint, said, last };
        talk.tell(&self.metrics, &self.info, shared, step, logits)?;
        let said = said.len();
        if cut_later {
            self.waypoint(sequence.slot, said)?;
        }
        Ok(finished)
    }

    /// Ends a sequence, gives its slot back and tells whoever waits.
    fn stop(&mut self, sequence: Sequence, outcome: &ApiResult<FinishReason>) {
        let Sequence { job: id, choice, slot, phase } = sequence;
        let (mut said, reading) = match phase {
            Phase::Decode { said, .. } => (said, false),
            Phase::Prefill { .. } => (Vec::new(), true),
        };
        // Whether the slot is still needed.
        let mut busy = false;
        let failed = outcome.as_ref().err().cloned();
        if failed.is_none() && self.replies_exact && !said.is_empty() {
            self.keep_turn(id, slot, &said);
        }
        if let Ok(reason) = outcome {
            self.metrics.finish(*reason);
        }
        if matches!(outcome, Ok(FinishReason::Cancelled)) {
            self.metrics.cancelled.add(1);
        }
        let on_end = match self.jobs.get_mut(&id) {
            Some(shared) if choice == 0 => shared
                .job
                .on_end
                .take()
                .map(|on_end| (on_end, shared.job.sent.clone(), shared.asked.clone())),
            _ => None,
        };
        if let Some((on_end, sent, asked)) = on_end {
            // An interrupted reply is delivered as far as it came; one whose client has gone, as far as it was sent.
            let gone = self.jobs.get(&id).is_some_and(|shared| shared.job.out.is_closed());
            let cancelled = matches!(outcome, Ok(FinishReason::Cancelled)) && gone;
            let unsent = sent
                .filter(|_| cancelled)
                .map_or(0, |sent| said.len().saturating_sub(sent.load(Ordering::Acquire) as usize));
            let info = Arc::clone(&self.info);
            said.truncate(said.len() - unsent);
            let finish = move |cut: ApiResult<Cut>| {
                on_end(cut.map(|Cut { capsule, waypoints, .. }| {
                    let eos = said.last().copied().filter(|t| info.tokenizer.is_eos(*t));
                    End { capsule, asked, reply: said, eos, waypoints }
                }));
            };
            let position = self.model.engine.position(slot).unwrap_or_default();
            if let Some(error) = &failed {
                self.tell(|| finish(Err(error.clone())));
            } else if reading {
                self.tell(|| finish(Err(ApiError::conflict("ended before its prompt was read"))));
            } else if unsent == 0 {
                let cut = self.guard(|worker| worker.cut(slot, 0));
                self.tell(|| finish(cut));
            } else {
                // The model must not believe that it said what nobody got.
                busy = true;
                self.rewind_slot(slot, position.saturating_sub(unsent as u32), Box::new(finish));
            }
        }
        if !busy {
            self.release(slot, failed.as_ref().is_some_and(|e| e.status.is_server_error()));
        }
        let Some(shared) = self.jobs.get_mut(&id) else { return };
        shared.left -= 1;
        if let Some(error) = failed {
            self.metrics.failures.add(1);
            tracing::warn!(
                request = shared.job.request,
                status = error.status.as_u16(),
                "generation failed"
            );
            let _ = shared.job.out.send(Event::Failed(error));
            // The other choices are of no use without this one.
            shared.left = 0;
        } else if matches!(outcome, Ok(FinishReason::Cancelled)) {
            let finished = Some(FinishReason::Cancelled);
            let step = Step {
                choice,
                token: None,
                text: String::new(),
                logprobs: None,
                finished,
                at: Instant::now(),
            };
            let _ = shared.job.out.send(Event::Step(step));
        }
        if shared.left == 0 {
            self.metrics.request_time.observe(shared.job.arrived.elapsed());
            if let (Some(first), Some(latest)) = (shared.first, shared.latest) {
                let decode = latest - first;
                self.metrics.decode_time.observe(decode);
                // The first tokens of other choices take steps of decode too.
                if shared.told > 1 {
                    self.metrics.token_time.observe(decode / (shared.told - 1));
                }
            }
            self.jobs.remove(&id);
            self.choices.retain(|(job, _)| *job != id);
            let (ended, going): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.running).into_iter().partition(|s| s.job == id);
            self.running = going;
            for sequence in ended {
                self.release(sequence.slot, false);
            }
        }
    }

    /// Keeps the boundary after a reply, for when the client sends the conversation again.
    fn keep_turn(&mut self, id: u64, slot: SlotId, said: &[u32]) {
        let Some(shared) = self.jobs.get(&id) else { return };
        let job = &shared.job;
        if !job.caching || !matches!(job.start, Start::Prompt { .. }) {
            return;
        }
        let (space, mut tokens) = (job.space, job.tokens.clone());
        tokens.extend_from_slice(said);
        if let Ok(Some(capsule)) = self.guard(|worker| worker.snapshot(slot)) {
            self.cache.keep(&space, &tokens, capsule);
        }
    }

    /// Gives a slot back; after a fault another one takes its place.
    pub(crate) fn release(&mut self, slot: SlotId, doubtful: bool) {
        if doubtful {
            let renewed = self.guard(|worker| {
                worker.model.engine.drop_slot(slot)?;
                Ok(worker.model.engine.create_slot()?)
            });
            match renewed {
                Ok(slot) => self.free.push(slot),
                Err(error) => tracing::error!(?error, "a slot is lost"),
            }
        } else {
            self.free.push(slot);
        }
    }

    /// The slot that replies may not take, so that the verbs of the native API need not wait for one to end.
    pub(crate) const fn take_spare(&mut self) -> Option<SlotId> {
        self.spare.take()
    }

    /// Makes the slot that was given back last the one that replies may not take.
    pub(crate) fn spare_last(&mut self) {
        self.spare = self.free.pop();
    }

    /// Calls what waits for an end: a panic is its own.
    pub(crate) fn tell(&mut self, call: impl FnOnce()) {
        let _ = self.guard(|_| {
            call();
            Ok(())
        });
    }
}

/// Ends a job that never ran.
fn refuse(job: Job, error: ApiError) {
    if let Some(on_end) = job.on_end {
        on_end(Err(error.clone()));
    }
    let _ = job.out.send(Event::Failed(error));
}
