//! Saving: segments first, then nodes, then the capsule, each durable before what names it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ampoule_capsule::{
    Digest, LineageId, MAX_JOURNAL_BYTES, MAX_NOTE_BYTES, MAX_TEXT_BYTES, Parent, Segment,
};

use crate::codec::Compression;
use crate::error::{Damage, Damaged, ReadError, SaveError, SourceError, StorageError};
use crate::frame::{self, Kind, MAX_RECORD_BYTES};
use crate::identity::{CapsuleId, Named, NodeId, ScopeId, SegmentId};
use crate::records::{
    CapsuleRecord, CondemnedRecord, NodeRecord, Piece, Scope, ScopeRecord, SegmentRef, VERSION,
    check_spans, cut, from_json, lineage_of, node_bytes, segment_name, to_json,
};
use crate::storage::{Folder, Key};
use crate::store::{NodeKey, Store, Writer, producer, record_damage};

/// Gives the bytes of state tensors; called from several threads, and only for what the store does not hold yet.
pub trait StateBytes: Sync {
    /// The bytes `range` of the tensor with that index in the layout. Of a link's rows, byte 0 is the first of its own.
    ///
    /// # Errors
    /// Whatever keeps it from giving them; the save then ends with [`SaveError::Source`].
    fn bytes(&self, tensor: usize, range: Range<usize>) -> Result<Cow<'_, [u8]>, SourceError>;
}

/// State that lies in memory: one slice a tensor of the layout; empty ones for tensors of the other growth.
#[derive(Clone, Debug, Default)]
pub struct Slices<'a>(pub Vec<&'a [u8]>);

impl StateBytes for Slices<'_> {
    fn bytes(&self, tensor: usize, range: Range<usize>) -> Result<Cow<'_, [u8]>, SourceError> {
        let slice = self.0.get(tensor).and_then(|bytes| bytes.get(range.clone()));
        slice.map(Cow::Borrowed).ok_or_else(|| format!("there are no bytes {range:?}").into())
    }
}

/// One link of the chain to be saved: the rows between a boundary and the one before it.
#[derive(Clone)]
pub struct Link<'a> {
    /// The tokens of its own positions.
    pub tokens: &'a [u32],
    /// How its own rows were made: spans from its first position to its last.
    pub spans: Vec<Segment>,
    /// The lineage node at its end.
    pub lineage: LineageId,
    /// For a first link whose lineage was made from a node that is not in the chain, as after an import of a file: that
    /// node.
    pub from: Option<Parent>,
    /// What the engine needs beside the tokens to read them again; opaque.
    pub journal: Option<Cow<'a, str>>,
    /// Its own rows.
    pub rows: &'a dyn StateBytes,
}

/// A capsule to be saved.
#[derive(Clone)]
pub struct NewCapsule<'a> {
    /// What its tree has in common.
    pub scope: &'a Scope,
    /// Its chain, from the root on; at least one link, the last one ends at the capsule's position.
    pub links: &'a [Link<'a>],
    /// Its fixed state.
    pub fixed: &'a dyn StateBytes,
    /// The model's name, for people.
    pub model: &'a str,
    /// Anything the owner wants to remember.
    pub note: Option<&'a str>,
}

/// A capsule that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its id.
    pub id: CapsuleId,
    /// Its node.
    pub node: NodeId,
    /// Bytes that this save wrote.
    pub written: u64,
    /// Bytes of state that were there already and are shared.
    pub shared: u64,
}

/// What one save has done so far.
#[derive(Default)]
struct Tally {
    written: u64,
    shared: u64,
}

type Condemned = Vec<Arc<HashSet<String>>>;

