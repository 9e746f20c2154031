//! Slots, prefill and decode.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ampoule_backend::{
    Backend, BackendError, Counters, DeviceInfo, LoadOptions, Program, Progress, Region, SlotId,
    StateRegions,
};
use ampoule_capsule::{
    Digest, Fingerprint, Growth, History, Labels, LineageScope, Origin, StateLayout, StateTensor,
    salt_digest,
};
use ampoule_plan::{BufferId, Phase, Sealed, WeightSource};

use crate::chain::KnownNodes;
use crate::lineage::{Boundary, RowNode};
use crate::rollback::{Waypoint, Waypoints};
use crate::sampling::{Event, Stamped};
use crate::{EngineError, SamplingParams};

/// Told after each chunk of a prefill; the answer may stop it there.
pub type Control<'a> = &'a mut dyn FnMut(PrefillProgress) -> ControlFlow<()>;

/// How far a prefill is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillProgress {
    /// Tokens read so far.
    pub done: usize,
    /// Tokens to read in all.
    pub total: usize,
}

/// Who the model is, for fingerprints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The model's name.
    pub name: String,
    /// BLAKE3 of the weights.
    pub weights: [u8; 32],
    /// BLAKE3 of the plans, built with options that do not depend on context or buckets.
    pub plan: [u8; 32],
}

/// What to allocate, and whose sessions these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Slots that may live at once.
    pub slots: usize,
    /// Bytes for capsules in memory.
    pub capsule_bytes: usize,
    /// Tenant: capsules of different salts never meet.
    pub salt: Vec<u8>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { slots: 4, capsule_bytes: 4 << 30, salt: Vec::new() }
    }
}

/// The most positions that any capsule file may claim; real contexts are set when a model is built.
const FILE_CONTEXT: usize = 1 << 24;

/// Rows that poisoning overwrites: more than any kernel reads at a time.
const POISONED_ROWS: usize = 256;

pub(crate) struct Slot {
    /// The boundary the slot goes on from.
    pub(crate) chain: Option<Arc<RowNode>>,
    /// What was read since.
    pub(crate) tail: Vec<u32>,
    /// How all rows were made, the tail's included.
    pub(crate) history: History,
    /// Sampler events since the boundary.
    pub(crate) events: Vec<Stamped>,
    /// Nodes from the root on whose rows lie in the slot's memory; they may reach past the position.
    pub(crate) held: Vec<Arc<RowNode>>,
    /// Why the slot is empty, if a failure emptied it.
    pub(crate) failure: Option<String>,
    /// The boundary it was restored from: kept, so that a rollback behind it need not read everything again.
    pub(crate) base: Option<Arc<Boundary>>,
    /// Whether an experiment changed its state: no capsule may say it is of this lineage.
    pub(crate) tainted: bool,
    /// Places within the tail that a rollback can start from.
    pub(crate) waypoints: Vec<Waypoint>,
    /// Those of the node that was frozen last.
    pub(crate) passed: Option<Waypoints>,
}

impl Slot {
    pub(crate) fn new() -> Self {
        Self {
            chain: None,
            tail: Vec::new(),
            history: History::new(),
            events: Vec::new(),
            held: Vec::new(),
            failure: None,
            base: None,
            tainted: false,
            waypoints: Vec::new(),
            passed: None,
        }
    }

    pub(crate) fn position(&self) -> u32 {
        self.chain.as_ref().map_or(0, |n| n.end()) + self.tail.len() as u32
    }
}

/// Buffers the engine reads and writes by name.
pub(crate) struct Buffers {
    tokens: BufferId,
    count: BufferId,
    forced: BufferId,
    params: BufferId,
    seed: BufferId,
    bias_tokens: BufferId,
    bias_values: BufferId,
    token: BufferId,
    scores: BufferId,
    pub(crate) logits: BufferId,
    pub(crate) cursor: BufferId,
}

