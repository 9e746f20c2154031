//! The weights of a built model, buffer by buffer.

use std::sync::Arc;

use ampoule_plan::{BufferId, BufferTable, DType, RandomFill, WeightError, WeightSource};
use half::{bf16, f16};

use crate::source::WeightData;
use crate::tensors::TensorSource;

/// Contents of every Weight buffer of one model.
pub struct ModelWeights {
    table: BufferTable,
    data: Vec<Option<WeightData>>,
    tensors: Option<Arc<dyn TensorSource + Send + Sync>>,
}

impl ModelWeights {
    /// `data` is indexed by buffer; `tensors` is where its row spans lie.
    pub(crate) fn new(
        table: BufferTable,
        data: Vec<Option<WeightData>>,
        tensors: Option<Arc<dyn TensorSource + Send + Sync>>,
    ) -> Self {
        Self { table, data, tensors }
    }

    fn error(&self, buffer: BufferId, problem: &dyn std::fmt::Display) -> WeightError {
        let buffer =
            self.table.lookup(buffer).map_or_else(|| format!("#{}", buffer.0), |b| b.name.clone());
        WeightError { buffer, problem: problem.to_string() }
    }
}

impl WeightSource for ModelWeights {
    fn random(&self, buffer: BufferId) -> Option<RandomFill> {
        match self.data.get(buffer.index()) {
            Some(Some(WeightData::Random(fill))) => Some(*fill),
            _ => None,
        }
    }

    fn read(&self, buffer: BufferId, offset: usize, into: &mut [u8]) -> Result<(), WeightError> {
        let fail = |problem: &str| self.error(buffer, &problem);
        let data = self
            .data
            .get(buffer.index())
            .and_then(Option::as_ref)
            .ok_or_else(|| fail("has no contents"))?;
        let b = &self.table[buffer];
        if offset.checked_add(into.len()).is_none_or(|end| end > b.bytes()) {
            return Err(fail("is smaller than the bytes asked for"));
        }
        match data {
            WeightData::Floats(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let part = bytes
                    .get(offset..offset + into.len())
                    .ok_or_else(|| fail("has fewer values than elements"))?;
                into.copy_from_slice(part);
            }
            WeightData::Random(fill) => random_bytes(fill, b.dtype, offset, into)
                .ok_or_else(|| fail("has a type that cannot be random"))?,
            WeightData::Rows(spans) => {
                let tensors = self.tensors.as_ref().ok_or_else(|| fail("has no file behind it"))?;
                let row = b.row_bytes();
                let (mut start, mut rest) = (0, into); // bytes of the buffer before the span; bytes still to fill
                let mut offset = offset;
                for span in spans {
                    let end = start + span.rows.len() * row;
                    if offset < end && !rest.is_empty() {
                        let take = (end - offset).min(rest.len());
                        let tensor =
                            tensors.tensor(&span.tensor).map_err(|e| self.error(buffer, &e))?;
                        let from = span.rows.start * row + (offset - start);
                        let bytes = tensor
                            .bytes
                            .get(from..from + take)
                            .ok_or_else(|| fail("has fewer rows in its file"))?;
                        let (now, later) = rest.split_at_mut(take);
                        now.copy_from_slice(bytes);
                        (rest, offset) = (later, offset + take);
                    }
                    start = end;
                }
                if !rest.is_empty() {
                    return Err(fail("has fewer rows in its file"));
                }
            }
        }
        Ok(())
    }
}

/// `None` where the type is no plain real one, or the range cuts an element.
fn random_bytes(fill: &RandomFill, dtype: DType, offset: usize, into: &mut [u8]) -> Option<()> {
    let size = dtype.block_bytes();
    if dtype.is_quantized()
        || !dtype.is_float()
        || !offset.is_multiple_of(size)
        || !into.len().is_multiple_of(size)
    {
        return None;
    }
    let first = (offset / size) as u64;
    for (index, element) in (first..).zip(into.chunks_exact_mut(size)) {
        let value = fill.value(index);
        match dtype {
            DType::F32 => element.copy_from_slice(&value.to_le_bytes()),
            DType::F16 => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            _ => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
    Some(())
}
