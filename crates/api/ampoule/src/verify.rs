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
    /// Tokens of a trial's text at most; a text has at least two.
    pub max_tokens: usize,
    /// Tokens decoded after each restore. With none there is nothing to compare for some levels, and they do not pass.
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
            let a = run.model.engine.create_slot()?;
            let outcome = run.beside(a, options, &mut dice);
            release(&mut run.model.engine, &[a], outcome)?;
            progress(trial + 1, options.trials);
        }
        let levels = run.levels;
        let (name, device) = (self.name().to_owned(), self.engine.device().class.clone());
        Ok(VerifyReport { model: name, device, trials: options.trials, seed: options.seed, levels })
    }
}

impl Run<'_> {
    /// A trial in `a` and a slot of its own.
    fn beside(&mut self, a: SlotId, options: &VerifyOptions, dice: &mut Dice) -> Result<(), Error> {
        let b = self.model.engine.create_slot()?;
        let outcome = self.trial([a, b], options, dice);
        release(&mut self.model.engine, &[b], outcome)
    }

    fn trial(
        &mut self,
        [a, b]: [SlotId; 2],
        options: &VerifyOptions,
        dice: &mut Dice,
    ) -> Result<(), Error> {
        let decoded = options.decode.saturating_mul(4).saturating_add(4);
        let room = self.model.engine.context().saturating_sub(decoded);
        let len = 2 + dice.below(options.max_tokens.min(room).max(2) - 1);
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

        self.forks(b, &middle, dice, &second)?;
        self.rollbacks(a, dice, (&prefix, &prefix_bytes), (&middle, &middle_bytes), &end_bytes)?;
        self.file(b, &middle, &middle_bytes, &second)?;
        self.cold([a, b], &tokens, split, &params, options.decode, dice)
    }

    /// Fills a slot with a session of its own.
    fn dirty(&mut self, slot: SlotId, dice: &mut Dice) -> Result<(), Error> {
        let room = self.model.engine.context().saturating_sub(1).clamp(1, 40);
        let tokens = sample_tokens(self.model, 1 + dice.below(room), dice.next())?;
        // Every sampler buffer differs from that of any trial: what a capsule forgets stays, and shows.
        let params = SamplingParams {
            temperature: 1.3,
            seed: dice.next(),
            logit_bias: vec![(dice.below(self.model.engine.vocabulary()) as u32, 1.5)],
            ..SamplingParams::default()
        };
        let engine = &mut self.model.engine;
        engine.reset(slot)?;
        append(engine, slot, &tokens)?;
        engine.configure(slot, &params)?;
        engine.step(slot)?;
        Ok(())
    }

    fn decode(&mut self, slot: SlotId, n: usize) -> Result<Trace, Error> {
        let engine = &mut self.model.engine;
        (0..n).map(|_| Ok((engine.step(slot)?, bits(&engine.logits(slot)?)))).collect()
    }

    /// `known` is how the session goes on from `capsule`.
    fn forks(
        &mut self,
        slot: SlotId,
        capsule: &Capsule,
        dice: &mut Dice,
        known: &Trace,
    ) -> Result<(), Error> {
        let seed = dice.next();
        self.model.engine.restore(slot, capsule)?;
        self.model.engine.reseed(slot, seed)?;
        let wanted = self.decode(slot, known.len())?;
        let forks = self.model.engine.fork(capsule, &[Some(seed)])?;
        let outcome = self.beside_a_fork(slot, forks[0], capsule, (known, &wanted));
        release(&mut self.model.engine, &forks, outcome)
    }

    /// A fork and its sibling go on in turn: each as if it were alone.
    fn beside_a_fork(
        &mut self,
        sibling: SlotId,
        fork: SlotId,
        capsule: &Capsule,
        (known, wanted): (&Trace, &Trace),
    ) -> Result<(), Error> {
        self.model.engine.restore(sibling, capsule)?;
        let (mut left, mut right) = (Trace::new(), Trace::new());
        for _ in known {
            left.extend(self.decode(sibling, 1)?);
            right.extend(self.decode(fork, 1)?);
        }
        self.same_trace(FORK, "the fork, beside a sibling", &right, wanted);
        self.same_trace(FORK, "the sibling, beside a fork", &left, known);
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
        if !reply.is_empty() {
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
        }
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

    /// Compares what was decoded; nothing decoded is no comparison.
    fn same_trace(&mut self, level: usize, what: &str, got: &Trace, wanted: &Trace) {
        if got.is_empty() && wanted.is_empty() {
            return;
        }
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

/// Gives slots back, whatever the outcome; its error comes before theirs.
pub(crate) fn release<T>(
    engine: &mut ampoule_engine::Engine,
    slots: &[SlotId],
    outcome: Result<T, Error>,
) -> Result<T, Error> {
    let mut given = Ok(());
    for &slot in slots {
        given = given.and(engine.drop_slot(slot));
    }
    let value = outcome?;
    given?;
    Ok(value)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, LoadOptions};

    fn tiny(context: usize, slots: usize) -> Ampoule {
        let mut options =
            LoadOptions { device: Device::Reference, context, ..LoadOptions::default() };
        options.engine.slots = slots;
        Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap()
    }

    /// Slots that can still be taken.
    fn free(model: &mut Ampoule) -> usize {
        let taken: Vec<_> = std::iter::from_fn(|| model.engine.create_slot().ok()).collect();
        for &slot in &taken {
            model.engine.drop_slot(slot).unwrap();
        }
        taken.len()
    }

    #[test]
    fn options_of_nothing_check_nothing_and_do_not_pass() {
        let mut model = tiny(64, 3);
        let few = VerifyOptions { trials: 2, max_tokens: 0, decode: 2, seed: 1 };
        assert!(model.verify(&few, &mut |_, _| {}).unwrap().passed(), "texts of two tokens");
        let none =
            model.verify(&VerifyOptions { decode: 0, ..few.clone() }, &mut |_, _| {}).unwrap();
        assert!(!none.passed() && none.levels[FORK].checks == 0, "{none:?}");
        assert!(none.levels.iter().all(|l| l.mismatches == 0), "{none:?}");
        let none = model.verify(&VerifyOptions { trials: 0, ..few }, &mut |_, _| {}).unwrap();
        assert!(!none.passed());
        assert!(!model.ablate(0, 0, 1).unwrap().passed());
        let report = model.ablate(0, 8, 1).unwrap();
        assert!(report.prefix == 2 && report.differ.len() == 3, "{report:?}");
        assert_eq!(free(&mut model), 3);
    }

    #[test]
    fn failures_leave_no_slot_behind() {
        for slots in [1, 2] {
            let mut model = tiny(64, slots);
            assert!(model.verify(&VerifyOptions::default(), &mut |_, _| {}).is_err());
            assert_eq!(free(&mut model), slots);
        }
        // The context is too short for what is to be decoded.
        let mut model = tiny(32, 3);
        let long = VerifyOptions { decode: 40, ..VerifyOptions::default() };
        assert!(model.verify(&long, &mut |_, _| {}).is_err());
        assert!(model.ablate(16, 40, 1).is_err());
        assert_eq!(free(&mut model), 3);
    }
}
