//! Cases by name, built when they run.

use std::fmt;

use super::case::Case;
use super::rng::Rng;

/// A family of cases of one op.
pub(crate) trait Family: Send + Sync {
    /// The op's name in the text form; `layer` and the like where it takes several.
    fn op(&self) -> &'static str;

    /// What tells the case from the others of its op.
    fn detail(&self) -> String;

    fn build(&self, rng: Rng) -> Case;
}

/// A case that has a name and has not been built.
pub struct Spec {
    family: Box<dyn Family>,
    name: String,
}

impl Spec {
    pub(crate) fn new(family: impl Family + 'static) -> Self {
        let name = format!("{}/{}", family.op(), family.detail());
        Self { family: Box::new(family), name }
    }

    /// `op/what,tells,it,from,others`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The op the case is about.
    pub fn op(&self) -> &'static str {
        self.family.op()
    }

    /// Whether every word of the pattern occurs in the name.
    pub fn matches(&self, pattern: &str) -> bool {
        pattern.split_whitespace().all(|word| self.name.contains(word))
    }

    pub(crate) fn build(&self, seed: u64) -> Case {
        self.family.build(Rng::new(seed, &self.name))
    }
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
