//! The proof that everything carried from one replay to the next lies in State buffers.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::check::ranges_meet;
use crate::{
    Access, Buffer, BufferId, DType, Growth, Model, Op, OpError, Phase, Plan, Role, ShapeKey,
    StateKind, View,
};

/// Why a model cannot be sealed. Every variant names the plan, the op and the buffer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// An op does not fit its operands.
    #[error("plan '{plan}', op {index}: {source}")]
    Op {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// What does not fit.
        source: OpError,
    },
    /// An op writes a Weight or an Input.
    #[error(
        "plan '{plan}', op {index} ({op}) writes '{buffer}', which is {role} and must not be written by an op"
    )]
    NotWritable {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
        /// The buffer.
        buffer: String,
        /// Its role.
        role: &'static str,
    },
    /// A Scratch or Output region is read before this replay has written it, so it carries something over.
    #[error(
        "plan '{plan}', op {index} ({op}) reads rows {rows:?}, columns {cols:?} of '{buffer}' before the replay has \
         written them: what is carried over must be State, but the buffer is {role}"
    )]
    ReadBeforeWrite {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
        /// The buffer.
        buffer: String,
        /// Its role.
        role: &'static str,
        /// First rows found unwritten.
        rows: Range<usize>,
        /// Columns of those rows.
        cols: Range<usize>,
    },
    /// A Rows buffer is touched otherwise than through the cursor, so rows outside every capsule could matter.
    #[error(
        "plan '{plan}', op {index} ({op}) touches '{buffer}' by fixed rows; a State buffer that grows by rows may only \
         be appended at, and read below, the cursor"
    )]
    RowsOutsideCursor {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
        /// The buffer.
        buffer: String,
    },
    /// Rows are appended to, or read below the cursor of, a buffer that nobody declared as State that grows by rows.
    #[error(
        "plan '{plan}', op {index} ({op}) keeps rows in '{buffer}', which is {role}: declare it State with growth rows, \
         or no capsule would hold them"
    )]
    UndeclaredRows {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
        /// The buffer.
        buffer: String,
        /// Its role.
        role: &'static str,
    },
    /// The replay's own rows are read before they were appended.
    #[error(
        "plan '{plan}', op {index} ({op}) reads this replay's rows of '{buffer}' before any op has appended them"
    )]
    RowsNotAppended {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
        /// The buffer.
        buffer: String,
    },
    /// An op counts rows otherwise than its plan, so rows past the count could reach State.
    #[error(
        "plan '{plan}', op {index} ({op}) must take the plan's own count, or none where the plan has none"
    )]
    OtherCount {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
    },
    /// An op reads the position from somewhere else than the one Cursor.
    #[error(
        "plan '{plan}', op {index} ({op}) reads the position from '{buffer}', but every op must read it from the one \
         State(Cursor) buffer"
    )]
    OtherCursor {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
        /// The buffer.
        buffer: String,
    },
    /// The position moves before the replay's rows are done with.
    #[error("plan '{plan}', op {index} ({op}) reads the position after it has moved")]
    CursorMoved {
        /// The plan.
        plan: ShapeKey,
        /// Index of the op.
        index: usize,
        /// The op's name.
        op: &'static str,
    },
    /// More positions than rows.
    #[error("plan '{plan}' lets positions run to its context, but '{buffer}' has only {rows} rows")]
    ContextRows {
        /// The plan.
        plan: ShapeKey,
        /// The buffer.
        buffer: String,
        /// Its rows.
        rows: usize,
    },
    /// State that the reset plan leaves as it was.
    #[error(
        "a reset plan does not write all of state '{buffer}', so an emptied slot would remember its last session"
    )]
    NotReset {
        /// The buffer.
        buffer: String,
    },
    /// State that no op touches.
    #[error("state '{buffer}' is touched by no op; capsules would carry dead bytes")]
    UnusedState {
        /// The buffer.
        buffer: String,
    },
    /// State of a quantised type, which no op could write.
    #[error("state '{buffer}' cannot have elements of {dtype}")]
    StateType {
        /// The buffer.
        buffer: String,
        /// Its type.
        dtype: DType,
    },
    /// Two plans with one key.
    #[error("two plans have the key '{plan}'")]
    DuplicateKey {
        /// The key.
        plan: ShapeKey,
    },
    /// The plan's count is not a `u32[1, 1]` Input.
    #[error("plan '{plan}': its count must be an Input u32[1, 1]")]
    Count {
        /// The plan.
        plan: ShapeKey,
    },
}

