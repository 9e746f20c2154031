//! Ampoule: low-latency inference with execution-state capsules.
#![forbid(unsafe_code)]
