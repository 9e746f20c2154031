//! Real processes on real files: killed while they save, two on one store, readers while garbage is collected.
//!
//! `AMPOULE_KILLS` sets how many processes are killed (60 by default; 500 is what docs/benchmarks reports).

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use ampoule_store::{CapsuleId, Expected, LoadError, OpenError, Options, Store};
use support::{Branch, Random, scope_with};

fn options() -> Options {
    let mut options = Options::default();
    options.threads = 2;
    options.segment_bytes = 4096;
    options
}

/// The session with this number after so many turns: the same in every process.
fn branch(session: u64, turns: u64) -> Branch {
    let mut branch = Branch::new(&scope_with(b"t", 4000, 24));
    for turn in 0..turns {
        branch.turn(3 + (turn % 5) as u32, 4, session * 1000 + turn);
    }
    branch
}

/// This test program again, to play a part.
fn spawn(part: &str, folder: &Path, session: u64) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture"])
        .env("AMPOULE_CHILD", part)
        .env("AMPOULE_CHILD_FOLDER", folder)
        .env("AMPOULE_CHILD_SESSION", session.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

fn say(words: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@ {words}").unwrap();
    out.flush().unwrap();
}

/// Not a test: what the child processes do.
#[test]
fn child() {
    let Ok(part) = std::env::var("AMPOULE_CHILD") else { return };
    let folder = std::env::var("AMPOULE_CHILD_FOLDER").unwrap();
    let session: u64 = std::env::var("AMPOULE_CHILD_SESSION").unwrap().parse().unwrap();
    let folder = Path::new(&folder);
    match part.as_str() {
        "save" => child_saves(folder, session),
        "hold" => {
            let _store = Store::open(folder, options()).unwrap();
            say(format_args!("held"));
            let _ = std::io::stdin().read(&mut [0]);
        }
        "read" => child_reads(folder),
        other => panic!("{other}"),
    }
}

/// Saves turn after turn, moves the head, removes old turns and collects, and says so, until it is killed.
fn child_saves(folder: &Path, session: u64) {
    let store = Store::open(folder, options()).unwrap();
    let mut branch = Branch::new(&scope_with(b"t", 4000, 24));
    let mut saved: Vec<CapsuleId> = Vec::new();
    for turn in 0..400_u64 {
        branch.turn(3 + (turn % 5) as u32, 4, session * 1000 + turn);
        let id = branch.save(&store).unwrap().id;
        say(format_args!("saved {id} {}", turn + 1));
        saved.push(id);
        store.set_head("newest", Expected::Anything, id).unwrap();
        say(format_args!("head {id}"));
        if turn % 4 == 3 {
            let old = saved[turn as usize - 2];
            say(format_args!("removing {old}"));
            store.remove(old).unwrap();
            say(format_args!("removed {old}"));
        }
        if turn % 6 == 5 {
            store.gc(Some(Duration::ZERO)).unwrap();
        }
    }
}

/// Reads whatever there is until its input ends; says how much and what went wrong.
fn child_reads(folder: &Path) {
    let (mut loads, mut gone, mut errors) = (0_u64, 0_u64, Vec::new());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        stopped.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    say(format_args!("reading"));
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        let store = Store::open_read_only(folder, options()).unwrap();
        let heads = store.heads().unwrap();
        assert!(heads.1.is_empty());
        let mut load = |id: CapsuleId, branch: Branch| match branch.check(&store, id) {
            Ok(()) => loads += 1,
            Err(LoadError::NoSuchCapsule { .. } | LoadError::Removed { .. }) => gone += 1,
            Err(error) => errors.push(error.to_string()),
        };
        for head in heads.0 {
            let (session, turns) = head.name.split_once(' ').unwrap();
            load(head.capsule, branch(session.parse().unwrap(), turns.parse().unwrap()));
        }
        match store.catalog() {
            Ok(catalog) => errors.extend(catalog.unreadable.iter().map(|(_, e)| e.to_string())),
            Err(error) => errors.push(error.to_string()),
        }
    }
    for error in &errors {
        say(format_args!("error {error}"));
    }
    say(format_args!("done {loads} {gone} {}", errors.len()));
}

