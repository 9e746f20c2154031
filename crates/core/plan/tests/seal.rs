//! What the seal accepts, what it refuses, and that refusals name plan, op and buffer.

use ampoule_plan::{
    Advance, Buffer, BufferId, BufferTable, Copy, CostPoint, DType, Fill, Growth, KvAppend, Linear,
    Model, Op, Phase, Plan, RmsNorm, Role, SealError, Sealed, ShapeKey, SigmoidGate, StateKind,
    View,
};

struct Fixture {
    table: BufferTable,
    ops: Vec<Op>,
}

fn fixed(kind: StateKind) -> Role {
    Role::State { kind, growth: Growth::Fixed }
}

fn rows() -> Role {
    Role::State { kind: StateKind::KvCache, growth: Growth::Rows }
}

impl Fixture {
    fn new() -> Self {
        let mut f = Self { table: BufferTable::default(), ops: Vec::new() };
        f.buffer("cursor", fixed(StateKind::Cursor), DType::U32, &[1, 4]);
        f
    }

    fn buffer(&mut self, name: &str, role: Role, dtype: DType, shape: &[usize]) -> View {
        let id = self
            .table
            .add(Buffer { name: name.to_owned(), role, dtype, shape: shape.to_vec() })
            .unwrap();
        self.table.view(id)
    }

    fn f32(&mut self, name: &str, role: Role, shape: &[usize]) -> View {
        self.buffer(name, role, DType::F32, shape)
    }

    fn cursor(&self) -> View {
        self.table.view(self.table.find("cursor").unwrap())
    }

    fn op(&mut self, op: impl Into<Op>) {
        self.ops.push(op.into());
    }

    fn seal(self) -> Result<Sealed, SealError> {
        let cursor = self.cursor();
        let reset_ops = self
            .table
            .iter()
            .filter(|(_, b)| b.growth() == Some(Growth::Fixed))
            .map(|(id, _)| Fill { out: self.table.view(id), bits: 0 }.into())
            .collect();
        let mut ops = self.ops;
        ops.push(Advance { count: None, cursor }.into());
        let key = |phase| ShapeKey { phase, tokens: 1, slots: 1, context: 16 };
        Model {
            name: "fixture".to_owned(),
            buffers: self.table,
            plans: vec![
                Plan { key: key(Phase::Reset), count: None, ops: reset_ops },
                Plan { key: key(Phase::Decode), count: None, ops },
            ],
        }
        .seal()
    }
}

fn norm(x: &View, weight: &View, out: &View) -> RmsNorm {
    RmsNorm { x: x.clone(), weight: weight.clone(), out: out.clone(), eps: 1e-5, centered: false }
}

#[test]
fn a_closed_model_seals_and_lists_its_state() {
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[4, 8]);
    let weight = f.f32("weight", Role::Weight, &[8]);
    let x = f.f32("x", Role::Scratch, &[4, 8]);
    let memory = f.f32("memory", fixed(StateKind::Recurrent), &[4, 8]);
    f.op(norm(&input, &weight, &x));
    f.op(Copy { source: x, out: memory });
    let sealed = f.seal().unwrap();
    let names: Vec<_> = sealed.state().iter().map(|&id| sealed.buffer(id).name.as_str()).collect();
    assert_eq!(names, ["cursor", "memory"]);
}

#[test]
fn scratch_carried_over_is_refused() {
    let mut f = Fixture::new();
    let weight = f.f32("weight", Role::Weight, &[8]);
    let x = f.f32("x", Role::Scratch, &[4, 8]);
    let y = f.f32("y", Role::Output, &[4, 8]);
    f.op(norm(&x, &weight, &y));
    let error = f.seal().unwrap_err();
    assert!(
        matches!(&error, SealError::ReadBeforeWrite { op: "rms_norm", buffer, .. } if buffer == "x"),
        "{error}"
    );
}

#[test]
fn an_op_in_place_does_not_vouch_for_itself() {
    let mut f = Fixture::new();
    let gate = f.f32("gate", Role::Input, &[4, 8]);
    let x = f.f32("x", Role::Scratch, &[4, 8]);
    f.op(SigmoidGate { x: x.clone(), gate, out: x });
    assert!(
        matches!(f.seal().unwrap_err(), SealError::ReadBeforeWrite { buffer, .. } if buffer == "x")
    );
}

