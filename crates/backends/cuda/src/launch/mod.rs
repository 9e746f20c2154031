//! From steps of a plan to kernels on a stream. What is enqueued here is captured; nothing is allocated or waited for.

pub(crate) mod arguments;
mod attention;
mod elementwise;
mod linear;
mod recurrent;
mod sample;

use std::cell::Cell;
use std::ffi::c_void;

use ampoule_backend::BackendError;
use ampoule_plan::{Op, Phase, Plan, Role, Sealed, View};

use crate::device::CudaOptions;
use crate::driver::{self, Launch, Stream};
use crate::fuse::Step;
use crate::kernels::Kernel;
use crate::lt::Products;
use crate::memory::Resident;
use arguments::{MatrixView, WordView};

pub(crate) use attention::{attention_workspace, decodes_by_splits};
pub(crate) use linear::{gemv_fits, product_shape};

/// Pointers to a kernel's arguments as the driver takes them, in the order of its parameters, and one place more: every kernel of
/// a plan has the slot's place as its last parameter, which [`Launcher::go_on`] fills in. Made by `args!`.
pub(crate) struct Arguments<'a>(pub(crate) &'a mut [*mut c_void]);

/// [`Arguments`] of these places (locals or fields).
macro_rules! args {
    ($($place:expr),* $(,)?) => {
        $crate::launch::Arguments(&mut [
            $( (&raw const $place).cast_mut().cast::<std::ffi::c_void>(), )*
            std::ptr::null_mut(),
        ])
    };
}
pub(crate) use args;

/// Most token rows of the decode kernels.
pub(crate) const DECODE_ROWS: usize = 8;
const BLOCK: u32 = 256;

/// Enqueues the kernels of one plan, for whatever slot is entered when they run.
pub(crate) struct Launcher<'a> {
    pub(crate) resident: &'a Resident,
    plan: usize,
    phase: Phase,
    context: usize,
    options: CudaOptions,
    products: Option<&'a Products>,
    /// Named in errors.
    op: Cell<&'static str>,
}

/// A parameter (weight, bias, table) that the op has in State: there, kernels reach only what models carry from step to step.
fn parameter_in_state(model: &Sealed, op: &Op) -> Option<(&'static str, String)> {
    let parameters = ["table", "weight", "bias", "frequencies", "a_log", "dt_bias"];
    let operand = op
        .operands()
        .into_iter()
        .find(|o| parameters.contains(&o.field) && model.buffer(o.view.buffer).role.is_state())?;
    Some((operand.field, model.buffer(operand.view.buffer).name.clone()))
}

impl<'a> Launcher<'a> {
    /// For kernels outside a plan.
    pub(crate) fn plain(resident: &'a Resident) -> Self {
        Self {
            resident,
            plan: 0,
            phase: Phase::Reset,
            context: 0,
            options: CudaOptions { programmatic_launch: false, ..CudaOptions::default() },
            products: None,
            op: Cell::new(""),
        }
    }

    /// For a plan's steps.
    pub(crate) fn new(
        resident: &'a Resident,
        plan: usize,
        options: CudaOptions,
        products: &'a Products,
    ) -> Self {
        let key = resident.model.model().plans[plan].key;
        Self {
            resident,
            plan,
            phase: key.phase,
            context: key.context,
            options,
            products: Some(products),
            op: Cell::new(""),
        }
    }

