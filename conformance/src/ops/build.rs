//! Makes tiny sealed models: buffers, operands in several layouts, plans for several token buckets.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use ampoule_plan::{
    Advance, Buffer, BufferId, BufferTable, Copy, DType, Fill, Growth, Model, Op, Phase, Plan,
    Role, ShapeKey, StateKind, View,
};

use super::case::{
    Bytes, Case, Checked, Expect, Reading, Replay, Scenario, States, Tolerance, Weight, Weights,
};
use super::rng::{Rng, Values, poison_bytes, random_bytes};

/// How the token operands of an op lie in their buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Each alone in an Input or Output.
    Plain,
    /// A range of the columns of a wider Scratch buffer, at multiples of 32 elements.
    Fused,
    /// Rows and columns of a larger Scratch buffer, at odd offsets and with an odd stride.
    Odd,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Fused, Self::Odd];

    /// Rows before, columns before, columns in all, for `width` columns.
    const fn placement(self, width: usize) -> (usize, usize, usize) {
        match self {
            Self::Plain => (0, 0, width),
            Self::Fused => (0, 32, width + 64),
            Self::Odd => (1, 3, (width + 5) | 1),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Fused => "fused",
            Self::Odd => "odd",
        })
    }
}

/// The token buckets that the grid invariance runs across.
pub(crate) const GRID: [usize; 3] = [16, 64, 256];

/// How many tokens a case reads, and through which plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// All rows valid, no count. One row is a decode plan.
    All(usize),
    /// `rows` valid rows of a bucket.
    Of {
        /// Valid rows, at least one.
        rows: usize,
        /// Rows of the plan.
        bucket: usize,
    },
    /// So many rows, through buckets of 16, 64 and 256 rows and one by one.
    Grid(usize),
}

impl Tokens {
    /// Valid rows in all.
    pub const fn rows(self) -> usize {
        match self {
            Self::All(rows) | Self::Of { rows, .. } | Self::Grid(rows) => rows,
        }
    }

    fn buckets(self) -> Vec<usize> {
        match self {
            Self::All(rows) => vec![rows],
            Self::Of { bucket, .. } => vec![bucket],
            Self::Grid(_) => GRID.to_vec(),
        }
    }

    const fn largest(self) -> usize {
        match self {
            Self::All(rows) => rows,
            Self::Of { bucket, .. } => bucket,
            Self::Grid(_) => GRID[GRID.len() - 1],
        }
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(rows) => write!(f, "rows={rows}"),
            Self::Of { rows, bucket } => write!(f, "rows={rows}/{bucket}"),
            Self::Grid(rows) => write!(f, "rows={rows}/grid"),
        }
    }
}

/// Token rows of an operand; plans for smaller buckets see fewer of them.
#[derive(Clone, Debug)]
pub(crate) struct Rows(View);

impl Rows {
    pub(crate) fn at(&self, rows: usize) -> View {
        self.0.first_rows(rows)
    }

    /// Some of the columns.
    pub(crate) fn columns(&self, start: usize, width: usize) -> Self {
        Self(self.0.columns(start, width))
    }
}

/// An Input with a row for every token.
struct Stream {
    buffer: BufferId,
    data: Vec<u8>,
}

/// A copy before or after the ops under test.
struct Move {
    from: View,
    to: View,
    /// Rows beyond the token rows; `None` where the views have no token rows.
    extra_rows: Option<usize>,
}

impl Move {
    fn op(&self, rows: usize) -> Op {
        let cut = |view: &View| self.extra_rows.map_or(view.clone(), |e| view.first_rows(rows + e));
        Copy { source: cut(&self.from), out: cut(&self.to) }.into()
    }
}

/// A case in the making.
pub(crate) struct Build {
    pub(crate) table: BufferTable,
    pub(crate) rng: Rng,
    tokens: Tokens,
    count: Option<View>,
    cursor: Option<(View, usize)>,
    context: usize,
    weights: Weights,
    streams: Vec<Stream>,
    fixed: Vec<(BufferId, Bytes)>,
    state: Vec<(BufferId, Bytes)>,
    outputs: Vec<Checked>,
    tolerances: HashMap<BufferId, Tolerance>,
    prologue: Vec<Move>,
    epilogue: Vec<Move>,
}

