//! Writing a capsule.

use crate::header::{encode, entries};
use crate::layout::cut;
use crate::{CapsuleError, Digest, LineageError, Manifest};

/// The digests of a capsule's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadDigests {
    /// BLAKE3 of the tokens, 4 bytes little-endian each.
    pub tokens: Digest,
    /// BLAKE3 of each state tensor's bytes, in the order of the layout.
    pub tensors: Vec<Digest>,
}

/// The start of a capsule file, up to its payload: the 8 length bytes and the header.
///
/// For callers that stream a payload which never lies in memory as a whole. The payload follows in
/// this order, without gaps: the tokens, then the state tensors of 4, 2 and 1 bytes an element, each
/// group in layout order. The digests are taken as given; [`CapsuleWriter`] computes them.
///
/// # Errors
///
/// Those of [`Manifest::validate`], [`CapsuleError::DigestCount`], and
/// [`CapsuleError::HeaderTooLong`].
pub fn encode_header(
    manifest: &Manifest,
    digests: &PayloadDigests,
) -> Result<Vec<u8>, CapsuleError> {
    encode(manifest, digests)
}

/// Encodes a whole capsule; `payload` has the name and the pieces of each state tensor, in any order.
///
/// # Errors
///
/// Those of [`CapsuleWriter`].
pub fn to_bytes(
    manifest: &Manifest,
    tokens: &[u32],
    payload: &[(&str, &[&[u8]])],
) -> Result<Vec<u8>, CapsuleError> {
    let mut writer = CapsuleWriter::new(manifest, tokens)?;
    for (name, pieces) in payload {
        writer.add(name, pieces)?;
    }
    Ok(writer.finish()?.to_bytes())
}

/// The bytes of one tensor, and their digest.
type Pieces<'a> = (Vec<&'a [u8]>, Digest);

/// Collects the pieces of each state tensor, checks and hashes them, and gives the file as slices.
///
/// State bytes are borrowed, never copied. The same capsule gives the same bytes, in whatever order
/// the tensors are added and however they are cut into pieces.
#[derive(Debug)]
pub struct CapsuleWriter<'a> {
    manifest: &'a Manifest,
    tokens: Vec<u8>,
    /// By index in the layout.
    tensors: Vec<Option<Pieces<'a>>>,
}

impl<'a> CapsuleWriter<'a> {
    /// Begins a capsule. `tokens` are those of the positions `0..manifest.position`.
    ///
    /// # Errors
    ///
    /// Those of [`Manifest::validate`]; [`CapsuleError::Lineage`] for another number of tokens than
    /// the position or a lineage node that is not theirs.
    pub fn new(manifest: &'a Manifest, tokens: &[u32]) -> Result<Self, CapsuleError> {
        manifest.validate()?;
        if tokens.len() != manifest.position as usize {
            let (start, end, tokens) = (0, manifest.position, tokens.len());
            return Err(LineageError::TokenCount { start, end, tokens }.into());
        }
        let tokens: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        manifest.verify_lineage(&tokens)?;
        let tensors = vec![None; manifest.layout.tensors.len()];
        Ok(Self { manifest, tokens, tensors })
    }

    /// Gives the bytes of one state tensor, as pieces laid end to end. Rows that are shared with an
    /// ancestor and own rows can so be given without being joined.
    ///
    /// # Errors
    ///
    /// [`CapsuleError::UnknownTensor`], [`CapsuleError::TensorTwice`], [`CapsuleError::TensorBytes`];
    /// the writer is then as it was.
    pub fn add(&mut self, name: &str, pieces: &[&'a [u8]]) -> Result<&mut Self, CapsuleError> {
        let layout = &self.manifest.layout;
        let Some(index) = layout.tensors.iter().position(|t| t.name == name) else {
            return Err(CapsuleError::UnknownTensor { tensor: cut(name) });
        };
        if self.tensors[index].is_some() {
            return Err(CapsuleError::TensorTwice { tensor: name.to_owned() });
        }
        let position = self.manifest.position;
        let expected = layout.tensors[index].bytes_at(position)?;
        let actual = pieces.iter().fold(0, |sum: usize, piece| sum.saturating_add(piece.len()));
        if actual != expected {
            let tensor = name.to_owned();
            return Err(CapsuleError::TensorBytes { tensor, position, expected, actual });
        }
        self.tensors[index] = Some((pieces.to_vec(), Digest::of_pieces(pieces)));
        Ok(self)
    }

    /// Ends the capsule.
    ///
    /// # Errors
    ///
    /// [`CapsuleError::TensorMissing`], [`CapsuleError::HeaderTooLong`].
    pub fn finish(self) -> Result<EncodedCapsule<'a>, CapsuleError> {
        let names = self.manifest.layout.tensors.iter().map(|t| t.name.as_str());
        let tensors = self.tensors.into_iter().zip(names).map(|(tensor, name)| {
            tensor.ok_or_else(|| CapsuleError::TensorMissing { tensor: name.to_owned() })
        });
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let digests = PayloadDigests {
            tokens: Digest::of(&self.tokens),
            tensors: tensors.iter().map(|(_, digest)| *digest).collect(),
        };
        let header = encode(self.manifest, &digests)?;
        let pieces = entries(self.manifest)
            .filter_map(|entry| entry.tensor)
            .flat_map(|index| tensors[index].0.iter().copied())
            .collect();
        Ok(EncodedCapsule { header, tokens: self.tokens, pieces })
    }
}

/// A whole capsule as slices that follow one another in the file.
#[derive(Clone, Debug)]
pub struct EncodedCapsule<'a> {
    header: Vec<u8>,
    tokens: Vec<u8>,
    pieces: Vec<&'a [u8]>,
}

impl EncodedCapsule<'_> {
    /// The file's bytes, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        [self.header.as_slice(), self.tokens.as_slice()]
            .into_iter()
            .chain(self.pieces.iter().copied())
    }

    /// Bytes of the whole file.
    pub fn byte_len(&self) -> usize {
        self.slices().map(<[u8]>::len).sum()
    }

    /// The whole file in one allocation.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.byte_len());
        self.slices().for_each(|slice| out.extend_from_slice(slice));
        out
    }
}
