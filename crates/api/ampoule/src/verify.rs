//! The exactness levels, checked on this machine: bit for bit, on varied text, at random split points.

use ampoule_engine::{Capsule, EngineError, SamplingParams, SlotId};
use serde::Serialize;

use crate::texts::Dice;
use crate::{Ampoule, Error, sample_tokens};

/// What to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Trials.
    pub trials: usize,
    /// Tokens of a trial's text at most.
    pub max_tokens: usize,
    /// Tokens decoded after each restore.
    pub decode: usize,
    /// Chooses texts, split points and samplers.
    pub seed: u64,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { trials: 50, max_tokens: 160, decode: 6, seed: 1 }
    }
}

/// What one level's checks found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LevelReport {
    /// What is compared.
    pub level: &'static str,
    /// What equality means here.
    pub promise: &'static str,
    /// Comparisons made.
    pub checks: usize,
    /// Comparisons that differed.
    pub mismatches: usize,
    /// The first that differed, in words.
    pub first: Option<String>,
}

/// What all checks found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// The model.
    pub model: String,
    /// The device.
    pub device: String,
    /// Trials run.
    pub trials: usize,
    /// Seed of the trials.
    pub seed: u64,
    /// One entry per level.
    pub levels: Vec<LevelReport>,
}

impl VerifyReport {
    /// Whether nothing differed, and something was compared.
    pub fn passed(&self) -> bool {
        self.levels.iter().all(|l| l.mismatches == 0 && l.checks > 0)
    }
}

const LEVELS: [(&str, &str); 6] = [
    ("E1 state", "after restore every state byte equals the snapshotted byte"),
    (
        "E2 continuation",
        "restore then decode: tokens and logits of the session that was never interrupted",
    ),
    (
        "E2 fork",
        "a fork with its seed draws what a reseeded session draws, and leaves its siblings alone",
    ),
    (
        "E2 rollback",
        "rollback to a token, inside a reply or a prompt, then the same state bytes again",
    ),
    ("E2 file", "export, import, restore: the same state bytes"),
    ("E3 cold", "restore then append(suffix): logits of a cold prefill of the whole, at any split"),
];
const E1: usize = 0;
const E2: usize = 1;
const FORK: usize = 2;
const ROLLBACK: usize = 3;
const FILE: usize = 4;
const E3: usize = 5;

struct Run<'a> {
    model: &'a mut Ampoule,
    levels: Vec<LevelReport>,
    trial: usize,
}

/// State bytes by buffer.
type Bytes = Vec<(String, Vec<u8>)>;
/// Tokens and the logits' bits after each.
type Trace = Vec<(u32, Vec<u32>)>;

impl Ampoule {
    /// Checks the exactness levels; `progress` is told trials done and in all. Needs three free slots.
    ///
    /// # Errors
    /// If the engine fails. A mismatch is no error: it is in the report.
    pub fn verify(
        &mut self,
        options: &VerifyOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<VerifyReport, Error> {
        let levels = LEVELS.iter().map(|&(level, promise)| LevelReport {
            level,
            promise,
            ..LevelReport::default()
        });
        let levels = levels.collect();
        let mut run = Run { model: self, levels, trial: 0 };
        let mut dice = Dice::new(options.seed);
        for trial in 0..options.trials {
            run.trial = trial;
            let slots = [run.model.engine.create_slot()?, run.model.engine.create_slot()?];
            let result = run.trial(slots, options, &mut dice);
            for slot in slots {
                run.model.engine.drop_slot(slot)?;
            }
            result?;
            progress(trial + 1, options.trials);
        }
        let levels = run.levels;
        let (name, device) = (self.name().to_owned(), self.engine.device().class.clone());
        Ok(VerifyReport { model: name, device, trials: options.trials, seed: options.seed, levels })
    }
}

impl Run<'_> {
    fn trial(
        &mut self,
        [a, b]: [SlotId; 2],
        options: &VerifyOptions,
        dice: &mut Dice,
    ) -> Result<(), Error> {
        let room = self.model.engine.context().saturating_sub(4 * options.decode + 4).max(3);
        let len = 2 + dice.below(options.max_tokens.min(room) - 1);
        let tokens = sample_tokens(self.model, len, dice.next())?;
        let split = 1 + dice.below(len - 1);
        let params = sampler(dice, self.model.engine.vocabulary());

        // The session that is never interrupted: prefix, reply, and snapshots on the way.
        let engine = &mut self.model.engine;
        engine.configure(a, &params)?;
        append(engine, a, &tokens[..split])?;
        engine.begin_reply(a)?;
        let prefix = engine.snapshot(a)?;
        let prefix_bytes = engine.state_bytes(a)?;
        let before = 1 + dice.below(options.decode.max(1));
        let first = self.decode(a, before)?;
        let middle = self.model.engine.snapshot(a)?;
        let middle_bytes = self.model.engine.state_bytes(a)?;
        let second = self.decode(a, options.decode)?;
        let end_bytes = self.model.engine.state_bytes(a)?;

        // E1, E2: the same from a slot that held something else.
        self.dirty(b, dice)?;
        for (capsule, bytes, trace) in
            [(&middle, &middle_bytes, &second), (&prefix, &prefix_bytes, &first)]
        {
            self.model.engine.restore(b, capsule)?;
            self.model.engine.check_position(b)?;
            self.same_bytes(E1, "restored into a used slot", b, bytes)?;
            let again = self.decode(b, trace.len())?;
            self.same_trace(E2, &format!("from position {}", capsule.position()), &again, trace);
        }

        self.forks(b, &middle, dice, options.decode)?;
        self.rollbacks(a, dice, (&prefix, &prefix_bytes), (&middle, &middle_bytes), &end_bytes)?;
        self.file(b, &middle, &middle_bytes, &second)?;
        self.cold([a, b], &tokens, split, &params, options.decode, dice)
    }

