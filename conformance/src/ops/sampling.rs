//! The op `sample`, against `docs/sampling.md`.

use ampoule_plan::{
    Advance, BufferId, DType, Embed, Linear, Observe, Op, Phase, Plan, RmsNorm, Role, Sample,
    ShapeKey, StateKind, View, sampler_params as p,
};
use ampoule_reference::philox4x32;

use super::build::{Build, Tokens};
use super::case::{Bytes, Case, DrawOf, Expect, Reading, Replay, Scenario, States, Tolerance};
use super::rng::{Rng, Values, random_bytes};
use super::spec::Family;
use super::words::random_counts;

/// What logits look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logits {
    /// Normal, deviation 3.
    Plain,
    /// Multiples of a half: many equal.
    Tied,
    /// A few far above the rest.
    Peaked,
    /// With NaN and negative infinity.
    Broken,
    /// Nothing but negative infinity and NaN.
    Lost,
}

impl Logits {
    fn values(self, rng: &mut Rng, vocabulary: usize) -> Vec<f32> {
        let mut values: Vec<f32> = (0..vocabulary).map(|_| 3.0 * rng.normal()).collect();
        match self {
            Self::Plain => {}
            Self::Tied => values.iter_mut().for_each(|v| *v = (2.0 * *v).round() / 2.0),
            Self::Peaked => {
                for _ in 0..4 {
                    let at = rng.below(vocabulary);
                    values[at] += 18.0 + rng.unit();
                }
            }
            Self::Broken => {
                for v in &mut values {
                    match rng.below(10) {
                        0 => *v = f32::NAN,
                        1 => *v = f32::NEG_INFINITY,
                        _ => {}
                    }
                }
            }
            Self::Lost => {
                for v in &mut values {
                    *v = if rng.below(2) == 0 { f32::NAN } else { f32::NEG_INFINITY };
                }
            }
        }
        values
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SampleCase {
    pub(crate) vocabulary: usize,
    pub(crate) params: [f32; p::LEN],
    pub(crate) logits: Logits,
    /// Entries of the bias, some unused, some outside the vocabulary.
    pub(crate) bias: usize,
    pub(crate) forced: bool,
    pub(crate) draws: usize,
}

fn words(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The operands of `sample`, and the scenario's variable ones.
struct Sampler {
    op: Sample,
    forced: BufferId,
}

fn sampler(b: &mut Build, vocabulary: usize, bias: usize) -> Sampler {
    let mut state = |name: &str, dtype: DType, width: usize| {
        let bytes = vec![0; 4 * width];
        b.state(name, StateKind::Sampler, dtype, [1, width], bytes)
    };
    let logits = state("logits", DType::F32, vocabulary);
    let params = state("params", DType::F32, p::LEN);
    let seed = state("seed", DType::U32, 2);
    let counts = state("counts", DType::U32, vocabulary);
    let bias_tokens = state("bias_tokens", DType::I32, bias);
    let bias_values = state("bias_values", DType::F32, bias);
    let cursor = b.cursor(0);
    let forced = b.add("forced", Role::Input, DType::I32, 1, 1);
    // Every operation is rounded apart, so the numbers are defined to the bit.
    let adjusted =
        b.output("adjusted", DType::F32, [1, vocabulary], Reading::Last, Tolerance::Value);
    let token = b.output("token", DType::I32, [1, 1], Reading::Last, Tolerance::Bits);
    let op = Sample {
        logits,
        params,
        seed,
        bias_tokens,
        bias_values,
        cursor,
        forced: b.table.view(forced),
        counts,
        adjusted: b.table.view(adjusted),
        token: b.table.view(token),
    };
    Sampler { op, forced }
}

fn random_bias(rng: &mut Rng, vocabulary: usize, entries: usize) -> (Vec<u8>, Vec<u8>) {
    let tokens: Vec<u32> = (0..entries)
        .map(|i| match i % 4 {
            3 => u32::MAX, // -1: unused
            2 => (vocabulary + rng.below(99)) as u32,
            _ => rng.below(vocabulary) as u32,
        })
        .collect();
    let values: Vec<f32> = (0..entries).map(|_| 4.0 * rng.normal()).collect();
    (words(tokens), floats(&values))
}

impl Family for SampleCase {
    fn op(&self) -> &'static str {
        "sample"
    }

    fn detail(&self) -> String {
        let forced = if self.forced { ",forced" } else { "" };
        format!(
            "v={},{:?},t={},top_k={},top_p={},min_p={},rep={},pres={},freq={},bias={}{forced}",
            self.vocabulary,
            self.logits,
            self.params[p::TEMPERATURE],
            self.params[p::TOP_K],
            self.params[p::TOP_P],
            self.params[p::MIN_P],
            self.params[p::REPETITION],
            self.params[p::PRESENCE],
            self.params[p::FREQUENCY],
            self.bias
        )
    }

    fn build(&self, rng: Rng) -> Case {
        let mut b = Build::new(Tokens::All(1), rng);
        let Sampler { op, forced } = sampler(&mut b, self.vocabulary, self.bias.max(1));
        let key = ShapeKey { phase: Phase::Decode, tokens: 1, slots: 1, context: 1 << 20 };
        let advance = Advance { count: None, cursor: op.cursor.clone() };
        let plans = vec![
            b.reset_plan(),
            Plan { key, count: None, ops: vec![op.clone().into(), advance.into()] },
        ];
        let mut scenarios = Vec::new();
        for _ in 0..self.draws {
            let (token, position) = (b.rng.below(self.vocabulary), b.rng.below(1 << 20) as u32);
            let seed = [b.rng.word() as u32, b.rng.word() as u32];
            let (bias_tokens, bias_values) =
                random_bias(&mut b.rng, self.vocabulary, op.bias_tokens.width());
            let logits = self.logits.values(&mut b.rng, self.vocabulary);
            let mut contents = vec![
                (&op.logits, floats(&logits)),
                (&op.params, floats(&self.params)),
                (&op.seed, words(seed)),
                (&op.counts, random_counts(&mut b.rng, self.vocabulary)),
                (&op.cursor, words([position, 1, 2, 3])),
            ];
            if self.bias > 0 {
                contents.extend([(&op.bias_tokens, bias_tokens), (&op.bias_values, bias_values)]);
            } else {
                contents.push((&op.bias_tokens, words([u32::MAX])));
                contents.push((&op.bias_values, floats(&[1e9])));
            }
            let replay = Replay {
                plan: 1,
                inputs: vec![(
                    forced,
                    words([if self.forced { token as u32 } else { u32::MAX }]).into(),
                )],
                reads: vec![(op.token.buffer, 1), (op.adjusted.buffer, 1)],
            };
            let decided =
                self.forced || self.params[p::TEMPERATURE] == 0.0 || self.logits == Logits::Lost;
            let expect = if decided {
                Expect::Reference
            } else {
                let (token, adjusted) = (op.token.buffer, op.adjusted.buffer);
                Expect::Draw(DrawOf { params: self.params, seed, position, token, adjusted })
            };
            let state: Vec<(BufferId, Bytes)> =
                contents.into_iter().map(|(view, bytes)| (view.buffer, bytes.into())).collect();
            let scenario = Scenario {
                check: "reference",
                state,
                replays: vec![replay],
                expect,
                second_slot: false,
                poison: false,
            };
            scenarios.push(scenario);
        }
        again(&mut scenarios);
        b.into_case(plans, scenarios)
    }
}

/// The first scenario once more, and once more poisoned in the other slot.
fn again(scenarios: &mut Vec<Scenario>) {
    let expect = Expect::Same { scenario: 0, rows: None, states: States::All };
    let repeat = Scenario { check: "repeat", expect, ..scenarios[0].clone() };
    let poison = Scenario { check: "poison", second_slot: true, poison: true, ..repeat.clone() };
    scenarios.extend([repeat, poison]);
}

/// A decode step that feeds the token it drew: `sample`, `embed`, `rms_norm`, `linear` into the logits, `observe`.
/// Several steps, each from what the last left; forced, so that all backends read the same tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeCase {
    pub(crate) vocabulary: usize,
    pub(crate) weight: DType,
    pub(crate) steps: usize,
}

impl Family for DecodeCase {
    fn op(&self) -> &'static str {
        "decode"
    }

