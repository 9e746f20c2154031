//! Which GPUs there are, and the backend on one of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use ampoule_backend::{
    Backend, BackendError, DeviceInfo, LoadOptions, Program, Progress, WeightSource,
};
use ampoule_plan::Sealed;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::cache::Cache;
use crate::driver::{Context, Event, check, device_attribute, device_error};
use crate::kernels::Kernels;
use crate::lt::Lt;
use crate::{compile, libs, program};

/// A GPU that the backend can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// The driver's number of it.
    pub ordinal: usize,
    /// Its product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of memory.
    pub memory: u64,
}

/// Switches of the backend. Results with and without [`Self::fusion`], [`Self::chain`] and
/// [`Self::programmatic_launch`] are the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Runs of ops become one kernel where they can. `AMPOULE_CUDA_FUSION=0` turns it off.
    pub fusion: bool,
    /// Kernels may begin before their predecessors have ended, from compute capability 9.0 on. `AMPOULE_CUDA_PDL=0`.
    pub programmatic_launch: bool,
    /// Times the candidate algorithms of every matrix product at load. `AMPOULE_CUDA_TUNE=0`.
    pub tune: bool,
    /// Uses cuBLASLt for 16-bit matrix products of prefill. `AMPOULE_CUDA_CUBLASLT=0`.
    pub cublaslt: bool,
    /// Blocks of the matrix-vector kernel per multiprocessor. `AMPOULE_CUDA_GEMV_BLOCKS`.
    pub gemv_blocks: u32,
    /// Products of decode that follow each other become one launch, from compute capability 9.0 on and where a block has room
    /// for its rings (not on 12.0). `AMPOULE_CUDA_CHAIN=0` turns it off.
    pub chain: bool,
    /// Most pieces of weights that a warp of such a launch has on their way. `AMPOULE_CUDA_CHAIN_DEPTH`.
    pub chain_depth: u32,
    /// How many it has on their way in the middle of a product. `AMPOULE_CUDA_CHAIN_NEAR`.
    pub chain_near: u32,
    /// State is copied by bulk copies, from compute capability 9.0 on. `AMPOULE_CUDA_BULK=0`: by threads, as before that.
    pub bulk_copies: bool,
    /// Blocks a multiprocessor that copy a snapshot's rows beside replays; 0: replays wait for the rows, too.
    /// `AMPOULE_CUDA_BESIDE`.
    pub beside: u32,
    /// Prints what each plan became, to standard error. `AMPOULE_CUDA_TRACE=1`.
    pub trace: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            fusion: true,
            programmatic_launch: true,
            tune: true,
            cublaslt: true,
            gemv_blocks: 4,
            chain: true,
            chain_depth: 3,
            chain_near: 1,
            bulk_copies: true,
            beside: 2,
            trace: false,
        }
    }
}

