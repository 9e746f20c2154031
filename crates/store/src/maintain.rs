//! What there is, what is wrong with it, and what nobody needs any more.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use crate::codec::Compression;
use crate::error::{
    Damage, Damaged, MaintenanceError, ReadError, SaveError, StorageError, WriteError,
};
use crate::frame::{self, Kind};
use crate::heads::Head;
use crate::identity::{CapsuleId, Named, NodeId, ScopeId, SegmentId, random_name};
use crate::load::StoredCapsule;
use crate::records::{CondemnedRecord, SegmentRef, VERSION, to_json};
use crate::save::parallel;
use crate::storage::{Folder, Key};
use crate::store::Store;

/// A capsule of a [`Catalog`].
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its records.
    pub capsule: StoredCapsule,
    /// When it was saved, by the storage's clock.
    pub saved: SystemTime,
    /// Bytes of state that only this capsule needs: its fixed state, and the rows of nodes that are in no other capsule's
    /// chain.
    pub own_bytes: u64,
    /// Bytes of rows that other capsules need too.
    pub shared_bytes: u64,
    /// The capsule before it in the tree: that of the nearest node above that is some capsule's own.
    pub parent: Option<CapsuleId>,
}

/// Everything in a store, as its records say; no state is read.
#[derive(Debug, Default)]
pub struct Catalog {
    /// The capsules, by position and then by id.
    pub capsules: Vec<Listed>,
    /// The heads, by name.
    pub heads: Vec<Head>,
    /// Capsules whose records cannot be read, and why.
    pub unreadable: Vec<(CapsuleId, Damaged)>,
    /// Damaged heads.
    pub damaged_heads: Vec<Damaged>,
}

impl Catalog {
    /// The capsules whose parent is `parent`; those without one for `None`.
    pub fn children(&self, parent: Option<CapsuleId>) -> impl Iterator<Item = &Listed> {
        self.capsules.iter().filter(move |listed| listed.parent == parent)
    }

    /// Bytes of the state of all capsules, what they share counted once: of rows, and of fixed state.
    pub fn state_bytes(&self) -> (u64, u64) {
        let mut rows = HashMap::new();
        for node in self.capsules.iter().flat_map(|listed| &listed.capsule.nodes) {
            rows.insert(node.id, node.row_bytes());
        }
        let fixed: HashMap<SegmentId, u64> = self
            .capsules
            .iter()
            .flat_map(|listed| listed.capsule.segments())
            .map(|segment| (segment.id, segment.bytes))
            .collect();
        (rows.values().sum(), fixed.values().sum())
    }
}

/// Something that fsck found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The object, and what is wrong with it.
    pub damaged: Damaged,
    /// The capsules that cannot be loaded for it; none for garbage and heads.
    pub capsules: Vec<CapsuleId>,
}

/// What fsck found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FsckReport {
    /// Capsules that can be loaded: every byte was read and checked.
    pub sound: Vec<CapsuleId>,
    /// What is damaged, by object.
    pub problems: Vec<Problem>,
    /// Objects that were checked.
    pub objects: u64,
    /// Bytes of state that were read and checked.
    pub state_bytes: u64,
    /// Objects that no capsule needs, which a gc deletes.
    pub garbage: u64,
    /// Files that are no objects of a store.
    pub foreign: Vec<Key>,
}

impl FsckReport {
    /// Whether nothing is wrong.
    pub const fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Objects and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What a gc did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Deleted.
    pub deleted: Amount,
    /// Garbage that a gc after the grace will delete.
    pub condemned: Amount,
    /// In use.
    pub kept: Amount,
}

