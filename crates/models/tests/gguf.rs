//! The GGUF reader on right files and on hostile ones.

mod support;

use ampoule_models::error::{ModelFileError, TensorProblem};
use ampoule_models::gguf::{GgufFile, MetaArray, MetaValue};
use ampoule_models::tensors::TensorSource;
use ampoule_models::tokenizer::Tokenizer;
use ampoule_plan::DType;
use support::{GgufWriter, Meta, Seeded, mutate, small_gguf, small_gguf_with_tokenizer};

fn open(writer: &GgufWriter) -> Result<GgufFile, ModelFileError> {
    GgufFile::from_bytes("small.gguf", writer.write())
}

fn refused(writer: &GgufWriter) -> ModelFileError {
    open(writer).expect_err("the file must be refused")
}

/// Refused for this tensor, and the message names file, tensor and these words.
fn refused_tensor(writer: &GgufWriter, name: &str, words: &str) -> TensorProblem {
    let error = refused(writer);
    let message = error.to_string();
    for part in ["small.gguf", &format!("tensor '{name}'"), words] {
        assert!(message.contains(part), "'{message}' does not say '{part}'");
    }
    match error {
        ModelFileError::Tensor { problem, .. } => problem,
        other => panic!("not about a tensor: {other:?}"),
    }
}

fn says(error: &ModelFileError, words: &[&str]) {
    let message = error.to_string();
    for word in words.iter().chain(&["small.gguf"]) {
        assert!(message.contains(word), "'{message}' does not say '{word}'");
    }
}

#[test]
fn reads_metadata_and_tensors_of_both_versions() {
    for version in [2, 3] {
        let file = open(&GgufWriter { version, ..small_gguf() }).unwrap();
        assert_eq!((file.version(), file.alignment()), (version, 32));
        assert_eq!(file.require_string("general.architecture").unwrap(), "llama");
        assert_eq!(file.require_unsigned("a.u8").unwrap(), 7);
        assert_eq!(file.require_unsigned("a.u64").unwrap(), 1 << 40);
        assert_eq!(file.value("a.i32"), Some(&MetaValue::I32(-3)));
        assert_eq!(file.require_float("a.f32").unwrap(), 0.5);
        assert_eq!(file.require_float("a.f64").unwrap(), -2.25);
        assert_eq!(file.boolean("a.bool").unwrap(), Some(true));
        assert_eq!(file.require_strings("a.strings").unwrap(), ["x", "ö"]);
        assert_eq!(
            file.value("a.numbers"),
            Some(&MetaValue::Array(MetaArray::I32(vec![1, -2, 3])))
        );
        assert_eq!(file.metadata().count(), 10);

        assert_eq!(file.names(), ["brain", "half", "norm", "q40", "q41", "q8"]);
        let norm = file.tensor("norm").unwrap();
        assert_eq!((norm.dtype, norm.shape), (DType::F32, &[4][..]));
        assert_eq!(norm.bytes[12..], 1.5_f32.to_le_bytes());
        let cases = [
            ("half", DType::F16, &[3, 2][..], 1, 12),
            ("brain", DType::BF16, &[2, 3], 2, 12),
            ("q8", DType::Q8_0, &[2, 64], 3, 136),
            ("q40", DType::Q4_0, &[1, 2, 32], 4, 36),
            ("q41", DType::Q4_1, &[2, 1, 1, 32], 5, 40),
        ];
        for (name, dtype, shape, byte, len) in cases {
            let view = file.tensor(name).unwrap();
            assert_eq!((view.name, view.dtype, view.shape), (name, dtype, shape));
            assert_eq!(view.bytes, vec![byte; len], "{name}");
        }
    }
}

#[test]
fn typed_values_refuse_other_types_and_name_the_key() {
    let file = open(&small_gguf()).unwrap();
    says(&file.require_unsigned("absent").unwrap_err(), &["'absent'", "missing"]);
    says(&file.require_unsigned("a.i32").unwrap_err(), &["'a.i32'", "i32"]);
    says(&file.require_float("a.u8").unwrap_err(), &["'a.u8'", "u8", "floating-point"]);
    says(&file.require_string("a.strings").unwrap_err(), &["'a.strings'", "array of strings"]);
    says(&file.unsigned_array("a.numbers").unwrap_err(), &["'a.numbers'"]);
    let missing = file.tensor("blk.0.weight").unwrap_err();
    says(&missing, &["'blk.0.weight'", "missing", "6 tensors"]);
}