    /// Fills a slot with a session of its own.
    fn dirty(&mut self, slot: SlotId, dice: &mut Dice) -> Result<(), Error> {
        let tokens = sample_tokens(self.model, 1 + dice.below(40), dice.next())?;
        let engine = &mut self.model.engine;
        engine.reset(slot)?;
        append(engine, slot, &tokens)?;
        engine.configure(
            slot,
            &SamplingParams { temperature: 1.3, seed: dice.next(), ..SamplingParams::default() },
        )?;
        engine.step(slot)?;
        Ok(())
    }

    fn decode(&mut self, slot: SlotId, n: usize) -> Result<Trace, Error> {
        let engine = &mut self.model.engine;
        (0..n).map(|_| Ok((engine.step(slot)?, bits(&engine.logits(slot)?)))).collect()
    }

    fn forks(
        &mut self,
        slot: SlotId,
        capsule: &Capsule,
        dice: &mut Dice,
        n: usize,
    ) -> Result<(), Error> {
        let seed = dice.next();
        self.model.engine.restore(slot, capsule)?;
        self.model.engine.reseed(slot, seed)?;
        let wanted = self.decode(slot, n)?;
        let forks = self.model.engine.fork(capsule, &[Some(seed)])?;
        // The sibling goes on between the fork's steps.
        self.model.engine.restore(slot, capsule)?;
        let mut got = Trace::new();
        for _ in 0..n {
            self.decode(slot, 1)?;
            got.extend(self.decode(forks[0], 1)?);
        }
        self.model.engine.drop_slot(forks[0])?;
        self.same_trace(FORK, "beside a sibling", &got, &wanted);
        Ok(())
    }

    /// Rolls back to the end of the prefix, to a token of the reply, to a token of the prompt; then forward again.
    fn rollbacks(
        &mut self,
        slot: SlotId,
        dice: &mut Dice,
        (prefix, prefix_bytes): (&Capsule, &Bytes),
        (middle, middle_bytes): (&Capsule, &Bytes),
        end_bytes: &Bytes,
    ) -> Result<(), Error> {
        let engine = &mut self.model.engine;
        let end = engine.position(slot)?;
        let reply: Vec<u32> = engine.tokens(slot)?[middle.position() as usize..].to_vec();
        engine.rollback(slot, middle.position())?;
        self.same_bytes(ROLLBACK, "to a boundary", slot, middle_bytes)?;
        for token in &reply {
            self.model.engine.step_forced(slot, *token)?;
        }
        self.same_bytes(ROLLBACK, "and forward by the same tokens", slot, end_bytes)?;
        let inside = middle.position() + dice.below(reply.len() + 1) as u32;
        self.model.engine.rollback(slot, inside)?;
        for token in &reply[(inside - middle.position()) as usize..] {
            self.model.engine.step_forced(slot, *token)?;
        }
        let position = self.model.engine.position(slot)?;
        self.check(ROLLBACK, position == end, || format!("position {position}, not {end}"));
        self.same_bytes(ROLLBACK, "to a token of the reply and forward", slot, end_bytes)?;
        self.model.engine.rollback(slot, prefix.position())?;
        self.same_bytes(ROLLBACK, "to the end of the prompt", slot, prefix_bytes)?;
        // Into the prompt: nothing holds a boundary there, so it is read again from the start.
        let into = 1 + dice.below(prefix.position() as usize) as u32;
        let prompt = self.model.engine.tokens(slot)?;
        self.model.engine.rollback(slot, into)?;
        append(&mut self.model.engine, slot, &prompt[into as usize..])?;
        if into < prefix.position() {
            // The reply began at the end of the prompt: a rollback before it forgot that.
            self.model.engine.begin_reply(slot)?;
        }
        self.same_bytes(ROLLBACK, "to a token of the prompt and forward", slot, prefix_bytes)
    }