    fn detail(&self) -> String {
        format!("v={},w={},steps={}", self.vocabulary, self.weight, self.steps)
    }

    fn build(&self, rng: Rng) -> Case {
        const WIDTH: usize = 64;
        let mut b = Build::new(Tokens::All(1), rng);
        let shape = [self.vocabulary, WIDTH];
        let table = b.weight("embedding", self.weight, shape, Values::Normal(1.0));
        let head = b.weight("head", self.weight, shape, Values::Normal(0.4));
        let norm = b.vector("norm", WIDTH, Values::Uniform(0.5, 1.5));
        let Sampler { op, forced } = sampler(&mut b, self.vocabulary, 2);
        let hidden = b.scratch("hidden", DType::F32, WIDTH).at(1);
        let normed = b.scratch("normed", DType::F32, WIDTH).at(1);
        b.set_tolerance(&op.logits, Tolerance::Relative(1.0));
        b.set_tolerance(&op.adjusted, Tolerance::Relative(1.0));
        let ops: Vec<Op> = vec![
            op.clone().into(),
            Embed { table, tokens: op.token.clone(), out: hidden.clone() }.into(),
            RmsNorm { x: hidden, weight: norm, out: normed.clone(), eps: 1e-6, centered: false }
                .into(),
            Linear { x: normed, weight: head, bias: None, out: op.logits.clone() }.into(),
            Observe { tokens: op.token.clone(), count: None, counts: op.counts.clone() }.into(),
            Advance { count: None, cursor: op.cursor.clone() }.into(),
        ];
        let key = ShapeKey { phase: Phase::Decode, tokens: 1, slots: 1, context: 4096 };
        let plans = vec![b.reset_plan(), Plan { key, count: None, ops }];
        let params = [0.8, 20.0, 0.95, 0.01, 1.1, 0.2, 0.1, 0.0];
        let put =
            |view: &View, bytes: Vec<u8>| -> (BufferId, Bytes) { (view.buffer, bytes.into()) };
        let logits = random_bytes(&mut b.rng, DType::F32, self.vocabulary, Values::Normal(3.0));
        let changed = [
            put(&op.logits, logits),
            put(&op.params, floats(&params)),
            put(&op.bias_tokens, words([5, u32::MAX])),
            put(&op.bias_values, floats(&[1.5, f32::NAN])),
            put(&op.counts, random_counts(&mut b.rng, self.vocabulary)),
        ];
        let mut state = b.initial_state();
        for (id, bytes) in changed {
            state.iter_mut().filter(|(s, _)| *s == id).for_each(|s| s.1 = bytes.clone());
        }
        let replays = (0..self.steps).map(|_| Replay {
            plan: 1,
            inputs: vec![(forced, words([b.rng.below(self.vocabulary) as u32]).into())],
            reads: vec![(op.token.buffer, 1), (op.adjusted.buffer, 1)],
        });
        let mut scenarios = vec![Scenario {
            check: "reference",
            state,
            replays: replays.collect(),
            expect: Expect::Reference,
            second_slot: false,
            poison: false,
        }];
        again(&mut scenarios);
        b.into_case(plans, scenarios)
    }
}

