//! A Hugging Face model folder: `config.json` and safetensors.
//!
//! Source: the safetensors format (a `u64` header length, a JSON header of name, type, shape and byte range, the
//! data) and the layout of the folders that `transformers` saves: one `model.safetensors`, or
//! `model.safetensors.index.json` with a `weight_map` from tensor names to shard files.
//!
//! The header entries have the types of the `safetensors` crate; the checks are ours. The crate's own reader
//! keeps the last of two entries of one name, and most of its messages do not say which tensor is at fault.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ampoule_plan::DType;
use safetensors::Dtype as FileDtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::error::{ModelFileError, TensorProblem, shown};
use crate::gguf::check_shape;
use crate::mapped::MappedFile;
use crate::tensors::{TensorSource, TensorView};

/// Name of the configuration within the folder.
const CONFIG: &str = "config.json";
/// Name of the weights where they are one file.
const SINGLE: &str = "model.safetensors";
/// Name of the shard index.
const INDEX: &str = "model.safetensors.index.json";

/// Largest `config.json`, in bytes.
const CONFIG_LIMIT: u64 = 16 << 20;
/// Largest shard index, in bytes.
const INDEX_LIMIT: u64 = 64 << 20;
/// Largest safetensors header, in bytes: the format's own limit.
const HEADER_LIMIT: u64 = 100_000_000;

const SUPPORTED_TYPES: &str = "F32, F16, BF16, I32, U32, U8";

#[derive(Clone, Debug)]
struct Entry {
    shard: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// Within the shard.
    range: Range<usize>,
}

/// An open Hugging Face model folder.
#[derive(Clone, Debug)]
pub struct WeightsDir {
    path: PathBuf,
    config: Arc<Value>,
    shards: Vec<Arc<MappedFile>>,
    tensors: BTreeMap<String, Entry>,
}

/// The files of a model folder, for bytes that are in memory already.
#[derive(Clone, Debug, Default)]
pub struct WeightsParts {
    /// `config.json`.
    pub config: Vec<u8>,
    /// `model.safetensors.index.json`, unless there is one weights file only.
    pub index: Option<Vec<u8>>,
    /// Weights files by name; `model.safetensors` where there is no index.
    pub files: Vec<(String, Cow<'static, [u8]>)>,
}

impl WeightsDir {
    /// Opens a folder, maps its weights and checks them.
    ///
    /// `model.safetensors` is used where it is there, else the shards that the index lists.
    ///
    /// # Errors
    /// [`ModelFileError`]: a file is missing, too large, truncated or contradicts itself, index and shards do not
    /// agree, or a tensor's element type is not supported (the message names the tensor and the type).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelFileError> {
        let path = path.as_ref();
        let config = read_bounded(&path.join(CONFIG), CONFIG_LIMIT)?;
        let single = path.join(SINGLE);
        let index = if single.exists() {
            None
        } else {
            Some(read_bounded(&path.join(INDEX), INDEX_LIMIT)?)
        };
        Self::build(path, &config, index.as_deref(), |name| MappedFile::open(path.join(name)))
    }

    /// Checks files that are in memory already; `name` stands for the folder in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open), without the system's errors.
    pub fn from_parts(
        name: impl Into<PathBuf>,
        parts: WeightsParts,
    ) -> Result<Self, ModelFileError> {
        let name = name.into();
        let WeightsParts { config, index, mut files } = parts;
        Self::build(&name, &config, index.as_deref(), |wanted| {
            let file = name.join(wanted);
            match files.iter_mut().find(|(have, _)| have == wanted) {
                Some((_, bytes)) => Ok(MappedFile::from_bytes(file, std::mem::take(bytes))),
                None => Err(ModelFileError::Io {
                    file,
                    action: "open",
                    source: std::io::ErrorKind::NotFound.into(),
                }),
            }
        })
    }

