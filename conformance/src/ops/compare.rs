//! Results against expectations.

use ampoule_plan::DType;
use ampoule_reference::load_elements;

use super::case::Tolerance;
use super::report::Mismatch;

/// Allowed errors, relative to the larger of the expected element and the root mean square of the expected tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerances {
    /// Of float32 elements.
    pub f32: f64,
    /// Of float16 elements.
    pub f16: f64,
    /// Of bfloat16 elements.
    pub bf16: f64,
}

impl Default for Tolerances {
    fn default() -> Self {
        Self { f32: 2e-5, f16: 2e-3, bf16: 1.6e-2 }
    }
}

impl Tolerances {
    fn of(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::BF16 => self.bf16,
            _ => 0.0,
        }
    }
}

/// Elements as numbers; of quantised blocks and where bits count, the bytes.
fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let words = bytes.chunks_exact(4).map(|w| [w[0], w[1], w[2], w[3]]);
    match dtype {
        DType::I32 => words.map(|w| f64::from(i32::from_le_bytes(w))).collect(),
        DType::U32 => words.map(|w| f64::from(u32::from_le_bytes(w))).collect(),
        DType::F32 | DType::F16 | DType::BF16 => {
            load_elements(dtype, bytes).into_iter().map(f64::from).collect()
        }
        DType::U8 | DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => {
            bytes.iter().copied().map(f64::from).collect()
        }
    }
}

/// What a comparison found.
pub(crate) struct Outcome {
    /// The first element that is wrong.
    pub(crate) mismatch: Option<Mismatch>,
    /// The largest relative error.
    pub(crate) worst: f64,
}

/// Compares `got` with `expected`. A NaN passes only where bits are compared.
pub(crate) fn compare(
    dtype: DType,
    tolerance: Tolerance,
    tolerances: &Tolerances,
    got: &[u8],
    expected: &[u8],
) -> Outcome {
    if got == expected && tolerance == Tolerance::Bits {
        return Outcome { mismatch: None, worst: 0.0 };
    }
    let (g, e) = (numbers(dtype, got), numbers(dtype, expected));
    if g.len() != e.len() {
        let mismatch = Mismatch {
            index: g.len().min(e.len()),
            got: g.len() as f64,
            expected: e.len() as f64,
            relative_error: f64::INFINITY,
            wrong: 1,
            elements: e.len(),
        };
        return Outcome { mismatch: Some(mismatch), worst: f64::INFINITY };
    }
    let finite = || e.iter().filter(|v| v.is_finite());
    let rms = (finite().map(|v| v * v).sum::<f64>() / finite().count().max(1) as f64).sqrt();
    let allowed = match tolerance {
        Tolerance::Relative(scale) | Tolerance::OverStale(scale) => tolerances.of(dtype) * scale,
        Tolerance::Bits | Tolerance::Value => 0.0,
    };
    let bytes_each = got.len() / g.len().max(1);
    let same_bits = |i: usize| {
        got[i * bytes_each..(i + 1) * bytes_each] == expected[i * bytes_each..(i + 1) * bytes_each]
    };
    let mut outcome = Outcome { mismatch: None, worst: 0.0 };
    for (index, (&got, &expected)) in g.iter().zip(&e).enumerate() {
        let stale = matches!(tolerance, Tolerance::OverStale(_)) && expected.is_nan();
        let error = if stale && same_bits(index) {
            0.0
        } else if got.is_nan() || expected.is_nan() {
            f64::INFINITY
        } else if got == expected {
            0.0
        } else {
            (got - expected).abs() / rms.max(expected.abs())
        };
        let error = if error.is_nan() { f64::INFINITY } else { error };
        let passes = if tolerance == Tolerance::Bits { same_bits(index) } else { error <= allowed };
        if tolerance != Tolerance::Bits {
            outcome.worst = outcome.worst.max(error);
        }
        if !passes {
            let first = outcome.mismatch.get_or_insert(Mismatch {
                index,
                got,
                expected,
                relative_error: error,
                wrong: 0,
                elements: e.len(),
            });
            first.wrong += 1;
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn check(tolerance: Tolerance, got: &[f32], expected: &[f32]) -> Option<Mismatch> {
        let limits = Tolerances::default();
        compare(DType::F32, tolerance, &limits, &floats(got), &floats(expected)).mismatch
    }

    #[test]
    fn nan_passes_only_as_bits() {
        let nan = f32::NAN;
        assert!(check(Tolerance::Relative(1.0), &[nan], &[nan]).is_some());
        assert!(check(Tolerance::Value, &[nan], &[nan]).is_some());
        assert!(check(Tolerance::Bits, &[nan], &[nan]).is_none());
        assert!(check(Tolerance::Relative(1e9), &[nan, 1.0], &[1.0, 1.0]).is_some());
    }

    #[test]
    fn errors_are_relative_to_the_tensor_and_the_first_is_named() {
        let relative = Tolerance::Relative(1.0);
        assert!(check(relative, &[1e-6, 1.0], &[0.0, 1.0]).is_none());
        let wrong = check(relative, &[1.0, 1e-3, 1.1], &[1.0, 0.0, 1.0]).unwrap();
        assert_eq!((wrong.index, wrong.wrong, wrong.elements), (1, 2, 3));
        assert!(check(relative, &[f32::INFINITY], &[f32::INFINITY]).is_none());
        assert!(check(relative, &[f32::INFINITY, 1.0], &[1.0, 1.0]).is_some());
        assert!(check(relative, &[0.0], &[f32::NEG_INFINITY]).is_some());
        assert!(check(relative, &[1.0, 1.0], &[1.0]).is_some());
        assert!(check(Tolerance::Value, &[-0.0], &[0.0]).is_none());
        assert!(check(Tolerance::Bits, &[-0.0], &[0.0]).is_some());
    }
}
