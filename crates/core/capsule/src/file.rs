//! Reading a whole capsule.

use std::ops::Range;

use crate::header::{TensorEntry, entries};
use crate::layout::TOKENS;
use crate::{CapsuleError, CapsuleHeader, Digest, Fingerprint, Manifest, StateLayout};

/// A whole capsule whose every byte has been checked; the payload is borrowed from the file's bytes.
#[derive(Clone, Debug)]
pub struct CapsuleFile<'a> {
    header: CapsuleHeader,
    bytes: &'a [u8],
}

/// One tensor of a capsule with its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPayload<'f, 'a> {
    /// Name, type, shape and place.
    pub entry: TensorEntry<'f>,
    /// Its bytes: row-major, contiguous, little-endian. Within the file they are aligned to the
    /// element size; in memory they are so if the file's bytes are.
    pub bytes: &'a [u8],
}

impl<'a> CapsuleFile<'a> {
    /// Reads a capsule and checks every byte of it. Nothing is copied; the memory taken is at most the
    /// header's length and 1 MiB. It is safe on any bytes.
    ///
    /// # Errors
    ///
    /// The checks, in order:
    ///
    /// 1. the header's length is within bounds and within the file
    ///    ([`HeaderCutShort`](CapsuleError::HeaderCutShort),
    ///    [`HeaderLength`](CapsuleError::HeaderLength));
    /// 2. the header begins as a capsule's does ([`NotACapsule`](CapsuleError::NotACapsule)) and has
    ///    its checksum ([`HeaderChecksum`](CapsuleError::HeaderChecksum));
    /// 3. the format version is known ([`Version`](CapsuleError::Version));
    /// 4. the manifest is well formed ([`Manifest`](CapsuleError::Manifest));
    /// 5. its history, texts, layout, position and parent agree
    ///    ([`Lineage`](CapsuleError::Lineage) and the errors of [`Manifest::validate`]), with one
    ///    digest a tensor ([`DigestCount`](CapsuleError::DigestCount));
    /// 6. the file has as many bytes as they ask for ([`Length`](CapsuleError::Length));
    /// 7. the header is the one encoding of the manifest
    ///    ([`NotCanonical`](CapsuleError::NotCanonical)), which covers the safetensors entries;
    /// 8. every tensor has its digest ([`TensorChecksum`](CapsuleError::TensorChecksum));
    /// 9. the lineage node is that of the tokens ([`Lineage`](CapsuleError::Lineage)).
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CapsuleError> {
        let header = CapsuleHeader::parse(bytes, bytes.len() as u64)?;
        let file = Self { header, bytes };
        for TensorPayload { entry, bytes } in file.tensors() {
            let computed = Digest::of(bytes);
            if computed != entry.digest {
                return Err(CapsuleError::TensorChecksum {
                    tensor: entry.name.to_owned(),
                    start: entry.range.start,
                    end: entry.range.end,
                    stored: entry.digest,
                    computed,
                });
            }
        }
        file.manifest().verify_lineage(file.token_bytes())?;
        Ok(file)
    }

    /// The checked header.
    pub const fn header(&self) -> &CapsuleHeader {
        &self.header
    }

    /// What the capsule says about itself.
    pub const fn manifest(&self) -> &Manifest {
        self.header.manifest()
    }

    /// The tensors with their bytes, in the order in which they lie in the file, the tokens first.
    pub fn tensors(&self) -> impl Iterator<Item = TensorPayload<'_, 'a>> {
        self.header.tensors().map(|entry| {
            let bytes = self.slice(&entry.range);
            TensorPayload { entry, bytes }
        })
    }

    /// The bytes of one tensor, or `None` if there is none of that name.
    pub fn tensor(&self, name: &str) -> Option<&'a [u8]> {
        let entry = entries(self.manifest()).find(|entry| entry.name == name)?;
        let start = self.header.payload_start();
        Some(self.slice(&(start + entry.start..start + entry.end)))
    }

    /// The tokens that the state has seen, one a position.
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        let (tokens, _) = self.token_bytes().as_chunks::<4>();
        tokens.iter().map(|token| u32::from_le_bytes(*token))
    }

    fn token_bytes(&self) -> &'a [u8] {
        self.tensor(TOKENS).unwrap_or_default()
    }

    /// The header has been checked against the length of `bytes`, so ranges are within it.
    fn slice(&self, range: &Range<u64>) -> &'a [u8] {
        &self.bytes[range.start as usize..range.end as usize]
    }

    /// Checks that the capsule may be restored: same tenant, same fingerprint, same layout.
    ///
    /// # Errors
    ///
    /// In this order: [`CapsuleError::OtherTenant`]; [`CapsuleError::Fingerprint`] with the first
    /// component that differs, or [`CapsuleError::OtherLayout`] with the first tensor that differs if
    /// that component is the layout.
    pub fn check_fits(
        &self,
        fingerprint: &Fingerprint,
        layout: &StateLayout,
        salt: &Digest,
    ) -> Result<(), CapsuleError> {
        self.manifest().check_fits(fingerprint, layout, salt)
    }
}
