//! The frame that every object has: a header of 128 bytes that says what follows, and checksums over both.
//!
//! The layout is in docs/store.md. Reading order: length, magic, header checksum, version, fields, length of the
//! payload, checksum of the payload; only then is anything decrypted or decoded.

use crate::codec::{Compression, Encoding, decode, encode};
use crate::error::{Damage, Damaged, ReadError, WriteError};
use crate::identity::{KeyId, Named, StoreKey, TAG_BYTES};
use crate::storage::{Key, Object, Storage};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 128;
/// Plain bytes of one segment at most.
pub(crate) const MAX_SEGMENT_BYTES: u64 = 64 << 20;
/// Plain bytes of one record at most.
pub(crate) const MAX_RECORD_BYTES: u64 = 64 << 20;
/// Bytes of one object at most.
pub(crate) const MAX_OBJECT_BYTES: u64 = HEADER_BYTES as u64 + MAX_RECORD_BYTES + TAG_BYTES as u64;

/// Bytes that are read and hashed at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Bytes that the medium is asked to fetch ahead of that.
const AHEAD_BYTES: u64 = 8 << 20;
const MAGIC: &[u8; 8] = b"AMPSTORE";
const VERSION: u16 = 1;
/// Header bytes that the cipher binds the payload to, with the object's name.
const BOUND: usize = 40;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Store = 1,
    Scope = 2,
    Node = 3,
    Capsule = 4,
    Head = 5,
    Segment = 6,
    Condemned = 7,
    Memo = 8,
}

#[derive(Clone, Debug)]
pub(crate) struct Header {
    kind: u8,
    pub(crate) encoding: Encoding,
    pub(crate) sealed: bool,
    /// Bytes before coding and sealing.
    pub(crate) plain: u64,
    /// Bytes that follow the header.
    pub(crate) stored: u64,
    key: KeyId,
    nonce: [u8; 24],
    /// BLAKE3 of the bytes that follow.
    digest: [u8; 32],
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let (encoding, width) = self.encoding.codes();
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..14].copy_from_slice(&[self.kind, encoding, width, u8::from(self.sealed)]);
        out[16..24].copy_from_slice(&self.plain.to_le_bytes());
        out[24..32].copy_from_slice(&self.stored.to_le_bytes());
        out[32..40].copy_from_slice(&self.key.0);
        out[40..64].copy_from_slice(&self.nonce);
        out[64..96].copy_from_slice(&self.digest);
        let checksum = blake3::hash(&out[..96]);
        out[96..].copy_from_slice(checksum.as_bytes());
        out
    }

    fn parse(bytes: &[u8; HEADER_BYTES], kind: Kind) -> Result<Self, Damage> {
        let header = |reason: &str| Damage::Header { reason: reason.to_owned() };
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..8] != *MAGIC {
            return Err(header("it does not begin with AMPSTORE"));
        }
        if blake3::hash(&bytes[..96]).as_bytes()[..] != bytes[96..] {
            return Err(header("its checksum does not match"));
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != VERSION {
            return Err(Damage::Version { found });
        }
        if bytes[10] != kind as u8 {
            return Err(header(&format!("it is of kind {}, not {}", bytes[10], kind as u8)));
        }
        let encoding = Encoding::from_codes(bytes[11], bytes[12])
            .ok_or_else(|| header("it has an unknown encoding"))?;
        if bytes[13] > 1 || bytes[14..16] != [0, 0] {
            return Err(header("its reserved bytes are not zero"));
        }
        let sealed = bytes[13] == 1;
        let (plain, stored) = (number(16), number(24));
        let max = if kind == Kind::Segment { MAX_SEGMENT_BYTES } else { MAX_RECORD_BYTES };
        let overhead = if sealed { TAG_BYTES as u64 } else { 0 };
        let fits = match encoding {
            Encoding::Plain => plain.checked_add(overhead) == Some(stored),
            _ => kind == Kind::Segment && stored < plain.saturating_add(overhead),
        };
        if plain > max || !fits {
            return Err(header("its lengths do not agree"));
        }
        Ok(Self {
            kind: bytes[10],
            encoding,
            sealed,
            plain,
            stored,
            key: KeyId(std::array::from_fn(|i| bytes[32 + i])),
            nonce: std::array::from_fn(|i| bytes[40 + i]),
            digest: std::array::from_fn(|i| bytes[64 + i]),
        })
    }
}

