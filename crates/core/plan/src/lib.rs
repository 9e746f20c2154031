//! Plans: typed ops over named static buffers, checked and sealed.
//!
//! A [`Model`] is a table of [`Buffer`]s and a set of [`Plan`]s over them, one plan per [`ShapeKey`]. A plan is a
//! straight line of typed [`Op`]s: no branches, no allocation, no position baked in. [`Model::seal`] proves that
//! whatever one replay leaves for the next lies in buffers of role State, which is what makes a capsule complete.
//!
//! The crate computes nothing itself. `ampoule-reference` holds the executable definition of every op.
#![forbid(unsafe_code)]

mod buffer;
mod check;
mod cost;
mod dtype;
mod model;
mod ops;
mod random;
mod seal;
mod text;
mod weights;

pub use buffer::{Buffer, BufferId, BufferTable, Growth, Role, StateKind, TableError, View};
pub use check::OpError;
pub use cost::{Cost, CostPoint};
pub use dtype::{BLOCK, DType, UnknownDType};
pub use model::{Model, Phase, Plan, ShapeKey};
pub use ops::*;
pub use random::RandomFill;
pub use seal::{SealError, Sealed};
pub use text::ParseError;
pub use weights::{WeightError, WeightSource};
