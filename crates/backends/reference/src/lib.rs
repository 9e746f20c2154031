//! The scalar interpreter that defines every op.
#![forbid(unsafe_code)]
