//! What is written is read back, by this crate and by any safetensors reader.

mod common;

use ampoule_capsule::{
    CapsuleError, CapsuleFile, CapsuleHeader, CapsuleWriter, Component, Digest, Growth, History,
    LineageError, MAX_NOTE_BYTES, PayloadDigests, StateLayout, TOKENS, encode_header, salt_digest,
};
use ampoule_plan::DType;
use common::{CHECKSUM, MANIFEST_AT, Parts, encode_again, fingerprint, history, sample, tensor};

#[test]
fn round_trip() {
    let parts = sample();
    let bytes = parts.encode();
    let file = CapsuleFile::parse(&bytes).unwrap();
    assert_eq!(file.manifest(), &parts.manifest);
    assert_eq!(file.tokens().collect::<Vec<_>>(), parts.tokens);
    for (tensor, payload) in parts.manifest.layout.tensors.iter().zip(&parts.payload) {
        assert_eq!(file.tensor(&tensor.name), Some(payload.as_slice()), "{}", tensor.name);
    }
    assert_eq!(file.tensor("no such"), None);
    assert_eq!(encode_again(&file), bytes);
}

#[test]
fn the_payload_has_no_gaps_and_every_tensor_is_aligned() {
    let bytes = sample().encode();
    let file = CapsuleFile::parse(&bytes).unwrap();
    let mut at = file.header().payload_start();
    assert!(at.is_multiple_of(8));
    let mut names = Vec::new();
    for payload in file.tensors() {
        let entry = &payload.entry;
        assert_eq!(entry.range.start, at);
        assert!(entry.range.start.is_multiple_of(entry.dtype.block_bytes() as u64));
        assert_eq!(entry.digest, Digest::of(payload.bytes));
        let elements: usize = entry.shape.iter().product();
        assert_eq!(payload.bytes.len(), elements * entry.dtype.block_bytes());
        at = entry.range.end;
        names.push(entry.name);
    }
    assert_eq!(at, bytes.len() as u64);
    assert_eq!(
        names,
        [
            TOKENS,
            "layers.1.recurrent",
            "cursor",
            "sampler.counts",
            "layers.0.kv.key",
            "layers.0.kv.value",
            "sampler.flags",
        ]
    );
}

#[test]
fn the_header_is_as_documented() {
    let bytes = sample().encode();
    let start = b"{\"__metadata__\":{\"ampoule.header_blake3\":\"";
    assert_eq!(&bytes[8..CHECKSUM.start], start);
    let before = b"\",\"ampoule.format\":\"1\",\"ampoule.manifest\":\"";
    assert_eq!(&bytes[CHECKSUM.end..MANIFEST_AT], before);
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut covered = bytes[..8 + length].to_vec();
    covered[CHECKSUM].fill(b'0');
    assert_eq!(Digest::of(&covered).to_string().as_bytes(), &bytes[CHECKSUM]);
}

#[test]
fn a_safetensors_reader_opens_it() {
    let parts = sample();
    let bytes = parts.encode();
    let opened = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(opened.len(), parts.payload.len() + 1);
    for (tensor, payload) in parts.manifest.layout.tensors.iter().zip(&parts.payload) {
        let view = opened.tensor(&tensor.name).unwrap();
        assert_eq!(view.data(), payload, "{}", tensor.name);
        assert_eq!(view.shape(), tensor.shape_at(5), "{}", tensor.name);
        assert_eq!(format!("{:?}", view.dtype()).to_lowercase(), tensor.dtype.name());
    }
    let tokens = opened.tensor(TOKENS).unwrap();
    let expected: Vec<u8> = parts.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    assert_eq!((tokens.data(), tokens.shape()), (expected.as_slice(), [5].as_slice()));

    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    assert_eq!(metadata["ampoule.format"], "1");
    let manifest: serde_json::Value = serde_json::from_str(&metadata["ampoule.manifest"]).unwrap();
    assert_eq!(manifest["position"], 5);
    assert_eq!(manifest["note"], parts.manifest.note.unwrap());
    let digest = Digest::of(&parts.payload[3]).to_string();
    assert_eq!(manifest["blake3"]["layers.1.recurrent"], digest);
    let header = CapsuleHeader::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(header.manifest_json(), metadata["ampoule.manifest"]);
}

