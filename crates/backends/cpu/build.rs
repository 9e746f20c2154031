//! Hashes the kernels' sources, so that capsules made by other kernels do not fit.

use std::path::{Path, PathBuf};

/// FNV-1a, 64 bits (Fowler, Noll, Vo): enough to tell versions of our own files apart.
fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "rs")
            && path.file_name().is_some_and(|n| n != "tests.rs")
        {
            found.push(path);
        }
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let mut found = Vec::new();
    sources(Path::new("src"), &mut found)?;
    found.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for path in &found {
        hash = fnv1a(hash, path.to_string_lossy().as_bytes());
        hash = fnv1a(hash, &std::fs::read(path)?);
    }
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rustc-env=AMPOULE_CPU_SOURCES={hash:016x}");
    Ok(())
}
