//! What a store promises apart from crashes: sharing, damage that is found and named, keys, quotas, capsule files.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ampoule_capsule::CapsuleFile;
use ampoule_store::{
    CapsuleId, Compression, Damage, Expected, FileStorage, Folder, HeadError, Key, LoadError,
    MaintenanceError, OpenError, Options, SaveError, Store, StoreKey,
};
use support::sim::SimFiles;
use support::{Branch, Random, scope, scope_with};

fn options() -> Options {
    let mut options = Options::default();
    options.threads = 1;
    options.segment_bytes = 4096;
    options
}

fn open_with(files: &SimFiles, options: Options) -> Result<Store, OpenError> {
    Store::open_storage(Box::new(FileStorage::new(Arc::new(files.clone()))), options)
}

fn open(files: &SimFiles) -> Store {
    open_with(files, options()).unwrap()
}

fn read_only(files: &SimFiles, options: Options) -> Result<Store, OpenError> {
    Store::open_storage_read_only(Box::new(FileStorage::new(Arc::new(files.clone()))), options)
}

fn sealed() -> Options {
    let mut options = options();
    options.key = Some(StoreKey::new(&[42; 32]));
    options.compression = Compression::Zstd { level: 3 };
    options
}

/// Two sessions: one of three boundaries with a fork, one of another tenant; and a head.
fn small_store(options: &Options) -> (SimFiles, BTreeMap<CapsuleId, Branch>) {
    let files = SimFiles::new();
    let store = open_with(&files, options.clone()).unwrap();
    let mut a = Branch::new(&scope(b"a"));
    a.turn(3, 2, 1);
    let mut fork = a.clone();
    fork.turn(1, 1, 7);
    let mut b = a.clone();
    b.turn(2, 1, 2);
    let mut other = Branch::new(&scope(b"b"));
    other.turn(2, 2, 3);
    let all = [a, fork, b, other].map(|branch| (branch.save(&store).unwrap().id, branch));
    store.set_head("main", Expected::Nothing, all[0].0).unwrap();
    (files, all.into_iter().collect())
}

#[test]
fn a_session_costs_what_is_new() {
    let files = SimFiles::new();
    let store = open(&files);
    let mut branch = Branch::new(&scope_with(b"t", 1000, 40));
    let row = branch.scope.layout.row_bytes().unwrap() as u64;
    let fixed = branch.scope.layout.fixed_bytes().unwrap() as u64;
    let mut ids = Vec::new();
    for turn in 0..40 {
        let rows = 5 + turn % 9;
        branch.turn(rows as u32, 4, turn);
        let saved = branch.save(&store).unwrap();
        // Records and headers apart, a save writes its own rows and the fixed state.
        let new = (rows + 4) * row + fixed;
        assert!((new..new + 4000).contains(&saved.written), "{} for {new}", saved.written);
        ids.push(saved.id);
    }
    let rows = u64::from(branch.position()) * row;
    assert_eq!(store.catalog().unwrap().state_bytes(), (rows, 40 * fixed));
    let full: u64 = store.catalog().unwrap().capsules.iter().map(|l| l.capsule.row_bytes()).sum();
    assert!(full > 15 * rows);
    branch.check(&store, ids[39]).unwrap();
    // Nothing of it depends on what the first process remembers.
    let again = open(&files);
    assert_eq!(again.capsule(ids[39]).unwrap().nodes.len(), 40);
    branch.turn(3, 3, 99);
    let saved = branch.save(&again).unwrap();
    assert!(saved.written < 6 * row + fixed + 4000);
}

