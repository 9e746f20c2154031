//! The sampler of `docs/sampling.md`: the same tokens as the reference, without sorting the vocabulary.
//!
//! What could round otherwise elsewhere (`exp`, `ln`, `ln_1p`) is the standard library's, as in the reference. Tokens
//! are skipped only where a bound proves that they cannot win.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ampoule_plan::{SEEN_AS_PROMPT, sampler_params as p};

use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd, Verified, dispatch, exp};

/// Tokens of one task; a multiple of 4, so that no block of random words is cut.
const CHUNK: usize = 16_384;

/// No Gumbel noise is higher: `-ln(-ln_1p(-2^-33))` is 22.88.
const MOST_NOISE: f32 = 22.9;

/// Below this distance from the highest logit a token's mass, `floor(exp(distance) * 2^32)`, is zero.
const NO_MASS: f32 = -23.0;

/// What a draw looks at.
#[allow(clippy::struct_field_names)] // whether to draw
pub(crate) struct Draw<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) counts: &'a [u32],
    pub(crate) params: &'a [f32],
    pub(crate) seed: [u32; 2],
    pub(crate) bias_tokens: &'a [i32],
    pub(crate) bias_values: &'a [f32],
    pub(crate) position: u32,
    /// Whether to draw; else only `adjusted` is written.
    pub(crate) draw: bool,
    /// As long as `logits`.
    pub(crate) adjusted: &'a mut [f32],
}

/// Scratch of the sampler.
pub(crate) struct Sampler {
    /// Values to choose thresholds among; as many as the vocabulary has tokens.
    values: Vec<f32>,
    /// What tasks found.
    found: Vec<AtomicU64>,
}

/// A token and its value, the better the higher, of equals the lower token.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Best {
    value: f32,
    token: usize,
}

impl Best {
    const NONE: Self = Self { value: f32::NEG_INFINITY, token: usize::MAX };

    #[inline(always)]
    fn offer(&mut self, value: f32, token: usize) {
        if value > self.value || value == self.value && token < self.token {
            *self = Self { value, token };
        }
    }

    fn pack(self) -> u64 {
        u64::from(self.value.to_bits()) << 32 | u64::from(self.token as u32)
    }

    fn unpack(bits: u64) -> Self {
        let token = bits as u32;
        let token = if token == u32::MAX { usize::MAX } else { token as usize };
        Self { value: f32::from_bits((bits >> 32) as u32), token }
    }
}

/// Which values are kept.
#[derive(Clone, Copy)]
struct Filter {
    threshold: f32,
    highest: f32,
    min_p: f32,
}

impl Filter {
    #[inline(always)]
    fn keeps(&self, v: f32) -> bool {
        v >= self.threshold && (self.min_p <= 0.0 || (v - self.highest).exp() >= self.min_p)
    }
}

impl Sampler {
    /// Scratch for a vocabulary of so many tokens; `None` where memory is short.
    pub(crate) fn new(vocabulary: usize) -> Option<Self> {
        let mut values = Vec::new();
        values.try_reserve_exact(vocabulary).ok()?;
        let found = (0..vocabulary.div_ceil(CHUNK)).map(|_| AtomicU64::new(0)).collect();
        Some(Self { values, found })
    }

    /// Draws a token; the caller counts it.
    pub(crate) fn sample(&mut self, pool: &mut Pool, isa: Verified, draw: Draw<'_>) -> usize {
        let Draw { logits, counts, params, seed, position, adjusted, .. } = draw;
        let penalty = Penalty::new(params);
        let values = Shared(adjusted.as_mut_ptr());
        let best = self.best(pool, logits.len(), |tokens| {
            let out = values.slice(&tokens);
            let (logits, counts) = (&logits[tokens.clone()], &counts[tokens.clone()]);
            let kernel = Penalize { penalty, logits, counts, out, first: tokens.start };
            // SAFETY: `Penalize` asks for nothing.
            unsafe { dispatch(isa, kernel) }
        });
        let biased = Self::apply_bias(draw.bias_tokens, draw.bias_values, adjusted);
        let best = if biased { self.highest(pool, isa, adjusted) } else { best };
        let temperature = params[p::TEMPERATURE];
        if temperature == 0.0 || best.value == f32::NEG_INFINITY {
            return if best.value == f32::NEG_INFINITY { 0 } else { best.token };
        }
        let values = Shared(adjusted.as_mut_ptr());
        let best = self.best(pool, logits.len(), |tokens| {
            let kernel = Divide { temperature, values: values.slice(&tokens), first: tokens.start };
            // SAFETY: `Divide` asks for nothing.
            unsafe { dispatch(isa, kernel) }
        });
        if !draw.draw {
            return 0;
        }
        let adjusted = &*adjusted;
        let filter = Filter {
            threshold: self.threshold(pool, isa, adjusted, params, best.value),
            highest: best.value,
            min_p: params[p::MIN_P],
        };
        // The likeliest token's value is a bound that spares most of the others their noise.
        let mut start = Best::NONE;
        if best.token < adjusted.len() && filter.keeps(best.value) {
            let words = philox4x32([(best.token / 4) as u32, position, 0, 0], seed);
            start.offer(best.value + gumbel(words[best.token % 4]), best.token);
        }
        let drawn = self.best(pool, adjusted.len(), |tokens| {
            let kernel = Noisy { adjusted, tokens, filter, seed, position, best: start };
            // SAFETY: `Noisy` asks for nothing.
            unsafe { dispatch(isa, kernel) }
        });
        if drawn.token < adjusted.len() { drawn.token } else { 0 }
    }

