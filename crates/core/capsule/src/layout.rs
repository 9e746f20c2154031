//! The state tensors of a model, and how many bytes of each a capsule holds.

use std::fmt;

use ampoule_plan::DType;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Digest;

/// The reserved tensor name under which a capsule file keeps its tokens.
pub const TOKENS: &str = "tokens";
/// Dimensions that a state tensor may have at most.
pub const MAX_RANK: usize = 8;
/// State tensors that a layout may have at most.
pub const MAX_TENSORS: usize = 4096;
/// UTF-8 bytes of a tensor name at most.
pub const MAX_NAME_BYTES: usize = 255;
/// UTF-8 bytes of a tensor kind at most.
pub const MAX_KIND_BYTES: usize = 64;

/// How a state tensor relates to the position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Growth {
    /// The whole tensor is state at every position.
    Fixed,
    /// Append-only rows along dimension 0: at position `p`, rows `0..p` are state and no earlier row
    /// ever changes.
    Rows,
}

/// One state tensor: row-major, contiguous, little-endian.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateTensor {
    /// Unique name, such as `layers.3.kv.key`; see [`StateLayout::validate`] for what it may hold.
    pub name: String,
    /// Element type: one of the plain types, not a quantised one.
    #[serde(serialize_with = "dtype_to", deserialize_with = "dtype_from")]
    pub dtype: DType,
    /// Dimensions, outermost first. For [`Growth::Rows`], dimension 0 is the most rows there can be.
    #[serde(deserialize_with = "shape_from")]
    pub shape: Vec<usize>,
    /// What kind of state it is, such as `kv_cache` or `recurrent`.
    pub kind: String,
    /// How it relates to the position.
    pub growth: Growth,
}

/// All the state of a model, in a fixed order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct StateLayout {
    /// The tensors. Their order is part of the layout.
    pub tensors: Vec<StateTensor>,
}

/// A layout that no capsule can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// More tensors than [`MAX_TENSORS`].
    #[error("the layout has {count} state tensors; at most {MAX_TENSORS} are allowed: merge some")]
    TooManyTensors {
        /// Tensors in the layout.
        count: usize,
    },
    /// A name or kind that is empty, too long, reserved, or has a character that is not allowed.
    #[error("state tensor name or kind '{text}' is not allowed: it {reason}")]
    BadText {
        /// The text, cut short.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Two tensors of one name.
    #[error("two state tensors are named '{tensor}': give each its own name")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// A quantised element type.
    #[error(
        "state tensor '{tensor}' has element type {dtype}; state is f32, f16, bf16, i32, u32 or u8"
    )]
    BadType {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: DType,
    },
    /// Too many dimensions, a dimension of zero, or rows without a dimension.
    #[error("state tensor '{tensor}' has shape {shape:?}, which {reason}")]
    BadShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More bytes than can be addressed.
    #[error("the bytes of state tensor '{tensor}' do not fit the address space: make it smaller")]
    Overflow {
        /// The tensor, or `all` for a sum over the layout.
        tensor: String,
    },
    /// A position past the last row.
    #[error(
        "position {position} is past the {rows} rows of state tensor '{tensor}': use a longer context"
    )]
    PastLastRow {
        /// The tensor.
        tensor: String,
        /// The position.
        position: u32,
        /// Rows that it has.
        rows: usize,
    },
}

impl StateTensor {
    /// Bytes of one element.
    const fn element_bytes(&self) -> usize {
        self.dtype.block_bytes()
    }

    fn overflow(&self) -> LayoutError {
        LayoutError::Overflow { tensor: self.name.clone() }
    }

    fn bytes_of(&self, dims: &[usize]) -> Result<usize, LayoutError> {
        dims.iter()
            .try_fold(self.element_bytes(), |bytes, &dim| bytes.checked_mul(dim))
            .ok_or_else(|| self.overflow())
    }

    /// Bytes that one more position adds: a row of a [`Growth::Rows`] tensor, 0 for a fixed one.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Overflow`]; [`LayoutError::BadShape`] for rows without a dimension.
    pub fn row_bytes(&self) -> Result<usize, LayoutError> {
        match (self.growth, self.shape.split_first()) {
            (Growth::Fixed, _) => Ok(0),
            (Growth::Rows, Some((_, row))) => self.bytes_of(row),
            (Growth::Rows, None) => Err(LayoutError::BadShape {
                tensor: self.name.clone(),
                shape: Vec::new(),
                reason: "has no dimension to hold rows",
            }),
        }
    }

