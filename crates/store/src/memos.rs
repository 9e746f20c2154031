//! Memos: small texts or bytes with a name, beside the capsules. What they mean is their owner's business; they are framed,
//! checked and encrypted as everything else is.

use crate::codec::Compression;
use crate::error::{Damage, Damaged, HeadError, ReadError, WriteError};
use crate::frame::{self, Kind, MAX_OBJECT_BYTES, MAX_RECORD_BYTES};
use crate::identity::Named;
use crate::storage::{Folder, Key, Swapped, Version};
use crate::store::{Store, record_damage};

/// A memo's name and what it holds.
pub type Memo = (String, Vec<u8>);

impl Store {
    fn memo_key(&self, name: &str) -> Result<Key, HeadError> {
        self.name_key(Folder::Memos, Named::Memo, name)
    }

    /// Writes a memo, over whatever it held. On return it is durable.
    ///
    /// # Errors
    /// If the name cannot be used, the contents have more than 64 MiB, or the storage fails; then it is as it was, or written.
    pub fn set_memo(&self, name: &str, contents: &[u8]) -> Result<(), HeadError> {
        self.ensure_writable()?;
        let key = self.memo_key(name)?;
        let length = [name.len() as u8];
        let bytes = (1 + name.len() + contents.len()) as u64;
        if bytes > MAX_RECORD_BYTES {
            let max = MAX_RECORD_BYTES;
            return Err(WriteError::TooLong { what: "a memo", bytes, max }.into());
        }
        let _turn = self.writer();
        let pieces = [length.as_slice(), name.as_bytes(), contents];
        let plain = (Compression::None, 1);
        let framed = frame::frame(Kind::Memo, &key, self.key.as_ref(), plain, &pieces, None)?;
        let whole = framed.slices(&pieces).concat();
        loop {
            let version = self.memo_version(&key)?;
            if self.storage.swap(&key, version.as_ref(), &whole)? == Swapped::Yes {
                return Ok(());
            }
        }
    }

    fn memo_version(&self, key: &Key) -> Result<Option<Version>, HeadError> {
        let read = self.storage.read_version(key, MAX_OBJECT_BYTES)?;
        Ok(read.map(|(_, version)| version))
    }

    /// What a memo holds; `None` if there is no such memo.
    ///
    /// # Errors
    /// If the name cannot be used, the memo is damaged, or the storage fails.
    pub fn memo(&self, name: &str) -> Result<Option<Vec<u8>>, HeadError> {
        let key = self.memo_key(name)?;
        Ok(self.read_memo(&key)?.map(|(_, contents)| contents))
    }

    /// All memos, by name, and those that are damaged.
    ///
    /// # Errors
    /// If the storage fails.
    pub fn memos(&self) -> Result<(Vec<Memo>, Vec<Damaged>), ReadError> {
        let (mut memos, mut damaged) = (Vec::new(), Vec::new());
        for entry in self.storage.list(Folder::Memos)? {
            match self.read_memo(&Key::new(Folder::Memos, entry.name)) {
                Ok(memo) => memos.extend(memo),
                Err(ReadError::Damaged(error)) => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        memos.sort();
        Ok((memos, damaged))
    }

    /// Removes a memo; `false` if there was none. A damaged one is removed too.
    ///
    /// # Errors
    /// If the name cannot be used or the storage fails.
    pub fn remove_memo(&self, name: &str) -> Result<bool, HeadError> {
        self.ensure_writable()?;
        self.remove_named(&self.memo_key(name)?)
    }

    /// Checks one memo by its key.
    pub(crate) fn check_memo(&self, key: &Key) -> Result<(), ReadError> {
        self.read_memo(key).map(|_| ())
    }

    fn read_memo(&self, key: &Key) -> Result<Option<Memo>, ReadError> {
        let Some((bytes, _)) = self.storage.read_version(key, MAX_OBJECT_BYTES)? else {
            return Ok(None);
        };
        let object = frame::parse(key, Kind::Memo, Box::new(bytes))?;
        let payload = object.record(self.key.as_ref())?;
        let parts =
            payload.split_first().and_then(|(n, rest)| rest.split_at_checked(usize::from(*n)));
        let short = || record_damage(key, "it is too short for its name".to_owned());
        let (name, contents) = parts.ok_or_else(short)?;
        let name =
            String::from_utf8(name.to_vec()).map_err(|e| record_damage(key, e.to_string()))?;
        let digest = Named::Memo.digest(self.key.as_ref(), &[name.as_bytes()]);
        if digest.to_string() != key.name {
            return Err(Damaged { object: key.clone(), damage: Damage::Name }.into());
        }
        Ok(Some((name, contents.to_vec())))
    }
}

#[cfg(test)]
mod tests {
    use crate::{Options, Store, StoreKey};

    fn options(key: Option<StoreKey>) -> Options {
        Options { key, ..Options::default() }
    }

    #[test]
    fn memos_are_kept_replaced_sealed_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        for key in [None, Some(StoreKey::new(&[7; 32]))] {
            let place = folder.path().join(if key.is_some() { "sealed" } else { "plain" });
            let store = Store::open(&place, options(key.clone())).unwrap();
            assert_eq!(store.memo("a").unwrap(), None);
            store.set_memo("a", b"what a user said").unwrap();
            store.set_memo("b", b"").unwrap();
            store.set_memo("a", b"what a user said later").unwrap();
            drop(store);
            let store = Store::open(&place, options(key.clone())).unwrap();
            assert_eq!(store.memo("a").unwrap().unwrap(), b"what a user said later");
            let names: Vec<String> = store.memos().unwrap().0.into_iter().map(|m| m.0).collect();
            assert_eq!(names, ["a", "b"]);
            assert!(store.set_memo("", b"").is_err() && store.memo(&"x".repeat(256)).is_err());
            let report = store.fsck().unwrap();
            assert!(report.problems.is_empty() && report.foreign.is_empty(), "{report:?}");
            // The words lie there only where nobody asked for a key.
            let files: Vec<_> = std::fs::read_dir(place.join("memos"))
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            assert_eq!(files.len(), 2);
            let seen = files.iter().any(|f| {
                let bytes = std::fs::read(f).unwrap();
                bytes.windows(4).any(|w| w == b"said")
            });
            assert_eq!(seen, key.is_none());
            for file in &files {
                let mut bytes = std::fs::read(file).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                std::fs::write(file, bytes).unwrap();
            }
            assert!(store.memo("a").is_err());
            assert_eq!(store.memos().unwrap().1.len(), 2);
            assert_eq!(store.fsck().unwrap().problems.len(), 2);
            assert!(store.remove_memo("a").unwrap() && !store.remove_memo("a").unwrap());
            store.set_memo("b", b"anew").unwrap();
            assert_eq!(store.memo("b").unwrap().unwrap(), b"anew");
            drop(store);
            if key.is_some() {
                assert!(Store::open(&place, options(Some(StoreKey::new(&[8; 32])))).is_err());
            }
        }
    }
}