#[test]
fn processes_killed_while_they_save_lose_nothing_that_they_acknowledged() {
    let kills: u64 = std::env::var("AMPOULE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut random = Random(99);
    let (mut acknowledged, mut in_midst, mut lost) = (0_u64, 0_u64, Vec::new());
    let mut kept: Vec<(CapsuleId, u64, u64)> = Vec::new();
    let begun = Instant::now();
    for session in 1..=kills {
        let (mut child, mut out) = spawn("save", &path, session);
        // From the first word on it is saving; killed at any time after that.
        let mut text = String::new();
        while !text.contains("@ saved") {
            assert!(out.read_line(&mut text).unwrap() > 0, "{text}");
        }
        std::thread::sleep(Duration::from_micros(random.below(60_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        out.read_to_string(&mut text).unwrap();
        let mut removing = None;
        let mut head: Option<CapsuleId> = None;
        let mut order: Vec<CapsuleId> = Vec::new();
        // A line that was cut is no word.
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [.., "@", "saved", id, turns] => {
                    kept.push((id.parse().unwrap(), session, turns.parse().unwrap()));
                    order.push(id.parse().unwrap());
                    acknowledged += 1;
                }
                ["@", "head", id] => head = Some(id.parse().unwrap()),
                ["@", "removing", id] => removing = Some(id.parse().unwrap()),
                ["@", "removed", id] => {
                    let id: CapsuleId = id.parse().unwrap();
                    kept.retain(|(other, ..)| *other != id);
                    removing = None;
                }
                _ => {}
            }
        }
        let store = Store::open(&path, options()).unwrap();
        let before = store.stored_bytes().unwrap();
        for (id, session, turns) in &kept {
            if Some(*id) == removing && store.capsule(*id).is_err() {
                continue;
            }
            if let Err(error) = branch(*session, *turns).check(&store, *id) {
                lost.push(error.to_string());
            }
        }
        kept.retain(|(id, ..)| Some(*id) != removing);
        // The head is at least as new as the last word of it, and whole.
        let at = store.head("newest").unwrap();
        let place = |id: Option<CapsuleId>| order.iter().position(|other| Some(*other) == id);
        if let Some(head) = head {
            assert!(place(at).is_none_or(|at| Some(at) >= place(Some(head))), "the head went back");
            store.capsule(at.unwrap()).unwrap();
        }
        let fsck = store.fsck().unwrap();
        assert_eq!(fsck.problems, [], "after kill {session}");
        in_midst += u64::from(fsck.garbage > 0);
        assert!(before > 0);
        // Only some stay, so that the test does not take forever; what is dropped is collected by the next process.
        for (id, ..) in kept.drain(..kept.len().saturating_sub(6)) {
            let pointed = store.head("newest").unwrap() == Some(id);
            if !pointed {
                store.remove(id).unwrap();
            }
        }
        store.gc(Some(Duration::ZERO)).unwrap();
        // A capsule that was whole but not acknowledged may stay; it verifies, as fsck just showed.
    }
    println!(
        "{{\"kills\": {kills}, \"acknowledged_saves\": {acknowledged}, \"killed_in_the_midst_of_a_write\": {in_midst}, \
         \"lost\": {}, \"seconds\": {:.1}}}",
        lost.len(),
        begun.elapsed().as_secs_f64()
    );
    assert_eq!(lost, Vec::<String>::new());
    assert!(in_midst > kills / 20, "hardly any kill met a save: {in_midst}");
}

#[test]
fn a_second_process_is_told_who_has_the_store_and_may_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let first = branch(1, 3);
    let id = first.save(&Store::open(&path, options()).unwrap()).unwrap().id;
    let (mut child, mut out) = spawn("hold", &path, 0);
    let mut text = String::new();
    while !text.contains("@ held") {
        assert!(out.read_line(&mut text).unwrap() > 0, "{text}");
    }
    let error = Store::open(&path, options()).unwrap_err();
    let OpenError::InUse { holder, .. } = &error else { panic!("{error}") };
    assert_eq!(holder.pid, child.id());
    assert!(!holder.host.is_empty());
    let message = error.to_string();
    assert!(message.contains(&format!("process {} on", child.id())), "{message}");
    assert!(message.contains("read-only"), "{message}");
    first.check(&Store::open_read_only(&path, options()).unwrap(), id).unwrap();
    // Killed, it holds nothing more.
    child.kill().unwrap();
    child.wait().unwrap();
    let store = Store::open(&path, options()).unwrap();
    first.check(&store, id).unwrap();
    // Within one process, too, there is one owner.
    let OpenError::InUse { holder, .. } = Store::open(&path, options()).unwrap_err() else {
        panic!()
    };
    assert_eq!(holder.pid, std::process::id());
    drop(store);
    assert_eq!(std::fs::metadata(path.join("lock")).unwrap().len(), 0);
    Store::open(&path, options()).unwrap();
}

#[test]
fn ten_readers_during_collection_see_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut writing = options();
    writing.grace = Some(Duration::from_secs(2));
    let store = Store::open(&path, writing).unwrap();
    for turns in 1..=4 {
        let id = branch(1, turns).save(&store).unwrap().id;
        store.set_head(&format!("1 {turns}"), Expected::Nothing, id).unwrap();
    }
    let mut readers: Vec<_> = (0..10).map(|_| spawn("read", &path, 0)).collect();
    let (mut saves, mut deleted) = (0, 0);
    let seconds: u64 =
        std::env::var("AMPOULE_READ_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let begun = Instant::now();
    let mut session = 2;
    while begun.elapsed() < Duration::from_secs(seconds) {
        // Capsules that come and go, with and without heads, while the first session stays.
        let name = format!("{session} 2");
        let parent = branch(session, 1).save(&store).unwrap().id;
        let child = branch(session, 2).save(&store).unwrap().id;
        store.set_head(&name, Expected::Nothing, child).unwrap();
        store.remove(parent).unwrap();
        if session > 6 {
            let old = format!("{} 2", session - 4);
            let id = store.head(&old).unwrap().unwrap();
            store.remove_head(&old).unwrap();
            store.remove(id).unwrap();
        }
        deleted += store.gc(None).unwrap().deleted.objects;
        saves += 2;
        session += 1;
    }
    let (mut loads, mut gone) = (0, 0);
    for (child, out) in &mut readers {
        drop(child.stdin.take());
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success(), "{text}");
        let done = text.lines().find_map(|line| line.split_once("@ done ")).unwrap().1;
        let numbers: Vec<u64> = done.split(' ').map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers[2], 0, "{text}");
        assert!(numbers[0] > 4, "{text}");
        loads += numbers[0];
        gone += numbers[1];
    }
    println!(
        "{{\"readers\": 10, \"seconds\": {seconds}, \"saves\": {saves}, \"objects_deleted\": {deleted}, \"loads\": {loads}, \
         \"removed_between_head_and_load\": {gone}, \"errors\": 0}}"
    );
    assert!(deleted > 0 && loads > 100);
    for turns in 1..=4 {
        let id = store.head(&format!("1 {turns}")).unwrap().unwrap();
        branch(1, turns).check(&store, id).unwrap();
    }
    assert!(store.fsck().unwrap().is_clean());
}

