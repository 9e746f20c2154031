//! Where every buffer of a model lies on the device: three kinds of arena, everything allocated at load.

use std::sync::Arc;

use ampoule_backend::{BackendError, LoadOptions};
use ampoule_plan::{BufferId, DType, Growth, Role, Sealed, View};

use crate::device::Device;
use crate::driver::{Context, DeviceMemory, Stream};
use crate::launch::arguments::{MatrixView, WordView};

/// Every buffer begins at a multiple of so many bytes in its arena.
pub(crate) const ALIGNMENT: usize = 256;

/// Which arena a buffer lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arena {
    /// Weights, as resident.
    Weights,
    /// Scratch, Output and Input: one for all slots, because replays run one after another.
    Transient,
    /// State, once per slot.
    Slot,
}

/// A buffer's place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) arena: Arena,
    pub(crate) offset: usize,
    /// Element type on the device: quantised weights are held as bf16.
    pub(crate) dtype: DType,
}

/// Offsets of all buffers and sizes of the arenas.
#[derive(Debug)]
pub(crate) struct Layout {
    places: Vec<Place>,
    pub(crate) weights: usize,
    pub(crate) transient: usize,
    pub(crate) slot: usize,
}

/// The type a weight has on the device.
pub(crate) const fn resident_dtype(dtype: DType) -> DType {
    if dtype.is_quantized() { DType::BF16 } else { dtype }
}

/// Bytes of `elements` elements; of blocks, of whole ones.
pub(crate) const fn bytes_of(dtype: DType, elements: usize) -> usize {
    elements / dtype.block_elements() * dtype.block_bytes()
}

impl Layout {
    /// Lays the model's buffers out: in their order, but State that grows by rows behind that of fixed size. A capsule's fixed
    /// state then is one run of bytes.
    pub(crate) fn new(model: &Sealed) -> Self {
        let mut buffers: Vec<_> = model.model().buffers.iter().collect();
        buffers.sort_by_key(|(_, buffer)| buffer.growth() == Some(Growth::Rows));
        let nowhere = Place { arena: Arena::Slot, offset: 0, dtype: DType::F32 };
        let places = vec![nowhere; buffers.len()];
        let mut layout = Self { places, weights: 0, transient: 0, slot: 0 };
        for (id, buffer) in buffers {
            let (arena, total) = match buffer.role {
                Role::Weight => (Arena::Weights, &mut layout.weights),
                Role::Input | Role::Output | Role::Scratch => {
                    (Arena::Transient, &mut layout.transient)
                }
                Role::State { .. } => (Arena::Slot, &mut layout.slot),
            };
            // Blocks that are no weights are bytes, which the copy op alone moves.
            let dtype = match arena {
                Arena::Weights => resident_dtype(buffer.dtype),
                _ => buffer.dtype,
            };
            let bytes = dtype.bytes_for(buffer.elements()).unwrap_or(0);
            layout.places[id.index()] = Place { arena, offset: *total, dtype };
            *total = (*total + bytes).next_multiple_of(ALIGNMENT);
        }
        layout
    }

    /// The buffer's place.
    pub(crate) fn place(&self, buffer: BufferId) -> Place {
        self.places[buffer.index()]
    }
}

/// Sizes of the working memory that kernels need besides the plan's buffers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WorkspaceSizes {
    pub(crate) attention_sums: usize,
    pub(crate) attention_partial: usize,
    pub(crate) product: usize,
}

/// Everything resident on the device for one program. Graphs hold it, so it outlives them.
pub(crate) struct Resident {
    pub(crate) stream: Arc<Stream>,
    pub(crate) model: Arc<Sealed>,
    pub(crate) layout: Layout,
    pub(crate) weights: DeviceMemory,
    pub(crate) transient: DeviceMemory,
    pub(crate) slots: Vec<DeviceMemory>,
    pub(crate) capsules: DeviceMemory,
    pub(crate) attention_sums: DeviceMemory,
    pub(crate) attention_partial: DeviceMemory,
    pub(crate) product: DeviceMemory,
    pub(crate) sample_work: DeviceMemory,
    /// `home` of the kernels: one for each slot, then the one of the slot that replays run on.
    homes: DeviceMemory,
    pub(crate) mirror: crate::driver::PinnedMemory,
    /// Where kernels see the mirror.
    pub(crate) mirror_at: u64,
    pub(crate) allocations: u64,
    /// Last, so that kernels stay loaded while memory goes.
    pub(crate) device: Arc<Device>,
}

