//! Which runs of ops become one kernel. A fused kernel writes every buffer that the ops it stands for write, with the
//! same bits, so nothing depends on what is fused; only launches go away.

use ampoule_plan::{BufferTable, Op, Phase, Plan, View};

use crate::launch::arguments::SEGMENTS;
use crate::launch::{DECODE_ROWS, decodes_by_splits, gemv_fits};
use crate::memory::{DELTA_HEADS, resident_dtype};

/// Kernels to enqueue, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// One op by its own kernels.
    Op(usize),
    /// Linears of one x, with what comes before and after.
    Gemv(GemvGroup),
    /// Norms of queries and keys, rotary embedding of both, append to the cache.
    NormRopeAppend(NormRopeAppend),
    /// Attention whose combining kernel also gates.
    AttentionGate { attention: usize, gate: usize },
    /// The gated delta rule of one token, then norm and gate.
    DeltaNorm { delta: usize, norm: usize },
}

/// A launch of the matrix-vector kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GemvGroup {
    /// The norm that makes x.
    pub(crate) norm: Option<usize>,
    /// At most [`SEGMENTS`].
    pub(crate) parts: Vec<Part>,
}

/// Rows of a linear's weight, with what follows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The linear.
    pub(crate) linear: usize,
    /// First row of its weight, and column of its result.
    pub(crate) first: usize,
    /// How many.
    pub(crate) rows: usize,
    /// What follows.
    pub(crate) then: Then,
}

/// What a part does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Stores them.
    Store,
    /// Adds them to the result.
    Add,
    /// Stores them, then convolves.
    Conv { conv: usize },
    /// Stores them and those of as many rows of `up` from `first` on, then SwiGLU of both.
    Pair { up: usize, first: usize, swiglu: usize },
}

/// The ops of a [`Step::NormRopeAppend`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NormRopeAppend {
    pub(crate) query_norm: Option<usize>,
    pub(crate) key_norm: Option<usize>,
    pub(crate) query_rope: usize,
    pub(crate) key_rope: usize,
    pub(crate) append: usize,
}

impl Step {
    /// The first op it stands for, for errors.
    pub(crate) fn first_op(&self) -> usize {
        match self {
            Self::Op(index) => *index,
            Self::Gemv(group) => {
                group.norm.or_else(|| group.parts.first().map(|p| p.linear)).unwrap_or(0)
            }
            Self::NormRopeAppend(fused) => fused.query_norm.unwrap_or(fused.query_rope),
            Self::AttentionGate { attention, .. } => *attention,
            Self::DeltaNorm { delta, .. } => *delta,
        }
    }

    /// Every op it stands for.
    pub(crate) fn ops(&self) -> Vec<usize> {
        let mut ops = match self {
            Self::Op(index) => vec![*index],
            Self::Gemv(group) => {
                let mut ops: Vec<usize> = group.norm.into_iter().collect();
                for part in &group.parts {
                    ops.push(part.linear);
                    match part.then {
                        Then::Store | Then::Add => {}
                        Then::Conv { conv } => ops.push(conv),
                        Then::Pair { up, swiglu, .. } => ops.extend([up, swiglu]),
                    }
                }
                ops
            }
            Self::NormRopeAppend(f) => {
                let mut ops: Vec<usize> = f.query_norm.into_iter().chain(f.key_norm).collect();
                ops.extend([f.query_rope, f.key_rope, f.append]);
                ops
            }
            Self::AttentionGate { attention, gate } => vec![*attention, *gate],
            Self::DeltaNorm { delta, norm } => vec![*delta, *norm],
        };
        ops.sort_unstable();
        ops.dedup();
        ops
    }
}

/// The steps of a plan.
pub(crate) fn steps(table: &BufferTable, plan: &Plan, fusion: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut at = 0;
    while at < plan.ops.len() {
        let matcher = Matcher { table, plan };
        let found = if fusion { matcher.fused(at) } else { None };
        let (step, taken) = found.unwrap_or((Step::Op(at), 1));
        steps.push(step);
        at += taken;
    }
    steps
}

struct Matcher<'a> {
    table: &'a BufferTable,
    plan: &'a Plan,
}