#[test]
fn other_formats_and_versions_are_refused() {
    says(
        &GgufFile::from_bytes("small.gguf", b"PK\x03\x04".to_vec()).unwrap_err(),
        &["not a GGUF file", "50"],
    );
    says(&GgufFile::from_bytes("small.gguf", vec![]).unwrap_err(), &["not a GGUF file"]);
    says(&refused(&GgufWriter { version: 1, ..small_gguf() }), &["version 1"]);
    says(&refused(&GgufWriter { version: 4, ..small_gguf() }), &["version 4"]);
    says(&refused(&GgufWriter { version: 3_u32.swap_bytes(), ..small_gguf() }), &["big-endian"]);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small_gguf().write();
    for len in 0..bytes.len() {
        let error =
            GgufFile::from_bytes("small.gguf", bytes[..len].to_vec()).expect_err("truncated");
        says(&error, &[]);
        if len >= 24 {
            // From there on it is known what is cut, and the message says so.
            let message = error.to_string();
            assert!(
                ["metadata", "tensor"].iter().any(|word| message.contains(word)),
                "at {len}: {message}"
            );
        }
    }
    assert!(GgufFile::from_bytes("small.gguf", bytes).is_ok());
}

#[test]
fn counts_beyond_the_file_are_refused_before_allocating() {
    for count in [1000, u64::MAX, 1 << 40] {
        let tensors = GgufWriter { tensor_count: Some(count), ..small_gguf() };
        says(&refused(&tensors), &["tensors", &count.to_string()]);
        let pairs = GgufWriter { pair_count: Some(count), ..small_gguf() };
        says(&refused(&pairs), &["metadata pairs", &count.to_string()]);
        let array = |number: u32| {
            let raw = [&number.to_le_bytes()[..], &count.to_le_bytes()].concat();
            small_gguf().meta("big", Meta::Raw(9, raw))
        };
        for number in [0, 4, 7, 8, 10, 12] {
            says(&refused(&array(number)), &["'big'", &count.to_string()]);
        }
        let string = small_gguf().meta("long", Meta::Raw(8, count.to_le_bytes().to_vec()));
        says(&refused(&string), &["'long'", "truncated"]);
    }
}

#[test]
fn bad_metadata_is_refused_by_key() {
    let number = |n: u32| small_gguf().meta("odd", Meta::Raw(n, vec![0; 16]));
    says(&refused(&number(13)), &["'odd'", "type 13"]);
    says(&refused(&number(u32::MAX)), &["'odd'"]);
    let nested = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &[0; 32]].concat();
    says(
        &refused(&small_gguf().meta("nest", Meta::Raw(9, nested))),
        &["'nest'", "arrays of arrays"],
    );
    says(&refused(&small_gguf().meta("a.u8", Meta::U8(1))), &["'a.u8'", "twice"]);
    let mut text = 2_u64.to_le_bytes().to_vec();
    text.extend([0xc3, 0x28]);
    says(&refused(&small_gguf().meta("text", Meta::Raw(8, text))), &["'text'", "UTF-8"]);
    for alignment in [Meta::U32(0), Meta::U32(33), Meta::U64(1 << 40), Meta::F32(32.0)] {
        says(
            &refused(&small_gguf().meta("general.alignment", alignment)),
            &["general.alignment", "power of two"],
        );
    }
}

#[test]
fn the_alignment_of_the_file_is_used() {
    let writer = GgufWriter { alignment: 1024, ..small_gguf() };
    let wrong = open(&writer).map(|file| file.digest());
    let file = open(&writer.meta("general.alignment", Meta::U32(1024))).unwrap();
    assert_eq!((file.alignment(), file.tensor("q41").unwrap().bytes), (1024, &[5; 40][..]));
    assert_ne!(wrong.ok(), Some(file.digest()), "without the key the data is elsewhere");
}

#[test]
fn bad_tensors_are_refused_by_name() {
    let with = |dims: &[u64], kind: u32| small_gguf().tensor("bad", dims, kind, vec![0; 64]);
    assert!(open(&with(&[16], 0)).is_ok());
    assert_eq!(
        refused_tensor(&with(&[], 0), "bad", "0 dimensions"),
        TensorProblem::Rank { rank: 0 }
    );
    assert_eq!(
        refused_tensor(&with(&[1; 5], 0), "bad", "5 dimensions"),
        TensorProblem::Rank { rank: 5 }
    );
    refused_tensor(&with(&[4, 0], 0), "bad", "zero elements");
    refused_tensor(&with(&[1 << 33, 1 << 33], 0), "bad", "overflows");
    refused_tensor(&with(&[1 << 62], 0), "bad", "overflows");
    refused_tensor(&with(&[u64::MAX, 1], 1), "bad", "overflows");
    refused_tensor(&with(&[33], 3), "bad", "33 elements, not a multiple of the 32");
    refused_tensor(&with(&[16, 2], 8), "bad", "16 elements");
    refused_tensor(&with(&[32], 12), "bad", "12 (Q4_K)");
    refused_tensor(&with(&[32], 4), "bad", "4 (not defined by GGUF)");
    refused_tensor(&with(&[32], u32::MAX), "bad", "supported are F32 (0), F16 (1)");
    refused_tensor(&with(&[17], 0), "bad", "needs 68 bytes");
    refused_tensor(&small_gguf().tensor("norm", &[4], 0, vec![0; 16]), "norm", "twice");
    refused_tensor(
        &small_gguf().tensor_at("bad", &[4], 0, 4),
        "bad",
        "not a multiple of the alignment 32",
    );
    refused_tensor(&small_gguf().tensor_at("bad", &[4], 0, 1 << 40), "bad", "truncated");
    refused_tensor(&small_gguf().tensor_at("bad", &[4], 0, u64::MAX - 31), "bad", "truncated");
    // norm is at 0, half at 32, brain at 64.
    refused_tensor(&small_gguf().tensor_at("bad", &[12], 0, 0), "bad", "overlaps tensor 'norm'");
    let same = small_gguf().tensor_at("bad", &[4], 0, 64);
    let message = refused(&same).to_string();
    assert!(
        message.contains("'bad'") && message.contains("'brain'") && message.contains("overlaps"),
        "{message}"
    );
}