    /// Enqueues steps of a plan as one launch: one step, or a chain that [`Self::launches`] has found.
    pub(crate) fn steps(&self, plan: &Plan, steps: &[Step]) -> Result<(), BackendError> {
        let [step, ..] = steps else { return Ok(()) };
        let first = step.first_op();
        self.op.set(plan.ops[first].name());
        for index in steps.iter().flat_map(Step::ops) {
            let op = &plan.ops[index];
            let blocks = |v: &View| {
                let buffer = self.resident.model.buffer(v.buffer);
                buffer.dtype.is_quantized() && buffer.role != Role::Weight
            };
            if !matches!(op, Op::Copy(_))
                && let Some(o) = op.operands().into_iter().find(|o| blocks(o.view))
            {
                let name = &self.resident.model.buffer(o.view.buffer).name;
                self.op.set(op.name());
                return Err(
                    self.unsupported(format!("'{name}' holds quantised blocks and is no weight"))
                );
            }
            if let Some((field, name)) = parameter_in_state(&self.resident.model, op) {
                self.op.set(op.name());
                return Err(self.unsupported(format!(
                    "its {field} '{name}' is State; kernels look for parameters among weights and inputs"
                )));
            }
        }
        let result = match step {
            _ if steps.len() > 1 => self.chain(plan, steps),
            Step::Op(index) => self.op(*index, &plan.ops[*index]),
            Step::Gemv(group) => self.gemv_group(plan, group),
            Step::NormRopeAppend(fused) => self.norm_rope_append(plan, fused),
            Step::AttentionGate { attention, gate } => {
                match (&plan.ops[*attention], &plan.ops[*gate]) {
                    (Op::Attention(a), Op::SigmoidGate(g)) => self.attention(a, Some(g)),
                    _ => Err(self.unsupported("the fusion does not fit the plan".to_owned())),
                }
            }
            Step::DeltaNorm { delta, norm } => match (&plan.ops[*delta], &plan.ops[*norm]) {
                (Op::GatedDelta(d), Op::GatedRmsNorm(n)) => self.gated_delta(d, Some(n)),
                _ => Err(self.unsupported("the fusion does not fit the plan".to_owned())),
            },
        };
        result.map_err(|error| match error {
            BackendError::Device { device, problem } => BackendError::Device {
                device,
                problem: format!(
                    "plan '{}', op {first} ({}): {problem}",
                    plan.key,
                    plan.ops[first].name()
                ),
            },
            other => other,
        })
    }

    fn op(&self, index: usize, op: &Op) -> Result<(), BackendError> {
        match op {
            Op::Embed(o) => self.embed(o),
            Op::RmsNorm(o) => self.rms_norm(o),
            Op::Linear(o) => self.linear(index, &o.x, &o.weight, o.bias.as_ref(), &o.out, false),
            Op::LinearAdd(o) => self.linear(index, &o.x, &o.weight, o.bias.as_ref(), &o.out, true),
            Op::Rope(o) => self.rope(o),
            Op::KvAppend(o) => self.kv_append(o),
            Op::Attention(o) => self.attention(o, None),
            Op::CausalConv(o) => self.causal_conv(o),
            Op::GatedDelta(o) => self.gated_delta(o, None),
            Op::GatedRmsNorm(o) => self.gated_rms_norm(o),
            Op::SigmoidGate(o) => self.sigmoid_gate(o),
            Op::SwiGlu(o) => self.swiglu(o),
            Op::LastRow(o) => self.last_row(o),
            Op::Observe(o) => self.observe(o),
            Op::BeginReply(o) => self.begin_reply(o),
            Op::Sample(o) => self.sample(o),
            Op::Advance(o) => self.advance(o),
            Op::Fill(o) => self.fill(o),
            Op::Copy(o) => self.copy(o),
        }
    }

    /// Enqueues a kernel with arguments of its parameters' types. Kernels of plans have one more parameter, which they all get
    /// here: where to read the place of the slot. The driver takes as many as a kernel has.
    pub(crate) fn go(
        &self,
        name: &str,
        how: Launch,
        arguments: Arguments<'_>,
    ) -> Result<(), BackendError> {
        let kernel = self.resident.device.kernels.find(name)?;
        self.go_on(&self.resident.stream, kernel, name, how, arguments)
    }

    /// The same with a kernel that was looked up, on any stream.
    pub(crate) fn go_on(
        &self,
        stream: &Stream,
        kernel: Kernel,
        name: &str,
        how: Launch,
        arguments: Arguments<'_>,
    ) -> Result<(), BackendError> {
        if how.shared > 0 && how.shared > kernel.shared_limit {
            return Err(self.unsupported(format!(
                "kernel '{name}' would need {} bytes of shared memory, of which a block has {}",
                how.shared, kernel.shared_limit
            )));
        }
        let home = self.resident.home();
        let Arguments(pointers) = arguments;
        if let Some(last) = pointers.last_mut() {
            *last = (&raw const home).cast_mut().cast();
        }
        // SAFETY: the callers in this module pass each kernel's parameters in order, as its source declares them; all
        // addresses (of State: offsets in a slot) come from the resident arenas, which the captured graph keeps alive, and
        // the plan's check holds every view inside its buffer.
        unsafe { driver::launch(stream, kernel.function, name, how, pointers) }
    }

