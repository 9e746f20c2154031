//! The manifest's JSON text, which lies inside a JSON string of the safetensors header.
//!
//! Reading goes through [`Unescape`], a byte at a time, so that the text is never held twice; writing
//! and checking go through [`Escape`], and [`Expect`] compares instead of storing.

use std::fmt;
use std::io::{self, Read, Write};

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::layout::{MAX_TENSORS, TOKENS};
use crate::manifest::MAX_JOURNAL_BYTES;
use crate::writer::PayloadDigests;
use crate::{Digest, Fingerprint, LineageId, Manifest, Parent, Segment, StateLayout};

/// The version inside the manifest; the same as the format's.
const MANIFEST_VERSION: u32 = 1;
/// A JSON literal may take this many bytes: the longest text, each byte escaped as `\u00xx`.
const MAX_LITERAL_BYTES: usize = 6 * MAX_JOURNAL_BYTES;

#[derive(Serialize)]
struct Wire<'a> {
    version: u32,
    producer: &'a str,
    model: &'a str,
    position: u32,
    segments: &'a [Segment],
    lineage: LineageId,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<Parent>,
    salt: Digest,
    fingerprint: &'a Fingerprint,
    layout: &'a StateLayout,
    blake3: DigestsOut<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    journal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<&'a str>,
}

/// The same fields, owned. Whatever of the text this loses (key order, spaces, the names in `blake3`,
/// `null`s), the comparison with the canonical text finds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireOwned {
    version: u32,
    producer: String,
    model: String,
    position: u32,
    segments: Vec<Segment>,
    lineage: LineageId,
    #[serde(default)]
    parent: Option<Parent>,
    salt: Digest,
    fingerprint: Fingerprint,
    layout: StateLayout,
    blake3: DigestsIn,
    #[serde(default)]
    journal: Option<String>,
    #[serde(default)]
    note: Option<String>,
}

struct DigestsOut<'a>(&'a StateLayout, &'a PayloadDigests);

impl Serialize for DigestsOut<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry(TOKENS, &self.1.tokens)?;
        for (tensor, digest) in self.0.tensors.iter().zip(&self.1.tensors) {
            map.serialize_entry(&tensor.name, digest)?;
        }
        map.end()
    }
}

struct DigestsIn(PayloadDigests);

impl<'de> Deserialize<'de> for DigestsIn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = DigestsIn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a map of the digests of the tokens and of at most {MAX_TENSORS} tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DigestsIn, A::Error> {
                let wrong = |len| serde::de::Error::invalid_length(len, &"1 to 4097 digests");
                let Some((IgnoredAny, tokens)) = map.next_entry()? else {
                    return Err(wrong(0));
                };
                let mut tensors = Vec::new();
                while let Some((IgnoredAny, digest)) = map.next_entry()? {
                    if tensors.len() == MAX_TENSORS {
                        return Err(wrong(MAX_TENSORS + 2));
                    }
                    tensors.push(digest);
                }
                Ok(DigestsIn(PayloadDigests { tokens, tensors }))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// Writes the manifest's JSON text, escaped to lie inside a JSON string.
pub(crate) fn write_manifest(
    out: &mut impl Write,
    manifest: &Manifest,
    digests: &PayloadDigests,
) -> io::Result<()> {
    Ok(serde_json::to_writer(Escape(out), &wire(manifest, digests))?)
}

/// The manifest's JSON text as it is.
pub(crate) fn manifest_text(manifest: &Manifest, digests: &PayloadDigests) -> String {
    // Structs, texts and numbers only: there is nothing that could fail.
    serde_json::to_string(&wire(manifest, digests)).unwrap_or_default()
}

fn wire<'a>(manifest: &'a Manifest, digests: &'a PayloadDigests) -> Wire<'a> {
    Wire {
        version: MANIFEST_VERSION,
        producer: &manifest.producer,
        model: &manifest.model,
        position: manifest.position,
        segments: manifest.history.segments(),
        lineage: manifest.lineage,
        parent: manifest.parent,
        salt: manifest.salt,
        fingerprint: &manifest.fingerprint,
        layout: &manifest.layout,
        blake3: DigestsOut(&manifest.layout, digests),
        journal: manifest.journal.as_deref(),
        note: manifest.note.as_deref(),
    }
}

/// A manifest read from untrusted text; nothing about it has been checked but its JSON form.
pub(crate) struct Untrusted {
    pub(crate) version: u32,
    /// Without its history.
    pub(crate) manifest: Manifest,
    pub(crate) segments: Vec<Segment>,
    pub(crate) digests: PayloadDigests,
}

/// Reads the manifest's JSON text from `header`, which begins inside the JSON string that holds it.
/// Stops at the string's closing quote.
///
/// Memory is bounded by the length of the text: texts and literals have a longest length, sequences
/// cost less in memory than in the text, and the number of tensors and dimensions has a limit.
pub(crate) fn read_manifest(header: &[u8]) -> Result<Untrusted, serde_json::Error> {
    let mut json = serde_json::Deserializer::from_reader(Unescape::new(header));
    let wire = WireOwned::deserialize(&mut json)?;
    json.end()?;
    Ok(Untrusted {
        version: wire.version,
        manifest: Manifest {
            producer: wire.producer,
            model: wire.model,
            position: wire.position,
            history: crate::History::new(),
            lineage: wire.lineage,
            parent: wire.parent,
            salt: wire.salt,
            fingerprint: wire.fingerprint,
            layout: wire.layout,
            journal: wire.journal,
            note: wire.note,
        },
        segments: wire.segments,
        digests: wire.blake3.0,
    })
}

/// True for a manifest version that this reader knows.
pub(crate) const fn knows(version: u32) -> bool {
    version == MANIFEST_VERSION
}

/// Reads the text of a JSON string up to its closing quote. Only the escapes `\"` and `\\` are known:
/// a manifest has no other byte that a JSON string must escape.
struct Unescape<'a> {
    rest: &'a [u8],
    in_text: bool,
    escaped: bool,
    literal: usize,
}