    /// Adds the bias; returns whether there was any.
    fn apply_bias(tokens: &[i32], values: &[f32], adjusted: &mut [f32]) -> bool {
        let mut any = false;
        for (&token, &value) in tokens.iter().zip(values) {
            if let Some(l) = usize::try_from(token).ok().and_then(|t| adjusted.get_mut(t)) {
                *l += value;
                any = true;
            }
        }
        for &token in tokens {
            if let Some(l) = usize::try_from(token).ok().and_then(|t| adjusted.get_mut(t))
                && l.is_nan()
            {
                *l = f32::NEG_INFINITY;
            }
        }
        any
    }

    /// The best that `find` finds in any range of tokens.
    fn best(
        &self,
        pool: &mut Pool,
        vocabulary: usize,
        find: impl Fn(Range<usize>) -> Best + Sync,
    ) -> Best {
        let found = &self.found[..vocabulary.div_ceil(CHUNK)];
        pool.run(found.len(), &|_, chunk| {
            let tokens = chunk * CHUNK..((chunk + 1) * CHUNK).min(vocabulary);
            found[chunk].store(find(tokens).pack(), Ordering::Relaxed);
        });
        let mut best = Best::NONE;
        for one in found {
            let one = Best::unpack(one.load(Ordering::Relaxed));
            best.offer(one.value, one.token);
        }
        best
    }

    fn highest(&self, pool: &mut Pool, isa: Verified, values: &[f32]) -> Best {
        self.best(pool, values.len(), |tokens| {
            let kernel = Highest { values: &values[tokens.clone()], first: tokens.start };
            // SAFETY: `Highest` asks for nothing.
            unsafe { dispatch(isa, kernel) }
        })
    }

    /// The lowest value that top-k and top-p keep.
    fn threshold(
        &mut self,
        pool: &mut Pool,
        isa: Verified,
        adjusted: &[f32],
        params: &[f32],
        highest: f32,
    ) -> f32 {
        let mut threshold = f32::NEG_INFINITY;
        let top_k = params[p::TOP_K] as usize;
        if top_k > 0 && top_k < adjusted.len() {
            threshold = self.kth(isa, adjusted, top_k);
        }
        if params[p::TOP_P] < 1.0 {
            let share = (params[p::TOP_P].max(0.0) * 16_777_216.0) as u128;
            if threshold > f32::NEG_INFINITY {
                return self.short_nucleus(isa, adjusted, threshold, highest, share);
            }
            threshold = self.nucleus(pool, isa, adjusted, highest, share);
        }
        threshold
    }

    /// The `k`-th highest value.
    fn kth(&mut self, isa: Verified, adjusted: &[f32], k: usize) -> f32 {
        let room = (2 * k).max(1024).min(adjusted.len());
        let kernel = Leaders { adjusted, k, room, found: &mut self.values };
        // SAFETY: `Leaders` asks for nothing.
        unsafe { dispatch(isa, kernel) };
        *self.values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    }

    /// Of the values from `floor` on, in falling order, the first at which the sum of masses reaches
    /// `share * 2^-24` of all of them; for few values.
    fn short_nucleus(
        &mut self,
        isa: Verified,
        adjusted: &[f32],
        floor: f32,
        highest: f32,
        share: u128,
    ) -> f32 {
        self.values.clear();
        let kernel =
            Band { values: adjusted, below: floor, above: f32::INFINITY, found: &mut self.values };
        // SAFETY: `Band` asks for nothing.
        unsafe { dispatch(isa, kernel) };
        self.values.sort_unstable_by(|a, b| b.total_cmp(a));
        let total: u128 = self.values.iter().map(|v| u128::from(mass(*v, highest))).sum();
        let mut sum = 0;
        for &v in &self.values {
            sum += u128::from(mass(v, highest));
            if (sum << 24) >= share * total {
                return v;
            }
        }
        floor
    }

