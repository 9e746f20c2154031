//! Reading any bytes takes at most the header's size, so at most the file's, and 1 MiB of memory.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use ampoule_capsule::{CapsuleFile, CapsuleHeader, Growth, History, Origin, StateLayout};
use ampoule_plan::DType;
use common::{Parts, Random, craft, craft_raw, mutate, reseal, sample, split, tensor};

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// Counts the bytes that the current thread holds. `realloc` is the default one, so that the old and
/// the new block count at the same time.
struct Counting;

fn count(bytes: isize) {
    // Fails only while a thread ends, when nothing is measured.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; the counters are constant-initialised
// thread locals without a destructor, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on; `block` came from `System` with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were held at a time during `f`, more than before it.
fn peak<T>(f: impl FnOnce() -> T) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    drop(f());
    usize::try_from(PEAK.get() - before).unwrap()
}

/// Gives whether the file was accepted.
#[track_caller]
fn check(what: &str, bytes: &[u8]) -> bool {
    let header = CapsuleHeader::bytes_needed(bytes, bytes.len() as u64).unwrap_or(8);
    assert!(header <= bytes.len().max(8));
    let limit = header + (1 << 20);
    let mut accepted = false;
    let whole = peak(|| CapsuleFile::parse(bytes).inspect(|_| accepted = true));
    assert!(whole <= limit, "{what}: {whole} bytes for a file of {}", bytes.len());
    let header = peak(|| CapsuleHeader::parse(bytes, bytes.len() as u64));
    assert!(header <= limit, "{what}: {header} bytes for the header of {}", bytes.len());
    accepted
}

#[test]
fn the_counter_counts() {
    assert!(peak(|| vec![0_u8; 5000]) >= 5000);
    assert!(peak(|| ()) < 64);
}

#[test]
fn mutations() {
    let bytes = sample().encode();
    assert!(check("sample", &bytes));
    let mut random = Random(9);
    for _ in 0..10_000 {
        let mut mutated = bytes.clone();
        mutate(&mut mutated, &mut random);
        check("mutation", &mutated);
        reseal(&mut mutated);
        check("mutation with a right checksum", &mutated);
    }
    for length in 0..64 {
        let mut huge = bytes.clone();
        huge[..8].copy_from_slice(&(1_u64 << length).to_le_bytes());
        check("huge length", &huge);
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        check("huge length", &huge);
    }
}

#[test]
fn large_capsules() {
    // As many tensors as there may be, with the shortest and with the longest names.
    for width in [1, 255] {
        let name = |i: usize| format!("{i:0>width$}");
        let one = |i| tensor(&name(i), DType::U8, &[1], "k", Growth::Fixed);
        let layout = StateLayout { tensors: (0..4096).map(one).collect() };
        let parts = Parts::new(layout, History::new(), None, 3);
        assert!(check("many tensors", &parts.encode()));
    }
    // Every position of another origin than the one before it.
    let mut history = History::new();
    for _ in 0..100_000 {
        history.append(Origin::Prefill, 1).unwrap();
        history.append(Origin::Decode, 1).unwrap();
    }
    let parts = Parts::new(StateLayout::default(), history, None, 4);
    assert!(check("many segments", &parts.encode()));
}

#[test]
fn bombs() {
    const MANY: usize = 4 << 20;
    let (manifest, entries, payload) = split(&sample().encode());
    let bomb = |from: &str, to: String| {
        assert!(manifest.contains(from), "{from}");
        let what = format!("{from} -> {}", &to[..to.len().min(40)]);
        assert!(!check(&what, &craft(&manifest.replacen(from, &to, 1), &entries, &payload)));
    };
    // One more than a power of two: the worst moment of a vector that doubles.
    let sequence = |item: &str| vec![item; (1 << 17) + 1].join(",");
    bomb("[2,5]", format!("[{}]", sequence("1")));
    bomb("[2,5]", "[".repeat(MANY));
    bomb("[2,5]", "{\"a\":".repeat(MANY / 5));
    bomb("[2,5]", "1".repeat(MANY));
    bomb("\"tiny\"", format!("\"{}\"", "x".repeat(MANY)));
    bomb("\"tiny\"", format!("\"{}\"", "\\n".repeat(MANY / 2)));
    bomb("\"tiny\"", format!("\"{}\"", "x".repeat(98_000)));
    bomb("\"model\"", format!("\"{}\"", "x".repeat(MANY)));
    bomb("\"model\"", format!("\"{}\"", "x".repeat(98_000)));
    bomb("\"cursor\"", format!("\"{}\"", "x".repeat(98_000)));
    bomb("\"dtype\":\"f32\"", format!("\"dtype\":\"{}\"", "x".repeat(98_000)));
    let digest = "0".repeat(64);
    bomb("\"blake3\":{", format!("\"blake3\":{{{},", sequence(&format!("\"\":\"{digest}\""))));
    let item = "{\"name\":\"\",\"dtype\":\"u8\",\"shape\":[1],\"kind\":\"\",\"growth\":\"rows\"}";
    bomb("\"layout\":[", format!("\"layout\":[{},", sequence(item)));
    let item = "{\"start\":0,\"end\":0,\"origin\":\"decode\"}";
    bomb("\"segments\":[", format!("\"segments\":[{},", sequence(item)));
    let shape = "{\"name\":\"a\",\"dtype\":\"u8\",\"shape\":[1,1,1,1,1,1,1,1],\"kind\":\"k\",\
                 \"growth\":\"fixed\"}";
    bomb("\"layout\":[", format!("\"layout\":[{},", vec![shape; 4089].join(",")));
    check("deep entries", &craft(&manifest, &"[".repeat(MANY), &payload));
    check("deep header", &craft_raw(&"[".repeat(MANY), &payload));
    check(
        "endless version",
        &craft_raw(&format!("\",\"ampoule.format\":\"{}", "1".repeat(MANY)), b""),
    );
}
