//! Measures the store; prints JSON.
//!
//!     store_lab speed FOLDER [MIB [THREADS [SEGMENT_MIB]]]   save and load of one capsule against plain files on the same disk
//!     store_lab ratios FILE.ampoule...    how real state compresses, whole and in byte planes

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ampoule_capsule::{
    CapsuleFile, Digest, Fingerprint, Growth, Labels, Origin, Segment, StateLayout, StateTensor,
};
use ampoule_store::{Link, NewCapsule, Options, Scope, Slices, Store, StoreKey};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Repetitions of each measurement.
const ROUNDS: usize = 9;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["speed", folder, ref numbers @ ..] if numbers.len() <= 3 => {
            let numbers = numbers.iter().map(|n| n.parse()).collect::<Result<Vec<usize>, _>>()?;
            speed(Path::new(folder), &numbers)?
        }
        ["ratios", ref files @ ..] if !files.is_empty() => {
            Value::Array(files.iter().map(|file| ratios(file)).collect::<Result<_, _>>()?)
        }
        _ => {
            return Err(
                "usage: store_lab speed FOLDER [MIB [THREADS [SEGMENT_MIB]]] | ratios FILE..."
                    .into(),
            );
        }
    };
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

/// A model with one tensor of rows of 1 MiB, half of it in each of two tensors, and a little fixed state.
fn scope(rows: usize) -> Scope {
    let tensor = |name: &str, shape: Vec<usize>, kind: &str, growth| StateTensor {
        name: name.into(),
        dtype: "bf16".parse().expect("bf16 is an element type"),
        shape,
        kind: kind.into(),
        growth,
    };
    let layout = StateLayout {
        tensors: vec![
            tensor("kv.key", vec![rows, 1 << 18], "kv_cache", Growth::Rows),
            tensor("kv.value", vec![rows, 1 << 18], "kv_cache", Growth::Rows),
            tensor("recurrent", vec![1 << 16], "recurrent", Growth::Fixed),
        ],
    };
    let fingerprint = Fingerprint {
        weights: Digest::of(b"w"),
        plan: Digest::of(b"p"),
        kernels: Digest::of(b"k"),
        device: Digest::of(b"d"),
        layout: layout.digest(),
        labels: Labels::default(),
    };
    Scope { fingerprint, layout, salt: Digest::of(b"s") }
}

