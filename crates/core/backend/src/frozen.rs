//! Frozen state: copies of State regions, kept aside.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ampoule_plan::Sealed;

use crate::host::HostBytes;
use crate::{BackendError, Region};

/// The memory that frozen state lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Residence {
    /// The device's own.
    Device,
    /// The host's, page-locked where a device copies from it. For a backend whose slots lie there, the only one.
    Host,
}

/// Regions of a slot's State, copied aside. Immutable; dropping it gives its bytes back to the budget.
pub trait Frozen: Send + Sync {
    /// The regions, in the order they were frozen.
    fn regions(&self) -> &[Region];

    /// Bytes of all regions.
    fn bytes(&self) -> usize;

    /// Copies the bytes of region `index` out.
    ///
    /// # Errors
    /// If there is no such region, `into` has not its size, or the device fails.
    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError>;

    /// The bytes of region `index`, if they lie in host memory.
    fn host(&self, _index: usize) -> Option<&[u8]> {
        None
    }

    /// The memory it lies in.
    fn residence(&self) -> Residence {
        Residence::Host
    }

    /// For the backend to find its own type again.
    fn as_any(&self) -> &dyn Any;
}

/// Checks that regions lie in State buffers of the model; returns their bytes.
///
/// # Errors
/// If one does not, naming its buffer.
pub fn check_regions(model: &Sealed, regions: &[Region]) -> Result<usize, BackendError> {
    let mut sum = 0;
    for region in regions {
        let Some(buffer) = model.model().buffers.lookup(region.buffer) else {
            let buffer = format!("#{}", region.buffer.0);
            return Err(BackendError::WrongBuffer {
                buffer,
                problem: "is of another model".to_owned(),
            });
        };
        let wrong = |problem| BackendError::WrongBuffer { buffer: buffer.name.clone(), problem };
        if !buffer.role.is_state() {
            return Err(wrong("is not State".to_owned()));
        }
        if region.rows.start > region.rows.end || region.rows.end > buffer.rows() {
            return Err(wrong(format!("has {} rows, not {:?}", buffer.rows(), region.rows)));
        }
        sum += region.bytes(&model.model().buffers);
    }
    Ok(sum)
}

/// Frozen state in host memory, for backends whose slots live there. Holds the regions back to back.
pub struct HostFrozen<B> {
    owner: Arc<HostBudget>,
    regions: Vec<Region>,
    offsets: Vec<usize>,
    data: B,
    /// What is reserved.
    bytes: usize,
}

/// The budget of host frozen state of one program.
#[derive(Debug)]
pub struct HostBudget {
    used: AtomicUsize,
    budget: usize,
}

impl HostBudget {
    /// A budget of so many bytes.
    pub fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), budget })
    }

    /// Bytes in use, and the budget.
    pub fn usage(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.budget)
    }

    fn reserve(&self, wanted: usize) -> Result<(), BackendError> {
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(wanted).filter(|&sum| sum <= self.budget)
            })
            .map(|_| ())
            .map_err(|used| BackendError::CapsuleBudget { wanted, used, budget: self.budget })
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl<B: HostBytes> HostFrozen<B> {
    /// Reserves the bytes of all parts in the budget and allocates them; one for each part, zeroed.
    ///
    /// # Errors
    /// If a region is not State of the model, the parts together are over the budget, or memory is short; nothing is
    /// reserved then.
    pub fn reserve(
        owner: &Arc<HostBudget>,
        model: &Sealed,
        parts: &[&[Region]],
    ) -> Result<Vec<Self>, BackendError> {
        let sizes = parts.iter().map(|regions| check_regions(model, regions));
        let sizes = sizes.collect::<Result<Vec<usize>, _>>()?;
        owner.reserve(sizes.iter().sum())?;
        // From here on each part holds what is reserved for it, and gives it back when it is dropped.
        let mut left: usize = sizes.iter().sum();
        let mut reserved = Vec::with_capacity(parts.len());
        for (regions, bytes) in parts.iter().zip(sizes) {
            let Some(data) = B::zeroed(bytes) else {
                owner.give_back(left);
                return Err(BackendError::OutOfMemory {
                    what: "a capsule".to_owned(),
                    wanted: bytes as u64,
                    available: 0,
                });
            };
            left -= bytes;
            let mut offsets = vec![0];
            for region in *regions {
                let before = offsets.last().copied().unwrap_or(0);
                offsets.push(before + region.bytes(&model.model().buffers));
            }
            let (owner, regions) = (Arc::clone(owner), regions.to_vec());
            reserved.push(Self { owner, regions, offsets, data, bytes });
        }
        Ok(reserved)
    }

    /// Calls `fill` once for each region, in order, with its index and the bytes to fill.
    pub fn fill(&mut self, mut fill: impl FnMut(usize, &mut [u8])) {
        let data = self.data.bytes_mut();
        for (index, ends) in self.offsets.windows(2).enumerate() {
            fill(index, &mut data[ends[0]..ends[1]]);
        }
    }

    /// Reserves and fills one.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn new(
        owner: &Arc<HostBudget>,
        model: &Sealed,
        regions: &[Region],
        fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<Self, BackendError> {
        let mut reserved = Self::reserve(owner, model, &[regions])?;
        let mut frozen = reserved.pop().ok_or(BackendError::ForeignState)?;
        frozen.fill(fill);
        Ok(frozen)
    }

    /// The bytes of region `index`.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn region(&self, index: usize) -> &[u8] {
        &self.data.bytes()[self.offsets[index]..self.offsets[index + 1]]
    }

    /// The parts as this type, if all of them were frozen under this budget.
    ///
    /// # Errors
    /// [`BackendError::ForeignState`] if one was not.
    pub fn own<'a>(
        owner: &Arc<HostBudget>,
        parts: &'a [Arc<dyn Frozen>],
    ) -> Result<Vec<&'a Self>, BackendError> {
        let own = |part: &'a Arc<dyn Frozen>| {
            part.as_any()
                .downcast_ref::<Self>()
                .filter(|f| Arc::ptr_eq(&f.owner, owner))
                .ok_or(BackendError::ForeignState)
        };
        parts.iter().map(own).collect()
    }
}

impl<B> Drop for HostFrozen<B> {
    fn drop(&mut self) {
        self.owner.give_back(self.bytes);
    }
}

impl<B: HostBytes> Frozen for HostFrozen<B> {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn host(&self, index: usize) -> Option<&[u8]> {
        (index < self.regions.len()).then(|| self.region(index))
    }

    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        let wrong =
            |problem| BackendError::WrongBuffer { buffer: "frozen state".to_owned(), problem };
        if index >= self.regions.len() {
            return Err(wrong(format!("has {} regions, not {index}", self.regions.len())));
        }
        let region = self.region(index);
        if region.len() != into.len() {
            return Err(wrong(format!(
                "region {index} has {} bytes, not {}",
                region.len(),
                into.len()
            )));
        }
        into.copy_from_slice(region);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
