//! Random trees of boundaries, against a model that shares nothing and copies everything.
//!
//! Two engines of one model go through the same operations. In the one under test capsules share rows by lineage. In the
//! naive one a capsule is a capsule file, every restore imports it anew and so copies all of it, and a rollback reads
//! the whole session again from its first token. After each operation every State byte of the slot it touched must be
//! the same in both.

use std::ops::ControlFlow;

use ampoule::{Ampoule, Capsule, EngineError, Error, SamplingParams, SlotId};
use ampoule_engine::{NewLink, StatePart};

use crate::ops::rng::Rng;

/// How long, and how large the trees grow.
#[derive(Clone, Copy, Debug)]
pub struct TreeOptions {
    /// Operations in all.
    pub operations: usize,
    /// Of the choice of operations.
    pub seed: u64,
    /// Sessions alive at once; each engine needs as many slots.
    pub sessions: usize,
    /// Capsules alive at once.
    pub capsules: usize,
}

impl Default for TreeOptions {
    fn default() -> Self {
        Self { operations: 100_000, seed: 1, sessions: 3, capsules: 24 }
    }
}

/// What was done, and what it cost.
#[derive(Clone, Debug, Default)]
pub struct TreeReport {
    /// Times each operation ran.
    pub operations: Vec<(&'static str, usize)>,
    /// Bytes of all State compared.
    pub compared: u64,
    /// The most bytes that capsules of the engine under test took.
    pub most_bytes: usize,
    /// What full copies of the capsules alive took at their most.
    pub most_copied: usize,
    /// Bytes that are still taken when everything has been dropped.
    pub left_bytes: usize,
}

/// Why a run ended early.
#[derive(Debug)]
pub enum TreeError {
    /// An engine refused or failed.
    Engine(Error),
    /// The engines differ.
    Differ {
        /// Number of the operation.
        operation: usize,
        /// What it was.
        what: String,
        /// The first State buffer that differs, or what else does.
        where_: String,
    },
}

impl std::fmt::Display for TreeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Engine(error) => write!(f, "{error}"),
            Self::Differ { operation, what, where_ } => {
                write!(f, "operation {operation} ({what}): {where_} differs from the naive model's")
            }
        }
    }
}

impl std::error::Error for TreeError {}

impl From<Error> for TreeError {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

impl From<EngineError> for TreeError {
    fn from(error: EngineError) -> Self {
        Self::Engine(error.into())
    }
}

/// What a session did, so that the naive model can do it again.
#[derive(Clone, Debug)]
enum Done {
    Read(Vec<u32>),
    Drew,
    Forced(u32),
    Configured(Box<SamplingParams>),
    Reseeded(u64),
    Began,
}

impl Done {
    fn tokens(&self) -> usize {
        match self {
            Self::Read(tokens) => tokens.len(),
            Self::Drew | Self::Forced(_) => 1,
            _ => 0,
        }
    }
}

struct Session {
    slot: SlotId,
    naive: SlotId,
    log: Vec<Done>,
}

impl Session {
    fn position(&self) -> usize {
        self.log.iter().map(Done::tokens).sum()
    }
}

struct Kept {
    capsule: Capsule,
    file: Vec<u8>,
    bytes: usize,
    log: Vec<Done>,
}

struct Run<'a> {
    model: &'a mut Ampoule,
    naive: &'a mut Ampoule,
    rng: Rng,
    sessions: Vec<Session>,
    kept: Vec<Kept>,
    context: usize,
    operation: usize,
    report: TreeReport,
}

/// Operations and how often each is chosen.
const OPERATIONS: &[(&str, usize)] = &[
    ("append", 14),
    ("step", 26),
    ("step forced", 6),
    ("configure", 3),
    ("reseed", 2),
    ("begin reply", 2),
    ("snapshot", 14),
    ("restore", 12),
    ("fork", 3),
    ("rollback", 6),
    ("drop capsule", 8),
    ("drop session", 2),
    ("reset", 1),
    ("reimport", 1),
    ("reassemble", 2),
];

