//! How a reply begins, and what its client is told of each step.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ampoule::{FinishReason, Reply, ReplyStep, SamplingParams, SlotId};

use super::{Event, Phase, Shared, Start, Step, TokenLogprobs, Worker};
use crate::error::{ApiError, ApiResult};
use crate::grammar::Constraint;
use crate::metrics::Metrics;
use crate::prompt::ModelInfo;

/// For the first token of a reply to leave before the engine takes all cores again: so long at least, and so often at most
/// while a stream has not taken it.
const SEND_TIME: Duration = Duration::from_micros(100);
const SEND_TIMES: u32 = 5;

/// A first token that was sent and is yet to be read.
pub(super) struct First {
    pub phase: Phase,
    /// The token; there is none where the reply may have none.
    pub token: Option<u32>,
    pub finished: Option<FinishReason>,
}

/// What telling a client of a step changes.
pub(super) struct Talk<'a> {
    pub choice: u32,
    pub constraint: &'a mut Option<Box<Constraint>>,
    pub said: &'a mut Vec<u32>,
    pub last: &'a mut Instant,
}

impl Talk<'_> {
    pub(super) fn tell(
        self,
        metrics: &Metrics,
        info: &ModelInfo,
        shared: &mut Shared,
        step: ReplyStep,
        logits: Option<Vec<f32>>,
    ) -> ApiResult<()> {
        let Self { choice, constraint, said, last } = self;
        if let Some(token) = step.token {
            let now = Instant::now();
            metrics.generated_tokens.add(1);
            if shared.first.is_none() {
                shared.first = Some(now);
                metrics.ttft.observe(shared.job.arrived.elapsed());
            } else if !said.is_empty() {
                metrics.inter_token.observe(now - *last);
            }
            (shared.latest, shared.told) = (Some(now), shared.told + 1);
            *last = now;
            said.push(token);
            if let Some(constraint) = constraint {
                constraint.drawn(token, info.tokenizer.is_eos(token))?;
            }
        }
        // Half a character, the beginning of a call or of thoughts: nothing leaves, and nothing is waited for.
        let silent = step.text.is_empty()
            || step.token.is_some_and(|token| {
                Some(token) == info.tool_open || info.think.is_some_and(|(open, _)| open == token)
            });
        let first = said.len() == 1 && choice == 0 && !silent;
        let logprobs = match (logits, step.token, shared.job.logprobs) {
            (Some(logits), Some(token), Some(top)) => Some(log_probabilities(&logits, token, top)),
            _ => None,
        };
        let _ = shared.job.out.send(Event::Step(Step {
            choice,
            token: step.token,
            text: step.text,
            logprobs,
            finished: step.finished,
            at: *last,
        }));
        if first {
            // Where threads are as many as cores, whoever sends this token needs one: the next token can wait for that.
            let sent = shared.job.sent.as_ref().filter(|_| shared.job.stream);
            for _ in 0..SEND_TIMES {
                let taken = sent.is_none_or(|sent| sent.load(Ordering::Acquire) > 0);
                std::thread::sleep(SEND_TIME);
                if taken {
                    break;
                }
            }
        }
        Ok(())
    }
}

