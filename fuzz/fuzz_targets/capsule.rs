//! Any bytes are refused or are the one encoding of what is read from them.
#![no_main]

use ampoule_capsule::{CapsuleFile, CapsuleHeader, Digest, encode_header};
use libfuzzer_sys::fuzz_target;

/// The header checksum lies at a fixed offset (docs/capsule-format.md).
const CHECKSUM: std::ops::Range<usize> = 50..114;

fn check(bytes: &[u8]) {
    let header = CapsuleHeader::parse(bytes, bytes.len() as u64);
    match CapsuleFile::parse(bytes) {
        Ok(file) => {
            assert_eq!(header.as_ref(), Ok(file.header()));
            let written = encode_header(file.manifest(), file.header().digests());
            assert_eq!(written.as_deref(), Ok(&bytes[..file.header().payload_start() as usize]));
            assert_eq!(file.tokens().len(), file.manifest().position as usize);
            assert_eq!(file.tensors().last().map(|t| t.entry.range.end), Some(bytes.len() as u64));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // Damage seldom has a right checksum: give it one, so that the checks behind it are reached.
    let Ok(end) = CapsuleHeader::bytes_needed(bytes, bytes.len() as u64) else { return };
    let mut sealed = bytes.to_vec();
    sealed[CHECKSUM].fill(b'0');
    let digest = Digest::of(&sealed[..end]).to_string();
    sealed[CHECKSUM].copy_from_slice(digest.as_bytes());
    check(&sealed);
});
