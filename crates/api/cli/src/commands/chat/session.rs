//! Branches and turns: what a chat does, without a terminal.

use std::time::Instant;

use ampoule::{Ampoule, Capsule, Error, FinishReason, Reply, ReplyOptions, SamplingParams, SlotId};
use anyhow::{Context, ensure};

use crate::args::ChatArgs;
use crate::conversation::{Advance, Conversation, advance};
use crate::output::{Progress, ms};

/// Where text goes as it comes.
pub(super) type Show<'a> = &'a mut dyn FnMut(&str) -> anyhow::Result<()>;

/// The branch that every chat begins with.
const MAIN: &str = "main";

/// One message and its reply.
#[derive(Clone)]
pub(super) struct Turn {
    pub user: String,
    /// The reply as the reader saw it.
    pub reply: String,
    /// The reply's tokens, the end token included.
    pub tokens: Vec<u32>,
    pub finish: FinishReason,
    /// Tokens kept and read before the reply.
    pub advance: Advance,
    pub ttft_ms: f64,
    pub tokens_per_second: Option<f64>,
    /// The boundary after it.
    pub end: Capsule,
    /// All text up to there, special tokens included.
    text: String,
    /// How often it was answered.
    attempts: u64,
}

/// The boundary between a message and its reply: where `/retry` goes back to.
#[derive(Clone)]
struct Asked {
    capsule: Capsule,
    text: String,
    advance: Advance,
}

/// A branch of the conversation: turns, and the boundaries after them.
#[derive(Clone)]
pub(super) struct Branch {
    pub turns: Vec<Turn>,
    /// The boundary before the first turn.
    base: Capsule,
    /// The text up to there.
    base_text: String,
    /// What was said before the first turn.
    opening: Conversation,
    /// Of the last turn.
    asked: Option<Asked>,
}

impl Branch {
    /// Begins after a saved state.
    fn from(base: Capsule, text: String) -> Self {
        let opening = Conversation { before: Some(text.clone()), messages: Vec::new() };
        Self { turns: Vec::new(), base, base_text: text, opening, asked: None }
    }

    /// The boundary where the branch ends.
    pub(super) fn end(&self) -> &Capsule {
        self.turns.last().map_or(&self.base, |turn| &turn.end)
    }

    fn text(&self) -> &str {
        self.turns.last().map_or(&self.base_text, |turn| &turn.text)
    }

    /// Everything said, and one message more.
    fn conversation(&self, model: &Ampoule, user: &str) -> anyhow::Result<Conversation> {
        let tokenizer = model.tokenizer()?;
        let mut conversation = self.opening.clone();
        for turn in &self.turns {
            conversation.push("user", &turn.user);
            // As the model said it: without the end token, which is the template's.
            let said = turn.tokens.split_last().filter(|(last, _)| tokenizer.is_eos(**last));
            let said = said.map_or(&turn.tokens[..], |(_, before)| before);
            conversation.push("assistant", &tokenizer.decode(said));
        }
        conversation.push("user", user);
        Ok(conversation)
    }
}

/// A chat: one slot, and any number of branches that are capsules.
pub(super) struct Session {
    pub branches: Vec<(String, Branch)>,
    /// The branch that the slot holds.
    pub name: String,
    slot: SlotId,
    params: SamplingParams,
    /// Whether the command line set them, so that they go before a loaded capsule's.
    insists: bool,
    options: ReplyOptions,
    progress: Progress,
}

impl Session {
    pub(super) fn new(
        model: &mut Ampoule,
        args: &ChatArgs,
        params: &SamplingParams,
        progress: Progress,
    ) -> anyhow::Result<Self> {
        let slot = model.engine.create_slot()?;
        model.engine.configure(slot, params)?;
        let mut opening = Conversation::default();
        if let Some(system) = &args.system {
            opening.push("system", system);
        }
        let base = model.engine.snapshot(slot)?;
        let branch =
            Branch { turns: Vec::new(), base, base_text: String::new(), opening, asked: None };
        Ok(Self {
            branches: vec![(MAIN.to_owned(), branch)],
            name: MAIN.to_owned(),
            slot,
            params: params.clone(),
            insists: args.sampling.beyond_seed(),
            options: ReplyOptions { max_tokens: args.max_tokens, ..ReplyOptions::default() },
            progress,
        })
    }

