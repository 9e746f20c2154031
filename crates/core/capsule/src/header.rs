//! The 8 length bytes and the JSON header of a capsule file.

use std::io::{self, Write};
use std::ops::Range;

use ampoule_plan::DType;

use crate::digest::HEX_LEN;
use crate::json::{self, Expect, snippet};
use crate::layout::TOKENS;
use crate::writer::PayloadDigests;
use crate::{CapsuleError, Digest, Fingerprint, History, Manifest, StateLayout};

/// The format version that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes that a header may have at most.
pub const MAX_HEADER_BYTES: u64 = 64 * 1024 * 1024;

/// Bytes of the header's length.
pub(crate) const PREFIX: usize = 8;
const MAGIC: &[u8] = b"{\"__metadata__\":{\"ampoule.header_blake3\":\"";
const BEFORE_VERSION: &[u8] = b"\",\"ampoule.format\":\"";
const BEFORE_MANIFEST: &[u8] = b"\",\"ampoule.manifest\":\"";
const AFTER_MANIFEST: &[u8] = b"\"}";
/// What the checksum is computed with in place of itself.
const ZEROS: [u8; HEX_LEN] = [b'0'; HEX_LEN];
/// Longest version that is quoted in a message.
const MAX_VERSION_BYTES: usize = 10;

const MIN_HEADER: usize = {
    let bytes =
        MAGIC.len() + HEX_LEN + BEFORE_VERSION.len() + BEFORE_MANIFEST.len() + AFTER_MANIFEST.len();
    bytes.next_multiple_of(8)
};

/// One tensor of a capsule file: the tokens, or a state tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Its shape in the file: for rows, dimension 0 is the position.
    pub shape: Vec<usize>,
    /// Where it lies, in bytes from the start of the file.
    pub range: Range<u64>,
    /// BLAKE3 of its bytes.
    pub digest: Digest,
}

/// A checked header: all there is to know about a capsule except its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapsuleHeader {
    manifest: Manifest,
    digests: PayloadDigests,
    /// Bytes of length and header: where the payload begins.
    header_bytes: u64,
    total_bytes: u64,
}

impl CapsuleHeader {
    /// How many bytes from the start of a file [`parse`](Self::parse) needs: the 8 length bytes and
    /// the header. `prefix` is the start of the file, `total_bytes` the file's length.
    ///
    /// # Errors
    ///
    /// [`CapsuleError::HeaderCutShort`] for fewer than 8 bytes or a file that ends inside its header,
    /// [`CapsuleError::HeaderLength`] for a length that is out of bounds.
    pub fn bytes_needed(prefix: &[u8], total_bytes: u64) -> Result<usize, CapsuleError> {
        let short = |needed| CapsuleError::HeaderCutShort {
            needed,
            available: total_bytes.min(prefix.len() as u64),
        };
        let length = prefix.first_chunk::<PREFIX>().ok_or_else(|| short(PREFIX as u64))?;
        let length = u64::from_le_bytes(*length);
        let min = MIN_HEADER as u64;
        if length < min || length > MAX_HEADER_BYTES || !length.is_multiple_of(8) {
            return Err(CapsuleError::HeaderLength { length, min });
        }
        let needed = PREFIX as u64 + length;
        if needed > total_bytes {
            return Err(CapsuleError::HeaderCutShort { needed, available: total_bytes });
        }
        usize::try_from(needed).map_err(|_| CapsuleError::HeaderLength { length, min })
    }

    /// Reads and checks a header: everything that [`CapsuleFile::parse`](crate::CapsuleFile::parse)
    /// checks except the payload's digests and the lineage node, which take the payload.
    ///
    /// `prefix` is the start of the file, at least [`bytes_needed`](Self::bytes_needed) bytes of it;
    /// `total_bytes` is the file's length. The memory taken is at most the header's length and 1 MiB.
    ///
    /// # Errors
    ///
    /// In this order: bounds of the header's length, start of the header, header checksum, format
    /// version, JSON of the manifest, history, [`Manifest::validate`], number of digests, file length,
    /// and canonical form of the header.
    pub fn parse(prefix: &[u8], total_bytes: u64) -> Result<Self, CapsuleError> {
        let needed = Self::bytes_needed(prefix, total_bytes)?;
        let bytes = prefix.get(..needed).ok_or(CapsuleError::HeaderCutShort {
            needed: needed as u64,
            available: prefix.len() as u64,
        })?;
        let stored = check_checksum(bytes)?;
        let manifest_at = check_version(bytes)?;

        let mut read = json::read_manifest(&bytes[manifest_at..]).map_err(|error| {
            let reason = error.to_string().chars().take(200).collect();
            CapsuleError::Manifest { reason }
        })?;
        if !json::knows(read.version) {
            return Err(CapsuleError::Version { found: read.version.to_string() });
        }
        read.manifest.history = History::from_segments(read.segments)?;
        let header = Self {
            manifest: read.manifest,
            digests: read.digests,
            header_bytes: needed as u64,
            total_bytes,
        };
        let payload = plan(&header.manifest, &header.digests)?;
        if payload.checked_add(header.header_bytes) != Some(total_bytes) {
            let expected = payload.saturating_add(header.header_bytes);
            return Err(CapsuleError::Length { expected, actual: total_bytes });
        }
        header.check_canonical(bytes, stored)?;
        Ok(header)
    }

