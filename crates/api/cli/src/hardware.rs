//! What this machine is, and how fast its memory is.

use std::hint::black_box;
use std::time::Instant;

use serde::Serialize;

use crate::output::Progress;

/// What figures were measured on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Hardware {
    /// The CPU's model name, as the system gives it.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Architecture.
    pub arch: &'static str,
    /// Operating system.
    pub os: &'static str,
}

impl Hardware {
    pub(crate) fn here() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = field(&cpuinfo, "model name").or_else(|| field(&cpuinfo, "Model"));
        Self {
            cpu: name.unwrap_or_else(|| "unknown".to_owned()),
            cores: cores(),
            memory_bytes: memory("MemTotal"),
            arch: std::env::consts::ARCH,
            os: std::env::consts::OS,
        }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The version of NVIDIA's kernel driver, where there is one.
pub(crate) fn nvidia_driver() -> Option<String> {
    driver_version(&std::fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

/// The first word of numbers between dots: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release Build`.
fn driver_version(text: &str) -> Option<String> {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let mut words = text.split_whitespace();
    words.find(|word| word.contains('.') && word.split('.').all(number)).map(str::to_owned)
}

/// A field of /proc/meminfo, in bytes.
pub(crate) fn memory(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 = field(&text, name)?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Instruction sets that kernels care about, and whether this CPU has them.
pub(crate) fn cpu_features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($detect:ident: $($name:tt),*) => {
            vec![$(($name, std::arch::$detect!($name))),*]
        };
    }
    #[cfg(target_arch = "x86_64")]
    let features = detect!(is_x86_feature_detected:
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16", "avxvnni");
    #[cfg(target_arch = "aarch64")]
    let features =
        detect!(is_aarch64_feature_detected: "neon", "dotprod", "fp16", "bf16", "i8mm", "sve");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let features = Vec::new();
    features
}

/// Bandwidths in GB/s (10^9 bytes a second); a copy counts its bytes once.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Bandwidth {
    /// Reading with all threads.
    pub read_gb_s: f64,
    /// Reading with one thread.
    pub read_one_thread_gb_s: f64,
    /// Copying with one thread.
    pub copy_gb_s: f64,
    /// Threads of the first.
    pub threads: usize,
    /// Bytes of each buffer: more than the caches.
    pub buffer_bytes: usize,
}

/// Bytes of a measuring buffer: more than caches hold, less than memory has.
fn buffer_bytes() -> usize {
    let room = memory("MemAvailable").unwrap_or(4 << 30) / 4;
    (room as usize).clamp(16 << 20, 512 << 20)
}

impl Bandwidth {
    /// Measures; takes about a second.
    pub(crate) fn measure(threads: usize, progress: Progress) -> Self {
        let threads = if threads == 0 { cores() } else { threads };
        let buffer_bytes = buffer_bytes();
        let bar = progress.count(3, "bandwidth");
        let source: Vec<u64> = (0..buffer_bytes as u64 / 8).collect();
        let read_gb_s = best(buffer_bytes, || read(&source, threads));
        bar.inc(1);
        let read_one_thread_gb_s = best(buffer_bytes, || read(&source, 1));
        bar.inc(1);
        let mut target = vec![1_u64; source.len()];
        let copy_gb_s = best(buffer_bytes, || {
            target.copy_from_slice(black_box(&source));
            black_box(&mut target);
        });
        bar.finish_and_clear();
        Self { read_gb_s, read_one_thread_gb_s, copy_gb_s, threads, buffer_bytes }
    }
}

fn best(bytes: usize, mut run: impl FnMut()) -> f64 {
    let mut shortest = f64::INFINITY;
    for _ in 0..6 {
        let start = Instant::now();
        run();
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / shortest / 1e9
}

fn read(words: &[u64], threads: usize) {
    let share = words.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for part in words.chunks(share) {
            scope.spawn(move || {
                let mut sums = [0_u64; 32];
                for words in part.chunks_exact(32) {
                    for (sum, word) in sums.iter_mut().zip(words) {
                        *sum = sum.wrapping_add(*word);
                    }
                }
                black_box(sums);
            });
        }
    });
}

/// Copies of `bytes` at a time through buffers larger than the caches, in milliseconds a copy.
pub(crate) struct Copier {
    source: Vec<u8>,
    target: Vec<u8>,
    at: usize,
}

impl Copier {
    /// Touches every page, so that none is made during a measurement.
    pub(crate) fn new(bytes: usize) -> Self {
        let size = buffer_bytes().max(2 * bytes);
        Self { source: vec![1; size], target: vec![2; size], at: 0 }
    }

    /// Copies `bytes` from where the last copy ended, once with one thread and once with all, and takes the shorter.
    pub(crate) fn copy(&mut self, bytes: usize) -> f64 {
        self.once(bytes, 1).min(self.once(bytes, cores()))
    }

    fn once(&mut self, bytes: usize, threads: usize) -> f64 {
        if self.at + bytes > self.source.len() {
            self.at = 0;
        }
        let range = self.at..self.at + bytes;
        self.at = range.end;
        let (from, to) = (black_box(&self.source[range.clone()]), &mut self.target[range]);
        let start = Instant::now();
        if threads == 1 {
            to.copy_from_slice(from);
        } else {
            let share = bytes.div_ceil(threads).max(1);
            std::thread::scope(|scope| {
                for (to, from) in to.chunks_mut(share).zip(from.chunks(share)) {
                    scope.spawn(move || to.copy_from_slice(from));
                }
            });
        }
        let seconds = start.elapsed().as_secs_f64();
        black_box(&mut self.target);
        seconds * 1e3
    }

    /// Reads and writes both buffers, so that no cache holds anything else.
    pub(crate) fn sweep(&mut self) {
        for word in self.source.iter_mut().chain(&mut self.target).step_by(64) {
            *word = word.wrapping_add(1);
        }
        black_box((&mut self.source, &mut self.target));
    }
}

#[cfg(test)]
mod tests {
    use super::driver_version;

    #[test]
    fn a_driver_names_its_version() {
        let text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@x)  \n\
                    GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)";
        assert_eq!(driver_version(text).as_deref(), Some("580.159.04"));
        assert_eq!(driver_version("NVRM version: none"), None);
    }
}
