//! The scalar interpreter that defines every op.
//!
//! It is written to be read: each op copies its operands to `f32`, computes with plain loops in the order of the
//! formula in `ampoule_plan`'s documentation, and stores the result, rounding once. The other backends are held
//! against it. It is slow and meant for small models.
#![forbid(unsafe_code)]

mod elements;
mod interpreter;
mod sample;

use std::sync::Arc;

use ampoule_backend::host::{HostKernels, HostMemory, HostProgram, mathematics_digest};
use ampoule_backend::{
    Backend, BackendError, DeviceInfo, LoadOptions, Program, Progress, SlotId, WeightSource,
};
use ampoule_plan::{Plan, Sealed};

pub use elements::{load_elements, store_elements};
pub use sample::{Draw, philox4x32, sample};

/// Makes programs that the interpreter runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceBackend;

impl Backend for ReferenceBackend {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            backend: "reference",
            class: format!("reference {}", std::env::consts::ARCH),
            kernels: format!(
                "ampoule-reference {} libm={:016x}",
                env!("CARGO_PKG_VERSION"),
                mathematics_digest()
            ),
            description: "scalar interpreter, one thread".to_owned(),
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
        Ok(Box::new(HostProgram::load(model, Interpreter, weights, options, progress)?))
    }
}

struct Interpreter;

impl HostKernels for Interpreter {
    type Bytes = Vec<u8>;

    fn prepare(&mut self, _: &Sealed, _: &mut HostMemory<Vec<u8>>) -> Result<(), BackendError> {
        Ok(())
    }

    fn run(
        &mut self,
        model: &Sealed,
        plan: &Plan,
        slot: SlotId,
        memory: &mut HostMemory<Vec<u8>>,
    ) -> Result<(), BackendError> {
        let mut machine = interpreter::Machine::new(model, plan, slot, memory);
        for op in &plan.ops {
            machine.execute(op);
        }
        Ok(())
    }
}