/// Takes a file's pages out of the cache, so that reading it reads the disk.
fn forget(path: &Path) -> Result<(), Failure> {
    for entry in walk(path)? {
        let file = File::open(entry)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

fn walk(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path)? {
        files.extend(walk(&entry?.path())?);
    }
    Ok(files)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn speed(folder: &Path, numbers: &[usize]) -> Result<Value, Failure> {
    let mib = numbers.first().copied().unwrap_or(1024);
    std::fs::create_dir_all(folder)?;
    let bytes = mib << 20;
    // Bytes that do not compress, different in every round, so that nothing is shared.
    let mut state = vec![0_u8; bytes];
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    for word in state.as_chunks_mut::<8>().0 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *word = x.to_le_bytes();
    }
    let fixed = vec![7_u8; 1 << 17];
    let scope = scope(mib);
    let tokens = vec![1_u32; mib];
    let span = Segment { start: 0, end: mib as u32, origin: Origin::Prefill };
    let lineage_scope = scope.lineage();
    let lineage = lineage_scope.extend(lineage_scope.root(), span, &tokens)?;
    let (plain, place) = (folder.join("plain"), folder.join("store"));
    let mut options = Options::default();
    options.threads = numbers.get(1).copied().unwrap_or(options.threads);
    options.segment_bytes = numbers.get(2).map_or(options.segment_bytes, |n| n << 20);
    let mut times: [Vec<Duration>; 7] = Default::default();
    for round in 0..ROUNDS {
        let mut taken = Vec::new();
        state[..8].copy_from_slice(&(round as u64).to_le_bytes());
        let state = &state;
        let (key, value) = state.split_at(bytes / 2);
        let rows = Slices(vec![key, value, &[]]);
        let fixed = Slices(vec![&[], &[], &fixed]);
        let link = Link {
            tokens: &tokens,
            spans: vec![span],
            lineage,
            from: None,
            journal: None,
            rows: &rows,
        };
        let capsule =
            NewCapsule { scope: &scope, links: &[link], fixed: &fixed, model: "lab", note: None };
        // A plain file, in pieces of 4 MiB, synced.
        let begun = Instant::now();
        let mut file = File::create(&plain)?;
        for piece in state.chunks(4 << 20) {
            file.write_all(piece)?;
        }
        file.sync_all()?;
        File::open(folder)?.sync_all()?;
        taken.push(begun.elapsed());
        // A capsule of as many bytes, acknowledged; without and with encryption.
        let mut saved = Vec::new();
        for sealed in [false, true] {
            let mut options = options.clone();
            options.key = sealed.then(|| StoreKey::new(&[3; 32]));
            let store = Store::open(&place.join(sealed.to_string()), options)?;
            let begun = Instant::now();
            let id = store.save(&capsule)?.id;
            taken.push(begun.elapsed());
            saved.push((store, id));
        }
        // All of it from the disk again: the file into memory that is there, the capsule into memory of its own.
        let mut back = vec![1; bytes];
        forget(folder)?;
        let begun = Instant::now();
        File::open(&plain)?.read_exact(&mut back)?;
        taken.push(begun.elapsed());
        for (store, id) in saved {
            let begun = Instant::now();
            let capsule = store.capsule(id)?;
            let (rows, fixed) = (store.rows(&capsule, 0)?, store.fixed(&capsule)?);
            taken.push(begun.elapsed());
            assert!(rows.tensor(0) == key && rows.tensor(1) == value && fixed.len() == 1 << 17);
        }
        let begun = Instant::now();
        let digest = blake3::hash(&back);
        taken.push(begun.elapsed());
        assert_ne!(digest.as_bytes()[..], [0; 32]);
        std::fs::remove_file(&plain)?;
        std::fs::remove_dir_all(&place)?;
        times.iter_mut().zip(taken).for_each(|(all, one)| all.push(one));
    }
    let [write, save, sealed_save, read, load, sealed_load, hash] = times;
    let rate = |times: &[Duration]| (bytes as f64 / median(times.to_vec()) / 1e6).round();
    // Each share is the median over the rounds: what else the machine does meets both sides of a round alike.
    let share = |disk: &[Duration], ours: &[Duration]| {
        let mut shares: Vec<f64> =
            disk.iter().zip(ours).map(|(d, o)| d.as_secs_f64() / o.as_secs_f64()).collect();
        shares.sort_by(f64::total_cmp);
        let rounded: Vec<f64> = shares.iter().map(|x| (x * 100.0).round() / 100.0).collect();
        json!({ "median": rounded[rounded.len() / 2], "least": rounded[0], "most": rounded.last() })
    };
    Ok(json!({
        "bytes": bytes, "rounds": ROUNDS, "threads": options.threads, "segment_bytes": options.segment_bytes,
        "cores": std::thread::available_parallelism()?.get(),
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "mb_s_median": {
            "disk_write_and_sync": rate(&write), "save": rate(&save), "save_sealed": rate(&sealed_save),
            "disk_read": rate(&read), "load_verified": rate(&load), "load_sealed_verified": rate(&sealed_load),
            "hash_one_thread": rate(&hash),
        },
        "seconds_median": {
            "disk_write_and_sync": median(write.clone()), "save": median(save.clone()),
            "disk_read": median(read.clone()), "load_verified": median(load.clone()), "hash_one_thread": median(hash),
        },
        "save_share_of_disk": share(&write, &save),
        "load_share_of_disk": share(&read, &load),
    }))
}

/// zstd over the rows and over the fixed state of a capsule file, whole and in byte planes.
fn ratios(path: &str) -> Result<Value, Failure> {
    let bytes = std::fs::read(path)?;
    let file = CapsuleFile::parse(&bytes)?;
    let manifest = file.manifest();
    let mut parts = Vec::new();
    for growth in [Growth::Rows, Growth::Fixed] {
        for width in [4, 2, 1] {
            let tensors = manifest
                .layout
                .tensors
                .iter()
                .filter(|t| t.growth == growth && t.dtype.block_bytes() == width);
            let plain: Vec<u8> = tensors
                .flat_map(|t| file.tensor(&t.name).unwrap_or_default().iter().copied())
                .collect();
            if plain.is_empty() {
                continue;
            }
            let planes: Vec<u8> = (0..width)
                .flat_map(|byte| plain.iter().skip(byte).step_by(width).copied())
                .collect();
            for level in [1, 3, 9] {
                let measure = |data: &[u8]| -> Result<Value, Failure> {
                    let begun = Instant::now();
                    let coded = zstd::bulk::compress(data, level)?;
                    let coding = begun.elapsed().as_secs_f64();
                    let begun = Instant::now();
                    zstd::bulk::decompress(&coded, data.len())?;
                    let decoding = begun.elapsed().as_secs_f64();
                    let round = |x: f64| (x * 1000.0).round() / 1000.0;
                    Ok(json!({
                        "ratio": round(data.len() as f64 / coded.len() as f64),
                        "mb_s_in": (data.len() as f64 / coding / 1e6).round(),
                        "mb_s_out": (data.len() as f64 / decoding / 1e6).round(),
                    }))
                };
                parts.push(json!({
                    "part": format!("{growth:?}").to_lowercase(), "element_bytes": width, "level": level,
                    "bytes": plain.len(), "whole": measure(&plain)?, "planes": measure(&planes)?,
                }));
            }
        }
    }
    Ok(json!({ "model": manifest.model, "position": manifest.position, "parts": parts }))
}