impl Drop for Resident {
    fn drop(&mut self) {
        // Copies may still run over the memory that goes next.
        let _ = self.stream.synchronize();
    }
}

/// Bytes of `SampleWork` in `sample.cu`: six histograms of 2048 and 48 bytes before them, rounded up.
const SAMPLE_WORK: usize = 6 * 2048 * 8 + 256;
/// After it: `done` of `Delta` in `recurrent.cu`.
pub(crate) const DELTA_DONE: usize = SAMPLE_WORK;
/// Most value heads whose blocks can be counted there.
pub(crate) const DELTA_HEADS: usize = 1024;
/// After that: `turn` of `Chain` in `chain.cu`, in a line of its own.
pub(crate) const CHAIN_TURN: usize = DELTA_DONE + 4 * DELTA_HEADS;
/// Bytes of all; zero at load.
const SAMPLE_WORK_BYTES: usize = CHAIN_TURN + 128;
/// What kernels take for an address in a slot has this bit, and the offset in the slot: `placed` in `common.cuh`.
pub(crate) const IN_SLOT: u64 = 1 << 63;
/// Entries of the ring of mirrored tokens: `MIRRORS` in `sample.cu`.
pub(crate) const MIRRORS: usize = 64;

impl Resident {
    /// Allocates everything, after checking that it fits.
    pub(crate) fn allocate(
        device: &Arc<Device>,
        model: &Arc<Sealed>,
        options: LoadOptions,
        sizes: WorkspaceSizes,
    ) -> Result<Self, BackendError> {
        let layout = Layout::new(model);
        let context: &Arc<Context> = &device.context;
        let capsules = capsule_reservation(options.capsule_bytes);
        let wanted = [
            layout.weights,
            layout.transient,
            layout.slot.saturating_mul(options.slots),
            capsules,
            sizes.attention_sums,
            sizes.attention_partial,
            sizes.product,
        ]
        .iter()
        .fold(0_usize, |sum, &n| sum.saturating_add(n));
        let (free, _) = context.memory()?;
        if wanted > free {
            return Err(BackendError::OutOfMemory {
                what: format!(
                    "the model (weights {}, working memory {}, {} slots of {}, capsules {})",
                    layout.weights, layout.transient, options.slots, layout.slot, capsules
                ),
                wanted: wanted as u64,
                available: free as u64,
            });
        }
        let mut allocations = 0;
        let mut take = |bytes: usize, what: &str| {
            allocations += 1;
            DeviceMemory::new(context, bytes, what)
        };
        let weights = take(layout.weights, "weights")?;
        let transient = take(layout.transient, "working memory")?;
        let mut slots = Vec::with_capacity(options.slots);
        for _ in 0..options.slots {
            slots.push(take(layout.slot, "a slot")?);
        }
        let capsules = take(capsules, "capsules")?;
        let attention_sums = take(sizes.attention_sums, "attention")?;
        let attention_partial = take(sizes.attention_partial, "attention")?;
        let product = take(sizes.product, "matrix products")?;
        let sample_work = take(SAMPLE_WORK_BYTES, "sampling")?;
        let homes = take((options.slots + 1) * 8, "the slots' places")?;
        let stream = Stream::urgent(context)?;
        let mirror = crate::driver::PinnedMemory::new(context, MIRRORS * 8)?;
        // SAFETY: both ranges are the whole allocations just made.
        unsafe {
            stream.fill(sample_work.at(), 0, SAMPLE_WORK_BYTES / 4)?;
            stream.fill(transient.at(), 0, transient.bytes() / 4)?;
            stream.fill(homes.at(), 0, homes.bytes() / 4)?;
        }
        for (index, slot) in slots.iter().enumerate() {
            let home = slot.at().wrapping_sub(IN_SLOT);
            // SAFETY: the whole allocation; two words of the slot's own.
            unsafe {
                stream.fill(slot.at(), 0, slot.bytes() / 4)?;
                stream.fill(homes.at() + 8 * index as u64, home as u32, 1)?;
                stream.fill(homes.at() + 8 * index as u64 + 4, (home >> 32) as u32, 1)?;
            }
        }
        Ok(Self {
            device: Arc::clone(device),
            stream,
            model: Arc::clone(model),
            layout,
            weights,
            transient,
            slots,
            capsules,
            attention_sums,
            attention_partial,
            product,
            sample_work,
            homes,
            mirror_at: mirror.device_address()?,
            mirror,
            allocations,
        })
    }

