//! The GGUF model file: versions 2 and 3, little-endian.
//!
//! Source: the GGUF specification (`docs/gguf.md` of the ggml project). A file is, in order: the letters `GGUF`,
//! a `u32` version, a `u64` tensor count, a `u64` metadata count, the metadata (key, type number, value), the
//! tensor table (name, rank, dimensions innermost first, type number, offset), padding to the alignment, the data.
//!
//! The file is not trusted: counts and lengths are compared with the bytes that are left before anything is
//! allocated, and every tensor's bytes lie within the file and apart from every other tensor's once
//! [`GgufFile::open`] has returned.

mod cursor;
mod value;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ampoule_plan::DType;

use self::cursor::Cursor;
pub use self::value::{MetaArray, MetaValue};
use crate::error::{ModelFileError, TensorProblem, shown};
use crate::mapped::MappedFile;
use crate::tensors::{TensorSource, TensorView};

/// The element types that are read, with their ggml type numbers.
const ELEMENT_TYPES: [(u32, DType); 6] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (8, DType::Q8_0),
    (30, DType::BF16),
];
const SUPPORTED_TYPES: &str = "F32 (0), F16 (1), Q4_0 (2), Q4_1 (3), Q8_0 (8), BF16 (30)";

/// The alignment where the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Smallest table entry: name length, empty name, rank, one dimension, type, offset.
const SMALLEST_TENSOR: usize = 8 + 4 + 8 + 4 + 8;
/// Smallest metadata pair: key length, empty key, type, one byte.
const SMALLEST_PAIR: usize = 8 + 4 + 1;

/// Names of the types that ggml has and this reader has not, for the message.
const fn ggml_type_name(number: u32) -> &'static str {
    match number {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "not defined by GGUF",
    }
}

/// A tensor's entry in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    /// Within the file.
    range: Range<usize>,
}

/// An open GGUF file.
#[derive(Clone, Debug)]
pub struct GgufFile {
    bytes: Arc<MappedFile>,
    version: u32,
    alignment: u64,
    metadata: BTreeMap<String, MetaValue>,
    tensors: BTreeMap<String, Entry>,
}

