//! What backends share whose buffers live in host memory: slots, inputs, frozen state. They add only kernels.

use std::sync::Arc;

use ampoule_plan::{BufferId, Plan, Role, Sealed};

use crate::{
    BackendError, Counters, Frozen, HostBudget, HostFrozen, LoadOptions, Part, Program, Progress,
    Region, SlotId, WeightSource, check_regions,
};

/// Owned bytes, aligned as a backend's kernels want them.
pub trait HostBytes: Send + Sync + Sized + 'static {
    /// Zeroed bytes, or `None` where memory is short.
    fn zeroed(len: usize) -> Option<Self>;

    /// The bytes.
    fn bytes(&self) -> &[u8];

    /// The bytes, to be changed.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl HostBytes for Vec<u8> {
    fn zeroed(len: usize) -> Option<Self> {
        let mut bytes = Self::new();
        bytes.try_reserve_exact(len).ok()?;
        bytes.resize(len, 0);
        Some(bytes)
    }

    fn bytes(&self) -> &[u8] {
        self
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

/// All buffers of a program: one copy of everything but State, and State once per slot.
pub struct HostMemory<B> {
    shared: Vec<Option<B>>,
    slots: Vec<Vec<Option<B>>>,
}

impl<B: HostBytes> HostMemory<B> {
    /// The bytes of a buffer as the slot sees it.
    ///
    /// # Panics
    /// If slot or buffer do not exist.
    pub fn bytes(&self, slot: SlotId, buffer: BufferId) -> &[u8] {
        let own = self.slots[slot.0 as usize][buffer.index()].as_ref();
        own.or(self.shared[buffer.index()].as_ref())
            .expect("every buffer is shared or of a slot")
            .bytes()
    }

    /// The bytes of a buffer as the slot sees it, to be changed.
    ///
    /// # Panics
    /// If slot or buffer do not exist.
    pub fn bytes_mut(&mut self, slot: SlotId, buffer: BufferId) -> &mut [u8] {
        let own = self.slots[slot.0 as usize][buffer.index()].as_mut();
        own.or(self.shared[buffer.index()].as_mut())
            .expect("every buffer is shared or of a slot")
            .bytes_mut()
    }

    /// The bytes of a buffer that is not State.
    ///
    /// # Panics
    /// If there is none.
    pub fn shared(&self, buffer: BufferId) -> &[u8] {
        self.shared[buffer.index()].as_ref().expect("not a State buffer").bytes()
    }

    fn shared_mut(&mut self, buffer: BufferId) -> &mut [u8] {
        self.shared[buffer.index()].as_mut().expect("not a State buffer").bytes_mut()
    }
}

/// The kernels of a host backend.
pub trait HostKernels: Send {
    /// How it holds memory.
    type Bytes: HostBytes;

    /// Called once, when the weights are in place.
    ///
    /// # Errors
    /// If an op of the model is not supported or memory is short.
    fn prepare(
        &mut self,
        model: &Sealed,
        memory: &mut HostMemory<Self::Bytes>,
    ) -> Result<(), BackendError>;

    /// Runs one plan over one slot.
    ///
    /// # Errors
    /// If a kernel refuses its operands.
    fn run(
        &mut self,
        model: &Sealed,
        plan: &Plan,
        slot: SlotId,
        memory: &mut HostMemory<Self::Bytes>,
    ) -> Result<(), BackendError>;

    /// Overwrites everything a kernel keeps from one replay to the next that is not allowed to matter.
    fn poison(&mut self) {}

    /// Copies bytes; both slices have the same length.
    fn copy(&mut self, from: &[u8], to: &mut [u8]) {
        to.copy_from_slice(from);
    }
}

/// A program in host memory.
pub struct HostProgram<K: HostKernels> {
    model: Arc<Sealed>,
    kernels: K,
    memory: HostMemory<K::Bytes>,
    taken: Vec<bool>,
    budget: Arc<HostBudget>,
    counters: Counters,
}

/// Bytes of a weight read at a time, between two reports of progress.
const WEIGHT_CHUNK: usize = 8 << 20;

impl<K: HostKernels> HostProgram<K> {
    /// Allocates all buffers, reads the weights and prepares the kernels.
    ///
    /// # Errors
    /// As [`crate::Backend::load`].
    pub fn load(
        model: Arc<Sealed>,
        mut kernels: K,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Self, BackendError> {
        let table = &model.model().buffers;
        let mut counters = Counters::default();
        let mut allocate = |id: BufferId| {
            let buffer = &table[id];
            counters.allocations += 1;
            K::Bytes::zeroed(buffer.bytes()).map(Some).ok_or_else(|| BackendError::OutOfMemory {
                what: format!("buffer '{}'", buffer.name),
                wanted: buffer.bytes() as u64,
                available: 0,
            })
        };
        let mut per_role = |state: bool| -> Result<Vec<Option<K::Bytes>>, BackendError> {
            table
                .iter()
                .map(|(id, b)| if b.role.is_state() == state { allocate(id) } else { Ok(None) })
                .collect()
        };
        let shared = per_role(false)?;
        let slots = (0..options.slots).map(|_| per_role(true)).collect::<Result<_, _>>()?;
        let mut memory = HostMemory { shared, slots };

        let is_weight = |id: BufferId| table[id].role == Role::Weight;
        let total: u64 =
            table.iter().filter(|(id, _)| is_weight(*id)).map(|(_, b)| b.bytes() as u64).sum();
        let mut done = 0;
        for (id, _) in table.iter().filter(|(id, _)| is_weight(*id)) {
            let mut offset = 0;
            for chunk in memory.shared_mut(id).chunks_mut(WEIGHT_CHUNK) {
                weights.read(id, offset, chunk)?;
                offset += chunk.len();
                done += chunk.len() as u64;
                progress(done, total);
            }
        }
        kernels.prepare(&model, &mut memory)?;
        counters.captures = model.model().plans.len() as u64;
        let taken = vec![false; options.slots];
        Ok(Self {
            model,
            kernels,
            memory,
            taken,
            budget: HostBudget::new(options.capsule_bytes),
            counters,
        })
    }

    /// The kernels.
    pub const fn kernels(&self) -> &K {
        &self.kernels
    }

    fn slot(&self, slot: SlotId) -> Result<SlotId, BackendError> {
        let taken = self.taken.get(slot.0 as usize).copied().unwrap_or(false);
        if taken { Ok(slot) } else { Err(BackendError::NoSuchSlot { slot: slot.0 }) }
    }

    fn span(
        &self,
        buffer: BufferId,
        role: &Role,
        offset: usize,
        len: usize,
    ) -> Result<(), BackendError> {
        let wrong = |buffer: &str, problem: String| BackendError::WrongBuffer {
            buffer: buffer.to_owned(),
            problem,
        };
        let Some(b) = self.model.model().buffers.lookup(buffer) else {
            return Err(wrong(&format!("#{}", buffer.0), "is of another model".to_owned()));
        };
        if b.role != *role {
            return Err(wrong(&b.name, format!("is {:?}, not {role:?}", b.role)));
        }
        if offset.checked_add(len).is_none_or(|end| end > b.bytes()) {
            return Err(wrong(&b.name, format!("has {} bytes, not {len} at {offset}", b.bytes())));
        }
        Ok(())
    }
}

fn region_span(model: &Sealed, region: &Region) -> std::ops::Range<usize> {
    let row = model.buffer(region.buffer).row_bytes();
    region.rows.start * row..region.rows.end * row
}

impl<K: HostKernels> Program for HostProgram<K> {
    fn model(&self) -> &Arc<Sealed> {
        &self.model
    }

    fn create_slot(&mut self) -> Result<SlotId, BackendError> {
        let free = self
            .taken
            .iter()
            .position(|t| !t)
            .ok_or(BackendError::NoFreeSlot { slots: self.taken.len() })?;
        self.taken[free] = true;
        Ok(SlotId(free as u32))
    }

    fn drop_slot(&mut self, slot: SlotId) -> Result<(), BackendError> {
        let slot = self.slot(slot)?;
        self.taken[slot.0 as usize] = false;
        Ok(())
    }

    fn write_input(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), BackendError> {
        self.span(buffer, &Role::Input, 0, bytes.len())?;
        self.memory.shared_mut(buffer)[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError> {
        let slot = self.slot(slot)?;
        let plans = &self.model.model().plans;
        let plan = plans.get(plan).ok_or(BackendError::NoSuchPlan { plan, plans: plans.len() })?;
        self.counters.launches += 1;
        self.kernels.run(&self.model, plan, slot, &mut self.memory)
    }

    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.span(buffer, &Role::Output, offset, into.len())?;
        into.copy_from_slice(&self.memory.shared(buffer)[offset..offset + into.len()]);
        Ok(())
    }

    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        let slot = self.slot(slot)?;
        let bytes = check_regions(&self.model, std::slice::from_ref(region))?;
        if bytes != into.len() {
            let buffer = self.model.buffer(region.buffer).name.clone();
            return Err(BackendError::WrongBuffer {
                buffer,
                problem: format!("{bytes} bytes, not {}", into.len()),
            });
        }
        into.copy_from_slice(
            &self.memory.bytes(slot, region.buffer)[region_span(&self.model, region)],
        );
        Ok(())
    }

    fn freeze_parts(
        &mut self,
        slot: SlotId,
        parts: &[Part<'_>],
    ) -> Result<Vec<Arc<dyn Frozen>>, BackendError> {
        let slot = self.slot(slot)?;
        let model = Arc::clone(&self.model);
        let parts: Vec<&[Region]> = parts.iter().map(|part| part.regions).collect();
        let reserved = HostFrozen::<K::Bytes>::reserve(&self.budget, &model, &parts)?;
        let filled = reserved.into_iter().zip(parts).map(|(mut frozen, regions)| {
            frozen.fill(|index, to| {
                let region = &regions[index];
                let from = &self.memory.bytes(slot, region.buffer)[region_span(&model, region)];
                self.kernels.copy(from, to);
            });
            Arc::new(frozen) as Arc<dyn Frozen>
        });
        Ok(filled.collect())
    }

    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        let slot = self.slot(slot)?;
        for part in HostFrozen::<K::Bytes>::own(&self.budget, parts)? {
            for (index, region) in part.regions().iter().enumerate() {
                let span = region_span(&self.model, region);
                let to = &mut self.memory.bytes_mut(slot, region.buffer)[span];
                self.kernels.copy(part.region(index), to);
            }
        }
        Ok(())
    }

    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let table = &self.model.model().buffers;
        check_regions(&self.model, regions)?;
        if regions.len() != bytes.len()
            || regions.iter().zip(bytes).any(|(r, b)| r.bytes(table) != b.len())
        {
            let problem = "the bytes supplied have not the regions' sizes".to_owned();
            return Err(BackendError::WrongBuffer { buffer: "frozen state".to_owned(), problem });
        }
        let frozen =
            HostFrozen::<K::Bytes>::new(&self.budget, &self.model, regions, |index, to| {
                self.kernels.copy(bytes[index], to);
            })?;
        Ok(Arc::new(frozen))
    }

    fn poison(&mut self) -> Result<(), BackendError> {
        let table = &self.model.model().buffers;
        for (id, _) in table
            .iter()
            .filter(|(_, b)| matches!(b.role, Role::Scratch | Role::Output | Role::Input))
        {
            // 0x7fc0 is a quiet NaN in bf16, and twice over in f32; in f16 it is a NaN as well.
            for pair in self.memory.shared_mut(id).chunks_exact_mut(2) {
                pair.copy_from_slice(&0x7fc0_u16.to_le_bytes());
            }
        }
        self.kernels.poison();
        Ok(())
    }

    fn synchronize(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn frozen_bytes(&self) -> (usize, usize) {
        self.budget.usage()
    }
}

/// A digest of what the platform's mathematics library answers.
///
/// Two libraries may round `sin` or `exp` otherwise; state made with one is then not what the other would have made, and
/// no version number says so. Host backends put this into [`crate::DeviceInfo::kernels`], so that a capsule does not fit
/// where the library differs on any of some thousand arguments.
pub fn mathematics_digest() -> u64 {
    /// FNV-1a, 64 bits (Fowler, Noll, Vo).
    fn add(hash: u64, value: f32) -> u64 {
        value
            .to_bits()
            .to_le_bytes()
            .iter()
            .fold(hash, |h, &byte| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for i in 1..=2048_u16 {
        // Positions times frequencies, logits, decays: from tiny to large, both signs; unknown to the compiler.
        let x = std::hint::black_box(f32::from(i) * 0.037 * f32::from(i));
        let small = x / 4096.0;
        let (sin, cos) = x.sin_cos();
        let values = [sin, cos, (-small).exp(), small.exp(), x.ln(), small.ln_1p(), x.powf(-0.25)];
        let wide = std::hint::black_box(f64::from(x)).powf(-0.37) as f32;
        hash = values.into_iter().chain([wide]).fold(hash, add);
    }
    hash
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_digest_is_the_same_each_time() {
        assert_eq!(super::mathematics_digest(), super::mathematics_digest());
    }
}
