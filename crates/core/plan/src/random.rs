//! Random weights that are the same bits on every device.

/// A recipe for random weights: element `i` is uniform in `centre ± half_width`, from a counter-based hash, so any
/// device can make any element alone.
///
/// `u = (mix(seed + (i + 1) * 0x9E3779B97F4A7C15) >> 40) * 2^-23 - 1` is exact in f32 and lies in `[-1, 1)`; the
/// value is `fma(u, half_width, centre)`, then rounded to the buffer's type. `mix` is SplitMix64's finaliser
/// (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomFill {
    /// Stream of this buffer.
    pub seed: u64,
    /// Middle of the range.
    pub centre: f32,
    /// Half of the range's width.
    pub half_width: f32,
}

impl RandomFill {
    /// Element `index`.
    #[inline]
    pub fn value(&self, index: u64) -> f32 {
        let mut z =
            self.seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let u = (z >> 40) as f32 * (1.0 / 8_388_608.0) - 1.0;
        u.mul_add(self.half_width, self.centre)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fill_the_range_and_depend_on_the_seed() {
        let fill = RandomFill { seed: 7, centre: 1.0, half_width: 0.5 };
        let values: Vec<f32> = (0..10_000).map(|i| fill.value(i)).collect();
        let mean = values.iter().sum::<f32>() / 10_000.0;
        assert!((mean - 1.0).abs() < 0.02, "mean {mean}");
        assert!(values.iter().all(|v| (0.5..1.5).contains(v)));
        assert!(values.iter().any(|v| *v < 0.51) && values.iter().any(|v| *v > 1.49));
        let other = RandomFill { seed: 8, ..fill };
        assert!((0..10_000).filter(|&i| other.value(i) == fill.value(i)).count() < 10);
    }
}
