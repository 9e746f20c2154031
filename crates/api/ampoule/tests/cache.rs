//! Capsules in tiers: budgets hold, what comes back is the same bits, and nobody loses rows that others need.

use std::sync::Arc;

use ampoule::backends::CpuBackend;
use ampoule::store::tiers::{Budgets, Candidate, Policy, StateKind, Tier, TierError, Usage};
use ampoule::{
    Ampoule, CacheError, CacheEvent, CacheOptions, CapsuleCache, CapsuleKey, CapsuleStore,
    EngineError, EngineOptions, Error, LoadOptions, SlotId, StoreError, StoreOptions, StoredState,
};

fn model() -> Ampoule {
    model_with(EngineOptions::default().capsule_bytes)
}

fn model_with(capsule_bytes: usize) -> Ampoule {
    let engine = EngineOptions { slots: 2, capsule_bytes, ..EngineOptions::default() };
    let options = LoadOptions { context: 512, engine, ..LoadOptions::default() };
    Ampoule::load_on(&CpuBackend::new(1), "random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap()
}

fn store(folder: &tempfile::TempDir) -> Arc<CapsuleStore> {
    let place = folder.path().join("store");
    Arc::new(CapsuleStore::open(place.to_str().unwrap(), StoreOptions::default()).unwrap())
}

fn options(host: u64, disk: u64) -> CacheOptions {
    CacheOptions { budgets: Budgets { device: 0, host, disk }, forget: false }
}

type State = Vec<(String, Vec<u8>)>;

/// A session of `turns` turns of ten tokens, a capsule of each, and every State byte at each.
fn session(
    model: &mut Ampoule,
    cache: &mut CapsuleCache<impl Policy<u64>>,
    slot: SlotId,
    turns: u32,
    seed: u32,
) -> Vec<(CapsuleKey, State)> {
    model.engine.reset(slot).unwrap();
    let turn = |turn: u32| {
        let tokens: Vec<u32> = (0..10).map(|i| (seed * 131 + turn * 17 + i * 7) % 512).collect();
        model.append(slot, &tokens).unwrap();
        let key = cache.snapshot(model, slot, false).unwrap();
        (key, model.engine.state_bytes(slot).unwrap())
    };
    (0..turns).map(turn).collect()
}

fn fixed_bytes(model: &mut Ampoule) -> u64 {
    let slot = model.slot_with(&[1]).unwrap();
    let (_, fixed) = model.engine.snapshot_bytes(slot).unwrap();
    model.engine.drop_slot(slot).unwrap();
    fixed as u64
}

/// Restores every capsule and compares every State byte.
fn all_the_same(
    model: &mut Ampoule,
    cache: &mut CapsuleCache<impl Policy<u64>>,
    slot: SlotId,
    known: &[(CapsuleKey, State)],
) {
    for (key, state) in known.iter().rev().chain(known) {
        // Rows of another session, so that the restore has to copy all of its own.
        model.engine.reset(slot).unwrap();
        model.append(slot, &[500, 501]).unwrap();
        cache.restore(model, *key, slot).unwrap();
        assert!(model.engine.state_bytes(slot).unwrap() == *state, "capsule {key} has other bits");
        check_books(model, cache);
    }
}

/// The budget holds, and what the cache counts is what the engine holds.
fn check_books(model: &Ampoule, cache: &CapsuleCache<impl Policy<u64>>) {
    let (host, budgets) = (cache.usage(Tier::Host), cache.budgets());
    assert!(host.total() <= budgets.host, "{host:?} of {budgets:?}");
    assert!(cache.usage(Tier::Disk).total() <= budgets.disk);
    assert_eq!(model.engine.capsule_bytes().0 as u64, host.total());
}

#[test]
fn a_cache_can_go_to_another_thread() {
    fn send<T: Send>() {}
    send::<CapsuleCache>();
    send::<Ampoule>();
}

#[test]
fn what_is_read_ahead_is_not_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder);
    let mut model = model();
    let slot = model.engine.create_slot().unwrap();
    let turn = |model: &mut Ampoule, turn: u32| {
        let tokens: Vec<u32> = (0..10).map(|i| (turn * 17 + i * 7) % 512).collect();
        model.append(slot, &tokens).unwrap();
        model.engine.snapshot(slot).unwrap()
    };
    let (first, _, last) = (turn(&mut model, 0), turn(&mut model, 1), turn(&mut model, 2));
    let expected = model.engine.state_bytes(slot).unwrap();
    let id = store.save(&model, &last, None, None).unwrap().id;
    drop(last);
    // A slot holds the rows that lie in its memory.
    model.engine.drop_slot(slot).unwrap();
    let check = |model: &mut Ampoule, state: &StoredState| {
        let loaded = store.finish_load(model, state).unwrap();
        let slot = model.engine.create_slot().unwrap();
        model.engine.restore(slot, &loaded).unwrap();
        assert!(model.engine.state_bytes(slot).unwrap() == expected);
        model.engine.drop_slot(slot).unwrap();
    };

    // Rows that somebody holds need not be read.
    let mut ahead = store.begin_load(id).unwrap();
    let lacks = model.lacks(&ahead).unwrap();
    assert_eq!(lacks, [1, 2]);
    store.read_ahead(&mut ahead, &lacks, u64::MAX).unwrap();
    // As if there had not been room for more than the fixed state, and nothing read at all.
    let (mut little, bare) = (store.begin_load(id).unwrap(), store.begin_load(id).unwrap());
    store.read_ahead(&mut little, &lacks, fixed_bytes(&mut model) + 1).unwrap();
    for state in [&ahead, &little, &bare] {
        check(&mut model, state);
    }

    let segments = folder.path().join("store/segments");
    std::fs::rename(&segments, folder.path().join("elsewhere")).unwrap();
    check(&mut model, &ahead);
    for state in [&little, &bare] {
        store.finish_load(&mut model, state).unwrap_err();
    }
    // What was held when it was read ahead is gone: that is read now, and is not there.
    drop(first);
    assert_eq!(model.lacks(&ahead).unwrap(), [0, 1, 2]);
    store.finish_load(&mut model, &ahead).unwrap_err();
    std::fs::rename(folder.path().join("elsewhere"), &segments).unwrap();
    check(&mut model, &ahead);

    // A context that it is too long for is refused before anything is read.
    let options = LoadOptions { context: 16, ..LoadOptions::default() };
    let other = "random:qwen3.5-tiny";
    let other = Ampoule::load_on(&CpuBackend::new(1), other, &options, &mut |_, _| {}).unwrap();
    other.lacks(&ahead).unwrap_err();
}

