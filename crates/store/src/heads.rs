//! Heads: names that point to capsules and can be moved, one writer at a time.

use crate::codec::Compression;
use crate::error::{Damage, Damaged, HeadError, ReadError, WriteError};
use crate::frame::{self, Kind};
use crate::identity::{CapsuleId, Named, random_name};
use crate::records::{HeadRecord, MAX_HEAD_BYTES, VERSION, from_json, to_json};
use crate::storage::{Folder, Key, Swapped, Version};
use crate::store::{Store, record_damage};

/// Bytes of a head's object at most.
const HEAD_OBJECT_BYTES: u64 = 1 << 20;

/// Where a head must point for a move to go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Anywhere or nowhere.
    Anything,
    /// Nowhere: the name is new.
    Nothing,
    /// To this capsule.
    Capsule(CapsuleId),
}

/// A name and the capsule that it points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The name.
    pub name: String,
    /// The capsule.
    pub capsule: CapsuleId,
}

impl Store {
    fn head_key(&self, name: &str) -> Result<Key, HeadError> {
        let key = self.name_key(Folder::Heads, Named::Head, name)?;
        if name.chars().any(char::is_control) {
            return Err(refused(name, "it has control characters"));
        }
        Ok(key)
    }

    /// Where what has this name lies.
    pub(crate) fn name_key(
        &self,
        folder: Folder,
        kind: Named,
        name: &str,
    ) -> Result<Key, HeadError> {
        if name.is_empty() {
            return Err(refused(name, "it is empty"));
        }
        if name.len() > MAX_HEAD_BYTES {
            return Err(refused(name, "it has more than 255 bytes"));
        }
        Ok(Key::new(folder, kind.digest(self.key.as_ref(), &[name.as_bytes()])))
    }

    /// Removes what has a name; `false` if there was none.
    pub(crate) fn remove_named(&self, key: &Key) -> Result<bool, HeadError> {
        let _turn = self.writer();
        let there = self.storage.stat(key)?.is_some();
        if there {
            self.storage.remove(key)?;
        }
        // Also where it is gone: a process that was killed while it removed it may not have made that durable.
        self.storage.flush(&[key.folder])?;
        Ok(there)
    }

    /// Where a head points; `None` if there is no such head.
    ///
    /// # Errors
    /// If the name cannot be used, the head is damaged, or the storage fails.
    pub fn head(&self, name: &str) -> Result<Option<CapsuleId>, HeadError> {
        let key = self.head_key(name)?;
        Ok(self.read_head(&key)?.map(|(record, _)| record.capsule))
    }

    /// Points a head to a capsule that is in the store. On return it is durable.
    ///
    /// # Errors
    /// [`HeadError::Conflict`] if it does not point where expected: of two writers that expect the same, one wins and the
    /// other gets this. If the capsule is not in the store, the name cannot be used, or the storage fails.
    pub fn set_head(
        &self,
        name: &str,
        expected: Expected,
        capsule: CapsuleId,
    ) -> Result<(), HeadError> {
        self.ensure_writable()?;
        let key = self.head_key(name)?;
        let _turn = self.writer();
        if self.storage.stat(&Key::new(Folder::Capsules, capsule))?.is_none() {
            return Err(HeadError::NoSuchCapsule { name: name.to_owned(), capsule });
        }
        let write = random_name().map_err(WriteError::from)?;
        let record = HeadRecord { version: VERSION, name: name.to_owned(), capsule, write };
        let bytes = to_json(&record);
        loop {
            let (found, version) = match self.read_head(&key) {
                Ok(found) => found.map(|(r, v)| (Some(r.capsule), Some(v))).unwrap_or_default(),
                // A damaged head can be set again, by whoever does not care what it was.
                Err(ReadError::Damaged(_)) if expected == Expected::Anything => {
                    let read = self.storage.read_version(&key, HEAD_OBJECT_BYTES)?;
                    (None, read.map(|(_, version)| version))
                }
                Err(error) => return Err(error.into()),
            };
            let fits = match expected {
                Expected::Anything => true,
                Expected::Nothing => found.is_none(),
                Expected::Capsule(id) => found == Some(id),
            };
            if !fits {
                return Err(conflict(name, expected, found));
            }
            let framed = frame::frame(
                Kind::Head,
                &key,
                self.key.as_ref(),
                (Compression::None, 1),
                &[&bytes],
                None,
            )?;
            let whole = framed.slices(&[&bytes]).concat();
            match self.storage.swap(&key, version.as_ref(), &whole)? {
                Swapped::Yes => return Ok(()),
                // Somebody came between: look again. With an expectation that can go on only while it holds.
                Swapped::No => {}
            }
        }
    }

    /// Removes a head; the capsule stays. `false` if there was none. A damaged head is removed too.
    ///
    /// # Errors
    /// If the name cannot be used or the storage fails.
    pub fn remove_head(&self, name: &str) -> Result<bool, HeadError> {
        self.ensure_writable()?;
        self.remove_named(&self.head_key(name)?)
    }

    /// All heads, by name, and those that are damaged.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn heads(&self) -> Result<(Vec<Head>, Vec<Damaged>), ReadError> {
        let (mut heads, mut damaged) = (Vec::new(), Vec::new());
        for entry in self.storage.list(Folder::Heads)? {
            let key = Key::new(Folder::Heads, entry.name);
            match self.read_head(&key) {
                Ok(Some((record, _))) => {
                    heads.push(Head { name: record.name, capsule: record.capsule });
                }
                // Removed since it was listed.
                Ok(None) => {}
                Err(ReadError::Damaged(error)) => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        heads.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((heads, damaged))
    }

    /// Checks one head by its key.
    pub(crate) fn check_head(&self, key: &Key) -> Result<(), ReadError> {
        self.read_head(key).map(|_| ())
    }

    fn read_head(&self, key: &Key) -> Result<Option<(HeadRecord, Version)>, ReadError> {
        let Some((bytes, version)) = self.storage.read_version(key, HEAD_OBJECT_BYTES)? else {
            return Ok(None);
        };
        let object = frame::parse(key, Kind::Head, Box::new(bytes))?;
        let json = object.record(self.key.as_ref())?;
        let record: HeadRecord = from_json(&json).map_err(|e| record_damage(key, e))?;
        record.check().map_err(|e| record_damage(key, e))?;
        let name = Named::Head.digest(self.key.as_ref(), &[record.name.as_bytes()]);
        if name.to_string() != key.name {
            return Err(Damaged { object: key.clone(), damage: Damage::Name }.into());
        }
        Ok(Some((record, version)))
    }
}

fn refused(name: &str, reason: &'static str) -> HeadError {
    let name = name.chars().take(64).flat_map(char::escape_default).collect();
    HeadError::Name { name, reason }
}

fn conflict(name: &str, expected: Expected, found: Option<CapsuleId>) -> HeadError {
    let expected = match expected {
        Expected::Anything => "anything".to_owned(),
        Expected::Nothing => "new".to_owned(),
        Expected::Capsule(id) => format!("at {id}"),
    };
    let found = found.map_or_else(|| "not there".to_owned(), |id| format!("at {id}"));
    HeadError::Conflict { name: name.to_owned(), expected, found }
}