/// Whether another exponential function could have taken `token` where the reference took another: its noisy score
/// is within `1e-4` of the best one, among the tokens that filters a millionth wider or narrower keep.
pub(crate) fn near_tie(draw: &DrawOf, adjusted: &[u8], token: &[u8]) -> bool {
    let scores: Vec<f32> =
        adjusted.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let token = i32::from_le_bytes([token[0], token[1], token[2], token[3]]);
    let Some(token) = usize::try_from(token).ok().filter(|&t| t < scores.len()) else {
        return false;
    };
    let noisy: Vec<f64> = scores
        .iter()
        .enumerate()
        .map(|(i, &a)| {
            let words = philox4x32([(i / 4) as u32, draw.position, 0, 0], draw.seed);
            let uniform = ((words[i % 4] as f32 + 0.5) * (1.0 / 4_294_967_296.0))
                .min(1.0 - 1.0 / 16_777_216.0);
            f64::from(a) - (-(-f64::from(uniform)).ln_1p()).ln()
        })
        .collect();
    [-1e-6, 0.0, 1e-6].into_iter().any(|slack| {
        let kept = kept(&scores, &draw.params, slack);
        let best = (0..scores.len())
            .filter(|&i| kept(f64::from(scores[i])))
            .map(|i| noisy[i])
            .fold(f64::NEG_INFINITY, f64::max);
        kept(f64::from(scores[token])) && best - noisy[token] <= 1e-4 * best.abs().max(1.0)
    })
}