    fn file(
        &mut self,
        slot: SlotId,
        capsule: &Capsule,
        bytes: &Bytes,
        trace: &Trace,
    ) -> Result<(), Error> {
        let mut file = Vec::new();
        self.model.engine.export(capsule, &mut |piece| {
            file.extend_from_slice(piece);
            std::ops::ControlFlow::Continue(())
        })?;
        let loaded = self.model.engine.import(&file)?;
        self.model.engine.restore(slot, &loaded)?;
        self.same_bytes(FILE, "imported", slot, bytes)?;
        let again = self.decode(slot, trace.len())?;
        self.same_trace(FILE, "imported", &again, trace);
        Ok(())
    }

    fn cold(
        &mut self,
        [a, b]: [SlotId; 2],
        tokens: &[u32],
        split: usize,
        params: &SamplingParams,
        n: usize,
        dice: &mut Dice,
    ) -> Result<(), Error> {
        let engine = &mut self.model.engine;
        engine.reset(a)?;
        engine.configure(a, params)?;
        append(engine, a, tokens)?;
        let cold_logits = bits(&engine.logits(a)?);
        let cold_bytes = engine.state_bytes(a)?;
        let cold = self.decode(a, n)?;
        self.dirty(b, dice)?;
        let engine = &mut self.model.engine;
        engine.reset(b)?;
        engine.configure(b, params)?;
        append(engine, b, &tokens[..split])?;
        let capsule = engine.snapshot(b)?;
        self.dirty(b, dice)?;
        let engine = &mut self.model.engine;
        engine.restore(b, &capsule)?;
        append(engine, b, &tokens[split..])?;
        let warm_logits = bits(&engine.logits(b)?);
        let what = || format!("split {split} of {}: logits differ", tokens.len());
        self.check(E3, warm_logits == cold_logits, what);
        self.same_bytes(E3, &format!("split {split} of {}", tokens.len()), b, &cold_bytes)?;
        let warm = self.decode(b, n)?;
        self.same_trace(E3, &format!("split {split} of {}", tokens.len()), &warm, &cold);
        Ok(())
    }

    fn check(&mut self, level: usize, same: bool, what: impl FnOnce() -> String) {
        let trial = self.trial;
        let level = &mut self.levels[level];
        level.checks += 1;
        if !same {
            level.mismatches += 1;
            level.first.get_or_insert_with(|| format!("trial {trial}: {}", what()));
        }
    }

    fn same_bytes(
        &mut self,
        level: usize,
        what: &str,
        slot: SlotId,
        wanted: &Bytes,
    ) -> Result<(), Error> {
        let got = self.model.engine.state_bytes(slot)?;
        let wrong = got.iter().zip(wanted).find(|(g, w)| g != w).map(|(g, _)| g.0.clone());
        let same = got == *wanted;
        self.check(level, same, || {
            format!("{what}: state '{}' differs", wrong.unwrap_or_default())
        });
        Ok(())
    }

    fn same_trace(&mut self, level: usize, what: &str, got: &Trace, wanted: &Trace) {
        let at = got.iter().zip(wanted).position(|(g, w)| g != w);
        self.check(level, got == wanted, || {
            format!("{what}: step {} differs", at.unwrap_or(wanted.len()))
        });
    }
}

fn append(
    engine: &mut ampoule_engine::Engine,
    slot: SlotId,
    tokens: &[u32],
) -> Result<(), EngineError> {
    engine.append(slot, tokens, &mut |_| std::ops::ControlFlow::Continue(())).map(|_| ())
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

/// Greedy, or one of the samplers in use.
fn sampler(dice: &mut Dice, vocabulary: usize) -> SamplingParams {
    let greedy = SamplingParams { seed: dice.next(), ..SamplingParams::default() };
    match dice.below(4) {
        0 => greedy,
        1 => SamplingParams { temperature: 0.8, top_p: 0.95, ..greedy },
        2 => SamplingParams {
            temperature: 1.0,
            top_k: 40,
            min_p: 0.02,
            repetition_penalty: 1.1,
            ..greedy
        },
        _ => SamplingParams {
            temperature: 1.2,
            presence_penalty: 0.4,
            frequency_penalty: 0.3,
            logit_bias: vec![(dice.below(vocabulary) as u32, 2.0)],
            ..greedy
        },
    }
}
