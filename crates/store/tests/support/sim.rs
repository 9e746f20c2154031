//! Files in memory that keep no more promises than the `Vfs` trait makes.
//!
//! Contents are durable after a sync of the file, names after a sync of their folder; until then every write and every
//! change of a name may or may not survive a crash, each by itself, in any order, and a write may survive in part. Every
//! operation is a step; at a chosen step the process is killed, or an operation fails.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use ampoule_store::{FileEntry, Holder, LockOutcome, ReadFile, Vfs, WriteFile};

use super::Random;

type Inode = usize;

#[derive(Clone, Default)]
struct File {
    /// What a crash leaves at least.
    durable: Vec<u8>,
    /// Appends since the last sync.
    pending: Vec<Vec<u8>>,
    /// When it was made.
    modified: u64,
}

impl File {
    fn contents(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        self.pending.iter().for_each(|write| bytes.extend_from_slice(write));
        bytes
    }
}

/// A change of one name that is not durable yet.
#[derive(Clone)]
enum Change {
    Point(String, Inode),
    Remove(String),
}

#[derive(Clone, Default)]
struct Folder {
    durable: BTreeMap<String, Inode>,
    pending: Vec<Change>,
}

impl Folder {
    fn now(&self) -> BTreeMap<String, Inode> {
        let mut names = self.durable.clone();
        self.pending.iter().for_each(|change| apply(&mut names, change));
        names
    }
}

fn apply(names: &mut BTreeMap<String, Inode>, change: &Change) {
    match change {
        Change::Point(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        Change::Remove(name) => {
            names.remove(name);
        }
    }
}

#[derive(Clone, Default)]
struct Disk {
    files: Vec<File>,
    folders: HashMap<String, Folder>,
    /// Folders whose own names are not durable.
    new_folders: Vec<String>,
    clock: u64,
}

/// How a step fails.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// The process is killed before the step: this and all further steps fail.
    Kill,
    /// This one step fails, the process goes on.
    Once(io::ErrorKind),
    /// This and all further steps that need space fail.
    Full,
}

#[derive(Default)]
struct State {
    disk: Disk,
    steps: u64,
    failure: Option<(u64, Failure)>,
    /// Bugs to be found: syncs that are silently left out.
    skip_file_sync: Option<String>,
    skip_folder_sync: Option<String>,
    syncs: u64,
}

/// Which un-synced changes survive a power loss.
#[derive(Clone, Copy, Debug)]
pub enum Survive {
    Nothing,
    Everything,
    /// Names survive, contents do not.
    NamesOnly,
    /// Contents survive, names do not.
    ContentsOnly,
    Random(u64),
}

/// The simulated disk; clones share it.
#[derive(Clone, Default)]
pub struct SimFiles(Arc<Mutex<State>>);