/// What the cipher binds a payload to: what the header says of it, and the name it is published under.
fn associated(header: &Header, key: &Key) -> Vec<u8> {
    let mut bytes = header.to_bytes()[..BOUND].to_vec();
    bytes.extend_from_slice(key.to_string().as_bytes());
    bytes
}

/// An object ready to be published: its header, and its payload if that is not the plain pieces.
pub(crate) struct Framed {
    header: [u8; HEADER_BYTES],
    payload: Option<Vec<u8>>,
}

impl Framed {
    /// The object's bytes; `pieces` are those that it was made from.
    pub(crate) fn slices<'a>(&'a self, pieces: &[&'a [u8]]) -> Vec<&'a [u8]> {
        let mut slices = vec![self.header.as_slice()];
        match &self.payload {
            Some(payload) => slices.push(payload),
            None => slices.extend_from_slice(pieces),
        }
        slices
    }

    pub(crate) fn bytes(&self, pieces: &[&[u8]]) -> u64 {
        self.slices(pieces).iter().map(|slice| slice.len() as u64).sum()
    }
}

/// Frames `pieces`, laid end to end. `digest` is their BLAKE3 where that is known already.
pub(crate) fn frame(
    kind: Kind,
    key: &Key,
    secret: Option<&StoreKey>,
    (compression, width): (Compression, u8),
    pieces: &[&[u8]],
    digest: Option<[u8; 32]>,
) -> Result<Framed, WriteError> {
    let plain: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
    let max = if kind == Kind::Segment { MAX_SEGMENT_BYTES } else { MAX_RECORD_BYTES };
    if plain > max {
        return Err(WriteError::TooLong { what: "an object", bytes: plain, max });
    }
    let coded = if compression == Compression::None {
        None
    } else {
        encode(compression, width, &pieces.concat())
            .map_err(|source| WriteError::Compression { object: key.clone(), source })?
    };
    let (encoding, mut payload) = match coded {
        Some((encoding, bytes)) => (encoding, Some(bytes)),
        None => (Encoding::Plain, None),
    };
    let mut header = Header {
        kind: kind as u8,
        encoding,
        sealed: secret.is_some(),
        plain,
        stored: payload.as_ref().map_or(plain, |p| p.len() as u64),
        key: KeyId::default(),
        nonce: [0; 24],
        digest: [0; 32],
    };
    if let Some(secret) = secret {
        header.stored += TAG_BYTES as u64;
        header.key = secret.id();
        let mut bytes = payload.unwrap_or_else(|| pieces.concat());
        header.nonce = secret.seal(&associated(&header, key), &mut bytes)?;
        payload = Some(bytes);
    }
    header.digest = match (&payload, digest) {
        (None, Some(digest)) => digest,
        (Some(payload), _) => *blake3::hash(payload).as_bytes(),
        (None, None) => {
            let mut hasher = blake3::Hasher::new();
            for piece in pieces {
                hasher.update(piece);
            }
            *hasher.finalize().as_bytes()
        }
    };
    Ok(Framed { header: header.to_bytes(), payload })
}

/// An object whose header has been read and checked, and whose payload has not been read.
pub(crate) struct Opened {
    key: Key,
    pub(crate) header: Header,
    object: Box<dyn Object>,
}

/// Opens an object and checks its header and length; [`Damage::Missing`] where there is none.
pub(crate) fn open(storage: &dyn Storage, key: &Key, kind: Kind) -> Result<Opened, ReadError> {
    let missing = || Damaged { object: key.clone(), damage: Damage::Missing };
    let object = storage.open(key, MAX_OBJECT_BYTES)?.ok_or_else(missing)?;
    parse(key, kind, object)
}

/// Checks the header and length of an object that is open.
pub(crate) fn parse(key: &Key, kind: Kind, object: Box<dyn Object>) -> Result<Opened, ReadError> {
    let damaged = |damage| Damaged { object: key.clone(), damage };
    let actual = object.bytes();
    if actual < HEADER_BYTES as u64 {
        let expected = HEADER_BYTES as u64;
        return Err(damaged(Damage::Length { expected, actual }).into());
    }
    let mut bytes = [0; HEADER_BYTES];
    object.read_at(0, &mut bytes)?;
    let header = Header::parse(&bytes, kind).map_err(damaged)?;
    let expected = HEADER_BYTES as u64 + header.stored;
    if actual != expected {
        return Err(damaged(Damage::Length { expected, actual }).into());
    }
    Ok(Opened { key: key.clone(), header, object })
}

impl Opened {
    fn damaged(&self, damage: Damage) -> ReadError {
        Damaged { object: self.key.clone(), damage }.into()
    }

