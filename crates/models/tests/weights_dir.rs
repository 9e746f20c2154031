//! The Hugging Face folder reader on right folders and on hostile ones.

mod support;

use ampoule_models::error::{ModelFileError, TensorProblem};
use ampoule_models::tensors::TensorSource;
use ampoule_models::weights_dir::{WeightsDir, WeightsParts};
use ampoule_plan::DType;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use support::{Seeded, mutate};

/// A safetensors file from a header as it is and data.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A safetensors file as the library writes it.
fn file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.to_string(), TensorView::new(*dtype, shape.to_vec(), data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn small() -> Vec<u8> {
    file(&[
        ("a.weight", Dtype::F32, &[2, 2], &[1; 16]),
        ("b.weight", Dtype::BF16, &[3], &[2; 6]),
        ("c.weight", Dtype::F16, &[1, 1, 2], &[3; 4]),
        ("d", Dtype::F32, &[], &[4; 4]),
    ])
}

fn single(bytes: Vec<u8>) -> Result<WeightsDir, ModelFileError> {
    let files = vec![("model.safetensors".to_owned(), bytes.into())];
    WeightsDir::from_parts(
        "folder",
        WeightsParts { config: b"{\"model_type\": \"llama\"}".to_vec(), index: None, files },
    )
}

fn sharded(index: &str, files: &[(&str, Vec<u8>)]) -> Result<WeightsDir, ModelFileError> {
    let files =
        files.iter().map(|(name, bytes)| (name.to_string(), bytes.clone().into())).collect();
    WeightsDir::from_parts(
        "folder",
        WeightsParts { config: b"{}".to_vec(), index: Some(index.into()), files },
    )
}

fn says(result: Result<WeightsDir, ModelFileError>, words: &[&str]) -> ModelFileError {
    let error = result.expect_err("the folder must be refused");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "'{message}' does not say '{word}'");
    }
    error
}

#[test]
fn reads_a_single_file() {
    let dir = single(small()).unwrap();
    assert_eq!(dir.config()["model_type"], "llama");
    assert_eq!(dir.names(), ["a.weight", "b.weight", "c.weight", "d"]);
    let cases = [
        ("a.weight", DType::F32, &[2, 2][..], 1, 16),
        ("b.weight", DType::BF16, &[3], 2, 6),
        ("c.weight", DType::F16, &[1, 1, 2], 3, 4),
        ("d", DType::F32, &[], 4, 4),
    ];
    for (name, dtype, shape, byte, len) in cases {
        let view = dir.tensor(name).unwrap();
        assert_eq!((view.name, view.dtype, view.shape), (name, dtype, shape));
        assert_eq!(view.bytes, vec![byte; len]);
    }
    let missing = dir.tensor("model.norm.weight").unwrap_err().to_string();
    assert!(
        missing.contains("folder") && missing.contains("'model.norm.weight' is missing"),
        "{missing}"
    );
}

#[test]
fn shards_give_the_same_digest_as_one_file() {
    let one = file(&[("a", Dtype::F32, &[1], &[1; 4]), ("b", Dtype::F32, &[1], &[2; 4])]);
    let index = r#"{"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
    let shards = [
        ("1.safetensors", file(&[("a", Dtype::F32, &[1], &[1; 4])])),
        ("2.safetensors", file(&[("b", Dtype::F32, &[1], &[2; 4])])),
    ];
    let dir = sharded(index, &shards).unwrap();
    assert_eq!(dir.tensor("b").unwrap().bytes, [2; 4]);
    assert_eq!(dir.digest(), single(one).unwrap().digest());
    let other = [shards[0].clone(), ("2.safetensors", file(&[("b", Dtype::F32, &[1], &[3; 4])]))];
    assert_ne!(sharded(index, &other).unwrap().digest(), dir.digest());
}