impl Store {
    /// Saves a capsule with its chain. On return it is durable: acknowledged.
    ///
    /// Only what the store does not hold yet is read from the sources and written: of a chain whose earlier boundary was
    /// saved or loaded by this process, the new links and the fixed state. Saving the same again changes nothing and
    /// repairs segments that were damaged. A save that fails or is cut off leaves nothing but garbage, from which the
    /// next try goes on.
    ///
    /// # Errors
    /// If the parts of the capsule do not agree, a source fails, the quota or the medium is full, or the storage fails.
    pub fn save(&self, capsule: &NewCapsule<'_>) -> Result<Saved, SaveError> {
        self.ensure_writable()?;
        let begun = Instant::now();
        check(capsule)?;
        let mut writer = self.writer();
        let condemned = self.condemned(&mut writer)?;
        let mut tally = Tally::default();
        let scope = self.put_scope(capsule.scope, &mut tally)?;
        let node = self.put_chain(capsule, scope, &condemned, &mut tally)?;
        let fixed = self.put_part(
            capsule.scope,
            &capsule.scope.fixed_parts(),
            capsule.fixed,
            &condemned,
            &mut tally,
        )?;
        let record = CapsuleRecord {
            version: VERSION,
            node,
            position: capsule.links.iter().map(|link| link.tokens.len() as u32).sum(),
            producer: producer(),
            model: capsule.model.to_owned(),
            note: capsule.note.map(str::to_owned),
            fixed,
        };
        let bytes = to_json(&record);
        let id = CapsuleId(Named::Capsule.digest(self.key.as_ref(), &[&bytes]));
        // All that the capsule needs is durable before its name can be.
        self.storage.flush(&[Folder::Scopes, Folder::Segments, Folder::Nodes])?;
        let took = begun.elapsed();
        if !self.storage.single_writer() && took > self.grace / 4 {
            return Err(SaveError::TooSlow { took, grace: self.grace });
        }
        let key = Key::new(Folder::Capsules, id);
        if !self.holds(&key, Kind::Capsule)? {
            tally.written +=
                self.publish(Kind::Capsule, &key, (Compression::None, 1), &[&bytes], None)?;
        }
        self.storage.flush(&[Folder::Capsules])?;
        Ok(Saved { id, node, written: tally.written, shared: tally.shared })
    }

    /// What a gc somewhere has condemned: it may be deleted at any time from now on, and must not be used. In a folder the
    /// next gc, which is this process's own, looks again whether it is needed.
    fn condemned(&self, writer: &mut Writer) -> Result<Condemned, SaveError> {
        if self.storage.single_writer() {
            return Ok(Vec::new());
        }
        let names: Vec<String> =
            self.storage.list(Folder::Condemned)?.into_iter().map(|entry| entry.name).collect();
        writer.condemned.retain(|name, _| names.contains(name));
        for name in names {
            if writer.condemned.contains_key(&name) {
                continue;
            }
            let objects = match self.condemned_objects(&name) {
                Ok(objects) => objects,
                // Carried out since.
                Err(ReadError::Damaged(Damaged { damage: Damage::Missing, .. })) => continue,
                Err(error) => return Err(error.into()),
            };
            writer.condemned.insert(name, Arc::new(objects));
        }
        Ok(writer.condemned.values().cloned().collect())
    }

    /// The objects of one list.
    pub(crate) fn condemned_objects(&self, name: &str) -> Result<HashSet<String>, ReadError> {
        let key = Key::new(Folder::Condemned, name);
        let bytes =
            frame::open(&*self.storage, &key, Kind::Condemned)?.record(self.key.as_ref())?;
        let record: CondemnedRecord = from_json(&bytes).map_err(|e| record_damage(&key, e))?;
        if record.version != VERSION {
            return Err(record_damage(&key, format!("record version {}", record.version)));
        }
        Ok(record.objects.into_iter().collect())
    }

    /// Whether a sound record is there; one that is damaged or missing is to be written.
    fn holds(&self, key: &Key, kind: Kind) -> Result<bool, StorageError> {
        match frame::open(&*self.storage, key, kind).and_then(|object| object.check_stored()) {
            Ok(()) => Ok(true),
            Err(ReadError::Damaged(_)) => Ok(false),
            Err(ReadError::Storage(error)) => Err(error),
        }
    }

    fn put_scope(&self, scope: &Scope, tally: &mut Tally) -> Result<ScopeId, SaveError> {
        let Scope { fingerprint, layout, salt } = scope.clone();
        let record = ScopeRecord { version: VERSION, fingerprint, layout, salt };
        let bytes = to_json(&record);
        let id = ScopeId(Named::Scope.digest(self.key.as_ref(), &[&bytes]));
        let key = Key::new(Folder::Scopes, id);
        // Scopes are few and small; on object storage they are never condemned.
        let known = self.knows_scope(id) && self.storage.stat(&key)?.is_some();
        if !known && !self.holds(&key, Kind::Scope)? {
            tally.written +=
                self.publish(Kind::Scope, &key, (Compression::None, 1), &[&bytes], None)?;
        }
        self.learn_scope(id, scope);
        Ok(id)
    }