    /// The device address of a buffer, for a slot.
    pub(crate) fn address(&self, buffer: BufferId, slot: usize) -> u64 {
        self.address_with(buffer, || self.slots[slot].at())
    }

    /// The address of a buffer where State begins at `slot`.
    fn address_with(&self, buffer: BufferId, slot: impl FnOnce() -> u64) -> u64 {
        let place = self.layout.place(buffer);
        let base = match place.arena {
            Arena::Weights => self.weights.at(),
            Arena::Transient => self.transient.at(),
            Arena::Slot => slot(),
        };
        base + place.offset as u64
    }

    /// Where kernels find a view's first element, for whatever slot: of State, as [`IN_SLOT`] and the offset in a slot.
    pub(crate) fn view_address(&self, view: &View) -> u64 {
        let buffer = self.model.buffer(view.buffer);
        let first = view.rows.start * buffer.cols() + view.cols.start;
        let dtype = self.layout.place(view.buffer).dtype;
        // One slot is always in the same place.
        let slot = || if let [slot] = &self.slots[..] { slot.at() } else { IN_SLOT };
        self.address_with(view.buffer, slot) + bytes_of(dtype, first) as u64
    }

    /// A view of floats as kernels take it.
    pub(crate) fn matrix(&self, view: &View) -> MatrixView {
        let dtype = self.layout.place(view.buffer).dtype;
        let ld = self.model.buffer(view.buffer).cols();
        MatrixView::new(self.view_address(view), ld, dtype)
    }

    /// A view of 32-bit words as kernels take it.
    pub(crate) fn words(&self, view: &View) -> WordView {
        let ld = self.model.buffer(view.buffer).cols();
        WordView { at: self.view_address(view), ld: ld as i64 }
    }

    /// Where kernels read the place of the slot that a replay runs on.
    pub(crate) fn home(&self) -> u64 {
        self.homes.at() + 8 * self.slots.len() as u64
    }

    /// Replays enqueued from now on run on this slot.
    pub(crate) fn enter(&self, slot: usize) -> Result<(), BackendError> {
        // SAFETY: one entry of the table to another.
        unsafe { self.stream.copy(self.home(), self.homes.at() + 8 * slot as u64, 8) }
    }
}

/// What is reserved for a budget: alignment and fragmentation cost something.
pub(crate) const fn capsule_reservation(budget: usize) -> usize {
    if budget == 0 { 0 } else { budget.saturating_add(budget / 16).saturating_add(1 << 20) }
}

#[cfg(test)]
pub(crate) mod tests {
    use ampoule_models::decoder::{BuildOptions, Precision};
    use ampoule_models::model::ModelFiles;

    use super::*;

    /// A small hybrid with room for 64 tokens.
    pub(crate) fn tiny() -> Arc<Sealed> {
        let dtype = DType::BF16;
        let options = BuildOptions {
            context: 64,
            prefill: vec![1, 32],
            score: 32,
            decode_contexts: vec![64],
            precision: Precision { activation: dtype, kv_cache: dtype },
        };
        ModelFiles::open("random:qwen3.5-tiny").unwrap().build(&options).unwrap().sealed
    }

    #[test]
    fn state_of_fixed_size_lies_together() {
        let sealed = tiny();
        let layout = Layout::new(&sealed);
        let (mut end, mut rows) = ([0; 2], layout.slot);
        for (id, buffer) in sealed.model().buffers.iter() {
            let place = layout.place(id);
            assert_eq!(place.offset % ALIGNMENT, 0);
            let after = place.offset + bytes_of(place.dtype, buffer.elements());
            match buffer.growth() {
                Some(Growth::Fixed) => end[0] = end[0].max(after),
                Some(Growth::Rows) => {
                    rows = rows.min(place.offset);
                    end[1] = end[1].max(after);
                }
                None => assert_ne!(place.arena, Arena::Slot),
            }
        }
        assert!(0 < end[0] && end[0] <= rows && rows < end[1] && end[1] <= layout.slot);
        assert!(rows - end[0] < ALIGNMENT);
    }
}
