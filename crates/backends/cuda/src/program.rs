//! A model resident on a GPU: slots, graphs, inputs, outputs, frozen state.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use ampoule_backend::{
    BackendError, Counters, Frozen, LoadOptions, Part, Program, Progress, Region, Residence,
    SlotId, StepTime, WeightSource, check_regions,
};
use ampoule_plan::{Access, Buffer, BufferId, CostPoint, Growth, Op, Role, Sealed, StateKind};

use crate::capture::{CaptureGuard, Graph};
use crate::device::{CudaOptions, Device};
use crate::driver::{Event, device_error};
use crate::frozen::{CapsuleStore, CudaFrozen, Transfer, apart, copy, copy_on, resolve};
use crate::fuse::{self, Step};
use crate::launch::{Launcher, attention_workspace};
use crate::lt::{self, Products};
use crate::memory::{MIRRORS, Resident, WorkspaceSizes};
use crate::pinned::PinnedFrozen;
use crate::staging::{Downloader, UploadRing};
use crate::weights;

/// Bytes of one of the eight segments through which inputs go.
const UPLOAD_SEGMENT: usize = 1 << 20;
/// Bytes of each of the two areas through which outputs come.
const DOWNLOAD: usize = 4 << 20;
/// Inputs up to this size are remembered, and not sent again while they stay the same.
const REMEMBERED: usize = 4096;
/// A quiet NaN as f32, and two as bf16 or f16.
const POISON: u32 = 0x7FC0_7FC0;
/// How long a token may take before the device is taken for hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of rows from which on they are copied beside replays: less takes no longer than getting it started there.
const ASIDE: usize = 16 << 20;
/// Replays in a row by which [`Program::time_together`] measures.
const TOGETHER: usize = 16;

/// What a graph keeps alive.
struct Owned {
    #[allow(dead_code)]
    resident: Arc<Resident>,
    #[allow(dead_code)]
    products: Arc<Products>,
}

impl Drop for CudaProgram {
    fn drop(&mut self) {
        // Copies from pinned memory may still be pending.
        let _ = self.resident.stream.synchronize();
        let chained = &self.resident.device.chained;
        let mut last = chained.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_some_and(|event| Arc::ptr_eq(event, &self.chain_end)) {
            *last = None;
        }
    }
}

/// What a plan does besides its kernels.
struct PlanFacts {
    steps: Vec<Step>,
    /// Outputs it writes; those with `true` are token outputs of its only sample op, mirrored to the host.
    outputs: Vec<(BufferId, bool)>,
    samples: u64,
    /// Whether a launch of it does several products, with blocks that wait for each other.
    chained: bool,
    /// Whether it does anything to a cursor but move it on, or to rows but append: rows below the cursor may change.
    rewinds: bool,
}

#[derive(Clone, Default)]
struct Slot {
    used: bool,
    /// After the last copy of its rows beside replays.
    copied: Option<Arc<Event>>,
}

pub(crate) struct CudaProgram {
    // Graphs go before what they run over. One per plan, for all slots.
    graphs: Vec<Graph<Owned>>,
    slots: Vec<Slot>,
    /// The slot that replays run on.
    entered: Option<usize>,
    resident: Arc<Resident>,
    products: Arc<Products>,
    store: Arc<CapsuleStore>,
    facts: Vec<PlanFacts>,
    options: CudaOptions,
    uploads: UploadRing,
    downloads: Downloader,
    remembered: HashMap<BufferId, Vec<u8>>,
    /// Of token outputs whose last value is in the mirror: its number.
    mirrored: HashMap<BufferId, u64>,
    /// Sample ops enqueued since load.
    sampled: u64,
    counters: Counters,
    /// After this program's last graph with chains.
    chain_end: Arc<Event>,
    /// The plan replayed last, and where.
    last: Option<(usize, SlotId)>,
}

/// An error of the device with the plan that it most likely comes from, and how to find the kernel.
fn blamed(error: BackendError, plan: &str, slot: SlotId) -> BackendError {
    let BackendError::Device { device, problem } = error else { return error };
    let problem = format!(
        "{problem}; the last replay was of plan '{plan}' in slot {}: with AMPOULE_CUDA_FUSION=0 every op is a kernel of its own, \
         and compute-sanitizer names the one that fails",
        slot.0
    );
    BackendError::Device { device, problem }
}