impl GgufFile {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// [`ModelFileError`]: the file cannot be mapped, is not GGUF, is truncated or contradicts itself, or holds a
    /// tensor of an element type that is not supported (the message names the tensor and the type).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelFileError> {
        Self::parse(MappedFile::open(path)?)
    }

    /// Checks bytes that are in memory already; `name` stands for the path in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open), without the system's errors.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self, ModelFileError> {
        Self::parse(MappedFile::from_bytes(name, bytes))
    }

    fn parse(bytes: MappedFile) -> Result<Self, ModelFileError> {
        let file = bytes.path();
        let mut cursor = Cursor { file, bytes: &bytes, at: 0 };
        let found = bytes.get(..4).unwrap_or(&bytes);
        if found != b"GGUF" {
            return Err(ModelFileError::BadMagic {
                file: file.to_owned(),
                found: found.to_owned(),
            });
        }
        cursor.take(4, "the magic")?;
        let version = cursor.u32("the version")?;
        if !matches!(version, 2 | 3) {
            return Err(ModelFileError::UnsupportedVersion { file: file.to_owned(), version });
        }
        let tensor_count = cursor.u64("the tensor count")?;
        let pairs = cursor.count(SMALLEST_PAIR, "metadata pairs")?;

        let mut metadata = BTreeMap::new();
        for index in 0..pairs {
            let key = cursor.string(&format!("the key of metadata pair {index}"))?;
            let value = cursor.value(key)?;
            if metadata.insert(key.to_owned(), value).is_some() {
                return Err(ModelFileError::DuplicateKey {
                    file: file.to_owned(),
                    key: shown(key),
                });
            }
        }
        let alignment = alignment(file, &metadata)?;
        let (table, table_end) = read_table(cursor, tensor_count)?;
        let tensors = place(file, &bytes, table, table_end, alignment)?;
        Ok(Self { version, alignment, metadata, tensors, bytes: Arc::new(bytes) })
    }

    /// The format version, 2 or 3.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of tensor data, in bytes. In a mapped file the addresses of tensors are multiples of it, up
    /// to the page size.
    pub const fn alignment(&self) -> u64 {
        self.alignment
    }

    /// All metadata, in ascending order of keys.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &MetaValue)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The metadata value of a key.
    pub fn value(&self, key: &str) -> Option<&MetaValue> {
        self.metadata.get(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a MetaValue) -> Option<T>,
    ) -> Result<Option<T>, ModelFileError> {
        self.value(key)
            .map(|value| {
                read(value).ok_or_else(|| ModelFileError::KeyType {
                    file: self.path().to_owned(),
                    key: shown(key),
                    expected,
                    found: value.type_name(),
                })
            })
            .transpose()
    }

    /// The error for a needed key that is absent.
    pub fn missing(&self, key: &str) -> ModelFileError {
        ModelFileError::MissingKey { file: self.path().to_owned(), key: shown(key) }
    }

    /// The value of a key that holds an integer of any width, if the key is there.
    ///
    /// # Errors
    /// [`ModelFileError::KeyType`] when the value is negative or no integer.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, ModelFileError> {
        self.typed(key, "an integer that is not negative", MetaValue::as_unsigned)
    }

    /// The value of a key that holds a floating-point number, if the key is there.
    ///
    /// # Errors
    /// [`ModelFileError::KeyType`] when the value is of another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelFileError> {
        self.typed(key, "a floating-point number", MetaValue::as_float)
    }

    /// The value of a key that holds a truth value, if the key is there.
    ///
    /// # Errors
    /// [`ModelFileError::KeyType`] when the value is of another type.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, ModelFileError> {
        self.typed(key, "a truth value", MetaValue::as_bool)
    }

    /// The value of a key that holds a string, if the key is there.
    ///
    /// # Errors
    /// [`ModelFileError::KeyType`] when the value is of another type.
    pub fn string(&self, key: &str) -> Result<Option<&str>, ModelFileError> {
        self.typed(key, "a string", MetaValue::as_str)
    }

    /// The value of a key that holds an array of strings, if the key is there.
    ///
    /// # Errors
    /// [`ModelFileError::KeyType`] when the value is of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, ModelFileError> {
        self.typed(key, "an array of strings", MetaValue::as_strings)
    }

    /// The value of a key that holds an array of integers of any width, if the key is there.
    ///
    /// # Errors
    /// [`ModelFileError::KeyType`] when the value is of another type or an element is negative.
    pub fn unsigned_array(&self, key: &str) -> Result<Option<Vec<u64>>, ModelFileError> {
        self.typed(key, "an array of integers that are not negative", MetaValue::as_unsigned_array)
    }

    /// [`unsigned`](Self::unsigned) for a key that must be there.
    ///
    /// # Errors
    /// [`ModelFileError::MissingKey`], [`ModelFileError::KeyType`].
    pub fn require_unsigned(&self, key: &str) -> Result<u64, ModelFileError> {
        self.unsigned(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`float`](Self::float) for a key that must be there.
    ///
    /// # Errors
    /// [`ModelFileError::MissingKey`], [`ModelFileError::KeyType`].
    pub fn require_float(&self, key: &str) -> Result<f64, ModelFileError> {
        self.float(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`string`](Self::string) for a key that must be there.
    ///
    /// # Errors
    /// [`ModelFileError::MissingKey`], [`ModelFileError::KeyType`].
    pub fn require_string(&self, key: &str) -> Result<&str, ModelFileError> {
        self.string(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`strings`](Self::strings) for a key that must be there.
    ///
    /// # Errors
    /// [`ModelFileError::MissingKey`], [`ModelFileError::KeyType`].
    pub fn require_strings(&self, key: &str) -> Result<&[String], ModelFileError> {
        self.strings(key)?.ok_or_else(|| self.missing(key))
    }
}

impl TensorSource for GgufFile {
    fn path(&self) -> &Path {
        self.bytes.path()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        let bytes = self.bytes.get(entry.range.clone())?;
        Some(TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes })
    }
}

fn alignment(file: &Path, metadata: &BTreeMap<String, MetaValue>) -> Result<u64, ModelFileError> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_unsigned() {
        Some(alignment) if alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment) => {
            Ok(alignment)
        }
        _ => Err(ModelFileError::KeyValue {
            file: file.to_owned(),
            key: KEY.to_owned(),
            reason: "the alignment must be a power of two from 8 to 1048576".to_owned(),
        }),
    }
}

/// One row of the tensor table, types and shape checked, not yet placed.
struct Row<'a> {
    name: &'a str,
    dtype: DType,
    shape: Vec<usize>,
    offset: u64,
    length: usize,
}

fn tensor_error(file: &Path, name: &str, problem: TensorProblem) -> ModelFileError {
    ModelFileError::Tensor { file: file.to_owned(), tensor: shown(name), problem }
}

