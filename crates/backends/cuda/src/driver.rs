//! The CUDA driver behind owned handles. Everything here may be called from any thread: each call that needs the
//! context makes it current first.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ampoule_backend::BackendError;
use cudarc::driver::sys::{self, CUdeviceptr, CUfunction, CUresult, CUstream};

/// How often the backend has asked the driver for what costs time in this process, counted where it is called: whatever a program
/// says of itself, this is what it did. What libraries launch is not in it; in a replay there is nothing but a graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverCalls {
    /// Graphs launched.
    pub graphs: u64,
    /// Kernels launched by themselves, or captured.
    pub kernels: u64,
    /// Copies and fills.
    pub copies: u64,
    /// Allocations, of device memory and of page-locked host memory.
    pub allocations: u64,
    /// Captures begun.
    pub captures: u64,
    /// Waits of the host for a stream or an event.
    pub waits: u64,
}

#[derive(Clone, Copy)]
pub(crate) enum Call {
    Graph,
    Kernel,
    Copy,
    Allocation,
    Capture,
    Wait,
}

static CALLS: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

pub(crate) fn counted(call: Call) {
    CALLS[call as usize].fetch_add(1, Ordering::Relaxed);
}

/// Counted so far.
pub(crate) fn calls() -> DriverCalls {
    let of = |call: Call| CALLS[call as usize].load(Ordering::Relaxed);
    DriverCalls {
        graphs: of(Call::Graph),
        kernels: of(Call::Kernel),
        copies: of(Call::Copy),
        allocations: of(Call::Allocation),
        captures: of(Call::Capture),
        waits: of(Call::Wait),
    }
}

/// Turns a driver status into an error that says what was being done.
pub(crate) fn check(status: CUresult, what: &str) -> Result<(), BackendError> {
    if status == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: `text` is written with a pointer to a static string, or left null.
    let named = unsafe { sys::cuGetErrorString(status, &raw mut text) };
    let sentence = if named == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: the driver returned a static, NUL-terminated string.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".to_owned()
    };
    Err(device_error(format!("{what}: {sentence} ({status:?})")))
}

/// Whether what was asked about is done; an error if it failed.
fn is_done(status: CUresult) -> Result<bool, BackendError> {
    match status {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        status => check(status, "work on the device").map(|()| true),
    }
}

/// An error of the device.
pub(crate) fn device_error(problem: String) -> BackendError {
    BackendError::Device { device: "CUDA device".to_owned(), problem }
}

/// The primary context of one device, retained.
pub(crate) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
}

// SAFETY: contexts are process-wide handles; the driver locks internally.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of `device`.
    pub(crate) fn retain(device: sys::CUdevice) -> Result<Arc<Self>, BackendError> {
        let mut raw = ptr::null_mut();
        // SAFETY: `device` came from cuDeviceGet; `raw` is written.
        let status = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) };
        check(status, "retaining the device's context")?;
        Ok(Arc::new(Self { raw, device }))
    }

    /// Makes the context current on this thread.
    pub(crate) fn enter(&self) -> Result<(), BackendError> {
        // SAFETY: the context is retained as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "entering the device's context")
    }

    /// A device attribute.
    pub(crate) fn attribute(&self, which: sys::CUdevice_attribute) -> Result<i32, BackendError> {
        device_attribute(self.device, which)
    }

    /// Bytes free and in all.
    pub(crate) fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are written; the context is current.
        let status = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        check(status, "asking for free memory")?;
        Ok((free, total))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: releases what `retain` retained, once.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A device attribute without a context.
pub(crate) fn device_attribute(
    device: sys::CUdevice,
    which: sys::CUdevice_attribute,
) -> Result<i32, BackendError> {
    let mut value = 0;
    // SAFETY: `value` is written.
    let status = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
    check(status, "asking for a device attribute")?;
    Ok(value)
}

/// A stream of its own, which does not wait for the default stream.
pub(crate) struct Stream {
    raw: CUstream,
    context: Arc<Context>,
}