    /// Writes the header again, comparing with what is there: there is one header for a manifest, so
    /// no two readers can see different things in it.
    fn check_canonical(&self, bytes: &[u8], stored: Digest) -> Result<(), CapsuleError> {
        let header = &bytes[PREFIX..];
        let mut expect = Expect::new(header);
        let written = emit(&mut expect, &stored.hex(), &self.manifest, &self.digests);
        let end = expect.equal();
        let padding = &header[end..];
        let wanted = match (written, expect.wanted) {
            (Ok(()), _) if padding.len() < 8 && padding.iter().all(|&b| b == b' ') => return Ok(()),
            (Ok(()), _) => "fewer than 8 spaces, then the payload".to_owned(),
            (Err(_), Some(wanted)) => wanted,
            (Err(error), None) => error.to_string(),
        };
        Err(CapsuleError::NotCanonical {
            offset: (PREFIX + end) as u64,
            found: snippet(padding),
            expected: wanted,
        })
    }

    /// What the capsule says about itself.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What the capsule says about itself, taken out of the header.
    pub fn into_manifest(self) -> Manifest {
        self.manifest
    }

    /// The digests of the tokens and of each state tensor.
    pub const fn digests(&self) -> &PayloadDigests {
        &self.digests
    }

    /// The manifest's JSON text, as it is in the file.
    pub fn manifest_json(&self) -> String {
        json::manifest_text(&self.manifest, &self.digests)
    }

    /// Where the payload begins, in bytes from the start of the file; a multiple of 8.
    pub const fn payload_start(&self) -> u64 {
        self.header_bytes
    }

    /// Bytes of the whole file.
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The tensors in the order in which they lie in the file, the tokens first.
    pub fn tensors(&self) -> impl Iterator<Item = TensorEntry<'_>> {
        entries(&self.manifest).map(|entry| TensorEntry {
            name: entry.name,
            dtype: entry.dtype,
            shape: entry.shape(&self.manifest),
            range: self.header_bytes + entry.start..self.header_bytes + entry.end,
            digest: entry.tensor.map_or(self.digests.tokens, |index| self.digests.tensors[index]),
        })
    }

    /// See [`CapsuleFile::check_fits`](crate::CapsuleFile::check_fits).
    ///
    /// # Errors
    ///
    /// The same.
    pub fn check_fits(
        &self,
        fingerprint: &Fingerprint,
        layout: &StateLayout,
        salt: &Digest,
    ) -> Result<(), CapsuleError> {
        self.manifest.check_fits(fingerprint, layout, salt)
    }
}

/// Where one tensor lies in the payload of a valid manifest.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: DType,
    /// Its index in the layout; `None` for the tokens.
    pub(crate) tensor: Option<usize>,
    /// Bytes from the start of the payload.
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Entry<'_> {
    fn shape(&self, manifest: &Manifest) -> Vec<usize> {
        let position = manifest.position;
        self.tensor.map_or_else(
            || vec![position as usize],
            |index| manifest.layout.tensors[index].shape_at(position),
        )
    }
}

/// The tensors of a valid manifest in file order: the tokens, then the state tensors of 4, 2 and 1
/// bytes an element, each group in layout order. So every tensor is aligned to its element size and
/// none needs a gap.
pub(crate) fn entries(manifest: &Manifest) -> impl Iterator<Item = Entry<'_>> {
    let tokens = u64::from(manifest.position) * 4;
    let tensors = manifest.layout.tensors.iter().enumerate();
    let ordered = [4, 2, 1]
        .into_iter()
        .flat_map(move |size| tensors.clone().filter(move |(_, t)| t.dtype.block_bytes() == size));
    let first = Entry { name: TOKENS, dtype: DType::U32, tensor: None, start: 0, end: tokens };
    std::iter::once(first).chain(ordered.scan(tokens, |start, (index, tensor)| {
        // Both are known to hold: the manifest is valid and its sum was checked by `plan`.
        let bytes = tensor.bytes_at(manifest.position).ok()? as u64;
        let entry = Entry {
            name: &tensor.name,
            dtype: tensor.dtype,
            tensor: Some(index),
            start: *start,
            end: start.checked_add(bytes)?,
        };
        *start = entry.end;
        Some(entry)
    }))
}