/// Loads a model.
pub(crate) fn load(
    device: &Arc<Device>,
    options: CudaOptions,
    model: &Arc<Sealed>,
    source: &dyn WeightSource,
    load: LoadOptions,
    progress: Progress<'_>,
) -> Result<Box<dyn Program>, BackendError> {
    let plans = &model.model().plans;
    let mut sizes = WorkspaceSizes { product: lt::WORKSPACE, ..WorkspaceSizes::default() };
    for plan in plans {
        attention_workspace(&model.model().buffers, plan, &mut sizes);
    }
    let facts = plans
        .iter()
        .map(|plan| PlanFacts {
            steps: fuse::steps(&model.model().buffers, plan, options.fusion),
            outputs: outputs_of(model, &plan.ops),
            chained: false,
            rewinds: rewinds(model, &plan.ops),
            samples: plan.ops.iter().filter(|op| matches!(op, Op::Sample(_))).count() as u64,
        })
        .collect();
    let resident = Arc::new(Resident::allocate(device, model, load, sizes)?);
    weights::load(&resident, source, progress)?;
    let products =
        if load.slots == 0 { Products::default() } else { Products::choose(&resident, options)? };
    let products = Arc::new(products);
    let context = &device.context;
    let store = CapsuleStore::new(&resident, load.capsule_bytes)?;
    let mut program = CudaProgram {
        graphs: Vec::new(),
        slots: vec![Slot::default(); load.slots],
        entered: None,
        uploads: UploadRing::new(context, UPLOAD_SEGMENT)?,
        downloads: Downloader::new(context, DOWNLOAD)?,
        counters: Counters { allocations: resident.allocations, ..Counters::default() },
        chain_end: Arc::new(Event::new(context, false)?),
        last: None,
        resident,
        products,
        store,
        facts,
        options,
        remembered: HashMap::new(),
        mirrored: HashMap::new(),
        sampled: 0,
    };
    if load.slots > 0 {
        program.capture()?;
    }
    program.resident.stream.synchronize()?;
    Ok(Box::new(program))
}

/// Outputs that ops write, and whether a token output is written by one sample op alone.
fn outputs_of(model: &Sealed, ops: &[Op]) -> Vec<(BufferId, bool)> {
    let mut writers: HashMap<BufferId, Vec<bool>> = HashMap::new();
    for op in ops {
        for operand in op.operands() {
            let buffer = model.buffer(operand.view.buffer);
            let writes = matches!(operand.access, Access::Write | Access::Update);
            if writes && buffer.role == Role::Output {
                let token = matches!(op, Op::Sample(_)) && operand.field == "token";
                writers.entry(operand.view.buffer).or_default().push(token && buffer.bytes() == 4);
            }
        }
    }
    let samples = ops.iter().filter(|op| matches!(op, Op::Sample(_))).count();
    writers.into_iter().map(|(id, w)| (id, samples == 1 && w == [true])).collect()
}

/// See [`PlanFacts::rewinds`].
fn rewinds(model: &Sealed, ops: &[Op]) -> bool {
    ops.iter().any(|op| {
        op.operands().into_iter().any(|operand| {
            let Role::State { kind, growth, .. } = &model.buffer(operand.view.buffer).role else {
                return false;
            };
            let moves = *kind == StateKind::Cursor && !matches!(op, Op::Advance(_));
            let writes = operand.access.writes();
            writes && (moves || *growth == Growth::Rows && !matches!(op, Op::KvAppend(_)))
        })
    })
}

impl CudaProgram {
    fn model(&self) -> &Arc<Sealed> {
        &self.resident.model
    }

    fn slot(&self, slot: SlotId) -> Result<usize, BackendError> {
        let index = slot.0 as usize;
        match self.slots.get(index) {
            Some(s) if s.used => Ok(index),
            _ => Err(BackendError::NoSuchSlot { slot: slot.0 }),
        }
    }

    fn has_plan(&self, plan: usize) -> Result<(), BackendError> {
        let plans = self.facts.len();
        if plan < plans { Ok(()) } else { Err(BackendError::NoSuchPlan { plan, plans }) }
    }

    /// A slot's index, and the launches that a plan is made of.
    fn launches(
        &self,
        slot: SlotId,
        plan: usize,
    ) -> Result<(usize, Vec<Range<usize>>), BackendError> {
        let index = self.slot(slot)?;
        self.has_plan(plan)?;
        let launcher = Launcher::new(&self.resident, plan, self.options, &self.products);
        let of_plan = &self.model().model().plans[plan];
        Ok((index, launcher.launches(of_plan, &self.facts[plan].steps)))
    }

