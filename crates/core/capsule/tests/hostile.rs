//! Damaged and hand-made files are refused, and say why.

mod common;

use ampoule_capsule::{
    CapsuleError, CapsuleFile, CapsuleHeader, LayoutError, LineageError, MAX_HEADER_BYTES,
};
use common::{
    CHECKSUM, MANIFEST_AT, Random, craft, craft_raw, encode_again, mutate, reseal, sample, split,
};

/// Refused by the whole reader; the header reader must not panic.
fn refuse(bytes: &[u8]) -> CapsuleError {
    let _ = CapsuleHeader::parse(bytes, bytes.len() as u64);
    let error = CapsuleFile::parse(bytes).expect_err("must be refused");
    assert!(!error.to_string().is_empty());
    error
}

#[test]
fn every_flipped_bit_is_refused() {
    let bytes = sample().encode();
    let payload = CapsuleFile::parse(&bytes).unwrap().header().payload_start() as usize;
    let mut damaged = bytes.clone();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            damaged[at] ^= 1 << bit;
            let error = refuse(&damaged);
            let right = match at {
                0..8 => matches!(
                    error,
                    CapsuleError::HeaderLength { .. }
                        | CapsuleError::HeaderCutShort { .. }
                        | CapsuleError::HeaderChecksum { .. }
                ),
                8..50 => error == CapsuleError::NotACapsule,
                _ if at < payload => matches!(error, CapsuleError::HeaderChecksum { .. }),
                _ => matches!(
                    error,
                    CapsuleError::TensorChecksum { start, end, .. }
                        if (start..end).contains(&(at as u64))
                ),
            };
            assert!(right, "byte {at}, bit {bit}: {error}");
            damaged[at] ^= 1 << bit;
        }
    }
    assert_eq!(damaged, bytes);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample().encode();
    let payload = CapsuleFile::parse(&bytes).unwrap().header().payload_start() as usize;
    for length in 0..bytes.len() {
        let error = refuse(&bytes[..length]);
        if length < payload {
            assert!(matches!(error, CapsuleError::HeaderCutShort { .. }), "{length}: {error}");
        } else {
            let (expected, actual) = (bytes.len() as u64, length as u64);
            assert_eq!(error, CapsuleError::Length { expected, actual });
        }
    }
}

#[test]
fn trailing_bytes_are_refused() {
    let bytes = sample().encode();
    for extra in [&[0][..], b" ", &[0; 8], &[0xff; 4096], &bytes] {
        let error = refuse(&[&bytes, extra].concat());
        assert!(matches!(error, CapsuleError::Length { .. }), "{error}");
        assert!(error.to_string().contains("too many"), "{error}");
    }
}

#[test]
fn random_mutations_are_refused() {
    let bytes = sample().encode();
    let mut random = Random(7);
    let mut unchanged = 0;
    for round in 0..10_000 {
        let mut mutated = bytes.clone();
        for _ in 0..=random.below(4) {
            mutate(&mut mutated, &mut random);
        }
        if mutated == bytes {
            unchanged += 1;
            CapsuleFile::parse(&mutated).unwrap();
        } else {
            assert!(CapsuleFile::parse(&mutated).is_err(), "round {round}");
            let _ = CapsuleHeader::parse(&mutated, mutated.len() as u64);
        }
    }
    assert!(unchanged < 1000, "the mutations change too little: {unchanged}");
}

/// With the checksum made right, every check behind it is reached. Whatever passes is the one
/// encoding of what was read.
#[test]
fn random_mutations_with_a_right_checksum_are_refused_or_canonical() {
    let bytes = sample().encode();
    let header = CapsuleFile::parse(&bytes).unwrap().header().payload_start() as usize;
    let mut random = Random(8);
    let mut accepted = 0;
    for _ in 0..10_000 {
        let mut mutated = bytes[..header].to_vec();
        mutate(&mut mutated, &mut random);
        // Keep the length right, so that more than the length check is reached.
        let length = mutated.len().next_multiple_of(8);
        mutated.resize(length, b' ');
        mutated[..8].copy_from_slice(&(length as u64 - 8).to_le_bytes());
        mutated.extend_from_slice(&bytes[header..]);
        reseal(&mut mutated);
        if let Ok(file) = CapsuleFile::parse(&mutated) {
            accepted += usize::from(mutated != bytes);
            assert_eq!(encode_again(&file), mutated);
        }
    }
    // Changed texts such as the note and the model give other, valid capsules.
    assert!(accepted > 0);
}