impl<'a> Unescape<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Self { rest, in_text: false, escaped: false, literal: 0 }
    }

    /// Follows the inner JSON far enough to know the length of the literal at hand.
    fn count(&mut self, byte: u8) -> io::Result<()> {
        let ends = if self.in_text {
            !self.escaped && byte == b'"'
        } else {
            matches!(byte, b'"' | b',' | b':' | b'[' | b']' | b'{' | b'}')
        };
        if byte == b'"' && (ends || !self.in_text) {
            self.in_text = !self.in_text;
        }
        self.escaped = self.in_text && !self.escaped && byte == b'\\';
        self.literal = if ends { 0 } else { self.literal + 1 };
        if self.literal > MAX_LITERAL_BYTES { Err(invalid("a text is too long")) } else { Ok(()) }
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Read for Unescape<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        for slot in out {
            let (byte, taken) = match *self.rest {
                [b'"', ..] => break,
                [b'\\', byte @ (b'"' | b'\\'), ..] => (byte, 2),
                [b'\\', ..] => return Err(invalid("unknown escape in the manifest's text")),
                [byte, ..] => (byte, 1),
                [] => return Err(invalid("the manifest's text has no end")),
            };
            self.rest = &self.rest[taken..];
            self.count(byte)?;
            *slot = byte;
            filled += 1;
        }
        Ok(filled)
    }
}

/// Writes text so that it may lie inside a JSON string.
struct Escape<W>(W);

impl<W: Write> Write for Escape<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|b| matches!(b, b'"' | b'\\')) {
            self.0.write_all(&rest[..at])?;
            self.0.write_all(&[b'\\', rest[at]])?;
            rest = &rest[at + 1..];
        }
        self.0.write_all(rest)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Compares what is written with what is there.
pub(crate) struct Expect<'a> {
    there: &'a [u8],
    at: usize,
    /// What was written where the two first differ.
    pub(crate) wanted: Option<String>,
}

impl<'a> Expect<'a> {
    pub(crate) const fn new(there: &'a [u8]) -> Self {
        Self { there, at: 0, wanted: None }
    }

    /// Bytes that are equal so far.
    pub(crate) const fn equal(&self) -> usize {
        self.at
    }
}

impl Write for Expect<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let there = &self.there[self.at..];
        let equal = bytes.iter().zip(there).take_while(|(a, b)| a == b).count();
        self.at += equal;
        if equal == bytes.len() {
            return Ok(equal);
        }
        self.wanted = Some(snippet(&bytes[equal..]));
        Err(io::ErrorKind::InvalidData.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first bytes of untrusted text, printable, for messages.
pub(crate) fn snippet(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(32)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaping_round_trips() {
        let text = r#"{"a":"b\"c\\d\n","é":[]}"#;
        let mut escaped = Vec::new();
        Escape(&mut escaped).write_all(text.as_bytes()).unwrap();
        let as_json = format!("\"{}\"", std::str::from_utf8(&escaped).unwrap());
        assert_eq!(serde_json::from_str::<String>(&as_json).unwrap(), text);
        escaped.extend_from_slice(b"\",rest");
        let mut back = String::new();
        Unescape::new(&escaped).read_to_string(&mut back).unwrap();
        assert_eq!(back, text);
    }

    #[test]
    fn bad_escapes_and_missing_ends_are_refused() {
        for text in [&b"{}"[..], b"{\\n}\"", b"{\\", b"\\u0041\""] {
            let read = Unescape::new(text).read_to_end(&mut Vec::new());
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn long_literals_are_refused_and_quotes_inside_do_not_hide_them() {
        let read = |inner: &str| {
            let mut text = Vec::new();
            Escape(&mut text).write_all(inner.as_bytes()).unwrap();
            text.push(b'"');
            Unescape::new(&text).read_to_end(&mut Vec::new())
        };
        let half = "x".repeat(MAX_LITERAL_BYTES / 2);
        assert!(read(&format!("[\"{half}\",\"{half}\",\"{half}\"]")).is_ok());
        assert!(read(&format!("[\"{half}\\\"{half}\"]")).is_err());
        assert!(read(&format!("[\"{half}\\\\\",\"{half}\"]")).is_ok());
        assert!(read(&"1".repeat(MAX_LITERAL_BYTES + 1)).is_err());
    }

    #[test]
    fn expect_finds_the_first_difference() {
        let mut expect = Expect::new(b"abcdef");
        expect.write_all(b"abc").unwrap();
        assert!(expect.write_all(b"dxf").is_err());
        assert_eq!((expect.equal(), expect.wanted.as_deref()), (4, Some("xf")));
        assert!(Expect::new(b"ab").write_all(b"abc").is_err());
    }
}