    /// A launch that may begin early, where the device can.
    fn early(&self, grid: [u32; 3], block: u32) -> Launch {
        Launch { programmatic: self.programmatic(), ..Launch::new(grid, block) }
    }

    /// Whether launches may begin early. Only in decode: between the products of prefill it costs more than it gains (7.76
    /// against 7.45 ms for 24 tokens of the 9B shape on an H100).
    fn programmatic(&self) -> bool {
        self.phase == Phase::Decode
            && self.options.programmatic_launch
            && self.resident.device.limits.programmatic
    }

    /// Blocks of 256 threads for so many threads, at most 16 per multiprocessor: kernels loop over the rest.
    pub(crate) fn blocks_for(&self, threads: usize) -> u32 {
        let most = self.resident.device.limits.multiprocessors as usize * 16;
        threads.div_ceil(BLOCK as usize).clamp(1, most) as u32
    }

    /// A grid of one row of blocks per token row, each thread taking four columns at a time.
    fn row_grid(&self, rows: usize, cols: usize) -> [u32; 3] {
        let across = cols.div_ceil(4 * BLOCK as usize).max(1);
        // Few rows: spread the columns; many rows: let each block loop.
        let most = (self.resident.device.limits.multiprocessors as usize * 8).div_ceil(rows).max(1);
        [rows as u32, across.min(most) as u32, 1]
    }

    fn matrix(&self, view: &View) -> MatrixView {
        self.resident.matrix(view)
    }

    fn words(&self, view: &View) -> WordView {
        self.resident.words(view)
    }

    fn address(&self, view: &View) -> u64 {
        self.resident.view_address(view)
    }

    fn optional(&self, view: Option<&View>) -> u64 {
        view.map_or(0, |v| self.address(v))
    }

    fn is_weight(&self, view: &View) -> bool {
        self.resident.model.buffer(view.buffer).role == Role::Weight
    }

    /// Whether one op of the plan alone writes the view's buffer. What it holds when that op's kernel begins is then what it
    /// held when the replay began, and may be read before the kernels in between have ended.
    fn only_writer(&self, view: &View) -> bool {
        let ops = &self.resident.model.model().plans[self.plan].ops;
        let writes = |op: &Op| {
            op.operands().iter().any(|o| o.view.buffer == view.buffer && o.access.writes())
        };
        ops.iter().filter(|op| writes(op)).count() == 1
    }

    fn unsupported(&self, problem: String) -> BackendError {
        BackendError::Unsupported { backend: "cuda", op: self.op.get(), problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ampoule_plan::{
        Buffer, BufferTable, DType, Fill, Growth, Model, RmsNorm, ShapeKey, StateKind,
    };

    #[test]
    fn a_parameter_in_state_is_found() {
        let state = Role::State { kind: StateKind::Recurrent, growth: Growth::Fixed };
        for (role, found) in [(Role::Weight, None), (state, Some(("weight", "w".to_owned())))] {
            let mut buffers = BufferTable::default();
            let mut add = |name: &str, role, shape: &[usize]| {
                let (name, shape) = (name.to_owned(), shape.to_vec());
                let id = buffers.add(Buffer { name, role, dtype: DType::F32, shape }).unwrap();
                buffers.view(id)
            };
            let (x, out) = (add("x", Role::Input, &[1, 8]), add("out", Role::Output, &[1, 8]));
            let weight = add("w", role.clone(), &[1, 8]);
            let norm: Op =
                RmsNorm { x, weight: weight.clone(), out, eps: 1e-6, centered: false }.into();
            let reset = if role.is_state() {
                vec![Fill { out: weight, bits: 0 }.into()]
            } else {
                Vec::new()
            };
            let key = |phase| ShapeKey { phase, tokens: 1, slots: 1, context: 1 };
            let plans = vec![
                Plan { key: key(Phase::Reset), count: None, ops: reset },
                Plan { key: key(Phase::Decode), count: None, ops: vec![norm.clone()] },
            ];
            let sealed = Model { name: "m".to_owned(), buffers, plans }.seal().unwrap();
            assert_eq!(parameter_in_state(&sealed, &norm), found);
        }
    }
}