impl CudaOptions {
    /// The defaults, changed by the environment (docs/gpu-testing.md).
    ///
    /// # Errors
    /// If a variable has a value that it cannot have.
    pub fn from_environment() -> Result<Self, BackendError> {
        Self::of(&|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, BackendError> {
        let switch = |name: &str, default: bool| match variable(name).as_deref() {
            None | Some("") => Ok(default),
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(other) => Err(device_error(format!("{name} is '{other}': it can be 0 or 1"))),
        };
        let on = |name: &str| switch(name, true);
        let number = |name: &str, default: u32| match variable(name).as_deref() {
            None | Some("") => Ok(default),
            Some(value) => value
                .parse()
                .map_err(|_| device_error(format!("{name} is '{value}': it must be a number"))),
        };
        let defaults = Self::default();
        Ok(Self {
            fusion: on("AMPOULE_CUDA_FUSION")?,
            programmatic_launch: on("AMPOULE_CUDA_PDL")?,
            tune: on("AMPOULE_CUDA_TUNE")?,
            cublaslt: on("AMPOULE_CUDA_CUBLASLT")?,
            gemv_blocks: number("AMPOULE_CUDA_GEMV_BLOCKS", defaults.gemv_blocks)?.max(1),
            chain: on("AMPOULE_CUDA_CHAIN")?,
            chain_depth: number("AMPOULE_CUDA_CHAIN_DEPTH", defaults.chain_depth)?,
            chain_near: number("AMPOULE_CUDA_CHAIN_NEAR", defaults.chain_near)?.max(1),
            bulk_copies: on("AMPOULE_CUDA_BULK")?,
            beside: number("AMPOULE_CUDA_BESIDE", defaults.beside)?,
            trace: switch("AMPOULE_CUDA_TRACE", false)?,
        })
    }
}

/// What one device can do, as kernels and launches need it.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) multiprocessors: u32,
    pub(crate) shared_per_block: u32,
    pub(crate) programmatic: bool,
    /// Bulk copies to shared memory: compute capability 9.0.
    pub(crate) bulk: bool,
    /// The same, for copies of state.
    pub(crate) bulk_copies: bool,
}

/// The backend on one GPU.
pub struct CudaBackend {
    gpu: GpuInfo,
    options: CudaOptions,
    shared: Arc<Device>,
}

/// What programs on one device share.
pub(crate) struct Device {
    pub(crate) context: Arc<Context>,
    pub(crate) kernels: Kernels,
    pub(crate) lt: Option<Lt>,
    pub(crate) lt_missing: Option<String>,
    pub(crate) limits: Limits,
    /// After the last launch whose blocks wait for each other: a chain of products has a block on every multiprocessor, and
    /// two of them from different streams could each get a part of the device and wait for ever.
    pub(crate) chained: Arc<Chained>,
}

/// After the last launch with chains on a GPU.
pub(crate) type Chained = Mutex<Option<Arc<Event>>>;

/// One for each GPU, whatever number of backends a process has on it.
fn chained_of(ordinal: usize) -> Arc<Chained> {
    static ALL: Mutex<BTreeMap<usize, Arc<Chained>>> = Mutex::new(BTreeMap::new());
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(all.entry(ordinal).or_default())
}

impl CudaBackend {
    /// The GPUs that the backend can use.
    ///
    /// # Errors
    /// A sentence that says what is missing: the driver, a GPU of compute capability 8.0 or newer, or NVRTC.
    pub fn discover() -> Result<Vec<GpuInfo>, BackendError> {
        let found = Self::gpus()?;
        libs::nvrtc()?;
        Ok(found)
    }

    /// The GPUs that the backend could use if NVRTC is there.
    ///
    /// # Errors
    /// As [`Self::discover`], but for NVRTC.
    pub fn gpus() -> Result<Vec<GpuInfo>, BackendError> {
        libs::driver()?;
        // SAFETY: libcuda is loaded.
        check(unsafe { sys::cuInit(0) }, "starting the driver")?;
        let mut count = 0;
        // SAFETY: `count` is written.
        check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "counting devices")?;
        let mut found = Vec::new();
        for ordinal in 0..count {
            found.push(describe(ordinal)?);
        }
        let (usable, old): (Vec<_>, Vec<_>) = found.into_iter().partition(|g| g.capability.0 >= 8);
        if usable.is_empty() {
            let problem = old.first().map_or("there is no GPU".to_owned(), |g| {
                let (major, minor) = g.capability;
                format!("{} has compute capability {major}.{minor}; 8.0 or newer is needed", g.name)
            });
            return Err(device_error(problem));
        }
        Ok(usable)
    }

    /// Whether the backend would have to compile its kernels for the GPU with this number, because the cache lacks some.
    ///
    /// # Errors
    /// If [`Self::discover`] fails, or there is no such GPU.
    pub fn would_compile(ordinal: usize) -> Result<bool, BackendError> {
        let (major, minor) = Self::find(ordinal)?.capability;
        compile::is_cached(&Cache::of_user(), &compile::architecture(major, minor))
            .map(|cached| !cached)
    }

    fn find(ordinal: usize) -> Result<GpuInfo, BackendError> {
        let found = Self::discover()?.into_iter().find(|g| g.ordinal == ordinal);
        found.ok_or_else(|| device_error(format!("there is no usable GPU {ordinal}")))
    }

    /// The backend on the GPU with this number, with the options of the environment.
    ///
    /// # Errors
    /// If [`Self::discover`] fails, there is no such GPU, or the kernels do not compile.
    pub fn new(ordinal: usize) -> Result<Self, BackendError> {
        Self::with_options(ordinal, CudaOptions::from_environment()?)
    }

