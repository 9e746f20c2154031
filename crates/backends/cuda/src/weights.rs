//! Weights onto the device: streamed through pinned memory, made there if random, dequantised there if quantised.

use ampoule_backend::{BackendError, Progress, WeightSource};
use ampoule_plan::{BufferId, DType, Role};

use crate::driver::{DeviceMemory, Launch};
use crate::launch::arguments::dtype_code;
use crate::launch::{Launcher, args};
use crate::memory::Resident;
use crate::staging::UploadRing;

const SEGMENT: usize = 16 << 20;

/// Makes all weights resident. Waits for the device at the end.
pub(crate) fn load(
    resident: &Resident,
    source: &dyn WeightSource,
    progress: Progress<'_>,
) -> Result<(), BackendError> {
    let mut streamer = None;
    let sent = send_all(resident, source, progress, &mut streamer);
    // Staging memory must outlive the copies from it, also after an error.
    let done = resident.stream.synchronize();
    sent.and(done)
}

fn send_all(
    resident: &Resident,
    source: &dyn WeightSource,
    progress: Progress<'_>,
    streamer: &mut Option<Streamer>,
) -> Result<(), BackendError> {
    let table = &resident.model.model().buffers;
    let weights: Vec<BufferId> =
        table.iter().filter(|(_, b)| b.role == Role::Weight).map(|(id, _)| id).collect();
    let total: u64 = weights.iter().map(|&id| table[id].bytes() as u64).sum();
    let mut done = 0;
    progress(0, total);
    for id in weights {
        let buffer = &table[id];
        let at = resident.address(id, 0);
        let random = source
            .random(id)
            .filter(|_| matches!(buffer.dtype, DType::F32 | DType::F16 | DType::BF16));
        if let Some(fill) = random {
            let launcher = Launcher::plain(resident);
            let elements = buffer.elements() as i64;
            let dtype = dtype_code(buffer.dtype);
            let (seed, centre, half_width) = (fill.seed, fill.centre, fill.half_width);
            let grid = launcher.blocks_for(buffer.elements().div_ceil(4));
            launcher.go(
                "random_fill",
                Launch::new([grid, 1, 1], 256),
                args![at, elements, dtype, seed, centre, half_width],
            )?;
            done += buffer.bytes() as u64;
            progress(done, total);
            continue;
        }
        if streamer.is_none() {
            *streamer = Some(Streamer::new(resident)?);
        }
        let Some(streamer) = streamer.as_mut() else { continue };
        let block = buffer.dtype.block_bytes();
        let chunk = SEGMENT / block * block;
        let mut offset = 0;
        while offset < buffer.bytes() {
            let bytes = chunk.min(buffer.bytes() - offset);
            streamer.send(resident, source, id, offset, bytes)?;
            offset += bytes;
            done += bytes as u64;
            progress(done, total);
        }
    }
    Ok(())
}

/// Staging of weights that come as bytes.
struct Streamer {
    ring: UploadRing,
    /// Quantised blocks before they are expanded; allocated when the first quantised weight comes.
    blocks: Option<DeviceMemory>,
}

impl Streamer {
    fn new(resident: &Resident) -> Result<Self, BackendError> {
        Ok(Self { ring: UploadRing::new(&resident.device.context, SEGMENT)?, blocks: None })
    }

    fn send(
        &mut self,
        resident: &Resident,
        source: &dyn WeightSource,
        id: BufferId,
        offset: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        let buffer = resident.model.buffer(id);
        let at = resident.address(id, 0);
        let quantised = match buffer.dtype {
            DType::Q8_0 => Some(0_i32),
            DType::Q4_0 => Some(1),
            DType::Q4_1 => Some(2),
            _ => None,
        };
        let write = |area: &mut [u8]| Ok(source.read(id, offset, area)?);
        let Some(kind) = quantised else {
            // SAFETY: the weight's bytes from `offset` on lie in the weights' allocation.
            unsafe { self.ring.upload(&resident.stream, at + offset as u64, bytes, write)? };
            return Ok(());
        };
        if self.blocks.is_none() {
            self.blocks =
                Some(DeviceMemory::new(&resident.device.context, SEGMENT, "quantised weights")?);
        }
        let Some(blocks) = self.blocks.as_ref() else { return Ok(()) };
        // SAFETY: a segment fits; the stream orders this copy after the kernel that read the one before.
        unsafe { self.ring.upload(&resident.stream, blocks.at(), bytes, write)? };
        let first = offset / buffer.dtype.block_bytes();
        let count = (bytes / buffer.dtype.block_bytes()) as i64;
        let from = blocks.at();
        let to = at + (first * ampoule_plan::BLOCK * 2) as u64;
        let launcher = Launcher::plain(resident);
        let grid = launcher.blocks_for(count as usize * 32);
        launcher.go("dequantise", Launch::new([grid, 1, 1], 256), args![from, to, count, kind])
    }
}
