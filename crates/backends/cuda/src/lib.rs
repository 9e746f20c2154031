//! NVIDIA GPU backend: a plan captured as one graph.
//!
//! [`CudaBackend::discover`] says which GPUs there are, or in a sentence why none can be used: libcuda, NVRTC and
//! cuBLASLt are found at run time, so one binary runs everywhere. Kernels live in `kernels/*.cu`, are compiled by NVRTC
//! for the device at hand and cached on disk by content.
//!
//! Every plan is captured once when a model is loaded, for all slots: kernels find State by its offset in the slot whose turn
//! it is. A replay is one graph launch: nothing is allocated, captured or waited for; eight bytes are copied on the device before
//! it where another slot's turn begins. Kernels read the position from the cursor on the device. The token drawn by a `sample` op
//! reaches the host through mapped memory while the rest of the replay still runs.
//!
//! Frozen state lives in a reservation made at load; freeze and thaw are one kernel over a table of regions. Many rows of a
//! snapshot are copied by a second one, beside the replays that follow.

#[doc(hidden)]
pub mod bench;
mod cache;
mod capture;
mod compile;
mod device;
mod driver;
mod frozen;
mod fuse;
mod kernels;
mod launch;
mod libs;
mod lt;
mod memory;
mod pinned;
mod pool;
mod program;
mod staging;
mod weights;

pub use device::{CudaBackend, CudaOptions, GpuInfo};
pub use libs::LIBS_VARIABLE;
