//! How the rows of a boundary were made, and the identity that follows from it.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Which kind of run made a row. The two may differ in their last bits, so they are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Many tokens at a time.
    Prefill,
    /// One token at a time.
    Decode,
}

/// A run of positions `start..end` that were made in the same way; never empty in a [`History`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// First position.
    pub start: u32,
    /// One past the last position.
    pub end: u32,
    /// What made them.
    pub origin: Origin,
}

impl Segment {
    const fn range(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// A history or lineage that does not hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineageError {
    /// A segment does not begin where the one before it ended.
    #[error("segment {start}..{end} does not begin at {expected}, where the one before it ended")]
    Gap {
        /// Its start.
        start: u32,
        /// Its end.
        end: u32,
        /// Where it should begin.
        expected: u32,
    },
    /// A segment holds no position.
    #[error("segment {start}..{end} is empty: leave it out")]
    Empty {
        /// Its start.
        start: u32,
        /// Its end.
        end: u32,
    },
    /// Neighbours of one origin are not merged.
    #[error("the segments that meet at {at} have the same origin: merge them")]
    Unmerged {
        /// Where they meet.
        at: u32,
    },
    /// Positions past what 32 bits can count.
    #[error("a history cannot pass position {}", u32::MAX)]
    TooLong,
    /// The number of tokens is not the number of positions.
    #[error("positions {start}..{end} need {} tokens, there are {tokens}", end.saturating_sub(*start))]
    TokenCount {
        /// First position.
        start: u32,
        /// One past the last position.
        end: u32,
        /// Tokens that were given.
        tokens: usize,
    },
    /// A position past the end of the history.
    #[error("position {position} is past the end of the history, {end}")]
    PastEnd {
        /// The position.
        position: u32,
        /// The end.
        end: u32,
    },
    /// The tokens and the history give another identity.
    #[error(
        "lineage is {actual}, but the tokens and history give {expected}: \
         the capsule's parts do not belong together, make it again"
    )]
    WrongId {
        /// What the tokens and history give.
        expected: LineageId,
        /// What was claimed.
        actual: LineageId,
    },
}

/// How the rows `0..position` were made: contiguous segments, neighbours merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct History(Vec<Segment>);

impl History {
    /// The empty history, of position 0.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Takes segments that are already in normal form: from 0, contiguous, none empty, neighbours of
    /// one origin merged.
    ///
    /// # Errors
    ///
    /// [`LineageError::Gap`], [`LineageError::Empty`] or [`LineageError::Unmerged`].
    pub fn from_segments(segments: Vec<Segment>) -> Result<Self, LineageError> {
        let mut before: Option<&Segment> = None;
        for segment in &segments {
            let Segment { start, end, origin } = *segment;
            let expected = before.map_or(0, |b| b.end);
            if start != expected {
                return Err(LineageError::Gap { start, end, expected });
            }
            if end <= start {
                return Err(LineageError::Empty { start, end });
            }
            if before.is_some_and(|b| b.origin == origin) {
                return Err(LineageError::Unmerged { at: start });
            }
            before = Some(segment);
        }
        Ok(Self(segments))
    }

    /// The segments, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.0
    }

    /// One past the last position.
    pub fn end(&self) -> u32 {
        self.0.last().map_or(0, |s| s.end)
    }

    /// Adds `count` positions made by `origin`; a count of 0 changes nothing.
    ///
    /// # Errors
    ///
    /// [`LineageError::TooLong`]; the history is then unchanged.
    pub fn append(&mut self, origin: Origin, count: u32) -> Result<(), LineageError> {
        let start = self.end();
        let end = start.checked_add(count).ok_or(LineageError::TooLong)?;
        match self.0.last_mut() {
            _ if count == 0 => {}
            Some(last) if last.origin == origin => last.end = end,
            _ => self.0.push(Segment { start, end, origin }),
        }
        Ok(())
    }

    /// Forgets the positions from `position` on, as a rollback does; a later position changes nothing.
    pub fn truncate(&mut self, position: u32) {
        self.0.retain(|s| s.start < position);
        if let Some(last) = self.0.last_mut() {
            last.end = last.end.min(position);
        }
    }

    /// The segments of the positions from `from` on, the first of them cut to begin there.
    pub fn since(&self, from: u32) -> impl Iterator<Item = Segment> + '_ {
        self.0
            .iter()
            .filter(move |s| s.end > from)
            .map(move |s| Segment { start: s.start.max(from), ..*s })
    }
}

/// The identity of a boundary: two boundaries share rows only if they share this node.
///
/// `child = BLAKE3(parent, fingerprint, salt, start, end, origin, tokens)`, with the numbers and
/// tokens as 4 bytes little-endian each and the origin as one byte (0 prefill, 1 decode), in BLAKE3's
/// key derivation mode. See [`LineageScope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LineageId(pub Digest);