fn read_table(mut cursor: Cursor<'_>, count: u64) -> Result<(Vec<Row<'_>>, usize), ModelFileError> {
    let available = cursor.remaining();
    let limit = available / SMALLEST_TENSOR;
    let count = match usize::try_from(count) {
        Ok(count) if count <= limit => count,
        _ => {
            return Err(ModelFileError::CountTooLarge {
                file: cursor.file.to_owned(),
                what: "tensors".to_owned(),
                count,
                limit: limit as u64,
                available: available as u64,
            });
        }
    };
    let mut rows = Vec::with_capacity(count);
    for index in 0..count {
        let name = cursor.string(&format!("the name of tensor {index}"))?;
        let what = format!("the table entry of tensor '{}'", shown(name));
        let rank = cursor.u32(&what)?;
        if !(1..=4).contains(&rank) {
            return Err(tensor_error(cursor.file, name, TensorProblem::Rank { rank: rank.into() }));
        }
        // The file has the innermost dimension first.
        let mut shape = vec![0; rank as usize];
        for dim in shape.iter_mut().rev() {
            *dim = cursor.u64(&what)?;
        }
        let type_number = cursor.u32(&what)?;
        let offset = cursor.u64(&what)?;
        let Some(&(_, dtype)) = ELEMENT_TYPES.iter().find(|(number, _)| *number == type_number)
        else {
            let found = format!("{type_number} ({})", ggml_type_name(type_number));
            let problem = TensorProblem::ElementType { found, supported: SUPPORTED_TYPES };
            return Err(tensor_error(cursor.file, name, problem));
        };
        let (shape, length) = check_shape(dtype, shape)
            .map_err(|problem| tensor_error(cursor.file, name, problem))?;
        rows.push(Row { name, dtype, shape, offset, length });
    }
    Ok((rows, cursor.at))
}

/// The shape in `usize` and the byte count of a tensor, or what is wrong with the shape.
pub(crate) fn check_shape(
    dtype: DType,
    shape: Vec<u64>,
) -> Result<(Vec<usize>, usize), TensorProblem> {
    if shape.contains(&0) {
        return Err(TensorProblem::Empty { shape });
    }
    let narrow: Option<Vec<usize>> = shape.iter().map(|&dim| dim.try_into().ok()).collect();
    let Some(narrow) = narrow else { return Err(TensorProblem::Overflow { shape }) };
    let row = narrow.last().copied().unwrap_or(1);
    let block = dtype.block_elements();
    if !row.is_multiple_of(block) {
        return Err(TensorProblem::PartialBlock { row, dtype, block });
    }
    let elements = narrow.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
    match elements.and_then(|elements| dtype.bytes_for(elements)) {
        Some(length) => Ok((narrow, length)),
        None => Err(TensorProblem::Overflow { shape }),
    }
}

/// Turns offsets into ranges of the file, and checks that these lie within it and apart from each other.
fn place(
    file: &Path,
    bytes: &[u8],
    rows: Vec<Row<'_>>,
    table_end: usize,
    alignment: u64,
) -> Result<BTreeMap<String, Entry>, ModelFileError> {
    // A file without tensors may end at its table, before the padding.
    let data_start = (table_end as u64).next_multiple_of(alignment).min(bytes.len() as u64);
    let available = bytes.len() as u64 - data_start;
    let mut tensors = BTreeMap::new();
    let mut order: Vec<(Range<usize>, &str)> = Vec::with_capacity(rows.len());
    for row in rows {
        let error = |problem| tensor_error(file, row.name, problem);
        if !row.offset.is_multiple_of(alignment) {
            return Err(error(TensorProblem::Misaligned { offset: row.offset, alignment }));
        }
        let length = row.length as u64;
        if row.offset.checked_add(length).is_none_or(|end| end > available) {
            return Err(error(TensorProblem::OutOfFile { offset: row.offset, length, available }));
        }
        // Both fit in the file, so they fit in usize.
        let start = (data_start + row.offset) as usize;
        let range = start..start + row.length;
        order.push((range.clone(), row.name));
        let entry = Entry { dtype: row.dtype, shape: row.shape, range };
        if tensors.insert(row.name.to_owned(), entry).is_some() {
            return Err(tensor_error(file, row.name, TensorProblem::Duplicate));
        }
    }
    order.sort_unstable_by_key(|(range, _)| (range.start, range.end));
    for pair in order.windows(2) {
        if let [(first, other), (second, name)] = pair
            && second.start < first.end
        {
            return Err(tensor_error(file, name, TensorProblem::Overlap { other: shown(other) }));
        }
    }
    Ok(tensors)
}
