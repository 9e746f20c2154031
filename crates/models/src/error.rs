//! Errors of the model file readers.

use std::path::PathBuf;

use ampoule_plan::DType;

/// Longest piece of untrusted text that an error message repeats, in characters.
const SHOWN: usize = 96;

/// Text from a file, escaped and cut so that a hostile file cannot flood a log or forge its lines.
pub(crate) fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        out.push_str("...");
    }
    out
}

/// A model file could not be read, or says something that cannot be true.
///
/// Every message names the file, and the tensor or metadata key where there is one, and says what to do
/// when the cause is not simply a damaged file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelFileError {
    /// The operating system refused.
    #[error("{file}: cannot {action}: {source}", file = file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// What was being done, as an infinitive: "open", "map".
        action: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The path is a folder, a device or a pipe where a regular file is needed.
    #[error("{file}: not a regular file; give the path of a model file, or of a Hugging Face model folder", file = file.display())]
    NotAFile {
        /// The path.
        file: PathBuf,
    },
    /// The file does not begin with `GGUF`.
    #[error("{file}: not a GGUF file (it begins with {found:02x?}); GGUF files begin with the letters GGUF", file = file.display())]
    BadMagic {
        /// The file.
        file: PathBuf,
        /// Its first bytes, four at most.
        found: Vec<u8>,
    },
    /// The GGUF version is not one that is read here.
    #[error("{file}: GGUF version {version} is not supported{hint}; versions 2 and 3, little-endian, are",
            file = file.display(), hint = if *version > 0xffff && version.swap_bytes() <= 0xff { " (the file is big-endian)" } else { "" })]
    UnsupportedVersion {
        /// The file.
        file: PathBuf,
        /// The version field, read as little-endian.
        version: u32,
    },
    /// The file ends in the middle of something.
    #[error("{file}: ends within {what}: {needed} bytes needed at byte {offset}, {available} left; the file is truncated, fetch it again",
            file = file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// What was being read.
        what: String,
        /// Where, in bytes from the start of the file.
        offset: u64,
        /// Bytes that the item needs.
        needed: u64,
        /// Bytes that the file still has.
        available: u64,
    },
    /// A count is larger than the rest of the file could hold.
    #[error("{file}: declares {count} {what}, but its remaining {available} bytes hold {limit} at most; the file is damaged",
            file = file.display())]
    CountTooLarge {
        /// The file.
        file: PathBuf,
        /// What is counted.
        what: String,
        /// The declared count.
        count: u64,
        /// The largest count possible.
        limit: u64,
        /// Bytes left in the file.
        available: u64,
    },
    /// A text is not UTF-8.
    #[error("{file}: {what} at byte {offset} is not UTF-8; the file is damaged", file = file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// What was being read.
        what: String,
        /// Where the text starts, in bytes from the start of the file.
        offset: u64,
    },
    /// A metadata key occurs twice.
    #[error("{file}: metadata key '{key}' occurs twice", file = file.display())]
    DuplicateKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value has a type number that GGUF does not define, or an array of arrays.
    #[error("{file}: metadata key '{key}' has value type {type_number}, which is not readable here; GGUF types 0 to 12 are, arrays of arrays are not",
            file = file.display())]
    MetadataType {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// The type number.
        type_number: u32,
    },
    /// A needed metadata key is absent.
    #[error("{file}: metadata key '{key}' is missing; convert the model again with a current converter", file = file.display())]
    MissingKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata key holds another type than it must.
    #[error("{file}: metadata key '{key}' holds {found} where {expected} is needed", file = file.display())]
    KeyType {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is needed.
        expected: &'static str,
        /// What the file holds.
        found: &'static str,
    },
    /// A metadata key holds a value that makes no sense.
    #[error("{file}: metadata key '{key}': {reason}", file = file.display())]
    KeyValue {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A JSON or safetensors header does not parse.
    #[error("{file}: {what}: {reason}", file = file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The part of the file.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A file is larger than anything legitimate of its kind.
    #[error("{file}: {len} bytes, more than the {limit} that such a file may have", file = file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The shard index names a file outside its folder.
    #[error("{file}: shard name '{shard}' is refused: it must be a plain file name within the model folder", file = file.display())]
    ShardName {
        /// The index file.
        file: PathBuf,
        /// The name, escaped.
        shard: String,
    },
    /// Something is wrong with one tensor.
    #[error("{file}: tensor '{tensor}' {problem}", file = file.display())]
    Tensor {
        /// The file.
        file: PathBuf,
        /// The tensor's name, escaped.
        tensor: String,
        /// What is wrong.
        problem: TensorProblem,
    },
}