    fn buffer(&self, id: BufferId) -> Result<&Buffer, BackendError> {
        self.resident.model.model().buffers.lookup(id).ok_or_else(|| BackendError::WrongBuffer {
            buffer: format!("#{}", id.0),
            problem: "is of another model".to_owned(),
        })
    }

    /// Captures every plan.
    fn capture(&mut self) -> Result<(), BackendError> {
        let model = Arc::clone(self.model());
        for (index, plan) in model.model().plans.iter().enumerate() {
            let launcher = Launcher::new(&self.resident, index, self.options, &self.products);
            let guard = CaptureGuard::begin(&self.resident.stream)?;
            let launches = launcher.launches(plan, &self.facts[index].steps);
            self.facts[index].chained = launches.iter().any(|l| l.len() > 1);
            for steps in launches {
                launcher.steps(plan, &self.facts[index].steps[steps])?;
            }
            let owned = Owned {
                resident: Arc::clone(&self.resident),
                products: Arc::clone(&self.products),
            };
            let graph = guard.finish(Arc::new(owned))?;
            if self.options.trace {
                let (ops, steps) = (plan.ops.len(), self.facts[index].steps.len());
                let nodes = graph.nodes();
                eprintln!(
                    "ampoule-cuda: '{}': {ops} ops, {steps} steps, {nodes} kernels",
                    plan.key
                );
            }
            self.graphs.push(graph);
            self.counters.captures += 1;
        }
        Ok(())
    }

    /// Lets what is enqueued from now on wait for copies of the slot's rows that still run beside it.
    fn settle(&mut self, slot: usize) -> Result<(), BackendError> {
        if let Some(copied) = &self.slots[slot].copied
            && !copied.done()?
        {
            self.resident.stream.wait(copied)?;
        }
        self.store.done_with(self.slots[slot].copied.take());
        Ok(())
    }

    /// Replays enqueued from now on run on this slot.
    fn enter(&mut self, slot: usize) -> Result<(), BackendError> {
        if self.entered != Some(slot) {
            self.entered = None;
            self.resident.enter(slot)?;
            self.entered = Some(slot);
        }
        Ok(())
    }

    /// Milliseconds of these launches of a plan as one graph, `times` of which run in a row: the median of nine.
    fn time_alike(
        &mut self,
        slot: usize,
        plan: usize,
        position: u32,
        launches: &[Range<usize>],
        times: usize,
    ) -> Result<f64, BackendError> {
        let model = Arc::clone(self.model());
        self.settle(slot)?;
        self.enter(slot)?;
        let launcher = Launcher::new(&self.resident, plan, self.options, &self.products);
        let guard = CaptureGuard::begin(&self.resident.stream)?;
        for steps in launches {
            launcher.steps(&model.model().plans[plan], &self.facts[plan].steps[steps.clone()])?;
        }
        let owned =
            Owned { resident: Arc::clone(&self.resident), products: Arc::clone(&self.products) };
        let graph = guard.finish(Arc::new(owned))?;
        self.counters.captures += 1;
        let cursors: Vec<(u64, usize)> = model
            .model()
            .buffers
            .iter()
            .filter(|(_, b)| matches!(b.role, Role::State { kind: StateKind::Cursor, .. }))
            .map(|(id, b)| (self.resident.address(id, slot), b.bytes() / 4))
            .collect();
        let context = &self.resident.device.context;
        let mut taken = Vec::new();
        for round in 0..11 {
            for &(at, words) in &cursors {
                // SAFETY: the whole buffer.
                unsafe { self.resident.stream.fill(at, position, words)? };
            }
            let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
            start.record(&self.resident.stream)?;
            for _ in 0..times {
                self.launch_in_turn(&graph, launches.iter().any(|l| l.len() > 1))?;
            }
            end.record(&self.resident.stream)?;
            end.synchronize()?;
            if round > 1 {
                taken.push(f64::from(end.milliseconds_since(&start)?));
            }
        }
        // The device counts its samples, and tokens are known by their number.
        let ops = &model.model().plans[plan].ops;
        let sampling = |step: &&Step| step.ops().iter().any(|&o| matches!(ops[o], Op::Sample(_)));
        let steps = launches.iter().flat_map(|l| &self.facts[plan].steps[l.clone()]);
        self.sampled += (11 * times * steps.filter(sampling).count()) as u64;
        self.mirrored.clear();
        taken.sort_by(f64::total_cmp);
        Ok(taken[taken.len() / 2])
    }

