//! Ceilings that the benchmark example holds our kernels against. No part of the interface.

use ampoule_backend::BackendError;
use cudarc::driver::sys;

use crate::CudaBackend;
use crate::driver::{DeviceMemory, Event, Stream, check};

/// Milliseconds of one device-to-device copy of `bytes` by the driver: the median of `repeats`.
///
/// # Errors
/// If memory is short or the device fails.
pub fn plain_copy(
    backend: &CudaBackend,
    bytes: usize,
    repeats: usize,
) -> Result<f64, BackendError> {
    let context = &backend.device().context;
    let from = DeviceMemory::new(context, bytes, "a copy")?;
    let to = DeviceMemory::new(context, bytes, "a copy")?;
    let stream = Stream::new(context)?;
    // SAFETY: the whole allocations.
    unsafe {
        stream.fill(from.at(), 0x3f80_1234, bytes / 4)?;
        stream.fill(to.at(), 0, bytes / 4)?;
    }
    let mut times = Vec::new();
    for _ in 0..repeats.max(1) {
        let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
        start.record(&stream)?;
        // SAFETY: both allocations have `bytes`.
        let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to.at(), from.at(), bytes, stream.raw()) };
        check(status, "copying on the device")?;
        end.record(&stream)?;
        end.synchronize()?;
        times.push(f64::from(end.milliseconds_since(&start)?));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
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
