//! One plan over buffers with given contents, on any backend.

use std::collections::BTreeMap;
use std::sync::Arc;

use ampoule_backend::{Backend, LoadOptions, Region, SlotId, WeightError, WeightSource};
use ampoule_plan::{
    BLOCK, Buffer, BufferId, BufferTable, DType, Fill, Growth, Model, Op, Phase, Plan, RandomFill,
    Role, ShapeKey, StateKind, View,
};
use ampoule_reference::store_elements;

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn word(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.word() as usize % n
    }

    /// In -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        self.word() as f32 / 1_073_741_824.0 - 1.0
    }

    /// Elements of a type; of a quantised one whole blocks with plain scales.
    pub(crate) fn bytes(&mut self, dtype: DType, elements: usize, scale: f32) -> Vec<u8> {
        let mut bytes = vec![0; dtype.bytes_for(elements).unwrap()];
        if !dtype.is_quantized() {
            let values: Vec<f32> = (0..elements).map(|_| self.unit() * scale).collect();
            store_elements(dtype, &values, &mut bytes);
            return bytes;
        }
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            block.fill_with(|| self.word() as u8);
            let headers = if dtype == DType::Q4_1 { 2 } else { 1 };
            let step = scale / if dtype == DType::Q8_0 { 128.0 } else { 8.0 };
            for h in 0..headers {
                let value = self.unit() * if h == 0 { step } else { scale };
                store_elements(DType::F16, &[value], &mut block[2 * h..2 * h + 2]);
            }
        }
        assert!(elements.is_multiple_of(BLOCK));
        bytes
    }
}

/// Buffers with contents, and ops over them.
pub(crate) struct Case {
    model: Model,
    contents: Vec<Vec<u8>>,
    ops: Vec<Op>,
    count: Option<BufferId>,
}

impl Case {
    pub(crate) fn new() -> Self {
        let model = Model { name: "case".into(), buffers: BufferTable::default(), plans: vec![] };
        Self { model, contents: vec![], ops: vec![], count: None }
    }

    pub(crate) fn add(
        &mut self,
        role: Role,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: Vec<u8>,
    ) -> View {
        let name = format!("b{}", self.contents.len());
        let buffer = Buffer { name, role, dtype, shape: vec![rows, cols] };
        assert!(bytes.is_empty() || bytes.len() == buffer.bytes());
        let id = self.model.buffers.add(buffer).unwrap();
        self.contents.push(bytes);
        self.model.buffers.view(id)
    }

    pub(crate) fn input(&mut self, dtype: DType, rows: usize, cols: usize, bytes: Vec<u8>) -> View {
        self.add(Role::Input, dtype, rows, cols, bytes)
    }

    pub(crate) fn words(&mut self, words: &[u32]) -> View {
        let bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.input(DType::U32, 1, words.len(), bytes)
    }

    pub(crate) fn weight(
        &mut self,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: Vec<u8>,
    ) -> View {
        self.add(Role::Weight, dtype, rows, cols, bytes)
    }

    pub(crate) fn output(&mut self, dtype: DType, rows: usize, cols: usize) -> View {
        self.add(Role::Output, dtype, rows, cols, vec![])
    }

    pub(crate) fn state(
        &mut self,
        growth: Growth,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: Vec<u8>,
    ) -> View {
        let role = Role::State { kind: StateKind::Other("test".into()), growth };
        self.add(role, dtype, rows, cols, bytes)
    }

    pub(crate) fn position(&mut self, position: usize) -> View {
        let bytes = [position as u32, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        let role = Role::State { kind: StateKind::Cursor, growth: Growth::Fixed };
        self.add(role, DType::U32, 1, 4, bytes)
    }

    /// The plan's count; also for ops that want one.
    pub(crate) fn count(&mut self, count: usize) -> View {
        let view = self.words(&[count as u32]);
        self.count = Some(view.buffer);
        view
    }

    pub(crate) fn op(&mut self, op: impl Into<Op>) {
        self.ops.push(op.into());
    }

    /// Runs the ops twice over the same start; returns the contents of Outputs and State afterwards.
    pub(crate) fn run(&self, backend: &dyn Backend) -> BTreeMap<usize, Vec<u8>> {
        let mut model = self.model.clone();
        let key = |phase| ShapeKey { phase, tokens: 1, slots: 1, context: 1 };
        let fixed = model.buffers.iter().filter(|(_, b)| b.growth() == Some(Growth::Fixed));
        let fills = fixed.map(|(id, _)| Fill { out: model.buffers.view(id), bits: 0 }.into());
        let reset = Plan { key: key(Phase::Reset), count: None, ops: fills.collect() };
        let plan = Plan { key: key(Phase::Prefill), count: self.count, ops: self.ops.clone() };
        model.plans = vec![reset, plan];
        let sealed = Arc::new(model.seal().unwrap());
        let options = LoadOptions { slots: 2, capsule_bytes: 1 << 26 };
        let mut program = backend.load(sealed.clone(), self, options, &mut |_, _| ()).unwrap();
        let mut results = Vec::new();
        for _ in 0..2 {
            let slot = program.create_slot().unwrap();
            program.run(slot, 0).unwrap();
            program.poison().unwrap();
            let mut states = vec![];
            for (id, buffer) in sealed.model().buffers.iter() {
                let bytes = &self.contents[id.index()];
                match &buffer.role {
                    Role::Input => program.write_input(id, bytes).unwrap(),
                    Role::State { .. } if !bytes.is_empty() => {
                        states.push((Region { buffer: id, rows: 0..buffer.rows() }, bytes));
                    }
                    _ => {}
                }
            }
            let regions: Vec<_> = states.iter().map(|(r, _)| r.clone()).collect();
            let bytes: Vec<&[u8]> = states.iter().map(|(_, b)| b.as_slice()).collect();
            let frozen = program.freeze_bytes(&regions, &bytes).unwrap();
            program.thaw(slot, &[frozen]).unwrap();
            program.run(slot, 1).unwrap();
            results.push(self.read(program.as_mut(), slot));
        }
        assert!(results[0] == results[1], "a second run gives other bits");
        results.pop().unwrap()
    }

    fn read(
        &self,
        program: &mut dyn ampoule_backend::Program,
        slot: SlotId,
    ) -> BTreeMap<usize, Vec<u8>> {
        let mut result = BTreeMap::new();
        for (id, buffer) in self.model.buffers.iter() {
            let mut bytes = vec![0; buffer.bytes()];
            match buffer.role {
                Role::Output => program.read_output(id, 0, &mut bytes).unwrap(),
                Role::State { .. } => {
                    let region = Region { buffer: id, rows: 0..buffer.rows() };
                    program.read_state(slot, &region, &mut bytes).unwrap();
                }
                _ => continue,
            }
            result.insert(id.index(), bytes);
        }
        result
    }

    pub(crate) fn dtype(&self, index: usize) -> DType {
        let (_, buffer) = self.model.buffers.iter().nth(index).unwrap();
        buffer.dtype
    }
}

impl WeightSource for Case {
    fn random(&self, _: BufferId) -> Option<RandomFill> {
        None
    }

    fn read(&self, buffer: BufferId, offset: usize, into: &mut [u8]) -> Result<(), WeightError> {
        into.copy_from_slice(&self.contents[buffer.index()][offset..offset + into.len()]);
        Ok(())
    }
}