#[test]
fn partial_writes_leave_rows_or_columns_unwritten() {
    for (rows, cols, gap_rows, gap_cols) in
        [(0..3, 0..8, 3..4, 0..8), (0..4, 0..5, 0..4, 5..8), (1..4, 0..8, 0..1, 0..8)]
    {
        let mut f = Fixture::new();
        let weight = f.f32("weight", Role::Weight, &[8]);
        let input = f.f32("input", Role::Input, &[4, 8]);
        let x = f.f32("x", Role::Scratch, &[4, 8]);
        let y = f.f32("y", Role::Output, &[4, 8]);
        let part = View { buffer: x.buffer, rows: rows.clone(), cols: cols.clone() };
        f.op(Copy { source: View { buffer: input.buffer, rows, cols }, out: part });
        f.op(norm(&x, &weight, &y));
        match f.seal().unwrap_err() {
            SealError::ReadBeforeWrite { buffer, rows, cols, index, .. } => {
                assert_eq!((buffer.as_str(), rows, cols, index), ("x", gap_rows, gap_cols, 1));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn parts_that_together_cover_are_accepted() {
    let mut f = Fixture::new();
    let weight = f.f32("weight", Role::Weight, &[8]);
    let input = f.f32("input", Role::Input, &[4, 8]);
    let x = f.f32("x", Role::Scratch, &[4, 8]);
    let y = f.f32("y", Role::Output, &[4, 8]);
    for (rows, cols) in [(0..4, 0..3), (0..2, 3..8), (2..4, 2..8)] {
        let view = |b: BufferId| View { buffer: b, rows: rows.clone(), cols: cols.clone() };
        f.op(Copy { source: view(input.buffer), out: view(x.buffer) });
    }
    f.op(norm(&x, &weight, &y));
    f.seal().unwrap();
}

#[test]
fn weights_and_inputs_are_never_written() {
    for role in [Role::Weight, Role::Input] {
        let mut f = Fixture::new();
        let weight = f.f32("weight", Role::Weight, &[8]);
        let input = f.f32("input", Role::Input, &[4, 8]);
        let victim = f.f32("victim", role, &[4, 8]);
        f.op(norm(&input, &weight, &victim));
        let error = f.seal().unwrap_err();
        assert!(
            matches!(&error, SealError::NotWritable { buffer, .. } if buffer == "victim"),
            "{error}"
        );
    }
}

fn append(f: &Fixture, key: &View, cache: (&View, &View)) -> KvAppend {
    KvAppend {
        key: key.clone(),
        value: key.clone(),
        cursor: f.cursor(),
        count: None,
        key_cache: cache.0.clone(),
        value_cache: cache.1.clone(),
    }
}

#[test]
fn rows_kept_in_undeclared_memory_are_refused() {
    for role in [Role::Scratch, Role::Output, fixed(StateKind::KvCache)] {
        let mut f = Fixture::new();
        let input = f.f32("input", Role::Input, &[1, 8]);
        let keys = f.f32("keys", rows(), &[16, 8]);
        let values = f.f32("values", role, &[16, 8]);
        f.op(append(&f, &input, (&keys, &values)));
        let error = f.seal().unwrap_err();
        assert!(
            matches!(&error, SealError::UndeclaredRows { buffer, .. } if buffer == "values"),
            "{error}"
        );
    }
}

#[test]
fn rows_are_touched_only_through_the_cursor() {
    for write in [false, true] {
        let mut f = Fixture::new();
        let input = f.f32("input", Role::Input, &[16, 8]);
        let output = f.f32("output", Role::Output, &[16, 8]);
        let keys = f.f32("keys", rows(), &[16, 8]);
        f.op(if write {
            Copy { source: input, out: keys }
        } else {
            Copy { source: keys, out: output }
        });
        assert!(
            matches!(f.seal().unwrap_err(), SealError::RowsOutsideCursor { buffer, .. } if buffer == "keys")
        );
    }
}

#[test]
fn reading_rows_needs_an_append_first() {
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[1, 8]);
    let out = f.f32("out", Role::Output, &[1, 8]);
    let keys = f.f32("keys", rows(), &[16, 8]);
    let values = f.f32("values", rows(), &[16, 8]);
    let (cursor, query) = (f.cursor(), input.clone());
    let attention = ampoule_plan::Attention {
        query,
        key_cache: keys.clone(),
        value_cache: values.clone(),
        cursor,
        count: None,
        out,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        scale: 1.0,
    };
    f.op(attention);
    f.op(append(&f, &input, (&keys, &values)));
    assert!(
        matches!(f.seal().unwrap_err(), SealError::RowsNotAppended { buffer, .. } if buffer == "keys")
    );
}

#[test]
fn state_must_be_used_and_reset() {
    let mut f = Fixture::new();
    f.f32("idle", rows(), &[4, 8]);
    assert!(matches!(f.seal().unwrap_err(), SealError::UnusedState { buffer } if buffer == "idle"));

    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[4, 8]);
    let memory = f.f32("memory", fixed(StateKind::Recurrent), &[4, 8]);
    f.op(Copy { source: input, out: memory });
    let mut model = f.seal().unwrap().model().clone();
    model.plans[0].ops.pop();
    assert!(
        matches!(model.seal().unwrap_err(), SealError::NotReset { buffer } if buffer == "memory")
    );
}

#[test]
fn shapes_types_and_overlaps_are_checked() {
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[2, 32]);
    let weight = f.buffer("weight", Role::Weight, DType::Q4_1, &[8, 64]);
    let out = f.f32("out", Role::Output, &[2, 8]);
    f.op(Linear { x: input, weight, bias: None, out });
    let error = f.seal().unwrap_err().to_string();
    assert!(
        error.contains("linear")
            && error.contains("'weight' q4_1[8, 64]")
            && error.contains("[8, 32]"),
        "{error}"
    );

    let mut f = Fixture::new();
    let weight = f.f32("weight", Role::Weight, &[4]);
    let x = f.f32("x", Role::Scratch, &[2, 8]);
    f.op(Fill { out: x.clone(), bits: 0 });
    f.op(norm(&x.columns(0, 4), &weight, &x.columns(2, 4)));
    assert!(f.seal().unwrap_err().to_string().contains("overlap"));
}

#[test]
fn the_text_form_round_trips() {
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[4, 64]);
    let weight = f.buffer("weight", Role::Weight, DType::Q8_0, &[8, 64]);
    let norm_weight = f.f32("norm.weight", Role::Weight, &[8]);
    let out = f.f32("out", Role::Output, &[4, 8]);
    let memory = f.f32("memory", fixed(StateKind::Other("episode".to_owned())), &[2, 8]);
    f.op(Linear { x: input.clone(), weight, bias: None, out: out.clone() });
    f.op(RmsNorm {
        x: out.clone(),
        weight: norm_weight,
        out: out.clone(),
        eps: 1.1e-6,
        centered: true,
    });
    f.op(Copy { source: out.first_rows(2), out: memory });
    let sealed = f.seal().unwrap();
    let text = sealed.model().to_text();
    let parsed = Model::from_text(&text).unwrap();
    assert_eq!(&parsed, sealed.model());
    assert_eq!(parsed.seal().unwrap().digest(), sealed.digest());
    assert!(text.contains("eps=1.1e-6 centered=true"), "{text}");
    assert!(text.contains("source=out[0:2,0:8]"), "{text}");
    let at = CostPoint { position: 0, tokens: 2 };
    let cost = sealed.model().plans[1].ops[0].cost(&sealed.model().buffers, at);
    assert_eq!(
        (cost.bytes_read, cost.bytes_written, cost.flops),
        (2 * 64 * 4 + 8 * 68, 2 * 8 * 4, 2 * 2 * 8 * 64)
    );
}

