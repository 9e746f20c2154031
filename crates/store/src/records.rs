//! The records: small JSON texts that say what belongs together. docs/store.md has every field.

use std::ops::Range;

use ampoule_capsule::{
    Digest, Fingerprint, Growth, History, LineageError, LineageId, LineageScope, MAX_JOURNAL_BYTES,
    MAX_NOTE_BYTES, MAX_TEXT_BYTES, Origin, Parent, Segment, StateLayout,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::frame::MAX_SEGMENT_BYTES;
use crate::identity::{CapsuleId, NodeId, ScopeId, SegmentId};

/// The version of every record.
pub(crate) const VERSION: u32 = 1;
/// UTF-8 bytes of a head's name at most.
pub(crate) const MAX_HEAD_BYTES: usize = 255;

/// What all nodes of one tree have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// What must be equal for a capsule to fit.
    pub fingerprint: Fingerprint,
    /// The state tensors.
    pub layout: StateLayout,
    /// [`salt_digest`](ampoule_capsule::salt_digest) of the tenant.
    pub salt: Digest,
}

impl Scope {
    /// What the lineage nodes of this tree have in common.
    pub fn lineage(&self) -> LineageScope {
        LineageScope { fingerprint: self.fingerprint.digest(), salt: self.salt }
    }

    /// The bytes that each tensor adds for `rows` more positions, in the order in which a node's rows are stored: tensors
    /// of 4 bytes an element first, then 2, then 1, each group in the order of the layout. The layout must be valid.
    pub(crate) fn row_parts(&self, rows: usize) -> Vec<Piece> {
        self.parts(Growth::Rows, |t| t.row_bytes().map_or(0, |bytes| bytes.saturating_mul(rows)))
    }

    /// The same of the tensors that are fixed.
    pub(crate) fn fixed_parts(&self) -> Vec<Piece> {
        self.parts(Growth::Fixed, |t| t.bytes_at(0).unwrap_or(0))
    }

    fn parts(
        &self,
        growth: Growth,
        bytes: impl Fn(&ampoule_capsule::StateTensor) -> usize,
    ) -> Vec<Piece> {
        let tensors = self.layout.tensors.iter().enumerate().filter(|(_, t)| t.growth == growth);
        let mut parts: Vec<Piece> = tensors
            .map(|(tensor, t)| Piece {
                tensor,
                bytes: bytes(t),
                width: t.dtype.block_bytes() as u8,
            })
            .filter(|piece| piece.bytes > 0)
            .collect();
        parts.sort_by_key(|piece| std::cmp::Reverse(piece.width));
        parts
    }
}

/// The bytes of one tensor in a part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Its index in the layout.
    pub(crate) tensor: usize,
    pub(crate) bytes: usize,
    /// Bytes of an element.
    pub(crate) width: u8,
}

/// A segment as a record names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentRef {
    /// The digest of its bytes.
    pub id: SegmentId,
    /// Its bytes.
    pub bytes: u64,
    /// Which object of that digest: another than 0 where the earlier ones were about to be deleted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub generation: u32,
}

impl SegmentRef {
    pub(crate) fn name(&self) -> String {
        segment_name(self.id, self.generation)
    }
}

pub(crate) fn segment_name(id: SegmentId, generation: u32) -> String {
    if generation == 0 { id.to_string() } else { format!("{id}.{generation}") }
}

// The signature is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoreRecord {
    pub(crate) version: u32,
    pub(crate) producer: String,
    /// The id of the key, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    pub(crate) grace_seconds: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScopeRecord {
    pub(crate) version: u32,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) layout: StateLayout,
    pub(crate) salt: Digest,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeRecord {
    pub(crate) version: u32,
    pub(crate) scope: ScopeId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<NodeId>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) generation: u32,
    pub(crate) start: u32,
    pub(crate) end: u32,
    pub(crate) spans: Vec<Segment>,
    pub(crate) lineage: LineageId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<Parent>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) journal: Option<String>,
    pub(crate) rows: Vec<SegmentRef>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CapsuleRecord {
    pub(crate) version: u32,
    pub(crate) node: NodeId,
    pub(crate) position: u32,
    pub(crate) producer: String,
    pub(crate) model: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    pub(crate) fixed: Vec<SegmentRef>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HeadRecord {
    pub(crate) version: u32,
    pub(crate) name: String,
    pub(crate) capsule: CapsuleId,
    /// Random: so no two writes of a head are equal, and a writer knows its own.
    pub(crate) write: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CondemnedRecord {
    pub(crate) version: u32,
    pub(crate) objects: Vec<String>,
}

/// The bytes of a record.
pub(crate) fn to_json(record: &impl Serialize) -> Vec<u8> {
    // Plain structs of numbers, texts and sequences: serde_json has nothing to refuse.
    serde_json::to_vec(record).expect("a record is JSON")
}

pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

/// A node's bytes: the length of the JSON text as u64, the text, then the tokens, 4 bytes little-endian each.
pub(crate) fn node_bytes(record: &NodeRecord, tokens: &[u32]) -> Vec<u8> {
    let json = to_json(record);
    let mut bytes = Vec::with_capacity(8 + json.len() + 4 * tokens.len());
    bytes.extend_from_slice(&(json.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&json);
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes());
    }
    bytes
}

pub(crate) fn node_from_bytes(bytes: &[u8]) -> Result<(NodeRecord, Vec<u32>), String> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or("it is too short")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let (json, tokens) = rest.split_at_checked(length).ok_or("its text is cut short")?;
    let record: NodeRecord = from_json(json)?;
    let (tokens, left) = tokens.as_chunks::<4>();
    if !left.is_empty() {
        return Err(format!("{} bytes are left over after its tokens", left.len()));
    }
    Ok((record, tokens.iter().map(|token| u32::from_le_bytes(*token)).collect()))
}

