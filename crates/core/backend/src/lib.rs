//! The seam between a plan and the device that runs it.
#![forbid(unsafe_code)]
