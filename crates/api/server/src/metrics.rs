//! Counts and times, as Prometheus reads them.

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use ampoule::FinishReason;

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Default)]
pub(crate) struct Gauge(AtomicI64);

impl Gauge {
    pub(crate) fn set(&self, n: usize) {
        self.0.store(n as i64, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds in seconds.
const BOUNDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Times, by upper bound.
#[derive(Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (bucket, bound) in self.buckets.iter().zip(BOUNDS) {
            if seconds <= bound {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bucket, bound) in self.buckets.iter().zip(BOUNDS) {
            let _ =
                writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {}", bucket.load(Ordering::Relaxed));
        }
        let count = self.count.load(Ordering::Relaxed);
        let sum = self.micros.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(
            out,
            "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}"
        );
    }
}

/// Everything that is counted.
#[derive(Default)]
pub(crate) struct Metrics {
    pub requests: Counter,
    pub failures: Counter,
    pub rejected: Counter,
    pub cancelled: Counter,
    pub panics: Counter,
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub read_tokens: Counter,
    pub replayed_tokens: Counter,
    pub generated_tokens: Counter,
    pub restores: Counter,
    pub snapshots: Counter,
    pub evictions: Counter,
    pub moves: Counter,
    pub sessions_parked: Counter,
    pub sessions_fetched: Counter,
    pub sessions_expired: Counter,
    pub queue_depth: Gauge,
    pub running: Gauge,
    pub connections: Gauge,
    pub boundaries: Gauge,
    pub device_bytes: Gauge,
    pub host_bytes: Gauge,
    pub device_budget: Gauge,
    pub host_budget: Gauge,
    pub disk_bytes: Gauge,
    pub text_bytes: Gauge,
    pub sessions: Gauge,
    pub named: Gauge,
    pub responses: Gauge,
    pub ttft: Histogram,
    pub inter_token: Histogram,
    pub queue_time: Histogram,
    pub prefill_time: Histogram,
    pub restore_time: Histogram,
    pub request_time: Histogram,
    pub decode_time: Histogram,
    pub token_time: Histogram,
    /// Choices that ended, by [`Metrics::finished`].
    pub finished: [Counter; FINISHED.len()],
}

/// Why choices end, in the words of other servers. What a client ended or left is aborted.
const FINISHED: [&str; 3] = ["stop", "length", "abort"];

impl Metrics {
    /// Counts a choice that ended.
    pub(crate) fn finish(&self, reason: FinishReason) {
        let index = match reason {
            FinishReason::Length | FinishReason::Context => 1,
            FinishReason::Cancelled => 2,
            _ => 0,
        };
        self.finished[index].add(1);
    }

