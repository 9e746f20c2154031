//! BLAKE3 digests, written as 64 lower-case hexadecimal characters.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A BLAKE3 digest of 32 bytes. Its text form is 64 lower-case hexadecimal characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

/// Characters of a digest's text form.
pub(crate) const HEX_LEN: usize = 64;

impl Digest {
    /// The BLAKE3 digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        blake3::hash(bytes).into()
    }

    /// The BLAKE3 digest of the pieces laid end to end.
    pub fn of_pieces(pieces: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for piece in pieces {
            hasher.update(piece);
        }
        hasher.finalize().into()
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The text form as ASCII bytes, without allocating.
    pub(crate) fn hex(&self) -> [u8; HEX_LEN] {
        const CHARS: &[u8; 16] = b"0123456789abcdef";
        let mut out = [0; HEX_LEN];
        for (pair, byte) in out.chunks_exact_mut(2).zip(self.0) {
            pair[0] = CHARS[usize::from(byte >> 4)];
            pair[1] = CHARS[usize::from(byte & 15)];
        }
        out
    }

    /// Reads the text form from ASCII bytes.
    pub(crate) fn from_hex(text: &[u8]) -> Option<Self> {
        fn nibble(c: u8) -> Option<u8> {
            match c {
                b'0'..=b'9' => Some(c - b'0'),
                b'a'..=b'f' => Some(c - b'a' + 10),
                _ => None,
            }
        }
        if text.len() != HEX_LEN {
            return None;
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Some(Self(out))
    }
}

/// The digest of a tenant's salt, which keeps the capsules of different tenants apart.
///
/// The salt itself never enters a file. It is hashed under its own context, so the digest equals that
/// of no payload. A salt that is short can be guessed from its digest.
pub fn salt_digest(salt: &[u8]) -> Digest {
    Digest(blake3::derive_key("ampoule capsule v1 tenant salt", salt))
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hex().into_iter().try_for_each(|c| fmt::Write::write_char(f, char::from(c)))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The text is not a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a BLAKE3 digest: wanted {HEX_LEN} lower-case hexadecimal characters")]
pub struct ParseDigestError;

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_hex(text.as_bytes()).ok_or(ParseDigestError)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = Digest;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{HEX_LEN} lower-case hexadecimal characters")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Digest, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Hex).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_is_strict() {
        let digest = Digest::of(b"abc");
        // The published BLAKE3 digest of "abc".
        let hex = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85";
        assert_eq!(digest.to_string(), hex);
        assert_eq!(hex.parse(), Ok(digest));
        assert_eq!(hex.to_uppercase().parse::<Digest>(), Err(ParseDigestError));
        assert_eq!(hex[1..].parse::<Digest>(), Err(ParseDigestError));
        assert_eq!(format!("{hex}0").parse::<Digest>(), Err(ParseDigestError));
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
        assert!(serde_json::from_str::<Digest>("\"6437\"").is_err());
    }

    #[test]
    fn pieces_hash_like_the_whole() {
        assert_eq!(Digest::of_pieces(&[b"a", b"", b"bc"]), Digest::of(b"abc"));
        assert_ne!(salt_digest(b"abc"), Digest::of(b"abc"));
    }
}