impl SimFiles {
    pub fn new() -> Self {
        let files = Self::default();
        files.state().disk.folders.insert(String::new(), Folder::default());
        files
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Fails at the step with this number, counted from now.
    pub fn fail_at(&self, step: u64, failure: Failure) {
        let mut state = self.state();
        let at = state.steps + step;
        state.failure = Some((at, failure));
    }

    pub fn heal(&self) {
        self.state().failure = None;
    }

    /// Leaves out every sync of files whose contents contain this text ("" for all), or of folders of this name.
    pub fn skip_syncs(&self, file: Option<&str>, folder: Option<&str>) {
        let mut state = self.state();
        state.skip_file_sync = file.map(str::to_owned);
        state.skip_folder_sync = folder.map(str::to_owned);
    }

    pub fn advance(&self, by: Duration) {
        self.state().disk.clock += by.as_secs();
    }

    /// The process is gone, the operating system lives: nothing is lost, nothing more is durable.
    pub fn after_kill(&self) -> Self {
        let disk = self.state().disk.clone();
        Self(Arc::new(Mutex::new(State { disk, ..State::default() })))
    }

    /// What a disk may hold after the power failed.
    pub fn after_power_loss(&self, survive: Survive) -> Self {
        let mut disk = self.state().disk.clone();
        let mut random = Random(match survive {
            Survive::Random(seed) => seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            _ => 1,
        });
        for file in &mut disk.files {
            let pending = std::mem::take(&mut file.pending);
            match survive {
                Survive::Everything | Survive::ContentsOnly => {
                    pending.iter().for_each(|write| file.durable.extend_from_slice(write));
                }
                Survive::Nothing | Survive::NamesOnly => {}
                Survive::Random(_) => tear(&mut file.durable, &pending, &mut random),
            }
        }
        for (name, folder) in &mut disk.folders {
            let pending = std::mem::take(&mut folder.pending);
            for change in &pending {
                let kept = match survive {
                    Survive::Everything | Survive::NamesOnly => true,
                    Survive::Nothing | Survive::ContentsOnly => false,
                    Survive::Random(_) => random.below(2) == 0,
                };
                if kept {
                    apply(&mut folder.durable, change);
                }
            }
            let _ = name;
        }
        let lost: Vec<String> = std::mem::take(&mut disk.new_folders)
            .into_iter()
            .filter(|_| match survive {
                Survive::Everything | Survive::NamesOnly => false,
                Survive::Nothing | Survive::ContentsOnly => true,
                Survive::Random(_) => random.below(2) == 0,
            })
            .collect();
        disk.folders.retain(|name, _| !lost.contains(name));
        Self(Arc::new(Mutex::new(State { disk, ..State::default() })))
    }

    /// Every file with its contents.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        let mut all = BTreeMap::new();
        for (folder, names) in &state.disk.folders {
            for (name, inode) in names.now() {
                let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                all.insert(path, state.disk.files[inode].contents());
            }
        }
        all
    }

    /// Replaces a file's contents behind everybody's back.
    pub fn overwrite(&self, path: &str, bytes: Vec<u8>) {
        let mut state = self.state();
        let inode = find(&state.disk, path).unwrap();
        let file = &mut state.disk.files[inode];
        (file.durable, file.pending) = (bytes, Vec::new());
    }

    /// Removes a file behind everybody's back.
    pub fn lose(&self, path: &str) {
        let mut state = self.state();
        let (folder, name) = split(path);
        let folder = state.disk.folders.get_mut(folder).unwrap();
        folder.durable.remove(name);
        folder.pending.clear();
    }

    fn step(&self, needs_space: bool) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        let step = state.steps;
        state.steps += 1;
        match state.failure {
            Some((at, Failure::Kill)) if step >= at => Err(io::Error::other("killed")),
            Some((at, Failure::Once(kind))) if step == at => Err(kind.into()),
            Some((at, Failure::Full)) if step >= at && needs_space => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(state),
        }
    }
}

/// Appends what survives of writes: each sector by itself; what did not reach the disk reads as zeros up to the end of
/// what did.
fn tear(durable: &mut Vec<u8>, pending: &[Vec<u8>], random: &mut Random) {
    const SECTOR: usize = 64;
    let start = durable.len();
    let mut whole = Vec::new();
    let mut kept = 0;
    for write in pending {
        for sector in write.chunks(SECTOR) {
            let lives = random.below(3) > 0;
            let to = whole.len() + sector.len();
            if lives {
                whole.extend_from_slice(sector);
                kept = to;
            } else {
                whole.resize(to, 0);
            }
        }
    }
    // The length may be durable although the sectors are not.
    if random.below(2) == 0 {
        kept = whole.len();
    }
    durable.extend_from_slice(&whole[..kept]);
    debug_assert!(durable.len() >= start);
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn find(disk: &Disk, path: &str) -> io::Result<Inode> {
    let (folder, name) = split(path);
    let folder = disk.folders.get(folder).ok_or(io::ErrorKind::NotFound)?;
    folder.now().get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
}

struct Writing {
    files: SimFiles,
    inode: Inode,
}

impl WriteFile for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let result = self.files.step(true);
        match result {
            Ok(mut state) => {
                state.disk.files[self.inode].pending.push(bytes.to_vec());
                Ok(())
            }
            Err(error) => {
                // What fails may have been done in part.
                let part = bytes[..bytes.len() / 2].to_vec();
                if error.to_string() != "killed" {
                    self.files.state().disk.files[self.inode].pending.push(part);
                }
                Err(error)
            }
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.files.step(true)?;
        state.syncs += 1;
        let contents = state.disk.files[self.inode].contents();
        if let Some(text) = &state.skip_file_sync
            && contents.windows(text.len().max(1)).any(|w| text.is_empty() || w == text.as_bytes())
        {
            return Ok(());
        }
        let file = &mut state.disk.files[self.inode];
        (file.durable, file.pending) = (contents, Vec::new());
        Ok(())
    }
}