    /// The shape that a capsule at `position` holds: dimension 0 is the position for
    /// [`Growth::Rows`], the shape is unchanged for [`Growth::Fixed`].
    pub fn shape_at(&self, position: u32) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if let (Growth::Rows, Some(rows)) = (self.growth, shape.first_mut()) {
            *rows = position as usize;
        }
        shape
    }

    /// Bytes that a capsule at `position` holds.
    ///
    /// # Errors
    ///
    /// [`LayoutError::PastLastRow`] when the tensor has fewer rows; [`LayoutError::Overflow`];
    /// [`LayoutError::BadShape`] for rows without a dimension.
    pub fn bytes_at(&self, position: u32) -> Result<usize, LayoutError> {
        match self.growth {
            Growth::Fixed => self.bytes_of(&self.shape),
            Growth::Rows => {
                let row = self.row_bytes()?;
                let rows = self.shape[0];
                if position as usize > rows {
                    let tensor = self.name.clone();
                    return Err(LayoutError::PastLastRow { tensor, position, rows });
                }
                row.checked_mul(position as usize).ok_or_else(|| self.overflow())
            }
        }
    }

    fn validate(&self) -> Result<(), LayoutError> {
        check_text(&self.name, MAX_NAME_BYTES)?;
        check_text(&self.kind, MAX_KIND_BYTES)?;
        if self.name == TOKENS || self.name == "__metadata__" {
            let text = self.name.clone();
            return Err(LayoutError::BadText { text, reason: "is reserved by the file format" });
        }
        if self.dtype.is_quantized() {
            return Err(LayoutError::BadType { tensor: self.name.clone(), dtype: self.dtype });
        }
        let bad_shape = |reason| LayoutError::BadShape {
            tensor: self.name.clone(),
            shape: self.shape.iter().copied().take(MAX_RANK + 1).collect(),
            reason,
        };
        if self.shape.len() > MAX_RANK {
            return Err(bad_shape("has more than 8 dimensions"));
        }
        if self.shape.contains(&0) {
            return Err(bad_shape("has a dimension of zero"));
        }
        self.row_bytes()?;
        self.bytes_of(&self.shape).map(|_| ())
    }
}

/// The first characters of untrusted text, for messages.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_default).collect()
}

fn check_text(text: &str, max: usize) -> Result<(), LayoutError> {
    let reason = if text.is_empty() {
        "is empty"
    } else if text.len() > max {
        "is too long"
    } else if text.chars().any(|c| c.is_control() || c == '"' || c == '\\') {
        "has a control character, a quote or a backslash"
    } else {
        return Ok(());
    };
    Err(LayoutError::BadText { text: cut(text), reason })
}

