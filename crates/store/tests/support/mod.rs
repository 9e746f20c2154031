//! What the store's tests share: a small model, sessions of capsules with made-up state, files that crash.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::needless_for_each)]

pub mod sim;

use std::borrow::Cow;
use std::ops::Range;

use ampoule_capsule::{
    Digest, Fingerprint, Growth, Labels, LineageId, Origin, Segment, StateLayout, StateTensor,
    salt_digest,
};
use ampoule_store::{
    CapsuleId, Link, LoadError, NewCapsule, SaveError, Saved, Scope, SourceError, StateBytes, Store,
};

pub fn scope(salt: &[u8]) -> Scope {
    scope_with(salt, 64, 3)
}

/// A layout with both growths and widths of 4, 2 and 1 bytes.
pub fn scope_with(salt: &[u8], rows: usize, width: usize) -> Scope {
    let tensor = |name: &str, dtype: &str, shape: &[usize], kind: &str, growth| StateTensor {
        name: name.into(),
        dtype: dtype.parse().unwrap(),
        shape: shape.to_vec(),
        kind: kind.into(),
        growth,
    };
    let layout = StateLayout {
        tensors: vec![
            tensor("cursor", "u32", &[1], "cursor", Growth::Fixed),
            tensor("layers.0.kv.key", "f16", &[rows, 2, width], "kv_cache", Growth::Rows),
            tensor("layers.0.kv.value", "bf16", &[rows, 2, width], "kv_cache", Growth::Rows),
            tensor("layers.1.recurrent", "f32", &[2, 5], "recurrent", Growth::Fixed),
            tensor("layers.1.scores", "f32", &[rows, 3], "kv_cache", Growth::Rows),
            tensor("sampler.flags", "u8", &[7], "sampler", Growth::Fixed),
        ],
    };
    let fingerprint = Fingerprint {
        weights: Digest::of(b"weights"),
        plan: Digest::of(b"plan"),
        kernels: Digest::of(b"kernels"),
        device: Digest::of(b"device"),
        layout: layout.digest(),
        labels: Labels::default(),
    };
    Scope { fingerprint, layout, salt: salt_digest(salt) }
}

/// State whose bytes follow from a seed, the tensor and the place within it.
pub struct MadeUp {
    pub seed: u64,
    pub fail: bool,
}

impl MadeUp {
    pub fn expected(&self, tensor: usize, range: Range<usize>) -> Vec<u8> {
        range.map(|i| byte(self.seed, tensor, i)).collect()
    }
}

fn byte(seed: u64, tensor: usize, at: usize) -> u8 {
    let mut x = seed ^ ((tensor as u64) << 40) ^ (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x >> 29) as u8
}

impl StateBytes for MadeUp {
    fn bytes(&self, tensor: usize, range: Range<usize>) -> Result<Cow<'_, [u8]>, SourceError> {
        if self.fail {
            Err("the device is gone".into())
        } else {
            Ok(self.expected(tensor, range).into())
        }
    }
}

/// One boundary of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    pub tokens: Vec<u32>,
    pub spans: Vec<Segment>,
    pub lineage: LineageId,
    pub journal: Option<String>,
    pub seed: u64,
}

/// A branch of boundaries, the naive model of what the store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branch {
    pub scope: Scope,
    pub boundaries: Vec<Boundary>,
    pub fixed_seed: u64,
    pub note: Option<String>,
}

impl Branch {
    pub fn new(scope: &Scope) -> Self {
        Self { scope: scope.clone(), boundaries: Vec::new(), fixed_seed: 0, note: None }
    }

    pub fn position(&self) -> u32 {
        self.boundaries.iter().map(|b| b.tokens.len() as u32).sum()
    }

    /// Reads `prefill` then `decode` tokens and makes a boundary.
    pub fn turn(&mut self, prefill: u32, decode: u32, seed: u64) -> &mut Self {
        let start = self.position();
        let (middle, end) = (start + prefill, start + prefill + decode);
        let spans: Vec<Segment> = [
            Segment { start, end: middle, origin: Origin::Prefill },
            Segment { start: middle, end, origin: Origin::Decode },
        ]
        .into_iter()
        .filter(|span| span.end > span.start)
        .collect();
        let tokens: Vec<u32> = (start..end).map(|p| p * 7 + seed as u32).collect();
        let lineage_scope = self.scope.lineage();
        let mut lineage =
            self.boundaries.last().map_or_else(|| lineage_scope.root(), |b| b.lineage);
        for span in &spans {
            let own = &tokens[(span.start - start) as usize..(span.end - start) as usize];
            lineage = lineage_scope.extend(lineage, *span, own).unwrap();
        }
        let journal = Some(format!("[{seed}]"));
        self.boundaries.push(Boundary { tokens, spans, lineage, journal, seed });
        self.fixed_seed = seed ^ 0xf1;
        self
    }

    pub fn save(&self, store: &Store) -> Result<Saved, SaveError> {
        self.save_with(store, false)
    }

    pub fn save_with(&self, store: &Store, fail: bool) -> Result<Saved, SaveError> {
        let rows: Vec<MadeUp> =
            self.boundaries.iter().map(|b| MadeUp { seed: b.seed, fail }).collect();
        let links: Vec<Link<'_>> = self
            .boundaries
            .iter()
            .zip(&rows)
            .map(|(b, rows)| Link {
                tokens: &b.tokens,
                spans: b.spans.clone(),
                lineage: b.lineage,
                from: None,
                journal: b.journal.as_deref().map(Into::into),
                rows,
            })
            .collect();
        store.save(&NewCapsule {
            scope: &self.scope,
            links: &links,
            fixed: &MadeUp { seed: self.fixed_seed, fail },
            model: "made up",
            note: self.note.as_deref(),
        })
    }

    /// Loads the capsule and compares every byte of state with the model.
    pub fn check(&self, store: &Store, id: CapsuleId) -> Result<(), LoadError> {
        let capsule = store.capsule(id)?;
        assert_eq!(capsule.position(), self.position());
        assert_eq!(*capsule.scope, self.scope);
        assert_eq!(capsule.note(), self.note.as_deref());
        assert_eq!(capsule.nodes.len(), self.boundaries.len());
        for (index, boundary) in self.boundaries.iter().enumerate() {
            let node = &capsule.nodes[index];
            assert_eq!(node.tokens, boundary.tokens);
            assert_eq!(node.spans(), boundary.spans);
            assert_eq!(node.lineage(), boundary.lineage);
            assert_eq!(node.journal(), boundary.journal.as_deref());
            let rows = store.rows(&capsule, index)?;
            let made_up = MadeUp { seed: boundary.seed, fail: false };
            for (tensor, t) in self.scope.layout.tensors.iter().enumerate() {
                let bytes = t.row_bytes().unwrap() * boundary.tokens.len();
                assert_eq!(rows.tensor(tensor), made_up.expected(tensor, 0..bytes), "{}", t.name);
            }
        }
        let fixed = store.fixed(&capsule)?;
        let made_up = MadeUp { seed: self.fixed_seed, fail: false };
        for (tensor, t) in self.scope.layout.tensors.iter().enumerate() {
            let bytes = if t.growth == Growth::Fixed { t.bytes_at(0).unwrap() } else { 0 };
            assert_eq!(fixed.tensor(tensor), made_up.expected(tensor, 0..bytes), "{}", t.name);
        }
        Ok(())
    }
}

/// Small random numbers (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}