#[test]
fn equal_capsules_have_equal_bytes_however_they_are_given() {
    let parts = sample();
    let whole = parts.encode();
    let mut writer = CapsuleWriter::new(&parts.manifest, &parts.tokens).unwrap();
    for (tensor, payload) in parts.manifest.layout.tensors.iter().zip(&parts.payload).rev() {
        let (a, b) = payload.split_at(payload.len() / 3);
        writer.add(&tensor.name, &[a, &[], b]).unwrap();
    }
    let encoded = writer.finish().unwrap();
    assert_eq!(encoded.to_bytes(), whole);
    assert_eq!(encoded.byte_len(), whole.len());
    assert_eq!(encoded.slices().collect::<Vec<_>>().concat(), whole);

    let file = CapsuleFile::parse(&whole).unwrap();
    let header = encode_header(&parts.manifest, file.header().digests()).unwrap();
    assert_eq!(header, &whole[..file.header().payload_start() as usize]);
}

#[test]
fn inspecting_needs_the_header_alone() {
    let parts = sample();
    let bytes = parts.encode();
    let total = bytes.len() as u64;
    let needed = CapsuleHeader::bytes_needed(&bytes[..8], total).unwrap();
    let header = CapsuleHeader::parse(&bytes[..needed], total).unwrap();
    assert_eq!(header.manifest(), &parts.manifest);
    assert_eq!(header.total_bytes(), total);
    assert_eq!(header.tensors().last().unwrap().range.end, total);
    // A damaged payload is not its business, a missing one is.
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(CapsuleHeader::parse(&damaged, total).is_ok());
    assert!(matches!(
        CapsuleHeader::parse(&bytes[..needed], total - 1),
        Err(CapsuleError::Length { .. })
    ));
    assert!(matches!(
        CapsuleHeader::parse(&bytes[..needed - 1], total),
        Err(CapsuleError::HeaderCutShort { .. })
    ));
    assert_eq!(header.into_manifest(), parts.manifest);
}

#[test]
fn the_empty_capsule() {
    let rows = tensor("kv", DType::F16, &[4, 2], "kv_cache", Growth::Rows);
    for layout in [StateLayout::default(), StateLayout { tensors: vec![rows] }] {
        let bytes = Parts::new(layout, History::new(), None, 2).encode();
        let file = CapsuleFile::parse(&bytes).unwrap();
        assert_eq!(file.tokens().len(), 0);
        assert_eq!(file.header().payload_start(), bytes.len() as u64);
        assert_eq!(file.manifest().lineage, file.manifest().scope().root());
        safetensors::SafeTensors::deserialize(&bytes).unwrap();
    }
}

#[test]
fn only_the_same_tenant_model_and_layout_fit() {
    let parts = sample();
    let bytes = parts.encode();
    let file = CapsuleFile::parse(&bytes).unwrap();
    let Parts { manifest, .. } = &parts;
    let (ours, layout, salt) = (&manifest.fingerprint, &manifest.layout, &manifest.salt);
    assert_eq!(file.check_fits(ours, layout, salt), Ok(()));
    assert_eq!(file.header().check_fits(ours, layout, salt), Ok(()));

    let other = salt_digest(b"other");
    assert_eq!(file.check_fits(ours, layout, &other), Err(CapsuleError::OtherTenant));

    let mut theirs = ours.clone();
    theirs.kernels = Digest::of(b"other");
    assert!(matches!(
        file.check_fits(&theirs, layout, salt),
        Err(CapsuleError::Fingerprint(m)) if m.component == Component::Kernels
    ));

    let mut longer = layout.clone();
    longer.tensors[1].shape[0] = 32;
    let error = file.check_fits(&fingerprint(&longer), &longer, salt).unwrap_err();
    assert!(
        matches!(&error, CapsuleError::OtherLayout { tensor, .. } if tensor == "layers.0.kv.key")
    );
    assert!(error.to_string().contains("[32, 2, 3]"), "{error}");
    // A fingerprint that hides the difference does not help.
    assert!(file.check_fits(ours, &longer, salt).is_err());
    let mut theirs = ours.clone();
    theirs.layout = Digest::of(b"other");
    assert!(matches!(
        file.check_fits(&theirs, layout, salt),
        Err(CapsuleError::Fingerprint(m)) if m.component == Component::Layout
    ));
}