    fn put_chain(
        &self,
        capsule: &NewCapsule<'_>,
        scope: ScopeId,
        condemned: &Condemned,
        tally: &mut Tally,
    ) -> Result<NodeId, SaveError> {
        let (mut parent, mut first) = self.known_prefix(capsule.links, condemned)?;
        let mut start: u32 = capsule.links[..first].iter().map(|l| l.tokens.len() as u32).sum();
        let known = capsule.scope.row_parts(start as usize);
        let known = known.iter().map(|p| p.bytes as u64).sum::<u64>();
        tally.shared += known;
        self.count_moved(known);
        while let Some(link) = capsule.links.get(first) {
            let pieces = capsule.scope.row_parts(link.tokens.len());
            let rows = self.put_part(capsule.scope, &pieces, link.rows, condemned, tally)?;
            let end = start + link.tokens.len() as u32;
            let mut record = NodeRecord {
                version: VERSION,
                scope,
                parent,
                generation: 0,
                start,
                end,
                spans: link.spans.clone(),
                lineage: link.lineage,
                from: link.from,
                journal: link.journal.as_deref().map(str::to_owned),
                rows,
            };
            let id = loop {
                let bytes = node_bytes(&record, link.tokens);
                let max = MAX_RECORD_BYTES;
                if bytes.len() as u64 > max {
                    let bytes = bytes.len() as u64;
                    return Err(
                        crate::error::WriteError::TooLong { what: "a node", bytes, max }.into()
                    );
                }
                let id = NodeId(Named::Node.digest(self.key.as_ref(), &[&bytes]));
                let key = Key::new(Folder::Nodes, id);
                if is_condemned(condemned, &key) {
                    record.generation += 1;
                    continue;
                }
                if !self.holds(&key, Kind::Node)? {
                    let coding = (Compression::None, 1);
                    tally.written += self.publish(Kind::Node, &key, coding, &[&bytes], None)?;
                }
                break id;
            };
            self.remember(key_of(&record), id);
            (parent, start, first) = (Some(id), end, first + 1);
        }
        parent.ok_or(SaveError::EmptyChain)
    }