#[test]
fn header_lengths_are_bounded_before_use() {
    let bytes = sample().encode();
    for length in [0, 7, 8, 145, 161, MAX_HEADER_BYTES + 8, u64::MAX, u64::MAX - 7, 1 << 63] {
        let mut damaged = bytes.clone();
        damaged[..8].copy_from_slice(&length.to_le_bytes());
        reseal(&mut damaged);
        assert!(matches!(refuse(&damaged), CapsuleError::HeaderLength { .. }), "{length}");
    }
    let mut damaged = bytes.clone();
    damaged[..8].copy_from_slice(&MAX_HEADER_BYTES.to_le_bytes());
    assert!(matches!(refuse(&damaged), CapsuleError::HeaderCutShort { .. }));
    assert!(matches!(refuse(&[]), CapsuleError::HeaderCutShort { needed: 8, available: 0 }));
}

#[test]
fn other_files_are_refused() {
    let tensors: [(&str, safetensors::tensor::TensorView<'_>); 0] = [];
    let plain = safetensors::serialize(tensors, None).unwrap();
    refuse(&plain);
    let metadata = [("a".repeat(200), "b".repeat(200))].into_iter().collect();
    let tensors: [(&str, safetensors::tensor::TensorView<'_>); 0] = [];
    let plain = safetensors::serialize(tensors, Some(metadata)).unwrap();
    assert_eq!(refuse(&plain), CapsuleError::NotACapsule);
    refuse(&[b'x'; 4096]);
    refuse(&[0; 4096]);
    refuse(b"GGUF\x03\x00\x00\x00 and so on");
}

#[test]
fn other_versions_are_refused_by_name() {
    let (manifest, _, _) = split(&sample().encode());
    let rest = "\",\"ampoule.manifest\":\"\"}";
    for (version, found) in [("2", "2"), ("10", "10"), ("01", "01"), ("99999999999", "9999999999")]
    {
        let file = craft_raw(&format!("\",\"ampoule.format\":\"{version}{rest}"), b"");
        assert_eq!(refuse(&file), CapsuleError::Version { found: found.into() });
    }
    for version in ["", "x", "-1"] {
        let file = craft_raw(&format!("\",\"ampoule.format\":\"{version}{rest}"), b"");
        assert!(matches!(refuse(&file), CapsuleError::NotCanonical { .. }));
    }
    let file = craft(&manifest.replace("\"version\":1", "\"version\":7"), "", b"");
    assert_eq!(refuse(&file), CapsuleError::Version { found: "7".into() });
}

#[test]
fn crafting_without_a_change_is_accepted() {
    let bytes = sample().encode();
    let (manifest, entries, payload) = split(&bytes);
    assert_eq!(craft(&manifest, &entries, &payload), bytes);
}

#[test]
fn manifests_that_do_not_hold_together_are_refused() {
    use CapsuleError as E;
    use LayoutError as L;

    let bytes = sample().encode();
    let (manifest, entries, payload) = split(&bytes);
    let change = |from: &str, to: &str| {
        assert_eq!(manifest.matches(from).count(), 1, "{from}");
        refuse(&craft(&manifest.replace(from, to), &entries, &payload))
    };
    // Names.
    let error = change("\"name\":\"layers.0.kv.value\"", "\"name\":\"layers.0.kv.key\"");
    assert!(matches!(&error, E::Layout(L::Duplicate { tensor }) if tensor == "layers.0.kv.key"));
    let error = change("\"name\":\"cursor\"", "\"name\":\"tokens\"");
    assert!(matches!(error, E::Layout(L::BadText { .. })));
    let error = change("\"name\":\"cursor\"", "\"name\":\"a\\nb\"");
    assert!(matches!(error, E::Layout(L::BadText { .. })));
    let error = change("\"name\":\"cursor\"", "\"name\":\"a\\\"b\"");
    assert!(matches!(error, E::Layout(L::BadText { .. })));
    // Types.
    let error = change("\"dtype\":\"f32\"", "\"dtype\":\"q8_0\"");
    assert!(matches!(error, E::Layout(L::BadType { .. })));
    let error = change("\"dtype\":\"f32\"", "\"dtype\":\"f64\"");
    assert!(matches!(&error, E::Manifest { reason } if reason.contains("f64")), "{error}");
    // Shapes.
    for shape in ["[0,5]", "[1,1,1,1,1,1,1,1,1,1]", "[18446744073709551615,5]", "[-1]", "[1.0]"] {
        let error = change("\"shape\":[2,5]", &format!("\"shape\":{shape}"));
        assert!(matches!(error, E::Layout(_) | E::Manifest { .. }), "{shape}: {error}");
    }
    let error = change("\"shape\":[2,5]", "\"shape\":[5,2]");
    assert!(matches!(error, E::LayoutDigest { .. }), "{error}");
    // Positions.
    let error = change("\"position\":5", "\"position\":6");
    assert!(matches!(error, E::Position { position: 6, end: 5 }));
    let error = change("\"position\":5", "\"position\":17");
    assert!(matches!(error, E::Layout(L::PastLastRow { position: 17, rows: 16, .. })));
    let error = change("\"position\":5", "\"position\":4294967296");
    assert!(matches!(error, E::Manifest { .. }));
    let error = change("\"position\":2}", "\"position\":5}");
    assert!(matches!(error, E::Parent { .. }));
    // Segments.
    let error = change("\"start\":3", "\"start\":4");
    assert!(matches!(error, E::Lineage(LineageError::Gap { .. })));
    let error = change("\"origin\":\"decode\"", "\"origin\":\"prefill\"");
    assert!(matches!(error, E::Lineage(LineageError::Unmerged { at: 3 })));
    let error = change("\"start\":3,\"end\":5", "\"start\":3,\"end\":3");
    assert!(matches!(error, E::Lineage(LineageError::Empty { .. })));
    // Lineage: a manifest whose parts are all well formed, but not of one capsule.
    let error = change("\"position\":2}", "\"position\":1}");
    assert!(matches!(error, E::Lineage(LineageError::WrongId { .. })), "{error}");
    // Digests.
    let at = manifest.find(",\"cursor\":").unwrap();
    let without = [&manifest[..at], &manifest[at + 76..]].concat();
    let error = refuse(&craft(&without, &entries, &payload));
    assert!(matches!(error, E::DigestCount { expected: 6, actual: 5 }), "{error}");
    let error = change("\"blake3\":{\"tokens\":", "\"blake3\":{\"tokenz\":");
    assert!(matches!(error, E::NotCanonical { .. }), "{error}");
    // Texts.
    let error = change("\"model\":\"tiny\"", &format!("\"model\":\"{}\"", "m".repeat(256)));
    assert!(matches!(error, E::Text { field: "model", bytes: 256, .. }));
    let error = change("\"model\":\"tiny\"", &format!("\"model\":\"{}\"", "m".repeat(400_000)));
    assert!(matches!(error, E::Manifest { .. }));
    // Keys.
    for (from, to) in [
        ("\"model\":", "\"model\":\"x\",\"model\":"),
        ("\"model\":", "\"surprise\":1,\"model\":"),
        ("\"model\":\"tiny\",", ""),
        ("{\"version\"", "[{\"version\""),
    ] {
        let error = change(from, to);
        assert!(matches!(error, E::Manifest { .. }), "{to}: {error}");
    }
    let error = refuse(&craft(&format!("{manifest} x"), &entries, &payload));
    assert!(matches!(error, E::Manifest { .. }));
}

#[test]
fn only_one_way_of_writing_is_accepted() {
    let bytes = sample().encode();
    let (manifest, entries, payload) = split(&bytes);
    let canonical = |manifest: &str, entries: &str| {
        let error = refuse(&craft(manifest, entries, &payload));
        let CapsuleError::NotCanonical { offset, .. } = error else { panic!("{error}") };
        offset as usize
    };
    // The manifest: spaces, key order, other escapes, numbers, null.
    for (from, to) in [
        ("\"model\":", "\"model\": "),
        (
            "\"producer\":\"ampoule 0.1.0\",\"model\":\"tiny\"",
            "\"model\":\"tiny\",\"producer\":\"ampoule 0.1.0\"",
        ),
        ("\"tiny\"", "\"\\u0074iny\""),
        ("\"tiny\"", "\"tin\\/y\""),
    ] {
        assert!(manifest.contains(from), "{from}");
        let at = canonical(&manifest.replace(from, to), &entries);
        assert!((MANIFEST_AT..MANIFEST_AT + manifest.len() * 2).contains(&at));
    }
    let at = manifest.find(",\"note\"").unwrap();
    canonical(&format!("{},\"note\":null}}", &manifest[..at]), &entries);
    canonical(&format!("{manifest} "), &entries);
    // The safetensors entries: type, shape, offsets, order, missing, added, twice.
    let parts: Vec<String> = entries.split_inclusive("]}").map(str::to_owned).collect();
    assert_eq!(parts.len(), 7);
    for (from, to) in [
        ("\"U32\",\"shape\":[5]", "\"I32\",\"shape\":[5]"),
        ("\"U32\",\"shape\":[5]", "\"U32\",\"shape\":[1,5]"),
        ("[0,20]", "[0,16]"),
        ("[0,20]", "[4,24]"),
        ("\"shape\":[2,5],\"data_offsets\"", "\"data_offsets\""),
        ("\"cursor\"", "\"cursos\""),
    ] {
        assert!(entries.contains(from), "{from}");
        canonical(&manifest, &entries.replacen(from, to, 1));
    }
    let mut swapped = parts.clone();
    swapped.swap(1, 2);
    canonical(&manifest, &swapped.concat());
    canonical(&manifest, &parts[1..].concat());
    canonical(&manifest, &parts[..6].concat());
    canonical(&manifest, &format!("{entries}{}", parts[6]));
    canonical(
        &manifest,
        &format!("{entries},\"x\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"),
    );
    canonical(&manifest, "");
    // Padding: too much of it, or not spaces.
    let mut padded = craft(&manifest, &entries, b"");
    padded.extend_from_slice(&[b' '; 8]);
    let length = padded.len() as u64 - 8;
    padded[..8].copy_from_slice(&length.to_le_bytes());
    padded.extend_from_slice(&payload);
    reseal(&mut padded);
    assert!(matches!(refuse(&padded), CapsuleError::NotCanonical { .. }));
    for byte in *b"\n\0}x" {
        let mut padded = bytes.clone();
        let last = padded.len() - payload.len() - 1;
        assert_eq!(padded[last], b' ');
        padded[last] = byte;
        reseal(&mut padded);
        assert!(matches!(refuse(&padded), CapsuleError::NotCanonical { .. }));
    }
    // Metadata keys: more of them, or other escapes.
    let escaped = manifest.replace('\\', "\\\\").replace('"', "\\\"");
    let start = "\",\"ampoule.format\":\"1\",\"ampoule.manifest\":\"";
    for rest in [
        format!("{start}{escaped}\",\"x\":\"y\"}}{entries}}}"),
        format!(
            "\",\"x\":\"y\",\"ampoule.format\":\"1\",\"ampoule.manifest\":\"{escaped}\"}}{entries}}}"
        ),
        format!("\",\"ampoule.format\":1,\"ampoule.manifest\":\"{escaped}\"}}{entries}}}"),
    ] {
        let error = refuse(&craft_raw(&rest, &payload));
        assert!(matches!(error, CapsuleError::NotCanonical { .. }), "{error}");
    }
    let odd = escaped.replacen("tiny", "\\u0074iny", 1);
    let error = refuse(&craft_raw(&format!("{start}{odd}\"}}{entries}}}"), &payload));
    assert!(matches!(error, CapsuleError::Manifest { .. }), "{error}");
}

#[test]
fn nested_and_endless_json_is_refused() {
    let (manifest, entries, payload) = split(&sample().encode());
    let deep = "[".repeat(1 << 20);
    let objects = "{\"a\":".repeat(1 << 18);
    for text in [&deep, &objects, &"1".repeat(1 << 20), &" ".repeat(1 << 20), "", "null", "\""] {
        refuse(&craft(text, &entries, &payload));
        refuse(&craft(&manifest.replace("[2,5]", text), &entries, &payload));
        refuse(&craft(&manifest.replace("\"tiny\"", text), &entries, &payload));
        refuse(&craft(&manifest, text, &payload));
        refuse(&craft_raw(text, &payload));
    }
    refuse(&craft_raw("\",\"ampoule.format\":\"1\",\"ampoule.manifest\":\"{", b""));
    refuse(&craft_raw("\",\"ampoule.format\":\"1\",\"ampoule.manifest\":\"{\\", b""));
    // Text that is not UTF-8, with a right checksum.
    let mut bytes = sample().encode();
    let at = bytes.windows(4).position(|w| w == b"tiny").unwrap();
    bytes[at] = 0xff;
    reseal(&mut bytes);
    assert!(matches!(refuse(&bytes), CapsuleError::Manifest { .. }));
}

#[test]
fn a_checksum_in_capitals_is_refused() {
    let mut bytes = sample().encode();
    bytes[CHECKSUM].make_ascii_uppercase();
    assert!(matches!(refuse(&bytes), CapsuleError::HeaderChecksum { .. }));
}