fn check_version(version: u32) -> Result<(), String> {
    if version == VERSION { Ok(()) } else { Err(format!("record version {version} is not known")) }
}

fn check_text(field: &str, text: &str, max: usize) -> Result<(), String> {
    if text.len() <= max {
        Ok(())
    } else {
        Err(format!("{field} has {} bytes, at most {max} are allowed", text.len()))
    }
}

fn check_segments(segments: &[SegmentRef], pieces: &[Piece]) -> Result<(), String> {
    let wanted = pieces.iter().fold(0_u64, |sum, piece| sum.saturating_add(piece.bytes as u64));
    let found = segments.iter().fold(0_u64, |sum, segment| sum.saturating_add(segment.bytes));
    if let Some(wrong) = segments.iter().find(|s| s.bytes == 0 || s.bytes > MAX_SEGMENT_BYTES) {
        return Err(format!("segment {} has {} bytes", wrong.id, wrong.bytes));
    }
    if wanted == found {
        Ok(())
    } else {
        Err(format!("its segments have {found} bytes, its state takes {wanted}"))
    }
}

impl StoreRecord {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_version(self.version)?;
        check_text("producer", &self.producer, MAX_TEXT_BYTES)
    }
}

impl ScopeRecord {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_version(self.version)?;
        self.layout.validate().map_err(|e| e.to_string())?;
        if self.fingerprint.layout == self.layout.digest() {
            Ok(())
        } else {
            Err("its fingerprint is of another layout".to_owned())
        }
    }
}

/// Checks that spans follow one another from `start` to `end`, none empty, neighbours of one origin merged.
pub(crate) fn check_spans(spans: &[Segment], start: u32, end: u32) -> Result<(), LineageError> {
    let mut expected = start;
    let mut before: Option<Origin> = None;
    for &Segment { start, end, origin } in spans {
        if start != expected {
            return Err(LineageError::Gap { start, end, expected });
        }
        if end <= start {
            return Err(LineageError::Empty { start, end });
        }
        if before == Some(origin) {
            return Err(LineageError::Unmerged { at: start });
        }
        (expected, before) = (end, Some(origin));
    }
    if expected == end { Ok(()) } else { Err(LineageError::Gap { start: end, end, expected }) }
}

/// The lineage node that follows `parent` (or `from`, or the root) by these spans.
pub(crate) fn lineage_of(
    scope: &LineageScope,
    parent: Option<LineageId>,
    from: Option<Parent>,
    start: u32,
    spans: &[Segment],
    tokens: &[u32],
) -> Result<LineageId, LineageError> {
    let (mut id, cut) = match (parent, from) {
        (Some(parent), _) => (parent, start),
        (None, Some(from)) => (from.id, from.position),
        (None, None) => (scope.root(), start),
    };
    for span in spans.iter().filter(|span| span.end > cut) {
        let span = Segment { start: span.start.max(cut), ..*span };
        let range = (span.start - start) as usize..(span.end - start) as usize;
        let tokens = tokens.get(range).ok_or(LineageError::TokenCount {
            start: span.start,
            end: span.end,
            tokens: tokens.len(),
        })?;
        id = scope.extend(id, span, tokens)?;
    }
    Ok(id)
}

impl NodeRecord {
    /// Checks everything that can be told from the record, its tokens and its scope; the parent is checked by
    /// [`check_parent`](Self::check_parent).
    pub(crate) fn check(&self, scope: &Scope, tokens: &[u32]) -> Result<(), String> {
        check_version(self.version)?;
        check_text("journal", self.journal.as_deref().unwrap_or_default(), MAX_JOURNAL_BYTES)?;
        check_spans(&self.spans, self.start, self.end).map_err(|e| e.to_string())?;
        if self.start > self.end || tokens.len() != (self.end - self.start) as usize {
            return Err(format!("{} tokens for {}..{}", tokens.len(), self.start, self.end));
        }
        if self.parent.is_none() && self.start != 0 {
            return Err(format!("it has no parent, but begins at {}", self.start));
        }
        if self.from.is_some_and(|from| self.parent.is_some() || from.position >= self.end) {
            return Err("its lineage begins from a node that it cannot begin from".to_owned());
        }
        scope.layout.bytes_at(self.end).map_err(|e| e.to_string())?;
        check_segments(&self.rows, &scope.row_parts(tokens.len()))
    }

