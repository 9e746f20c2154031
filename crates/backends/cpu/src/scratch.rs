//! Everything that replays need besides the model's buffers, allocated once.

use ampoule_backend::BackendError;
use ampoule_backend::host::{HostBytes as _, HostMemory};
use ampoule_plan::{BufferId, BufferTable, DType, Op, Role, Sealed, View};

use crate::kernels::attention::Heads;
use crate::kernels::delta;
use crate::kernels::gemm::Tiling;
use crate::kernels::sample::Sampler;
use crate::memory::AlignedBytes;
use crate::operands::Mat;
use crate::simd::LANES;

fn allocate(elements: usize) -> Result<AlignedBytes, BackendError> {
    let short = || BackendError::OutOfMemory {
        what: "scratch of the CPU kernels".to_owned(),
        wanted: 4 * elements as u64,
        available: 0,
    };
    elements.checked_mul(4).and_then(AlignedBytes::zeroed).ok_or_else(short)
}

/// Scratch of each thread, at a multiple of a cache line.
#[derive(Clone, Copy)]
pub(crate) struct PerThread {
    base: *mut f32,
    stride: usize,
}

// SAFETY: threads use the pieces of their own number.
unsafe impl Sync for PerThread {}

impl PerThread {
    pub(crate) fn of(&self, thread: usize) -> *mut f32 {
        self.base.wrapping_add(thread * self.stride)
    }
}

/// A convolution's weight, one row for each tap.
pub(crate) struct Taps {
    /// Whether no replay changes the weight.
    constant: bool,
    channels: usize,
    count: usize,
    data: AlignedBytes,
}

impl Taps {
    /// The transposed weight, read anew where it may have changed.
    pub(crate) fn refreshed(&mut self, weight: &Mat) -> Mat {
        if !self.constant {
            self.transpose(weight);
        }
        Mat::of_f32(self.data.address().cast(), self.channels, self.count, self.channels)
    }

    fn transpose(&mut self, weight: &Mat) {
        let to = self.data.address().cast::<f32>();
        for c in 0..self.channels {
            let row = weight.row(c).cast::<f32>();
            for j in 0..self.count {
                // SAFETY: the weight is f32 `[channels, taps]`, and so large is the copy.
                unsafe { *to.add(j * self.channels + c) = *row.add(j) };
            }
        }
    }
}

/// The angles of some positions.
pub(crate) struct Angles {
    pub(crate) data: AlignedBytes,
    /// Frequencies, first position and rows that the data holds.
    pub(crate) holds: Option<(View, usize, usize)>,
}

/// All scratch.
pub(crate) struct Scratch {
    threads: AlignedBytes,
    stride: usize,
    /// Rows of activations that are not f32, widened.
    widened: AlignedBytes,
    /// Attention's partial results.
    partials: AlignedBytes,
    pub(crate) angles: Angles,
    pub(crate) taps: Vec<(BufferId, Taps)>,
    pub(crate) sampler: Sampler,
}

/// The most that any op of a model needs.
#[derive(Default)]
struct Needs {
    thread: usize,
    widened: usize,
    partials: usize,
    angles: usize,
    vocabulary: usize,
}

impl Needs {
    fn of(table: &BufferTable, op: &Op) -> Self {
        let mut needs = Self::default();
        match op {
            Op::Linear(o) => needs.linear(table, &o.x),
            Op::LinearAdd(o) => needs.linear(table, &o.x),
            Op::Attention(o) => {
                let shape = Heads {
                    heads: o.heads,
                    kv_heads: o.kv_heads,
                    head_dim: o.head_dim,
                    scale: o.scale,
                };
                needs.thread = shape.block_scratch().max(shape.tile_scratch());
                let blocks = o.key_cache.height().div_ceil(crate::kernels::attention::KEYS);
                needs.partials = o.heads * (blocks + 1) * shape.partial();
            }
            Op::GatedDelta(o) => needs.thread = delta::scratch(o.key_dim),
            Op::Rope(o) => needs.angles = 2 * o.x.height() * o.frequencies.width(),
            Op::Sample(o) => needs.vocabulary = o.logits.width(),
            _ => {}
        }
        needs
    }

    fn linear(&mut self, table: &BufferTable, x: &View) {
        if x.height() > 1 {
            // The tiling follows the number of valid rows; no number needs more than this.
            self.thread = Tiling::most_scratch(x.width());
        }
        if table[x.buffer].dtype != DType::F32 {
            self.widened = x.height() * x.width().next_multiple_of(LANES);
        }
    }

    fn max(self, other: &Self) -> Self {
        Self {
            thread: self.thread.max(other.thread),
            widened: self.widened.max(other.widened),
            partials: self.partials.max(other.partials),
            angles: self.angles.max(other.angles),
            vocabulary: self.vocabulary.max(other.vocabulary),
        }
    }
}

impl Scratch {
    /// # Errors
    /// If memory is short.
    pub(crate) fn new(
        model: &Sealed,
        memory: &HostMemory<AlignedBytes>,
        threads: usize,
    ) -> Result<Self, BackendError> {
        let table = &model.model().buffers;
        let ops = || model.model().plans.iter().flat_map(|p| &p.ops);
        let needs = ops().fold(Needs::default(), |all, op| all.max(&Needs::of(table, op)));
        let mut taps: Vec<(BufferId, Taps)> = Vec::new();
        for op in ops() {
            let Op::CausalConv(o) = op else { continue };
            let id = o.weight.buffer;
            if taps.iter().any(|(known, _)| *known == id) {
                continue;
            }
            let (channels, count) = (o.weight.height(), o.weight.width());
            let constant = table[id].role == Role::Weight;
            let data = allocate(channels * count)?;
            let mut copy = Taps { constant, channels, count, data };
            if constant {
                let bytes = memory.shared(id).as_ptr().cast_mut().cast();
                copy.transpose(&Mat::of_f32(bytes, count, channels, count));
            }
            taps.push((id, copy));
        }
        let stride = needs.thread.next_multiple_of(LANES) + LANES;
        let short = || BackendError::OutOfMemory {
            what: "scratch of the sampler".to_owned(),
            wanted: 4 * needs.vocabulary as u64,
            available: 0,
        };
        Ok(Self {
            threads: allocate(threads * stride)?,
            stride,
            widened: allocate(needs.widened)?,
            partials: allocate(needs.partials)?,
            angles: Angles { data: allocate(needs.angles)?, holds: None },
            taps,
            sampler: Sampler::new(needs.vocabulary).ok_or_else(short)?,
        })
    }

    /// NaNs wherever nothing is to be read that the same replay has not written; angles are forgotten.
    pub(crate) fn poison(&mut self) {
        let all = [&mut self.threads, &mut self.widened, &mut self.partials, &mut self.angles.data];
        for memory in all {
            for word in memory.bytes_mut().chunks_exact_mut(4) {
                word.copy_from_slice(&f32::NAN.to_le_bytes());
            }
        }
        self.angles.holds = None;
    }

    pub(crate) fn per_thread(&mut self) -> PerThread {
        PerThread { base: self.threads.address().cast(), stride: self.stride }
    }

    pub(crate) fn widened(&mut self) -> *mut f32 {
        self.widened.address().cast()
    }

    pub(crate) fn partials(&mut self) -> *mut f32 {
        self.partials.address().cast()
    }
}
