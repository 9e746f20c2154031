//! What objects are called, and the key that a sealed store derives everything from.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use ampoule_capsule::{Digest, ParseDigestError};
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use serde::{Deserialize, Serialize};

use crate::error::KeyError;

macro_rules! identities {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Digest);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = ParseDigestError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    )*};
}

identities! {
    /// A stored capsule: the digest of its record, which names its node and its fixed state. Equal capsules have equal
    /// ids, and the id vouches for everything below it: the record, the chain of nodes, every byte of every segment.
    CapsuleId;
    /// A stored row node: the digest of its record, which names its parent and its own rows.
    NodeId;
    /// What nodes of one tree have in common: the digest of fingerprint, layout and salt.
    ScopeId;
    /// A segment: the digest of its bytes as they are in memory, before compression and encryption.
    SegmentId;
}

/// A name that nobody else chooses: 16 random bytes in hexadecimal.
pub(crate) fn random_name() -> Result<String, KeyError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| KeyError::Randomness { reason: e.to_string() })?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// What an object's name is the digest of.
#[derive(Clone, Copy)]
pub(crate) enum Named {
    Scope,
    Node,
    Capsule,
    Head,
    Segment,
    Memo,
}

impl Named {
    const fn context(self) -> &'static str {
        match self {
            Self::Scope => "ampoule store v1 scope",
            Self::Node => "ampoule store v1 node",
            Self::Capsule => "ampoule store v1 capsule",
            Self::Head => "ampoule store v1 head",
            Self::Segment => "ampoule store v1 segment",
            Self::Memo => "ampoule store v1 memo",
        }
    }

    /// The digest of the pieces laid end to end. With a key nobody without it can test a guess at the contents.
    pub(crate) fn digest(self, key: Option<&StoreKey>, pieces: &[&[u8]]) -> Digest {
        let mut hasher = match (key, self) {
            (Some(key), _) => {
                blake3::Hasher::new_keyed(&blake3::derive_key(self.context(), &key.names))
            }
            // Plain, so that the checksum of an unencoded segment and its name are one computation.
            (None, Self::Segment) => blake3::Hasher::new(),
            (None, _) => blake3::Hasher::new_derive_key(self.context()),
        };
        for piece in pieces {
            hasher.update(piece);
        }
        hasher.finalize().into()
    }
}

/// The key of a sealed store: 32 secret bytes, from which the cipher's key, the key of the names and the key's public
/// id are derived.
#[derive(Clone)]
pub struct StoreKey {
    cipher: [u8; 32],
    names: [u8; 32],
    id: KeyId,
}

/// Says which key sealed an object, without giving it away: the first 8 bytes of a digest of the key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl StoreKey {
    /// Takes 32 bytes that were made at random and are kept secret.
    pub fn new(secret: &[u8; 32]) -> Self {
        let mut id = [0; 8];
        id.copy_from_slice(&blake3::derive_key("ampoule store v1 key id", secret)[..8]);
        Self {
            cipher: blake3::derive_key("ampoule store v1 cipher key", secret),
            names: blake3::derive_key("ampoule store v1 name key", secret),
            id: KeyId(id),
        }
    }

    /// A new random key, with its text form of 64 hexadecimal characters to be kept.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn generate() -> Result<(Self, String), KeyError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|e| KeyError::Randomness { reason: e.to_string() })?;
        Ok((Self::new(&secret), Digest(secret).to_string()))
    }

    /// Reads 64 hexadecimal characters; white space around them is ignored.
    ///
    /// # Errors
    /// [`KeyError::Form`] with the name of where the text came from, never the text.
    pub fn from_hex(text: &str, origin: &str) -> Result<Self, KeyError> {
        let form = || KeyError::Form { origin: origin.to_owned() };
        let secret: Digest = text.trim().to_ascii_lowercase().parse().map_err(|_| form())?;
        Ok(Self::new(secret.as_bytes()))
    }

    /// Reads a key file: 32 bytes as they are, or 64 hexadecimal characters.
    ///
    /// # Errors
    /// If the file cannot be read or has another form.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let origin = path.display().to_string();
        let mut bytes = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| {
            std::io::Read::read_to_end(&mut std::io::Read::take(file, 129), &mut bytes)
        });
        read.map_err(|source| KeyError::Read { origin: origin.clone(), source })?;
        if let Ok(secret) = <[u8; 32]>::try_from(bytes.as_slice()) {
            return Ok(Self::new(&secret));
        }
        let text = std::str::from_utf8(&bytes).unwrap_or_default();
        Self::from_hex(text, &origin)
    }

    /// Reads an environment variable of 64 hexadecimal characters; `None` where it is not set.
    ///
    /// # Errors
    /// If it has another form.
    pub fn from_environment(variable: &str) -> Result<Option<Self>, KeyError> {
        match std::env::var(variable) {
            Ok(text) => {
                Self::from_hex(&text, &format!("environment variable {variable}")).map(Some)
            }
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(_) => Err(KeyError::Form { origin: format!("environment variable {variable}") }),
        }
    }

    /// Which key this is; not secret.
    pub const fn id(&self) -> KeyId {
        self.id
    }

    /// Encrypts in place; returns the nonce, random and so never used twice, and appends the tag.
    pub(crate) fn seal(
        &self,
        associated: &[u8],
        bytes: &mut Vec<u8>,
    ) -> Result<[u8; 24], KeyError> {
        let mut nonce = [0; 24];
        getrandom::fill(&mut nonce).map_err(|e| KeyError::Randomness { reason: e.to_string() })?;
        self.seal_with(&nonce, associated, bytes)?;
        Ok(nonce)
    }

    fn seal_with(
        &self,
        nonce: &[u8; 24],
        associated: &[u8],
        bytes: &mut Vec<u8>,
    ) -> Result<(), KeyError> {
        let cipher = XChaCha20Poly1305::new(&self.cipher.into());
        let tag = cipher
            .encrypt_inout_detached(&XNonce::from(*nonce), associated, bytes.as_mut_slice().into())
            .map_err(|_| KeyError::TooLong { bytes: bytes.len() })?;
        bytes.extend_from_slice(&tag);
        Ok(())
    }

    /// Checks the tag, then decrypts in place and cuts the tag off. `false`: not sealed by this key for this purpose.
    pub(crate) fn open(&self, nonce: &[u8; 24], associated: &[u8], bytes: &mut Vec<u8>) -> bool {
        let Some((body, tag)) = bytes.split_last_chunk_mut::<TAG_BYTES>() else { return false };
        let cipher = XChaCha20Poly1305::new(&self.cipher.into());
        let tag = Tag::from(*tag);
        let whole =
            cipher.decrypt_inout_detached(&XNonce::from(*nonce), associated, body.into(), &tag);
        bytes.truncate(bytes.len() - TAG_BYTES);
        whole.is_ok()
    }
}