#[test]
fn saving_again_changes_nothing_and_repairs() {
    let (files, all) = small_store(&options());
    let before = files.files();
    let store = open(&files);
    for (id, branch) in &all {
        let saved = branch.save(&store).unwrap();
        assert_eq!((saved.id, saved.written), (*id, 0));
    }
    assert_eq!(files.files(), before);
    // The sources are asked only for what this process has not seen.
    let (id, branch) = all.iter().find(|(_, b)| b.boundaries.len() == 2).unwrap();
    assert!(matches!(branch.save_with(&open(&files), true), Err(SaveError::Source { .. })));
    for path in before.keys().filter(|path| path.contains('/') && !path.starts_with("heads")) {
        let mut bytes = before[path].clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        files.overwrite(path, bytes);
    }
    let store = open(&files);
    assert!(branch.check(&store, *id).is_err());
    for (id, branch) in &all {
        assert_eq!(branch.save(&store).unwrap().id, *id);
        branch.check(&store, *id).unwrap();
    }
    assert!(store.fsck().unwrap().is_clean());
    assert_eq!(files.files(), before);
}

/// Every byte of a small store, flipped in turn: found, named, and no other capsule affected.
#[test]
fn bit_rot_is_found_and_named() {
    for (options, stride) in [(options(), 1), (sealed(), 5)] {
        let (files, all) = small_store(&options);
        let before = files.files();
        let mut flipped = 0;
        for (path, bytes) in before.iter().filter(|(path, _)| *path != "lock") {
            for at in (0..bytes.len()).step_by(stride) {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << (at % 8);
                files.overwrite(path, damaged);
                let store = read_only(&files, options.clone()).unwrap();
                let fsck = store.fsck().unwrap();
                let named = |object: &Key| object.to_string() == *path;
                assert!(fsck.problems.iter().any(|p| named(&p.damaged.object)), "{path} byte {at}");
                let mut lost = 0;
                for (id, branch) in &all {
                    match branch.check(&store, *id) {
                        Ok(()) => assert!(fsck.sound.contains(id), "{path} byte {at}"),
                        Err(LoadError::Damaged { source, .. }) => {
                            assert!(named(&source.object), "{path} byte {at}: {source}");
                            assert!(!fsck.sound.contains(id));
                            lost += 1;
                        }
                        Err(error) => panic!("{path} byte {at}: {error}"),
                    }
                }
                // At most what lies below the damage: the whole of one session, never the other tenant's too.
                assert!(lost < all.len(), "{path} byte {at}");
                if path.starts_with("heads") {
                    assert_eq!(lost, 0);
                    let error = store.head("main").unwrap_err().to_string();
                    assert!(error.contains(path), "{error}");
                } else if !path.starts_with("store") {
                    assert!(lost > 0, "{path} byte {at}");
                }
                flipped += 1;
            }
            files.overwrite(path, bytes.clone());
        }
        println!("{flipped} bytes flipped, {} files", before.len() - 1);
        assert!(read_only(&files, options).unwrap().fsck().unwrap().is_clean());
    }
}

#[test]
fn cut_lengthened_swapped_and_missing_objects_are_named() {
    for options in [options(), sealed()] {
        let (files, all) = small_store(&options);
        let before = files.files();
        let segments: Vec<&String> = before.keys().filter(|p| p.starts_with("segments")).collect();
        let check = |wanted: &str, path: &str| {
            let store = read_only(&files, options.clone()).unwrap();
            let problems = store.fsck().unwrap().problems;
            let problem = problems.iter().find(|p| p.damaged.object.to_string() == path);
            let problem = problem.unwrap_or_else(|| panic!("{path} {wanted} was not found"));
            for id in &problem.capsules {
                let error = all[id].check(&store, *id).unwrap_err();
                assert!(error.to_string().contains(path), "{error}");
            }
            problem.damaged.damage.clone()
        };
        for path in &segments {
            let bytes = &before[*path];
            for length in [0, 1, 127, 128, bytes.len() - 1] {
                files.overwrite(path, bytes[..length].to_vec());
                assert!(matches!(check("cut", path), Damage::Length { .. }));
            }
            let mut long = bytes.clone();
            long.push(0);
            files.overwrite(path, long);
            assert!(matches!(check("lengthened", path), Damage::Length { .. }));
            files.overwrite(path, bytes.clone());
        }
        let same = segments
            .iter()
            .find(|p| **p != segments[0] && before[**p].len() == before[segments[0]].len());
        if let Some(other) = same {
            files.overwrite(segments[0], before[*other].clone());
            let damage = check("swapped", segments[0]);
            assert!(matches!(damage, Damage::Name | Damage::Seal), "{damage}");
            files.overwrite(segments[0], before[segments[0]].clone());
        }
        for path in before.keys().filter(|p| {
            p.starts_with("segments") || p.starts_with("nodes") || p.starts_with("scopes")
        }) {
            let copy = files.after_kill();
            copy.lose(path);
            let store = read_only(&copy, options.clone()).unwrap();
            let problems = store.fsck().unwrap().problems;
            assert!(problems.iter().any(|p| p.damaged.object.to_string() == *path
                && p.damaged.damage == Damage::Missing
                && !p.capsules.is_empty()));
            // What cannot be told is not deleted.
            if !path.starts_with("segments") {
                let store = open_with(&copy, options.clone()).unwrap();
                let error = store.gc(Some(Duration::ZERO)).unwrap_err();
                assert!(matches!(error, MaintenanceError::Unknown { .. }), "{error}");
                assert!(error.to_string().contains(path), "{error}");
            }
        }
    }
}

