//! Slots, prefill, decode, sampling and the capsule verbs over any backend.
#![forbid(unsafe_code)]
