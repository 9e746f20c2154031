//! Reading little-endian fields from bytes that are not trusted.

use std::path::Path;

use super::value::{MetaArray, MetaValue};
use crate::error::{ModelFileError, shown};

/// A position in the bytes of one file. Every read is checked against the end.
pub(super) struct Cursor<'a> {
    pub(super) file: &'a Path,
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], ModelFileError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len));
        let Some(taken) = taken else {
            return Err(ModelFileError::Truncated {
                file: self.file.to_owned(),
                what: what.to_owned(),
                offset: self.at as u64,
                needed: len,
                available: rest.len() as u64,
            });
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelFileError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, ModelFileError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, ModelFileError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of items that take at least `smallest` bytes each.
    pub(super) fn count(&mut self, smallest: usize, what: &str) -> Result<usize, ModelFileError> {
        let count = self.u64(what)?;
        self.check_count(count, smallest, what)
    }

    fn check_count(
        &self,
        count: u64,
        smallest: usize,
        what: &str,
    ) -> Result<usize, ModelFileError> {
        let available = self.remaining();
        let limit = available / smallest;
        match usize::try_from(count) {
            Ok(count) if count <= limit => Ok(count),
            _ => Err(ModelFileError::CountTooLarge {
                file: self.file.to_owned(),
                what: what.to_owned(),
                count,
                limit: limit as u64,
                available: available as u64,
            }),
        }
    }

    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, ModelFileError> {
        let len = self.u64(what)?;
        let offset = self.at as u64;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| ModelFileError::NotUtf8 {
            file: self.file.to_owned(),
            what: what.to_owned(),
            offset,
        })
    }

    /// The value of metadata key `key`, its type number first.
    pub(super) fn value(&mut self, key: &str) -> Result<MetaValue, ModelFileError> {
        let what = format!("metadata key '{}'", shown(key));
        let what = what.as_str();
        let type_number = self.u32(what)?;
        Ok(match type_number {
            0 => MetaValue::U8(u8::from_le_bytes(self.array(what)?)),
            1 => MetaValue::I8(i8::from_le_bytes(self.array(what)?)),
            2 => MetaValue::U16(u16::from_le_bytes(self.array(what)?)),
            3 => MetaValue::I16(i16::from_le_bytes(self.array(what)?)),
            4 => MetaValue::U32(self.u32(what)?),
            5 => MetaValue::I32(i32::from_le_bytes(self.array(what)?)),
            6 => MetaValue::F32(f32::from_le_bytes(self.array(what)?)),
            7 => MetaValue::Bool(self.array::<1>(what)? != [0]),
            8 => MetaValue::String(self.string(what)?.to_owned()),
            9 => MetaValue::Array(self.array_value(key, what)?),
            10 => MetaValue::U64(self.u64(what)?),
            11 => MetaValue::I64(i64::from_le_bytes(self.array(what)?)),
            12 => MetaValue::F64(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(self.bad_type(key, type_number)),
        })
    }

    fn bad_type(&self, key: &str, type_number: u32) -> ModelFileError {
        ModelFileError::MetadataType { file: self.file.to_owned(), key: shown(key), type_number }
    }

    fn array_value(&mut self, key: &str, what: &str) -> Result<MetaArray, ModelFileError> {
        let type_number = self.u32(what)?;
        let count = self.u64(what)?;
        Ok(match type_number {
            0 => MetaArray::U8(self.numbers(count, what, u8::from_le_bytes)?),
            1 => MetaArray::I8(self.numbers(count, what, i8::from_le_bytes)?),
            2 => MetaArray::U16(self.numbers(count, what, u16::from_le_bytes)?),
            3 => MetaArray::I16(self.numbers(count, what, i16::from_le_bytes)?),
            4 => MetaArray::U32(self.numbers(count, what, u32::from_le_bytes)?),
            5 => MetaArray::I32(self.numbers(count, what, i32::from_le_bytes)?),
            6 => MetaArray::F32(self.numbers(count, what, f32::from_le_bytes)?),
            7 => MetaArray::Bool(self.numbers(count, what, |[b]: [u8; 1]| b != 0)?),
            8 => {
                // A string takes 8 bytes of the file at least, for its length.
                let count = self.check_count(count, 8, what)?;
                let mut strings = Vec::with_capacity(count);
                for _ in 0..count {
                    strings.push(self.string(what)?.to_owned());
                }
                MetaArray::String(strings)
            }
            10 => MetaArray::U64(self.numbers(count, what, u64::from_le_bytes)?),
            11 => MetaArray::I64(self.numbers(count, what, i64::from_le_bytes)?),
            12 => MetaArray::F64(self.numbers(count, what, f64::from_le_bytes)?),
            _ => return Err(self.bad_type(key, type_number)),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        what: &str,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, ModelFileError> {
        let count = self.check_count(count, N, what)?;
        let bytes = self.take((count * N) as u64, what)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|&chunk| read(chunk)).collect())
    }
}
