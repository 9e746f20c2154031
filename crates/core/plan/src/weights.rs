//! Where a model's weights come from.

use crate::{BufferId, RandomFill};

/// A weight's bytes cannot be supplied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("weight '{buffer}': {problem}")]
pub struct WeightError {
    /// The buffer.
    pub buffer: String,
    /// Why not.
    pub problem: String,
}

/// Where a program's weights come from.
pub trait WeightSource {
    /// A recipe, if the buffer's contents are random; a device may then make them itself, bit for bit as
    /// [`RandomFill::value`] says.
    fn random(&self, buffer: BufferId) -> Option<RandomFill>;

    /// Writes the bytes `offset..offset + into.len()` of the buffer's contents.
    ///
    /// # Errors
    /// If the source cannot supply them.
    fn read(&self, buffer: BufferId, offset: usize, into: &mut [u8]) -> Result<(), WeightError>;
}