#[test]
fn broken_text_names_its_line() {
    let good = "ampoule-plan 1\nmodel m\nbuffer a input f32 [2,2]\nbuffer b output f32 [2,2]\n\
                plan decode tokens=1 slots=1 context=4 count=-\n  copy source=a out=b\nend\n";
    Model::from_text(good).unwrap();
    for (from, to, line) in [
        ("ampoule-plan 1", "ampoule-plan 2", 1),
        ("[2,2]\nbuffer b", "[2,0]\nbuffer b", 3),
        ("f32 [2,2]\nplan", "f33 [2,2]\nplan", 4),
        ("buffer b output", "buffer a output", 4),
        ("decode", "decoed", 5),
        ("copy source", "cpy source", 6),
        ("source=a", "source=c", 6),
        ("source=a", "source=a[0:1", 6),
        ("out=b", "out=b extra=1", 6),
        ("out=b", "out=b out=b", 6),
        ("end\n", "", 6),
    ] {
        let broken = good.replacen(from, to, 1);
        let error = Model::from_text(&broken).unwrap_err();
        assert_eq!(error.line, line, "{broken}\n{error}");
    }
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(lines in proptest::collection::vec("(buffer|plan|  copy|end|model|  rope) ?[ a-z=\\[\\]:,0-9.()]{0,40}", 0..8)) {
        let _ = Model::from_text(&format!("ampoule-plan 1\nmodel x\n{}", lines.join("\n")));
    }
}