/// A model whose seal has been proved. Only [`Model::seal`] makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Sealed {
    model: Model,
    state: Vec<BufferId>,
}

impl Sealed {
    /// The model.
    pub const fn model(&self) -> &Model {
        &self.model
    }

    /// Every State buffer, in order of declaration: exactly what a capsule holds.
    pub fn state(&self) -> &[BufferId] {
        &self.state
    }

    /// The buffer of that id.
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.model.buffers[id]
    }

    /// BLAKE3 of the text form: the plan component of a fingerprint.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(self.model.to_text().as_bytes()).as_bytes()
    }
}

impl Model {
    /// Proves, op by op and with rectangles of rows and columns, that the State buffers are all that one replay
    /// leaves for the next.
    ///
    /// - Scratch and Output are written before they are read within one replay.
    /// - Weight and Input are never written by an op.
    /// - State that grows by rows is appended at the cursor and read below it, and in no other way; so rows at or
    ///   past the position never matter, and a capsule that holds the rows below it holds all.
    /// - Everything else that is read before it is written is Fixed State, held whole by every capsule.
    /// - Every op of a plan takes the plan's count and reads the position from the one Cursor, which moves last; so
    ///   rows past the count reach no State, and the rows read are those appended.
    /// - Every reset plan writes all Fixed State and reads none it has not written, so an emptied slot remembers nothing.
    ///
    /// # Errors
    /// The first violation, naming plan, op and buffer.
    pub fn seal(self) -> Result<Sealed, SealError> {
        let mut keys = HashSet::new();
        let mut touched = HashSet::new();
        // How many reset plans write all of a buffer; each must write all Fixed State by itself.
        let (mut resets, mut reset) = (0_usize, HashMap::<BufferId, usize>::new());
        for plan in &self.plans {
            if !keys.insert(plan.key) {
                return Err(SealError::DuplicateKey { plan: plan.key });
            }
            let written = self.seal_plan(plan, &mut touched)?;
            if plan.key.phase == Phase::Reset {
                resets += 1;
                for (id, views) in written {
                    if unwritten(&self.buffers.view(id), &views).is_none() {
                        *reset.entry(id).or_default() += 1;
                    }
                }
            }
        }
        let mut state = Vec::new();
        for (id, buffer) in self.buffers.iter().filter(|(_, b)| b.role.is_state()) {
            let name = || buffer.name.clone();
            if buffer.dtype.is_quantized() {
                return Err(SealError::StateType { buffer: name(), dtype: buffer.dtype });
            }
            if !touched.contains(&id) {
                return Err(SealError::UnusedState { buffer: name() });
            }
            let covered = resets > 0 && reset.get(&id) == Some(&resets);
            if buffer.growth() == Some(Growth::Fixed) && !covered {
                return Err(SealError::NotReset { buffer: name() });
            }
            state.push(id);
        }
        Ok(Sealed { model: self, state })
    }

