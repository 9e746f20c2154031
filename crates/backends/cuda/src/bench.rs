//! Ceilings that kernels are held against.

use std::sync::Arc;

use ampoule_backend::BackendError;
use cudarc::driver::sys;

use crate::CudaBackend;
pub use crate::driver::DriverCalls;
use crate::driver::{Context, DeviceMemory, Event, Launch, PinnedMemory, Stream, check, launch};
use crate::launch::args;

/// A copy of so many bytes within a device's memory, by the driver: what copies of State are held against.
pub struct PlainCopy {
    from: DeviceMemory,
    to: DeviceMemory,
    stream: Arc<Stream>,
    context: Arc<Context>,
    bytes: usize,
}

impl PlainCopy {
    /// Takes memory for both ends.
    ///
    /// # Errors
    /// If memory is short or the device fails.
    pub fn new(backend: &CudaBackend, bytes: usize) -> Result<Self, BackendError> {
        let context = &backend.device().context;
        let from = DeviceMemory::new(context, bytes, "a copy")?;
        let to = DeviceMemory::new(context, bytes, "a copy")?;
        let stream = Stream::new(context)?;
        // SAFETY: the whole allocations.
        unsafe {
            stream.fill(from.at(), 0x3f80_1234, bytes / 4)?;
            stream.fill(to.at(), 0, bytes / 4)?;
        }
        stream.synchronize()?;
        Ok(Self { from, to, stream, context: Arc::clone(context), bytes })
    }

    fn enqueue(&self) -> Result<(), BackendError> {
        // SAFETY: both allocations have `bytes`.
        unsafe { self.stream.copy(self.to.at(), self.from.at(), self.bytes) }
    }

    /// Copies, and waits until that is done.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&self) -> Result<(), BackendError> {
        self.enqueue()?;
        self.stream.synchronize()
    }

    /// Copies; milliseconds on the device, between two events.
    ///
    /// # Errors
    /// If the device fails.
    pub fn timed(&self) -> Result<f64, BackendError> {
        let (start, end) = (Event::new(&self.context, true)?, Event::new(&self.context, true)?);
        start.record(&self.stream)?;
        self.enqueue()?;
        end.record(&self.stream)?;
        end.synchronize()?;
        Ok(f64::from(end.milliseconds_since(&start)?))
    }
}

/// Milliseconds of one device-to-device copy of `bytes` by the driver: the median of `repeats` (at least one).
///
/// # Errors
/// If memory is short or the device fails.
pub fn plain_copy(
    backend: &CudaBackend,
    bytes: usize,
    repeats: usize,
) -> Result<f64, BackendError> {
    let copy = PlainCopy::new(backend, bytes)?;
    let times = (0..repeats.max(1)).map(|_| copy.timed());
    let mut times = times.collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// What the memory of a device reaches, in GB/s (10^9 bytes a second).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuBandwidth {
    /// Reading, by a kernel.
    pub read_gb_s: f64,
    /// Copying on the device by the driver; bytes read and bytes written are counted.
    pub copy_gb_s: f64,
    /// To page-locked host memory.
    pub to_host_gb_s: f64,
    /// From page-locked host memory.
    pub from_host_gb_s: f64,
}

/// Milliseconds of the fastest of `repeats` runs, after one to warm up.
fn fastest(
    backend: &CudaBackend,
    stream: &Stream,
    repeats: usize,
    run: impl Fn() -> Result<(), BackendError>,
) -> Result<f64, BackendError> {
    let context = &backend.device().context;
    let mut best = f64::INFINITY;
    for round in 0..=repeats {
        let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
        start.record(stream)?;
        run()?;
        end.record(stream)?;
        end.synchronize()?;
        if round > 0 {
            best = best.min(f64::from(end.milliseconds_since(&start)?));
        }
    }
    Ok(best)
}

/// Measures the device's memory with buffers of 1 GiB, and the link with 256 MiB.
///
/// # Errors
/// If memory is short or the device fails.
pub fn bandwidth(backend: &CudaBackend) -> Result<GpuBandwidth, BackendError> {
    let device = backend.device();
    let context = &device.context;
    let (bytes, link) = (1_usize << 30, 256_usize << 20);
    let copy_ms = plain_copy(backend, bytes, 9)?;
    let memory = DeviceMemory::new(context, bytes, "measuring")?;
    let pinned = PinnedMemory::new(context, link)?;
    let stream = Stream::new(context)?;
    // SAFETY: the whole allocation.
    unsafe { stream.fill(memory.at(), 0x3f80_1234, bytes / 4)? };
    let kernel = device.kernels.find("read_all")?;
    let how = Launch::new([device.limits.multiprocessors * 8, 1, 1], 256);
    let read_ms = fastest(backend, &stream, 9, || {
        let (from, vectors, out) = (memory.at(), (bytes / 16) as i64, memory.at());
        // SAFETY: the kernel's parameters in their order; it reads the allocation, and its first word is `out`.
        unsafe { launch(&stream, kernel.function, "read_all", how, args![from, vectors, out].0) }
    })?;
    // SAFETY: both ranges are `link` bytes long and outlive the copies, which `fastest` waits for.
    let to_host_ms = fastest(backend, &stream, 5, || unsafe {
        stream.download(pinned.at(), memory.at(), link)
    })?;
    // SAFETY: as above.
    let from_host_ms =
        fastest(backend, &stream, 5, || unsafe { stream.upload(memory.at(), pinned.at(), link) })?;
    Ok(GpuBandwidth {
        read_gb_s: bytes as f64 / read_ms / 1e6,
        copy_gb_s: 2.0 * bytes as f64 / copy_ms / 1e6,
        to_host_gb_s: link as f64 / to_host_ms / 1e6,
        from_host_gb_s: link as f64 / from_host_ms / 1e6,
    })
}

/// What this process has asked the driver for so far.
#[must_use]
pub fn driver_calls() -> DriverCalls {
    crate::driver::calls()
}

/// Bytes of device memory that are free.
///
/// # Errors
/// If the driver does not say.
pub fn free_memory(backend: &CudaBackend) -> Result<usize, BackendError> {
    backend.device().context.memory().map(|(free, _)| free)
}

/// Tells a profiler to begin or to end.
///
/// # Errors
/// If the driver refuses.
pub fn profile(on: bool) -> Result<(), BackendError> {
    // SAFETY: no arguments; a context is current in the programs that call this.
    let status = unsafe { if on { sys::cuProfilerStart() } else { sys::cuProfilerStop() } };
    check(status, "telling the profiler")
}