#[test]
fn the_writer_refuses_what_a_reader_would() {
    let parts = sample();
    let refuse = |change: &dyn Fn(&mut Parts)| {
        let mut parts = sample();
        change(&mut parts);
        CapsuleWriter::new(&parts.manifest, &parts.tokens).unwrap_err()
    };
    let long = || "x".repeat(MAX_NOTE_BYTES + 1);
    assert!(matches!(
        refuse(&|p| p.manifest.note = Some(long())),
        CapsuleError::Text { field: "note", .. }
    ));
    assert!(matches!(
        refuse(&|p| p.manifest.model = long()),
        CapsuleError::Text { field: "model", .. }
    ));
    assert!(matches!(
        refuse(&|p| p.manifest.fingerprint.labels.device = long()),
        CapsuleError::Text { field: "device", .. }
    ));
    assert!(matches!(
        refuse(&|p| p.manifest.position = 6),
        CapsuleError::Position { position: 6, end: 5 }
    ));
    assert!(matches!(refuse(&|p| p.manifest.position = 17), CapsuleError::Layout(_)));
    assert!(matches!(
        refuse(&|p| p.manifest.layout.tensors.truncate(2)),
        CapsuleError::LayoutDigest { .. }
    ));
    assert!(matches!(
        refuse(&|p| p.manifest.parent.as_mut().unwrap().position = 5),
        CapsuleError::Parent { parent: 5, position: 5 }
    ));
    assert!(matches!(
        refuse(&|p| p.tokens.truncate(4)),
        CapsuleError::Lineage(LineageError::TokenCount { tokens: 4, .. })
    ));
    assert!(matches!(
        refuse(&|p| p.tokens[4] ^= 1),
        CapsuleError::Lineage(LineageError::WrongId { .. })
    ));
    assert!(matches!(
        refuse(&|p| p.manifest.parent = None),
        CapsuleError::Lineage(LineageError::WrongId { .. })
    ));

    let mut writer = CapsuleWriter::new(&parts.manifest, &parts.tokens).unwrap();
    assert!(matches!(writer.add("no", &[]), Err(CapsuleError::UnknownTensor { .. })));
    assert!(matches!(
        writer.add("cursor", &[&[0; 3]]),
        Err(CapsuleError::TensorBytes { expected: 4, actual: 3, .. })
    ));
    writer.add("cursor", &[&[0; 4]]).unwrap();
    assert!(matches!(writer.add("cursor", &[&[0; 4]]), Err(CapsuleError::TensorTwice { .. })));
    assert!(matches!(
        writer.finish(),
        Err(CapsuleError::TensorMissing { tensor }) if tensor == "sampler.flags"
    ));
    let digests = PayloadDigests { tokens: Digest::of(b""), tensors: Vec::new() };
    assert!(matches!(
        encode_header(&parts.manifest, &digests),
        Err(CapsuleError::DigestCount { expected: 6, actual: 0 })
    ));
}

const GOLDEN: &[u8] = include_bytes!("golden/v1.ampoule.bin");

/// A file written by the first release of format 1 must be read for ever, and be written the same.
#[test]
fn golden() {
    let file = CapsuleFile::parse(GOLDEN).unwrap();
    assert_eq!(file.manifest(), &sample().manifest);
    assert_eq!(file.manifest().history, history());
    assert_eq!(encode_again(&file), GOLDEN);
    assert_eq!(sample().encode(), GOLDEN);
    let digest = "8b867a5bd4d6db7c98c71bd8eac84ff0e2b50a6877f6cba9a84154a99af79934";
    assert_eq!(Digest::of(GOLDEN).to_string(), digest, "the golden file itself was changed");
}

/// Writes the golden file. It is written once for a format version and never again.
#[test]
#[ignore = "writes the golden file"]
fn write_golden() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/v1.ampoule.bin");
    std::fs::write(path, sample().encode()).unwrap();
}