    /// Checks one plan; returns what it writes of each buffer.
    fn seal_plan(
        &self,
        plan: &Plan,
        touched: &mut HashSet<BufferId>,
    ) -> Result<HashMap<BufferId, Vec<View>>, SealError> {
        if let Some(count) = plan.count {
            let fits = self.buffers.lookup(count).is_some_and(|b| {
                b.role == Role::Input && b.dtype == DType::U32 && (b.rows(), b.cols()) == (1, 1)
            });
            if !fits {
                return Err(SealError::Count { plan: plan.key });
            }
        }
        let mut written: HashMap<BufferId, Vec<View>> = HashMap::new();
        let mut appended: HashMap<BufferId, usize> = HashMap::new();
        let mut moved = false;
        for (index, op) in plan.ops.iter().enumerate() {
            op.check(&self.buffers).map_err(|source| SealError::Op {
                plan: plan.key,
                index,
                source,
            })?;
            let at = Site { plan: plan.key, index, op: op.name() };
            let operands = op.operands();
            self.check_count_and_cursor(plan, op, &at, &mut moved)?;
            let height = operands
                .iter()
                .find(|o| matches!(o.field, "key" | "query"))
                .map_or(0, |o| o.view.height());
            // Reads come before writes, so that an op in place does not vouch for itself.
            for o in operands.iter().filter(|o| o.access != Access::Write) {
                let buffer = &self.buffers[o.view.buffer];
                touched.insert(o.view.buffer);
                match (o.access, &buffer.role) {
                    (
                        Access::AppendRows | Access::ReadRows,
                        Role::State { growth: Growth::Rows, .. },
                    ) => {
                        if plan.key.context > buffer.rows() {
                            let (buffer, rows) = (buffer.name.clone(), buffer.rows());
                            return Err(SealError::ContextRows { plan: plan.key, buffer, rows });
                        }
                        if o.access == Access::AppendRows {
                            appended.insert(o.view.buffer, height);
                        } else if appended.get(&o.view.buffer).is_none_or(|&rows| rows < height) {
                            return Err(at.rows_not_appended(buffer));
                        }
                    }
                    (Access::AppendRows | Access::ReadRows, role) => {
                        return Err(at.undeclared_rows(buffer, role));
                    }
                    (_, Role::State { growth: Growth::Rows, .. }) => {
                        return Err(at.rows_outside_cursor(buffer));
                    }
                    (_, role) if carries_nothing(role, plan) => {
                        let done = written.get(&o.view.buffer).map_or(&[][..], Vec::as_slice);
                        if let Some(gap) = unwritten(o.view, done) {
                            return Err(at.read_before_write(buffer, &gap));
                        }
                    }
                    _ => {}
                }
            }
            for o in operands.iter().filter(|o| matches!(o.access, Access::Write | Access::Update))
            {
                let buffer = &self.buffers[o.view.buffer];
                touched.insert(o.view.buffer);
                match &buffer.role {
                    role @ (Role::Weight | Role::Input) => {
                        return Err(at.not_writable(buffer, role));
                    }
                    Role::State { growth: Growth::Rows, .. } => {
                        return Err(at.rows_outside_cursor(buffer));
                    }
                    Role::Scratch | Role::Output | Role::State { .. } => {
                        written.entry(o.view.buffer).or_default().push(o.view.clone());
                    }
                }
            }
        }
        Ok(written)
    }
}

/// Whether what the buffer held before the replay must not matter: Scratch and Output, and in a reset plan all State.
fn carries_nothing(role: &Role, plan: &Plan) -> bool {
    matches!(role, Role::Scratch | Role::Output)
        || (plan.key.phase == Phase::Reset && role.is_state())
}

