//! The reference backend, spoilt.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use ampoule_backend::{
    Backend, BackendError, Counters, DeviceInfo, Frozen, LoadOptions, Part, Program, Progress,
    Region, SlotId, WeightSource,
};
use ampoule_plan::{BufferId, DType, Growth, Sealed};
use ampoule_reference::{ReferenceBackend, load_elements, store_elements};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sabotage {
    /// The top bit of the exponent of one element of each output read (of bytes and words, a bit).
    FlipBit,
    /// Every float output is too large.
    Scale(f32),
    /// Every float output is off by this, alternately.
    Noise(f32),
    /// One element of each output is NaN.
    Nan,
    /// State is put back after every replay.
    DropState,
    /// Caches get a row more than the count says.
    AppendPastCount,
    /// The last bit of outputs depends on the count.
    ByCount,
    /// Every second replay flips the last bit of an output.
    EveryOther,
    /// A poisoned program flips the last bit.
    AfterPoison,
    /// The last bit depends on the last row of the inputs.
    LastInputRow,
    /// The last bit depends on the last row of a cache.
    StaleRow,
    /// A replay changes State of the second slot.
    OtherSlot,
    /// Integer outputs are one too large.
    WrongToken,
    /// Replays allocate.
    Allocate,
    /// Nothing loads.
    Refuse,
    /// Replays panic.
    Panic,
}

/// A backend with a fault.
pub(crate) struct Broken(pub(crate) Sabotage);

impl Backend for Broken {
    fn info(&self) -> DeviceInfo {
        ReferenceBackend.info()
    }

    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        if self.0 == Sabotage::Refuse {
            let problem = "sabotage".to_owned();
            return Err(BackendError::Unsupported { backend: "broken", op: "all", problem });
        }
        let program = ReferenceBackend.load(model, weights, options, progress)?;
        let inputs = HashMap::new();
        Ok(Box::new(BrokenProgram {
            program,
            sabotage: self.0,
            runs: 0,
            poisoned: false,
            flip: false,
            inputs,
        }))
    }
}

struct BrokenProgram {
    program: Box<dyn Program>,
    sabotage: Sabotage,
    runs: u64,
    poisoned: bool,
    /// The next outputs have their last bit flipped.
    flip: bool,
    inputs: HashMap<BufferId, Vec<u8>>,
}

fn whole(model: &Sealed, id: BufferId) -> Region {
    Region { buffer: id, rows: 0..model.buffer(id).rows() }
}