#[test]
fn index_and_shards_must_agree() {
    let shard = |name: &str| file(&[(name, Dtype::F32, &[1], &[1; 4])]);
    let map = |pairs: &str| format!("{{\"weight_map\": {{{pairs}}}}}");
    let index = "model.safetensors.index.json";
    says(
        sharded(
            &map(r#""a": "1.safetensors", "b": "1.safetensors""#),
            &[("1.safetensors", shard("a"))],
        ),
        &[index, "tensor 'b'", "part of '1.safetensors', which does not hold it"],
    );
    says(
        sharded(&map(r#""a": "1.safetensors""#), &[("1.safetensors", small())]),
        &[index, "tensor 'a'", "does not hold it"],
    );
    let two = file(&[("a", Dtype::F32, &[1], &[1; 4]), ("x", Dtype::F32, &[1], &[1; 4])]);
    says(
        sharded(&map(r#""a": "1.safetensors""#), &[("1.safetensors", two)]),
        &["tensor 'x'", "does not list it"],
    );
    says(
        sharded(
            &map(r#""a": "1.safetensors", "b": "2.safetensors""#),
            &[("1.safetensors", shard("a")), ("2.safetensors", shard("a"))],
        ),
        &["2.safetensors", "tensor 'a' occurs twice"],
    );
    says(
        sharded(&map(r#""a": "1.safetensors", "a": "2.safetensors""#), &[]),
        &[index, "tensor 'a' occurs twice"],
    );
    says(sharded(&map(r#""a": "1.safetensors""#), &[]), &["1.safetensors", "cannot open"]);
    says(sharded("{}", &[]), &[index, "weight_map"]);
    says(sharded("{", &[]), &[index]);
}

#[test]
fn shard_names_cannot_leave_the_folder() {
    for name in ["../x", "/etc/passwd", "a/b", "..", ".", "", "..\\\\x", "C:x", "x\\u0000"] {
        let index = format!("{{\"weight_map\": {{\"a\": \"{name}\"}}}}");
        let error =
            says(sharded(&index, &[]), &["model.safetensors.index.json", "plain file name"]);
        assert!(matches!(error, ModelFileError::ShardName { .. }), "{name}: {error:?}");
    }
}

#[test]
fn bad_headers_are_refused_by_tensor() {
    let entry = |dtype: &str, shape: &str, range: &str| {
        format!(
            "{{\"t\": {{\"dtype\": \"{dtype}\", \"shape\": {shape}, \"data_offsets\": {range}}}}}"
        )
    };
    let bad = |header: &str, words: &[&str]| {
        let mut all = vec!["model.safetensors", "tensor 't'"];
        all.extend(words);
        says(single(raw(header, &[0; 16])), &all)
    };
    assert!(single(raw(&entry("F32", "[4]", "[0, 16]"), &[0; 16])).is_ok());
    bad(&entry("F32", "[5]", "[0, 20]"), &["truncated", "needs 20 bytes"]);
    bad(&entry("F32", "[3]", "[0, 16]"), &["has 16 bytes", "needs 12"]);
    bad(&entry("F32", "[4]", "[16, 0]"), &["run backwards"]);
    bad(&entry("F32", "[0]", "[0, 0]"), &["zero elements"]);
    bad(&entry("F64", "[2]", "[0, 16]"), &["F64", "supported are F32"]);
    bad(&entry("F8_E4M3", "[16]", "[0, 16]"), &["F8_E4M3"]);
    bad(&entry("Q9", "[4]", "[0, 16]"), &["Q9"]);
    bad(&entry("F32", "[4294967296, 4294967296]", "[0, 16]"), &["overflows"]);
    bad(&entry("F32", "[-1]", "[0, 16]"), &["unreadable"]);
    bad(&entry("F32", "[4]", "[0, 16, 17]"), &["unreadable"]);
    // The library's own arithmetic overflows on ranges that end near the largest number.
    bad(&entry("U8", "[2305843009213693951]", "[0, 2305843009213693951]"), &["truncated"]);

    let two = |a: &str, b: &str, names: (&str, &str)| {
        let one = |name: &str, range: &str| {
            format!("\"{name}\": {{\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": {range}}}")
        };
        format!("{{{}, {}}}", one(names.0, a), one(names.1, b))
    };
    assert!(single(raw(&two("[0, 8]", "[8, 16]", ("s", "t")), &[0; 16])).is_ok());
    bad(&two("[0, 8]", "[4, 12]", ("s", "t")), &["overlaps tensor 's'"]);
    bad(&two("[0, 8]", "[0, 8]", ("t", "t")), &["occurs twice"]);
    let gap = || raw(&two("[0, 8]", "[8, 16]", ("s", "t")), &[0; 20]);
    says(single(gap()), &["model.safetensors", "4 bytes behind the last tensor"]);
    says(
        single(raw(&two("[0, 8]", "[9, 17]", ("s", "t")), &[0; 17])),
        &["1 bytes before tensor 't'"],
    );
}

#[test]
fn the_seeds_of_the_fuzz_target_are_current() {
    // As fuzz/fuzz_targets/safetensors.rs divides its input: 0, then one file; or the length of an index, then two.
    support::seed("safetensors/single", &[&[0], small().as_slice()].concat());
    let index = br#"{"weight_map":{"x":"a","y":"b"}}"#;
    let shard = |name: &str| file(&[(name, Dtype::F32, &[1], &[1; 4])]);
    let parts = [&[index.len() as u8], index.as_slice(), &shard("x"), &shard("y")];
    support::seed("safetensors/sharded", &parts.concat());
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small();
    for len in 0..bytes.len() {
        says(single(bytes[..len].to_vec()), &["model.safetensors"]);
    }
    let error = says(single(bytes[..bytes.len() - 1].to_vec()), &["tensor '"]);
    assert!(matches!(
        error,
        ModelFileError::Tensor { problem: TensorProblem::OutOfFile { .. }, .. }
    ));
}

#[test]
fn absurd_header_lengths_are_refused() {
    for length in [100_000_001, u64::MAX, 1 << 63] {
        let mut bytes = small();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        says(
            single(bytes),
            &["model.safetensors", &length.to_string(), "is this a safetensors file?"],
        );
    }
    let mut deep = "[".repeat(100_000);
    deep.insert_str(0, "{\"t\": ");
    says(single(raw(&deep, &[])), &["model.safetensors", "header"]);
}

#[test]
fn ten_thousand_mutations_never_panic_and_what_opens_the_library_opens() {
    let original = small();
    let mut seeded = Seeded(20_261_121);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..10_000 {
        let bytes = mutate(&mut seeded, &original);
        match single(bytes.clone()) {
            Ok(dir) => {
                opened += 1;
                let library =
                    safetensors::SafeTensors::deserialize(&bytes).expect("the library refuses it");
                assert_eq!(library.len(), dir.names().len());
                for name in dir.names() {
                    let (ours, theirs) = (dir.tensor(name).unwrap(), library.tensor(name).unwrap());
                    assert_eq!((ours.shape, ours.bytes), (theirs.shape(), theirs.data()));
                }
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("model.safetensors"), "{error}");
            }
        }
    }
    assert!(
        opened > 200 && refused > 1000,
        "{opened} opened, {refused} refused: the mutations test nothing"
    );
}

#[test]
fn opens_folders_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    says(WeightsDir::open(dir.path()), &["config.json", "cannot open"]);
    put("config.json", b"{\"model_type\": 1}");
    says(WeightsDir::open(dir.path()), &["model.safetensors.index.json", "cannot open"]);
    put("part-1.safetensors", &small());
    let names = ["a.weight", "b.weight", "c.weight", "d"]
        .map(|name| format!("\"{name}\": \"part-1.safetensors\""));
    put(
        "model.safetensors.index.json",
        format!("{{\"weight_map\": {{{}}}}}", names.join(",")).as_bytes(),
    );
    let sharded = WeightsDir::open(dir.path()).unwrap();
    put("model.safetensors", &small());
    put("model.safetensors.index.json", b"not read: the single file goes first");
    let single = WeightsDir::open(dir.path()).unwrap();
    assert_eq!(sharded.digest(), single.digest());
    put("config.json", b"{");
    says(WeightsDir::open(dir.path()), &["config.json", "the configuration"]);
}
