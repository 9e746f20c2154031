//! Named static buffers, their roles, and rectangular views of them.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::DType;

/// What a State buffer carries from one replay to the next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StateKind {
    /// Attention keys or values, one row per position.
    KvCache,
    /// The matrix state of a recurrent layer.
    Recurrent,
    /// The last inputs of a causal convolution.
    Conv,
    /// State of a draft (multi-token prediction) head.
    Draft,
    /// Logits, parameters, seed and counts of the sampler.
    Sampler,
    /// The position.
    Cursor,
    /// A kind of the model's own.
    Other(String),
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KvCache => "kv_cache",
            Self::Recurrent => "recurrent",
            Self::Conv => "conv",
            Self::Draft => "draft",
            Self::Sampler => "sampler",
            Self::Cursor => "cursor",
            Self::Other(name) => name,
        })
    }
}

impl FromStr for StateKind {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "kv_cache" => Self::KvCache,
            "recurrent" => Self::Recurrent,
            "conv" => Self::Conv,
            "draft" => Self::Draft,
            "sampler" => Self::Sampler,
            "cursor" => Self::Cursor,
            other => Self::Other(other.to_owned()),
        })
    }
}

/// How a State buffer fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Growth {
    /// The whole buffer is state at every position.
    Fixed,
    /// One row per position, append-only along a branch: at position `p` the state is rows `0..p`.
    Rows,
}

/// What a buffer is for. The seal holds every plan to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Parameters; no op writes them.
    Weight,
    /// Written by the host before a replay; no op writes it.
    Input,
    /// Written by the replay, read by the host afterwards.
    Output,
    /// Written before it is read within one replay; meaningless between replays.
    Scratch,
    /// Carried from one replay to the next, and therefore part of every capsule.
    State {
        /// What it carries.
        kind: StateKind,
        /// How it fills.
        growth: Growth,
    },
}

impl Role {
    /// Whether the role is State.
    pub const fn is_state(&self) -> bool {
        matches!(self, Self::State { .. })
    }
}

/// A named, statically allocated, contiguous, row-major memory region.
///
/// `shape[0]` is the number of rows and the product of the rest the number of columns; a one-dimensional shape
/// `[n]` is one row of `n` columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Unique name: `[A-Za-z0-9_.]+`.
    pub name: String,
    /// What the buffer is for.
    pub role: Role,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first; none is zero.
    pub shape: Vec<usize>,
}

impl Buffer {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape[0] }
    }

    /// Elements in one row.
    pub fn cols(&self) -> usize {
        if self.shape.len() < 2 {
            self.shape.first().copied().unwrap_or(1)
        } else {
            self.shape[1..].iter().product()
        }
    }

    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.dtype.bytes_for(self.cols()).expect("checked when the buffer was added")
    }

    /// Bytes of the whole buffer.
    pub fn bytes(&self) -> usize {
        self.row_bytes() * self.rows()
    }

    /// How the buffer fills, if it is State.
    pub const fn growth(&self) -> Option<Growth> {
        match self.role {
            Role::State { growth, .. } => Some(growth),
            _ => None,
        }
    }
}

/// The index of a buffer in its [`BufferTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u32);

impl BufferId {
    /// The index as a `usize`.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A rectangle of a buffer: some rows, and of each the same columns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// The buffer.
    pub buffer: BufferId,
    /// Rows covered.
    pub rows: Range<usize>,
    /// Columns covered, in elements.
    pub cols: Range<usize>,
}

impl View {
    /// The same rows, and of the columns `start..start + width` counted from this view's first.
    ///
    /// # Panics
    /// If the columns reach past this view.
    #[must_use]
    pub fn columns(&self, start: usize, width: usize) -> Self {
        let first = self.cols.start + start;
        assert!(
            first + width <= self.cols.end,
            "columns {start}+{width} reach past a view of {}",
            self.width()
        );
        Self { cols: first..first + width, ..self.clone() }
    }

    /// The first `count` rows.
    ///
    /// # Panics
    /// If the view has fewer.
    #[must_use]
    pub fn first_rows(&self, count: usize) -> Self {
        assert!(count <= self.height(), "{count} rows of a view of {}", self.height());
        Self { rows: self.rows.start..self.rows.start + count, ..self.clone() }
    }

    /// Number of rows.
    pub fn height(&self) -> usize {
        self.rows.end - self.rows.start
    }

    /// Number of columns.
    pub fn width(&self) -> usize {
        self.cols.end - self.cols.start
    }
}

/// A buffer cannot be added to a table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The name could not be told from other words of the text form.
    #[error(
        "name '{0}' must start with a letter, hold only letters, digits, '_' and '.', and be no attribute's value"
    )]
    Name(String),
    /// The name is taken.
    #[error("buffer '{0}' is declared twice")]
    Duplicate(String),
    /// A dimension is zero, there are none, the row does not fill whole quantised blocks, or the size overflows.
    #[error("buffer '{name}' cannot have shape {shape:?} with elements of {dtype}")]
    Shape {
        /// The buffer.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its element type.
        dtype: DType,
    },
}

/// The buffers of a model, in order of declaration, with unique names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BufferTable {
    buffers: Vec<Buffer>,
    by_name: HashMap<String, BufferId>,
}

impl BufferTable {
    /// Adds a buffer.
    ///
    /// # Errors
    /// If its name is taken or malformed, or its shape impossible.
    pub fn add(&mut self, buffer: Buffer) -> Result<BufferId, TableError> {
        let name = &buffer.name;
        if !is_name(name) {
            return Err(TableError::Name(name.clone()));
        }
        if let Role::State { kind: StateKind::Other(kind), .. } = &buffer.role
            && !is_name(kind)
        {
            return Err(TableError::Name(kind.clone()));
        }
        let wrong = || TableError::Shape {
            name: name.clone(),
            shape: buffer.shape.clone(),
            dtype: buffer.dtype,
        };
        if buffer.shape.is_empty() || buffer.shape.contains(&0) {
            return Err(wrong());
        }
        let elements =
            buffer.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d)).ok_or_else(wrong)?;
        let bytes = buffer.dtype.bytes_for(elements).ok_or_else(wrong)?;
        if isize::try_from(bytes).is_err() || buffer.dtype.bytes_for(buffer.cols()).is_none() {
            return Err(wrong());
        }
        let id = BufferId(u32::try_from(self.buffers.len()).map_err(|_| wrong())?);
        if self.by_name.insert(name.clone(), id).is_some() {
            return Err(TableError::Duplicate(name.clone()));
        }
        self.buffers.push(buffer);
        Ok(id)
    }

    /// The id of the buffer with this name.
    pub fn find(&self, name: &str) -> Option<BufferId> {
        self.by_name.get(name).copied()
    }

    /// The buffer, or `None` if the id is of another table.
    pub fn lookup(&self, id: BufferId) -> Option<&Buffer> {
        self.buffers.get(id.index())
    }

    /// All buffers with their ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BufferId, &Buffer)> {
        self.buffers.iter().enumerate().map(|(i, b)| (BufferId(i as u32), b))
    }

    /// Number of buffers.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// A view of the whole buffer.
    pub fn view(&self, id: BufferId) -> View {
        let b = &self[id];
        View { buffer: id, rows: 0..b.rows(), cols: 0..b.cols() }
    }
}

/// Whether the text form can hold the name and tell it from an attribute's value.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
        && !["true", "false", "half", "interleaved", "inf", "nan", "NaN"].contains(&name)
}

impl std::ops::Index<BufferId> for BufferTable {
    type Output = Buffer;

    fn index(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.index()]
    }
}