    pub(crate) fn render(&self) -> String {
        let mut out = String::with_capacity(8192);
        for (name, help, counter) in [
            ("requests_total", "Generations asked for.", &self.requests),
            ("request_failures_total", "Generations that ended with an error.", &self.failures),
            (
                "requests_rejected_total",
                "Requests refused because the queue was full.",
                &self.rejected,
            ),
            (
                "requests_cancelled_total",
                "Generations whose client went away or interrupted them.",
                &self.cancelled,
            ),
            (
                "engine_panics_total",
                "Requests that made the engine panic; each was isolated.",
                &self.panics,
            ),
            ("prompt_tokens_total", "Tokens of prompts.", &self.prompt_tokens),
            (
                "prompt_tokens_cached_total",
                "Tokens of prompts that a capsule brought.",
                &self.cached_tokens,
            ),
            ("prompt_tokens_read_total", "Tokens that were read by prefill.", &self.read_tokens),
            (
                "rollback_tokens_read_total",
                "Tokens that were read again to bring a session back to a place between boundaries.",
                &self.replayed_tokens,
            ),
            ("generation_tokens_total", "Tokens that were generated.", &self.generated_tokens),
            ("capsule_restores_total", "Capsules restored.", &self.restores),
            ("capsule_snapshots_total", "Boundaries frozen.", &self.snapshots),
            ("capsule_evictions_total", "Boundaries dropped to make room.", &self.evictions),
            (
                "capsule_moves_total",
                "Pieces of capsules moved between a device's memory and the host's.",
                &self.moves,
            ),
            (
                "sessions_parked_total",
                "Sessions that left memory and lie in the store.",
                &self.sessions_parked,
            ),
            (
                "sessions_fetched_total",
                "Sessions that came back from the store.",
                &self.sessions_fetched,
            ),
            (
                "sessions_expired_total",
                "Sessions that were idle for too long and are gone.",
                &self.sessions_expired,
            ),
        ] {
            let _ = writeln!(
                out,
                "# HELP ampoule_{name} {help}\n# TYPE ampoule_{name} counter\nampoule_{name} {}",
                counter.value()
            );
        }
        for (name, help, gauge) in [
            ("queue_depth", "Requests that wait.", &self.queue_depth),
            ("requests_running", "Replies being read for or generated.", &self.running),
            ("http_connections", "Open connections.", &self.connections),
            ("capsule_boundaries", "Boundaries kept automatically.", &self.boundaries),
            (
                "tokenized_text_bytes",
                "Texts whose tokens are kept for prompts that repeat them.",
                &self.text_bytes,
            ),
            ("sessions", "Sessions of the native API in memory.", &self.sessions),
            ("capsules_named", "Capsules that clients asked for.", &self.named),
            ("stored_responses", "Responses that can be continued.", &self.responses),
        ] {
            let _ = writeln!(
                out,
                "# HELP ampoule_{name} {help}\n# TYPE ampoule_{name} gauge\nampoule_{name} {}",
                gauge.value()
            );
        }
        let _ = writeln!(
            out,
            "# HELP ampoule_capsule_bytes Bytes of capsules by tier.\n# TYPE ampoule_capsule_bytes gauge\n\
             ampoule_capsule_bytes{{tier=\"device\"}} {}\nampoule_capsule_bytes{{tier=\"host\"}} {}\n\
             ampoule_capsule_bytes{{tier=\"disk\"}} {}\n\
             # HELP ampoule_capsule_budget_bytes Memory for capsules by tier.\n\
             # TYPE ampoule_capsule_budget_bytes gauge\n\
             ampoule_capsule_budget_bytes{{tier=\"device\"}} {}\n\
             ampoule_capsule_budget_bytes{{tier=\"host\"}} {}",
            self.device_bytes.value(),
            self.host_bytes.value(),
            self.disk_bytes.value(),
            self.device_budget.value(),
            self.host_budget.value()
        );
        let name = "ampoule_request_success_total";
        let _ = writeln!(
            out,
            "# HELP {name} Replies that ended without an error, by why they ended.\n# TYPE {name} counter"
        );
        for (reason, count) in FINISHED.iter().zip(&self.finished) {
            let _ = writeln!(out, "{name}{{finished_reason=\"{reason}\"}} {}", count.value());
        }
        for (name, help, histogram) in [
            ("time_to_first_token_seconds", "From arrival to the first token.", &self.ttft),
            ("inter_token_latency_seconds", "Between tokens of a reply.", &self.inter_token),
            ("request_queue_time_seconds", "From arrival to a slot.", &self.queue_time),
            ("request_prefill_time_seconds", "Reading a prompt.", &self.prefill_time),
            ("capsule_restore_time_seconds", "Restoring a capsule.", &self.restore_time),
            (
                "request_decode_time_seconds",
                "From a request's first token to its last.",
                &self.decode_time,
            ),
            (
                "request_time_per_output_token_seconds",
                "Decode time of a request over its tokens after the first.",
                &self.token_time,
            ),
            ("e2e_request_latency_seconds", "From arrival to the last token.", &self.request_time),
        ] {
            histogram.write(&mut out, &format!("ampoule_{name}"), help);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up_and_reasons_are_told_apart() {
        let metrics = Metrics::default();
        for millis in [0, 1, 2, 30, 70_000] {
            metrics.decode_time.observe(Duration::from_millis(millis));
        }
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Context,
            FinishReason::Cancelled,
        ] {
            metrics.finish(reason);
        }
        let text = metrics.render();
        let name = "ampoule_request_decode_time_seconds";
        for line in [
            format!("{name}_bucket{{le=\"0.001\"}} 2"),
            format!("{name}_bucket{{le=\"0.05\"}} 4"),
            format!("{name}_bucket{{le=\"60\"}} 4"),
            format!("{name}_bucket{{le=\"+Inf\"}} 5"),
            format!("{name}_count 5"),
            "ampoule_request_success_total{finished_reason=\"stop\"} 1".to_owned(),
            "ampoule_request_success_total{finished_reason=\"length\"} 2".to_owned(),
            "ampoule_request_success_total{finished_reason=\"abort\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        // Every series has its help and its type, once.
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let series = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| series.strip_suffix(end))
                .filter(|family| text.contains(&format!("# TYPE {family} histogram")))
                .unwrap_or(series);
            for word in ["HELP", "TYPE"] {
                let count = text.matches(&format!("# {word} {family} ")).count();
                assert_eq!(count, 1, "{word} of {family}");
            }
        }
    }
}