impl Model {
    /// One count and one cursor per plan, and no op reads the position after it has moved.
    fn check_count_and_cursor(
        &self,
        plan: &Plan,
        op: &Op,
        at: &Site,
        moved: &mut bool,
    ) -> Result<(), SealError> {
        let Site { plan: key, index, op: name } = *at;
        let operands = op.operands();
        let count = operands.iter().find(|o| o.field == "count").map(|o| o.view.buffer);
        if op.takes_count() && count != plan.count {
            return Err(SealError::OtherCount { plan: key, index, op: name });
        }
        if let Some(cursor) = operands.iter().find(|o| o.field == "cursor") {
            let buffer = &self.buffers[cursor.view.buffer];
            if !matches!(
                buffer.role,
                Role::State { kind: StateKind::Cursor, growth: Growth::Fixed }
            ) || self
                .buffers
                .iter()
                .filter(|(_, b)| matches!(b.role, Role::State { kind: StateKind::Cursor, .. }))
                .count()
                > 1
            {
                return Err(SealError::OtherCursor {
                    plan: key,
                    index,
                    op: name,
                    buffer: buffer.name.clone(),
                });
            }
            let moves = matches!(op, Op::Advance(_));
            if *moved && !moves {
                return Err(SealError::CursorMoved { plan: key, index, op: name });
            }
            *moved = moves;
        }
        Ok(())
    }
}

/// Where an error is.
#[derive(Clone, Copy)]
struct Site {
    plan: ShapeKey,
    index: usize,
    op: &'static str,
}

impl Site {
    fn not_writable(self, buffer: &Buffer, role: &Role) -> SealError {
        let Self { plan, index, op } = self;
        SealError::NotWritable {
            plan,
            index,
            op,
            buffer: buffer.name.clone(),
            role: role_name(role),
        }
    }

    fn read_before_write(self, buffer: &Buffer, gap: &View) -> SealError {
        let Self { plan, index, op } = self;
        let (rows, cols) = (gap.rows.clone(), gap.cols.clone());
        let role = role_name(&buffer.role);
        SealError::ReadBeforeWrite {
            plan,
            index,
            op,
            buffer: buffer.name.clone(),
            role,
            rows,
            cols,
        }
    }

    fn rows_outside_cursor(self, buffer: &Buffer) -> SealError {
        let Self { plan, index, op } = self;
        SealError::RowsOutsideCursor { plan, index, op, buffer: buffer.name.clone() }
    }

    fn undeclared_rows(self, buffer: &Buffer, role: &Role) -> SealError {
        let Self { plan, index, op } = self;
        SealError::UndeclaredRows {
            plan,
            index,
            op,
            buffer: buffer.name.clone(),
            role: role_name(role),
        }
    }

    fn rows_not_appended(self, buffer: &Buffer) -> SealError {
        let Self { plan, index, op } = self;
        SealError::RowsNotAppended { plan, index, op, buffer: buffer.name.clone() }
    }
}

const fn role_name(role: &Role) -> &'static str {
    match role {
        Role::Weight => "a weight",
        Role::Input => "an input",
        Role::Output => "an output",
        Role::Scratch => "scratch",
        Role::State { growth: Growth::Fixed, .. } => "fixed state",
        Role::State { growth: Growth::Rows, .. } => "state that grows by rows",
    }
}

/// A part of `wanted` that no view in `written` covers, if there is one.
fn unwritten(wanted: &View, written: &[View]) -> Option<View> {
    let mut open = vec![wanted.clone()];
    for w in written {
        let mut rest = Vec::with_capacity(open.len());
        for piece in open {
            if !ranges_meet(&piece.rows, &w.rows) || !ranges_meet(&piece.cols, &w.cols) {
                rest.push(piece);
                continue;
            }
            let middle = piece.rows.start.max(w.rows.start)..piece.rows.end.min(w.rows.end);
            let parts = [
                (piece.rows.start..middle.start, piece.cols.clone()),
                (middle.end..piece.rows.end, piece.cols.clone()),
                (middle.clone(), piece.cols.start..w.cols.start.max(piece.cols.start)),
                (middle, w.cols.end.min(piece.cols.end)..piece.cols.end),
            ];
            rest.extend(
                parts
                    .into_iter()
                    .filter(|(rows, cols)| !rows.is_empty() && !cols.is_empty())
                    .map(|(rows, cols)| View { buffer: piece.buffer, rows, cols }),
            );
        }
        open = rest;
    }
    open.into_iter().next()
}
