//! What a capsule says about itself.

use serde::{Deserialize, Serialize};

use crate::layout::cut;
use crate::{
    CapsuleError, Component, Digest, Fingerprint, History, LineageId, LineageScope, StateLayout,
};

/// UTF-8 bytes of a producer, model or label at most.
pub const MAX_TEXT_BYTES: usize = 255;
/// UTF-8 bytes of a note at most.
pub const MAX_NOTE_BYTES: usize = 16 * 1024;
/// UTF-8 bytes of a journal at most.
pub const MAX_JOURNAL_BYTES: usize = 64 * 1024;

/// The lineage node that a capsule's own node was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// The parent's node.
    pub id: LineageId,
    /// Its position, before the capsule's.
    pub position: u32,
}

/// What a capsule says about itself, apart from the state bytes and their digests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The program that made it, such as `ampoule 0.1.0`.
    pub producer: String,
    /// The model's name, for people.
    pub model: String,
    /// Tokens that the state has seen: rows `0..position` are filled.
    pub position: u32,
    /// How those rows were made; ends at `position`.
    pub history: History,
    /// The node of this boundary: [`LineageScope::advance`] from `parent`, or from the root when
    /// there is none.
    pub lineage: LineageId,
    /// The node that `lineage` was made from, if it was not the root.
    pub parent: Option<Parent>,
    /// [`salt_digest`](crate::salt_digest) of the tenant that it belongs to.
    pub salt: Digest,
    /// What must be equal for it to fit. Its layout component is `layout.digest()`.
    pub fingerprint: Fingerprint,
    /// The state tensors, with the most rows there can be.
    pub layout: StateLayout,
    /// What the engine needs beside the tokens to read them again: its sampler settings, by position. Opaque here; at
    /// most [`MAX_JOURNAL_BYTES`] bytes.
    pub journal: Option<String>,
    /// Anything the owner wants to remember, at most [`MAX_NOTE_BYTES`] bytes.
    pub note: Option<String>,
}

impl Manifest {
    /// What this capsule's lineage nodes have in common with their tree.
    pub fn scope(&self) -> LineageScope {
        LineageScope { fingerprint: self.fingerprint.digest(), salt: self.salt }
    }

    /// Checks that the parts agree with one another; the tokens and the lineage node, which take the
    /// payload, are checked by [`CapsuleWriter::new`](crate::CapsuleWriter::new) and
    /// [`CapsuleFile::parse`](crate::CapsuleFile::parse).
    ///
    /// # Errors
    ///
    /// In this order: a text that is too long ([`CapsuleError::Text`]), a layout that is not allowed
    /// or has fewer rows than the position ([`CapsuleError::Layout`]), a layout of another digest
    /// than the fingerprint's ([`CapsuleError::LayoutDigest`]), a history that does not end at the
    /// position ([`CapsuleError::Position`]), a parent that is not before it
    /// ([`CapsuleError::Parent`]).
    pub fn validate(&self) -> Result<(), CapsuleError> {
        let texts = [("producer", &self.producer), ("model", &self.model)];
        let labels = Component::ALL.map(|c| (c.name(), self.fingerprint.label(c)));
        let journal = self.journal.as_deref().unwrap_or_default();
        let note = self.note.as_deref().unwrap_or_default();
        texts
            .map(|(field, text)| (field, text.as_str(), MAX_TEXT_BYTES))
            .into_iter()
            .chain(labels.map(|(field, text)| (field, text, MAX_TEXT_BYTES)))
            .chain([("journal", journal, MAX_JOURNAL_BYTES), ("note", note, MAX_NOTE_BYTES)])
            .find(|(_, text, max)| text.len() > *max)
            .map_or(Ok(()), |(field, text, max)| {
                Err(CapsuleError::Text { field, bytes: text.len(), max, text: cut(text) })
            })?;
        self.layout.validate()?;
        self.layout.bytes_at(self.position)?;
        let digest = self.layout.digest();
        if self.fingerprint.layout != digest {
            let fingerprint = self.fingerprint.layout;
            return Err(CapsuleError::LayoutDigest { fingerprint, layout: digest });
        }
        if self.history.end() != self.position {
            let (position, end) = (self.position, self.history.end());
            return Err(CapsuleError::Position { position, end });
        }
        match self.parent {
            Some(Parent { position, .. }) if position >= self.position => {
                Err(CapsuleError::Parent { parent: position, position: self.position })
            }
            _ => Ok(()),
        }
    }

    /// Where the capsule's own node was made from: the parent, or the root.
    pub(crate) fn origin(&self) -> (LineageId, u32) {
        self.parent.map_or_else(|| (self.scope().root(), 0), |p| (p.id, p.position))
    }

    /// Checks the lineage node against the tokens, 4 bytes little-endian each.
    pub(crate) fn verify_lineage(&self, tokens: &[u8]) -> Result<(), CapsuleError> {
        let (from, position) = self.origin();
        let scope = self.scope();
        Ok(scope.verify_bytes(self.lineage, from, position, &self.history, tokens)?)
    }

    /// See [`CapsuleFile::check_fits`](crate::CapsuleFile::check_fits).
    ///
    /// # Errors
    /// The same.
    pub fn check_fits(
        &self,
        fingerprint: &Fingerprint,
        layout: &StateLayout,
        salt: &Digest,
    ) -> Result<(), CapsuleError> {
        if self.salt != *salt {
            return Err(CapsuleError::OtherTenant);
        }
        let fits = self.fingerprint.ensure_matches(fingerprint);
        let names_layout = match &fits {
            Ok(()) => true,
            Err(mismatch) => mismatch.component == Component::Layout,
        };
        if names_layout && let Some((tensor, reason)) = self.layout.difference(layout) {
            return Err(CapsuleError::OtherLayout { tensor, reason });
        }
        Ok(fits?)
    }
}