    /// Whether the payload lies in the file as it is in memory.
    fn is_plain(&self) -> bool {
        self.header.encoding == Encoding::Plain && !self.header.sealed
    }

    fn check(&self, payload: &[u8]) -> Result<(), ReadError> {
        if *blake3::hash(payload).as_bytes() == self.header.digest {
            Ok(())
        } else {
            Err(self.damaged(Damage::Checksum))
        }
    }

    /// Reads and checks the payload as it is stored: all that can be checked without the key.
    fn stored(&self) -> Result<Vec<u8>, ReadError> {
        let mut payload = vec![0; self.header.stored as usize];
        self.object.read_at(HEADER_BYTES as u64, &mut payload)?;
        self.check(&payload)?;
        Ok(payload)
    }

    /// Checks what is stored without decoding it.
    pub(crate) fn check_stored(&self) -> Result<(), ReadError> {
        self.stored().map(|_| ())
    }

    fn unseal(&self, secret: Option<&StoreKey>, payload: &mut Vec<u8>) -> Result<(), ReadError> {
        let header = &self.header;
        match (header.sealed, secret) {
            (false, None) => Ok(()),
            // A plain object in a sealed store was put there by somebody without the key.
            (false, Some(_)) => Err(self.damaged(Damage::Seal)),
            (true, Some(secret)) if secret.id() == header.key => {
                let associated = associated(header, &self.key);
                if secret.open(&header.nonce, &associated, payload) {
                    Ok(())
                } else {
                    Err(self.damaged(Damage::Seal))
                }
            }
            (true, _) => Err(self.damaged(Damage::Sealed { key: header.key })),
        }
    }

    /// The payload of a record. Its name is for the caller to check.
    pub(crate) fn record(&self, secret: Option<&StoreKey>) -> Result<Vec<u8>, ReadError> {
        let mut payload = self.stored()?;
        self.unseal(secret, &mut payload)?;
        Ok(payload)
    }

    /// Reads a segment into `plain`, whose length is the segment's, and checks everything: on return the bytes are those
    /// whose digest is `name`. After an error `plain` holds anything.
    pub(crate) fn segment(
        &self,
        secret: Option<&StoreKey>,
        name: ampoule_capsule::Digest,
        plain: &mut [u8],
    ) -> Result<(), ReadError> {
        if self.header.plain != plain.len() as u64 {
            let (expected, actual) = (plain.len() as u64, self.header.plain);
            return Err(self.damaged(Damage::Length { expected, actual }));
        }
        if self.is_plain() && secret.is_none() {
            // The checksum is the name: one pass over the bytes, piece by piece, so that a piece is hashed while it is in
            // the processor's cache and the medium fetches the next.
            let mut hasher = blake3::Hasher::new();
            let mut at = HEADER_BYTES as u64;
            self.object.prefetch(at, AHEAD_BYTES);
            for piece in plain.chunks_mut(PIECE_BYTES) {
                self.object.prefetch(at + AHEAD_BYTES, PIECE_BYTES as u64);
                self.object.read_at(at, piece)?;
                hasher.update(piece);
                at += piece.len() as u64;
            }
            if *hasher.finalize().as_bytes() != self.header.digest {
                return Err(self.damaged(Damage::Checksum));
            }
            return if self.header.digest == *name.as_bytes() {
                Ok(())
            } else {
                Err(self.damaged(Damage::Name))
            };
        }
        let mut payload = self.stored()?;
        self.unseal(secret, &mut payload)?;
        decode(self.header.encoding, &payload, plain)
            .map_err(|reason| self.damaged(Damage::Decode { reason }))?;
        // A sealed segment is bound to its name by the cipher.
        if secret.is_none() && Named::Segment.digest(None, &[plain]) != name {
            return Err(self.damaged(Damage::Name));
        }
        Ok(())
    }
}