    fn build(
        path: &Path,
        config: &[u8],
        index: Option<&[u8]>,
        mut open: impl FnMut(&str) -> Result<MappedFile, ModelFileError>,
    ) -> Result<Self, ModelFileError> {
        let config = parse_json(&path.join(CONFIG), "the configuration", config)?;
        let mut out = Self {
            path: path.to_owned(),
            config: Arc::new(config),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        match index {
            None => out.add_shard(open(SINGLE)?)?,
            Some(index) => {
                let file = path.join(INDEX);
                let map = parse_index(&file, index)?;
                let mut shards: Vec<&str> = map.values().map(String::as_str).collect();
                shards.sort_unstable();
                shards.dedup();
                for shard in &shards {
                    out.add_shard(open(shard)?)?;
                }
                out.agree(&file, &map, &shards)?;
            }
        }
        Ok(out)
    }

    /// The parsed `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    fn add_shard(&mut self, bytes: MappedFile) -> Result<(), ModelFileError> {
        let shard = self.shards.len();
        let entries = read_header(&bytes)?;
        let file = bytes.path().to_owned();
        self.shards.push(Arc::new(bytes));
        for (name, (dtype, shape, range)) in entries {
            if self.tensors.contains_key(&name) {
                return Err(tensor_error(&file, &name, TensorProblem::Duplicate));
            }
            self.tensors.insert(name, Entry { shard, dtype, shape, range });
        }
        Ok(())
    }

    /// Index and shards must tell the same: otherwise they are of different revisions.
    fn agree(
        &self,
        file: &Path,
        map: &BTreeMap<String, String>,
        shards: &[&str],
    ) -> Result<(), ModelFileError> {
        for (name, shard) in map {
            let held = self.tensors.get(name).and_then(|entry| shards.get(entry.shard));
            if held != Some(&shard.as_str()) {
                return Err(tensor_error(
                    file,
                    name,
                    TensorProblem::NotInShard { shard: shown(shard) },
                ));
            }
        }
        for (name, entry) in &self.tensors {
            if !map.contains_key(name) {
                let shard = shards.get(entry.shard).copied().unwrap_or_default();
                return Err(tensor_error(
                    file,
                    name,
                    TensorProblem::NotInIndex { shard: shown(shard) },
                ));
            }
        }
        Ok(())
    }
}

impl TensorSource for WeightsDir {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        let bytes = self.shards.get(entry.shard)?.get(entry.range.clone())?;
        Some(TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes })
    }
}

fn tensor_error(file: &Path, name: &str, problem: TensorProblem) -> ModelFileError {
    ModelFileError::Tensor { file: file.to_owned(), tensor: shown(name), problem }
}

fn malformed(file: &Path, what: &'static str, reason: String) -> ModelFileError {
    ModelFileError::Malformed { file: file.to_owned(), what, reason }
}

/// A parser's message, which may repeat text of the file.
fn unparsed(file: &Path, what: &'static str, error: &serde_json::Error) -> ModelFileError {
    malformed(file, what, shown(&error.to_string()))
}

/// Reads a small file whole.
pub(crate) fn read_bounded(file: &Path, limit: u64) -> Result<Vec<u8>, ModelFileError> {
    let bytes = MappedFile::open(file)?;
    let len = bytes.len() as u64;
    if len > limit {
        return Err(ModelFileError::TooLarge { file: file.to_owned(), len, limit });
    }
    Ok(bytes.to_vec())
}

pub(crate) fn parse_json(
    file: &Path,
    what: &'static str,
    bytes: &[u8],
) -> Result<Value, ModelFileError> {
    serde_json::from_slice(bytes).map_err(|error| unparsed(file, what, &error))
}

/// The weight map of an index, shard names checked.
fn parse_index(file: &Path, bytes: &[u8]) -> Result<BTreeMap<String, String>, ModelFileError> {
    const WHAT: &str = "the shard index";
    #[derive(Deserialize)]
    struct Index {
        weight_map: Pairs<String>,
    }
    let index: Index =
        serde_json::from_slice(bytes).map_err(|error| unparsed(file, WHAT, &error))?;
    let mut map = BTreeMap::new();
    for (name, shard) in index.weight_map.0 {
        if !is_plain_name(&shard) {
            return Err(ModelFileError::ShardName { file: file.to_owned(), shard: shown(&shard) });
        }
        if map.contains_key(&name) {
            return Err(tensor_error(file, &name, TensorProblem::Duplicate));
        }
        map.insert(name, shard);
    }
    Ok(map)
}

/// Whether `name` is one component, on every system, and stays in its folder.
fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}

/// A JSON object as its pairs in order, repeated keys included.
struct Pairs<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Reader(std::marker::PhantomData))
    }
}