/// What is wrong with a tensor; completes the sentence "tensor 'x' ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// No tensor has this name.
    #[error(
        "is missing (the file holds {tensors} tensors); check that the file is of the architecture that it claims"
    )]
    Missing {
        /// Tensors in the file.
        tensors: usize,
    },
    /// Two tensors have this name.
    #[error("occurs twice")]
    Duplicate,
    /// The number of dimensions is out of range.
    #[error("has {rank} dimensions; 1 to 4 are possible")]
    Rank {
        /// Dimensions declared.
        rank: u64,
    },
    /// A dimension is zero.
    #[error("has a dimension of zero elements: shape {shape:?}")]
    Empty {
        /// The shape, outermost first.
        shape: Vec<u64>,
    },
    /// The element type cannot be used.
    #[error("has element type {found}, which is not supported; supported are {supported}")]
    ElementType {
        /// The type as the file names it.
        found: String,
        /// The supported types.
        supported: &'static str,
    },
    /// A row of a block type does not fill whole blocks.
    #[error("has rows of {row} elements, not a multiple of the {block} that a {dtype} block holds")]
    PartialBlock {
        /// Elements of one row.
        row: usize,
        /// The element type.
        dtype: DType,
        /// Elements of one block.
        block: usize,
    },
    /// The size does not fit in memory arithmetic.
    #[error("has a size that overflows: shape {shape:?}")]
    Overflow {
        /// The shape, outermost first.
        shape: Vec<u64>,
    },
    /// The shape is not what the configuration asks for.
    #[error(
        "has shape {found:?}, but the configuration asks for {expected:?}; check that weights and configuration belong together"
    )]
    Shape {
        /// The shape, outermost first.
        found: Vec<usize>,
        /// What the configuration asks for.
        expected: Vec<usize>,
    },
    /// The offset is not a multiple of the file's alignment.
    #[error("starts at data offset {offset}, not a multiple of the alignment {alignment}")]
    Misaligned {
        /// Offset within the data section, in bytes.
        offset: u64,
        /// The file's alignment, in bytes.
        alignment: u64,
    },
    /// The bytes lie outside the file.
    #[error(
        "needs {length} bytes at data offset {offset}, but the file's data section has {available}; the file is truncated, fetch it again"
    )]
    OutOfFile {
        /// Offset within the data section, in bytes.
        offset: u64,
        /// Bytes needed.
        length: u64,
        /// Bytes in the data section.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("overlaps tensor '{other}'")]
    Overlap {
        /// The other tensor, escaped.
        other: String,
    },
    /// The declared byte range and the shape disagree.
    #[error("has {found} bytes, but shape {shape:?} of {dtype} needs {needed}")]
    Length {
        /// The declared byte count.
        found: u64,
        /// The shape, outermost first.
        shape: Vec<u64>,
        /// The element type.
        dtype: DType,
        /// Bytes that the shape needs.
        needed: u64,
    },
    /// The header entry does not parse.
    #[error("has an unreadable header entry: {reason}")]
    Entry {
        /// What is wrong.
        reason: String,
    },
    /// The index places the tensor in a shard that does not hold it.
    #[error(
        "is listed in the index as part of '{shard}', which does not hold it; fetch index and shards of one revision"
    )]
    NotInShard {
        /// The shard's file name.
        shard: String,
    },
    /// A shard holds a tensor that the index does not place there.
    #[error(
        "is in shard '{shard}', where the index does not list it; fetch index and shards of one revision"
    )]
    NotInIndex {
        /// The shard's file name.
        shard: String,
    },
}
