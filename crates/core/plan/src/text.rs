//! The text form of a model: what `ampoule plan print` shows, what goldens hold, and what a fingerprint hashes.
//!
//! ```text
//! ampoule-plan 1
//! model smollm2
//! buffer cursor state(cursor,fixed) u32 [1,4]
//! buffer x scratch f32 [64,576]
//! plan decode tokens=1 slots=1 context=4096 count=-
//!   rms_norm x=x[0:1,0:576] weight=layers.0.norm out=h[0:1,0:576] eps=1e-5 centered=false
//! end
//! ```
//! A view that is the whole buffer is written as its name alone. Parsing what was printed gives an equal model.

use std::fmt::Write as _;
use std::ops::Range;

use crate::ops::Fields;
use crate::{Buffer, BufferTable, DType, Growth, Model, Op, Phase, Plan, Role, ShapeKey, View};

const HEADER: &str = "ampoule-plan 1";

/// The text is not a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

impl Model {
    /// The text form.
    pub fn to_text(&self) -> String {
        let mut out = format!("{HEADER}\nmodel {}\n", self.name.replace(['\n', '\r'], " "));
        for (_, b) in self.buffers.iter() {
            let shape: Vec<String> = b.shape.iter().map(ToString::to_string).collect();
            let _ = writeln!(
                out,
                "buffer {} {} {} [{}]",
                b.name,
                role_text(&b.role),
                b.dtype,
                shape.join(",")
            );
        }
        for plan in &self.plans {
            let count = plan.count.map_or("-", |id| &self.buffers[id].name);
            let _ = writeln!(out, "plan {} count={count}", plan.key);
            for op in &plan.ops {
                let _ = writeln!(out, "  {}", op_text(op, &self.buffers));
            }
            out.push_str("end\n");
        }
        out
    }

    /// Reads the text form. Only the form is checked; [`Model::seal`] checks the rest.
    ///
    /// # Errors
    /// If a line cannot be read, with its number.
    pub fn from_text(text: &str) -> Result<Self, ParseError> {
        let mut lines = text.lines().enumerate().map(|(i, l)| (i + 1, l.trim_end()));
        let fail = |line: usize, problem: String| ParseError { line, problem };
        if lines.next().map(|(_, l)| l) != Some(HEADER) {
            return Err(fail(1, format!("must be '{HEADER}'")));
        }
        let name = lines
            .next()
            .and_then(|(_, l)| l.strip_prefix("model "))
            .ok_or_else(|| fail(2, "must be 'model NAME'".to_owned()))?;
        let mut model =
            Self { name: name.to_owned(), buffers: BufferTable::default(), plans: Vec::new() };
        let mut open: Option<Plan> = None;
        let mut last = 2;
        for (number, line) in lines {
            last = number;
            let parsed = match (line.split_whitespace().next(), &mut open) {
                (None, _) => Ok(()),
                (Some("buffer"), None) => parse_buffer(line, &mut model.buffers),
                (Some("plan"), None) => {
                    parse_plan(line, &model.buffers).map(|plan| open = Some(plan))
                }
                (Some("end"), Some(_)) => {
                    model.plans.extend(open.take());
                    Ok(())
                }
                (Some(_), Some(plan)) => parse_op(line, &model.buffers).map(|op| plan.ops.push(op)),
                (Some(word), None) => {
                    Err(format!("'{word}' outside a plan; expected 'buffer' or 'plan'"))
                }
            };
            parsed.map_err(|problem| fail(number, problem))?;
        }
        if open.is_some() {
            return Err(fail(last, "the last plan has no 'end'".to_owned()));
        }
        Ok(model)
    }
}

fn role_text(role: &Role) -> String {
    match role {
        Role::Weight => "weight".to_owned(),
        Role::Input => "input".to_owned(),
        Role::Output => "output".to_owned(),
        Role::Scratch => "scratch".to_owned(),
        Role::State { kind, growth } => {
            format!("state({kind},{})", if *growth == Growth::Fixed { "fixed" } else { "rows" })
        }
    }
}

fn parse_role(text: &str) -> Result<Role, String> {
    let state = |inner: &str| {
        let (kind, growth) = inner.split_once(',')?;
        let growth = match growth {
            "fixed" => Growth::Fixed,
            "rows" => Growth::Rows,
            _ => return None,
        };
        let Ok(kind) = kind.parse();
        Some(Role::State { kind, growth })
    };
    match text {
        "weight" => Ok(Role::Weight),
        "input" => Ok(Role::Input),
        "output" => Ok(Role::Output),
        "scratch" => Ok(Role::Scratch),
        _ => text
            .strip_prefix("state(")
            .and_then(|t| t.strip_suffix(')'))
            .and_then(state)
            .ok_or_else(|| format!("unknown role '{text}'")),
    }
}