#[test]
fn either_of_the_store_records_is_enough() {
    let (files, all) = small_store(&options());
    for path in ["store", "store.copy"] {
        let bytes = files.files()[path].clone();
        files.overwrite(path, b"rubbish".to_vec());
        assert!(!read_only(&files, options()).unwrap().fsck().unwrap().is_clean());
        // Opened for writing it is mended.
        assert!(open(&files).fsck().unwrap().is_clean());
        assert_eq!(files.files()[path], bytes);
    }
    files.overwrite("store", b"rubbish".to_vec());
    files.overwrite("store.copy", b"rubbish".to_vec());
    let error = open_with(&files, options()).unwrap_err().to_string();
    assert!(error.contains("store") && error.contains("damaged"), "{error}");
    assert_eq!(all.len(), 4);
}

#[test]
fn damaged_objects_can_be_discarded_and_sound_ones_cannot() {
    let (files, all) = small_store(&options());
    let paths: Vec<String> = files.files().keys().filter(|p| p.contains('/')).cloned().collect();
    let store = open(&files);
    let key = |path: &str| {
        let (folder, name) = path.split_once('/').unwrap();
        let folder = Folder::ALL.into_iter().find(|f| f.name() == folder).unwrap();
        Key::new(folder, name)
    };
    for path in &paths {
        assert!(!store.discard(&key(path)).unwrap(), "{path} is sound");
    }
    let head = paths.iter().find(|path| path.starts_with("heads")).unwrap();
    let mut bytes = files.files()[head].clone();
    bytes[100] ^= 1;
    files.overwrite(head, bytes);
    let any = *all.keys().next().unwrap();
    assert!(matches!(store.remove(any), Err(MaintenanceError::Head { .. })));
    assert!(matches!(store.set_head("main", Expected::Nothing, any), Err(HeadError::Read(_))));
    assert!(store.discard(&key(head)).unwrap());
    assert_eq!(store.head("main").unwrap(), None);
    assert!(store.remove(any).unwrap());
}

