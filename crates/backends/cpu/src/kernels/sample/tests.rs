//! The sampler against the reference's.

use ampoule_reference::sample as reference;

use super::*;
use crate::simd::Isa;

struct Random(u64);

impl Random {
    fn word(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn below(&mut self, n: usize) -> usize {
        self.word() as usize % n
    }

    fn unit(&mut self) -> f32 {
        self.word() as f32 / 2_147_483_648.0
    }

    fn pick(&mut self, from: &[f32]) -> f32 {
        from[self.below(from.len())]
    }
}

fn check(random: &mut Random, vocabulary: usize, rounds: usize) {
    let mut pool = Pool::new(1 + random.below(3));
    let mut sampler = Sampler::new(vocabulary).unwrap();
    for round in 0..rounds {
        let spread = random.pick(&[0.1, 1.0, 4.0, 10.0]);
        // Coarse values make ties.
        let step = random.pick(&[0.0, 0.25, 1.0]);
        let mut logits: Vec<f32> = (0..vocabulary)
            .map(|_| {
                let sum: f32 = (0..4).map(|_| random.unit() - 0.5).sum();
                let l = sum * spread * 2.0;
                if step > 0.0 { (l / step).round() * step } else { l }
            })
            .collect();
        for _ in 0..random.below(4) {
            logits[random.below(vocabulary)] =
                random.pick(&[f32::NAN, f32::NEG_INFINITY, 30.0, -0.0]);
        }
        if random.below(40) == 0 {
            logits.fill(f32::NEG_INFINITY);
        }
        let counts: Vec<u32> = (0..vocabulary)
            .map(|_| match random.below(12) {
                0 => SEEN_AS_PROMPT,
                1 => random.word() % 5,
                2 => SEEN_AS_PROMPT | (random.word() % 5),
                _ => 0,
            })
            .collect();
        let k = [0, 1, 5, 40, vocabulary / 2, vocabulary - 1, vocabulary][random.below(7)];
        let params = [
            random.pick(&[0.0, 0.3, 0.7, 1.0, 1.5]),
            random.pick(&[0.0, k as f32]),
            random.pick(&[1.0, 0.95, 0.5, 0.01, 0.0, 0.999_999]),
            random.pick(&[0.0, 0.0, 0.05, 0.5, 1.0, 1.5]),
            random.pick(&[1.0, 1.0, 1.3, 0.8]),
            random.pick(&[0.0, 0.5]),
            random.pick(&[0.0, 0.25, -0.5]),
            0.0,
        ];
        let entries = random.below(4);
        let bias_tokens: Vec<i32> =
            (0..entries).map(|_| random.below(vocabulary + 2) as i32 - 1).collect();
        let bias_values: Vec<f32> =
            (0..entries).map(|_| random.pick(&[-1.0, 2.0, f32::NEG_INFINITY])).collect();
        let (seed, position) = ([random.word(), random.word()], random.word());
        let mut wanted_adjusted = logits.clone();
        let wanted = reference(ampoule_reference::Draw {
            logits: &mut wanted_adjusted,
            params: &params,
            seed,
            bias: bias_tokens.iter().copied().zip(bias_values.iter().copied()).collect(),
            position,
            counts: &counts,
        });
        let isa = Isa::ALL[random.below(3)];
        let mut adjusted = vec![f32::NAN; vocabulary];
        let token = sampler.sample(
            &mut pool,
            Verified::new(isa),
            Draw {
                logits: &logits,
                counts: &counts,
                params: &params,
                seed,
                bias_tokens: &bias_tokens,
                bias_values: &bias_values,
                position,
                draw: true,
                adjusted: &mut adjusted,
            },
        );
        assert_eq!(token, wanted, "round {round} of {vocabulary}, {isa}: {params:?}");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&adjusted) == bits(&wanted_adjusted), "round {round}: adjusted, {params:?}");
    }
}

#[test]
fn tokens_are_the_references() {
    let mut random = Random(1);
    for vocabulary in [1, 2, 3, 7, 16, 33] {
        check(&mut random, vocabulary, 400);
    }
    for vocabulary in [1000, 4099] {
        check(&mut random, vocabulary, 200);
    }
    check(&mut random, 49_152, 40);
    check(&mut random, 70_001, 20);
}