/// Checks manifest and digests, and gives the bytes of the payload.
fn plan(manifest: &Manifest, digests: &PayloadDigests) -> Result<u64, CapsuleError> {
    manifest.validate()?;
    let (expected, actual) = (manifest.layout.tensors.len(), digests.tensors.len());
    if expected != actual {
        return Err(CapsuleError::DigestCount { expected, actual });
    }
    let state = manifest.layout.bytes_at(manifest.position)? as u64;
    state
        .checked_add(u64::from(manifest.position) * 4)
        .ok_or_else(|| crate::LayoutError::Overflow { tensor: "all".to_owned() }.into())
}

const fn safetensors_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I32 => "I32",
        DType::U32 => "U32",
        // Quantised types never pass `StateLayout::validate`.
        DType::U8 | DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => "U8",
    }
}

/// Writes the header of a valid manifest, without its padding.
fn emit(
    out: &mut impl Write,
    checksum: &[u8],
    manifest: &Manifest,
    digests: &PayloadDigests,
) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(checksum)?;
    out.write_all(BEFORE_VERSION)?;
    write!(out, "{FORMAT_VERSION}")?;
    out.write_all(BEFORE_MANIFEST)?;
    json::write_manifest(out, manifest, digests)?;
    out.write_all(AFTER_MANIFEST)?;
    for entry in entries(manifest) {
        let dtype = safetensors_name(entry.dtype);
        // Names have no character that JSON would escape.
        write!(out, ",\"{}\":{{\"dtype\":\"{dtype}\",\"shape\":[", entry.name)?;
        for (index, dim) in entry.shape(manifest).into_iter().enumerate() {
            write!(out, "{}{dim}", if index == 0 { "" } else { "," })?;
        }
        write!(out, "],\"data_offsets\":[{},{}]}}", entry.start, entry.end)?;
    }
    out.write_all(b"}")
}

/// The 8 length bytes and the header for a manifest and the digests of its payload.
pub(crate) fn encode(
    manifest: &Manifest,
    digests: &PayloadDigests,
) -> Result<Vec<u8>, CapsuleError> {
    plan(manifest, digests)?;
    let mut out = vec![0; PREFIX];
    emit(&mut out, &ZEROS, manifest, digests)
        .map_err(|error| CapsuleError::Manifest { reason: error.to_string() })?;
    out.resize(out.len().next_multiple_of(8), b' ');
    let length = out.len() - PREFIX;
    if length as u64 > MAX_HEADER_BYTES {
        return Err(CapsuleError::HeaderTooLong { bytes: length });
    }
    out[..PREFIX].copy_from_slice(&(length as u64).to_le_bytes());
    let checksum = Digest::of(&out).hex();
    let at = PREFIX + MAGIC.len();
    out[at..at + HEX_LEN].copy_from_slice(&checksum);
    Ok(out)
}

/// Checks the header's beginning and its checksum; gives the checksum.
fn check_checksum(bytes: &[u8]) -> Result<Digest, CapsuleError> {
    let at = PREFIX + MAGIC.len();
    // The least header length leaves room for all of this.
    let (Some(MAGIC), Some(stored), Some(rest)) =
        (bytes.get(PREFIX..at), bytes.get(at..at + HEX_LEN), bytes.get(at + HEX_LEN..))
    else {
        return Err(CapsuleError::NotACapsule);
    };
    let computed = Digest::of_pieces(&[&bytes[..at], &ZEROS, rest]);
    if stored == computed.hex() {
        Ok(computed)
    } else {
        Err(CapsuleError::HeaderChecksum { stored: stored.escape_ascii().to_string(), computed })
    }
}

/// Checks the format's version; gives the offset of the manifest's text.
fn check_version(bytes: &[u8]) -> Result<usize, CapsuleError> {
    let at = PREFIX + MAGIC.len() + HEX_LEN;
    let not_canonical = |at: usize, expected: &[u8]| CapsuleError::NotCanonical {
        offset: at as u64,
        found: snippet(&bytes[at.min(bytes.len())..]),
        expected: snippet(expected),
    };
    let rest = bytes[at..]
        .strip_prefix(BEFORE_VERSION)
        .ok_or_else(|| not_canonical(at, BEFORE_VERSION))?;
    let at = at + BEFORE_VERSION.len();
    let length = rest.iter().take(MAX_VERSION_BYTES).take_while(|b| b.is_ascii_digit()).count();
    let (version, rest) = rest.split_at(length);
    if length == 0 {
        return Err(not_canonical(at, b"1"));
    }
    if version != FORMAT_VERSION.to_string().as_bytes() {
        return Err(CapsuleError::Version { found: snippet(version) });
    }
    let at = at + length;
    if !rest.starts_with(BEFORE_MANIFEST) {
        return Err(not_canonical(at, BEFORE_MANIFEST));
    }
    Ok(at + BEFORE_MANIFEST.len())
}