fn op_text(op: &Op, table: &BufferTable) -> String {
    let mut out = op.name().to_owned();
    for operand in op.operands() {
        let view = operand.view;
        let _ = write!(out, " {}={}", operand.field, table[view.buffer].name);
        if *view != table.view(view.buffer) {
            let (r, c) = (&view.rows, &view.cols);
            let _ = write!(out, "[{}:{},{}:{}]", r.start, r.end, c.start, c.end);
        }
    }
    for (field, value) in op.attributes() {
        let _ = write!(out, " {field}={value}");
    }
    out
}

fn parse_buffer(line: &str, table: &mut BufferTable) -> Result<(), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, name, role, dtype, shape] = words[..] else {
        return Err("expected 'buffer NAME ROLE TYPE [SHAPE]'".to_owned());
    };
    let shape = shape
        .strip_prefix('[')
        .and_then(|s| s.strip_suffix(']'))
        .and_then(|s| s.split(',').map(|d| d.parse().ok()).collect::<Option<Vec<usize>>>())
        .ok_or_else(|| format!("'{shape}' is no shape"))?;
    let dtype: DType = dtype.parse().map_err(|e: crate::UnknownDType| e.to_string())?;
    let buffer = Buffer { name: name.to_owned(), role: parse_role(role)?, dtype, shape };
    table.add(buffer).map(|_| ()).map_err(|e| e.to_string())
}

fn parse_plan(line: &str, table: &BufferTable) -> Result<Plan, String> {
    let usage = || "expected 'plan PHASE tokens=N slots=N context=N count=NAME|-'".to_owned();
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, phase, tokens, slots, context, count] = words[..] else { return Err(usage()) };
    let number = |word: &str, key: &str| {
        word.strip_prefix(key)
            .and_then(|w| w.strip_prefix('='))
            .and_then(|w| w.parse().ok())
            .ok_or_else(usage)
    };
    let key = ShapeKey {
        phase: phase.parse::<Phase>().map_err(|()| format!("unknown phase '{phase}'"))?,
        tokens: number(tokens, "tokens")?,
        slots: number(slots, "slots")?,
        context: number(context, "context")?,
    };
    let count = match count.strip_prefix("count=").ok_or_else(usage)? {
        "-" => None,
        name => Some(table.find(name).ok_or_else(|| format!("no buffer is called '{name}'"))?),
    };
    Ok(Plan { key, count, ops: Vec::new() })
}

fn parse_op(line: &str, table: &BufferTable) -> Result<Op, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    let mut fields = Fields::default();
    for word in words {
        let (field, value) =
            word.split_once('=').ok_or_else(|| format!("'{word}' is not FIELD=VALUE"))?;
        let view = parse_view(value, table)?;
        let twice = match view {
            Some(view) => fields.views.insert(field.to_owned(), view).is_some(),
            None => fields.attributes.insert(field.to_owned(), value.to_owned()).is_some(),
        };
        if twice {
            return Err(format!("field '{field}' stands twice"));
        }
    }
    Op::from_fields(name, fields)
}

/// `None` where the text names no buffer, and so must be an attribute's value.
fn parse_view(text: &str, table: &BufferTable) -> Result<Option<View>, String> {
    let (name, window) = match text.split_once('[') {
        Some((name, window)) => (name, Some(window)),
        None => (text, None),
    };
    let Some(id) = table.find(name) else {
        return if window.is_some() {
            Err(format!("no buffer is called '{name}'"))
        } else {
            Ok(None)
        };
    };
    let Some(window) = window else { return Ok(Some(table.view(id))) };
    let range = |text: &str| -> Option<Range<usize>> {
        let (start, end) = text.split_once(':')?;
        Some(start.parse().ok()?..end.parse().ok()?)
    };
    let (rows, cols) = window
        .strip_suffix(']')
        .and_then(|w| w.split_once(','))
        .and_then(|(r, c)| Some((range(r)?, range(c)?)))
        .ok_or_else(|| format!("'{text}' is no view"))?;
    if rows.start >= rows.end || cols.start >= cols.end {
        return Err(format!("'{text}' views nothing"));
    }
    Ok(Some(View { buffer: id, rows, cols }))
}