    /// The links that the store holds already: the last one's node, and how many they are.
    fn known_prefix(
        &self,
        links: &[Link<'_>],
        condemned: &Condemned,
    ) -> Result<(Option<NodeId>, usize), SaveError> {
        let (mut parent, mut count) = (None, 0);
        for link in links {
            let key = node_key(parent, link.lineage, link.journal.as_deref());
            let Some(node) = self.remembered(&key) else { break };
            if is_condemned(condemned, &Key::new(Folder::Nodes, node)) {
                break;
            }
            (parent, count) = (Some(node), count + 1);
        }
        // Another machine may have removed them. Where the last one is there and not condemned, so are those above it.
        if let Some(last) = parent
            && self.storage.stat(&Key::new(Folder::Nodes, last))?.is_none()
        {
            self.forget();
            return Ok((None, 0));
        }
        Ok((parent, count))
    }

    /// Publishes the segments of one part that are not there yet, on several threads.
    fn put_part(
        &self,
        scope: &Scope,
        pieces: &[Piece],
        source: &dyn StateBytes,
        condemned: &Condemned,
        tally: &mut Tally,
    ) -> Result<Vec<SegmentRef>, SaveError> {
        let jobs = cut(pieces, self.options.segment_bytes);
        let results = parallel(self.options.threads, jobs.len(), |index| {
            let (width, ranges) = &jobs[index];
            let mut bytes: Vec<Cow<'_, [u8]>> = Vec::with_capacity(ranges.len());
            for (tensor, range) in ranges {
                let name = || scope.layout.tensors[*tensor].name.clone();
                let expected = range.len();
                let piece = source
                    .bytes(*tensor, range.clone())
                    .map_err(|source| SaveError::Source { tensor: name(), source })?;
                if piece.len() != expected {
                    let actual = piece.len();
                    return Err(SaveError::SourceBytes { tensor: name(), expected, actual });
                }
                bytes.push(piece);
            }
            let slices: Vec<&[u8]> = bytes.iter().map(|piece| &**piece).collect();
            let put = self.put_segment(&slices, *width, condemned)?;
            self.count_moved(put.0.bytes);
            Ok(put)
        })?;
        Ok(results
            .into_iter()
            .map(|(segment, written)| {
                match written {
                    Some(bytes) => tally.written += bytes,
                    None => tally.shared += segment.bytes,
                }
                segment
            })
            .collect())
    }

    /// Publishes one segment unless it is there; bytes written, if any.
    fn put_segment(
        &self,
        pieces: &[&[u8]],
        width: u8,
        condemned: &Condemned,
    ) -> Result<(SegmentRef, Option<u64>), SaveError> {
        let digest = Named::Segment.digest(self.key.as_ref(), pieces);
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        let mut segment = SegmentRef { id: SegmentId(digest), bytes, generation: 0 };
        loop {
            let key = Key::new(Folder::Segments, segment_name(segment.id, segment.generation));
            if is_condemned(condemned, &key) {
                segment.generation += 1;
                continue;
            }
            if self.holds_segment(&key, segment)? {
                return Ok((segment, None));
            }
            let known = self.key.is_none().then_some(*digest.as_bytes());
            let coding = (self.options.compression, width);
            let written = self.publish(Kind::Segment, &key, coding, pieces, known)?;
            return Ok((segment, Some(written)));
        }
    }

    /// Whether a segment is there and can be relied on. In a folder it is read and checked, so that a save repairs what
    /// is damaged; from object storage only its header is, since it keeps checksums of its own.
    fn holds_segment(&self, key: &Key, segment: SegmentRef) -> Result<bool, StorageError> {
        if !self.storage.single_writer() {
            return Ok(self.storage.stat(key)?.is_some());
        }
        let read = frame::open(&*self.storage, key, Kind::Segment).and_then(|object| {
            let mut plain = vec![0; segment.bytes as usize];
            object.segment(self.key.as_ref(), segment.id.0, &mut plain)
        });
        match read {
            Ok(()) => Ok(true),
            Err(ReadError::Damaged(_)) => Ok(false),
            Err(ReadError::Storage(error)) => Err(error),
        }
    }
}

fn is_condemned(condemned: &Condemned, key: &Key) -> bool {
    !condemned.is_empty() && {
        let name = key.to_string();
        condemned.iter().any(|objects| objects.contains(&name))
    }
}

pub(crate) fn key_of(record: &NodeRecord) -> NodeKey {
    node_key(record.parent, record.lineage, record.journal.as_deref())
}

fn node_key(parent: Option<NodeId>, lineage: LineageId, journal: Option<&str>) -> NodeKey {
    // No journal and an empty one are told apart.
    let journal = journal.map_or(Digest([0; 32]), |text| Digest::of(text.as_bytes()));
    (parent, lineage, journal)
}

/// Checks that the parts of a capsule agree.
fn check(capsule: &NewCapsule<'_>) -> Result<(), SaveError> {
    let scope = capsule.scope;
    scope.layout.validate()?;
    if scope.fingerprint.layout != scope.layout.digest() {
        return Err(SaveError::LayoutDigest);
    }
    let texts = [
        ("model", capsule.model, MAX_TEXT_BYTES),
        ("note", capsule.note.unwrap_or_default(), MAX_NOTE_BYTES),
    ];
    let journals = capsule
        .links
        .iter()
        .map(|link| ("journal", link.journal.as_deref().unwrap_or_default(), MAX_JOURNAL_BYTES));
    for (field, text, max) in texts.into_iter().chain(journals) {
        if text.len() > max {
            return Err(SaveError::Text { field, bytes: text.len(), max });
        }
    }
    let lineage_scope = scope.lineage();
    let (mut parent, mut start) = (None, 0_u32);
    for (link, part) in capsule.links.iter().enumerate() {
        let wrong = |source| SaveError::Lineage { link, source };
        let count = u32::try_from(part.tokens.len()).ok();
        let end = count
            .and_then(|count| start.checked_add(count))
            .ok_or_else(|| wrong(ampoule_capsule::LineageError::TooLong))?;
        if part.from.is_some() && link > 0 {
            return Err(SaveError::InnerOrigin { link });
        }
        if let Some(from) = part.from
            && from.position >= end
        {
            let position = from.position;
            return Err(wrong(ampoule_capsule::LineageError::PastEnd { position, end }));
        }
        check_spans(&part.spans, start, end).map_err(wrong)?;
        let expected =
            lineage_of(&lineage_scope, parent, part.from, start, &part.spans, part.tokens)
                .map_err(wrong)?;
        if expected != part.lineage {
            let actual = part.lineage;
            return Err(wrong(ampoule_capsule::LineageError::WrongId { expected, actual }));
        }
        (parent, start) = (Some(expected), end);
    }
    scope.layout.bytes_at(start)?;
    if parent.is_none() { Err(SaveError::EmptyChain) } else { Ok(()) }
}

/// Runs `work` for each of `0..count` on up to `threads` threads; results in order, or the first error met.
pub(crate) fn parallel<T: Send, E: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    if threads.min(count) <= 1 {
        return (0..count).map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<T>>> = Mutex::new((0..count).map(|_| None).collect());
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    match work(index) {
                        Ok(result) => {
                            let mut results =
                                results.lock().unwrap_or_else(PoisonError::into_inner);
                            results[index] = Some(result);
                        }
                        Err(error) => {
                            next.store(count, Ordering::Relaxed);
                            let mut failure =
                                failure.lock().unwrap_or_else(PoisonError::into_inner);
                            failure.get_or_insert(error);
                        }
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => {
            let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
            Ok(results.into_iter().flatten().collect())
        }
    }
}