impl StateLayout {
    /// Checks everything that a capsule needs of a layout: at most [`MAX_TENSORS`] tensors; names
    /// unique, not [`TOKENS`] or `__metadata__`, at most [`MAX_NAME_BYTES`] bytes; kinds at most
    /// [`MAX_KIND_BYTES`] bytes; neither empty nor with control characters, quotes or backslashes;
    /// plain element types; at most [`MAX_RANK`] dimensions, none zero; sizes that can be addressed.
    ///
    /// # Errors
    ///
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), LayoutError> {
        if self.tensors.len() > MAX_TENSORS {
            return Err(LayoutError::TooManyTensors { count: self.tensors.len() });
        }
        self.tensors.iter().try_for_each(StateTensor::validate)?;
        let mut names: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(LayoutError::Duplicate { tensor: pair[0].to_owned() }),
            None => Ok(()),
        }
    }

    fn sum(
        &self,
        bytes: impl Fn(&StateTensor) -> Result<usize, LayoutError>,
    ) -> Result<usize, LayoutError> {
        self.tensors.iter().try_fold(0_usize, |total, tensor| {
            total
                .checked_add(bytes(tensor)?)
                .ok_or_else(|| LayoutError::Overflow { tensor: "all".to_owned() })
        })
    }

    /// Bytes that one more position adds over all tensors.
    ///
    /// # Errors
    ///
    /// See [`StateTensor::row_bytes`].
    pub fn row_bytes(&self) -> Result<usize, LayoutError> {
        self.sum(StateTensor::row_bytes)
    }

    /// Bytes of all [`Growth::Fixed`] tensors.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Overflow`].
    pub fn fixed_bytes(&self) -> Result<usize, LayoutError> {
        self.sum(|t| if t.growth == Growth::Fixed { t.bytes_at(0) } else { Ok(0) })
    }

    /// Bytes of state that a capsule at `position` holds: `fixed_bytes + position * row_bytes`.
    ///
    /// # Errors
    ///
    /// See [`StateTensor::bytes_at`].
    pub fn bytes_at(&self, position: u32) -> Result<usize, LayoutError> {
        self.sum(|t| t.bytes_at(position))
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&StateTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// The BLAKE3 digest of the canonical encoding: tensor count, then for each tensor the name, the
    /// element type's name, the number of dimensions, the dimensions, the kind and a growth byte (0
    /// fixed, 1 rows). Numbers are 8 bytes little-endian, texts are prefixed with their length.
    pub fn digest(&self) -> Digest {
        fn number(hasher: &mut blake3::Hasher, value: usize) {
            hasher.update(&(value as u64).to_le_bytes());
        }
        fn text(hasher: &mut blake3::Hasher, value: &str) {
            number(hasher, value.len());
            hasher.update(value.as_bytes());
        }
        let mut hasher = blake3::Hasher::new_derive_key("ampoule capsule v1 state layout");
        number(&mut hasher, self.tensors.len());
        for tensor in &self.tensors {
            text(&mut hasher, &tensor.name);
            text(&mut hasher, tensor.dtype.name());
            number(&mut hasher, tensor.shape.len());
            tensor.shape.iter().for_each(|&dim| number(&mut hasher, dim));
            text(&mut hasher, &tensor.kind);
            hasher.update(&[u8::from(tensor.growth == Growth::Rows)]);
        }
        hasher.finalize().into()
    }

    /// Says how `self` (a capsule's layout) differs from `other` (the running model's): the first
    /// tensor that does, and how. `None` when they are equal.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String)> {
        for (ours, theirs) in self.tensors.iter().zip(&other.tensors) {
            if ours != theirs {
                let say = |t: &StateTensor| {
                    format!("'{}' {} {:?} {} {:?}", t.name, t.dtype, t.shape, t.kind, t.growth)
                };
                let text = format!("the capsule has {}, the model has {}", say(ours), say(theirs));
                return Some((ours.name.clone(), text));
            }
        }
        let (ours, theirs) = (self.tensors.len(), other.tensors.len());
        let extra = self.tensors.get(theirs).or_else(|| other.tensors.get(ours))?;
        let text = format!("the capsule has {ours} state tensors, the model has {theirs}");
        Some((extra.name.clone(), text))
    }
}

impl<'de> Deserialize<'de> for StateLayout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let tensors = deserializer.deserialize_seq(Capped::<StateTensor, MAX_TENSORS>::new())?;
        Ok(Self { tensors })
    }
}

/// Reads a sequence and stops at the first element past `MAX`, before memory is spent on it.
struct Capped<T, const MAX: usize>(std::marker::PhantomData<T>);

impl<T, const MAX: usize> Capped<T, MAX> {
    const fn new() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Capped<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a sequence of at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut out = Vec::new();
        while let Some(item) = seq.next_element()? {
            if out.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            out.push(item);
        }
        Ok(out)
    }
}

fn shape_from<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    deserializer.deserialize_seq(Capped::<usize, MAX_RANK>::new())
}

// The signature is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn dtype_to<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