#[test]
fn removal_keeps_what_descendants_need() {
    let files = SimFiles::new();
    let store = open(&files);
    let mut parent = Branch::new(&scope(b"t"));
    parent.turn(4, 4, 1);
    let mut child = parent.clone();
    child.turn(3, 3, 2);
    let (p, c) = (parent.save(&store).unwrap().id, child.save(&store).unwrap().id);
    store.set_head("main", Expected::Nothing, p).unwrap();
    assert!(
        matches!(store.remove(p), Err(MaintenanceError::HasHead { head, .. }) if head == "main")
    );
    assert!(store.remove_head("main").unwrap() && !store.remove_head("main").unwrap());
    assert!(store.remove(p).unwrap() && !store.remove(p).unwrap());
    assert!(matches!(store.capsule(p), Err(LoadError::NoSuchCapsule { .. })));
    let report = store.gc(Some(Duration::ZERO)).unwrap();
    // Only the parent's fixed state goes: of three segments two are of 4 bytes and 1 byte an element.
    assert_eq!(report.deleted.objects, 2, "{report:?}");
    child.check(&store, c).unwrap();
    // The parent comes back from its rows that are still there.
    let saved = parent.save(&store).unwrap();
    assert_eq!(saved.id, p);
    parent.check(&store, p).unwrap();
    assert!(store.remove(p).unwrap() && store.remove(c).unwrap());
    let report = store.gc(Some(Duration::ZERO)).unwrap();
    assert_eq!(report.kept.objects, 0);
    assert_eq!(store.stored_bytes().unwrap(), 0);
}

#[test]
fn garbage_waits_for_the_grace() {
    let files = SimFiles::new();
    let store = open(&files);
    let mut branch = Branch::new(&scope(b"t"));
    branch.turn(4, 4, 1);
    let id = branch.save(&store).unwrap().id;
    // A reader has the records, then the capsule is removed.
    let reader = read_only(&files, options()).unwrap();
    let capsule = reader.capsule(id).unwrap();
    store.remove(id).unwrap();
    let first = store.gc(None).unwrap();
    assert_eq!((first.deleted.objects, first.condemned.objects), (0, 6), "{first:?}");
    reader.rows(&capsule, 0).unwrap();
    reader.fixed(&capsule).unwrap();
    files.advance(Duration::from_secs(59));
    assert_eq!(store.gc(None).unwrap().deleted.objects, 0);
    files.advance(Duration::from_secs(1));
    assert_eq!(store.gc(None).unwrap().deleted.objects, 6);
    assert!(matches!(reader.rows(&capsule, 0), Err(LoadError::Removed { .. })));
    assert_eq!(store.stored_bytes().unwrap(), 0, "the list is left");
}

#[test]
fn a_quota_holds() {
    let files = SimFiles::new();
    let mut options = options();
    options.quota = Some(20_000);
    let store = open_with(&files, options).unwrap();
    let mut branch = Branch::new(&scope(b"t"));
    let mut ids = Vec::new();
    let error = loop {
        branch.turn(1, 1, ids.len() as u64);
        match branch.save(&store) {
            Ok(saved) => ids.push(saved.id),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SaveError::Quota { quota: 20_000, .. }), "{error}");
    assert!(store.stored_bytes().unwrap() <= 20_000 && ids.len() > 3);
    // The space of what is removed can be had again.
    store.remove(ids[0]).unwrap();
    store.remove(ids[1]).unwrap();
    store.gc(Some(Duration::ZERO)).unwrap();
    branch.save(&store).unwrap();
    assert!(store.stored_bytes().unwrap() <= 20_000);
    assert!(store.fsck().unwrap().is_clean());
}

