//! Runs a case on the reference and on the backend under test.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ampoule_backend::{Backend, BackendError, LoadOptions, Program, Region, SlotId};
use ampoule_plan::{BufferId, Growth, Sealed};

use super::case::{Bytes, Case, DrawOf, Expect, Scenario, States, Tolerance, Weights};
use super::compare::{Tolerances, compare};
use super::report::{Failure, Problem, Report};
use super::sampling::near_tie;

/// What a scenario left: of each Output the rows read, one replay after another, and all State.
struct Trace {
    outputs: BTreeMap<BufferId, Vec<u8>>,
    states: BTreeMap<BufferId, Vec<u8>>,
}

/// A loaded case with two slots.
struct Loaded {
    program: Box<dyn Program>,
    slots: [SlotId; 2],
    /// Replays that allocated, captured or were more than one launch.
    restless: Option<String>,
}

fn load(
    backend: &dyn Backend,
    model: &Arc<Sealed>,
    weights: &Weights,
) -> Result<Loaded, BackendError> {
    let state: usize = model.state().iter().map(|&id| model.buffer(id).bytes()).sum();
    let options = LoadOptions { slots: 2, capsule_bytes: 8 * state + (1 << 16) };
    let mut program = backend.load(Arc::clone(model), weights, options, &mut |_, _| {})?;
    let slots = [program.create_slot()?, program.create_slot()?];
    Ok(Loaded { program, slots, restless: None })
}

fn whole(model: &Sealed, id: BufferId) -> Region {
    Region { buffer: id, rows: 0..model.buffer(id).rows() }
}

impl Loaded {
    fn put_state(&mut self, slot: SlotId, state: &[(BufferId, Bytes)]) -> Result<(), BackendError> {
        let model = Arc::clone(self.program.model());
        let regions: Vec<Region> = state.iter().map(|(id, _)| whole(&model, *id)).collect();
        let bytes: Vec<&[u8]> = state.iter().map(|(_, b)| &**b).collect();
        let frozen = self.program.freeze_bytes(&regions, &bytes)?;
        self.program.thaw(slot, &[frozen])
    }

    fn states(&mut self, slot: SlotId) -> Result<BTreeMap<BufferId, Vec<u8>>, BackendError> {
        let model = Arc::clone(self.program.model());
        let mut states = BTreeMap::new();
        for &id in model.state() {
            let buffer = model.buffer(id);
            let mut bytes = vec![0; buffer.bytes()];
            let middle = buffer.rows() / 2;
            let (first, second) = bytes.split_at_mut(middle * buffer.row_bytes());
            let parts = [(middle..buffer.rows(), second), (0..middle, first)];
            for (rows, part) in parts.into_iter().filter(|(rows, _)| !rows.is_empty()) {
                self.program.read_state(slot, &Region { buffer: id, rows }, part)?;
            }
            states.insert(id, bytes);
        }
        Ok(states)
    }

    fn run(&mut self, scenario: &Scenario) -> Result<Trace, BackendError> {
        let slot = self.slots[usize::from(scenario.second_slot)];
        self.put_state(slot, &scenario.state)?;
        let model = Arc::clone(self.program.model());
        let mut outputs: BTreeMap<BufferId, Vec<u8>> = BTreeMap::new();
        for replay in &scenario.replays {
            if scenario.poison {
                self.program.poison()?;
            }
            let before = self.program.counters();
            for (id, bytes) in &replay.inputs {
                self.program.write_input(*id, bytes)?;
            }
            self.program.run(slot, replay.plan)?;
            for &(id, rows) in &replay.reads {
                let mut bytes = vec![0; rows * model.buffer(id).row_bytes()];
                // In two parts: offsets are part of the contract.
                let (first, second) = bytes.split_at_mut(rows / 2 * model.buffer(id).row_bytes());
                self.program.read_output(id, first.len(), second)?;
                if !first.is_empty() {
                    self.program.read_output(id, 0, first)?;
                }
                outputs.entry(id).or_default().extend(bytes);
            }
            let after = self.program.counters();
            if (after.allocations, after.captures, after.launches)
                != (before.allocations, before.captures, before.launches + 1)
            {
                self.restless = Some(format!(
                    "a replay must be one launch without allocations or captures; before {before:?}, after {after:?}"
                ));
            }
        }
        let states = self.states(slot)?;
        self.program.synchronize()?;
        Ok(Trace { outputs, states })
    }