impl fmt::Display for LineageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What every node of one tree of boundaries has in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LineageScope {
    /// [`Fingerprint::digest`](crate::Fingerprint::digest) of the model that runs.
    pub fingerprint: Digest,
    /// [`salt_digest`](crate::salt_digest) of the tenant.
    pub salt: Digest,
}

impl LineageScope {
    /// The node of position 0, before any token.
    pub fn root(&self) -> LineageId {
        let mut hasher = blake3::Hasher::new_derive_key("ampoule capsule v1 lineage root");
        hasher.update(self.fingerprint.as_bytes()).update(self.salt.as_bytes());
        LineageId(hasher.finalize().into())
    }

    /// The node that follows `parent` by one segment; `tokens` are those of the segment.
    ///
    /// # Errors
    ///
    /// [`LineageError::Empty`] or [`LineageError::TokenCount`].
    pub fn extend(
        &self,
        parent: LineageId,
        segment: Segment,
        tokens: &[u32],
    ) -> Result<LineageId, LineageError> {
        let Segment { start, end, .. } = segment;
        if end <= start {
            return Err(LineageError::Empty { start, end });
        }
        if tokens.len() != segment.range().len() {
            return Err(LineageError::TokenCount { start, end, tokens: tokens.len() });
        }
        Ok(self.node(parent, segment, |hasher| feed(hasher, tokens)))
    }

    /// The node at the end of `history`, starting from the node `from` at position `position`: one
    /// [`extend`](Self::extend) for each segment of [`History::since`]. `tokens` are all the tokens
    /// of the history, from position 0. From [`root`](Self::root) and 0 it is the node of a history
    /// whose inner boundaries nobody kept.
    ///
    /// # Errors
    ///
    /// [`LineageError::TokenCount`] or [`LineageError::PastEnd`].
    pub fn advance(
        &self,
        from: LineageId,
        position: u32,
        history: &History,
        tokens: &[u32],
    ) -> Result<LineageId, LineageError> {
        self.advance_with(from, position, history, tokens.len(), |hasher, range| {
            feed(hasher, &tokens[range]);
        })
    }

    /// Checks that `claimed` is what [`advance`](Self::advance) gives.
    ///
    /// # Errors
    ///
    /// Those of [`advance`](Self::advance), and [`LineageError::WrongId`].
    pub fn verify(
        &self,
        claimed: LineageId,
        from: LineageId,
        position: u32,
        history: &History,
        tokens: &[u32],
    ) -> Result<(), LineageError> {
        ensure(claimed, self.advance(from, position, history, tokens)?)
    }

    /// [`verify`](Self::verify) over tokens that lie in a file, 4 bytes little-endian each.
    pub(crate) fn verify_bytes(
        &self,
        claimed: LineageId,
        from: LineageId,
        position: u32,
        history: &History,
        tokens: &[u8],
    ) -> Result<(), LineageError> {
        let id =
            self.advance_with(from, position, history, tokens.len() / 4, |hasher, range| {
                hasher.update(&tokens[range.start * 4..range.end * 4]);
            })?;
        ensure(claimed, id)
    }

    fn advance_with(
        &self,
        from: LineageId,
        position: u32,
        history: &History,
        count: usize,
        mut feed: impl FnMut(&mut blake3::Hasher, Range<usize>),
    ) -> Result<LineageId, LineageError> {
        let end = history.end();
        if count != end as usize {
            return Err(LineageError::TokenCount { start: 0, end, tokens: count });
        }
        if position > end {
            return Err(LineageError::PastEnd { position, end });
        }
        Ok(history.since(position).fold(from, |parent, segment| {
            self.node(parent, segment, |hasher| feed(hasher, segment.range()))
        }))
    }

    fn node(
        &self,
        parent: LineageId,
        segment: Segment,
        feed: impl FnOnce(&mut blake3::Hasher),
    ) -> LineageId {
        let mut hasher = blake3::Hasher::new_derive_key("ampoule capsule v1 lineage node");
        hasher.update(parent.0.as_bytes());
        hasher.update(self.fingerprint.as_bytes());
        hasher.update(self.salt.as_bytes());
        hasher.update(&segment.start.to_le_bytes());
        hasher.update(&segment.end.to_le_bytes());
        hasher.update(&[u8::from(segment.origin == Origin::Decode)]);
        feed(&mut hasher);
        LineageId(hasher.finalize().into())
    }
}

fn ensure(actual: LineageId, expected: LineageId) -> Result<(), LineageError> {
    if actual == expected { Ok(()) } else { Err(LineageError::WrongId { expected, actual }) }
}

