//! Frozen state in page-locked host memory: where capsules wait that the device has no room for.

use std::any::Any;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use ampoule_backend::{BackendError, Frozen, Region, Residence};

use crate::driver::{Context, Event, PinnedMemory, device_error};
use crate::frozen::{CapsuleStore, CudaFrozen, RegionLayout};
use crate::pool::{ALIGNMENT, Pool};

/// Least and most bytes that are page-locked at a time, unless more are wanted at once: 20 ms at most.
const SLAB: (usize, usize) = (4 << 20, 32 << 20);

/// Page-locked memory in slabs. Locking costs 0.6 ms a MiB, thirty times as much as a copy over the link, so what has been
/// locked stays so for the next capsules, until the program and the last frozen state of it have gone.
#[derive(Default)]
pub(crate) struct PinnedPool(Mutex<Vec<Slab>>);

struct Slab {
    memory: PinnedMemory,
    free: Pool,
}

/// Bytes of a slab, given back by [`PinnedPool::release`].
#[derive(Clone, Copy)]
struct Range {
    slab: usize,
    offset: usize,
    bytes: usize,
    at: *mut u8,
}

// SAFETY: a range is memory of its own; who may touch it is up to its holder.
unsafe impl Send for Range {}
// SAFETY: as above: after it was filled, holders only read.
unsafe impl Sync for Range {}

impl PinnedPool {
    /// How often memory was locked.
    pub(crate) fn slabs(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// A range for each size.
    fn allocate(
        &self,
        context: &Arc<Context>,
        sizes: &[usize],
    ) -> Result<Vec<Range>, BackendError> {
        let mut slabs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ranges = Vec::with_capacity(sizes.len());
        for (index, &bytes) in sizes.iter().enumerate() {
            if let Some(range) = take(&mut slabs, bytes) {
                ranges.push(range);
                continue;
            }
            // All that is still wanted, and while there is little of it twice as much as before.
            let rest: usize = sizes[index..].iter().map(|size| size + ALIGNMENT).sum();
            let locked: usize = slabs.iter().map(|slab| slab.memory.bytes()).sum();
            let size = locked.clamp(SLAB.0, SLAB.1).max(rest).next_multiple_of(ALIGNMENT);
            let added = PinnedMemory::unwritten(context, size).or_else(|_| {
                // What is wanted may still be there.
                PinnedMemory::unwritten(context, rest.next_multiple_of(ALIGNMENT))
            });
            let added = added.map(|memory| {
                let free = Pool::new(memory.bytes());
                slabs.push(Slab { memory, free });
            });
            let range = added.and_then(|()| {
                take(&mut slabs, bytes).ok_or_else(|| {
                    device_error(format!("{bytes} bytes do not fit into new host memory"))
                })
            });
            ranges.push(range.inspect_err(|_| give_back(&mut slabs, &ranges))?);
        }
        Ok(ranges)
    }

    fn release(&self, ranges: &[Range]) {
        give_back(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), ranges);
    }
}

fn take(slabs: &mut [Slab], bytes: usize) -> Option<Range> {
    slabs.iter_mut().enumerate().find_map(|(slab, s)| {
        let offset = s.free.allocate(bytes)?;
        // SAFETY: the offset lies in the slab.
        let at = unsafe { s.memory.at().add(offset) };
        Some(Range { slab, offset, bytes, at })
    })
}

fn give_back(slabs: &mut [Slab], ranges: &[Range]) {
    for range in ranges {
        slabs[range.slab].free.release(range.offset, range.bytes);
    }
}

/// Regions in host memory.
pub(crate) struct PinnedFrozen {
    store: Arc<CapsuleStore>,
    layout: Arc<RegionLayout>,
    /// Of each region.
    ranges: Vec<Range>,
}

impl Drop for PinnedFrozen {
    fn drop(&mut self) {
        self.store.pinned.release(&self.ranges);
    }
}

impl PinnedFrozen {
    /// Copies state off the device and waits for it, and for what was to fill the state before; replays go on meanwhile.
    pub(crate) fn from_device(frozen: &CudaFrozen) -> Result<Self, BackendError> {
        let store = &frozen.store;
        let table = &store.resident.model.model().buffers;
        let sizes: Vec<usize> =
            frozen.layout.regions.iter().map(|region| region.bytes(table)).collect();
        let ranges = store.pinned.allocate(&store.resident.device.context, &sizes)?;
        let mut this =
            Self { store: Arc::clone(store), layout: Arc::clone(&frozen.layout), ranges };
        frozen.awaited(&store.copies)?;
        let mut enqueued = Ok(());
        for (index, range) in this.ranges.iter().enumerate() {
            // SAFETY: the source lies in the reservation, which the frozen state keeps; the target is this range alone, which
            // is not given back before the wait below, nor if that fails.
            enqueued =
                unsafe { store.copies.download(range.at, frozen.address(index), range.bytes) };
            if enqueued.is_err() {
                break;
            }
        }
        // Also after a failure: copies may be on their way into the memory.
        let done = store.copies.synchronize();
        store.synchronizations.fetch_add(1, Ordering::Relaxed);
        if done.is_err() {
            // The device may still write: nobody gets these ranges again.
            this.ranges.clear();
        }
        enqueued.and(done)?;
        Ok(this)
    }

    /// What it holds, and how that lies in a range on the device.
    pub(crate) fn layout(&self) -> Arc<RegionLayout> {
        Arc::clone(&self.layout)
    }

    /// Whether it was frozen by the program of this store.
    pub(crate) fn is_of(&self, store: &Arc<CapsuleStore>) -> bool {
        Arc::ptr_eq(&self.store, store)
    }

    /// Copies the state to the device, into room that was reserved for the same regions, and waits for it.
    pub(crate) fn fill(&self, frozen: &mut CudaFrozen) -> Result<(), BackendError> {
        let stream = &self.store.resident.stream;
        let event = Event::new(&self.store.resident.device.context, false)?;
        let mut enqueued = Ok(());
        for index in 0..self.ranges.len() {
            let bytes = self.bytes_of(index);
            // SAFETY: the source is page-locked and outlives the wait below; the target was reserved for it.
            enqueued = unsafe { stream.upload(frozen.address(index), bytes.as_ptr(), bytes.len()) };
            if enqueued.is_err() {
                break;
            }
        }
        let done = event.record(stream).and_then(|()| event.synchronize());
        self.store.synchronizations.fetch_add(1, Ordering::Relaxed);
        enqueued.and(done)?;
        frozen.filled()
    }

    fn bytes_of(&self, index: usize) -> &[u8] {
        let range = &self.ranges[index];
        // SAFETY: the range was filled when this was made, never changes again, and is given back when this goes.
        unsafe { std::slice::from_raw_parts(range.at, range.bytes) }
    }
}

impl Frozen for PinnedFrozen {
    fn regions(&self) -> &[Region] {
        &self.layout.regions
    }

    fn bytes(&self) -> usize {
        self.ranges.iter().map(|range| range.bytes).sum()
    }

    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        let wrong =
            |problem| BackendError::WrongBuffer { buffer: "frozen state".to_owned(), problem };
        if index >= self.ranges.len() {
            return Err(wrong(format!("has {} regions, not {index}", self.ranges.len())));
        }
        let bytes = self.bytes_of(index);
        if bytes.len() != into.len() {
            let problem = format!("region {index} has {} bytes, not {}", bytes.len(), into.len());
            return Err(wrong(problem));
        }
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn host(&self, index: usize) -> Option<&[u8]> {
        (index < self.ranges.len()).then(|| self.bytes_of(index))
    }

    fn residence(&self) -> Residence {
        Residence::Host
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
