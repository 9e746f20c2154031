//! Named tensors of a model file, whatever its format.

use std::path::Path;

use ampoule_plan::DType;

use crate::error::{ModelFileError, TensorProblem, shown};

/// One tensor of a model file. Nothing is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// The element type.
    pub dtype: DType,
    /// The shape, outermost dimension first (row-major).
    pub shape: &'a [usize],
    /// Exactly the bytes that `dtype` and `shape` need, little-endian. The address may be odd.
    pub bytes: &'a [u8],
}

/// A set of named tensors: a GGUF file or a Hugging Face folder.
pub trait TensorSource {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// All names, in ascending byte order.
    fn names(&self) -> Vec<&str>;

    /// The tensor of this name, if there is one.
    fn find(&self, name: &str) -> Option<TensorView<'_>>;

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`ModelFileError::Tensor`] with [`TensorProblem::Missing`] when there is none.
    fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelFileError> {
        self.find(name).ok_or_else(|| ModelFileError::Tensor {
            file: self.path().to_owned(),
            tensor: shown(name),
            problem: TensorProblem::Missing { tensors: self.names().len() },
        })
    }

    /// BLAKE3 over names, element types, shapes and payloads, in ascending order of names.
    ///
    /// It is a digest of the content: the path, the order in the file, the division into shards, padding and
    /// metadata do not enter. The hashed text is `ampoule.weights.v1`, a zero byte, the tensor count, then for
    /// each tensor its name and the name of its type (each preceded by its length), its rank, its dimensions
    /// outermost first, its byte count, its bytes; every number a little-endian `u64`.
    fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let number = |hasher: &mut blake3::Hasher, n: usize| {
            hasher.update(&(n as u64).to_le_bytes());
        };
        hasher.update(b"ampoule.weights.v1\0");
        let views: Vec<_> = self.names().into_iter().filter_map(|name| self.find(name)).collect();
        number(&mut hasher, views.len());
        for view in views {
            for text in [view.name, view.dtype.name()] {
                number(&mut hasher, text.len());
                hasher.update(text.as_bytes());
            }
            number(&mut hasher, view.shape.len());
            for &dim in view.shape {
                number(&mut hasher, dim);
            }
            number(&mut hasher, view.bytes.len());
            hasher.update(view.bytes);
        }
        *hasher.finalize().as_bytes()
    }
}
