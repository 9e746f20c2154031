//! Ops on words and bytes: `observe`, `begin_reply`, `advance`, `fill`, `copy`. All exact.

use ampoule_plan::{BeginReply, Copy, DType, Fill, Observe, Op, SEEN_AS_PROMPT, StateKind, View};

use super::build::{Build, Layout, Tokens};
use super::case::{Case, Reading, Tolerance};
use super::rng::{POISON_TOKEN, Rng, Values, random_bytes};
use super::spec::Family;

/// Counts of a session: most tokens never seen, some read, some generated, one counted to the top.
pub(crate) fn random_counts(rng: &mut Rng, vocabulary: usize) -> Vec<u8> {
    let mut counts: Vec<u32> = (0..vocabulary)
        .map(|_| match rng.below(8) {
            0 => SEEN_AS_PROMPT,
            1 => 1 + rng.below(5) as u32,
            2 => SEEN_AS_PROMPT | (1 + rng.below(5) as u32),
            _ => 0,
        })
        .collect();
    let top = rng.below(vocabulary);
    counts[top] = !SEEN_AS_PROMPT;
    counts.iter().flat_map(|c| c.to_le_bytes()).collect()
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CountsCase {
    pub(crate) tokens: Tokens,
    pub(crate) vocabulary: usize,
    /// `begin_reply` instead of `observe`.
    pub(crate) begin: bool,
    pub(crate) layout: Layout,
}

impl Family for CountsCase {
    fn op(&self) -> &'static str {
        if self.begin { "begin_reply" } else { "observe" }
    }

    fn detail(&self) -> String {
        format!("{},{},v={}", self.tokens, self.layout, self.vocabulary)
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        let mut bytes = random_counts(&mut b.rng, self.vocabulary);
        bytes[4 * POISON_TOKEN..][..4].fill(0); // so that counting it would show
        let counts = b.state("counts", StateKind::Sampler, DType::U32, [1, self.vocabulary], bytes);
        let values = Values::Tokens(self.vocabulary);
        let tokens = (!self.begin).then(|| b.operand("tokens", DType::I32, 1, self.layout, values));
        let count = b.count();
        b.finish(|rows| -> Vec<Op> {
            let counts = counts.clone();
            vec![match &tokens {
                Some(t) => Observe { tokens: t.at(rows), count: count.clone(), counts }.into(),
                None => BeginReply { counts }.into(),
            }]
        })
    }
}

/// Nothing but the Advance that every case with a cursor has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdvanceCase {
    pub(crate) tokens: Tokens,
    pub(crate) position: usize,
}

impl Family for AdvanceCase {
    fn op(&self) -> &'static str {
        "advance"
    }

    fn detail(&self) -> String {
        format!("{},position={}", self.tokens, self.position)
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        b.cursor(self.position);
        b.finish(|_| Vec::new())
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FillCase {
    pub(crate) dtype: DType,
    pub(crate) bits: u32,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Family for FillCase {
    fn op(&self) -> &'static str {
        "fill"
    }

    fn detail(&self) -> String {
        format!("{},bits={:08x},[{}x{}]", self.dtype, self.bits, self.rows, self.cols)
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(Tokens::All(1), rng);
        let shape = [self.rows, self.cols];
        let bytes = random_bytes(&mut b.rng, self.dtype, self.rows * self.cols, Values::Bits);
        let kind = StateKind::Other("filled".to_owned());
        let state = b.state("state", kind, self.dtype, shape, bytes);
        let out = b.output("out", self.dtype, shape, Reading::Last, Tolerance::Bits);
        let out = b.table.view(out);
        // The middle, less a row and a column at each side where there are enough.
        let inner = |n: usize| if n > 2 { 1..n - 1 } else { 0..n };
        let middle =
            |v: &View| View { rows: inner(self.rows), cols: inner(self.cols), ..v.clone() };
        b.finish(|_| -> Vec<Op> {
            vec![
                Fill { out: middle(&state), bits: self.bits }.into(),
                Fill { out: out.clone(), bits: !self.bits }.into(),
                Fill { out: middle(&out), bits: self.bits }.into(),
            ]
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyCase {
    pub(crate) tokens: Tokens,
    pub(crate) dtype: DType,
    pub(crate) from: Layout,
    pub(crate) to: Layout,
    pub(crate) width: usize,
    /// Into State, as plans that configure do.
    pub(crate) to_state: bool,
}

impl Family for CopyCase {
    fn op(&self) -> &'static str {
        "copy"
    }

    fn detail(&self) -> String {
        let state = if self.to_state { ",to state" } else { "" };
        format!("{},{},{}-{},n={}{state}", self.tokens, self.dtype, self.from, self.to, self.width)
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(self.tokens, rng);
        let rows = self.tokens.rows();
        if self.to_state {
            let bytes = random_bytes(&mut b.rng, self.dtype, rows * self.width, Values::Bits);
            let source = b.fixed_input("source", self.dtype, [rows, self.width], bytes);
            let before = random_bytes(&mut b.rng, self.dtype, rows * self.width, Values::Bits);
            let kind = StateKind::Sampler;
            let out = b.state("state", kind, self.dtype, [rows, self.width], before);
            return b.finish(|_| vec![Copy { source: source.clone(), out: out.clone() }.into()]);
        }
        let source = b.operand("source", self.dtype, self.width, self.from, Values::Bits);
        let out = b.result("out", self.dtype, self.width, self.to, Tolerance::Bits);
        b.finish(|rows| vec![Copy { source: source.at(rows), out: out.at(rows) }.into()])
    }
}
