//! The paths against each other and against exact values.

use super::{Isa, Kernel, LANES, Simd, Verified, dispatch, exp, silu};

/// Runs one function of every kind over bit patterns and collects the results' bits.
struct Everything<'a> {
    a: &'a [f32; LANES],
    b: &'a [f32; LANES],
    bytes: &'a [u8; 64],
}

impl Kernel for Everything<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let (a, b) = (s.from_lanes(self.a), s.from_lanes(self.b));
        let mut results = vec![
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.fma(a, b, b),
            s.max(a, b),
            s.min(a, b),
            exp(s, a),
            silu(s, b),
            s.splat(s.sum(a)),
        ];
        let p = self.bytes.as_ptr();
        let mut rows = [a; LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = s.mul(b, s.splat(i as f32 + 0.5));
        }
        results.push(s.sum16(&rows));
        s.transpose(&mut rows);
        results.extend(rows);
        let mut quad = [0.0; 4];
        let mut half = [0_u16; LANES];
        // SAFETY: 64 bytes, 16 floats and 16 half floats hold what is read and written.
        unsafe {
            results.push(s.load_f16(p.cast()));
            results.push(s.load_bf16(p.cast()));
            s.widen4(p, &mut quad);
            let (d, m) = (quad[0], quad[1]);
            results.push(s.decode8(p.add(4), d));
            let (low, high) = s.decode4_0(p.add(4), d);
            results.extend([low, high]);
            let (low, high) = s.decode4_1(p.add(4), d, m);
            results.extend([low, high]);
            results.push(s.load_n(self.a.as_ptr(), 5));
            let mut partly = *self.b;
            s.store_n(partly.as_mut_ptr(), a, 11);
            results.push(s.from_lanes(&partly));
            s.store_f16(half.as_mut_ptr(), a);
            results.push(s.from_lanes(&half.map(f32::from)));
            s.store_bf16(half.as_mut_ptr(), a);
            results.push(s.from_lanes(&half.map(f32::from)));
        }
        // The bits of a NaN differ between the paths; that it is one does not.
        let canonical = |x: f32| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() };
        let mut bits = Vec::new();
        for result in results {
            bits.extend(s.lanes(result).map(canonical));
        }
        bits
    }
}

fn random(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 32) as u32
}

#[test]
fn every_path_gives_the_same_bits() {
    let mut state = 7;
    for round in 0..2000 {
        // Random bits, so infinities, NaNs and subnormals too; then numbers of ordinary size.
        let mut lanes = || {
            std::array::from_fn(|_| {
                let bits = random(&mut state);
                let plain = bits.cast_signed() as f32 * (1.0 / 1.0e8);
                if round % 2 == 0 { f32::from_bits(bits) } else { plain }
            })
        };
        let (a, b) = (lanes(), lanes());
        let bytes = std::array::from_fn(|_| random(&mut state) as u8);
        let run = |isa| {
            let kernel = Everything { a: &a, b: &b, bytes: &bytes };
            // SAFETY: `Everything` asks for nothing.
            unsafe { dispatch(Verified::new(isa), kernel) }
        };
        let wanted = run(Isa::Portable);
        for isa in Isa::ALL {
            assert_eq!(run(isa), wanted, "{isa}, round {round}: {a:?} {b:?}");
        }
    }
}

struct Exp<'a>(&'a [f32; LANES]);

impl Kernel for Exp<'_> {
    type Output = [f32; LANES];

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Self::Output {
        s.lanes(exp(s, s.from_lanes(self.0)))
    }
}

fn fast_exp(x: [f32; LANES]) -> [f32; LANES] {
    // SAFETY: `Exp` asks for nothing.
    unsafe { dispatch(Verified::new(Isa::detect()), Exp(&x)) }
}

#[test]
fn exp_is_close_and_right_at_the_edges() {
    let mut worst = 0.0_f64;
    for step in 0..200_000 {
        let x: [f32; LANES] =
            std::array::from_fn(|l| -87.0 + 175.0 * (step * LANES + l) as f32 / 3_200_000.0);
        for (x, y) in x.into_iter().zip(fast_exp(x)) {
            let exact = f64::from(x).exp();
            let unit =
                f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(y) - exact).abs() / unit);
        }
    }
    assert!(worst < 2.0, "{worst} units in the last place");
    let mut edges = [0.0; LANES];
    edges[..7].copy_from_slice(&[
        f32::NEG_INFINITY,
        f32::INFINITY,
        f32::NAN,
        -104.0,
        89.0,
        0.0,
        -0.0,
    ]);
    let y = fast_exp(edges);
    assert_eq!(
        (y[0], y[1], y[3], y[4], y[5], y[6]),
        (0.0, f32::INFINITY, 0.0, f32::INFINITY, 1.0, 1.0)
    );
    assert!(y[2].is_nan());
}