#[test]
fn a_plan_counts_and_stands_in_one_way() {
    // An op that forgets the plan's count would let padding reach State.
    let mut f = Fixture::new();
    let count = f.buffer("count", Role::Input, DType::U32, &[1, 1]);
    let input = f.f32("input", Role::Input, &[4, 8]);
    let (keys, values) = (f.f32("keys", rows(), &[16, 8]), f.f32("values", rows(), &[16, 8]));
    let mut with_count = append(&f, &input, (&keys, &values));
    with_count.count = Some(count);
    f.op(with_count);
    assert!(matches!(f.seal().unwrap_err(), SealError::OtherCount { op: "kv_append", .. }));

    // A position from an Input is not the Cursor.
    let mut f = Fixture::new();
    let elsewhere = f.buffer("elsewhere", Role::Input, DType::U32, &[1, 4]);
    let input = f.f32("input", Role::Input, &[1, 8]);
    let (keys, values) = (f.f32("keys", rows(), &[16, 8]), f.f32("values", rows(), &[16, 8]));
    let mut other = append(&f, &input, (&keys, &values));
    other.cursor = elsewhere;
    f.op(other);
    assert!(
        matches!(f.seal().unwrap_err(), SealError::OtherCursor { buffer, .. } if buffer == "elsewhere")
    );

    // The position moves after everything that reads it.
    let mut f = Fixture::new();
    let cursor = f.cursor();
    f.op(Advance { count: None, cursor });
    let input = f.f32("input", Role::Input, &[1, 8]);
    let (keys, values) = (f.f32("keys", rows(), &[16, 8]), f.f32("values", rows(), &[16, 8]));
    f.op(append(&f, &input, (&keys, &values)));
    assert!(matches!(f.seal().unwrap_err(), SealError::CursorMoved { op: "kv_append", .. }));

    // Positions end where rows end.
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[1, 8]);
    let (keys, values) = (f.f32("keys", rows(), &[8, 8]), f.f32("values", rows(), &[8, 8]));
    f.op(append(&f, &input, (&keys, &values)));
    assert!(matches!(f.seal().unwrap_err(), SealError::ContextRows { rows: 8, .. }));
}

#[test]
fn more_queries_than_appended_rows_are_refused() {
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[1, 8]);
    let query = f.f32("query", Role::Input, &[4, 8]);
    let out = f.f32("out", Role::Output, &[4, 8]);
    let (keys, values) = (f.f32("keys", rows(), &[16, 8]), f.f32("values", rows(), &[16, 8]));
    f.op(append(&f, &input, (&keys, &values)));
    let cursor = f.cursor();
    f.op(ampoule_plan::Attention {
        query,
        key_cache: keys,
        value_cache: values,
        cursor,
        count: None,
        out,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        scale: 1.0,
    });
    assert!(matches!(f.seal().unwrap_err(), SealError::RowsNotAppended { op: "attention", .. }));
}

#[test]
fn a_reset_that_copies_or_updates_state_resets_nothing() {
    let mut f = Fixture::new();
    let input = f.f32("input", Role::Input, &[2, 8]);
    let memory = f.f32("memory", fixed(StateKind::Recurrent), &[2, 8]);
    f.op(Copy { source: input, out: memory });
    let mut model = f.seal().unwrap().model().clone();
    let cursor = model.buffers.view(model.buffers.find("cursor").unwrap());
    model.plans[0].ops[0] = Advance { count: None, cursor }.into();
    assert!(
        matches!(model.seal().unwrap_err(), SealError::ReadBeforeWrite { buffer, .. } if buffer == "cursor")
    );
}

#[test]
fn sizes_that_overflow_are_refused() {
    let text = |heads: &str| {
        format!(
            "ampoule-plan 1\nmodel m\nbuffer cursor state(cursor,fixed) u32 [1,4]\nbuffer q input f32 [1,16]\n\
             buffer o output f32 [1,16]\nbuffer k state(kv_cache,rows) f32 [8,16]\nbuffer v state(kv_cache,rows) f32 [8,16]\n\
             plan reset tokens=0 slots=1 context=8 count=-\n  fill out=cursor bits=0\nend\n\
             plan decode tokens=1 slots=1 context=8 count=-\n  \
             kv_append key=q value=q cursor=cursor key_cache=k value_cache=v\n  \
             attention query=q key_cache=k value_cache=v cursor=cursor out=o heads={heads} kv_heads={heads} head_dim=8 scale=1.0\nend\n"
        )
    };
    Model::from_text(&text("2")).unwrap().seal().unwrap();
    let wrapping = (1_u64 << 61) + 2; // times 8 wraps to 16
    let error = Model::from_text(&text(&wrapping.to_string())).unwrap().seal().unwrap_err();
    assert!(error.to_string().contains("more than memory"), "{error}");
}