/// Runs random operations on both engines; `progress` is told operations done and in all.
///
/// # Errors
/// At the first difference, or if an engine fails.
///
/// # Panics
/// If the options ask for no session.
pub fn random_trees(
    model: &mut Ampoule,
    naive: &mut Ampoule,
    options: &TreeOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TreeReport, TreeError> {
    assert!(options.sessions > 0, "no session to do anything in");
    let context = model.engine.context().min(naive.engine.context());
    let report = TreeReport {
        operations: OPERATIONS.iter().map(|&(name, _)| (name, 0)).collect(),
        ..TreeReport::default()
    };
    let mut run = Run {
        model,
        naive,
        rng: Rng::new(options.seed, "trees"),
        sessions: Vec::new(),
        kept: Vec::new(),
        context,
        operation: 0,
        report,
    };
    for operation in 0..options.operations {
        run.operation = operation;
        run.one(options)?;
        if operation % 997 == 0 {
            for index in 0..run.sessions.len() {
                run.compare(index, "all sessions")?;
            }
        }
        progress(operation + 1, options.operations);
    }
    run.kept.clear();
    while !run.sessions.is_empty() {
        run.end(0)?;
    }
    run.report.left_bytes = run.model.engine.capsule_bytes().0;
    Ok(run.report)
}

impl Run<'_> {
    fn below(&mut self, n: usize) -> usize {
        self.rng.below(n)
    }

    fn choose(&mut self) -> usize {
        let all: usize = OPERATIONS.iter().map(|(_, weight)| weight).sum();
        let mut at = self.below(all);
        for (index, (_, weight)) in OPERATIONS.iter().enumerate() {
            if at < *weight {
                return index;
            }
            at -= weight;
        }
        unreachable!("the weights sum to the range")
    }

    fn one(&mut self, options: &TreeOptions) -> Result<(), TreeError> {
        if self.sessions.is_empty() {
            self.start()?;
        }
        let choice = self.choose();
        let name = OPERATIONS[choice].0;
        let index = self.below(self.sessions.len());
        let room = self.context - self.sessions[index].position();
        match name {
            "append" => {
                let most = [3, 12, 40][self.below(3)];
                let n = 1 + self.below(most);
                let vocabulary = self.model.engine.vocabulary();
                let tokens = (0..n.min(room)).map(|_| self.below(vocabulary) as u32).collect();
                self.act(index, Done::Read(tokens))?;
            }
            "step" => self.act(index, Done::Drew)?,
            "step forced" => {
                let vocabulary = self.model.engine.vocabulary();
                let token = self.below(vocabulary) as u32;
                self.act(index, Done::Forced(token))?;
            }
            "configure" => {
                let params = self.sampler();
                self.act(index, Done::Configured(Box::new(params)))?;
            }
            "reseed" => {
                let seed = self.rng.word();
                self.act(index, Done::Reseeded(seed))?;
            }
            "begin reply" => self.act(index, Done::Began)?,
            "snapshot" => self.snapshot(index, options)?,
            "restore" => self.restore(index)?,
            "fork" if self.sessions.len() < options.sessions => self.fork()?,
            "fork" | "drop session" => {
                if self.sessions.len() > 1 {
                    self.end(index)?;
                }
            }
            "rollback" => self.rollback(index)?,
            "drop capsule" => {
                if !self.kept.is_empty() {
                    let which = self.below(self.kept.len());
                    self.kept.swap_remove(which);
                }
            }
            "reset" => {
                let session = &mut self.sessions[index];
                session.log.clear();
                self.model.engine.reset(session.slot)?;
                self.naive.engine.reset(session.naive)?;
            }
            "reimport" => self.reimport()?,
            _ => self.reassemble()?,
        }
        self.report.operations[choice].1 += 1;
        let bytes = self.model.engine.capsule_bytes().0;
        self.report.most_bytes = self.report.most_bytes.max(bytes);
        let copied = self.kept.iter().map(|k| k.bytes).sum();
        self.report.most_copied = self.report.most_copied.max(copied);
        if index < self.sessions.len() { self.compare(index, name) } else { Ok(()) }
    }

    fn sampler(&mut self) -> SamplingParams {
        let vocabulary = self.model.engine.vocabulary();
        SamplingParams {
            temperature: [0.0, 0.7, 1.2][self.below(3)],
            top_k: [0, 20][self.below(2)] as u32,
            repetition_penalty: [1.0, 1.1][self.below(2)],
            presence_penalty: [0.0, 0.3][self.below(2)],
            seed: self.rng.word(),
            logit_bias: vec![(self.below(vocabulary) as u32, 0.5)],
            ..SamplingParams::default()
        }
    }

    fn start(&mut self) -> Result<(), TreeError> {
        let slot = self.model.engine.create_slot()?;
        let naive = self.naive.engine.create_slot()?;
        self.sessions.push(Session { slot, naive, log: Vec::new() });
        Ok(())
    }

    fn end(&mut self, index: usize) -> Result<(), TreeError> {
        let session = self.sessions.swap_remove(index);
        self.model.engine.drop_slot(session.slot)?;
        Ok(self.naive.engine.drop_slot(session.naive)?)
    }

    /// Does it in both, where the session has room and something to go on from.
    fn act(&mut self, index: usize, done: Done) -> Result<(), TreeError> {
        let session = &self.sessions[index];
        let (position, tokens) = (session.position(), done.tokens());
        let starts = matches!(done, Done::Drew | Done::Forced(_));
        if position + tokens > self.context || starts && position == 0 {
            return Ok(());
        }
        let (slot, naive) = (session.slot, session.naive);
        let drew = apply(self.model, slot, &done)?;
        if drew != apply(self.naive, naive, &done)? {
            return Err(self.differ("step", "the token drawn"));
        }
        self.sessions[index].log.push(done);
        Ok(())
    }

    fn snapshot(&mut self, index: usize, options: &TreeOptions) -> Result<(), TreeError> {
        let session = &self.sessions[index];
        if session.position() == 0 {
            return Ok(());
        }
        let capsule = self.model.engine.snapshot(session.slot)?;
        let copied = self.naive.engine.snapshot(session.naive)?;
        let file = export(self.naive, &copied)?;
        let bytes = capsule.fixed_bytes() + capsule.row_bytes();
        let kept = Kept { capsule, file, bytes, log: session.log.clone() };
        if self.kept.len() == options.capsules {
            let which = self.below(options.capsules);
            self.kept[which] = kept;
        } else {
            self.kept.push(kept);
        }
        Ok(())
    }

    fn restore(&mut self, index: usize) -> Result<(), TreeError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let which = self.below(self.kept.len());
        self.restore_in(index, which)
    }

    fn restore_in(&mut self, index: usize, which: usize) -> Result<(), TreeError> {
        let (session, kept) = (&mut self.sessions[index], &self.kept[which]);
        self.model.engine.restore(session.slot, &kept.capsule)?;
        let copy = self.naive.engine.import(&kept.file)?;
        self.naive.engine.restore(session.naive, &copy)?;
        session.log.clone_from(&kept.log);
        Ok(())
    }

    fn fork(&mut self) -> Result<(), TreeError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let which = self.below(self.kept.len());
        let seed = self.rng.word();
        let slot = self.model.engine.fork(&self.kept[which].capsule, &[Some(seed)])?[0];
        let naive = self.naive.engine.create_slot()?;
        let copy = self.naive.engine.import(&self.kept[which].file)?;
        self.naive.engine.restore(naive, &copy)?;
        self.naive.engine.reseed(naive, seed)?;
        let mut log = self.kept[which].log.clone();
        log.push(Done::Reseeded(seed));
        self.sessions.push(Session { slot, naive, log });
        self.compare(self.sessions.len() - 1, "fork")
    }

    /// To the position of a boundary of its branch if one is found there, else to any.
    fn rollback(&mut self, index: usize) -> Result<(), TreeError> {
        let here = self.sessions[index].position();
        if here == 0 {
            return Ok(());
        }
        let to = match self.below(3) {
            0 => here - self.below(here.min(4)),
            1 => 1 + self.below(here),
            _ => {
                let ahead = |k: &&Kept| (k.capsule.position() as usize) <= here;
                let known: Vec<_> =
                    self.kept.iter().filter(ahead).map(|k| k.capsule.position() as usize).collect();
                if known.is_empty() { here } else { known[self.below(known.len())] }
            }
        };
        let session = &mut self.sessions[index];
        self.model.engine.rollback(session.slot, to as u32)?;
        cut(&mut session.log, to);
        self.naive.engine.reset(session.naive)?;
        let (naive, log) = (session.naive, session.log.clone());
        for done in &log {
            apply(self.naive, naive, done)?;
        }
        Ok(())
    }

    /// A capsule leaves the engine under test as a file and comes back as a root of its own.
    fn reimport(&mut self) -> Result<(), TreeError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let which = self.below(self.kept.len());
        let file = export(self.model, &self.kept[which].capsule)?;
        let capsule = self.model.engine.import(&file)?;
        if capsule.lineage() != self.kept[which].capsule.lineage() {
            return Err(self.differ("reimport", "the lineage"));
        }
        self.kept[which].capsule = capsule;
        Ok(())
    }

    /// A capsule is taken apart and put together again, link by link; half the time after it was dropped, so that
    /// rows nobody else holds have to be supplied.
    fn reassemble(&mut self) -> Result<(), TreeError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let which = self.below(self.kept.len());
        let kept = self.kept.swap_remove(which);
        let chain = self.model.engine.chain(&kept.capsule)?;
        let scope = self.model.engine.chain_scope();
        let tensors = scope.layout.tensors.len();
        let copy = |part: &StatePart| -> Result<Vec<Vec<u8>>, EngineError> {
            (0..tensors).map(|i| Ok(part.tensor(i)?.to_vec())).collect()
        };
        let links: Vec<NewLink> = chain
            .links
            .iter()
            .map(|link| NewLink {
                tokens: link.tokens().to_vec(),
                spans: link.spans(),
                lineage: link.lineage(),
                from: link.from(),
                journal: link.journal(),
            })
            .collect();
        let fixed = copy(&chain.fixed)?;
        let rows = chain.links.iter().map(|l| copy(&l.rows)).collect::<Result<Vec<_>, _>>()?;
        drop(chain);
        let Kept { capsule, file, bytes, log } = kept;
        let lineage = capsule.lineage();
        let held = (self.below(2) == 0).then_some(capsule);
        let capsule = self.model.engine.assemble(&scope, &links, || Ok(fixed), &mut |index| {
            Ok::<_, EngineError>(rows[index].clone())
        })?;
        drop(held);
        if capsule.lineage() != lineage {
            return Err(self.differ("reassemble", "the lineage"));
        }
        self.kept.push(Kept { capsule, file, bytes, log });
        Ok(())
    }

    fn compare(&mut self, index: usize, what: &str) -> Result<(), TreeError> {
        let session = &self.sessions[index];
        let position = session.position();
        let ours = self.model.engine.state_bytes(session.slot)?;
        let theirs = self.naive.engine.state_bytes(session.naive)?;
        if self.model.engine.position(session.slot)? as usize != position {
            return Err(self.differ(what, "the position"));
        }
        self.report.compared += ours.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        match ours.iter().zip(&theirs).find(|(a, b)| a != b) {
            Some(((name, _), _)) => Err(self.differ(what, &format!("'{name}'"))),
            None => Ok(()),
        }
    }

    fn differ(&self, what: &str, place: &str) -> TreeError {
        TreeError::Differ {
            operation: self.operation,
            what: what.to_owned(),
            where_: place.to_owned(),
        }
    }
}