    /// Launches a graph; one with chains after those of other programs on the GPU.
    fn launch_in_turn(&self, graph: &Graph<Owned>, chained: bool) -> Result<(), BackendError> {
        if !chained {
            return graph.launch();
        }
        let chained = &self.resident.device.chained;
        let mut last = chained.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = last.as_ref().filter(|e| !Arc::ptr_eq(e, &self.chain_end)) {
            self.resident.stream.wait(event)?;
        }
        graph.launch()?;
        self.chain_end.record(&self.resident.stream)?;
        *last = Some(Arc::clone(&self.chain_end));
        Ok(())
    }

    fn wait(&mut self) -> Result<(), BackendError> {
        self.counters.synchronizations += 1;
        self.resident.stream.synchronize().map_err(|error| self.blamed(error))
    }

    /// The driver tells of a fault at some later call: says what ran last.
    fn blamed(&self, error: BackendError) -> BackendError {
        let Some((plan, slot)) = self.last else { return error };
        let key = self.resident.model.model().plans[plan].key.to_string();
        blamed(error, &key, slot)
    }

    /// Waits for the token with this number in mapped host memory.
    fn mirrored_token(&mut self, number: u64) -> Result<u32, BackendError> {
        self.awaited_token(number).map_err(|error| self.blamed(error))
    }

    fn awaited_token(&mut self, number: u64) -> Result<u32, BackendError> {
        self.counters.synchronizations += 1;
        let entry = (number - 1) as usize % MIRRORS;
        let expected = number as u32;
        // SAFETY: the entry lies in the mirror.
        let at = unsafe { self.resident.mirror.words().add(entry) };
        let begun = Instant::now();
        let mut spins = 0_u32;
        loop {
            // SAFETY: aligned and mapped; the device writes the word in one store.
            let word = unsafe { at.read_volatile() };
            if (word >> 32) as u32 == expected {
                std::sync::atomic::fence(Ordering::Acquire);
                return Ok(word as u32);
            }
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 14) {
                if self.resident.stream.idle()? {
                    // SAFETY: as above. The store may have landed between the two looks.
                    let word = unsafe { at.read_volatile() };
                    if (word >> 32) as u32 == expected {
                        return Ok(word as u32);
                    }
                    return Err(device_error("op sample: the token did not arrive".to_owned()));
                }
                if begun.elapsed() > PATIENCE {
                    return Err(device_error(format!("op sample: no token within {PATIENCE:?}")));
                }
            }
        }
    }

    fn upload(&mut self, at: u64, bytes: &[u8]) -> Result<(), BackendError> {
        for (i, part) in bytes.chunks(self.uploads.segment()).enumerate() {
            let to = at + (i * self.uploads.segment()) as u64;
            // SAFETY: the callers check that the bytes lie in a buffer or a frozen range.
            let waited = unsafe {
                self.uploads.upload(&self.resident.stream, to, part.len(), |area| {
                    area.copy_from_slice(part);
                    Ok(())
                })?
            };
            self.counters.synchronizations += u64::from(waited);
        }
        Ok(())
    }
}

fn wrong(buffer: &Buffer, problem: String) -> BackendError {
    BackendError::WrongBuffer { buffer: buffer.name.clone(), problem }
}

impl Program for CudaProgram {
    fn model(&self) -> &Arc<Sealed> {
        &self.resident.model
    }

    fn create_slot(&mut self) -> Result<SlotId, BackendError> {
        let Some(index) = self.slots.iter().position(|slot| !slot.used) else {
            return Err(BackendError::NoFreeSlot { slots: self.slots.len() });
        };
        self.slots[index].used = true;
        Ok(SlotId(index as u32))
    }

    fn drop_slot(&mut self, slot: SlotId) -> Result<(), BackendError> {
        let index = self.slot(slot)?;
        self.slots[index].used = false;
        Ok(())
    }

