//! Tuned CPU kernels.
//!
//! [`CpuBackend`] runs plans on the cores of the host. Every sum has one fixed order: a dot product is summed in 16
//! lanes, lane `l` taking elements `l, l + 16, ...` with fused multiply-add, and the lanes are then added in one
//! order. The order does not depend on the number of rows, threads or registers, so neither do results: a row of
//! a prefill, a decode step, one thread or eight, AVX-512, AVX2 or plain Rust all give the same bits.
//!
//! The environment variable `AMPOULE_CPU_ISA` (`portable`, `avx2`, `avx512`) chooses the instruction path.
// Rows start at multiples of their elements' size, and vector loads ask for no alignment.
#![allow(clippy::cast_ptr_alignment)]

mod kernels;
mod machine;
mod memory;
mod operands;
mod pool;
mod scratch;
mod simd;

use std::sync::Arc;

use ampoule_backend::host::{HostProgram, mathematics_digest};
use ampoule_backend::{
    Backend, BackendError, DeviceInfo, LoadOptions, Program, Progress, WeightSource,
};
use ampoule_plan::Sealed;

pub use memory::AlignedBytes;
pub use simd::Isa;

/// Makes programs that run on the host's cores.
#[derive(Clone, Copy, Debug)]
pub struct CpuBackend {
    threads: usize,
    isa: Isa,
}

impl CpuBackend {
    /// A backend whose programs use so many threads each; 0 means all available cores.
    pub fn new(threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { threads: if threads == 0 { cores() } else { threads }, isa: Isa::detect() }
    }

    /// The same with this instruction path, or the portable one where the CPU lacks it. Results are the same bits.
    #[must_use]
    pub fn with_isa(self, isa: Isa) -> Self {
        Self { isa: simd::Verified::new(isa).isa(), ..self }
    }

    /// Threads of each program, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The instruction path.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            backend: "cpu",
            class: format!("cpu {}", std::env::consts::ARCH),
            kernels: format!(
                "ampoule-cpu {} {} lanes=16 libm={:016x}",
                env!("CARGO_PKG_VERSION"),
                env!("AMPOULE_CPU_SOURCES"),
                mathematics_digest()
            ),
            description: format!("CPU, {} threads, {}", self.threads, self.isa),
            remarks: Vec::new(),
        }
    }

    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        let kernels = machine::CpuKernels::new(self.threads, self.isa);
        Ok(Box::new(HostProgram::load(model, kernels, weights, options, progress)?))
    }
}
