//! Frozen state in page-locked host memory: where capsules wait that the device has no room for.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ampoule_backend::{BackendError, Frozen, Region, Residence};

use crate::driver::{Event, PinnedMemory};
use crate::frozen::{CapsuleStore, CudaFrozen};

/// Regions in host memory, back to back.
pub(crate) struct PinnedFrozen {
    store: Arc<CapsuleStore>,
    regions: Vec<Region>,
    /// Of each region from the start of the memory, and its end.
    offsets: Vec<usize>,
    /// None if nothing was frozen.
    memory: Option<PinnedMemory>,
}

impl PinnedFrozen {
    /// Copies state off the device and waits for it, and for what was to fill the state before; replays go on meanwhile.
    pub(crate) fn from_device(frozen: &CudaFrozen) -> Result<Self, BackendError> {
        let store = &frozen.store;
        let context = &store.resident.device.context;
        let table = &store.resident.model.model().buffers;
        let mut offsets = vec![0];
        for region in &frozen.regions {
            offsets.push(offsets[offsets.len() - 1] + region.bytes(table));
        }
        let total = offsets[offsets.len() - 1];
        let memory = if total == 0 { None } else { Some(PinnedMemory::new(context, total)?) };
        if let Some(ready) = &frozen.ready {
            store.copies.wait(ready)?;
        }
        if let Some(memory) = &memory {
            let mut enqueued = Ok(());
            for index in 0..frozen.regions.len() {
                let (start, end) = (offsets[index], offsets[index + 1]);
                // SAFETY: the source lies in the reservation, which the frozen state keeps; the target in this memory,
                // which is not freed before the wait below.
                enqueued = unsafe {
                    store.copies.download(
                        memory.at().add(start),
                        frozen.address(index),
                        end - start,
                    )
                };
                if enqueued.is_err() {
                    break;
                }
            }
            // Also after a failure: copies may be on their way into the memory.
            let done = store.copies.synchronize();
            store.synchronizations.fetch_add(1, Ordering::Relaxed);
            enqueued.and(done)?;
        }
        Ok(Self { store: Arc::clone(store), regions: frozen.regions.clone(), offsets, memory })
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
        for index in 0..self.regions.len() {
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
        let (start, end) = (self.offsets[index], self.offsets[index + 1]);
        // SAFETY: the range lies in the memory, which was filled when this was made and never changes again.
        self.memory.as_ref().map_or(&[], |memory| unsafe {
            std::slice::from_raw_parts(memory.at().add(start), end - start)
        })
    }
}

impl Frozen for PinnedFrozen {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn bytes(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        let wrong =
            |problem| BackendError::WrongBuffer { buffer: "frozen state".to_owned(), problem };
        if index >= self.regions.len() {
            return Err(wrong(format!("has {} regions, not {index}", self.regions.len())));
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
        (index < self.regions.len()).then(|| self.bytes_of(index))
    }

    fn residence(&self) -> Residence {
        Residence::Host
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