#[test]
fn names_from_hostile_files_cannot_flood_or_forge_messages() {
    let name = format!("a\nerror: all is well\u{1b}[2J{}", "x".repeat(10_000));
    let message = refused(&small_gguf().tensor(&name, &[], 0, vec![])).to_string();
    assert!(message.len() < 400 && !message.contains(['\n', '\u{1b}']), "{message}");
}

#[test]
fn ten_thousand_mutations_never_panic() {
    let original = small_gguf_with_tokenizer().write();
    let mut seeded = Seeded(20_261_121);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..10_000 {
        match GgufFile::from_bytes("small.gguf", mutate(&mut seeded, &original)) {
            Ok(file) => {
                opened += 1;
                for name in file.names() {
                    let view = file.tensor(name).unwrap();
                    let elements = view.shape.iter().product::<usize>();
                    assert_eq!(view.dtype.bytes_for(elements), Some(view.bytes.len()));
                }
                if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
                    let _ = tokenizer
                        .encode("ab <|e|>", ampoule_models::tokenizer::EncodeOptions::PROMPT);
                }
            }
            Err(error) => {
                refused += 1;
                says(&error, &[]);
            }
        }
    }
    assert!(
        opened > 500 && refused > 500,
        "{opened} opened, {refused} refused: the mutations test nothing"
    );
}

#[test]
fn the_seeds_of_the_fuzz_target_are_current() {
    support::seed("gguf/small.gguf", &small_gguf_with_tokenizer().write());
    support::seed("gguf/version2.gguf", &GgufWriter { version: 2, ..small_gguf() }.write());
}

#[test]
fn the_digest_is_of_the_content() {
    let digest = |writer: &GgufWriter| open(writer).unwrap().digest();
    let original = digest(&small_gguf());
    let mut reordered = small_gguf();
    reordered.tensors.reverse();
    assert_eq!(digest(&reordered), original);
    assert_eq!(digest(&small_gguf().meta("more", Meta::U8(1))), original);
    let aligned =
        GgufWriter { alignment: 64, ..small_gguf() }.meta("general.alignment", Meta::U32(64));
    assert_eq!(digest(&aligned), original);

    let change = |change: &dyn Fn(&mut GgufWriter)| {
        let mut writer = small_gguf();
        change(&mut writer);
        assert_ne!(digest(&writer), original);
    };
    change(&|w| w.tensors[3].4[135] ^= 1);
    change(&|w| w.tensors[0].0 = "norm2".into());
    change(&|w| w.tensors[1].1 = vec![3, 2]);
    change(&|w| w.tensors[1].2 = 30);
    change(&|w| drop(w.tensors.pop()));
}

#[test]
fn a_mapped_file_equals_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, small_gguf().write()).unwrap();
    let mapped = GgufFile::open(&path).unwrap();
    assert_eq!(mapped.digest(), open(&small_gguf()).unwrap().digest());
    assert_eq!(mapped.tensor("norm").unwrap().bytes.as_ptr() as usize % 32, 0);

    let missing = GgufFile::open(dir.path().join("none.gguf")).unwrap_err().to_string();
    assert!(missing.contains("none.gguf") && missing.contains("cannot open"), "{missing}");
    assert!(matches!(GgufFile::open(dir.path()), Err(ModelFileError::NotAFile { .. })));
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(GgufFile::open(&path), Err(ModelFileError::BadMagic { .. })));
}

#[test]
fn smollm2_is_as_published() {
    let Some(path) = support::smollm2() else { return };
    let file = GgufFile::open(path).unwrap();
    assert_eq!(file.names().len(), 272);
    assert_eq!(file.require_unsigned("llama.embedding_length").unwrap(), 576);
    let embedding = file.tensor("token_embd.weight").unwrap();
    assert_eq!((embedding.dtype, embedding.shape), (DType::Q8_0, &[49152, 576][..]));
    let down = file.tensor("blk.0.ffn_down.weight").unwrap();
    assert_eq!((down.dtype, down.shape), (DType::Q4_1, &[576, 1536][..]));
    assert_eq!(down.bytes.len(), 576 * 1536 / 32 * 20);
}