impl Store {
    /// Reads the records of everything.
    ///
    /// What is damaged is listed apart, the rest is whole.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn catalog(&self) -> Result<Catalog, StorageError> {
        let mut catalog = Catalog::default();
        let mut nodes = HashMap::new();
        let mut uses: HashMap<NodeId, u64> = HashMap::new();
        for entry in self.storage.list(Folder::Capsules)? {
            let Ok(id) = entry.name.parse::<CapsuleId>() else { continue };
            match self.read_capsule(id, &mut nodes) {
                Ok(capsule) => {
                    capsule.nodes.iter().for_each(|node| *uses.entry(node.id).or_default() += 1);
                    catalog.capsules.push(Listed {
                        capsule,
                        saved: entry.modified,
                        own_bytes: 0,
                        shared_bytes: 0,
                        parent: None,
                    });
                }
                Err(ReadError::Storage(error)) => return Err(error),
                Err(ReadError::Damaged(error)) => {
                    if self.storage.stat(&Key::new(Folder::Capsules, id))?.is_some() {
                        catalog.unreadable.push((id, error));
                    }
                }
            }
        }
        catalog.capsules.sort_by_key(|listed| (listed.capsule.position(), listed.capsule.id));
        let mut owners: HashMap<NodeId, CapsuleId> = HashMap::new();
        for listed in &catalog.capsules {
            owners.entry(listed.capsule.record.node).or_insert(listed.capsule.id);
        }
        for listed in &mut catalog.capsules {
            let capsule = &listed.capsule;
            let is_own = |id: &NodeId| uses.get(id) == Some(&1);
            let rows = |own: bool| -> u64 {
                let nodes = capsule.nodes.iter().filter(|node| is_own(&node.id) == own);
                nodes.map(|node| node.row_bytes()).sum()
            };
            listed.own_bytes = capsule.fixed_bytes() + rows(true);
            listed.shared_bytes = rows(false);
            let mut above = capsule.nodes.iter().rev().skip(1);
            listed.parent = above.find_map(|node| owners.get(&node.id)).copied();
        }
        match self.heads() {
            Ok((heads, damaged)) => {
                catalog.heads = heads;
                catalog.damaged_heads = damaged;
                Ok(catalog)
            }
            Err(ReadError::Storage(error)) => Err(error),
            Err(ReadError::Damaged(error)) => {
                catalog.damaged_heads.push(error);
                Ok(catalog)
            }
        }
    }

    /// Removes a capsule, sound or not. On return it is gone for good; `false` if there was none.
    ///
    /// What its descendants need stays: rows belong to nodes, and a node lives as long as a capsule descends from it. The
    /// rest is garbage from now on, see [`gc`](Self::gc).
    ///
    /// # Errors
    /// If a head points to it, a head is damaged so that this cannot be told, or the storage fails.
    pub fn remove(&self, id: CapsuleId) -> Result<bool, MaintenanceError> {
        self.ensure_writable()?;
        let _turn = self.writer();
        let key = Key::new(Folder::Capsules, id);
        if self.storage.stat(&key)?.is_none() {
            // A process that was killed while it removed it may not have made that durable.
            self.storage.flush(&[Folder::Capsules])?;
            return Ok(false);
        }
        let (heads, damaged) = self.heads()?;
        if let Some(head) = heads.into_iter().find(|head| head.capsule == id) {
            return Err(MaintenanceError::HasHead { capsule: id, head: head.name });
        }
        if let Some(source) = damaged.into_iter().next() {
            return Err(MaintenanceError::Head { source });
        }
        self.storage.remove(&key)?;
        self.storage.flush(&[Folder::Capsules])?;
        Ok(true)
    }

    /// Removes one object that [`fsck`](Self::fsck) named, if it is damaged indeed; `false` if it is sound or gone. A save
    /// of the capsules that need it writes it again.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn discard(&self, object: &Key) -> Result<bool, MaintenanceError> {
        self.ensure_writable()?;
        let _turn = self.writer();
        if object.folder == Folder::Root || self.storage.stat(object)?.is_none() {
            return Ok(false);
        }
        match self.check_object(object) {
            Ok(()) => Ok(false),
            Err(ReadError::Storage(error)) => Err(error.into()),
            Err(ReadError::Damaged(_)) => {
                self.storage.remove(object)?;
                self.storage.flush(&[object.folder])?;
                self.forget();
                self.recount();
                Ok(true)
            }
        }
    }

    /// Checks one object by itself.
    fn check_object(&self, object: &Key) -> Result<(), ReadError> {
        let named = |kind, named| self.read_named(object, kind, named).map(|_| ());
        match object.folder {
            Folder::Root => Ok(()),
            Folder::Scopes => named(Kind::Scope, Named::Scope),
            Folder::Nodes => named(Kind::Node, Named::Node),
            Folder::Capsules => named(Kind::Capsule, Named::Capsule),
            Folder::Heads => self.check_head(object),
            Folder::Memos => self.check_memo(object),
            Folder::Condemned => self.condemned_objects(&object.name).map(|_| ()),
            Folder::Segments => {
                let (digest, _) = segment_of(&object.name)
                    .ok_or_else(|| Damaged { object: object.clone(), damage: Damage::Name })?;
                let opened = frame::open(&*self.storage, object, Kind::Segment)?;
                let mut plain = vec![0; opened.header.plain as usize];
                opened.segment(self.key.as_ref(), digest.0, &mut plain)
            }
        }
    }

    /// Reads and checks every byte of the store.
    ///
    /// Changes nothing. While another process writes, what it is just removing is passed over.
    ///
    /// # Errors
    /// If the storage fails; damage is no error but part of the report.
    pub fn fsck(&self) -> Result<FsckReport, StorageError> {
        let mut report = FsckReport::default();
        let mut problems: BTreeMap<Key, Problem> = BTreeMap::new();
        let mut blame = |damaged: Damaged, capsules: &[CapsuleId]| {
            let problem = problems
                .entry(damaged.object.clone())
                .or_insert_with(|| Problem { damaged, capsules: Vec::new() });
            problem.capsules.extend_from_slice(capsules);
        };
        let mut capsules = Vec::new();
        let mut nodes = HashMap::new();
        // By segment: who needs it, and how many bytes it should have.
        let mut needed: BTreeMap<String, (SegmentRef, BTreeSet<CapsuleId>)> = BTreeMap::new();
        let mut scopes: HashMap<ScopeId, Vec<CapsuleId>> = HashMap::new();
        for entry in self.storage.list(Folder::Capsules)? {
            let Ok(id) = entry.name.parse::<CapsuleId>() else {
                report.foreign.push(Key::new(Folder::Capsules, entry.name));
                continue;
            };
            report.objects += 1;
            match self.read_capsule(id, &mut nodes) {
                Ok(capsule) => capsules.push(capsule),
                Err(ReadError::Storage(error)) => return Err(error),
                Err(ReadError::Damaged(error)) => {
                    if self.storage.stat(&Key::new(Folder::Capsules, id))?.is_some() {
                        blame(error, &[id]);
                    }
                }
            }
        }
        for capsule in &capsules {
            let rows = capsule.nodes.iter().flat_map(|node| node.segments());
            for segment in rows.chain(capsule.segments()) {
                let entry = needed.entry(segment.name()).or_insert((*segment, BTreeSet::new()));
                entry.1.insert(capsule.id);
            }
            if let Some(node) = capsule.nodes.last() {
                scopes.entry(node.scope()).or_default().push(capsule.id);
            }
        }
        // Segments that capsules need, then all others.
        let listed = self.storage.list(Folder::Segments)?;
        let names: HashSet<&str> = listed.iter().map(|entry| entry.name.as_str()).collect();
        let missing = needed.iter().filter(|(name, _)| !names.contains(name.as_str()));
        let missing: Vec<String> = missing.map(|(name, _)| name.clone()).collect();
        let all: Vec<&str> = listed
            .iter()
            .map(|e| e.name.as_str())
            .chain(missing.iter().map(String::as_str))
            .collect();
        let checks = parallel(self.options.threads, all.len(), |index| {
            let name = all[index];
            let Some(segment) =
                needed.get(name).map(|(segment, _)| *segment).or_else(|| unneeded(name))
            else {
                return Ok(Checked::Foreign);
            };
            match self.check_segment(name, segment) {
                Ok(bytes) => {
                    self.count_moved(bytes);
                    Ok(Checked::Sound(bytes))
                }
                Err(ReadError::Damaged(error)) => Ok(Checked::Damaged(error)),
                Err(ReadError::Storage(error)) => Err(error),
            }
        })?;
        for (name, check) in all.iter().zip(checks) {
            let users: Vec<CapsuleId> = needed
                .get(*name)
                .map(|(_, users)| users.iter().copied().collect())
                .unwrap_or_default();
            report.garbage += u64::from(users.is_empty());
            match check {
                Checked::Foreign => report.foreign.push(Key::new(Folder::Segments, name)),
                Checked::Sound(bytes) => {
                    report.objects += 1;
                    report.state_bytes += bytes;
                }
                // Garbage that a gc deleted since it was listed.
                Checked::Damaged(Damaged { damage: Damage::Missing, .. }) if users.is_empty() => {}
                Checked::Damaged(error) => {
                    // Removed meanwhile, perhaps with all that needed it.
                    let mut left = Vec::new();
                    for id in users {
                        if self.storage.stat(&Key::new(Folder::Capsules, id))?.is_some() {
                            left.push(id);
                        }
                    }
                    if !left.is_empty() || error.damage != Damage::Missing {
                        report.objects += 1;
                        blame(error, &left);
                    }
                }
            }
        }
        for (folder, is_known) in [
            (
                Folder::Scopes,
                &(|name: &str| name.parse().is_ok_and(|id| scopes.contains_key(&id)))
                    as &dyn Fn(&str) -> bool,
            ),
            (Folder::Nodes, &|name: &str| name.parse().is_ok_and(|id| nodes.contains_key(&id))),
            (Folder::Condemned, &|_: &str| true),
        ] {
            for entry in self.storage.list(folder)? {
                let key = Key::new(folder, &entry.name);
                if folder != Folder::Condemned && entry.name.parse::<NodeId>().is_err() {
                    report.foreign.push(key);
                    continue;
                }
                report.objects += 1;
                report.garbage += u64::from(!is_known(&entry.name));
                match self.check_object(&key) {
                    Ok(()) | Err(ReadError::Damaged(Damaged { damage: Damage::Missing, .. })) => {}
                    Err(ReadError::Storage(error)) => return Err(error),
                    Err(ReadError::Damaged(error)) => {
                        let users = entry.name.parse().ok().and_then(|id| scopes.get(&id));
                        blame(error, users.map(Vec::as_slice).unwrap_or_default());
                    }
                }
            }
        }
        for error in self.check_records() {
            match error {
                ReadError::Storage(error) => return Err(error),
                ReadError::Damaged(error) => blame(error, &[]),
            }
        }
        let (heads, damaged) = match self.heads() {
            Ok(heads) => heads,
            Err(ReadError::Storage(error)) => return Err(error),
            Err(ReadError::Damaged(error)) => (Vec::new(), vec![error]),
        };
        report.objects += heads.len() as u64 + damaged.len() as u64;
        for error in damaged {
            blame(error, &[]);
        }
        for head in heads {
            if self.storage.stat(&Key::new(Folder::Capsules, head.capsule))?.is_none() {
                let name = Named::Head.digest(self.key.as_ref(), &[head.name.as_bytes()]);
                let reason = format!("head '{}' points to no capsule", head.name);
                let damage = Damage::Record { reason };
                blame(Damaged { object: Key::new(Folder::Heads, name), damage }, &[]);
            }
        }
        for entry in self.storage.list(Folder::Memos)? {
            report.objects += 1;
            match self.check_memo(&Key::new(Folder::Memos, entry.name)) {
                Ok(()) => {}
                Err(ReadError::Storage(error)) => return Err(error),
                Err(ReadError::Damaged(error)) => blame(error, &[]),
            }
        }
        report.problems = problems.into_values().collect();
        let unsound: HashSet<CapsuleId> =
            report.problems.iter().flat_map(|problem| problem.capsules.iter().copied()).collect();
        let sound = capsules.iter().map(|capsule| capsule.id).filter(|id| !unsound.contains(id));
        report.sound = sound.collect();
        report.sound.sort();
        for problem in &mut report.problems {
            problem.capsules.sort();
            problem.capsules.dedup();
        }
        Ok(report)
    }

    fn check_segment(&self, name: &str, segment: SegmentRef) -> Result<u64, ReadError> {
        let key = Key::new(Folder::Segments, name);
        let opened = frame::open(&*self.storage, &key, Kind::Segment)?;
        // A segment that nobody needs says itself how long it is.
        let bytes = if segment.bytes == 0 { opened.header.plain } else { segment.bytes };
        let mut plain = vec![0; bytes.min(frame::MAX_SEGMENT_BYTES) as usize];
        opened.segment(self.key.as_ref(), segment.id.0, &mut plain)?;
        Ok(bytes)
    }

    /// Deletes what no capsule needs.
    ///
    /// Garbage is condemned first, by a list in the store, and deleted by a gc that comes `grace` later and still finds it
    /// unneeded: so a reader has at least that long to finish what it began, and on object storage a writer elsewhere never
    /// loses what it relies on. `None` is the store's own grace. In a folder, which one process owns, the grace may be 0:
    /// then garbage goes at once, and a reader that was in the midst of a capsule just removed is told so.
    ///
    /// # Errors
    /// If a capsule's records are damaged, so that it cannot be told what it needs: then nothing is deleted. If the grace
    /// is too short for object storage, or the storage fails; then the next gc goes on.
    pub fn gc(&self, grace: Option<Duration>) -> Result<GcReport, MaintenanceError> {
        self.ensure_writable()?;
        let mut writer = self.writer();
        let grace = grace.unwrap_or(self.grace);
        let single = self.storage.single_writer();
        if !single && grace < self.grace {
            let (place, least) = (self.place(), self.grace);
            return Err(MaintenanceError::Grace { place, wanted: grace, least });
        }
        // What this gc sees must be what a crash leaves: a removal that is not durable could come back without its rows.
        self.storage.flush(&Folder::ALL)?;
        let now = self.storage.now()?;
        let mut ripe = HashSet::new();
        let mut waiting = HashSet::new();
        let mut spent = Vec::new();
        for entry in self.storage.list(Folder::Condemned)? {
            let age = now.duration_since(entry.modified).unwrap_or_default();
            let objects = match self.condemned_objects(&entry.name) {
                Ok(objects) => objects,
                Err(ReadError::Storage(error)) => return Err(error.into()),
                // It can be carried out no more: what it condemned is condemned again.
                Err(ReadError::Damaged(_)) => {
                    spent.push(entry.name);
                    continue;
                }
            };
            // On object storage a list outlives its deletions: one that was given up on may yet be carried out, so its
            // names stay unused for a while.
            if age >= grace && (single || age >= 2 * grace) {
                spent.push(entry.name);
            } else {
                waiting.extend(objects.iter().cloned());
            }
            if age >= grace {
                ripe.extend(objects);
            }
        }
        let marked = self.mark()?;
        let mut report = GcReport::default();
        let mut newly = Vec::new();
        let folders: &[Folder] = if single {
            &[Folder::Nodes, Folder::Segments, Folder::Scopes]
        } else {
            &[Folder::Nodes, Folder::Segments]
        };
        for &folder in folders {
            for entry in self.storage.list(folder)? {
                let key = Key::new(folder, &entry.name);
                let name = key.to_string();
                if marked.contains(&name) {
                    report.kept.add(entry.bytes);
                } else if ripe.contains(&name) || (single && grace.is_zero()) {
                    self.storage.remove(&key)?;
                    report.deleted.add(entry.bytes);
                } else {
                    report.condemned.add(entry.bytes);
                    if !waiting.contains(&name) {
                        newly.push(name);
                    }
                }
            }
        }
        // In whatever order a crash keeps these deletions: what is left is garbage, and a save looks at all of it anew.
        self.storage.flush(folders)?;
        if !newly.is_empty() {
            self.condemn(newly)?;
        }
        for name in spent {
            self.storage.remove(&Key::new(Folder::Condemned, name))?;
        }
        self.storage.flush(&[Folder::Condemned])?;
        writer.condemned.clear();
        self.forget();
        self.recount();
        Ok(report)
    }

    /// The names of all objects that capsules need.
    fn mark(&self) -> Result<HashSet<String>, MaintenanceError> {
        let mut nodes = HashMap::new();
        let mut marked = HashSet::new();
        for entry in self.storage.list(Folder::Capsules)? {
            let Ok(id) = entry.name.parse::<CapsuleId>() else { continue };
            let capsule = match self.read_capsule(id, &mut nodes) {
                Ok(capsule) => capsule,
                Err(ReadError::Storage(error)) => return Err(error.into()),
                Err(ReadError::Damaged(source)) => {
                    // Another machine may have removed it since it was listed.
                    if self.storage.stat(&Key::new(Folder::Capsules, id))?.is_none() {
                        continue;
                    }
                    return Err(MaintenanceError::Unknown { capsule: id, source });
                }
            };
            for node in &capsule.nodes {
                marked.insert(Key::new(Folder::Nodes, node.id).to_string());
                marked.insert(Key::new(Folder::Scopes, node.scope()).to_string());
            }
            let rows = capsule.nodes.iter().flat_map(|node| node.segments());
            for segment in rows.chain(capsule.segments()) {
                marked.insert(Key::new(Folder::Segments, segment.name()).to_string());
            }
        }
        Ok(marked)
    }

    fn condemn(&self, objects: Vec<String>) -> Result<(), MaintenanceError> {
        let name = random_name().map_err(WriteError::from)?;
        let key = Key::new(Folder::Condemned, name);
        let record = to_json(&CondemnedRecord { version: VERSION, objects });
        let put = self.publish(Kind::Condemned, &key, (Compression::None, 1), &[&record], None);
        match put {
            Ok(_) => {}
            Err(SaveError::Write(error)) => return Err(error.into()),
            // The list is what frees the space, and it is small: it may go over the quota.
            Err(_) => {
                let framed = frame::frame(
                    Kind::Condemned,
                    &key,
                    self.key.as_ref(),
                    (Compression::None, 1),
                    &[&record],
                    None,
                )?;
                self.storage.put(&key, &framed.slices(&[&record]))?;
            }
        }
        self.storage.flush(&[Folder::Condemned])?;
        Ok(())
    }
}

enum Checked {
    Sound(u64),
    Damaged(Damaged),
    Foreign,
}

/// Which segment a name stands for.
fn segment_of(name: &str) -> Option<(SegmentId, u32)> {
    let (id, generation) = name.split_once('.').unwrap_or((name, "0"));
    Some((id.parse().ok()?, generation.parse().ok()?))
}

/// A segment that no record names; its length is not known.
fn unneeded(name: &str) -> Option<SegmentRef> {
    let (id, generation) = segment_of(name)?;
    Some(SegmentRef { id, bytes: 0, generation })
}