struct Reading(Vec<u8>);

impl ReadFile for Reading {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.get(offset as usize..offset as usize + into.len());
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl Vfs for SimFiles {
    fn describe(&self) -> String {
        "simulated files".to_owned()
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn WriteFile>> {
        let mut state = self.step(true)?;
        if find(&state.disk, path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = state.disk.files.len();
        let modified = state.disk.clock;
        state.disk.files.push(File { modified, ..File::default() });
        let (folder, name) = split(path);
        let folder = state.disk.folders.get_mut(folder).ok_or(io::ErrorKind::NotFound)?;
        folder.pending.push(Change::Point(name.to_owned(), inode));
        Ok(Box::new(Writing { files: self.clone(), inode }))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>> {
        // Reading changes nothing, so a cut between reads need not be tried.
        let state = self.state();
        if matches!(state.failure, Some((at, Failure::Kill)) if state.steps > at) {
            return Err(io::Error::other("killed"));
        }
        let inode = find(&state.disk, path)?;
        Ok(Box::new(Reading(state.disk.files[inode].contents())))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.step(false)?;
        let inode = find(&state.disk, from)?;
        let ((from_folder, from_name), (to_folder, to_name)) = (split(from), split(to));
        let folder = state.disk.folders.get_mut(to_folder).ok_or(io::ErrorKind::NotFound)?;
        folder.pending.push(Change::Point(to_name.to_owned(), inode));
        let folder = state.disk.folders.get_mut(from_folder).unwrap();
        folder.pending.push(Change::Remove(from_name.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut state = self.step(false)?;
        find(&state.disk, path)?;
        let (folder, name) = split(path);
        let folder = state.disk.folders.get_mut(folder).unwrap();
        folder.pending.push(Change::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_folder(&self, path: &str) -> io::Result<()> {
        let mut state = self.step(false)?;
        state.syncs += 1;
        if state.skip_folder_sync.as_deref() == Some(path) {
            return Ok(());
        }
        if path.is_empty() {
            state.disk.new_folders.clear();
        }
        let folder = state.disk.folders.get_mut(path).ok_or(io::ErrorKind::NotFound)?;
        *folder = Folder { durable: folder.now(), pending: Vec::new() };
        Ok(())
    }

    fn create_folder(&self, path: &str) -> io::Result<()> {
        let mut state = self.step(true)?;
        if !state.disk.folders.contains_key(path) {
            state.disk.folders.insert(path.to_owned(), Folder::default());
            state.disk.new_folders.push(path.to_owned());
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<FileEntry>> {
        let state = self.state();
        let names = state.disk.folders.get(folder).ok_or(io::ErrorKind::NotFound)?.now();
        let entry = |(name, inode): (String, Inode)| FileEntry {
            name,
            bytes: state.disk.files[inode].contents().len() as u64,
            modified: SystemTime::UNIX_EPOCH
                + Duration::from_secs(state.disk.files[inode].modified),
        };
        Ok(names.into_iter().map(entry).collect())
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.state().disk.clock)
    }

    fn lock(&self, _: &str, _: &Holder) -> io::Result<LockOutcome> {
        let _state = self.step(false)?;
        Ok(LockOutcome::Taken(Box::new(())))
    }
}