impl Worker {
    /// How a choice is drawn.
    fn params(&self, id: u64, choice: u32) -> ApiResult<SamplingParams> {
        let mut params = self.jobs.get(&id).ok_or_else(ApiError::internal)?.job.params.clone();
        params.seed =
            params.seed.wrapping_add(u64::from(choice).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        Ok(params)
    }

    /// Sets the sampler for the reply in a slot that has read its prompt.
    pub(super) fn start(&mut self, id: u64, choice: u32, slot: SlotId) -> ApiResult<()> {
        let params = self.params(id, choice)?;
        self.model.engine.configure(slot, &params)?;
        Ok(self.model.engine.begin_reply(slot)?)
    }

    /// Begins the reply in a slot that has read its prompt.
    pub(super) fn reply(&mut self, id: u64, choice: u32, slot: SlotId) -> ApiResult<Phase> {
        self.start(id, choice, slot)?;
        let shared = self.jobs.get(&id).ok_or_else(ApiError::internal)?;
        let reply = Box::new(Reply::resume(&self.model, slot, &shared.job.reply)?);
        let constraint = shared.job.constraint.clone().map(Box::new);
        Ok(Phase::Decode { reply, constraint, said: Vec::new(), last: Instant::now() })
    }

    /// Tells how the prompt was read.
    pub(super) fn tell_begun(&self, id: u64) {
        if let Some(shared) = self.jobs.get(&id) {
            let _ = shared.job.out.send(Event::Begun(shared.begun.clone()));
        }
    }

    /// Keeps the boundary at the end of a prompt, for prompts that continue it, for other choices, and for who asked.
    pub(super) fn keep_asked(&mut self, id: u64, slot: SlotId) -> ApiResult<()> {
        let shared = self.jobs.get(&id).ok_or_else(ApiError::internal)?;
        let (job, prompt) = (&shared.job, matches!(shared.job.start, Start::Prompt { .. }));
        let (space, choices) = (job.space, job.choices);
        if !(job.caching && prompt) && choices == 1 && job.on_end.is_none() {
            return Ok(());
        }
        let tokens = if prompt && job.caching { Some(job.tokens.clone()) } else { None };
        let capsule = self.snapshot(slot)?;
        if let (Some(tokens), Some(capsule)) = (tokens, &capsule) {
            self.cache.keep(&space, &tokens, capsule.clone());
        }
        if choices > 1 && capsule.is_none() {
            return Err(ApiError::param(
                "n",
                "there is no memory for the boundary that choices start from",
            ));
        }
        if let Some(shared) = self.jobs.get_mut(&id) {
            shared.asked = capsule;
        }
        Ok(())
    }

    /// Draws the first token of a job's only reply and sends it before it is read: its client waits neither for the boundary
    /// at the end of the prompt nor for a step of decode. The state is as it was; whoever asked takes the boundary, begins
    /// the reply and reads the token. `None` where the device has to draw it.
    pub(super) fn first(&mut self, id: u64, choice: u32, slot: SlotId) -> ApiResult<Option<First>> {
        let params = self.params(id, choice)?;
        self.model.engine.check_sampling(&params)?;
        let shared = self.jobs.get_mut(&id).ok_or_else(ApiError::internal)?;
        assert!(!shared.job.fault, "a fault that was asked for");
        let mut constraint = shared.job.constraint.clone().map(Box::new);
        let mask = constraint.as_mut().map(|constraint| constraint.mask()).transpose()?.flatten();
        let drawn = match &mask {
            Some(mask) => {
                self.model.first_draw(slot, &params, Some(&|token| mask.is_allowed(token)))?
            }
            None => self.model.first_draw(slot, &params, None)?,
        };
        let Some(token) = drawn else { return Ok(None) };
        let logits = match shared.job.logprobs {
            Some(_) => Some(self.model.engine.logits(slot)?),
            None => None,
        };
        let mut reply = Box::new(Reply::resume(&self.model, slot, &shared.job.reply)?);
        let step = reply.announce(&self.model, token)?;
        let (token, finished) = (step.token, step.finished);
        // With the token and not before it: whoever is woken by this takes a core from the draw.
        let _ = shared.job.out.send(Event::Begun(shared.begun.clone()));
        let (mut said, mut last) = (Vec::new(), Instant::now());
        let talk = Talk { choice, constraint: &mut constraint, said: &mut said, last: &mut last };
        talk.tell(&self.metrics, &self.info, shared, step, logits)?;
        let phase = Phase::Decode { reply, constraint, said, last };
        Ok(Some(First { phase, token, finished }))
    }
}

fn log_probabilities(logits: &[f32], token: u32, top: usize) -> TokenLogprobs {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - highest).exp()).sum();
    let normal = f64::from(highest) + sum.ln();
    let value = |index: u32| {
        let logit = logits.get(index as usize).copied().unwrap_or(f32::NEG_INFINITY);
        // JSON has no infinity.
        ((f64::from(logit) - normal) as f32).max(-9999.0)
    };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(order.len());
    let descending =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 && top < order.len() {
        order.select_nth_unstable_by(top - 1, descending);
    }
    order.truncate(top);
    order.sort_unstable_by(descending);
    TokenLogprobs { logprob: value(token), top: order.into_iter().map(|t| (t, value(t))).collect() }
}