#[test]
fn what_left_memory_comes_back_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    // Room for the fixed state of five capsules, rows included.
    let mut cache = CapsuleCache::new(&model, Some(store(&folder)), options(5 * fixed, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let mut known = session(&mut model, &mut cache, slot, 12, 1);
    known.extend(session(&mut model, &mut cache, slot, 6, 2));
    model.engine.reset(slot).unwrap();
    check_books(&model, &cache);
    let on_disk = cache.usage(Tier::Disk);
    assert!(on_disk.fixed >= 13 * fixed, "{on_disk:?}");
    let events = cache.take_events();
    let left =
        |e: &&CacheEvent| matches!(e, CacheEvent::Moved { from: Tier::Host, to: Tier::Disk, .. });
    assert!(events.iter().filter(left).count() >= 13, "{events:?}");
    all_the_same(&mut model, &mut cache, slot, &known);
    assert!(cache.usage(Tier::Host).rows > 0 && cache.usage(Tier::Disk).rows > 0);
    let list = cache.list();
    assert_eq!(list.len(), 18);
    for capsule in &list {
        let (host, disk) = (capsule.bytes.host, capsule.bytes.disk);
        assert_eq!(host.fixed + disk.fixed, fixed);
        assert_eq!((host.rows + disk.rows) % u64::from(capsule.position), 0);
    }
    cache.clear(&mut model).unwrap();
    assert!(cache.is_empty());
    // The slot shares the rows that lie in its memory.
    model.engine.drop_slot(slot).unwrap();
    assert_eq!(model.engine.capsule_bytes().0, 0, "slots and cache hold nothing");
    for tier in Tier::ALL {
        assert_eq!(cache.usage(tier), Usage::default());
    }
    let catalog = store_catalog(&folder);
    assert_eq!(catalog, 0, "what only the cache put there is gone");
}

fn store_catalog(folder: &tempfile::TempDir) -> usize {
    let place = folder.path().join("store");
    let store = CapsuleStore::open_read_only(place.to_str().unwrap(), StoreOptions::default());
    store.unwrap().store().catalog().unwrap().capsules.len()
}

#[test]
fn a_parent_goes_and_its_children_keep_their_rows() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    // No grace: what is not needed is deleted at once.
    let mut now = StoreOptions::default();
    now.grace = Some(std::time::Duration::ZERO);
    let place = folder.path().join("store");
    let shared = Arc::new(CapsuleStore::open(place.to_str().unwrap(), now).unwrap());
    let mut cache = CapsuleCache::new(&model, Some(Arc::clone(&shared)), options(1 << 30, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let known = session(&mut model, &mut cache, slot, 4, 3);
    let keys: Vec<CapsuleKey> = known.iter().map(|(key, _)| *key).collect();
    // All rows are on disk as parts of the first capsules; those go, and with them what the store has of them.
    for key in &keys[..3] {
        cache.place(&mut model, *key, Tier::Disk).unwrap();
    }
    let described = cache.describe(keys[2]).unwrap();
    assert_eq!(described.bytes.disk.rows, 0, "the fourth needs these rows in memory");
    cache.place(&mut model, keys[3], Tier::Disk).unwrap();
    assert_eq!(cache.usage(Tier::Host), Usage::default());
    assert_eq!(model.engine.capsule_bytes().0, 0);
    for key in &keys[..3] {
        cache.remove(&mut model, *key).unwrap();
        assert!(matches!(
            cache.get(&mut model, *key),
            Err(Error::Cache(CacheError::Unknown { .. }))
        ));
    }
    shared.gc().unwrap();
    all_the_same(&mut model, &mut cache, slot, &known[3..]);
    // In memory: the parents go, the rows stay.
    let known = session(&mut model, &mut cache, slot, 3, 4);
    let before = cache.usage(Tier::Host).rows;
    cache.remove(&mut model, known[0].0).unwrap();
    cache.remove(&mut model, known[1].0).unwrap();
    assert_eq!(cache.usage(Tier::Host).rows, before);
    all_the_same(&mut model, &mut cache, slot, &known[2..]);
}

#[test]
fn over_budget_is_an_error_with_a_type() {
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    let mut cache = CapsuleCache::new(&model, None, options(3 * fixed, 1 << 30));
    let slot = model.slot_with(&[1, 2, 3]).unwrap();
    let first = cache.snapshot(&mut model, slot, true).unwrap();
    let mut refused = None;
    for token in 10..20 {
        model.append(slot, &[token]).unwrap();
        let held = model.engine.capsule_bytes().0;
        match cache.snapshot(&mut model, slot, false) {
            Ok(_) => check_books(&model, &cache),
            Err(error) => {
                assert_eq!(model.engine.capsule_bytes().0, held, "nothing was frozen");
                refused = Some(error);
                break;
            }
        }
    }
    let error = refused.expect("three fixed states and rows do not fit");
    assert!(
        matches!(
            &error,
            Error::Cache(CacheError::Tier(TierError::Full { tier: Tier::Host, budget, .. }))
                if *budget == 3 * fixed
        ),
        "{error}"
    );
    // There is no disk tier without a store.
    let error = cache.place(&mut model, first, Tier::Disk).unwrap_err();
    assert!(matches!(error, Error::Cache(CacheError::Tier(TierError::Full { .. }))), "{error}");
    // With leave to forget, the oldest that is not pinned goes.
    let forget = CacheOptions { forget: true, ..options(3 * fixed, 0) };
    drop(cache);
    model.engine.reset(slot).unwrap();
    let mut cache = CapsuleCache::new(&model, None, forget);
    model.append(slot, &[1, 2, 3]).unwrap();
    let pinned = cache.snapshot(&mut model, slot, true).unwrap();
    for token in 10..20 {
        model.append(slot, &[token]).unwrap();
        cache.snapshot(&mut model, slot, false).unwrap();
        assert!(cache.usage(Tier::Host).total() <= 3 * fixed);
    }
    let forgotten = cache.take_events();
    assert!(forgotten.len() >= 8, "{forgotten:?}");
    assert!(!forgotten.contains(&CacheEvent::Forgotten { key: pinned }));
    cache.restore(&mut model, pinned, slot).unwrap();
    assert_eq!(model.engine.position(slot).unwrap(), 3);
    cache.unpin(pinned).unwrap();
    cache.remove(&mut model, pinned).unwrap();
}

#[test]
fn what_is_forgotten_takes_no_rows_of_others_along() {
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    // Room for one fixed state and the rows of the whole session, not for two.
    let forget = CacheOptions { forget: true, ..options(fixed + fixed / 2, 0) };
    let mut cache = CapsuleCache::new(&model, None, forget);
    let slot = model.engine.create_slot().unwrap();
    model.append(slot, &[7; 8]).unwrap();
    let parent = model.engine.snapshot(slot).unwrap();
    model.append(slot, &[9; 2]).unwrap();
    let child = model.engine.snapshot(slot).unwrap();
    let state = model.engine.state_bytes(slot).unwrap();
    let first = cache.insert(&mut model, &parent, false).unwrap();
    let second = cache.insert(&mut model, &child, false).unwrap();
    assert_eq!(cache.take_events(), [CacheEvent::Forgotten { key: first }]);
    assert_eq!(cache.len(), 1);
    let rows = (child.row_bytes(), child.fixed_bytes());
    assert_eq!(cache.usage(Tier::Host), Usage { rows: rows.0 as u64, fixed: rows.1 as u64 });
    drop((parent, child));
    all_the_same(&mut model, &mut cache, slot, &[(second, state)]);
    // One that does not fit at all changes nothing.
    let mut small = CapsuleCache::new(&model, None, options(fixed / 2, 0));
    let error = small.snapshot(&mut model, slot, false).unwrap_err();
    assert!(matches!(error, Error::Cache(CacheError::Tier(TierError::Full { .. }))), "{error}");
    let capsule = cache.get(&mut model, second).unwrap();
    assert!(small.insert(&mut model, &capsule, false).is_err());
    assert!(small.is_empty() && small.usage(Tier::Host) == Usage::default());
}

#[test]
fn rows_that_a_load_brought_back_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let shared = store(&folder);
    let mut cache = CapsuleCache::new(&model, Some(Arc::clone(&shared)), options(1 << 30, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let known = session(&mut model, &mut cache, slot, 3, 21);
    // The last is in the store by name, and not in the cache any more; the others are on disk.
    cache.save(&mut model, known[2].0, "last").unwrap();
    cache.remove(&mut model, known[2].0).unwrap();
    for (key, _) in &known[..2] {
        cache.place(&mut model, *key, Tier::Disk).unwrap();
    }
    model.engine.reset(slot).unwrap();
    let again = cache.load(&mut model, "last", false).unwrap();
    check_books(&model, &cache);
    all_the_same(&mut model, &mut cache, slot, &[(again, known[2].1.clone())]);
    all_the_same(&mut model, &mut cache, slot, &known[..2]);
}

#[test]
fn pins_hold_and_the_least_recently_used_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    let mut cache = CapsuleCache::new(&model, Some(store(&folder)), options(4 * fixed, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let known = session(&mut model, &mut cache, slot, 3, 5);
    cache.pin(&mut model, known[0].0).unwrap();
    cache.get(&mut model, known[1].0).unwrap();
    // The third is the oldest that may leave.
    session(&mut model, &mut cache, slot, 1, 6);
    let fixed_on_disk =
        |cache: &CapsuleCache, at: usize| cache.describe(known[at].0).unwrap().bytes.disk.fixed > 0;
    assert_eq!([0, 1, 2].map(|at| fixed_on_disk(&cache, at)), [false, false, true]);
    session(&mut model, &mut cache, slot, 6, 7);
    assert_eq!([0, 1, 2].map(|at| fixed_on_disk(&cache, at)), [false, true, true]);
    let described = cache.describe(known[0].0).unwrap();
    assert!(described.pinned && described.bytes.disk == Usage::default());
    // A capsule of the caller's whose state has left says so, and the slot is as it was.
    let capsule = cache.get(&mut model, known[2].0).unwrap();
    cache.place(&mut model, known[2].0, Tier::Disk).unwrap();
    let position = model.engine.position(slot).unwrap();
    let error = model.engine.restore(slot, &capsule).unwrap_err();
    assert!(matches!(error, EngineError::Away { .. }), "{error}");
    assert_eq!(model.engine.position(slot).unwrap(), position);
    all_the_same(&mut model, &mut cache, slot, &known);
}

#[test]
fn damage_on_disk_is_an_error_and_never_other_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let mut cache = CapsuleCache::new(&model, Some(store(&folder)), options(1 << 30, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let one = session(&mut model, &mut cache, slot, 1, 8);
    let two = session(&mut model, &mut cache, slot, 1, 9);
    cache.place(&mut model, one[0].0, Tier::Disk).unwrap();
    let segments = folder.path().join("store/segments");
    let paths: Vec<_> =
        std::fs::read_dir(&segments).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(paths.len(), 2, "rows and fixed state of the first");
    cache.place(&mut model, two[0].0, Tier::Disk).unwrap();
    let mut bytes = std::fs::read(&paths[0]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 4;
    std::fs::write(&paths[0], &bytes).unwrap();
    let error = cache.restore(&mut model, one[0].0, slot).unwrap_err();
    assert!(
        matches!(&error, Error::Store(store) if matches!(**store, StoreError::Load(_))),
        "{error}"
    );
    let name = paths[0].file_name().unwrap().to_str().unwrap();
    assert!(error.to_string().contains(name), "{error}");
    all_the_same(&mut model, &mut cache, slot, &two);
    // Put right, it is there again.
    bytes[last] ^= 4;
    std::fs::write(&paths[0], &bytes).unwrap();
    all_the_same(&mut model, &mut cache, slot, &one);
}

#[test]
fn a_saved_capsule_outlives_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let shared = store(&folder);
    let mut cache = CapsuleCache::new(&model, Some(Arc::clone(&shared)), options(1 << 30, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let known = session(&mut model, &mut cache, slot, 3, 11);
    cache.save(&mut model, known[1].0, "kept").unwrap();
    cache.place(&mut model, known[1].0, Tier::Disk).unwrap();
    cache.clear(&mut model).unwrap();
    let mut cache = CapsuleCache::new(&model, Some(shared), options(1 << 30, 1 << 30));
    let key = cache.load(&mut model, "kept", false).unwrap();
    assert_eq!(cache.load(&mut model, "kept", true).unwrap(), key, "one capsule, one key");
    all_the_same(&mut model, &mut cache, slot, &[(key, known[1].1.clone())]);
    let error = cache.load(&mut model, "lost", false).unwrap_err();
    assert!(error.to_string().contains("lost"), "{error}");
}

/// Demotes rows alone, largest first, and never promotes.
struct RowsFirst;

impl Policy<u64> for RowsFirst {
    fn victim(
        &mut self,
        _: Tier,
        _: u64,
        candidates: &mut dyn Iterator<Item = Candidate<'_, u64>>,
    ) -> Option<u64> {
        candidates.filter(|c| c.kind == StateKind::Rows).max_by_key(|c| c.bytes).map(|c| *c.key)
    }

    fn promotion(&mut self, _: Candidate<'_, u64>, at: Tier, _: Tier) -> Tier {
        at
    }
}

#[test]
fn the_policy_can_be_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    // The rows of one session fit beside all fixed state, those of two do not.
    let host = options(6 * fixed + 20_000, 1 << 30);
    let mut cache = CapsuleCache::with_policy(&model, Some(store(&folder)), host, RowsFirst);
    let slot = model.engine.create_slot().unwrap();
    let mut known = session(&mut model, &mut cache, slot, 3, 12);
    known.extend(session(&mut model, &mut cache, slot, 3, 13));
    let (host, disk) = (cache.usage(Tier::Host), cache.usage(Tier::Disk));
    assert_eq!((host.fixed, disk.fixed), (6 * fixed, 0));
    assert!(disk.rows > 0, "{disk:?}");
    all_the_same(&mut model, &mut cache, slot, &known);
}

/// Demotes rows alone, those that are there longest, and never promotes.
struct OldestRows;

impl Policy<u64> for OldestRows {
    fn victim(
        &mut self,
        _: Tier,
        _: u64,
        candidates: &mut dyn Iterator<Item = Candidate<'_, u64>>,
    ) -> Option<u64> {
        candidates.filter(|c| c.kind == StateKind::Rows).map(|c| *c.key).min()
    }

    fn promotion(&mut self, _: Candidate<'_, u64>, at: Tier, _: Tier) -> Tier {
        at
    }
}

#[test]
fn rows_on_disk_outlive_the_capsule_that_was_saved_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    let mut now = StoreOptions::default();
    now.grace = Some(std::time::Duration::ZERO);
    let place = folder.path().join("store");
    let shared = Arc::new(CapsuleStore::open(place.to_str().unwrap(), now).unwrap());
    // The rows of one node do not fit.
    let host = options(6 * fixed + 26_000, 1 << 30);
    let mut cache = CapsuleCache::with_policy(&model, Some(Arc::clone(&shared)), host, OldestRows);
    let slot = model.engine.create_slot().unwrap();
    let known = session(&mut model, &mut cache, slot, 3, 31);
    session(&mut model, &mut cache, slot, 3, 32);
    let saved: Vec<bool> = known
        .iter()
        .map(|(key, _)| cache.describe(*key).unwrap())
        .map(|capsule| {
            assert_eq!(capsule.bytes.disk.fixed, 0);
            capsule.stored.is_some()
        })
        .collect();
    assert_eq!(saved, [true, false, false], "the first was saved for its rows, which all need");
    cache.remove(&mut model, known[0].0).unwrap();
    assert!(cache.describe(known[1].0).unwrap().stored.is_some(), "now the second keeps them");
    cache.remove(&mut model, known[1].0).unwrap();
    shared.gc().unwrap();
    all_the_same(&mut model, &mut cache, slot, &known[2..]);
}

#[test]
fn random_use_keeps_bits_and_books() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = model();
    let fixed = fixed_bytes(&mut model);
    let mut cache = CapsuleCache::new(&model, Some(store(&folder)), options(8 * fixed, 1 << 30));
    let slot = model.engine.create_slot().unwrap();
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = move |n: usize| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x % n as u64) as usize
    };
    let mut known: Vec<(CapsuleKey, State)> = Vec::new();
    let (mut restored, mut removed) = (0, 0);
    for step in 0..600_u32 {
        match draw(10) {
            0..=2 if known.len() < 40 => {
                let tokens: Vec<u32> =
                    (0..=draw(12)).map(|i| (step + i as u32 * 3) % 512).collect();
                if model.engine.position(slot).unwrap() as usize + tokens.len() < 500 {
                    model.append(slot, &tokens).unwrap();
                    let key = cache.snapshot(&mut model, slot, false).unwrap();
                    known.push((key, model.engine.state_bytes(slot).unwrap()));
                }
            }
            3..=6 if !known.is_empty() => {
                let (key, state) = &known[draw(known.len())];
                cache.restore(&mut model, *key, slot).unwrap();
                assert!(model.engine.state_bytes(slot).unwrap() == *state, "capsule {key}");
                restored += 1;
            }
            7 if !known.is_empty() => {
                let (key, _) = known.swap_remove(draw(known.len()));
                cache.remove(&mut model, key).unwrap();
                removed += 1;
            }
            8 if !known.is_empty() => {
                let tier = [Tier::Host, Tier::Disk][draw(2)];
                cache.place(&mut model, known[draw(known.len())].0, tier).unwrap();
            }
            _ => {
                model.engine.reset(slot).unwrap();
                model.append(slot, &[step % 512]).unwrap();
            }
        }
        let (host, budgets) = (cache.usage(Tier::Host), cache.budgets());
        assert!(host.total() <= budgets.host, "{host:?}");
    }
    assert!(restored > 150 && removed > 20, "{restored} restored, {removed} removed");
    all_bits(&mut model, &mut cache, slot, &known);
    cache.clear(&mut model).unwrap();
    model.engine.drop_slot(slot).unwrap();
    assert_eq!(model.engine.capsule_bytes().0, 0);
    assert_eq!(store_catalog(&folder), 0);
}

fn all_bits(
    model: &mut Ampoule,
    cache: &mut CapsuleCache,
    slot: SlotId,
    known: &[(CapsuleKey, State)],
) {
    for (key, state) in known {
        cache.restore(model, *key, slot).unwrap();
        assert!(model.engine.state_bytes(slot).unwrap() == *state, "capsule {key}");
    }
}

#[test]
fn a_load_over_the_budget_is_refused_whole_and_what_is_held_already_counts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder);
    let mut roomy = model();
    let slot = roomy.slot_with(&[5; 20]).unwrap();
    let first = roomy.engine.snapshot(slot).unwrap();
    roomy.append(slot, &[9; 30]).unwrap();
    let second = roomy.engine.snapshot(slot).unwrap();
    let (fixed, whole) = (second.fixed_bytes(), second.fixed_bytes() + second.row_bytes());
    let (first, second) = (
        store.save(&roomy, &first, None, None).unwrap().id,
        store.save(&roomy, &second, None, None).unwrap().id,
    );
    // Every part of it would fit alone.
    let mut small = model_with(whole - 1);
    match store.load(&mut small, second) {
        Err(Error::Engine(EngineError::Backend(ampoule::BackendError::CapsuleBudget {
            wanted,
            used,
            ..
        }))) => assert_eq!((wanted, used), (whole, 0)),
        other => panic!("{other:?}"),
    }
    assert_eq!(small.engine.capsule_bytes().0, 0);
    // With the rows of the first one held, the second wants its own rows and fixed state alone.
    let mut enough = model_with(whole + fixed);
    let held = store.load(&mut enough, first).unwrap();
    store.load(&mut enough, second).unwrap();
    drop(held);
}
