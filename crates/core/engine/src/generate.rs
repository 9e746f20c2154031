//! Why replies end.

use serde::Serialize;

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// An end token was drawn, or a stop string found.
    Stop,
    /// The most tokens asked for were generated.
    Length,
    /// The context is full.
    Context,
    /// Whoever asked gave up.
    Cancelled,
}