/// Bytes that sealing adds.
pub(crate) const TAG_BYTES: usize = 16;

impl fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreKey({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealing_is_bound_to_key_and_purpose() {
        let key = StoreKey::new(&[7; 32]);
        let mut bytes = b"what somebody said".to_vec();
        let nonce = key.seal(b"purpose", &mut bytes).unwrap();
        assert_eq!(bytes.len(), 18 + TAG_BYTES);
        let open = |key: &StoreKey, nonce: &[u8; 24], purpose: &[u8], mut bytes: Vec<u8>| {
            key.open(nonce, purpose, &mut bytes).then_some(bytes)
        };
        assert_eq!(open(&key, &nonce, b"purpose", bytes.clone()).unwrap(), b"what somebody said");
        assert_eq!(open(&StoreKey::new(&[8; 32]), &nonce, b"purpose", bytes.clone()), None);
        assert_eq!(open(&key, &nonce, b"another", bytes.clone()), None);
        assert_eq!(open(&key, &[0; 24], b"purpose", bytes.clone()), None);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&key, &nonce, b"purpose", flipped), None);
        }
        assert_eq!(open(&key, &nonce, b"purpose", bytes[..10].to_vec()), None);
        let mut again = b"what somebody said".to_vec();
        assert_ne!(key.seal(b"purpose", &mut again).unwrap(), nonce, "a nonce used twice");
    }

    #[test]
    fn the_cipher_is_the_published_one() {
        // draft-irtf-cfrg-xchacha-03, A.3.1.
        let hex = |text: &str| -> Vec<u8> {
            let byte = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).unwrap();
            (0..text.len()).step_by(2).map(byte).collect()
        };
        let secret: [u8; 32] = std::array::from_fn(|i| 0x80 + i as u8);
        let nonce: [u8; 24] = std::array::from_fn(|i| 0x40 + i as u8);
        let key = StoreKey { cipher: secret, names: secret, id: KeyId::default() };
        let mut text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one \
                         tip for the future, sunscreen would be it."
            .to_vec();
        key.seal_with(&nonce, &hex("50515253c0c1c2c3c4c5c6c7"), &mut text).unwrap();
        assert_eq!(text[..16], hex("bd6d179d3e83d43b9576579493c0e939"));
        assert_eq!(text[text.len() - 16..], hex("c0875924c1c7987947deafd8780acf49"));
    }

    #[test]
    fn names_without_the_key_say_nothing() {
        let (a, b) = (StoreKey::new(&[1; 32]), StoreKey::new(&[2; 32]));
        let name = |key: Option<&StoreKey>, named: Named| named.digest(key, &[b"guess"]);
        let all = [
            name(None, Named::Segment),
            name(Some(&a), Named::Segment),
            name(Some(&b), Named::Segment),
            name(Some(&a), Named::Node),
            name(None, Named::Node),
            name(None, Named::Capsule),
        ];
        for (i, x) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|y| x != y));
        }
        assert_eq!(all[0], Digest::of(b"guess"));
        assert_eq!(Named::Node.digest(Some(&a), &[b"gu", b"ess"]), all[3]);
    }

    #[test]
    fn keys_are_read_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let (key, text) = StoreKey::generate().unwrap();
        std::fs::write(&path, format!("{text}\n")).unwrap();
        assert_eq!(StoreKey::from_file(&path).unwrap().id(), key.id());
        std::fs::write(&path, [9; 32]).unwrap();
        assert_eq!(StoreKey::from_file(&path).unwrap().id(), StoreKey::new(&[9; 32]).id());
        std::fs::write(&path, [9; 33]).unwrap();
        let error = StoreKey::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("key") && error.contains("64 hexadecimal"), "{error}");
        let error = StoreKey::from_hex("secret words", "here").unwrap_err().to_string();
        assert!(!error.contains("secret words"), "{error}");
        assert!(!format!("{key:?}").contains(&text[..16]));
        assert!(StoreKey::from_environment("AMPOULE_NO_SUCH_VARIABLE").unwrap().is_none());
    }
}