type Placed = (DType, Vec<usize>, Range<usize>);

/// Reads and checks a safetensors header: every range within the file, none overlapping, lengths as the shapes say.
fn read_header(bytes: &MappedFile) -> Result<BTreeMap<String, Placed>, ModelFileError> {
    const WHAT: &str = "the safetensors header";
    let file = bytes.path();
    let truncated =
        |what: &str, offset: u64, needed: u64, available: u64| ModelFileError::Truncated {
            file: file.to_owned(),
            what: what.to_owned(),
            offset,
            needed,
            available,
        };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(truncated("the length of the safetensors header", 0, 8, bytes.len() as u64));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_LIMIT {
        let reason = format!(
            "declares {length} bytes, more than the {HEADER_LIMIT} that the format allows; is this a safetensors file?"
        );
        return Err(malformed(file, WHAT, reason));
    }
    // At most HEADER_LIMIT, so it fits in usize.
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(truncated(WHAT, 8, length, rest.len() as u64));
    };
    let pairs: Pairs<Value> =
        serde_json::from_slice(header).map_err(|error| unparsed(file, WHAT, &error))?;

    let mut tensors: BTreeMap<String, Placed> = BTreeMap::new();
    let data_start = bytes.len() - data.len();
    let mut order = Vec::with_capacity(pairs.0.len());
    for (name, value) in pairs.0 {
        if name == "__metadata__" {
            continue;
        }
        let (dtype, shape, within) =
            check_entry(value, data.len()).map_err(|problem| tensor_error(file, &name, problem))?;
        if tensors.contains_key(&name) {
            return Err(tensor_error(file, &name, TensorProblem::Duplicate));
        }
        let range = data_start + within.start..data_start + within.end;
        order.push((range.clone(), name.clone()));
        tensors.insert(name, (dtype, shape, range));
    }
    order.sort_unstable_by_key(|(range, _)| (range.start, range.end));
    let mut end = data_start;
    for pair in order.windows(2) {
        if let [(first, other), (second, name)] = pair
            && second.start < first.end
        {
            return Err(tensor_error(file, name, TensorProblem::Overlap { other: shown(other) }));
        }
    }
    // The format wants every byte of the data to belong to a tensor: no holes, nothing behind the last.
    for (range, name) in &order {
        if range.start != end {
            let reason = format!(
                "{} bytes before tensor '{}' belong to no tensor",
                range.start - end,
                shown(name)
            );
            return Err(malformed(file, WHAT, reason));
        }
        end = range.end;
    }
    if end != bytes.len() {
        let reason =
            format!("{} bytes behind the last tensor belong to no tensor", bytes.len() - end);
        return Err(malformed(file, WHAT, reason));
    }
    Ok(tensors)
}

/// Checks one header entry against a data section of `available` bytes.
fn check_entry(value: Value, available: usize) -> Result<Placed, TensorProblem> {
    let entry = |reason: String| TensorProblem::Entry { reason: shown(&reason) };
    let info: TensorInfo =
        serde_json::from_value(value).map_err(|error| entry(error.to_string()))?;
    let dtype = match info.dtype {
        FileDtype::F32 => DType::F32,
        FileDtype::F16 => DType::F16,
        FileDtype::BF16 => DType::BF16,
        FileDtype::I32 => DType::I32,
        FileDtype::U32 => DType::U32,
        FileDtype::U8 => DType::U8,
        other => {
            return Err(TensorProblem::ElementType {
                found: format!("{other:?}"),
                supported: SUPPORTED_TYPES,
            });
        }
    };
    let declared: Vec<u64> = info.shape.iter().map(|&dim| dim as u64).collect();
    let (shape, needed) = check_shape(dtype, declared.clone())?;
    let (start, end) = info.data_offsets;
    let Some(length) = end.checked_sub(start) else {
        return Err(entry(format!("data_offsets [{start}, {end}] run backwards")));
    };
    if length != needed {
        return Err(TensorProblem::Length {
            found: length as u64,
            shape: declared,
            dtype,
            needed: needed as u64,
        });
    }
    if end > available {
        return Err(TensorProblem::OutOfFile {
            offset: start as u64,
            length: length as u64,
            available: available as u64,
        });
    }
    Ok((dtype, shape, start..end))
}
