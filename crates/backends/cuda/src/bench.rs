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

/// Experiment.
pub fn trace(backend: &CudaBackend) -> Vec<u8> {
    backend.device().kernels.trace()
}

/// Experiment.
pub fn precompile() -> Result<(), BackendError> {
    crate::libs::nvrtc()?;
    let cache = crate::cache::Cache::of_user();
    for (name, _) in crate::compile::SOURCES {
        if std::env::var("AMPOULE_ONLY").is_ok_and(|o| !o.split(',').any(|n| n == *name)) {
            continue;
        }
        let begun = std::time::Instant::now();
        crate::compile::cubin(&cache, name, "sm_90a")?;
        println!("{name} {:?}", begun.elapsed());
    }
    Ok(())
}