#[test]
fn heads_move_only_from_where_they_are_expected() {
    let (files, all) = small_store(&options());
    let store = open(&files);
    let ids: Vec<CapsuleId> = all.keys().copied().collect();
    let at = store.head("main").unwrap().unwrap();
    let to = *ids.iter().find(|id| **id != at).unwrap();
    let conflict = |expected| match store.set_head("main", expected, to) {
        Err(error @ HeadError::Conflict { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(conflict(Expected::Nothing).contains(&at.to_string()));
    assert!(conflict(Expected::Capsule(to)).contains("another writer"));
    store.set_head("main", Expected::Capsule(at), to).unwrap();
    store.set_head("main", Expected::Anything, at).unwrap();
    let odd = "a name/with ../ anything: \u{e4}\u{1f980}";
    store.set_head(odd, Expected::Nothing, to).unwrap();
    assert_eq!(store.heads().unwrap().0.len(), 2);
    assert_eq!(read_only(&files, options()).unwrap().head(odd).unwrap(), Some(to));
    for name in ["", "a\nb", &"x".repeat(256)] {
        assert!(matches!(store.head(name), Err(HeadError::Name { .. })));
    }
    let nowhere: CapsuleId = "00".repeat(32).parse().unwrap();
    let error = store.set_head("x", Expected::Anything, nowhere).unwrap_err();
    assert!(matches!(error, HeadError::NoSuchCapsule { .. }));
}

#[test]
fn a_sealed_store_gives_nothing_away() {
    let (files, all) = small_store(&sealed());
    let plain = small_store(&options()).0;
    let (hidden, open_names) = (files.files(), plain.files());
    for (path, bytes) in &hidden {
        if path.contains('/') {
            assert!(!open_names.contains_key(path), "{path} is the name of the plain bytes");
        }
        for secret in ["made up", "lineage", "weights", "main"] {
            assert!(
                !bytes.windows(secret.len()).any(|w| w == secret.as_bytes()),
                "{path}: {secret}"
            );
        }
    }
    let error = read_only(&files, options()).unwrap_err();
    assert!(matches!(error, OpenError::KeyNeeded { .. }), "{error}");
    let mut wrong = sealed();
    wrong.key = Some(StoreKey::new(&[1; 32]));
    assert!(matches!(open_with(&files, wrong.clone()), Err(OpenError::WrongKey { .. })));
    assert!(matches!(open_with(&plain, wrong), Err(OpenError::NotSealed { .. })));
    // A plain object put among the sealed ones is refused.
    let (path, bytes) = open_names.iter().find(|(path, _)| path.starts_with("segments")).unwrap();
    let target = hidden.keys().find(|path| path.starts_with("segments")).unwrap();
    files.overwrite(target, bytes.clone());
    let problems = read_only(&files, sealed()).unwrap().fsck().unwrap().problems;
    assert!(matches!(problems[0].damaged.damage, Damage::Seal | Damage::Length { .. }), "{path}");
    assert_eq!(all.len(), 4);
}

#[test]
fn compression_is_lossless_and_chosen_by_segment() {
    let files = SimFiles::new();
    let mut zstd = options();
    zstd.compression = Compression::Zstd { level: 1 };
    let mut smooth = Branch::new(&scope_with(b"t", 4000, 16));
    smooth.turn(1500, 100, 0);
    let store = open_with(&files, zstd).unwrap();
    let id = smooth.save(&store).unwrap().id;
    smooth.check(&store, id).unwrap();
    // Read by a store that compresses nothing, which shares what is there.
    let plain = open(&files.after_kill());
    smooth.check(&plain, id).unwrap();
    assert_eq!(smooth.save(&plain).unwrap().written, 0);
}

#[test]
fn capsule_files_come_and_go() {
    let files = SimFiles::new();
    let store = open(&files);
    let mut branch = Branch::new(&scope(b"t"));
    branch.turn(3, 2, 1).turn(2, 2, 2);
    branch.note = Some("a note".to_owned());
    let id = branch.save(&store).unwrap().id;
    let export = |store: &Store, id| {
        let mut bytes = Vec::new();
        let join = |journals: &[Option<&str>]| Some(format!("{journals:?}"));
        let capsule = store.capsule(id).unwrap();
        let mut sink = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            std::ops::ControlFlow::Continue(())
        };
        store.export(&capsule, &join, &mut sink).unwrap();
        bytes
    };
    let bytes = export(&store, id);
    let file = CapsuleFile::parse(&bytes).unwrap();
    assert_eq!(file.manifest().position, 9);
    assert_eq!(file.manifest().note.as_deref(), Some("a note"));
    assert_eq!(file.manifest().journal.as_deref(), Some("[Some(\"[1]\"), Some(\"[2]\")]"));
    assert_eq!(file.tokens().collect::<Vec<_>>(), store.capsule(id).unwrap().tokens());
    // Into another store, as a chain of one link of the same lineage, and out again: the same state.
    let other = open(&SimFiles::new());
    let saved = other.import(&file).unwrap();
    let capsule = other.capsule(saved.id).unwrap();
    assert_eq!(capsule.lineage(), store.capsule(id).unwrap().lineage());
    assert_eq!(capsule.nodes.len(), 1);
    let again = export(&other, saved.id);
    let again = CapsuleFile::parse(&again).unwrap();
    for tensor in &branch.scope.layout.tensors {
        assert_eq!(again.tensor(&tensor.name), file.tensor(&tensor.name), "{}", tensor.name);
    }
    assert_eq!(again.manifest().parent, file.manifest().parent);
}

#[test]
fn what_does_not_agree_is_not_saved() {
    let files = SimFiles::new();
    let store = open(&files);
    let mut branch = Branch::new(&scope(b"t"));
    branch.turn(3, 2, 1).turn(2, 2, 2);
    let mut wrong = Vec::new();
    let mut change = |change: &dyn Fn(&mut Branch)| {
        let mut changed = branch.clone();
        change(&mut changed);
        wrong.push(changed.save(&store).unwrap_err().to_string());
    };
    change(&|b| b.boundaries.clear());
    change(&|b| b.boundaries[1].tokens[0] ^= 1);
    change(&|b| b.boundaries[1].spans[0].end += 1);
    change(&|b| {
        b.boundaries.remove(0);
    });
    change(&|b| b.scope.salt.0[0] ^= 1);
    change(&|b| b.scope.layout.tensors[0].name = "other".to_owned());
    change(&|b| b.note = Some("x".repeat(20_000)));
    change(&|b| {
        b.turn(60, 0, 3);
    });
    assert_eq!(wrong.len(), 8);
    assert!(store.catalog().unwrap().capsules.is_empty());
    let reader = read_only(&files, options()).unwrap();
    assert!(branch.save(&reader).unwrap_err().to_string().contains("read-only"));
    assert!(reader.gc(None).is_err() && reader.remove_head("x").is_err());
}

/// A model-based test: random saves, forks, removals, collections and reopenings against a map.
#[test]
fn a_thousand_random_operations_agree_with_a_map() {
    let mut random = Random(4711);
    for round in 0..8 {
        let options = if round % 2 == 0 { options() } else { sealed() };
        let files = SimFiles::new();
        let mut store = open_with(&files, options.clone()).unwrap();
        let mut model: BTreeMap<CapsuleId, Branch> = BTreeMap::new();
        for step in 0..125 {
            let pick = model.keys().nth(random.below(model.len())).copied();
            match (random.below(10), pick) {
                (0..=4, pick) => {
                    let mut branch =
                        pick.map_or_else(|| Branch::new(&scope(b"t")), |id| model[&id].clone());
                    if branch.position() > 50 {
                        continue;
                    }
                    branch.turn(random.below(4) as u32, random.below(4) as u32, step);
                    model.insert(branch.save(&store).unwrap().id, branch);
                }
                (5 | 6, Some(id)) => {
                    assert!(store.remove(id).unwrap());
                    model.remove(&id);
                }
                (7, _) => {
                    let grace = Duration::from_secs([0, 60][random.below(2)]);
                    store.gc(Some(grace)).unwrap();
                    files.advance(Duration::from_secs(random.below(90) as u64));
                }
                (8, Some(id)) => model[&id].check(&store, id).unwrap(),
                _ => {
                    drop(store);
                    store = open_with(&files, options.clone()).unwrap();
                }
            }
        }
        let listed: Vec<CapsuleId> =
            store.catalog().unwrap().capsules.iter().map(|l| l.capsule.id).collect();
        assert_eq!(listed.len(), model.len());
        for (id, branch) in &model {
            branch.check(&store, *id).unwrap();
        }
        assert!(store.fsck().unwrap().is_clean());
        for id in model.keys() {
            store.remove(*id).unwrap();
        }
        store.gc(Some(Duration::ZERO)).unwrap();
        assert_eq!(store.stored_bytes().unwrap(), 0);
    }
}