fn feed(hasher: &mut blake3::Hasher, tokens: &[u32]) {
    let mut buffer = [0; 1024];
    for chunk in tokens.chunks(buffer.len() / 4) {
        for (bytes, token) in buffer.chunks_exact_mut(4).zip(chunk) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        hasher.update(&buffer[..chunk.len() * 4]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: Origin = Origin::Prefill;
    const D: Origin = Origin::Decode;

    fn segment(start: u32, end: u32, origin: Origin) -> Segment {
        Segment { start, end, origin }
    }

    fn scope() -> LineageScope {
        LineageScope { fingerprint: Digest::of(b"f"), salt: Digest::of(b"s") }
    }

    #[test]
    fn a_history_stays_normal() {
        let mut h = History::new();
        for (origin, count) in [(P, 3), (P, 2), (D, 0), (D, 1), (D, 1), (P, 4)] {
            h.append(origin, count).unwrap();
        }
        assert_eq!(h.segments(), [segment(0, 5, P), segment(5, 7, D), segment(7, 11, P)]);
        assert_eq!(History::from_segments(h.segments().to_vec()), Ok(h.clone()));
        assert_eq!(h.append(D, u32::MAX), Err(LineageError::TooLong));
        assert_eq!(h.end(), 11);
        let since: Vec<_> = h.since(6).collect();
        assert_eq!(since, [segment(6, 7, D), segment(7, 11, P)]);
        assert_eq!(h.since(11).count(), 0);
        let mut cut = h.clone();
        cut.truncate(20);
        assert_eq!(cut, h);
        cut.truncate(6);
        assert_eq!(cut.segments(), [segment(0, 5, P), segment(5, 6, D)]);
        cut.truncate(5);
        assert_eq!(cut.segments(), [segment(0, 5, P)]);
        cut.truncate(0);
        assert_eq!(cut, History::new());
    }

    #[test]
    fn other_forms_are_refused() {
        let check = |s: &[Segment]| History::from_segments(s.to_vec()).unwrap_err();
        assert!(matches!(check(&[segment(1, 2, P)]), LineageError::Gap { expected: 0, .. }));
        assert!(matches!(check(&[segment(0, 0, P)]), LineageError::Empty { .. }));
        assert!(matches!(
            check(&[segment(0, 2, P), segment(3, 4, D)]),
            LineageError::Gap { expected: 2, .. }
        ));
        assert!(matches!(check(&[segment(0, 2, P), segment(2, 1, D)]), LineageError::Empty { .. }));
        assert!(matches!(
            check(&[segment(0, 2, P), segment(2, 4, P)]),
            LineageError::Unmerged { at: 2 }
        ));
    }

    #[test]
    fn every_input_changes_the_node() {
        let base = scope();
        let tokens = [1, 2, 3];
        let s = segment(2, 5, P);
        let id = base.extend(base.root(), s, &tokens).unwrap();
        let others = [
            base.root(),
            base.extend(id, s, &tokens).unwrap(),
            base.extend(base.root(), segment(3, 6, P), &tokens).unwrap(),
            base.extend(base.root(), segment(2, 5, D), &tokens).unwrap(),
            base.extend(base.root(), s, &[1, 2, 4]).unwrap(),
            LineageScope { salt: Digest::of(b"t"), ..base }
                .extend(base.root(), s, &tokens)
                .unwrap(),
            LineageScope { fingerprint: Digest::of(b"g"), ..base }
                .extend(base.root(), s, &tokens)
                .unwrap(),
            LineageScope { salt: Digest::of(b"t"), ..base }.root(),
        ];
        assert!(others.iter().all(|&other| other != id));
        assert!(matches!(
            base.extend(base.root(), s, &tokens[1..]),
            Err(LineageError::TokenCount { tokens: 2, .. })
        ));
        assert!(base.extend(base.root(), segment(5, 2, P), &[]).is_err());
    }

    #[test]
    fn advancing_in_steps_at_segment_ends_is_advancing_at_once() {
        let scope = scope();
        let tokens: Vec<u32> = (0..1000).collect();
        let mut h = History::new();
        h.append(P, 700).unwrap();
        let middle = scope.advance(scope.root(), 0, &h, &tokens[..700]).unwrap();
        h.append(D, 300).unwrap();
        let end = scope.advance(middle, 700, &h, &tokens).unwrap();
        assert_eq!(scope.advance(scope.root(), 0, &h, &tokens), Ok(end));
        assert_eq!(scope.extend(middle, segment(700, 1000, D), &tokens[700..]), Ok(end));
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        assert_eq!(scope.verify(end, middle, 700, &h, &tokens), Ok(()));
        assert_eq!(scope.verify_bytes(end, middle, 700, &h, &bytes), Ok(()));
        assert!(matches!(
            scope.verify(middle, middle, 700, &h, &tokens),
            Err(LineageError::WrongId { actual, .. }) if actual == middle
        ));
        assert!(scope.advance(middle, 1001, &h, &tokens).is_err());
        assert!(scope.advance(middle, 700, &h, &tokens[1..]).is_err());
        assert_eq!(scope.advance(end, 1000, &h, &tokens), Ok(end));
    }
}