    /// Whether every seed draws the same.
    pub(super) fn greedy(&self) -> bool {
        self.params.temperature == 0.0
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.branches.iter().position(|(other, _)| other == name)
    }

    /// The branch that the slot holds.
    pub(super) fn branch(&self) -> &Branch {
        &self.branches[self.index(&self.name).unwrap_or(0)].1
    }

    fn branch_mut(&mut self) -> &mut Branch {
        let index = self.index(&self.name).unwrap_or(0);
        &mut self.branches[index].1
    }

    /// Says something and takes the reply. If that fails, nothing was said.
    pub(super) fn turn(
        &mut self,
        model: &mut Ampoule,
        user: &str,
        show: Show<'_>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        let branch = self.branch();
        let (seen, end) = (branch.text().to_owned(), branch.end().clone());
        let wanted = branch.conversation(model, user)?.prompt(model)?;
        let result = self.ask(model, &seen, wanted).and_then(|asked| {
            let turn = self.answer(model, user, &asked, start, 1, show)?;
            Ok((asked, turn))
        });
        let (asked, turn) = self.or_back(model, &end, result)?;
        let branch = self.branch_mut();
        branch.turns.push(turn);
        branch.asked = Some(asked);
        Ok(())
    }

    /// Answers the last message again, with the next seed. If that fails the old reply stands.
    pub(super) fn retry(&mut self, model: &mut Ampoule, show: Show<'_>) -> anyhow::Result<()> {
        let start = Instant::now();
        let branch = self.branch();
        let last = branch.turns.last().context("there is no turn to retry")?;
        let asked = branch.asked.clone().context("the last message was not asked here")?;
        let (user, attempts, end) = (last.user.clone(), last.attempts + 1, last.end.clone());
        let seed = self.params.seed.wrapping_add(attempts - 1);
        let restored = model.engine.restore(self.slot, &asked.capsule);
        let result = restored
            .and_then(|()| model.engine.reseed(self.slot, seed))
            .map_err(anyhow::Error::from)
            .and_then(|()| self.answer(model, &user, &asked, start, attempts, show));
        let mut turn = self.or_back(model, &end, result)?;
        turn.advance = Advance { cached: asked.capsule.position() as usize, read: 0 };
        let branch = self.branch_mut();
        branch.turns.pop();
        branch.turns.push(turn);
        Ok(())
    }

    /// Puts the slot back where it stood if something failed.
    fn or_back<T>(
        &self,
        model: &mut Ampoule,
        end: &Capsule,
        result: anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        if result.is_err() {
            model.engine.restore(self.slot, end)?;
        }
        result
    }

    /// Reads what the template adds, and freezes the boundary before the reply.
    fn ask(&self, model: &mut Ampoule, seen: &str, wanted: String) -> anyhow::Result<Asked> {
        let advance = advance(model, self.slot, seen, &wanted, self.progress)?;
        let capsule = model.engine.snapshot(self.slot)?;
        Ok(Asked { capsule, text: wanted, advance })
    }