    /// Thaws what the first slot holds into the second.
    fn copy_across(&mut self) -> Result<BTreeMap<BufferId, Vec<u8>>, BackendError> {
        let model = Arc::clone(self.program.model());
        let regions: Vec<Region> = model.state().iter().map(|&id| whole(&model, id)).collect();
        let frozen = self.program.freeze(self.slots[0], &regions)?;
        self.program.thaw(self.slots[1], &[frozen])?;
        self.states(self.slots[1])
    }
}

/// Where findings of one case go.
struct Findings<'a> {
    name: &'a str,
    op: &'static str,
    case: &'a Case,
    judge: &'a Judge<'a>,
    report: &'a mut Report,
}

impl Findings<'_> {
    fn fail(&mut self, check: &'static str, problem: Problem) {
        self.report.failures.push(Failure {
            case: self.name.to_owned(),
            op: self.op,
            check,
            problem,
        });
    }

    fn compare(
        &mut self,
        check: &'static str,
        id: BufferId,
        tolerance: Tolerance,
        got: &[u8],
        expected: &[u8],
    ) {
        let buffer = self.case.model.buffer(id);
        let outcome = compare(buffer.dtype, tolerance, &self.judge.tolerances, got, expected);
        if check == "reference" && matches!(tolerance, Tolerance::Relative(_)) {
            let worst = self.report.worst.entry((self.op, buffer.dtype.name())).or_default();
            *worst = worst.max(outcome.worst);
        }
        if let Some(mismatch) = outcome.mismatch {
            let (buffer, dtype) = (buffer.name.clone(), buffer.dtype.name());
            self.fail(check, Problem::Mismatch { buffer, dtype, mismatch });
        }
    }

    fn tolerance(&self, id: BufferId) -> Tolerance {
        if self.judge.exact { Tolerance::Bits } else { self.case.tolerance(id) }
    }

    fn against_reference(&mut self, check: &'static str, got: &Trace, expected: &Trace) {
        for (want, have) in [(&expected.outputs, &got.outputs), (&expected.states, &got.states)] {
            for (id, expected) in want {
                self.compare(check, *id, self.tolerance(*id), &have[id], expected);
            }
        }
    }

    fn draw(&mut self, check: &'static str, draw: &DrawOf, got: &Trace, expected: &Trace) {
        self.report.draws += 1;
        let (token, adjusted) = (&got.outputs[&draw.token], &expected.outputs[&draw.adjusted]);
        let near = || !self.judge.exact && near_tie(draw, adjusted, token);
        if *token == expected.outputs[&draw.token] || !near() {
            return self.against_reference(check, got, expected);
        }
        self.report.near_ties += 1;
        // The token and its count differ; the rest must not.
        let (id, have) = (draw.adjusted, &got.outputs[&draw.adjusted]);
        self.compare(check, id, self.tolerance(id), have, adjusted);
    }

    fn same(
        &mut self,
        check: &'static str,
        got: &Trace,
        base: &Trace,
        rows: Option<usize>,
        states: States,
    ) {
        for (id, expected) in &base.outputs {
            // Outputs that are not read row by row cannot be cut.
            let row = self.case.model.buffer(*id).row_bytes();
            let token_rows = self.case.token_rows.contains(id);
            let Some(have) = got.outputs.get(id) else { continue };
            let end = match rows {
                Some(rows) if token_rows => (rows * row).min(expected.len()).min(have.len()),
                Some(_) => continue,
                None => expected.len(),
            };
            let have = if rows.is_some() { &have[..end] } else { have };
            self.compare(check, *id, Tolerance::Bits, have, &expected[..end]);
        }
        for (id, expected) in &base.states {
            let buffer = self.case.model.buffer(*id);
            let end = match (states, buffer.growth()) {
                (States::None, _) => continue,
                (States::RowsBelow(rows), Some(Growth::Rows)) => rows * buffer.row_bytes(),
                _ => expected.len(),
            };
            self.compare(check, *id, Tolerance::Bits, &got.states[id][..end], &expected[..end]);
        }
    }
}

