//! The sampler, as `docs/sampling.md` defines it.

use ampoule_plan::{SEEN_AS_PROMPT, sampler_params as p};

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// What a draw looks at.
pub struct Draw<'a> {
    /// Logits; changed in place to the `adjusted` of the definition.
    pub logits: &'a mut [f32],
    /// Parameters, indexed by [`ampoule_plan::sampler_params`].
    pub params: &'a [f32],
    /// Seed, low word first.
    pub seed: [u32; 2],
    /// Bias as (token, value).
    pub bias: Vec<(i32, f32)>,
    /// The position before the step.
    pub position: u32,
    /// Counts as the op `observe` has them.
    pub counts: &'a [u32],
}

/// Draws a token; the caller counts it.
pub fn sample(draw: Draw<'_>) -> usize {
    let Draw { logits, params, seed, bias, position, counts } = draw;
    for (logit, &count) in logits.iter_mut().zip(counts) {
        let repetition = params[p::REPETITION];
        if count != 0 && repetition != 1.0 {
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        }
        let generated = count & !SEEN_AS_PROMPT;
        if generated > 0 {
            *logit -= params[p::FREQUENCY] * generated as f32 + params[p::PRESENCE];
        }
    }
    for (token, value) in bias {
        if let Some(logit) = usize::try_from(token).ok().and_then(|t| logits.get_mut(t)) {
            *logit += value;
        }
    }
    for logit in logits.iter_mut().filter(|l| l.is_nan()) {
        *logit = f32::NEG_INFINITY;
    }
    let temperature = params[p::TEMPERATURE];
    if temperature == 0.0 || logits.iter().all(|l| *l == f32::NEG_INFINITY) {
        return first_highest(logits.iter().copied().enumerate()).unwrap_or(0);
    }
    for logit in logits.iter_mut() {
        *logit /= temperature;
    }
    let kept = filtered(logits, params);
    let noisy = (0..logits.len()).filter(|&i| kept(logits[i])).map(|i| {
        let words = philox4x32([(i / 4) as u32, position, 0, 0], seed);
        (i, logits[i] + gumbel(words[i % 4]))
    });
    first_highest(noisy).unwrap_or(0)
}

/// Gumbel noise from 32 random bits.
fn gumbel(bits: u32) -> f32 {
    let uniform = ((bits as f32 + 0.5) * (1.0 / 4_294_967_296.0)).min(1.0 - 1.0 / 16_777_216.0);
    -(-(-uniform).ln_1p()).ln()
}

/// The lowest index among those with the highest value.
fn first_highest(values: impl Iterator<Item = (usize, f32)>) -> Option<usize> {
    values
        .fold(
            None,
            |best: Option<(usize, f32)>, (i, v)| {
                if best.is_some_and(|(_, b)| v <= b) { best } else { Some((i, v)) }
            },
        )
        .map(|(i, _)| i)
}

/// Which values top-k, top-p and min-p keep.
fn filtered(adjusted: &[f32], params: &[f32]) -> impl Fn(f32) -> bool + use<> {
    let top_k = params[p::TOP_K] as usize;
    let sorts = top_k > 0 || params[p::TOP_P] < 1.0;
    let mut sorted = if sorts { adjusted.to_vec() } else { Vec::new() };
    sorted.sort_by(|a, b| b.total_cmp(a));
    let highest = adjusted.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut threshold = f32::NEG_INFINITY;
    if top_k > 0 && top_k < sorted.len() {
        threshold = sorted[top_k - 1];
        sorted.retain(|v| *v >= threshold);
    }
    if params[p::TOP_P] < 1.0 {
        let mass = |v: f32| ((v - highest).exp() * 4_294_967_296.0) as u128;
        let share = (params[p::TOP_P].max(0.0) * 16_777_216.0) as u128;
        let total: u128 = sorted.iter().map(|v| mass(*v)).sum();
        let mut sum = 0;
        for v in &sorted {
            sum += mass(*v);
            threshold = *v;
            if (sum << 24) >= share * total {
                break;
            }
        }
    }
    let min_p = params[p::MIN_P];
    move |v: f32| v >= threshold && (min_p <= 0.0 || (v - highest).exp() >= min_p)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // Known answers of the Random123 distribution (kat_vectors).
        let all = u32::MAX;
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([all; 4], [all; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let pi = philox4x32(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    fn draws(logits: &[f32], params: [f32; 8], n: u32) -> Vec<f64> {
        let mut seen = vec![0.0; logits.len()];
        for position in 0..n {
            let mut l = logits.to_vec();
            let counts = vec![0; l.len()];
            let draw = Draw {
                logits: &mut l,
                params: &params,
                seed: [42, 7],
                bias: Vec::new(),
                position,
                counts: &counts,
            };
            seen[sample(draw)] += 1.0 / f64::from(n);
        }
        seen
    }

    #[test]
    fn gumbel_draws_follow_the_softmax_and_the_filters() {
        let logits = [1.0, 2.0, 0.5, -1.0, 1.5, -4.0];
        let masses = |keep: &[usize], temperature: f64| {
            let e: Vec<f64> = (0..6)
                .map(|i| {
                    if keep.contains(&i) { (f64::from(logits[i]) / temperature).exp() } else { 0.0 }
                })
                .collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(|v| v / sum).collect::<Vec<_>>()
        };
        for (params, keep) in [
            ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], &[0, 1, 2, 3, 4, 5][..]),
            ([0.7, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], &[0, 1, 2, 3, 4, 5]),
            ([1.0, 2.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], &[1, 4]),
            ([1.0, 0.0, 0.6, 0.0, 1.0, 0.0, 0.0, 0.0], &[1, 4]),
            ([1.0, 0.0, 1.0, 0.3, 1.0, 0.0, 0.0, 0.0], &[0, 1, 4]),
        ] {
            let seen = draws(&logits, params, 20_000);
            let wanted = masses(keep, f64::from(params[0]));
            for i in 0..6 {
                assert!(
                    (seen[i] - wanted[i]).abs() < 0.015,
                    "{params:?}: token {i}: {} not {}",
                    seen[i],
                    wanted[i]
                );
            }
        }
    }

    #[test]
    fn penalties_bias_and_ties() {
        let mut params = [0.0, 0.0, 1.0, 0.0, 2.0, 0.5, 0.25, 0.0];
        let mut logits = [3.0, 2.0, -1.0, 2.0];
        let counts = [SEEN_AS_PROMPT, 0, SEEN_AS_PROMPT | 2, 1];
        let bias = vec![(1, -0.5), (-1, 100.0), (9, 100.0)];
        let token = sample(Draw {
            logits: &mut logits,
            params: &params,
            seed: [0, 0],
            bias,
            position: 0,
            counts: &counts,
        });
        assert_eq!(logits, [1.5, 1.5, -3.0, 0.25]);
        assert_eq!(token, 0, "the lowest index among equals");
        params[0] = 1.0;
        let mut lost = [f32::NAN, f32::NEG_INFINITY];
        let draw = Draw {
            logits: &mut lost,
            params: &params,
            seed: [0, 0],
            bias: vec![],
            position: 0,
            counts: &[0, 0],
        };
        assert_eq!(sample(draw), 0);
    }
}
