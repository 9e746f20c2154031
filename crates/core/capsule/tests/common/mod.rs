//! Capsules to test with.
#![allow(dead_code, unreachable_pub)]

use ampoule_capsule::{
    CapsuleFile, Digest, Fingerprint, Growth, History, Labels, LineageId, LineageScope, Manifest,
    Origin, Parent, StateLayout, StateTensor, salt_digest, to_bytes,
};
use ampoule_plan::DType;

/// Where the 64 characters of the header checksum lie, as docs/capsule-format.md says.
pub const CHECKSUM: std::ops::Range<usize> = 50..114;
/// Where the manifest's text begins.
pub const MANIFEST_AT: usize = 157;

/// SplitMix64: reproducible, and needs no crate.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

pub fn tensor(
    name: &str,
    dtype: DType,
    shape: &[usize],
    kind: &str,
    growth: Growth,
) -> StateTensor {
    StateTensor { name: name.into(), dtype, shape: shape.into(), kind: kind.into(), growth }
}

pub fn fingerprint(layout: &StateLayout) -> Fingerprint {
    Fingerprint {
        weights: Digest::of(b"weights"),
        plan: Digest::of(b"plan"),
        kernels: Digest::of(b"kernels"),
        device: Digest::of(b"device"),
        layout: layout.digest(),
        labels: Labels {
            weights: "tiny.safetensors".into(),
            plan: "tiny, 16 rows".into(),
            kernels: "ampoule-reference 0.1.0".into(),
            device: "cpu x86_64".into(),
            layout: "f16 KV cache".into(),
        },
    }
}

/// A capsule in parts.
pub struct Parts {
    pub manifest: Manifest,
    pub tokens: Vec<u32>,
    /// By index in the layout.
    pub payload: Vec<Vec<u8>>,
}

impl Parts {
    /// Fills a layout with random bytes; `history` gives the position.
    pub fn new(layout: StateLayout, history: History, parent_at: Option<u32>, seed: u64) -> Self {
        let mut random = Random(seed);
        let position = history.end();
        let fingerprint = fingerprint(&layout);
        let salt = salt_digest(b"tenant");
        let tokens: Vec<u32> = (0..position).map(|_| random.next() as u32).collect();
        let scope = LineageScope { fingerprint: fingerprint.digest(), salt };
        let parent =
            parent_at.map(|position| Parent { id: LineageId(Digest::of(b"parent")), position });
        let (from, at) = parent.map_or((scope.root(), 0), |p| (p.id, p.position));
        let payload =
            layout.tensors.iter().map(|t| random.bytes(t.bytes_at(position).unwrap())).collect();
        let manifest = Manifest {
            producer: "ampoule 0.1.0".into(),
            model: "tiny".into(),
            position,
            lineage: scope.advance(from, at, &history, &tokens).unwrap(),
            history,
            parent,
            salt,
            fingerprint,
            layout,
            journal: None,
            note: Some("a \"quoted\" \\ note\nof two lines, é".into()),
        };
        Self { manifest, tokens, payload }
    }

    pub fn encode(&self) -> Vec<u8> {
        let pieces: Vec<[&[u8]; 1]> = self.payload.iter().map(|p| [p.as_slice()]).collect();
        let names = self.manifest.layout.tensors.iter().map(|t| t.name.as_str());
        let payload: Vec<(&str, &[&[u8]])> =
            names.zip(&pieces).map(|(name, pieces)| (name, pieces.as_slice())).collect();
        to_bytes(&self.manifest, &self.tokens, &payload).unwrap()
    }
}

/// A history of 3 prefilled and 2 decoded positions.
pub fn history() -> History {
    let mut history = History::new();
    history.append(Origin::Prefill, 3).unwrap();
    history.append(Origin::Decode, 2).unwrap();
    history
}