/// Unmounts a folder.
struct Mounted(String);
impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A real file system that is full, and one that is read-only. Needs the right to mount; says so where it has none.
#[test]
fn a_full_and_a_read_only_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| {
        let status = Command::new("mount").args(arguments).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let path = folder.path().to_str().unwrap();
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "none", path]) {
        println!(
            "no right to mount: not run; the simulated disk of tests/crash.rs is full and read-only, too"
        );
        return;
    }
    let _mounted = Mounted(path.to_owned());
    let place = folder.path().join("store");
    let store = Store::open(&place, options()).unwrap();
    let mut ids = Vec::new();
    let error = loop {
        let session = ids.len() as u64 + 1;
        match branch(session, 4).save(&store) {
            Ok(saved) => ids.push((saved.id, session)),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("disk is full") && error.contains("segments/"), "{error}");
    assert!(ids.len() > 3);
    let check = |store: &Store| {
        for (id, session) in &ids[1..] {
            branch(*session, 4).check(store, *id).unwrap();
        }
    };
    check(&store);
    store.remove(ids[0].0).unwrap();
    store.gc(Some(Duration::ZERO)).unwrap();
    let again = branch(ids.len() as u64 + 1, 1).save(&store).unwrap().id;
    drop(store);
    assert!(mount(&["-o", "remount,ro", path]));
    let error = Store::open(&place, options()).unwrap_err().to_string();
    assert!(error.to_lowercase().contains("read-only"), "{error}");
    let reader = Store::open_read_only(&place, options()).unwrap();
    check(&reader);
    assert!(reader.fsck().unwrap().is_clean());
    drop(reader);
    assert!(mount(&["-o", "remount,rw", path]));
    let store = Store::open(&place, options()).unwrap();
    check(&store);
    store.capsule(again).unwrap();
}

#[test]
fn what_is_no_regular_file_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), options()).unwrap();
    let id = branch(1, 1).save(&store).unwrap().id;
    let file = folder.path().join("store/capsules").join(id.to_string());
    std::fs::remove_file(&file).unwrap();
    let made = Command::new("mkfifo").arg(&file).status();
    if made.is_ok_and(|status| status.success()) {
        let error = store.capsule(id).unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
    }
    // A folder of something else is left alone.
    let other = folder.path().join("other");
    std::fs::create_dir_all(other.join("segments")).unwrap();
    std::fs::write(other.join("segments/mine"), b"x").unwrap();
    assert!(matches!(Store::open(&other, options()), Err(OpenError::NotAStore { .. })));
    let other = folder.path().join("project");
    std::fs::create_dir_all(other.join("src")).unwrap();
    let error = Store::open(&other, options()).unwrap_err().to_string();
    assert!(error.contains("holds other things"), "{error}");
    let left: Vec<_> = std::fs::read_dir(&other).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["src"], "nothing was made there");
    // An empty folder will do, and a new volume, and one where a store was being made.
    for (name, holds) in [("empty", None), ("volume", Some("lost+found")), ("begun", Some("aside"))]
    {
        let place = folder.path().join(name);
        std::fs::create_dir(&place).unwrap();
        if let Some(holds) = holds {
            std::fs::create_dir(place.join(holds)).unwrap();
        }
        drop(Store::open(&place, options()).unwrap());
        std::fs::write(place.join("mine"), b"x").unwrap();
        Store::open(&place, options()).unwrap();
    }
    assert!(matches!(
        Store::open_read_only(&folder.path().join("nothing"), options()),
        Err(OpenError::NotAStore { .. })
    ));
}
