//! Random operands that depend on the seed and the case's name alone.

use ampoule_plan::{BLOCK, DType};
use ampoule_reference::store_elements;
use half::f16;

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// A stream of its own for each seed and name.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a: names differ in their last letters too.
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3)
        });
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ hash)
    }

    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is not zero.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    /// In `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.word() >> 40) as f32 * (1.0 / 16_777_216.0)
    }

    /// Standard normal (Box and Muller 1958).
    pub(crate) fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.unit()).cos()
    }
}

/// How values are distributed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Values {
    /// Normal with this standard deviation.
    Normal(f32),
    /// As `Normal`, one in 20 forty times as large.
    Wide(f32),
    /// Uniform.
    Uniform(f32, f32),
    /// Token ids, one in 16 outside the vocabulary.
    Tokens(usize),
    /// Any bits.
    Bits,
}

impl Values {
    fn real(self, rng: &mut Rng) -> f32 {
        match self {
            Self::Normal(scale) => scale * rng.normal(),
            Self::Wide(scale) => {
                let value = scale * rng.normal();
                if rng.below(20) == 0 { 40.0 * value } else { value }
            }
            Self::Uniform(low, high) => low + (high - low) * rng.unit(),
            Self::Tokens(_) | Self::Bits => rng.unit(),
        }
    }

    fn token(self, rng: &mut Rng) -> i32 {
        let Self::Tokens(vocabulary) = self else { return rng.word() as i32 };
        match rng.below(32) {
            0 => -1 - rng.below(1000) as i32,
            1 => (vocabulary + rng.below(1000)) as i32,
            _ => rng.below(vocabulary) as i32,
        }
    }
}

/// Bytes of `elements` random elements.
pub(crate) fn random_bytes(
    rng: &mut Rng,
    dtype: DType,
    elements: usize,
    values: Values,
) -> Vec<u8> {
    let size = dtype.bytes_for(elements).expect("rows of whole blocks");
    if matches!(values, Values::Bits) {
        return (0..size).map(|_| rng.word() as u8).collect();
    }
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => {
            let reals: Vec<f32> = (0..elements).map(|_| values.real(rng)).collect();
            let mut bytes = vec![0; size];
            store_elements(dtype, &reals, &mut bytes);
            bytes
        }
        DType::I32 => (0..elements).flat_map(|_| values.token(rng).to_le_bytes()).collect(),
        DType::U32 => (0..elements).flat_map(|_| (rng.word() as u32).to_le_bytes()).collect(),
        DType::U8 => (0..elements).map(|_| rng.word() as u8).collect(),
        DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => {
            (0..elements / BLOCK).flat_map(|_| random_block(rng, dtype, values)).collect()
        }
    }
}

/// A valid block: scales of either sign, one in 12 zero; every bit pattern of the quants.
fn random_block(rng: &mut Rng, dtype: DType, values: Values) -> Vec<u8> {
    let size = match values {
        Values::Normal(s) | Values::Wide(s) => s,
        _ => 1.0,
    };
    // The standard deviation of uniform quants: 256 / sqrt(12), 16 / sqrt(12).
    let deviation = if dtype == DType::Q8_0 { 74.0 } else { 4.6 };
    let sign = if rng.below(2) == 0 { 1.0 } else { -1.0 };
    let scale = match rng.below(12) {
        0 => 0.0,
        _ => sign * size / deviation * (0.5 + rng.unit()),
    };
    let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
    if dtype == DType::Q4_1 {
        let minimum = -8.0 * scale + 0.3 * size * rng.normal();
        block.extend(f16::from_f32(minimum).to_le_bytes());
    }
    block.resize_with(dtype.block_bytes(), || rng.word() as u8);
    block
}

/// Fills token rows past the count: a valid token, so that counting it would show.
pub(crate) const POISON_TOKEN: usize = 3;

/// Elements that no valid result may depend on: NaN, or [`POISON_TOKEN`].
pub(crate) fn poison_bytes(dtype: DType, elements: usize) -> Vec<u8> {
    let size = dtype.bytes_for(elements).expect("rows of whole blocks");
    match dtype {
        DType::F32 => f32::NAN.to_le_bytes().repeat(elements),
        DType::F16 => f16::NAN.to_le_bytes().repeat(elements),
        DType::BF16 => half::bf16::NAN.to_le_bytes().repeat(elements),
        DType::I32 => (POISON_TOKEN as i32).to_le_bytes().repeat(elements),
        _ => vec![0x7f; size],
    }
}