fn dtype_from<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
    struct Name;
    impl Visitor<'_> for Name {
        type Value = DType;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the name of an element type")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<DType, E> {
            text.parse().map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: DType, shape: &[usize], growth: Growth) -> StateTensor {
        StateTensor { name: name.into(), dtype, shape: shape.into(), kind: "k".into(), growth }
    }

    fn layout(tensors: &[StateTensor]) -> StateLayout {
        StateLayout { tensors: tensors.to_vec() }
    }

    #[test]
    fn sizes() {
        let l = layout(&[
            tensor("kv", DType::F16, &[10, 2, 3], Growth::Rows),
            tensor("cursor", DType::U32, &[], Growth::Fixed),
            tensor("rec", DType::F32, &[4, 2], Growth::Fixed),
        ]);
        l.validate().unwrap();
        assert_eq!(l.row_bytes(), Ok(12));
        assert_eq!(l.fixed_bytes(), Ok(36));
        assert_eq!(l.bytes_at(0), Ok(36));
        assert_eq!(l.bytes_at(10), Ok(156));
        assert_eq!(l.tensors[0].shape_at(7), [7, 2, 3]);
        assert_eq!(l.tensors[2].shape_at(7), [4, 2]);
        assert!(matches!(
            l.bytes_at(11),
            Err(LayoutError::PastLastRow { position: 11, rows: 10, .. })
        ));
    }

    #[test]
    fn bad_layouts_are_refused() {
        let ok = tensor("a", DType::F32, &[2], Growth::Fixed);
        let check = |t: StateTensor| layout(&[t]).validate().unwrap_err();
        for name in ["", "tokens", "__metadata__", "a\"b", "a\\b", "a\nb", &"n".repeat(256)] {
            let bad = check(StateTensor { name: name.into(), ..ok.clone() });
            assert!(matches!(bad, LayoutError::BadText { .. }), "{name}: {bad}");
        }
        let bad = check(StateTensor { kind: String::new(), ..ok.clone() });
        assert!(matches!(bad, LayoutError::BadText { .. }));
        let bad = check(tensor("a", DType::Q8_0, &[32], Growth::Fixed));
        assert!(matches!(bad, LayoutError::BadType { .. }));
        for (shape, growth) in [
            (vec![], Growth::Rows),
            (vec![0], Growth::Fixed),
            (vec![3, 0], Growth::Rows),
            (vec![1; 9], Growth::Fixed),
        ] {
            let bad = check(tensor("a", DType::F32, &shape, growth));
            assert!(matches!(bad, LayoutError::BadShape { .. }), "{shape:?}: {bad}");
        }
        let bad = check(tensor("a", DType::F32, &[usize::MAX, 2], Growth::Rows));
        assert!(matches!(bad, LayoutError::Overflow { .. }));
        let bad = layout(&[ok.clone(), ok.clone()]).validate().unwrap_err();
        assert!(matches!(bad, LayoutError::Duplicate { .. }));
        let many = vec![ok; MAX_TENSORS + 1];
        assert!(matches!(
            StateLayout { tensors: many }.validate(),
            Err(LayoutError::TooManyTensors { count }) if count == MAX_TENSORS + 1
        ));
        let half = tensor("h", DType::U8, &[usize::MAX / 2 + 1], Growth::Fixed);
        let other = StateTensor { name: "g".into(), ..half.clone() };
        assert!(matches!(
            layout(&[half, other]).fixed_bytes(),
            Err(LayoutError::Overflow { tensor }) if tensor == "all"
        ));
    }

    #[test]
    fn every_field_changes_the_digest() {
        let a = tensor("a", DType::F32, &[2, 3], Growth::Fixed);
        let base = layout(std::slice::from_ref(&a));
        let mut digests = vec![base.digest(), layout(&[]).digest()];
        for other in [
            StateTensor { name: "b".into(), ..a.clone() },
            StateTensor { dtype: DType::I32, ..a.clone() },
            StateTensor { shape: vec![3, 2], ..a.clone() },
            StateTensor { shape: vec![2, 3, 1], ..a.clone() },
            StateTensor { kind: "m".into(), ..a.clone() },
            StateTensor { growth: Growth::Rows, ..a.clone() },
        ] {
            let other = layout(&[other]);
            assert!(base.difference(&other).is_some());
            digests.push(other.digest());
        }
        let b = StateTensor { name: "b".into(), ..a.clone() };
        digests.push(layout(&[a.clone(), b.clone()]).digest());
        digests.push(layout(&[b.clone(), a.clone()]).digest());
        assert_eq!(base.difference(&base), None);
        assert_eq!(base.difference(&layout(&[a.clone(), b.clone()])).unwrap().0, "b");
        assert_eq!(layout(&[a, b]).difference(&base).unwrap().0, "b");
        let count = digests.len();
        digests.sort();
        digests.dedup();
        assert_eq!(digests.len(), count);
    }
}