    /// Of all values, in falling order, the first at which the sum of masses reaches `share * 2^-24` of all.
    fn nucleus(
        &mut self,
        pool: &mut Pool,
        isa: Verified,
        adjusted: &[f32],
        highest: f32,
        share: u128,
    ) -> f32 {
        let found = &self.found[..adjusted.len().div_ceil(CHUNK)];
        let chunk = |i: usize| &adjusted[i * CHUNK..((i + 1) * CHUNK).min(adjusted.len())];
        pool.run(found.len(), &|_, i| {
            let kernel = About { values: chunk(i), highest };
            // SAFETY: `About` asks for nothing.
            let about = unsafe { dispatch(isa, kernel) };
            found[i].store(f64::from(about).to_bits(), Ordering::Relaxed);
        });
        let about: f64 = found.iter().map(|f| f64::from_bits(f.load(Ordering::Relaxed))).sum();
        // A lane adds 1024 values at most, each within a few units in the last place: 1e-4 is more than all of that;
        // and every mass is rounded down.
        let about = about * 4_294_967_296.0;
        let slack = about * 1e-4 + adjusted.len() as f64;
        let bounds = ((about - slack).max(0.0) as u128, (about + slack) as u128);
        if about.is_finite()
            && let Some(value) = self.reach(isa, adjusted, highest, share, bounds)
        {
            return value;
        }
        // Too close to call. Integers: their sum depends on no order; a chunk's is below 2^14 * 2^33.
        let found = &self.found[..adjusted.len().div_ceil(CHUNK)];
        pool.run(found.len(), &|_, i| {
            let masses = chunk(i).iter().map(|v| mass(*v, highest));
            found[i].store(masses.sum(), Ordering::Relaxed);
        });
        let total = found.iter().map(|f| u128::from(f.load(Ordering::Relaxed))).sum();
        self.reach(isa, adjusted, highest, share, (total, total)).unwrap_or(highest)
    }

    /// As [`Self::nucleus`], given bounds of the total; `None` where they do not settle it.
    fn reach(
        &mut self,
        isa: Verified,
        adjusted: &[f32],
        highest: f32,
        share: u128,
        (least, most): (u128, u128),
    ) -> Option<f32> {
        let mut sum = 0_u128;
        let mut lowest = None;
        let mut above = f32::INFINITY;
        for width in [1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, f32::INFINITY] {
            // The next band of values, without the last one's.
            let below = highest - width;
            self.values.clear();
            let kernel = Band { values: adjusted, below, above, found: &mut self.values };
            // SAFETY: `Band` asks for nothing.
            unsafe { dispatch(isa, kernel) };
            above = below;
            self.values.sort_unstable_by(|a, b| b.total_cmp(a));
            for &v in &self.values {
                sum += u128::from(mass(v, highest));
                lowest = Some(v);
                if (sum << 24) >= share * most {
                    return lowest;
                }
                if (sum << 24) >= share * least {
                    return None;
                }
            }
        }
        if least == most { lowest } else { None }
    }
}

/// A value's share of the probability, in units of 2^-32 of the highest's.
fn mass(v: f32, highest: f32) -> u64 {
    if v - highest < NO_MASS { 0 } else { ((v - highest).exp() * 4_294_967_296.0) as u64 }
}

/// The sum of `exp(v - highest)`, about.
struct About<'a> {
    values: &'a [f32],
    highest: f32,
}

impl Kernel for About<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = s.zero();
        for part in self.values.chunks(LANES) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            lanes[..part.len()].copy_from_slice(part);
            let distance = s.sub(s.from_lanes(&lanes), s.splat(self.highest));
            sum = s.add(sum, exp(s, distance));
        }
        s.sum(sum)
    }
}

/// Whether the value is in `below..above`; infinity as a bound holds infinity too.
#[inline(always)]
#[allow(clippy::needless_bitwise_bool)] // no branches: a vector of these is compared at once
fn is_between(v: f32, below: f32, above: f32) -> bool {
    (v >= below) & ((v < above) | (above == f32::INFINITY))
}

/// Whether any of the values is.
#[inline(always)]
fn any_between(part: &[f32], below: f32, above: f32) -> bool {
    let mut any = 0;
    for v in part {
        any |= u32::from(is_between(*v, below, above));
    }
    any != 0
}