/// The filters in float64, with top-p and min-p moved by a relative `slack`.
fn kept(scores: &[f32], params: &[f32; p::LEN], slack: f64) -> impl Fn(f64) -> bool + use<> {
    let mut sorted: Vec<f64> = scores.iter().map(|&a| f64::from(a)).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let highest = sorted[0];
    let mut threshold = f64::NEG_INFINITY;
    let top_k = params[p::TOP_K] as usize;
    if top_k > 0 && top_k < sorted.len() {
        threshold = sorted[top_k - 1];
        sorted.retain(|v| *v >= threshold);
    }
    if params[p::TOP_P] < 1.0 {
        let total: f64 = sorted.iter().map(|v| (v - highest).exp()).sum();
        let wanted = f64::from(params[p::TOP_P].max(0.0)) * (1.0 + slack) * total;
        let mut sum = 0.0;
        for v in &sorted {
            sum += (v - highest).exp();
            threshold = *v;
            if sum >= wanted {
                break;
            }
        }
    }
    let min_p = f64::from(params[p::MIN_P]) * (1.0 + 10.0 * slack);
    move |v| v >= threshold && (min_p <= 0.0 || (v - highest).exp() >= min_p)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noisy scores of eight equal logits.
    fn scores(position: u32) -> Vec<f64> {
        let noise = |i: usize| {
            let words = philox4x32([(i / 4) as u32, position, 0, 0], [1, 2]);
            let uniform = (f64::from(words[i % 4] as f32) + 0.5) / 4_294_967_296.0;
            -(-(-uniform.min(1.0 - 1.0 / 16_777_216.0)).ln_1p()).ln()
        };
        (0..8).map(noise).collect()
    }

    #[test]
    fn only_near_ties_are_near_ties() {
        let (params, table) = ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], BufferId(0));
        let (mut near, mut far) = (0, 0);
        for position in 0..20_000 {
            let scores = scores(position);
            let mut order: Vec<usize> = (0..8).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let gap = (scores[order[0]] - scores[order[1]]) / scores[order[0]].abs().max(1.0);
            let draw = DrawOf { params, seed: [1, 2], position, token: table, adjusted: table };
            let second = words([order[1] as u32]);
            let tie = near_tie(&draw, &[0; 32], &second);
            assert!(near_tie(&draw, &[0; 32], &words([order[0] as u32])));
            assert!(
                !near_tie(&draw, &[0; 32], &words([8]))
                    && !near_tie(&draw, &[0; 32], &words([u32::MAX]))
            );
            match gap {
                g if g < 0.9e-4 => near += usize::from(tie),
                g if g > 1.1e-4 => far += usize::from(tie),
                _ => {}
            }
        }
        assert!(near > 0, "some gap among so many is small");
        assert_eq!(far, 0);
    }

    #[test]
    fn a_token_that_the_filters_drop_is_no_near_tie() {
        let params = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        let (token, adjusted) = (BufferId(0), floats(&[1.0, 2.0, 1.999]));
        for position in 0..100 {
            let draw = DrawOf { params, seed: [1, 2], position, token, adjusted: token };
            assert!(near_tie(&draw, &adjusted, &words([1])));
            assert!(!near_tie(&draw, &adjusted, &words([2])));
        }
    }
}