impl Matcher<'_> {
    /// A fused step that begins at op `at`, and how many consecutive ops it stands for.
    fn fused(&self, at: usize) -> Option<(Step, usize)> {
        self.norm_rope_append(at)
            .or_else(|| self.attention_gate(at))
            .or_else(|| self.delta_norm(at))
            .or_else(|| self.gemv(at))
    }

    fn gemv(&self, at: usize) -> Option<(Step, usize)> {
        if self.plan.key.phase != Phase::Decode {
            return None;
        }
        let mut group = GemvGroup::default();
        let mut next = at;
        if let Op::RmsNorm(norm) = &self.plan.ops[at] {
            // Every block reads x while one writes the result.
            if norm.weight.width() != norm.x.width() || meet(&norm.x, &norm.out) {
                return None;
            }
            group.norm = Some(at);
            next += 1;
        }
        let x = match self.plan.ops.get(next)? {
            Op::Linear(o) => o.x.clone(),
            Op::LinearAdd(o) => o.x.clone(),
            _ => return None,
        };
        if let Some(Op::RmsNorm(norm)) = group.norm.map(|n| &self.plan.ops[n])
            && norm.out != x
        {
            return None;
        }
        let mut taken: Vec<usize> = group.norm.into_iter().collect();
        let mut dtype = None;
        while let Some(op) = self.plan.ops.get(next) {
            let fits = match op {
                Op::Linear(o) if o.x == x && group.parts.len() < SEGMENTS => {
                    let same = *dtype.get_or_insert(self.weight_type(&o.weight))
                        == self.weight_type(&o.weight);
                    let fits =
                        same && self.gemv_takes(&o.x, &o.weight) && self.apart(op, &taken, &[]);
                    if fits {
                        group.parts.push(Part {
                            linear: next,
                            first: 0,
                            rows: o.weight.height(),
                            then: Then::Store,
                        });
                    }
                    fits
                }
                Op::LinearAdd(o) if o.x == x && group.parts.is_empty() => {
                    let fits = self.gemv_takes(&o.x, &o.weight) && self.apart(op, &taken, &[]);
                    if fits {
                        group.parts.push(Part {
                            linear: next,
                            first: 0,
                            rows: o.weight.height(),
                            then: Then::Add,
                        });
                    }
                    fits
                }
                Op::CausalConv(_) => self.take_conv(&mut group, next, &taken),
                Op::SwiGlu(_) => self.take_swiglu(&mut group, next, &taken),
                _ => false,
            };
            if !fits {
                break;
            }
            taken.push(next);
            next += 1;
            if matches!(group.parts[..], [Part { then: Then::Add, .. }]) {
                break;
            }
        }
        if group.parts.is_empty() {
            return None;
        }
        let count = next - at;
        // A lone linear is the same launch as an op.
        if count == 1 { None } else { Some((Step::Gemv(group), count)) }
    }

    fn weight_type(&self, weight: &View) -> ampoule_plan::DType {
        resident_dtype(self.table[weight.buffer].dtype)
    }

    fn gemv_takes(&self, x: &View, weight: &View) -> bool {
        gemv_fits(x.height(), x.width(), self.weight_type(weight))
    }

    /// Cuts the rows whose result the convolution reads out of their linear, to convolve them.
    fn take_conv(&self, group: &mut GemvGroup, at: usize, taken: &[usize]) -> bool {
        let Op::CausalConv(conv) = &self.plan.ops[at] else { return false };
        // A tap a lane.
        if conv.x.height() != 1 || conv.count.is_some() || conv.weight.width() > 32 {
            return false;
        }
        let mut parts = group.parts.clone();
        let Some(slot) = self.cut(&mut parts, &conv.x) else { return false };
        let apart = self.apart(&self.plan.ops[at], taken, &[parts[slot].linear]);
        if !apart || parts.len() > SEGMENTS {
            return false;
        }
        parts[slot].then = Then::Conv { conv: at };
        group.parts = parts;
        true
    }

    /// Joins the rows whose results SwiGLU reads.
    fn take_swiglu(&self, group: &mut GemvGroup, at: usize, taken: &[usize]) -> bool {
        let Op::SwiGlu(swiglu) = &self.plan.ops[at] else { return false };
        let mut parts = group.parts.clone();
        if self.cut(&mut parts, &swiglu.gate).is_none() {
            return false;
        }
        let Some(second) = self.cut(&mut parts, &swiglu.up) else { return false };
        let up = parts.remove(second);
        // Found again: cutting may have moved it.
        let Some(first) = self.cut(&mut parts, &swiglu.gate) else { return false };
        let sources = [parts[first].linear, up.linear];
        if !self.apart(&self.plan.ops[at], taken, &sources) || parts.len() > SEGMENTS {
            return false;
        }
        parts[first].then = Then::Pair { up: up.linear, first: up.first, swiglu: at };
        group.parts = parts;
        true
    }

    /// The index of a part that makes exactly `view`, cut out of a plain one that makes more; the rest stays.
    fn cut(&self, parts: &mut Vec<Part>, view: &View) -> Option<usize> {
        let (slot, first) = parts.iter().enumerate().find_map(|(slot, part)| {
            let Op::Linear(o) = &self.plan.ops[part.linear] else { return None };
            let made = o.out.columns(part.first, part.rows);
            let inside = part.then == Then::Store
                && made.buffer == view.buffer
                && made.rows == view.rows
                && made.cols.start <= view.cols.start
                && view.cols.end <= made.cols.end;
            inside.then(|| (slot, part.first + view.cols.start - made.cols.start))
        })?;
        let whole = parts[slot].clone();
        let piece = |first, rows| Part { first, rows, ..whole.clone() };
        let end = whole.first + whole.rows;
        let cut = first + view.width();
        let mut pieces = vec![piece(first, view.width())];
        if first > whole.first {
            pieces.insert(0, piece(whole.first, first - whole.first));
        }
        if cut < end {
            pieces.push(piece(cut, end - cut));
        }
        let at = slot + usize::from(first > whole.first);
        parts.splice(slot..=slot, pieces);
        Some(at)
    }

    /// Whether the op can run side by side with the ops taken so far: neither writes what the other touches, but for
    /// what it reads from `sources` (and from a norm in the prologue).
    fn apart(&self, op: &Op, taken: &[usize], sources: &[usize]) -> bool {
        taken.iter().all(|&index| {
            let other = &self.plan.ops[index];
            let prologue = matches!(other, Op::RmsNorm(_));
            op.operands().iter().all(|a| {
                other.operands().iter().all(|b| {
                    let a_writes = a.access.writes();
                    let b_writes = b.access.writes();
                    if !(a_writes || b_writes) || !meet(a.view, b.view) {
                        return true;
                    }
                    // Reading what a source, or the prologue's norm, has written is what the fusion is for.
                    let meant = prologue && a.view == b.view || sources.contains(&index);
                    b_writes && !a_writes && meant
                })
            })
        })
    }

    fn norm_rope_append(&self, at: usize) -> Option<(Step, usize)> {
        let window = &self.plan.ops[at..self.plan.ops.len().min(at + 5)];
        let length = window.iter().position(|op| matches!(op, Op::KvAppend(_)))? + 1;
        let Op::KvAppend(append) = &window[length - 1] else { return None };
        let mut norms = Vec::new();
        let mut ropes: Vec<(usize, &ampoule_plan::Rope)> = Vec::new();
        for (offset, op) in window[..length - 1].iter().enumerate() {
            match op {
                Op::RmsNorm(norm) if ropes.iter().all(|(_, r)| !op_touches(r, &norm.out)) => {
                    norms.push((at + offset, norm));
                }
                Op::Rope(rope) => ropes.push((at + offset, rope)),
                _ => return None,
            }
        }
        let [first, second] = ropes[..] else { return None };
        let (query, key) = if second.1.x == append.key { (first, second) } else { (second, first) };
        let (q, k) = (query.1, key.1);
        let alike = k.x == append.key
            && q.x != k.x
            && !meet(&q.x, &k.x)
            && q.head_dim == k.head_dim
            && q.style == k.style
            && q.frequencies == k.frequencies
            && q.cursor == k.cursor
            && append.cursor == k.cursor
            && q.x.height() == k.x.height()
            && q.head_dim <= 512;
        let kept = |v: &View| self.table[v.buffer].dtype;
        if !alike || kept(&append.key) != kept(&k.x) {
            return None;
        }
        let mut query_norm = None;
        let mut key_norm = None;
        for (index, norm) in norms {
            let slot = if norm.out == q.x {
                &mut query_norm
            } else if norm.out == k.x {
                &mut key_norm
            } else {
                return None;
            };
            // Heads are normalised one by one, and nobody else's input is written.
            let alone = norm.x == norm.out || !meet(&norm.x, &q.x) && !meet(&norm.x, &k.x);
            if norm.weight.width() != q.head_dim || !alone || slot.replace(index).is_some() {
                return None;
            }
        }
        if meet(&append.value, &q.x) || meet(&append.value, &k.x) {
            return None;
        }
        let fused = NormRopeAppend {
            query_norm,
            key_norm,
            query_rope: query.0,
            key_rope: key.0,
            append: at + length - 1,
        };
        Some((Step::NormRopeAppend(fused), length))
    }

    fn attention_gate(&self, at: usize) -> Option<(Step, usize)> {
        let (Op::Attention(a), Op::SigmoidGate(g)) =
            (&self.plan.ops[at], self.plan.ops.get(at + 1)?)
        else {
            return None;
        };
        let fits = decodes_by_splits(self.plan.key.phase, a)
            && a.query.height() <= DECODE_ROWS
            && g.x == a.out
            && (g.out == a.out || !meet(&g.out, &a.out))
            && !meet(&g.gate, &a.out);
        fits.then_some((Step::AttentionGate { attention: at, gate: at + 1 }, 2))
    }

    fn delta_norm(&self, at: usize) -> Option<(Step, usize)> {
        let (Op::GatedDelta(d), Op::GatedRmsNorm(n)) =
            (&self.plan.ops[at], self.plan.ops.get(at + 1)?)
        else {
            return None;
        };
        let fits = self.plan.key.phase == Phase::Decode
            && d.out.height() == 1
            && d.count.is_none()
            && n.x == d.out
            && n.weight.width() == d.value_dim
            && d.value_dim <= 128
            && d.value_heads <= DELTA_HEADS
            && !meet(&n.gate, &d.out)
            && (n.out == d.out || !meet(&n.out, &d.out))
            && [&d.qkv, &d.decay, &d.beta].iter().all(|v| !meet(v, &n.out));
        fits.then_some((Step::DeltaNorm { delta: at, norm: at + 1 }, 2))
    }
}

fn op_touches(rope: &ampoule_plan::Rope, view: &View) -> bool {
    meet(&rope.x, view)
}

/// Whether two views share an element.
fn meet(a: &View, b: &View) -> bool {
    a.buffer == b.buffer
        && a.rows.start < b.rows.end
        && b.rows.start < a.rows.end
        && a.cols.start < b.cols.end
        && b.cols.start < a.cols.end
}

#[cfg(test)]
mod tests;