// SAFETY: streams may be used from any thread; the driver locks internally.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes a stream of the least priority.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, BackendError> {
        Self::with_priority(context, false)
    }

    /// Makes a stream whose kernels begin before those of others that wait for room.
    pub(crate) fn urgent(context: &Arc<Context>) -> Result<Arc<Self>, BackendError> {
        Self::with_priority(context, true)
    }

    fn with_priority(context: &Arc<Context>, urgent: bool) -> Result<Arc<Self>, BackendError> {
        context.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both are written; the context is current.
        let status = unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) };
        check(status, "asking for the streams' priorities")?;
        let priority = if urgent { greatest } else { least };
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; `raw` is written.
        let status = unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, priority) };
        check(status, "making a stream")?;
        Ok(Arc::new(Self { raw, context: Arc::clone(context) }))
    }

    /// The driver's handle, valid while `self` lives.
    pub(crate) fn raw(&self) -> CUstream {
        self.raw
    }

    /// The context.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits for all work so far.
    pub(crate) fn synchronize(&self) -> Result<(), BackendError> {
        self.context.enter()?;
        counted(Call::Wait);
        // SAFETY: the stream is alive.
        check(unsafe { sys::cuStreamSynchronize(self.raw) }, "waiting for the device")
    }

    /// Whether all work so far is done; an error if some failed.
    pub(crate) fn idle(&self) -> Result<bool, BackendError> {
        self.context.enter()?;
        // SAFETY: the stream is alive.
        is_done(unsafe { sys::cuStreamQuery(self.raw) })
    }

    /// Later work waits for the event.
    pub(crate) fn wait(&self, event: &Event) -> Result<(), BackendError> {
        self.context.enter()?;
        // SAFETY: stream and event are alive.
        check(unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }, "waiting for an event")
    }

    /// Copies host bytes to the device.
    ///
    /// # Safety
    /// `from` must be readable for `bytes` until the copy is done (pinned memory is read asynchronously), and
    /// `to..to + bytes` must lie in one allocation that outlives it.
    pub(crate) unsafe fn upload(
        &self,
        to: CUdeviceptr,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.context.enter()?;
        counted(Call::Copy);
        // SAFETY: by the caller's promise.
        let status = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.raw) };
        check(status, "copying to the device")
    }

    /// Copies device bytes to the host.
    ///
    /// # Safety
    /// `to` must be writable for `bytes` until the copy is done, and `from..from + bytes` lie in one allocation.
    pub(crate) unsafe fn download(
        &self,
        to: *mut u8,
        from: CUdeviceptr,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.context.enter()?;
        counted(Call::Copy);
        // SAFETY: by the caller's promise.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.raw) };
        check(status, "copying from the device")
    }

    /// Copies on the device.
    ///
    /// # Safety
    /// Both ranges must lie in allocations that outlive the copy.
    pub(crate) unsafe fn copy(
        &self,
        to: CUdeviceptr,
        from: CUdeviceptr,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.context.enter()?;
        counted(Call::Copy);
        // SAFETY: by the caller's promise.
        let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw) };
        check(status, "copying on the device")
    }

    /// Fills device memory with a 32-bit pattern.
    ///
    /// # Safety
    /// `at..at + 4 * words` must lie in one allocation.
    pub(crate) unsafe fn fill(
        &self,
        at: CUdeviceptr,
        pattern: u32,
        words: usize,
    ) -> Result<(), BackendError> {
        self.context.enter()?;
        counted(Call::Copy);
        // SAFETY: by the caller's promise.
        let status = unsafe { sys::cuMemsetD32Async(at, pattern, words, self.raw) };
        check(status, "filling device memory")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `new`, destroyed once; pending work finishes first.
            unsafe {
                sys::cuStreamSynchronize(self.raw);
                sys::cuStreamDestroy_v2(self.raw);
            }
        }
    }
}