/// A capsule of a few KB with every element type, rows, fixed tensors, a scalar and a parent.
pub fn sample() -> Parts {
    use Growth::{Fixed, Rows};
    let layout = StateLayout {
        tensors: vec![
            tensor("sampler.flags", DType::U8, &[3], "sampler", Fixed),
            tensor("layers.0.kv.key", DType::F16, &[16, 2, 3], "kv_cache", Rows),
            tensor("layers.0.kv.value", DType::BF16, &[16, 2, 3], "kv_cache", Rows),
            tensor("layers.1.recurrent", DType::F32, &[2, 5], "recurrent", Fixed),
            tensor("cursor", DType::U32, &[], "cursor", Fixed),
            tensor("sampler.counts", DType::I32, &[16, 1], "sampler", Rows),
        ],
    };
    Parts::new(layout, history(), Some(2), 1)
}

/// Writes the header checksum that the bytes ask for, if the header's length allows it.
pub fn reseal(bytes: &mut [u8]) {
    let Some(length) = bytes.first_chunk::<8>().map(|p| u64::from_le_bytes(*p)) else { return };
    let Some(end) = usize::try_from(length).ok().and_then(|l| l.checked_add(8)) else { return };
    if end > bytes.len() || end < CHECKSUM.end {
        return;
    }
    bytes[CHECKSUM].fill(b'0');
    let digest = Digest::of(&bytes[..end]).to_string();
    bytes[CHECKSUM].copy_from_slice(digest.as_bytes());
}

/// A file with a right checksum around any manifest text (escaped here), entries and payload.
pub fn craft(manifest: &str, entries: &str, payload: &[u8]) -> Vec<u8> {
    let escaped = manifest.replace('\\', "\\\\").replace('"', "\\\"");
    craft_raw(
        &format!("\",\"ampoule.format\":\"1\",\"ampoule.manifest\":\"{escaped}\"}}{entries}}}"),
        payload,
    )
}

/// A file with a right checksum around anything that follows the checksum.
pub fn craft_raw(rest: &str, payload: &[u8]) -> Vec<u8> {
    let zeros = "0".repeat(64);
    let mut header =
        format!("{{\"__metadata__\":{{\"ampoule.header_blake3\":\"{zeros}{rest}").into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(&header);
    reseal(&mut out);
    out.extend_from_slice(payload);
    out
}

/// The manifest's text and the entries after it, taken from a file.
pub fn split(bytes: &[u8]) -> (String, String, Vec<u8>) {
    let file = CapsuleFile::parse(bytes).unwrap();
    let manifest = file.header().manifest_json();
    let escaped = manifest.replace('\\', "\\\\").replace('"', "\\\"");
    let end = file.header().payload_start() as usize;
    let header = std::str::from_utf8(&bytes[..end][8..]).unwrap();
    let rest = &header[MANIFEST_AT - 8..];
    let rest = rest.strip_prefix(escaped.as_str()).unwrap().trim_end();
    let entries = rest.strip_prefix("\"}").unwrap().strip_suffix('}').unwrap();
    (manifest, entries.to_owned(), bytes[end..].to_vec())
}

/// One random change: a byte set, bytes swapped, inserted or deleted, or a piece copied elsewhere.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let length = bytes.len();
    let at = random.below(length);
    match random.below(5) {
        0 => bytes[at] = random.next() as u8,
        1 => bytes.swap(at, random.below(length)),
        2 => {
            let count = 1 + random.below(16);
            let inserted = random.bytes(count);
            bytes.splice(at..at, inserted);
        }
        3 => {
            let end = (at + 1 + random.below(16)).min(length);
            bytes.drain(at..end);
        }
        _ => {
            let end = (at + 1 + random.below(64)).min(length);
            let piece = bytes[at..end].to_vec();
            let to = random.below(length);
            let to_end = (to + piece.len()).min(length);
            bytes.splice(to..to_end, piece);
        }
    }
}

/// Encodes what was read again.
pub fn encode_again(file: &CapsuleFile<'_>) -> Vec<u8> {
    let manifest = file.manifest();
    let tokens: Vec<u32> = file.tokens().collect();
    let payload: Vec<Vec<u8>> =
        manifest.layout.tensors.iter().map(|t| file.tensor(&t.name).unwrap().to_vec()).collect();
    Parts { manifest: manifest.clone(), tokens, payload }.encode()
}