impl BrokenProgram {
    fn count(&self) -> Option<u32> {
        let id = self.program.model().model().buffers.find("count")?;
        self.inputs.get(&id).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn read_row(&mut self, slot: SlotId, buffer: BufferId, rows: Range<usize>) -> Vec<u8> {
        let region = Region { buffer, rows };
        let mut bytes = vec![0; region.bytes(&self.program.model().model().buffers)];
        self.program.read_state(slot, &region, &mut bytes).unwrap();
        bytes
    }

    fn put(&mut self, slot: SlotId, region: Region, bytes: &[u8]) -> Result<(), BackendError> {
        let frozen = self.program.freeze_bytes(&[region], &[bytes])?;
        self.program.thaw(slot, &[frozen])
    }

    fn caches(&self) -> Vec<BufferId> {
        let model = self.program.model();
        let rows = |id: &&BufferId| model.buffer(**id).growth() == Some(Growth::Rows);
        model.state().iter().filter(rows).copied().collect()
    }

    fn before(&mut self, slot: SlotId) {
        self.flip = match self.sabotage {
            Sabotage::ByCount => self.count().is_some_and(|c| c < 65),
            Sabotage::EveryOther => self.runs.is_multiple_of(2),
            Sabotage::AfterPoison => self.poisoned,
            Sabotage::LastInputRow => {
                let gate = self.program.model().model().buffers.find("gate.in");
                let gate = gate.or(self.program.model().model().buffers.find("gate")).unwrap();
                let row = self.program.model().buffer(gate).row_bytes();
                let count = self.count().unwrap() as usize;
                let bytes = &self.inputs[&gate][(count - 1) * row..count * row];
                bytes[..4] == f32::NAN.to_le_bytes()
            }
            Sabotage::StaleRow => {
                let cache = self.caches()[0];
                let rows = self.program.model().buffer(cache).rows();
                let dtype = self.program.model().buffer(cache).dtype;
                let last = self.read_row(slot, cache, rows - 1..rows);
                load_elements(dtype, &last)[0].is_nan()
            }
            _ => false,
        };
    }

    fn after(&mut self, slot: SlotId) -> Result<(), BackendError> {
        let model = Arc::clone(self.program.model());
        match self.sabotage {
            Sabotage::AppendPastCount => {
                let cursor = model.model().buffers.find("cursor").unwrap();
                let words = self.read_row(slot, cursor, 0..1);
                let end = u32::from_le_bytes([words[0], words[1], words[2], words[3]]) as usize;
                for cache in self.caches() {
                    let region = Region { buffer: cache, rows: end..end + 1 };
                    let bytes = vec![0; model.buffer(cache).row_bytes()];
                    self.put(slot, region, &bytes)?;
                }
            }
            Sabotage::OtherSlot => {
                let id = model.state()[0];
                let other = SlotId(1 - slot.0);
                let mut bytes = self.read_row(other, id, 0..1);
                bytes[0] ^= 1;
                self.put(other, Region { buffer: id, rows: 0..1 }, &bytes)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn spoil(&self, dtype: DType, bytes: &mut [u8]) {
        let float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        let middle = bytes.len() / dtype.block_bytes() / 2;
        let change = |bytes: &mut [u8], f: &dyn Fn(usize, f32) -> f32| {
            if float {
                let values = load_elements(dtype, bytes);
                let values: Vec<f32> = values.iter().enumerate().map(|(i, v)| f(i, *v)).collect();
                store_elements(dtype, &values, bytes);
            }
        };
        match self.sabotage {
            Sabotage::Scale(by) => change(bytes, &|_, v| v * by),
            Sabotage::Noise(by) => change(bytes, &|i, v| if i % 2 == 0 { v + by } else { v - by }),
            Sabotage::Nan => change(bytes, &|i, v| if i == middle { f32::NAN } else { v }),
            Sabotage::FlipBit => {
                let last = bytes.len() - 1;
                bytes[last] ^= 0x40;
            }
            Sabotage::WrongToken if dtype == DType::I32 => {
                let token = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                bytes[..4].copy_from_slice(&(token + 1).to_le_bytes());
            }
            _ if self.flip => bytes[0] ^= 1,
            _ => {}
        }
    }
}

impl Program for BrokenProgram {
    fn model(&self) -> &Arc<Sealed> {
        self.program.model()
    }

    fn create_slot(&mut self) -> Result<SlotId, BackendError> {
        self.program.create_slot()
    }

    fn drop_slot(&mut self, slot: SlotId) -> Result<(), BackendError> {
        self.program.drop_slot(slot)
    }

    fn write_input(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), BackendError> {
        self.inputs.insert(buffer, bytes.to_vec());
        self.program.write_input(buffer, bytes)
    }

    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError> {
        assert!(self.sabotage != Sabotage::Panic, "sabotage");
        self.runs += 1;
        self.before(slot);
        let kept = if self.sabotage == Sabotage::DropState {
            let model = Arc::clone(self.program.model());
            let regions: Vec<Region> = model.state().iter().map(|&id| whole(&model, id)).collect();
            Some(self.program.freeze(slot, &regions)?)
        } else {
            None
        };
        self.program.run(slot, plan)?;
        self.after(slot)?;
        kept.map_or(Ok(()), |kept| self.program.thaw(slot, &[kept]))
    }

    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.program.read_output(buffer, offset, into)?;
        let buffer = self.program.model().buffer(buffer);
        // What lies around a result has its own check.
        if ![".left", ".right", ".above"].iter().any(|part| buffer.name.ends_with(part)) {
            self.spoil(buffer.dtype, into);
        }
        Ok(())
    }

    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.program.read_state(slot, region, into)
    }

    fn freeze_parts(
        &mut self,
        slot: SlotId,
        parts: &[Part<'_>],
    ) -> Result<Vec<Arc<dyn Frozen>>, BackendError> {
        self.program.freeze_parts(slot, parts)
    }

    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        self.program.thaw(slot, parts)
    }

    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        self.program.freeze_bytes(regions, bytes)
    }

    fn poison(&mut self) -> Result<(), BackendError> {
        self.poisoned = true;
        self.program.poison()
    }

    fn synchronize(&mut self) -> Result<(), BackendError> {
        self.program.synchronize()
    }

    fn counters(&self) -> Counters {
        let mut counters = self.program.counters();
        if self.sabotage == Sabotage::Allocate {
            counters.allocations += self.runs;
        }
        counters
    }

    fn frozen_bytes(&self) -> (usize, usize) {
        self.program.frozen_bytes()
    }
}