/// One model on one device, with its slots.
pub struct Engine {
    pub(crate) program: Box<dyn Program>,
    pub(crate) model: Arc<Sealed>,
    pub(crate) state: StateRegions,
    pub(crate) buffers: Buffers,
    /// Few: an ordered map finds one in fewer cache lines than a hash does.
    pub(crate) slots: BTreeMap<SlotId, Slot>,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) layout: StateLayout,
    pub(crate) scope: LineageScope,
    pub(crate) id: u64,
    device: DeviceInfo,
    forced: Option<i32>,
    vocabulary: usize,
    bias_entries: usize,
    context: usize,
    poison: bool,
    pub(crate) known: KnownNodes,
}

static NEXT_ENGINE: AtomicU64 = AtomicU64::new(1);

impl Engine {
    /// Loads a model on a backend.
    ///
    /// # Errors
    /// If the backend cannot load it, or it lacks a buffer or plan that the engine needs.
    pub fn load(
        backend: &dyn Backend,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        identity: &Identity,
        options: &EngineOptions,
        progress: Progress<'_>,
    ) -> Result<Self, EngineError> {
        let device = backend.info();
        let table = &model.model().buffers;
        let find = |name: &str| {
            table.find(name).ok_or_else(|| EngineError::Model { what: format!("buffer '{name}'") })
        };
        let buffers = Buffers {
            tokens: find("input.tokens")?,
            count: find("input.count")?,
            forced: find("input.forced")?,
            params: find("input.params")?,
            seed: find("input.seed")?,
            bias_tokens: find("input.bias_tokens")?,
            bias_values: find("input.bias_values")?,
            token: find("output.token")?,
            scores: find("output.logits")?,
            logits: find("sampler.logits")?,
            cursor: find("cursor")?,
        };
        for phase in Phase::ALL {
            if !model.model().plans.iter().any(|p| p.key.phase == phase) {
                return Err(EngineError::Model { what: format!("plan for {phase}") });
            }
        }
        let context = model.model().plans.iter().map(|p| p.key.context).max().unwrap_or(0);
        let (vocabulary, bias_entries) =
            (table[buffers.logits].cols(), table[buffers.bias_tokens].cols());
        let layout = file_layout(&model);
        let fingerprint = Fingerprint {
            weights: Digest(identity.weights),
            plan: Digest(identity.plan),
            kernels: Digest::of(device.kernels.as_bytes()),
            device: Digest::of(device.class.as_bytes()),
            layout: layout.digest(),
            labels: Labels {
                weights: cut(&identity.name),
                plan: cut(&identity.name),
                kernels: cut(&device.kernels),
                device: cut(&device.class),
                layout: format!("{} state tensors", layout.tensors.len()),
            },
        };
        let scope =
            LineageScope { fingerprint: fingerprint.digest(), salt: salt_digest(&options.salt) };
        let load = LoadOptions { slots: options.slots, capsule_bytes: options.capsule_bytes };
        let program = backend.load(Arc::clone(&model), weights, load, progress)?;
        let id = NEXT_ENGINE.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            program,
            state: StateRegions::of(&model),
            buffers,
            slots: BTreeMap::new(),
            fingerprint,
            layout,
            scope,
            id,
            device,
            forced: None,
            vocabulary,
            bias_entries,
            context,
            poison: false,
            known: KnownNodes::default(),
            model,
        })
    }

    /// What it runs on.
    pub const fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// What a capsule must match to fit.
    pub const fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Tokens of the vocabulary.
    pub const fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Tokens that a slot holds at most.
    pub const fn context(&self) -> usize {
        self.context
    }

    /// The sealed model.
    pub const fn model(&self) -> &Arc<Sealed> {
        &self.model
    }

    /// Counts of the backend since load.
    pub fn counters(&self) -> Counters {
        self.program.counters()
    }

    /// Bytes of capsules in memory, and the budget.
    pub fn capsule_bytes(&self) -> (usize, usize) {
        self.program.frozen_bytes()
    }

    /// For tests: overwrites all Scratch, Output and Input with NaNs before every replay, and rows of the slot that
    /// hold nothing.
    pub const fn poison_between_replays(&mut self, on: bool) {
        self.poison = on;
    }

    /// Takes a slot, empty at position 0.
    ///
    /// # Errors
    /// If no slot is free or the device fails.
    pub fn create_slot(&mut self) -> Result<SlotId, EngineError> {
        let slot = self.program.create_slot()?;
        self.slots.insert(slot, Slot::new());
        if let Err(error) = self.reset(slot) {
            self.slots.remove(&slot);
            let _ = self.program.drop_slot(slot);
            return Err(error);
        }
        Ok(slot)
    }

    /// Gives a slot back.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn drop_slot(&mut self, slot: SlotId) -> Result<(), EngineError> {
        self.slots.remove(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        Ok(self.program.drop_slot(slot)?)
    }

    /// Empties a slot: position 0, nothing read, greedy sampling.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn reset(&mut self, slot: SlotId) -> Result<(), EngineError> {
        let entry = self.slots.get_mut(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        let held = std::mem::take(&mut entry.held);
        *entry = Slot::new();
        let greedy = Event::Configure(Box::default());
        let emptied = self.run(slot, Phase::Reset, 0).and_then(|()| self.apply(slot, &greedy));
        match emptied {
            Ok(()) => {
                self.slots.entry(slot).and_modify(|s| s.held = held);
                Ok(())
            }
            Err(error) => {
                self.empty(slot, &error.to_string());
                Err(error)
            }
        }
    }

    /// The slot, if it has state.
    pub(crate) fn slot(&self, slot: SlotId) -> Result<&Slot, EngineError> {
        let entry = self.slots.get(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })?;
        match &entry.failure {
            Some(cause) => Err(EngineError::SlotEmpty { slot: slot.0, cause: cause.clone() }),
            None => Ok(entry),
        }
    }

    pub(crate) fn slot_mut(&mut self, slot: SlotId) -> Result<&mut Slot, EngineError> {
        self.slot(slot)?;
        self.slots.get_mut(&slot).ok_or(EngineError::NoSuchSlot { slot: slot.0 })
    }

    /// Tokens the slot has read.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn position(&self, slot: SlotId) -> Result<u32, EngineError> {
        Ok(self.slot(slot)?.position())
    }

    /// The tokens the slot has read.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn tokens(&self, slot: SlotId) -> Result<Vec<u32>, EngineError> {
        let slot = self.slot(slot)?;
        let nodes = crate::lineage::path(slot.chain.as_ref());
        Ok(nodes.iter().flat_map(|n| &n.tokens).chain(&slot.tail).copied().collect())
    }

    /// How the slot's rows were made.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn history(&self, slot: SlotId) -> Result<&History, EngineError> {
        Ok(&self.slot(slot)?.history)
    }

    /// Reads known tokens, many at a time. `control` is asked after each chunk and may stop there; the slot then
    /// stands at the chunk's end. Returns how many tokens were read.
    ///
    /// Chunks end on an absolute grid. The logits afterwards, and every row, do not depend on where chunks end.
    ///
    /// # Errors
    /// If a token is outside the vocabulary or the context too short, nothing is read. If the device fails the slot
    /// is empty and says so.
    pub fn append(
        &mut self,
        slot: SlotId,
        tokens: &[u32],
        control: Control<'_>,
    ) -> Result<usize, EngineError> {
        self.check_append(slot, tokens)?;
        let mut done = 0;
        while done < tokens.len() {
            let n = self.chunk(Phase::Prefill, self.position(slot)? as usize, tokens.len() - done);
            self.read_chunk(slot, Phase::Prefill, &tokens[done..done + n])?;
            done += n;
            if control(PrefillProgress { done, total: tokens.len() }).is_break() {
                break;
            }
        }
        Ok(done)
    }

    /// Reads known tokens and gives `sink` the logits after each, a row of the vocabulary's size. Returns how many
    /// tokens were read: where `sink` breaks off, up to the end of the chunk, which may be more than it saw.
    ///
    /// Rows of many tokens may go through other kernels than the one row that a slot keeps for its next token: on a GPU the last
    /// row and [`Engine::logits`] may differ in their last bits.
    ///
    /// # Errors
    /// As [`Engine::append`].
    pub fn score(
        &mut self,
        slot: SlotId,
        tokens: &[u32],
        sink: &mut dyn FnMut(&[f32]) -> ControlFlow<()>,
    ) -> Result<usize, EngineError> {
        self.check_append(slot, tokens)?;
        let mut bytes = vec![0; 4 * self.vocabulary];
        let mut row = vec![0.0; self.vocabulary];
        let mut done = 0;
        while done < tokens.len() {
            let n = self.chunk(Phase::Score, self.position(slot)? as usize, tokens.len() - done);
            self.read_chunk(slot, Phase::Score, &tokens[done..done + n])?;
            for t in 0..n {
                let read =
                    self.program.read_output(self.buffers.scores, t * bytes.len(), &mut bytes);
                self.survive(slot, read)?;
                floats(&bytes, &mut row);
                if sink(&row).is_break() {
                    return Ok(done + n);
                }
            }
            done += n;
        }
        Ok(done)
    }

    fn check_append(&self, slot: SlotId, tokens: &[u32]) -> Result<(), EngineError> {
        let position = self.slot(slot)?.position();
        if tokens.len() > self.context - (position as usize).min(self.context) {
            return Err(EngineError::ContextFull {
                position,
                wanted: tokens.len(),
                context: self.context,
            });
        }
        match tokens.iter().find(|&&t| t as usize >= self.vocabulary) {
            Some(&token) => Err(EngineError::TokenRange { token, vocabulary: self.vocabulary }),
            None => Ok(()),
        }
    }

    /// Tokens of the next chunk: up to the next multiple of the largest bucket.
    fn chunk(&self, phase: Phase, position: usize, left: usize) -> usize {
        let grid = self.model.model().token_buckets(phase).last().copied().unwrap_or(1);
        left.min(grid - position % grid)
    }

    fn read_chunk(
        &mut self,
        slot: SlotId,
        phase: Phase,
        tokens: &[u32],
    ) -> Result<(), EngineError> {
        self.forget_rows_from_here(slot)?;
        self.poison_if_asked(slot)?;
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        self.write_input(slot, self.buffers.tokens, &bytes)?;
        self.write_input(slot, self.buffers.count, &(tokens.len() as u32).to_le_bytes())?;
        self.run(slot, phase, tokens.len())?;
        self.record(slot, Origin::Prefill, tokens)
    }

    /// Draws a token and reads it: one step of decode. Returns the token.
    ///
    /// # Errors
    /// If nothing has been read yet, or the context is full, nothing changes. If the device fails the slot is empty
    /// and says so.
    pub fn step(&mut self, slot: SlotId) -> Result<u32, EngineError> {
        self.decode(slot, -1)
    }

    /// A step of decode that takes a known token instead of drawing one. The state afterwards is that of a step
    /// that drew it.
    ///
    /// # Errors
    /// As [`Engine::step`], and if the token is outside the vocabulary.
    pub fn step_forced(&mut self, slot: SlotId, token: u32) -> Result<(), EngineError> {
        if token as usize >= self.vocabulary {
            return Err(EngineError::TokenRange { token, vocabulary: self.vocabulary });
        }
        self.decode(slot, token.cast_signed()).map(|_| ())
    }

    fn decode(&mut self, slot: SlotId, forced: i32) -> Result<u32, EngineError> {
        let position = self.slot(slot)?.position();
        if position == 0 {
            return Err(EngineError::NothingRead { slot: slot.0 });
        }
        if position as usize >= self.context {
            return Err(EngineError::ContextFull { position, wanted: 1, context: self.context });
        }
        self.forget_rows_from_here(slot)?;
        self.poison_if_asked(slot)?;
        if self.forced != Some(forced) {
            self.write_input(slot, self.buffers.forced, &forced.to_le_bytes())?;
            self.forced = Some(forced);
        }
        self.run(slot, Phase::Decode, 1)?;
        let mut token = [0; 4];
        let read = self.program.read_output(self.buffers.token, 0, &mut token);
        self.survive(slot, read)?;
        let token = u32::from_le_bytes(token);
        self.record(slot, Origin::Decode, &[token])?;
        Ok(token)
    }

    /// Sets the sampling parameters from here on.
    ///
    /// # Errors
    /// If a parameter is out of range, nothing changes.
    pub fn configure(&mut self, slot: SlotId, params: &SamplingParams) -> Result<(), EngineError> {
        self.check_sampling(params)?;
        self.event(slot, Event::Configure(Box::new(params.clone())))
    }

    /// Checks sampling parameters without setting them.
    ///
    /// # Errors
    /// If a parameter is out of range.
    pub fn check_sampling(&self, params: &SamplingParams) -> Result<(), EngineError> {
        params.check(self.vocabulary, self.bias_entries)
    }

    /// Sets the random stream's seed alone.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn reseed(&mut self, slot: SlotId, seed: u64) -> Result<(), EngineError> {
        self.event(slot, Event::Reseed(seed))
    }

    /// Starts a reply: presence and frequency penalties forget what was generated before.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn begin_reply(&mut self, slot: SlotId) -> Result<(), EngineError> {
        self.event(slot, Event::Begin)
    }

    pub(crate) fn event(&mut self, slot: SlotId, event: Event) -> Result<(), EngineError> {
        let position = self.slot(slot)?.position();
        self.apply(slot, &event)?;
        self.slot_mut(slot)?.events.push(Stamped { position, event });
        Ok(())
    }

    fn apply(&mut self, slot: SlotId, event: &Event) -> Result<(), EngineError> {
        self.poison_if_asked(slot)?;
        let seed = |seed: u64| [seed as u32, (seed >> 32) as u32].map(u32::to_le_bytes).concat();
        match event {
            Event::Begin => self.run(slot, Phase::Begin, 0),
            Event::Reseed(value) => {
                self.write_input(slot, self.buffers.seed, &seed(*value))?;
                self.run(slot, Phase::Reseed, 0)
            }
            Event::Configure(params) => {
                let values = params.buffer(self.vocabulary).map(f32::to_le_bytes).concat();
                let mut bias_tokens = vec![-1_i32; self.bias_entries];
                let mut bias_values = vec![0.0_f32; self.bias_entries];
                for (entry, &(token, value)) in params.logit_bias.iter().enumerate() {
                    (bias_tokens[entry], bias_values[entry]) = (token.cast_signed(), value);
                }
                let bias_tokens: Vec<u8> =
                    bias_tokens.into_iter().flat_map(i32::to_le_bytes).collect();
                let bias_values: Vec<u8> =
                    bias_values.into_iter().flat_map(f32::to_le_bytes).collect();
                self.write_input(slot, self.buffers.params, &values)?;
                self.write_input(slot, self.buffers.seed, &seed(params.seed))?;
                self.write_input(slot, self.buffers.bias_tokens, &bias_tokens)?;
                self.write_input(slot, self.buffers.bias_values, &bias_values)?;
                self.run(slot, Phase::Configure, 0)
            }
        }
    }

    /// The logits after the last token read.
    ///
    /// # Errors
    /// If nothing has been read, or the device fails.
    pub fn logits(&mut self, slot: SlotId) -> Result<Vec<f32>, EngineError> {
        if self.slot(slot)?.position() == 0 {
            return Err(EngineError::NothingRead { slot: slot.0 });
        }
        let mut bytes = vec![0; 4 * self.vocabulary];
        self.read_state(slot, &Region { buffer: self.buffers.logits, rows: 0..1 }, &mut bytes)?;
        let mut out = vec![0.0; self.vocabulary];
        floats(&bytes, &mut out);
        Ok(out)
    }

    /// Every byte of the slot's state at its position, State buffer by State buffer.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn state_bytes(&mut self, slot: SlotId) -> Result<Vec<(String, Vec<u8>)>, EngineError> {
        let position = self.slot(slot)?.position() as usize;
        let regions = self.state.at(position);
        let mut out = Vec::with_capacity(regions.len());
        for region in regions {
            let mut bytes = vec![0; region.bytes(&self.model.model().buffers)];
            self.read_state(slot, &region, &mut bytes)?;
            out.push((self.model.buffer(region.buffer).name.clone(), bytes));
        }
        Ok(out)
    }

    /// The bytes of one Fixed State buffer of the slot, by name; `None` if the model has no such buffer.
    ///
    /// # Errors
    /// If there is no such slot or the device fails.
    pub fn fixed_state(
        &mut self,
        slot: SlotId,
        name: &str,
    ) -> Result<Option<Vec<u8>>, EngineError> {
        self.slot(slot)?;
        let mut regions = self.state.fixed().iter();
        let named = regions.find(|r| self.model.buffer(r.buffer).name == name);
        let Some(region) = named.cloned() else { return Ok(None) };
        let mut bytes = vec![0; region.bytes(&self.model.model().buffers)];
        self.read_state(slot, &region, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Waits until everything asked so far is done.
    ///
    /// # Errors
    /// If the device failed.
    pub fn synchronize(&mut self) -> Result<(), EngineError> {
        Ok(self.program.synchronize()?)
    }

    /// The device's own view of the position, for checks.
    pub(crate) fn cursor(&mut self, slot: SlotId) -> Result<u32, EngineError> {
        let mut bytes = [0; 16];
        self.read_state(slot, &Region { buffer: self.buffers.cursor, rows: 0..1 }, &mut bytes)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// Runs the smallest plan of the phase that holds `tokens` tokens at the slot's position.
    fn run(&mut self, slot: SlotId, phase: Phase, tokens: usize) -> Result<(), EngineError> {
        let end = self.slots.get(&slot).map_or(0, Slot::position) as usize + tokens;
        let plans = self.model.model().plans.iter().enumerate();
        let fitting = plans.filter(|(_, p)| {
            p.key.phase == phase && p.key.tokens >= tokens && p.key.context >= end
        });
        let plan =
            fitting.min_by_key(|(_, p)| (p.key.tokens, p.key.context)).map(|(index, _)| index);
        let plan = plan.ok_or_else(|| EngineError::Model {
            what: format!("{phase} plan for {tokens} tokens at {end}"),
        })?;
        let result = self.program.run(slot, plan);
        self.survive(slot, result)
    }

    /// Passes a result on; where the device failed, the slot's state is unknown, so it is emptied and says so.
    ///
    /// Refusals (a budget, a wrong buffer) come before anything is changed and leave the slot as it was.
    pub(crate) fn survive<T>(
        &mut self,
        slot: SlotId,
        result: Result<T, BackendError>,
    ) -> Result<T, EngineError> {
        result.map_err(|error| {
            if !is_refusal(&error) {
                self.empty(slot, &error.to_string());
            }
            error.into()
        })
    }

    /// Empties a slot whose state is unknown.
    pub(crate) fn empty(&mut self, slot: SlotId, cause: &str) {
        if let Some(entry) = self.slots.get_mut(&slot) {
            *entry = Slot::new();
            entry.failure = Some(cause.to_owned());
        }
    }

    fn write_input(
        &mut self,
        slot: SlotId,
        buffer: BufferId,
        bytes: &[u8],
    ) -> Result<(), EngineError> {
        let written = self.program.write_input(buffer, bytes);
        self.survive(slot, written)
    }

    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), EngineError> {
        let read = self.program.read_state(slot, region, into);
        self.survive(slot, read)
    }

    fn poison_if_asked(&mut self, slot: SlotId) -> Result<(), EngineError> {
        if self.poison {
            let poisoned = self.program.poison();
            self.survive(slot, poisoned)?;
            self.forced = None;
            self.poison_rows_ahead(slot)?;
        }
        Ok(())
    }

    /// NaNs in the rows behind the last that the slot holds: no kernel may read what was never appended.
    fn poison_rows_ahead(&mut self, slot: SlotId) -> Result<(), EngineError> {
        let Some(entry) = self.slots.get(&slot) else { return Ok(()) };
        let held = entry.held.last().map_or(0, |n| n.end());
        let start = entry.position().max(held) as usize;
        let rows = start..(start + POISONED_ROWS).min(self.context);
        let regions = self.state.rows(&rows);
        if rows.is_empty() || regions.is_empty() {
            return Ok(());
        }
        // 0x7fc0 is a NaN in bf16 and f16, and twice over in f32.
        let nans =
            |region: &Region| 0x7fc0_u16.to_le_bytes().repeat(region.bytes(self.buffers()) / 2);
        let bytes: Vec<Vec<u8>> = regions.iter().map(nans).collect();
        let bytes: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        let frozen = self.program.freeze_bytes(&regions, &bytes);
        let frozen = self.survive(slot, frozen)?;
        let thawed = self.program.thaw(slot, &[frozen]);
        self.survive(slot, thawed)
    }

    /// Rows at and past the position are about to be overwritten: nodes that reach there are no longer held.
    fn forget_rows_from_here(&mut self, slot: SlotId) -> Result<(), EngineError> {
        let slot = self.slot_mut(slot)?;
        let position = slot.position();
        while slot.held.last().is_some_and(|n| n.end() > position) {
            slot.held.pop();
        }
        Ok(())
    }

    fn record(&mut self, slot: SlotId, origin: Origin, tokens: &[u32]) -> Result<(), EngineError> {
        let slot = self.slot_mut(slot)?;
        slot.history.append(origin, tokens.len() as u32)?;
        slot.tail.extend_from_slice(tokens);
        Ok(())
    }
}

/// Whether the backend refused before it changed anything.
fn is_refusal(error: &BackendError) -> bool {
    matches!(
        error,
        BackendError::CapsuleBudget { .. }
            | BackendError::OutOfMemory { .. }
            | BackendError::WrongBuffer { .. }
            | BackendError::ForeignState
            | BackendError::NoFreeSlot { .. }
            | BackendError::NoSuchSlot { .. }
            | BackendError::NoSuchPlan { .. }
    )
}

/// The State of a model as a capsule file describes it, the same for every context length.
fn file_layout(model: &Sealed) -> StateLayout {
    let tensor = |&id: &BufferId| {
        let buffer = model.buffer(id);
        let grows = buffer.growth() == Some(ampoule_plan::Growth::Rows);
        let mut shape = buffer.shape.clone();
        if grows {
            shape[0] = FILE_CONTEXT;
        }
        let kind = match &buffer.role {
            ampoule_plan::Role::State { kind, .. } => kind.to_string(),
            _ => String::new(),
        };
        let growth = if grows { Growth::Rows } else { Growth::Fixed };
        StateTensor { name: buffer.name.clone(), dtype: buffer.dtype, shape, kind, growth }
    };
    StateLayout { tensors: model.state().iter().map(tensor).collect() }
}

fn floats(bytes: &[u8], out: &mut [f32]) {
    for (value, word) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    }
}

/// Labels in a manifest are at most 255 bytes.
fn cut(text: &str) -> String {
    text.chars()
        .scan(0, |bytes, c| {
            *bytes += c.len_utf8();
            (*bytes <= 255).then_some(c)
        })
        .collect()
}