/// A mark in a stream.
pub(crate) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: events may be used from any thread; the driver locks internally.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Makes an event, with timing if asked for.
    pub(crate) fn new(context: &Arc<Context>, timing: bool) -> Result<Self, BackendError> {
        context.enter()?;
        let mut raw = ptr::null_mut();
        let flags = if timing { 0 } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 };
        // SAFETY: the context is current; `raw` is written.
        check(unsafe { sys::cuEventCreate(&raw mut raw, flags) }, "making an event")?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Marks the stream's work so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), BackendError> {
        self.context.enter()?;
        // SAFETY: event and stream are alive.
        check(unsafe { sys::cuEventRecord(self.raw, stream.raw) }, "recording an event")
    }

    /// Waits until what was marked is done.
    pub(crate) fn synchronize(&self) -> Result<(), BackendError> {
        self.context.enter()?;
        counted(Call::Wait);
        // SAFETY: the event is alive.
        check(unsafe { sys::cuEventSynchronize(self.raw) }, "waiting for an event")
    }

    /// Whether what was marked is done; an error if it failed.
    pub(crate) fn done(&self) -> Result<bool, BackendError> {
        self.context.enter()?;
        // SAFETY: the event is alive.
        is_done(unsafe { sys::cuEventQuery(self.raw) })
    }

    /// Milliseconds between two recorded events with timing, both done.
    pub(crate) fn milliseconds_since(&self, start: &Self) -> Result<f32, BackendError> {
        let mut elapsed = 0.0;
        // SAFETY: both events are alive.
        let status = unsafe { sys::cuEventElapsedTime_v2(&raw mut elapsed, start.raw, self.raw) };
        check(status, "reading a timer")?;
        Ok(elapsed)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `new`, destroyed once.
            unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Device memory.
pub(crate) struct DeviceMemory {
    at: CUdeviceptr,
    bytes: usize,
    context: Arc<Context>,
}

impl DeviceMemory {
    /// Allocates; `what` names the purpose in errors. At least one byte is allocated.
    pub(crate) fn new(
        context: &Arc<Context>,
        bytes: usize,
        what: &str,
    ) -> Result<Self, BackendError> {
        context.enter()?;
        counted(Call::Allocation);
        let mut at = 0;
        // SAFETY: `at` is written; the context is current.
        let status = unsafe { sys::cuMemAlloc_v2(&raw mut at, bytes.max(256)) };
        if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(BackendError::OutOfMemory {
                what: what.to_owned(),
                wanted: bytes as u64,
                available: context.memory()?.0 as u64,
            });
        }
        check(status, &format!("allocating {bytes} bytes for {what}"))?;
        Ok(Self { at, bytes: bytes.max(256), context: Arc::clone(context) })
    }

    /// The address.
    pub(crate) const fn at(&self) -> CUdeviceptr {
        self.at
    }

    /// Its size.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by `new`, freed once; cuMemFree waits for work that uses it.
            unsafe { sys::cuMemFree_v2(self.at) };
        }
    }
}

/// Page-locked host memory that the device can read and write.
pub(crate) struct PinnedMemory {
    at: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: plain memory; who may touch it is up to the owners below.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above: shared access goes through raw pointers under the owners' locks.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Allocates zeroed memory, mapped into the device's address space.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, BackendError> {
        let memory = Self::unwritten(context, bytes)?;
        // SAFETY: freshly allocated, `bytes` long.
        unsafe { ptr::write_bytes(memory.at, 0, bytes) };
        Ok(memory)
    }

    /// The same, but what it holds is not defined: it must be written before it is read.
    pub(crate) fn unwritten(context: &Arc<Context>, bytes: usize) -> Result<Self, BackendError> {
        context.enter()?;
        counted(Call::Allocation);
        let mut at = ptr::null_mut();
        // SAFETY: `at` is written; the context is current. 2 is CU_MEMHOSTALLOC_DEVICEMAP.
        let status = unsafe { sys::cuMemHostAlloc(&raw mut at, bytes, 2) };
        check(status, &format!("page-locking {bytes} bytes of host memory"))?;
        Ok(Self { at: at.cast(), bytes, context: Arc::clone(context) })
    }