    fn answer(
        &self,
        model: &mut Ampoule,
        user: &str,
        asked: &Asked,
        start: Instant,
        attempts: u64,
        show: Show<'_>,
    ) -> anyhow::Result<Turn> {
        let mut reply = Reply::begin(model, self.slot, &self.options)?;
        let (mut tokens, mut said, mut finish) =
            (Vec::new(), String::new(), FinishReason::Cancelled);
        let mut first = None;
        while let Some(step) = reply.step(model)? {
            if step.token.is_some() {
                first.get_or_insert_with(Instant::now);
            }
            tokens.extend(step.token);
            if !step.text.is_empty() {
                show(&step.text)?;
            }
            said.push_str(&step.text);
            finish = step.finished.unwrap_or(finish);
        }
        let first = first.context(
            "there was no room for a reply; /undo some turns, or use a longer --context",
        )?;
        let rest = first.elapsed().as_secs_f64();
        let speed = (tokens.len() > 1).then(|| (tokens.len() - 1) as f64 / rest);
        let end = model.engine.snapshot(self.slot)?;
        let text = format!("{}{}", asked.text, model.tokenizer()?.decode(&tokens));
        Ok(Turn {
            user: user.to_owned(),
            reply: said,
            tokens,
            finish,
            advance: asked.advance,
            ttft_ms: ms(first - start),
            tokens_per_second: speed,
            end,
            text,
            attempts,
        })
    }

    /// Takes the last turn back; returns it and the milliseconds it took.
    pub(super) fn undo(&mut self, model: &mut Ampoule) -> anyhow::Result<(Turn, f64)> {
        let branch = self.branch();
        ensure!(!branch.turns.is_empty(), "there is no turn to undo");
        let before =
            branch.turns.iter().rev().nth(1).map_or(&branch.base, |turn| &turn.end).clone();
        let time = self.restore(model, &before)?;
        let branch = self.branch_mut();
        branch.asked = None;
        let turn = branch.turns.pop().context("there is no turn to undo")?;
        Ok((turn, time))
    }

    /// Starts a branch where this one stands, and goes on in it.
    pub(super) fn fork(&mut self, name: &str) -> anyhow::Result<()> {
        ensure!(
            self.index(name).is_none(),
            "there is a branch '{name}' already; /switch {name} goes there"
        );
        let branch = self.branch().clone();
        self.branches.push((name.to_owned(), branch));
        name.clone_into(&mut self.name);
        Ok(())
    }

    /// Goes to another branch; returns the milliseconds it took.
    pub(super) fn switch(&mut self, model: &mut Ampoule, name: &str) -> anyhow::Result<f64> {
        let names = || self.branches.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", ");
        let index = self.index(name);
        let index =
            index.with_context(|| format!("there is no branch '{name}'; there are {}", names()))?;
        let end = self.branches[index].1.end().clone();
        let time = self.restore(model, &end)?;
        name.clone_into(&mut self.name);
        Ok(time)
    }

    /// Replaces this branch by a capsule from a file; returns the milliseconds that the restore took.
    ///
    /// The capsule's sampler goes on, unless the command line set another.
    pub(super) fn load(&mut self, model: &mut Ampoule, capsule: Capsule) -> anyhow::Result<f64> {
        let text = model.tokenizer()?.decode(&capsule.tokens());
        let time = self.restore(model, &capsule)?;
        let base = if self.insists {
            model.engine.configure(self.slot, &self.params)?;
            model.engine.snapshot(self.slot)?
        } else {
            capsule
        };
        *self.branch_mut() = Branch::from(base, text);
        Ok(time)
    }

    /// Adds a branch that stands where a capsule does, and stays where it is.
    pub(super) fn warm(
        &mut self,
        model: &Ampoule,
        name: &str,
        capsule: Capsule,
    ) -> anyhow::Result<()> {
        ensure!(self.index(name).is_none(), "there is a branch '{name}' already");
        let text = model.tokenizer()?.decode(&capsule.tokens());
        self.branches.push((name.to_owned(), Branch::from(capsule, text)));
        Ok(())
    }

    fn restore(&self, model: &mut Ampoule, capsule: &Capsule) -> anyhow::Result<f64> {
        let start = Instant::now();
        model.engine.restore(self.slot, capsule).map_err(Error::from)?;
        model.engine.synchronize()?;
        Ok(ms(start.elapsed()))
    }
}