    /// The backend on the GPU with this number.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_options(ordinal: usize, options: CudaOptions) -> Result<Self, BackendError> {
        let gpu = Self::find(ordinal)?;
        let context = Context::retain(device_of(ordinal as i32)?)?;
        let limits = Limits {
            multiprocessors: gpu.multiprocessors as u32,
            shared_per_block: context
                .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as u32,
            programmatic: options.programmatic_launch && gpu.capability.0 >= 9,
            bulk: gpu.capability.0 >= 9,
            bulk_copies: options.bulk_copies && gpu.capability.0 >= 9,
        };
        let (major, minor) = gpu.capability;
        let architecture = compile::architecture(major, minor);
        let kernels = Kernels::load(&context, &architecture, limits.shared_per_block)?;
        let (lt, lt_missing) = if options.cublaslt {
            match Lt::new(&context) {
                Ok(lt) => (Some(lt), None),
                Err(error) => (None, Some(error.to_string())),
            }
        } else {
            (None, Some("cuBLASLt is turned off".to_owned()))
        };
        let shared = Arc::new(Device {
            context,
            kernels,
            lt,
            lt_missing,
            limits,
            chained: chained_of(ordinal),
        });
        Ok(Self { gpu, options, shared })
    }

    /// The GPU it runs on.
    pub const fn gpu(&self) -> &GpuInfo {
        &self.gpu
    }

    /// Why prefill runs on the slow float32 kernels instead of cuBLASLt, if it does.
    pub fn without_cublaslt(&self) -> Option<&str> {
        self.shared.lt_missing.as_deref()
    }

    /// What its user should know: that prefill is slow, that every start compiles the kernels.
    fn remarks(&self) -> impl Iterator<Item = String> {
        let slow = self.without_cublaslt().map(|why| format!("prefill is slow: {why}"));
        slow.into_iter().chain(self.shared.kernels.not_kept.clone())
    }

    pub(crate) const fn device(&self) -> &Arc<Device> {
        &self.shared
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> DeviceInfo {
        let (major, minor) = self.gpu.capability;
        let nvrtc = compile::version().map_or("none".to_owned(), |(a, b)| format!("{a}.{b}"));
        let lt = self.shared.lt.as_ref().map_or("none".to_owned(), |lt| lt.version().to_string());
        let digest = compile::source_digest().to_hex();
        let remarks: Vec<String> = self.remarks().collect();
        DeviceInfo {
            backend: "cuda",
            class: format!("cuda sm_{major}{minor} {}", self.gpu.name),
            kernels: format!(
                "cuda kernels {} nvrtc {nvrtc} cublaslt {lt} driver {}",
                &digest[..16],
                driver_version() / 1000
            ),
            description: format!(
                "{}, {} multiprocessors, {} GiB{}",
                self.gpu.name,
                self.gpu.multiprocessors,
                self.gpu.memory >> 30,
                if remarks.is_empty() {
                    String::new()
                } else {
                    format!(" ({})", remarks.join("; "))
                }
            ),
            remarks,
        }
    }

    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        program::load(self.device(), self.options, &model, weights, options, progress)
    }
}

fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: libcuda is loaded, or there would be no backend; `version` is written.
    unsafe { sys::cuDriverGetVersion(&raw mut version) };
    version
}

fn device_of(ordinal: i32) -> Result<sys::CUdevice, BackendError> {
    let mut device = 0;
    // SAFETY: the driver is initialised; `device` is written.
    check(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) }, "opening the device")?;
    Ok(device)
}

fn describe(ordinal: i32) -> Result<GpuInfo, BackendError> {
    let device = device_of(ordinal)?;
    let mut name = [0_u8; 256];
    // SAFETY: the driver writes at most 256 bytes, NUL included.
    let status = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) };
    check(status, "asking for the device's name")?;
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    let mut memory = 0;
    // SAFETY: `memory` is written.
    let status = unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) };
    check(status, "asking for the device's memory")?;
    let attribute = |which| device_attribute(device, which);
    Ok(GpuInfo {
        ordinal: ordinal as usize,
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        memory: memory as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_have_values_that_they_can_have() {
        let of = |name: &'static str, value: &'static str| {
            CudaOptions::of(&|asked| (asked == name).then(|| value.to_owned()))
        };
        assert!(!of("AMPOULE_CUDA_FUSION", "0").unwrap().fusion);
        assert!(of("AMPOULE_CUDA_FUSION", "1").unwrap().fusion);
        assert!(of("AMPOULE_CUDA_TRACE", "1").unwrap().trace);
        assert_eq!(of("AMPOULE_CUDA_BESIDE", "3").unwrap().beside, 3);
        assert_eq!(of("OTHER", "no").unwrap(), CudaOptions::default());
        for (name, value) in [("AMPOULE_CUDA_FUSION", "no"), ("AMPOULE_CUDA_BESIDE", "foo")] {
            let problem = of(name, value).unwrap_err().to_string();
            assert!(problem.contains(name) && problem.contains(value), "{problem}");
        }
    }
}
