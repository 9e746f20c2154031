//! Which tensor plays which part: what a family tells the decoder builder.

use std::ops::Range;

use ampoule_plan::{DType, RandomFill};
use half::{bf16, f16};

use crate::error::{ModelFileError, TensorProblem, shown};
use crate::tensors::TensorSource;

/// A part that weights play in a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Token embedding `[V, H]`.
    Embedding,
    /// Norm before the head `[H]`.
    FinalNorm,
    /// Output head `[V, H]`.
    Head,
    /// Norm before the mixer `[H]`.
    InputNorm,
    /// Norm before the MLP `[H]`.
    PostNorm,
    /// Queries `[heads * head_dim, H]`, rows head by head.
    Query,
    /// Output gate of attention, as the queries.
    OutputGate,
    /// Keys `[kv_heads * head_dim, H]`.
    Key,
    /// Values `[kv_heads * head_dim, H]`.
    Value,
    /// Attention output `[H, heads * head_dim]`.
    AttentionOut,
    /// Norm of each query head `[head_dim]`.
    QueryNorm,
    /// Norm of each key head `[head_dim]`.
    KeyNorm,
    /// Queries, keys and values of the delta rule.
    DeltaQkv,
    /// Gate of the delta rule's norm.
    DeltaGate,
    /// Write strengths `[value_heads, H]`.
    DeltaBeta,
    /// Decays `[value_heads, H]`.
    DeltaDecay,
    /// Convolution `[channels, taps]`.
    Convolution,
    /// Logarithm of the decay rate `[value_heads]`.
    DecayLog,
    /// Bias of the decay `[value_heads]`.
    DecayBias,
    /// Norm of each value head `[value_dim]`.
    DeltaNorm,
    /// Delta rule output `[H, value_heads * value_dim]`.
    DeltaOut,
    /// SwiGLU gate `[I, H]`.
    MlpGate,
    /// SwiGLU up `[I, H]`.
    MlpUp,
    /// SwiGLU down `[H, I]`.
    MlpDown,
}

/// Consecutive rows of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowSpan {
    /// The tensor's name in the source.
    pub tensor: String,
    /// Its rows.
    pub rows: Range<usize>,
}

/// Contents of one weight buffer.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightData {
    /// Rows of tensors, one after another, stored as the buffer is.
    Rows(Vec<RowSpan>),
    /// Computed or converted when the model was built.
    Floats(Vec<f32>),
    /// From a recipe.
    Random(RandomFill),
}

/// A matrix as the source has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Element type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Contents.
    pub data: WeightData,
}

/// What a family supplies.
pub trait PartSource {
    /// The matrix of a part, of this shape.
    ///
    /// # Errors
    /// If it is missing or has another shape or a type that is not a real one.
    fn matrix(&self, part: Part, layer: usize, shape: [usize; 2])
    -> Result<Matrix, ModelFileError>;

    /// The vector (or small matrix, row-major) of a part as f32, of `len` elements.
    ///
    /// # Errors
    /// If it is missing or has another length or type.
    fn vector(&self, part: Part, layer: usize, len: usize) -> Result<WeightData, ModelFileError>;

    /// The bias of a projection, if the model has one.
    ///
    /// # Errors
    /// As [`PartSource::vector`].
    fn bias(
        &self,
        part: Part,
        layer: usize,
        len: usize,
    ) -> Result<Option<WeightData>, ModelFileError>;
}

/// Reads a tensor's elements as f32.
///
/// # Errors
/// If the tensor is missing, is not f32, f16 or bf16, or has not `len` elements.
pub(crate) fn floats(
    source: &dyn TensorSource,
    name: &str,
    len: usize,
) -> Result<Vec<f32>, ModelFileError> {
    let tensor = source.tensor(name)?;
    let fail = |problem| Err(tensor_error(source, name, problem));
    if tensor.shape.iter().product::<usize>() != len {
        return fail(TensorProblem::Shape { found: tensor.shape.to_vec(), expected: vec![len] });
    }
    let pairs = || tensor.bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    Ok(match tensor.dtype {
        DType::F32 => tensor
            .bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        DType::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        DType::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        other => {
            return fail(TensorProblem::ElementType {
                found: other.name().to_owned(),
                supported: "f32, f16, bf16 here",
            });
        }
    })
}

/// Checks that a tensor is a matrix of reals of this shape (dimensions of one in the middle are ignored).
///
/// # Errors
/// If it is not.
pub(crate) fn matrix_dtype(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
) -> Result<DType, ModelFileError> {
    let tensor = source.tensor(name)?;
    if tensor.shape != shape {
        let problem =
            TensorProblem::Shape { found: tensor.shape.to_vec(), expected: shape.to_vec() };
        return Err(tensor_error(source, name, problem));
    }
    if !tensor.dtype.is_float() {
        let found = tensor.dtype.name().to_owned();
        let supported = "f32, f16, bf16, q8_0, q4_0, q4_1";
        return Err(tensor_error(source, name, TensorProblem::ElementType { found, supported }));
    }
    Ok(tensor.dtype)
}

pub(crate) fn tensor_error(
    source: &dyn TensorSource,
    name: &str,
    problem: TensorProblem,
) -> ModelFileError {
    ModelFileError::Tensor { file: source.path().to_owned(), tensor: shown(name), problem }
}
