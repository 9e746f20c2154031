//! A pulled plug and a killed process, at every step of a session of saves, removals and collections.
//!
//! What was acknowledged is there and verifies; nothing else looks whole unless it is; nothing at all is damaged; and the
//! store goes on. `AMPOULE_CRASH_IMAGES` sets how many random images of the disk are tried for each cut (6 by default).

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ampoule_store::{CapsuleId, Expected, FileStorage, Options, Store};
use support::sim::{Failure, SimFiles, Survive};
use support::{Branch, Random, scope};

fn open(files: &SimFiles) -> Result<Store, String> {
    let mut options = Options::default();
    options.threads = 1;
    options.segment_bytes = 4096;
    let storage = FileStorage::new(Arc::new(files.clone()));
    Store::open_storage(Box::new(storage), options).map_err(|e| e.to_string())
}

/// One thing that somebody does with the store.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant)]
enum Step {
    Open,
    Save(Branch),
    Head(&'static str, Option<CapsuleId>, CapsuleId),
    DropHead(&'static str),
    Remove(CapsuleId),
    Gc(u64),
    Wait(u64),
}

/// What the store has promised.
#[derive(Clone, Default, Debug)]
struct Promised {
    capsules: BTreeSet<CapsuleId>,
    heads: BTreeMap<&'static str, CapsuleId>,
    /// What was under way.
    current: Option<Step>,
}

struct Session {
    steps: Vec<Step>,
    branches: BTreeMap<CapsuleId, Branch>,
}

/// A session that saves, forks, removes a parent whose child stays, collects with and without grace, saves again what was
/// condemned, and moves heads.
fn session() -> Session {
    let s = scope(b"tenant");
    let mut a1 = Branch::new(&s);
    a1.turn(5, 3, 1);
    let mut a2 = a1.clone();
    a2.turn(2, 4, 2);
    let mut b2 = a1.clone();
    b2.turn(3, 0, 3);
    let mut a3 = a2.clone();
    a3.turn(0, 0, 4);
    let mut a4 = a3.clone();
    a4.turn(1, 6, 5);
    let mut other = Branch::new(&scope(b"other tenant"));
    other.turn(4, 1, 6);
    let mut ids = BTreeMap::new();
    let store = open(&SimFiles::new()).unwrap();
    let mut id = |branch: &Branch| {
        let saved = branch.save(&store).unwrap();
        ids.insert(saved.id, branch.clone());
        saved.id
    };
    let [i1, i2, ib, i3, i4, io] = [&a1, &a2, &b2, &a3, &a4, &other].map(&mut id);
    let steps = vec![
        Step::Open,
        Step::Save(a1.clone()),
        Step::Head("main", None, i1),
        Step::Save(a2.clone()),
        Step::Head("main", Some(i1), i2),
        Step::Save(b2.clone()),
        Step::Save(other.clone()),
        // The parent of two capsules goes, its rows stay.
        Step::Remove(i1),
        Step::Gc(0),
        Step::Save(a3.clone()),
        Step::Save(a4.clone()),
        Step::Head("main", Some(i2), i4),
        Step::Remove(ib),
        Step::Remove(i3),
        Step::Remove(io),
        Step::Gc(60),
        // What is condemned is needed again, and must not be what the next gc deletes.
        Step::Save(b2.clone()),
        Step::Wait(61),
        Step::Gc(60),
        Step::Save(other.clone()),
        Step::Head("spare", None, ib),
        Step::DropHead("spare"),
        // Saved again after all.
        Step::Save(a1.clone()),
        Step::Gc(0),
    ];
    let _ = i2;
    Session { steps, branches: ids }
}

impl Session {
    /// Carries the steps out until one fails.
    fn run(&self, files: &SimFiles, promised: &mut Promised) -> Result<(), String> {
        let mut store = None;
        for step in &self.steps {
            promised.current = Some(step.clone());
            self.carry_out(step, &mut store, files, promised)?;
            promised.current = None;
        }
        Ok(())
    }

    fn carry_out(
        &self,
        step: &Step,
        store: &mut Option<Store>,
        files: &SimFiles,
        promised: &mut Promised,
    ) -> Result<(), String> {
        if *step == Step::Open || store.is_none() {
            *store = Some(open(files)?);
        }
        let store = store.as_ref().unwrap();
        match step {
            Step::Open => {}
            Step::Save(branch) => {
                let saved = branch.save(store).map_err(|e| e.to_string())?;
                // A generation after condemnation gives another id.
                let known = self.branches.iter().find(|(_, b)| *b == branch).unwrap().0;
                promised.capsules.insert(saved.id);
                if saved.id != *known {
                    promised.capsules.remove(known);
                }
            }
            Step::Head(name, from, to) => {
                let expected = from.map_or(Expected::Nothing, Expected::Capsule);
                let to = self.present(store, *to);
                store.set_head(name, expected, to).map_err(|e| e.to_string())?;
                promised.heads.insert(name, to);
            }
            Step::DropHead(name) => {
                store.remove_head(name).map_err(|e| e.to_string())?;
                promised.heads.remove(name);
            }
            Step::Remove(id) => {
                store.remove(*id).map_err(|e| e.to_string())?;
                promised.capsules.remove(id);
            }
            Step::Gc(grace) => {
                let grace = Some(Duration::from_secs(*grace));
                store.gc(grace).map_err(|e| e.to_string())?;
            }
            Step::Wait(seconds) => files.advance(Duration::from_secs(*seconds)),
        }
        Ok(())
    }

    /// The capsule of this branch that is in the store: it may have been saved under another id, see generations.
    fn present(&self, store: &Store, id: CapsuleId) -> CapsuleId {
        let branch = &self.branches[&id];
        let all = store.catalog().unwrap().capsules;
        let found = all.iter().find(|listed| {
            listed.capsule.scope.salt == branch.scope.salt
                && listed.capsule.lineage() == branch.boundaries.last().unwrap().lineage
        });
        found.map_or(id, |listed| listed.capsule.id)
    }

    /// Checks a disk as a crash left it, then that the store goes on from it. Panics say what is wrong.
    fn verify(&self, files: &SimFiles, promised: &Promised) {
        let store = open(files).unwrap();
        self.verify_contents(&store, promised);
        let report = store.gc(Some(Duration::ZERO)).unwrap();
        self.verify_contents(&store, promised);
        let fsck = store.fsck().unwrap();
        assert_eq!(fsck.garbage, 0, "garbage is left after {report:?}");
        assert!(!files.files().keys().any(|path| path.starts_with("aside/")));
        // Everything can be saved again.
        for branch in self.branches.values() {
            let saved = branch.save(&store).unwrap();
            branch.check(&store, saved.id).unwrap();
        }
        assert!(store.fsck().unwrap().is_clean());
    }

    fn verify_contents(&self, store: &Store, promised: &Promised) {
        let catalog = store.catalog().unwrap();
        assert_eq!(catalog.unreadable, [], "a capsule that cannot be read");
        assert_eq!(catalog.damaged_heads, []);
        let there: BTreeSet<CapsuleId> = catalog.capsules.iter().map(|l| l.capsule.id).collect();
        for &id in &promised.capsules {
            let removing = matches!(promised.current, Some(Step::Remove(gone)) if gone == id);
            assert!(there.contains(&id) || removing, "capsule {id} was acknowledged and is lost");
        }
        for listed in &catalog.capsules {
            // Whatever is listed is one of the session's, and whole.
            let id = listed.capsule.id;
            let branch = self.branches.values().find(|b| {
                b.scope.salt == listed.capsule.scope.salt
                    && b.boundaries.last().unwrap().lineage == listed.capsule.lineage()
                    && b.boundaries.len() == listed.capsule.nodes.len()
            });
            branch.expect("a capsule that nobody saved").check(store, id).unwrap();
            let saving = matches!(&promised.current, Some(Step::Save(b)) if Some(b) == branch);
            let removing = matches!(promised.current, Some(Step::Remove(gone)) if gone == id);
            assert!(promised.capsules.contains(&id) || saving || removing, "removed, yet there");
        }
        let heads: BTreeMap<&str, CapsuleId> =
            catalog.heads.iter().map(|h| (h.name.as_str(), h.capsule)).collect();
        for name in ["main", "spare"] {
            let mut allowed = vec![promised.heads.get(name).copied()];
            match &promised.current {
                Some(Step::Head(moving, _, to)) if *moving == name => {
                    allowed.push(Some(self.present(store, *to)));
                }
                Some(Step::DropHead(dropped)) if *dropped == name => allowed.push(None),
                _ => {}
            }
            assert!(allowed.contains(&heads.get(name).copied()), "head {name}: {heads:?}");
        }
        let fsck = store.fsck().unwrap();
        assert_eq!(fsck.problems, []);
        assert_eq!(fsck.sound.len(), there.len());
    }
}

fn images() -> u64 {
    std::env::var("AMPOULE_CRASH_IMAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

fn survivals(cut: u64, random: u64) -> Vec<Survive> {
    let fixed = [Survive::Nothing, Survive::Everything, Survive::NamesOnly, Survive::ContentsOnly];
    fixed.into_iter().chain((0..random).map(|i| Survive::Random(cut * 1000 + i + 1))).collect()
}

fn setup(broken: &dyn Fn(&SimFiles)) -> SimFiles {
    let files = SimFiles::new();
    broken(&files);
    files
}

/// Cuts the session before every step; returns how many disks were checked. Panics at the first that is wrong.
fn cut_everywhere(broken: &dyn Fn(&SimFiles), random: u64) -> (u64, u64, u64) {
    let session = session();
    let files = setup(broken);
    let mut promised = Promised::default();
    session.run(&files, &mut promised).unwrap();
    session.verify(&files.after_kill(), &promised);
    let (total, syncs) = (files.steps(), files.syncs());
    let mut checked = 0;
    for cut in 0..=total {
        let files = setup(broken);
        files.fail_at(cut, Failure::Kill);
        let mut promised = Promised::default();
        let ran = session.run(&files, &mut promised);
        assert_eq!(ran.is_ok(), cut >= total, "step {cut} of {total}: {ran:?}");
        for survive in survivals(cut, random) {
            session.verify(&files.after_power_loss(survive), &promised);
            checked += 1;
        }
        // The process is killed and the machine lives: another process goes on from what it sees, and then the power
        // fails. What the second one acknowledged may rest on what the first one never made durable.
        let second = files.after_kill();
        broken(&second);
        let mut later = promised.clone();
        if let Some(step) = promised.current.clone() {
            // A head may have been moved already.
            let step = match step {
                Step::Head(name, _, to) if open(&second).unwrap().head(name).unwrap().is_some() => {
                    let from = open(&second).unwrap().head(name).unwrap();
                    Step::Head(name, from, to)
                }
                step => step,
            };
            session.carry_out(&step, &mut None, &second, &mut later).unwrap();
            later.current = None;
        }
        for survive in survivals(cut, random.div_ceil(2)) {
            session.verify(&second.after_power_loss(survive), &later);
            checked += 1;
        }
    }
    (total, syncs, checked)
}

#[test]
fn a_crash_at_any_step_loses_nothing_that_was_acknowledged() {
    let (steps, syncs, checked) = cut_everywhere(&|_| {}, images());
    println!("{steps} steps, {syncs} of them syncs; {checked} disks checked");
    assert!(steps > 150 && syncs > 60, "{steps} steps, {syncs} syncs");
}

/// The test above must be able to fail: with any one kind of sync left out it does.
#[test]
fn every_sync_is_needed() {
    let bugs: [(&str, Option<&str>, Option<&str>); 8] = [
        ("all files", Some(""), None),
        ("records of nodes", Some("\"spans\""), None),
        ("records of capsules", Some("\"fixed\""), None),
        ("folder segments", None, Some("segments")),
        ("folder nodes", None, Some("nodes")),
        ("folder scopes", None, Some("scopes")),
        ("folder capsules", None, Some("capsules")),
        ("folder heads", None, Some("heads")),
    ];
    // Only this thread's panics are expected.
    let (this, usual) = (std::thread::current().id(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().id() != this {
            usual(info);
        }
    }));
    let results = bugs.map(|(name, file, folder)| {
        let broken = |files: &SimFiles| files.skip_syncs(file, folder);
        (name, catch_unwind(AssertUnwindSafe(|| cut_everywhere(&broken, 1))).is_err())
    });
    let _ = std::panic::take_hook();
    for (name, caught) in results {
        assert!(caught, "without the sync of {name} nothing was noticed");
    }
}

/// Kills the process that recovers from a crash, too, and cuts the power after that.
#[test]
fn a_crash_during_recovery_loses_nothing_either() {
    let session = session();
    let files = SimFiles::new();
    session.run(&files, &mut Promised::default()).unwrap();
    let total = files.steps();
    let mut random = Random(77);
    for _ in 0..100 {
        let files = SimFiles::new();
        files.fail_at(random.below(total as usize) as u64, Failure::Kill);
        let mut promised = Promised::default();
        session.run(&files, &mut promised).unwrap_err();
        let mut files = files.after_power_loss(Survive::Random(random.below(1 << 40) as u64 + 1));
        for _ in 0..4 {
            files.fail_at(random.below(25) as u64, Failure::Kill);
            if let Ok(store) = open(&files)
                && store.gc(Some(Duration::ZERO)).is_ok()
            {
                for branch in session.branches.values() {
                    match branch.save(&store) {
                        Ok(saved) => {
                            promised.capsules.insert(saved.id);
                        }
                        // It may be there or not.
                        Err(_) => promised.current = Some(Step::Save(branch.clone())),
                    }
                }
            }
            let survive = Survive::Random(random.below(1 << 40) as u64 + 1);
            let left = files.after_power_loss(survive);
            if let Ok(store) = open(&left.after_kill()) {
                for &id in &promised.capsules {
                    if !matches!(promised.current, Some(Step::Remove(gone)) if gone == id) {
                        store.capsule(id).unwrap();
                    }
                }
                let fsck = store.fsck().unwrap();
                assert_eq!(fsck.problems, []);
            }
            files = left;
        }
    }
}

/// An operation that fails, at every step: nothing acknowledged is lost, and the store can be used afterwards.
#[test]
fn a_failing_medium_loses_nothing() {
    use std::io::ErrorKind;
    let session = session();
    let files = SimFiles::new();
    session.run(&files, &mut Promised::default()).unwrap();
    let total = files.steps();
    for kind in [ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem, ErrorKind::Other] {
        for at in 0..total {
            let files = SimFiles::new();
            files.fail_at(at, Failure::Once(kind));
            let mut promised = Promised::default();
            let Err(error) = session.run(&files, &mut promised) else { continue };
            match kind {
                ErrorKind::StorageFull => assert!(error.contains("disk is full"), "{error}"),
                ErrorKind::ReadOnlyFilesystem => assert!(error.contains("read-only"), "{error}"),
                _ => {}
            }
            files.heal();
            session.verify(&files.after_power_loss(Survive::Random(at + 1)), &promised);
            session.verify(&files.after_kill(), &promised);
        }
    }
}

/// A disk that is full stays full: what was saved is there, capsules can be removed and their space taken back.
#[test]
fn a_full_disk_can_be_emptied() {
    let session = session();
    let files = SimFiles::new();
    session.run(&files, &mut Promised::default()).unwrap();
    let store = open(&files).unwrap();
    let catalog = store.catalog().unwrap();
    files.fail_at(0, Failure::Full);
    let mut branch = Branch::new(&scope(b"new"));
    branch.turn(9, 9, 9);
    let error = branch.save(&store).unwrap_err().to_string();
    assert!(error.contains("disk is full") && error.contains("gc"), "{error}");
    let main = store.head("main").unwrap().unwrap();
    for listed in &catalog.capsules {
        store.fixed(&listed.capsule).unwrap();
        assert_eq!(store.remove(listed.capsule.id).is_ok(), listed.capsule.id != main);
    }
    assert!(store.gc(Some(Duration::ZERO)).unwrap().deleted.objects > 0);
    assert_eq!(store.fsck().unwrap().garbage, 0);
    files.heal();
    let saved = branch.save(&store).unwrap();
    branch.check(&store, saved.id).unwrap();
}