/// Does it in one engine; returns the token that was drawn.
fn apply(model: &mut Ampoule, slot: SlotId, done: &Done) -> Result<Option<u32>, TreeError> {
    let engine = &mut model.engine;
    match done {
        Done::Read(tokens) => {
            engine.append(slot, tokens, &mut |_| ControlFlow::Continue(()))?;
        }
        Done::Drew => return Ok(Some(engine.step(slot)?)),
        Done::Forced(token) => engine.step_forced(slot, *token)?,
        Done::Configured(params) => engine.configure(slot, params)?,
        Done::Reseeded(seed) => engine.reseed(slot, *seed)?,
        Done::Began => engine.begin_reply(slot)?,
    }
    Ok(None)
}

/// What is left of a log after a rollback to `position`: settings made there are part of it.
fn cut(log: &mut Vec<Done>, position: usize) {
    let mut at = 0;
    let mut whole = 0;
    for done in log.iter_mut() {
        if at + done.tokens() > position {
            if let Done::Read(tokens) = done
                && position > at
            {
                tokens.truncate(position - at);
                whole += 1;
            }
            break;
        }
        at += done.tokens();
        whole += 1;
    }
    log.truncate(whole);
}

fn export(model: &Ampoule, capsule: &Capsule) -> Result<Vec<u8>, TreeError> {
    let mut bytes = Vec::new();
    model.engine.export(capsule, &mut |piece| {
        bytes.extend_from_slice(piece);
        ControlFlow::Continue(())
    })?;
    Ok(bytes)
}