fn caught<T>(run: impl FnOnce() -> Result<T, BackendError>) -> Result<T, Problem> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Problem::Error(error.to_string())),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(Problem::Error(format!("panicked: {text}")))
        }
    }
}

/// What results are held against.
pub(crate) struct Judge<'a> {
    pub(crate) oracle: &'a dyn Backend,
    pub(crate) tolerances: Tolerances,
    /// Bit for bit, whatever the case allows.
    pub(crate) exact: bool,
    /// The oracle gets quantised weights as bfloat16.
    pub(crate) bf16_weights: bool,
}

/// Runs the case and adds what it found to the report.
pub(crate) fn run_case(
    backend: &dyn Backend,
    name: &str,
    op: &'static str,
    case: &Case,
    judge: &Judge<'_>,
    report: &mut Report,
) {
    report.run += 1;
    let failures = report.failures.len();
    let mut findings = Findings { name, op, case, judge, report };
    if let Err(problem) = run_scenarios(backend, case, &mut findings) {
        findings.fail("run", problem);
    }
    if report.failures.len() == failures {
        report.passed += 1;
    }
}

fn run_scenarios(
    backend: &dyn Backend,
    case: &Case,
    findings: &mut Findings<'_>,
) -> Result<(), Problem> {
    let mut tested = caught(|| load(backend, &case.model, &case.weights))?;
    let rounded = if findings.judge.bf16_weights { case.with_bf16_weights() } else { None };
    let (model, weights) = rounded.as_ref().map_or((&case.model, &case.weights), |(m, w)| (m, w));
    let mut reference = load(findings.judge.oracle, model, weights)
        .map_err(|e| Problem::Error(format!("the backend to compare with: {e}")))?;
    let mut traces: Vec<Trace> = Vec::new();
    for (index, scenario) in case.scenarios.iter().enumerate() {
        // While the first scenario runs, the second slot must keep what it holds.
        let bystander = if index == 0 {
            let scrambled: Vec<(BufferId, Bytes)> = scenario
                .state
                .iter()
                .map(|(id, bytes)| (*id, bytes.iter().map(|b| b ^ 0x5a).collect()))
                .collect();
            let slot = tested.slots[1];
            caught(|| tested.put_state(slot, &scrambled))?;
            Some(scrambled)
        } else {
            None
        };
        let got = caught(|| tested.run(scenario))?;
        if let Some(scrambled) = bystander {
            let slot = tested.slots[1];
            let held = caught(|| tested.states(slot))?;
            for (id, expected) in &scrambled {
                findings.compare("bystander", *id, Tolerance::Bits, &held[id], expected);
            }
            for (id, copied) in &caught(|| tested.copy_across())? {
                findings.compare("freeze and thaw", *id, Tolerance::Bits, copied, &got.states[id]);
            }
        }
        let check = scenario.check;
        match &scenario.expect {
            Expect::Same { scenario, rows, states } => {
                findings.same(check, &got, &traces[*scenario], *rows, *states);
            }
            expect => {
                let expected = reference
                    .run(scenario)
                    .map_err(|e| Problem::Error(format!("the backend to compare with: {e}")))?;
                match expect {
                    Expect::Draw(draw) => findings.draw(check, draw, &got, &expected),
                    _ => findings.against_reference(check, &got, &expected),
                }
            }
        }
        traces.push(got);
    }
    if let Some(text) = tested.restless {
        findings.fail("counters", Problem::Error(text));
    }
    Ok(())
}
