//! Sixteen float32 lanes, three times: AVX-512, AVX2 with FMA, and portable Rust. All give the same bits.
//!
//! Every operation here is a correctly rounded IEEE-754 operation, or a fixed sequence of them, so the instruction
//! path changes how fast a kernel is and nothing else. A value of a [`Simd`] type is the proof that the CPU has
//! the instructions: [`dispatch`] is the only place that makes one.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod portable;

use std::fmt;
use std::str::FromStr;

pub(crate) use math::{exp, sigmoid, silu};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of `f32`, and what the kernels do with them.
///
/// The methods that take pointers read or write [`LANES`] elements unless they say otherwise, at any alignment.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen lanes.
    type V: Copy;

    /// Whether 24 accumulators stay in registers.
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`, lane by lane.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`, lane by lane.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `y * 2^n`, where `t = 1.5 * 2^23 + n` holds the integer `n` of `-252..=254`; rounded once, unless `y` is
    /// below 1/2 or above 4.
    fn scale_by_power(self, y: Self::V, t: Self::V) -> Self::V;

    /// The sum of the lanes: `l` and `l + 8` first, then `l` and `l + 4`, `l + 2`, `l + 1`.
    fn sum(self, a: Self::V) -> f32 {
        let mut lanes = self.lanes(a);
        for half in [8, 4, 2, 1] {
            for l in 0..half {
                lanes[l] += lanes[l + half];
            }
        }
        lanes[0]
    }

    /// Lane `i` is the sum of the lanes of `a[i]`, as [`Self::sum`] has it.
    fn sum16(self, a: &[Self::V; LANES]) -> Self::V {
        let mut sums = [0.0; LANES];
        for i in 0..LANES {
            sums[i] = self.sum(a[i]);
        }
        self.from_lanes(&sums)
    }

    /// # Safety
    /// `p` must be readable.
    unsafe fn load(self, p: *const f32) -> Self::V;

    /// # Safety
    /// `p` must be writable.
    unsafe fn store(self, p: *mut f32, a: Self::V);

    /// Sixteen half-precision numbers.
    ///
    /// # Safety
    /// `p` must be readable.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;

    /// Rounds to nearest even.
    ///
    /// # Safety
    /// `p` must be writable.
    unsafe fn store_f16(self, p: *mut u16, a: Self::V);

    /// Sixteen bfloat16 numbers.
    ///
    /// # Safety
    /// `p` must be readable.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;

    /// Rounds to nearest even.
    ///
    /// # Safety
    /// `p` must be writable.
    unsafe fn store_bf16(self, p: *mut u16, a: Self::V);

    /// Converts four half-precision numbers.
    ///
    /// # Safety
    /// `p` must hold 8 readable bytes.
    unsafe fn widen4(self, p: *const u8, out: &mut [f32; 4]);

    /// `d * q` for 16 signed bytes.
    ///
    /// # Safety
    /// `p` must hold 16 readable bytes.
    unsafe fn decode8(self, p: *const u8, d: f32) -> Self::V;

    /// `d * (q - 8)` for the low and the high nibbles of 16 bytes.
    ///
    /// # Safety
    /// `p` must hold 16 readable bytes.
    unsafe fn decode4_0(self, p: *const u8, d: f32) -> (Self::V, Self::V);

    /// `d * q + m` for the low and the high nibbles of 16 bytes. Rounded twice or once is the same where `d` was
    /// a half-precision number: its product with `q` has at most 15 significant bits.
    ///
    /// # Safety
    /// `p` must hold 16 readable bytes.
    unsafe fn decode4_1(self, p: *const u8, d: f32, m: f32) -> (Self::V, Self::V);

    /// Transposes a 16 by 16 tile: row `i` of the result is lane `i` of every row.
    fn transpose(self, rows: &mut [Self::V; LANES]) {
        let from = rows.map(|r| self.lanes(r));
        for i in 0..LANES {
            let mut lanes = [0.0; LANES];
            for j in 0..LANES {
                lanes[j] = from[j][i];
            }
            rows[i] = self.from_lanes(&lanes);
        }
    }

    /// Asks for the cache line at `p`, which need not be readable.
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn lanes(self, a: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has 16 elements.
        unsafe { self.store(lanes.as_mut_ptr(), a) };
        lanes
    }

    #[inline(always)]
    #[allow(clippy::wrong_self_convention)] // self is the proof of the instructions
    fn from_lanes(self, lanes: &[f32; LANES]) -> Self::V {
        // SAFETY: the array has 16 elements.
        unsafe { self.load(lanes.as_ptr()) }
    }

    /// The highest lane.
    #[inline(always)]
    fn highest(self, a: Self::V) -> f32 {
        self.lanes(a).into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    /// The first `n <= 16` elements, then zeros.
    ///
    /// # Safety
    /// `p` must be readable for `n` elements.
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0; LANES];
        // SAFETY: the caller's promise; `n` elements fit the array.
        unsafe { std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n.min(LANES)) };
        self.from_lanes(&lanes)
    }

    /// Stores the first `n <= 16` lanes.
    ///
    /// # Safety
    /// `p` must be writable for `n` elements.
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, a: Self::V, n: usize) {
        let lanes = self.lanes(a);
        // SAFETY: the caller's promise; the array has at least `n` elements.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n.min(LANES)) };
    }
}

/// An instruction path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

impl Isa {
    /// Every path, slowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The name that `AMPOULE_CPU_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has it.
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The path that `AMPOULE_CPU_ISA` names, if the CPU has it; else the fastest there is.
    pub fn detect() -> Self {
        let forced = std::env::var("AMPOULE_CPU_ISA").ok().and_then(|name| name.parse().ok());
        let fastest = || Self::ALL.into_iter().rev().find(|isa| isa.available());
        forced.filter(|isa: &Self| isa.available()).or_else(fastest).unwrap_or(Self::Portable)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|isa| isa.name() == text).ok_or(())
    }
}

/// An instruction path that this CPU has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verified(Isa);

impl Verified {
    /// The path itself where the CPU has it, else the portable one.
    pub(crate) fn new(isa: Isa) -> Self {
        Self(if isa.available() { isa } else { Isa::Portable })
    }

    pub(crate) fn isa(self) -> Isa {
        self.0
    }
}

/// Work that any instruction path can do. `run` must be `#[inline(always)]`, and so must be what it calls in its
/// inner loops, to be compiled with the path's instructions.
pub(crate) trait Kernel {
    type Output;

    /// # Safety
    /// As the kernel's own documentation says.
    unsafe fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs a kernel on the given path.
///
/// # Safety
/// As [`Kernel::run`].
#[inline]
pub(crate) unsafe fn dispatch<K: Kernel>(isa: Verified, kernel: K) -> K::Output {
    match isa.0 {
        // SAFETY: `Verified` says the CPU has the features; the rest is the caller's promise.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::run(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        // SAFETY: the caller's promise.
        _ => unsafe { kernel.run(portable::Portable) },
    }
}

#[cfg(test)]
mod tests;