impl Build {
    pub(crate) fn new(tokens: Tokens, rng: Rng) -> Self {
        let mut build = Self {
            table: BufferTable::default(),
            rng,
            tokens,
            count: None,
            cursor: None,
            context: 4096,
            weights: Weights::default(),
            streams: Vec::new(),
            fixed: Vec::new(),
            state: Vec::new(),
            outputs: Vec::new(),
            tolerances: HashMap::new(),
            prologue: Vec::new(),
            epilogue: Vec::new(),
        };
        if !matches!(tokens, Tokens::All(_)) {
            let id = build.add("count", Role::Input, DType::U32, 1, 1);
            build.count = Some(build.table.view(id));
        }
        build
    }

    pub(crate) fn add(
        &mut self,
        name: &str,
        role: Role,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> BufferId {
        let buffer = Buffer { name: name.to_owned(), role, dtype, shape: vec![rows, cols] };
        self.table.add(buffer).expect("the suite names and shapes buffers rightly")
    }

    pub(crate) fn count(&self) -> Option<View> {
        self.count.clone()
    }

    /// Rows of the largest plan.
    pub(crate) const fn bucket(&self) -> usize {
        self.tokens.largest()
    }

    pub(crate) fn weight(
        &mut self,
        name: &str,
        dtype: DType,
        shape: [usize; 2],
        values: Values,
    ) -> View {
        let id = self.add(name, Role::Weight, dtype, shape[0], shape[1]);
        let bytes = random_bytes(&mut self.rng, dtype, shape[0] * shape[1], values);
        self.weights.0.insert(id, Weight::Stored(bytes));
        self.table.view(id)
    }

    pub(crate) fn weight_by(
        &mut self,
        name: &str,
        dtype: DType,
        shape: [usize; 2],
        weight: Weight,
    ) -> View {
        let id = self.add(name, Role::Weight, dtype, shape[0], shape[1]);
        self.weights.0.insert(id, weight);
        self.table.view(id)
    }

    /// `f32 [width]`.
    pub(crate) fn vector(&mut self, name: &str, width: usize, values: Values) -> View {
        self.weight(name, DType::F32, [1, width], values)
    }

    /// An Input that is the same in every replay.
    pub(crate) fn fixed_input(
        &mut self,
        name: &str,
        dtype: DType,
        shape: [usize; 2],
        bytes: Vec<u8>,
    ) -> View {
        let id = self.add(name, Role::Input, dtype, shape[0], shape[1]);
        self.fixed.push((id, bytes.into()));
        self.table.view(id)
    }

    /// Fixed State; compared by bits unless `tolerance` says otherwise.
    pub(crate) fn state(
        &mut self,
        name: &str,
        kind: StateKind,
        dtype: DType,
        shape: [usize; 2],
        bytes: Vec<u8>,
    ) -> View {
        let role = Role::State { kind, growth: Growth::Fixed };
        let id = self.add(name, role, dtype, shape[0], shape[1]);
        self.state.push((id, bytes.into()));
        self.table.view(id)
    }

    /// A KV cache with `position` random rows, and poison in the others.
    pub(crate) fn cache(
        &mut self,
        name: &str,
        dtype: DType,
        shape: [usize; 2],
        position: usize,
    ) -> View {
        let role = Role::State { kind: StateKind::KvCache, growth: Growth::Rows };
        let id = self.add(name, role, dtype, shape[0], shape[1]);
        let mut bytes =
            random_bytes(&mut self.rng, dtype, position * shape[1], Values::Normal(1.0));
        bytes.extend(poison_bytes(dtype, (shape[0] - position) * shape[1]));
        self.state.push((id, bytes.into()));
        self.context = shape[0];
        self.table.view(id)
    }

    /// The Cursor; every plan advances it. Its other words must stay as they are.
    pub(crate) fn cursor(&mut self, position: usize) -> View {
        let words = [position as u32, 7, 0xffff_fff0, 1];
        let bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = self.state("cursor", StateKind::Cursor, DType::U32, [1, 4], bytes);
        self.cursor = Some((view.clone(), position));
        self.context = self.context.max(position + self.bucket() + 1);
        view
    }

    pub(crate) fn set_tolerance(&mut self, view: &View, tolerance: Tolerance) {
        self.tolerances.insert(view.buffer, tolerance);
    }

    fn stream(&mut self, name: &str, dtype: DType, width: usize, values: Values) -> BufferId {
        let id = self.add(name, Role::Input, dtype, self.bucket(), width);
        let data = random_bytes(&mut self.rng, dtype, self.tokens.rows() * width, values);
        self.streams.push(Stream { buffer: id, data });
        id
    }

    /// Scratch with token rows.
    pub(crate) fn scratch(&mut self, name: &str, dtype: DType, width: usize) -> Rows {
        let id = self.add(name, Role::Scratch, dtype, self.bucket(), width);
        Rows(self.table.view(id))
    }

    fn place(&mut self, name: &str, dtype: DType, width: usize, layout: Layout) -> View {
        let (above, before, cols) = layout.placement(width);
        let id = self.add(name, Role::Scratch, dtype, above + self.bucket(), cols);
        View { buffer: id, rows: above..above + self.bucket(), cols: before..before + width }
    }

    /// A random operand with token rows that the ops only read.
    pub(crate) fn operand(
        &mut self,
        name: &str,
        dtype: DType,
        width: usize,
        layout: Layout,
        values: Values,
    ) -> Rows {
        if layout == Layout::Plain {
            let id = self.stream(name, dtype, width, values);
            return Rows(self.table.view(id));
        }
        let id = self.stream(&format!("{name}.in"), dtype, width, values);
        let view = self.place(name, dtype, width, layout);
        let from = self.table.view(id);
        self.prologue.push(Move { from, to: view.clone(), extra_rows: Some(0) });
        Rows(view)
    }

    /// A random operand that the ops change, and that is compared afterwards.
    pub(crate) fn updated(
        &mut self,
        name: &str,
        dtype: DType,
        width: usize,
        layout: Layout,
        values: Values,
        tolerance: Tolerance,
    ) -> Rows {
        let result = self.placed_result(name, dtype, width, layout, tolerance);
        let id = self.stream(&format!("{name}.in"), dtype, width, values);
        let from = self.table.view(id);
        self.prologue.push(Move { from, to: result.0.clone(), extra_rows: Some(0) });
        result
    }

    /// A result with token rows.
    pub(crate) fn result(
        &mut self,
        name: &str,
        dtype: DType,
        width: usize,
        layout: Layout,
        tolerance: Tolerance,
    ) -> Rows {
        if layout == Layout::Plain {
            let id =
                self.output(name, dtype, [self.bucket(), width], Reading::TokenRows, tolerance);
            return Rows(self.table.view(id));
        }
        self.placed_result(name, dtype, width, layout, tolerance)
    }

    /// An Output that is compared.
    pub(crate) fn output(
        &mut self,
        name: &str,
        dtype: DType,
        shape: [usize; 2],
        reading: Reading,
        tolerance: Tolerance,
    ) -> BufferId {
        let id = self.add(name, Role::Output, dtype, shape[0], shape[1]);
        self.outputs.push(Checked { buffer: id, reading });
        self.tolerances.insert(id, tolerance);
        id
    }

    /// A result in Scratch, copied to an Output; what lies around it must stay as it was.
    fn placed_result(
        &mut self,
        name: &str,
        dtype: DType,
        width: usize,
        layout: Layout,
        tolerance: Tolerance,
    ) -> Rows {
        let (above, before, cols) = layout.placement(width);
        let view = self.place(name, dtype, width, layout);
        let buffer = self.table.view(view.buffer);
        if layout != Layout::Plain {
            let row = random_bytes(&mut self.rng, dtype, cols, Values::Normal(1.0));
            let rows = above + self.bucket();
            let gap =
                self.fixed_input(&format!("{name}.gap"), dtype, [rows, cols], row.repeat(rows));
            self.prologue.push(Move { from: gap, to: buffer.clone(), extra_rows: Some(above) });
        }
        let keep = |build: &mut Self, part: &str, from: View, reading, tolerance| {
            let rows = if reading == Reading::TokenRows { build.bucket() } else { from.height() };
            let shape = [rows, from.width()];
            let id = build.output(&format!("{name}.{part}"), dtype, shape, reading, tolerance);
            let to = build.table.view(id);
            let extra_rows = (reading == Reading::TokenRows).then_some(0);
            build.epilogue.push(Move { from, to, extra_rows });
        };
        keep(self, "out", view.clone(), Reading::TokenRows, tolerance);
        if before > 0 {
            let left = View { cols: 0..before, ..view.clone() };
            keep(self, "left", left, Reading::TokenRows, Tolerance::Bits);
            let right = View { cols: before + width..cols, ..view.clone() };
            keep(self, "right", right, Reading::TokenRows, Tolerance::Bits);
        }
        if above > 0 {
            let top = View { rows: 0..above, ..buffer };
            keep(self, "above", top, Reading::Last, Tolerance::Bits);
        }
        Rows(view)
    }

    /// Copies token rows of a Scratch to an Output, and compares them.
    pub(crate) fn show(&mut self, name: &str, from: &Rows, tolerance: Tolerance) {
        let dtype = self.table[from.0.buffer].dtype;
        let shape = [self.bucket(), from.0.width()];
        let id = self.output(name, dtype, shape, Reading::TokenRows, tolerance);
        let to = self.table.view(id);
        self.epilogue.push(Move { from: from.0.clone(), to, extra_rows: Some(0) });
    }

    /// Seals a model with a plan for each bucket and adds the scenarios.
    pub(crate) fn finish(self, ops: impl Fn(usize) -> Vec<Op>) -> Case {
        let mut plans = vec![self.reset_plan()];
        for bucket in self.tokens.buckets() {
            let mut list: Vec<Op> = self.prologue.iter().map(|m| m.op(bucket)).collect();
            list.extend(ops(bucket));
            list.extend(self.epilogue.iter().map(|m| m.op(bucket)));
            if let Some((cursor, _)) = &self.cursor {
                // Without a count the op moves by one.
                let times = if self.count.is_some() { 1 } else { bucket };
                let step = Advance { count: self.count.clone(), cursor: cursor.clone() };
                list.extend(std::iter::repeat_n(Op::from(step), times));
            }
            let decode = bucket == 1 && self.count.is_none();
            let phase = if decode { Phase::Decode } else { Phase::Prefill };
            let key = ShapeKey { phase, tokens: bucket, slots: 1, context: self.context };
            plans.push(Plan { key, count: self.count.as_ref().map(|v| v.buffer), ops: list });
        }
        let scenarios = self.scenarios();
        self.into_case(plans, scenarios)
    }

    /// The model and the case, from plans and scenarios made by hand.
    pub(crate) fn into_case(self, plans: Vec<Plan>, scenarios: Vec<Scenario>) -> Case {
        let model = Model { name: "case".to_owned(), buffers: self.table, plans };
        let model = Arc::new(model.seal().unwrap_or_else(|e| panic!("a case must seal: {e}")));
        let by_row = self.outputs.iter().filter(|o| o.reading == Reading::TokenRows);
        let token_rows = by_row.map(|o| o.buffer).collect();
        let (weights, tolerances) = (self.weights, self.tolerances);
        Case { model, weights, tolerances, token_rows, scenarios }
    }

    pub(crate) fn reset_plan(&self) -> Plan {
        let fixed = self.table.iter().filter(|(_, b)| b.growth() == Some(Growth::Fixed));
        let ops = fixed.map(|(id, _)| Fill { out: self.table.view(id), bits: 0 }.into()).collect();
        let key = ShapeKey { phase: Phase::Reset, tokens: 0, slots: 1, context: self.context };
        Plan { key, count: None, ops }
    }

    pub(crate) fn initial_state(&self) -> Vec<(BufferId, Bytes)> {
        self.state.clone()
    }

    /// Replays that read the rows in chunks; rows from `poisoned` on hold poison, as do those past the count.
    fn replays(&self, chunks: &[(usize, Range<usize>)], poisoned: usize) -> Vec<Replay> {
        let buckets = self.tokens.buckets();
        let mut replays = Vec::new();
        for (index, (bucket, rows)) in chunks.iter().enumerate() {
            let mut inputs = self.fixed.clone();
            if let Some(count) = &self.count {
                let bytes = (rows.len() as u32).to_le_bytes();
                inputs.push((count.buffer, bytes.as_slice().into()));
            }
            for stream in &self.streams {
                let buffer = &self.table[stream.buffer];
                let row = buffer.row_bytes();
                let valid = rows.end.min(poisoned.max(rows.start));
                let mut bytes = stream.data[rows.start * row..valid * row].to_vec();
                let rest = buffer.rows() - (valid - rows.start);
                bytes.extend(poison_bytes(buffer.dtype, rest * buffer.cols()));
                inputs.push((stream.buffer, bytes.into()));
            }
            let last = index + 1 == chunks.len();
            let reads = self.outputs.iter().filter_map(|o| match o.reading {
                Reading::TokenRows => Some((o.buffer, rows.len())),
                Reading::Last => last.then(|| (o.buffer, self.table[o.buffer].rows())),
            });
            // Plan 0 resets.
            let plan = 1 + buckets.iter().position(|b| b == bucket).expect("a bucket of the case");
            replays.push(Replay { plan, inputs, reads: reads.collect() });
        }
        replays
    }

    /// One replay of all rows that writes only the valid ones of its inputs.
    fn trimmed(&self) -> Vec<Replay> {
        let rows = self.tokens.rows();
        let mut replays = self.replays(&[(self.bucket(), 0..rows)], usize::MAX);
        for stream in &self.streams {
            let bytes = rows * self.table[stream.buffer].row_bytes();
            let inputs = replays[0].inputs.iter_mut().filter(|(id, _)| *id == stream.buffer);
            inputs.for_each(|(_, data)| *data = data[..bytes].into());
        }
        replays
    }

    fn scenarios(&self) -> Vec<Scenario> {
        let rows = self.tokens.rows();
        let bucket = self.bucket();
        let whole = [(bucket, 0..rows)];
        let scenario = |check, chunks: &[(usize, Range<usize>)], expect| Scenario {
            check,
            state: self.state.clone(),
            replays: self.replays(chunks, usize::MAX),
            expect,
            second_slot: false,
            poison: false,
        };
        let same = Expect::Same { scenario: 0, rows: None, states: States::All };
        let mut list = vec![scenario("reference", &whole, Expect::Reference)];
        let repeat = Scenario { replays: self.trimmed(), ..scenario("repeat", &whole, same) };
        list.push(repeat.clone());
        list.push(Scenario { check: "poison", second_slot: true, poison: true, ..repeat });
        let cut = |bucket: usize, ends: &[usize]| -> Vec<(usize, Range<usize>)> {
            let starts = std::iter::once(0).chain(ends.iter().copied());
            starts.zip(ends).map(|(s, &e)| (bucket, s..e)).collect()
        };
        let steps = |by: usize| -> Vec<usize> {
            (1..=rows.div_ceil(by)).map(|i| rows.min(i * by)).collect()
        };
        match self.tokens {
            Tokens::All(_) | Tokens::Of { rows: 1, .. } => {}
            Tokens::Of { .. } => {
                let at = 1 + self.rng.clone().below(rows - 1);
                list.push(scenario("split", &cut(bucket, &[at, rows]), same));
            }
            Tokens::Grid(_) => {
                list.push(scenario("bucket 64", &cut(64, &steps(64)), same));
                list.push(scenario("bucket 16", &cut(16, &steps(16)), same));
                list.push(scenario("one by one", &cut(16, &steps(1)), same));
                list.push(scenario("split", &cut(256, &[1, rows / 2, rows]), same));
                list.push(scenario("uneven", &cut(64, &[1, 6, 7, 7 + (rows - 7) / 2, rows]), same));
            }
        }
        if rows > 1 {
            let keep = 1 + self.rng.clone().below(rows - 1);
            let expect = Expect::Same { scenario: 0, rows: Some(keep), states: States::None };
            let replays = self.replays(&whole, keep);
            list.push(Scenario { replays, ..scenario("later rows", &whole, expect) });
        }
        if let Some((_, position)) = &self.cursor {
            self.add_stale_rows(&mut list, *position, &whole);
        }
        list
    }

    /// Rows of caches at and past the position are whatever an earlier session left there.
    fn add_stale_rows(
        &self,
        list: &mut Vec<Scenario>,
        position: usize,
        whole: &[(usize, Range<usize>)],
    ) {
        let mut rng = self.rng.clone();
        let mut any = false;
        let state = self.state.iter().map(|(id, bytes)| {
            let buffer = &self.table[*id];
            if buffer.growth() != Some(Growth::Rows) {
                return (*id, Arc::clone(bytes));
            }
            any = true;
            let mut bytes = bytes[..position * buffer.row_bytes()].to_vec();
            let stale = (buffer.rows() - position) * buffer.cols();
            bytes.extend(random_bytes(&mut rng, buffer.dtype, stale, Values::Normal(30.0)));
            (*id, bytes.into())
        });
        let state: Vec<(BufferId, Bytes)> = state.collect();
        if any {
            let states = States::RowsBelow(position + self.tokens.rows());
            list.push(Scenario {
                check: "stale rows",
                state,
                replays: self.replays(whole, usize::MAX),
                expect: Expect::Same { scenario: 0, rows: None, states },
                second_slot: false,
                poison: false,
            });
        }
    }
}