/// Values in `below..above`.
struct Band<'a> {
    values: &'a [f32],
    below: f32,
    above: f32,
    found: &'a mut Vec<f32>,
}

impl Kernel for Band<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, _: S) {
        let above = self.above;
        for part in self.values.chunks(64) {
            if any_between(part, self.below, above) {
                self.found.extend(part.iter().filter(|v| is_between(**v, self.below, above)));
            }
        }
    }
}

/// At least the `k` highest values; never more than `room`.
struct Leaders<'a> {
    adjusted: &'a [f32],
    k: usize,
    room: usize,
    found: &'a mut Vec<f32>,
}

impl Kernel for Leaders<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, _: S) {
        let Self { adjusted, k, room, found } = self;
        found.clear();
        let mut bound = f32::NEG_INFINITY;
        for part in adjusted.chunks(64) {
            if found.len() >= k {
                let mut any = 0;
                for v in part {
                    any |= u32::from(*v > bound);
                }
                if any == 0 {
                    continue;
                }
            }
            for &v in part {
                if found.len() >= k && v <= bound {
                    continue;
                }
                if found.len() == room {
                    found.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
                    found.truncate(k);
                    bound = found[k - 1];
                    if v <= bound {
                        continue;
                    }
                }
                found.push(v);
            }
        }
    }
}

/// The kept token with the highest value after noise, among some tokens; or `best`, if that is better.
struct Noisy<'a> {
    adjusted: &'a [f32],
    tokens: Range<usize>,
    filter: Filter,
    seed: [u32; 2],
    position: u32,
    best: Best,
}

/// Tokens that get their random words together.
const TOGETHER: usize = 4 * LANES;

impl Kernel for Noisy<'_> {
    type Output = Best;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, _: S) -> Best {
        let mut best = self.best;
        for first in self.tokens.clone().step_by(TOGETHER) {
            let part = &self.adjusted[first..(first + TOGETHER).min(self.tokens.end)];
            // Without noise above what there is, a value below this cannot win; `v + noise` rounds monotonically.
            let mut hopeful = 0;
            for v in part {
                hopeful |= u32::from(*v >= self.filter.threshold)
                    & u32::from(*v + MOST_NOISE >= best.value);
            }
            if hopeful == 0 {
                continue;
            }
            let words = words_from((first / 4) as u32, self.position, self.seed);
            let mut values = [f32::NEG_INFINITY; TOGETHER];
            values[..part.len()].copy_from_slice(part);
            let mut hopeful = 0;
            for (v, word) in values.iter().zip(&words) {
                hopeful |= u32::from(*v >= self.filter.threshold)
                    & u32::from(*v + noise_bound(*word) >= best.value);
            }
            if hopeful == 0 {
                continue;
            }
            for (i, &v) in part.iter().enumerate() {
                if v + noise_bound(words[i]) >= best.value && self.filter.keeps(v) {
                    best.offer(v + gumbel(words[i]), first + i);
                }
            }
        }
        best
    }
}

/// No less than the noise that [`gumbel`] makes of the bits.
///
/// `-ln(-ln(1 - u)) <= -ln(u)`, and `u` is at least the power of two below `bits * 2^-32`. Rounding `bits` to f32 may
/// reach the next power; that, and what the logarithms round, is far below the last term.
#[inline(always)]
fn noise_bound(bits: u32) -> f32 {
    let exponent = (bits as f32).to_bits() >> 23;
    (159 - exponent.cast_signed()) as f32 * std::f32::consts::LN_2 + 1e-3
}