    /// Checks that it follows its parent: its scope, position and lineage, by their values.
    pub(crate) fn check_parent(
        &self,
        scope: &Scope,
        parent: Option<(ScopeId, u32, LineageId)>,
        tokens: &[u32],
    ) -> Result<(), String> {
        if let Some((parent_scope, end, _)) = parent
            && (parent_scope != self.scope || end != self.start)
        {
            return Err(format!("its parent ends at {end} or is of another scope"));
        }
        let parent = parent.map(|(_, _, lineage)| lineage);
        let lineage =
            lineage_of(&scope.lineage(), parent, self.from, self.start, &self.spans, tokens)
                .map_err(|e| e.to_string())?;
        if lineage == self.lineage {
            Ok(())
        } else {
            Err(format!("its lineage is {}, its tokens give {lineage}", self.lineage))
        }
    }
}

impl CapsuleRecord {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_version(self.version)?;
        check_text("producer", &self.producer, MAX_TEXT_BYTES)?;
        check_text("model", &self.model, MAX_TEXT_BYTES)?;
        check_text("note", self.note.as_deref().unwrap_or_default(), MAX_NOTE_BYTES)
    }

    pub(crate) fn check_node(&self, scope: &Scope, end: u32) -> Result<(), String> {
        if self.position != end {
            return Err(format!("it is at position {}, its node ends at {end}", self.position));
        }
        check_segments(&self.fixed, &scope.fixed_parts())
    }
}

impl HeadRecord {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_version(self.version)?;
        check_text("name", &self.name, MAX_HEAD_BYTES)
    }
}

/// Joins the spans of a chain.
pub(crate) fn history<'a>(spans: impl Iterator<Item = &'a Segment>) -> History {
    let mut history = History::new();
    for span in spans {
        // Checked spans follow one another and end within u32.
        let _ = history.append(span.origin, span.end - span.start);
    }
    history
}

/// One segment to be: bytes of an element, and the ranges of tensors that it holds.
pub(crate) type Cut = (u8, Vec<(usize, Range<usize>)>);

/// Cuts a part into segments: tensor by tensor, at most `segment_bytes` each, elements of one width in each.
pub(crate) fn cut(pieces: &[Piece], segment_bytes: usize) -> Vec<Cut> {
    let mut segments: Vec<Cut> = Vec::new();
    let mut room = 0;
    for piece in pieces {
        if segments.last().is_none_or(|(width, _)| *width != piece.width) {
            room = 0;
        }
        let mut at = 0;
        while at < piece.bytes {
            if room == 0 {
                segments.push((piece.width, Vec::new()));
                room = segment_bytes;
            }
            let end = piece.bytes.min(at + room);
            if let Some((_, ranges)) = segments.last_mut() {
                ranges.push((piece.tensor, at..end));
            }
            room -= end - at;
            at = end;
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_by_width_and_size() {
        let piece = |tensor, bytes, width| Piece { tensor, bytes, width };
        let cut = cut(&[piece(3, 10, 4), piece(1, 6, 4), piece(2, 20, 2), piece(0, 1, 1)], 12);
        let expected = [
            (4, vec![(3, 0..10), (1, 0..2)]),
            (4, vec![(1, 2..6)]),
            (2, vec![(2, 0..12)]),
            (2, vec![(2, 12..20)]),
            (1, vec![(0, 0..1)]),
        ];
        assert_eq!(cut, expected);
        assert!(super::cut(&[], 12).is_empty());
    }

    #[test]
    fn a_node_reads_back() {
        let record = NodeRecord {
            version: 1,
            scope: ScopeId(Digest::of(b"s")),
            parent: None,
            generation: 0,
            start: 0,
            end: 2,
            spans: vec![Segment { start: 0, end: 2, origin: Origin::Decode }],
            lineage: LineageId(Digest::of(b"l")),
            from: None,
            journal: Some("[]".to_owned()),
            rows: Vec::new(),
        };
        let bytes = node_bytes(&record, &[7, u32::MAX]);
        assert_eq!(node_from_bytes(&bytes), Ok((record, vec![7, u32::MAX])));
        for end in 0..bytes.len() - 8 {
            assert!(node_from_bytes(&bytes[..end]).is_err());
        }
        assert!(node_from_bytes(&bytes[..bytes.len() - 1]).is_err());
        let mut long = bytes.clone();
        long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(node_from_bytes(&long).is_err());
    }
}
