//! What an op must move and compute at least: the floor that measurements are held against.

use crate::{Access, BufferTable, Op, Plan};

/// Where in a stream the cost is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostPoint {
    /// Position before the replay.
    pub position: usize,
    /// Valid token rows; never more than the plan's bucket.
    pub tokens: usize,
}

/// Bytes moved and floating-point operations done, each input read once and each output written once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Floating-point operations; a multiply-add counts two.
    pub flops: u64,
}

impl Cost {
    /// Bytes read and written.
    pub const fn bytes(&self) -> u64 {
        self.bytes_read + self.bytes_written
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.flops += other.flops;
    }
}

impl Op {
    /// The op's floor at `at`.
    pub fn cost(&self, table: &BufferTable, at: CostPoint) -> Cost {
        let mut cost = Cost { flops: self.flops(at), ..Cost::default() };
        for operand in self.operands() {
            let view = operand.view;
            let row = table[view.buffer].dtype.bytes_for(view.width()).unwrap_or(0) as u64;
            let is_token_rows = !table[view.buffer].role.is_state()
                && !matches!(table[view.buffer].role, crate::Role::Weight)
                && view.height() > 1;
            let whole = row
                * if is_token_rows { view.height().min(at.tokens) } else { view.height() } as u64;
            match operand.access {
                Access::Read if matches!(self, Self::Embed(_)) && operand.field == "table" => {
                    cost.bytes_read += row * at.tokens as u64;
                }
                Access::Read => cost.bytes_read += whole,
                Access::Write => cost.bytes_written += whole,
                Access::Update if matches!(self, Self::Sample(_) | Self::Observe(_)) => {
                    cost.bytes_read += whole;
                    cost.bytes_written += 4 * at.tokens as u64;
                }
                Access::Update => {
                    cost.bytes_read += whole;
                    cost.bytes_written += whole;
                }
                Access::AppendRows => cost.bytes_written += row * at.tokens as u64,
                Access::ReadRows => cost.bytes_read += row * (at.position + at.tokens) as u64,
            }
        }
        cost
    }

    fn flops(&self, at: CostPoint) -> u64 {
        let tokens = at.tokens as u64;
        let product = |n: usize, k: usize| 2 * tokens * n as u64 * k as u64;
        match self {
            Self::Linear(o) => product(o.weight.height(), o.weight.width()),
            Self::LinearAdd(o) => product(o.weight.height(), o.weight.width()),
            Self::Attention(o) => {
                // Row t sees position + t + 1 keys; two products each, over all heads.
                let keys: u64 = tokens * at.position as u64 + tokens * (tokens + 1) / 2;
                4 * keys * (o.heads * o.head_dim) as u64
            }
            // Decay, S^T k, update, S^T q: seven operations per element of the state.
            Self::GatedDelta(o) => 7 * tokens * (o.value_heads * o.key_dim * o.value_dim) as u64,
            Self::CausalConv(o) => product(o.x.width(), o.weight.width()),
            Self::RmsNorm(o) => 4 * tokens * o.x.width() as u64,
            Self::GatedRmsNorm(o) => 8 * tokens * o.x.width() as u64,
            Self::SigmoidGate(o) => 4 * tokens * o.x.width() as u64,
            Self::SwiGlu(o) => 5 * tokens * o.out.width() as u64,
            Self::Rope(o) => 3 * tokens * o.x.width() as u64,
            Self::Sample(o) => 4 * o.logits.width() as u64,
            Self::Embed(_)
            | Self::KvAppend(_)
            | Self::LastRow(_)
            | Self::Observe(_)
            | Self::BeginReply(_)
            | Self::Advance(_)
            | Self::Fill(_)
            | Self::Copy(_) => 0,
        }
    }
}

impl Plan {
    /// The sum over the plan's ops.
    pub fn cost(&self, table: &BufferTable, at: CostPoint) -> Cost {
        let mut sum = Cost::default();
        for op in &self.ops {
            sum += op.cost(table, at);
        }
        sum
    }
}