/// The words of [`TOGETHER`] tokens: those of [`philox4x32`] from block `first` on.
#[inline(always)]
fn words_from(first: u32, position: u32, seed: [u32; 2]) -> [u32; TOGETHER] {
    let mut c: [[u32; LANES]; 4] = [[0; LANES], [position; LANES], [0; LANES], [0; LANES]];
    for l in 0..LANES {
        c[0][l] = first.wrapping_add(l as u32);
    }
    let mut key = seed;
    for _ in 0..10 {
        for l in 0..LANES {
            let a = u64::from(c[0][l]) * 0xD251_1F53;
            let b = u64::from(c[2][l]) * 0xCD9E_8D57;
            c[0][l] = (b >> 32) as u32 ^ c[1][l] ^ key[0];
            c[2][l] = (a >> 32) as u32 ^ c[3][l] ^ key[1];
            c[1][l] = b as u32;
            c[3][l] = a as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    let mut words = [0; TOGETHER];
    for l in 0..LANES {
        for i in 0..4 {
            words[4 * l + i] = c[i][l];
        }
    }
    words
}

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
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

/// Gumbel noise from 32 random bits.
fn gumbel(bits: u32) -> f32 {
    let uniform = ((bits as f32 + 0.5) * (1.0 / 4_294_967_296.0)).min(1.0 - 1.0 / 16_777_216.0);
    -(-(-uniform).ln_1p()).ln()
}

/// Values that tasks write, each its own range.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: tasks take ranges that do not meet.
unsafe impl Sync for Shared {}

impl Shared {
    #[allow(clippy::mut_from_ref)] // every task takes another range, once
    fn slice(&self, tokens: &Range<usize>) -> &mut [f32] {
        // SAFETY: the ranges of `Sampler::best` lie in the vocabulary and do not meet.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(tokens.start), tokens.len()) }
    }
}

#[derive(Clone, Copy)]
struct Penalty {
    repetition: f32,
    presence: f32,
    frequency: f32,
    any: bool,
}

impl Penalty {
    fn new(params: &[f32]) -> Self {
        let [repetition, presence, frequency] =
            [params[p::REPETITION], params[p::PRESENCE], params[p::FREQUENCY]];
        let any = repetition != 1.0 || presence != 0.0 || frequency != 0.0;
        Self { repetition, presence, frequency, any }
    }

    #[inline(always)]
    fn apply(&self, mut l: f32, count: u32) -> f32 {
        if count != 0 && self.repetition != 1.0 {
            l = if l > 0.0 { l / self.repetition } else { l * self.repetition };
        }
        let generated = count & !SEEN_AS_PROMPT;
        if generated > 0 {
            l -= self.frequency * generated as f32 + self.presence;
        }
        l
    }
}

/// Penalties; a NaN becomes negative infinity. Finds the highest.
struct Penalize<'a> {
    penalty: Penalty,
    logits: &'a [f32],
    counts: &'a [u32],
    out: &'a mut [f32],
    first: usize,
}

impl Kernel for Penalize<'_> {
    type Output = Best;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Best {
        let lowest = s.splat(f32::NEG_INFINITY);
        let len = self.logits.len();
        let mut i = 0;
        while i < len {
            let n = (len - i).min(LANES);
            let (from, to) = (&self.logits[i..i + n], &mut self.out[i..i + n]);
            // SAFETY: the slices have `n` elements.
            unsafe {
                let mut l =
                    if n == LANES { s.load(from.as_ptr()) } else { s.load_n(from.as_ptr(), n) };
                if self.penalty.any {
                    let counts = &self.counts[i..i + n];
                    let mut any = 0;
                    for count in counts {
                        any |= *count;
                    }
                    if any != 0 {
                        let mut lanes = s.lanes(l);
                        for (l, count) in lanes.iter_mut().zip(counts) {
                            *l = self.penalty.apply(*l, *count);
                        }
                        l = s.from_lanes(&lanes);
                    }
                }
                // The second operand where either is a NaN.
                s.store_n(to.as_mut_ptr(), s.max(l, lowest), n);
            }
            i += LANES;
        }
        // SAFETY: `Highest` asks for nothing.
        unsafe { Highest { values: self.out, first: self.first }.run(s) }
    }
}

/// Divides by the temperature. Finds the highest.
struct Divide<'a> {
    temperature: f32,
    values: &'a mut [f32],
    first: usize,
}

impl Kernel for Divide<'_> {
    type Output = Best;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Best {
        for v in self.values.iter_mut() {
            *v /= self.temperature;
        }
        // SAFETY: `Highest` asks for nothing.
        unsafe { Highest { values: self.values, first: self.first }.run(s) }
    }
}

/// The first of the highest values.
struct Highest<'a> {
    values: &'a [f32],
    first: usize,
}

impl Kernel for Highest<'_> {
    type Output = Best;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Best {
        let mut highest = s.splat(f32::NEG_INFINITY);
        let whole = self.values.len() / LANES * LANES;
        let mut i = 0;
        while i < whole {
            // SAFETY: 16 elements from `i` on are inside the slice.
            highest = unsafe { s.max(s.load(self.values.as_ptr().add(i)), highest) };
            i += LANES;
        }
        let mut value = s.highest(highest);
        for &v in &self.values[whole..] {
            if v > value {
                value = v;
            }
        }
        match self.values.iter().position(|v| *v == value) {
            Some(at) => Best { value, token: self.first + at },
            None => Best::NONE,
        }
    }
}

#[cfg(test)]
mod tests;