    fn write_input(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), BackendError> {
        let b = self.buffer(buffer)?;
        if b.role != Role::Input {
            return Err(wrong(b, "is no Input".to_owned()));
        }
        if bytes.len() > b.bytes() {
            return Err(wrong(b, format!("has {} bytes, not {}", b.bytes(), bytes.len())));
        }
        if self.remembered.get(&buffer).is_some_and(|old| old.starts_with(bytes)) {
            return Ok(());
        }
        self.upload(self.resident.address(buffer, 0), bytes)?;
        if bytes.len() <= REMEMBERED {
            let known = self.remembered.entry(buffer).or_default();
            if known.len() < bytes.len() {
                known.resize(bytes.len(), 0);
            }
            known[..bytes.len()].copy_from_slice(bytes);
        } else {
            self.remembered.remove(&buffer);
        }
        Ok(())
    }

    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError> {
        let index = self.slot(slot)?;
        self.has_plan(plan)?;
        let ready = if self.facts[plan].rewinds { self.settle(index) } else { Ok(()) };
        ready.and_then(|()| self.enter(index)).map_err(|error| self.blamed(error))?;
        let facts = &self.facts[plan];
        self.last = Some((plan, slot));
        self.launch_in_turn(&self.graphs[plan], facts.chained)
            .map_err(|error| self.blamed(error))?;
        self.counters.launches += 1;
        self.sampled += facts.samples;
        for &(output, mirrored) in &facts.outputs {
            if mirrored {
                self.mirrored.insert(output, self.sampled);
            } else {
                self.mirrored.remove(&output);
            }
        }
        Ok(())
    }

    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        let b = self.buffer(buffer)?;
        if b.role != Role::Output {
            return Err(wrong(b, "is no Output".to_owned()));
        }
        let end = offset.checked_add(into.len());
        if end.is_none_or(|end| end > b.bytes()) {
            let (all, count) = (b.bytes(), into.len());
            return Err(wrong(b, format!("has {all} bytes, not {count} from {offset} on")));
        }
        if let Some(&number) = self.mirrored.get(&buffer)
            && self.sampled - number < MIRRORS as u64
        {
            let token = self.mirrored_token(number)?.to_le_bytes();
            into.copy_from_slice(&token[offset..offset + into.len()]);
            return Ok(());
        }
        self.counters.synchronizations += 1;
        let from = self.resident.address(buffer, 0) + offset as u64;
        // SAFETY: the range was checked to lie in the buffer.
        let read = unsafe { self.downloads.download(&self.resident.stream, from, into) };
        read.map_err(|error| self.blamed(error))
    }

    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        let index = self.slot(slot)?;
        let bytes = check_regions(self.model(), std::slice::from_ref(region))?;
        let b = self.buffer(region.buffer)?;
        if bytes != into.len() {
            let problem = format!("rows {:?} have {bytes} bytes, not {}", region.rows, into.len());
            return Err(wrong(b, problem));
        }
        let first = region.rows.start * b.row_bytes();
        let from = self.resident.address(region.buffer, index) + first as u64;
        self.counters.synchronizations += 1;
        // SAFETY: the region was checked to lie in the buffer.
        let read = unsafe { self.downloads.download(&self.resident.stream, from, into) };
        read.map_err(|error| self.blamed(error))
    }

    fn freeze_parts(
        &mut self,
        slot: SlotId,
        parts: &[Part<'_>],
    ) -> Result<Vec<Arc<dyn Frozen>>, BackendError> {
        let index = self.slot(slot)?;
        let layouts = parts.iter().map(|part| self.store.layout_of(part.regions));
        let layouts = layouts.collect::<Result<Vec<_>, _>>()?;
        let wanted = layouts.iter().map(|layout| layout.bytes).sum::<usize>();
        let (used, budget) = self.store.usage();
        let refused = BackendError::CapsuleBudget { wanted, used, budget };
        if used.checked_add(wanted).is_none_or(|sum| sum > budget) {
            return Err(refused);
        }
        let mut reserved = Vec::with_capacity(parts.len());
        let settled = parts.iter().zip(&layouts).filter(|(part, _)| part.settled);
        let many = settled.map(|(_, layout)| layout.bytes).sum::<usize>() >= ASIDE
            && self.options.beside > 0;
        for layout in layouts {
            reserved.push(match self.store.reserve(layout) {
                Ok(frozen) => frozen,
                // The reservation is in pieces: what is wanted is all of it.
                Err(BackendError::CapsuleBudget { .. }) => return Err(refused),
                Err(error) => return Err(error),
            });
        }
        // Before anything is enqueued: what is reserved may only be given back when nothing is on its way to it.
        let copied = Arc::new(self.store.event()?);
        let aside = if many { Some(Arc::new(self.store.event()?)) } else { None };
        let memory = self.resident.slots[index].at();
        let taken = |later: bool| -> Vec<Transfer> {
            let parts = reserved.iter().zip(parts);
            let parts = parts.filter(|(_, part)| (part.settled && many) == later);
            parts.flat_map(|(frozen, _)| frozen.taken(memory)).collect()
        };
        // What else there is to do is done while the device copies this.
        copy(&self.resident, &taken(false))?;
        copied.record(&self.resident.stream)?;
        if let Some(aside) = &aside {
            // Behind all replays so far, and before what rewinds the slot.
            let copies = &self.store.copies;
            self.store.beside.store(true, Ordering::Relaxed);
            let enqueued = copies
                .wait(&copied)
                .and_then(|()| copy_on(&self.resident, copies, self.options.beside, &taken(true)))
                .and_then(|()| aside.record(copies));
            if let Err(error) = enqueued {
                let _ = copies.synchronize();
                return Err(error);
            }
            self.store.done_with(self.slots[index].copied.replace(Arc::clone(aside)));
        }
        let finished = reserved.into_iter().zip(parts).map(|(mut frozen, part)| {
            let aside = aside.as_ref().filter(|_| part.settled);
            frozen.filled_at(Arc::clone(aside.unwrap_or(&copied)), aside.is_some());
            Arc::new(frozen) as Arc<dyn Frozen>
        });
        Ok(finished.collect())
    }

    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        let index = self.slot(slot)?;
        let mut frozen = Vec::with_capacity(parts.len());
        for part in parts {
            let own: Option<&CudaFrozen> = part.as_any().downcast_ref();
            frozen.push(own.filter(|f| f.is_of(&self.store)).ok_or(BackendError::ForeignState)?);
        }
        self.settle(index)?;
        for part in &frozen {
            part.settle()?;
        }
        let whole = match frozen[..] {
            [one] => one.is_apart(),
            _ => apart(frozen.iter().map(|f| f.regions())),
        };
        if whole {
            let slot = self.resident.slots[index].at();
            let transfers: Vec<Transfer> = frozen.iter().flat_map(|f| f.whole(slot)).collect();
            return copy(&self.resident, &transfers);
        }
        let regions: Vec<&[Region]> = parts.iter().map(|p| p.regions()).collect();
        let table = &self.resident.model.model().buffers;
        let mut transfers = Vec::new();
        for wanted in resolve(&regions) {
            let frozen = frozen[wanted.part];
            let row = table[wanted.buffer].row_bytes();
            let first = regions[wanted.part][wanted.region].rows.start;
            transfers.push(Transfer {
                from: frozen.address(wanted.region) + ((wanted.rows.start - first) * row) as u64,
                to: self.resident.address(wanted.buffer, index) + (wanted.rows.start * row) as u64,
                bytes: (wanted.rows.end - wanted.rows.start) * row,
            });
        }
        copy(&self.resident, &transfers)
    }

    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let layout = self.store.layout_of(regions)?;
        let table = &self.resident.model.model().buffers;
        if regions.len() != bytes.len() {
            let problem = format!("{} regions, but bytes for {}", regions.len(), bytes.len());
            return Err(BackendError::WrongBuffer { buffer: "frozen state".to_owned(), problem });
        }
        for (region, part) in regions.iter().zip(bytes) {
            let wanted = region.bytes(table);
            if part.len() != wanted {
                let b = &table[region.buffer];
                let problem =
                    format!("rows {:?} have {wanted} bytes, not {}", region.rows, part.len());
                return Err(wrong(b, problem));
            }
        }
        let mut frozen = self.store.reserve(layout)?;
        for (i, part) in bytes.iter().enumerate() {
            self.upload(frozen.address(i), part)?;
        }
        frozen.filled()?;
        Ok(Arc::new(frozen))
    }

    fn residence(&self) -> Residence {
        Residence::Device
    }

    fn relocate(
        &mut self,
        frozen: &Arc<dyn Frozen>,
        to: Residence,
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        if let Some(resident) = frozen.as_any().downcast_ref::<CudaFrozen>() {
            if !resident.is_of(&self.store) {
                return Err(BackendError::ForeignState);
            }
            return Ok(match to {
                Residence::Device => Arc::clone(frozen),
                Residence::Host => Arc::new(PinnedFrozen::from_device(resident)?),
            });
        }
        let pinned = frozen.as_any().downcast_ref::<PinnedFrozen>();
        let pinned = pinned.filter(|p| p.is_of(&self.store)).ok_or(BackendError::ForeignState)?;
        if to == Residence::Host {
            return Ok(Arc::clone(frozen));
        }
        let mut moved = self.store.reserve(pinned.layout())?;
        pinned.fill(&mut moved)?;
        Ok(Arc::new(moved))
    }

    fn poison(&mut self) -> Result<(), BackendError> {
        self.remembered.clear();
        self.mirrored.clear();
        for memory in [
            &self.resident.transient,
            &self.resident.attention_sums,
            &self.resident.attention_partial,
            &self.resident.product,
        ] {
            // SAFETY: the whole allocation; sizes are multiples of 4.
            unsafe { self.resident.stream.fill(memory.at(), POISON, memory.bytes() / 4)? };
        }
        Ok(())
    }

    fn synchronize(&mut self) -> Result<(), BackendError> {
        self.wait()?;
        if self.store.beside.load(Ordering::Relaxed) {
            self.store.copies.synchronize()?;
            self.store.beside.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    fn counters(&self) -> Counters {
        let reads = self.store.synchronizations.load(Ordering::Relaxed);
        Counters {
            synchronizations: self.counters.synchronizations + reads,
            allocations: self.counters.allocations + self.store.pinned.slabs() as u64,
            ..self.counters
        }
    }

    fn frozen_bytes(&self) -> (usize, usize) {
        self.store.usage()
    }

    fn time_steps(
        &mut self,
        slot: SlotId,
        plan: usize,
        position: u32,
    ) -> Result<Vec<StepTime>, BackendError> {
        let (index, launches) = self.launches(slot, plan)?;
        let model = Arc::clone(self.model());
        let ops = &model.model().plans[plan].ops;
        let steps = &self.facts[plan].steps;
        // Launches of one kind: the same ops over weights of the same shapes.
        let kind = |launch: &Range<usize>| -> Vec<(&'static str, usize)> {
            let cost = |i: usize| {
                let at = CostPoint { position: 0, tokens: 1 };
                (ops[i].name(), ops[i].cost(&model.model().buffers, at).bytes_read as usize)
            };
            steps[launch.clone()].iter().flat_map(Step::ops).map(cost).collect()
        };
        let kinds: Vec<_> = launches.iter().map(kind).collect();
        let mut times: Vec<StepTime> = launches
            .iter()
            .map(|launch| StepTime {
                ops: steps[launch.clone()].iter().flat_map(Step::ops).collect(),
                milliseconds: 0.0,
            })
            .collect();
        for first in 0..kinds.len() {
            let alike: Vec<usize> =
                (0..kinds.len()).filter(|&i| kinds[i] == kinds[first]).collect();
            if alike[0] == first {
                let ranges: Vec<_> = alike.iter().map(|&i| launches[i].clone()).collect();
                let total = self.time_alike(index, plan, position, &ranges, 1)?;
                for &i in &alike {
                    times[i].milliseconds = total / alike.len() as f64;
                }
            }
        }
        Ok(times)
    }

    fn time_together(
        &mut self,
        slot: SlotId,
        plan: usize,
        position: u32,
        replays: usize,
    ) -> Result<f64, BackendError> {
        let (index, once) = self.launches(slot, plan)?;
        let replays = replays.max(1);
        let times = TOGETHER.div_ceil(replays);
        let all: Vec<_> = std::iter::repeat_n(once, replays).flatten().collect();
        let total = self.time_alike(index, plan, position, &all, times)?;
        Ok(total / (times * replays) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_the_device_names_the_plan_and_the_slot() {
        let fault = device_error("waiting for the device: an illegal memory access".to_owned());
        let said = blamed(fault, "decode tokens=1 slots=1 context=1024", SlotId(2)).to_string();
        for words in ["illegal", "'decode tokens=1", "slot 2", "compute-sanitizer"] {
            assert!(said.contains(words), "{said}");
        }
        let other = BackendError::ForeignState;
        assert_eq!(
            blamed(other, "decode", SlotId(0)).to_string(),
            BackendError::ForeignState.to_string()
        );
    }
}