    /// The host address.
    pub(crate) const fn at(&self) -> *mut u8 {
        self.at
    }

    /// The host address as 64-bit words; page-locked memory begins at a page.
    #[allow(clippy::cast_ptr_alignment)]
    pub(crate) const fn words(&self) -> *mut u64 {
        self.at.cast()
    }

    /// Its size.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address by which kernels reach it.
    pub(crate) fn device_address(&self) -> Result<CUdeviceptr, BackendError> {
        self.context.enter()?;
        let mut at = 0;
        // SAFETY: the memory was allocated with DEVICEMAP; `at` is written.
        let status = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut at, self.at.cast(), 0) };
        check(status, "mapping host memory")?;
        Ok(at)
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by `unwritten`, freed once.
            unsafe { sys::cuMemFreeHost(self.at.cast()) };
        }
    }
}

/// Compiled kernels, loaded.
pub(crate) struct Module {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: modules are process-wide handles; the driver locks internally.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin.
    pub(crate) fn load(
        context: &Arc<Context>,
        cubin: &[u8],
        name: &str,
    ) -> Result<Self, BackendError> {
        context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `cubin` is a whole ELF image made by NVRTC and checked by the cache's digest.
        let status = unsafe { sys::cuModuleLoadData(&raw mut raw, cubin.as_ptr().cast()) };
        check(status, &format!("loading the kernels of {name}"))?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// The kernel called `name`.
    pub(crate) fn function(&self, name: &str) -> Result<CUfunction, BackendError> {
        self.context.enter()?;
        let text = CString::new(name).map_err(|e| device_error(format!("kernel '{name}': {e}")))?;
        let mut function = ptr::null_mut();
        // SAFETY: the module is alive; `text` is NUL-terminated; `function` is written.
        let status =
            unsafe { sys::cuModuleGetFunction(&raw mut function, self.raw, text.as_ptr()) };
        check(status, &format!("finding kernel '{name}'"))?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: loaded by `load`, unloaded once.
            unsafe { sys::cuModuleUnload(self.raw) };
        }
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    pub(crate) shared: u32,
    /// May begin before its predecessor has ended; the kernel waits by itself.
    pub(crate) programmatic: bool,
    /// All blocks run at once.
    pub(crate) cooperative: bool,
}

impl Launch {
    /// A grid of blocks.
    pub(crate) const fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block, shared: 0, programmatic: false, cooperative: false }
    }
}

/// Enqueues a kernel.
///
/// # Safety
/// `args` must point at values of the kernel's parameter types, and what they address must be valid on the device
/// until the kernel (or the graph that captures it) is done.
pub(crate) unsafe fn launch(
    stream: &Stream,
    function: CUfunction,
    name: &str,
    how: Launch,
    args: &mut [*mut c_void],
) -> Result<(), BackendError> {
    let mut attributes: [sys::CUlaunchAttribute; 1] = [
        // SAFETY: plain data without invalid bit patterns; zero means "ignore".
        unsafe { std::mem::zeroed() },
    ];
    let mut count = 0;
    if how.cooperative {
        attributes[0].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        attributes[0].value.cooperative = 1;
        count = 1;
    } else if how.programmatic {
        attributes[0].id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[0].value.programmaticStreamSerializationAllowed = 1;
        count = 1;
    }
    let config = sys::CUlaunchConfig {
        gridDimX: how.grid[0],
        gridDimY: how.grid[1],
        gridDimZ: how.grid[2],
        blockDimX: how.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: how.shared,
        hStream: stream.raw,
        attrs: attributes.as_mut_ptr(),
        numAttrs: count,
    };
    stream.context.enter()?;
    counted(Call::Kernel);
    // SAFETY: the configuration is complete; the arguments are the caller's promise.
    let status = unsafe {
        sys::cuLaunchKernelEx(&raw const config, function, args.as_mut_ptr(), ptr::null_mut())
    };
    if status == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    check(status, &format!("kernel '{name}', grid {:?}, block {}", how.grid, how.block))
}
