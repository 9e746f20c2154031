//! What a capsule without its recurrent state is worth: the answer other runtimes give after a cache hit.

use ampoule_engine::{Capsule, SlotId};
use ampoule_plan::{Role, StateKind};
use serde::Serialize;

use crate::verify::release;
use crate::{Ampoule, Error, sample_tokens};

/// Which recurrent state the continuation starts from; the KV cache is restored in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ablation {
    /// All zero.
    Zeroed,
    /// That of a boundary some tokens before.
    Stale,
    /// The capsule's own.
    Whole,
}

/// How far continuations differ from the session that was never interrupted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AblationReport {
    /// The model.
    pub model: String,
    /// Tokens before the boundary.
    pub prefix: usize,
    /// Greedy tokens compared.
    pub tokens: usize,
    /// Whether the model has recurrent state at all.
    pub recurrent: bool,
    /// Tokens that differ, by ablation.
    pub differ: Vec<(Ablation, usize)>,
}

impl AblationReport {
    /// Whether the whole capsule changed nothing, and (where there is recurrent state) its absence something; not
    /// where no token was compared.
    pub fn passed(&self) -> bool {
        self.tokens > 0
            && self.differ.iter().all(|&(ablation, differ)| match ablation {
                Ablation::Whole => differ == 0,
                Ablation::Zeroed => differ > 0 || !self.recurrent,
                Ablation::Stale => true,
            })
    }
}

impl Ampoule {
    /// Continues `tokens` greedy tokens from a boundary after `prefix` tokens, with the recurrent and convolution
    /// state zeroed, stale, and whole. Needs one free slot. A prefix has at least two tokens, so that there is an
    /// earlier boundary whose state can be stale; a shorter one is made so long.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn ablate(
        &mut self,
        prefix: usize,
        tokens: usize,
        seed: u64,
    ) -> Result<AblationReport, Error> {
        let text = sample_tokens(self, prefix.max(2), seed)?;
        let slot = self.engine.create_slot()?;
        let outcome = self.ablate_in(slot, &text, tokens);
        release(&mut self.engine, &[slot], outcome)
    }

    fn ablate_in(
        &mut self,
        slot: SlotId,
        text: &[u32],
        tokens: usize,
    ) -> Result<AblationReport, Error> {
        let early = text.len() - (text.len() / 3).clamp(1, 64);
        self.append(slot, &text[..early])?;
        let stale = self.engine.snapshot(slot)?;
        self.append(slot, &text[early..])?;
        let whole = self.engine.snapshot(slot)?;
        let wanted = self.continue_from(slot, tokens)?;
        let mut differ = Vec::new();
        for (ablation, donor) in [
            (Ablation::Zeroed, None),
            (Ablation::Stale, Some(&stale)),
            (Ablation::Whole, Some(&whole)),
        ] {
            self.restore_ablated(slot, &whole, ablation, donor)?;
            let got = self.continue_from(slot, tokens)?;
            differ.push((ablation, got.iter().zip(&wanted).filter(|(g, w)| g != w).count()));
        }
        let recurrent = !self.recurrent_names().is_empty();
        Ok(AblationReport {
            model: self.name().to_owned(),
            prefix: text.len(),
            tokens,
            recurrent,
            differ,
        })
    }

    fn recurrent_names(&self) -> Vec<String> {
        let recurrent = |role: &Role| {
            matches!(role, Role::State { kind: StateKind::Recurrent | StateKind::Conv, .. })
        };
        self.engine
            .buffers()
            .iter()
            .filter(|(_, b)| recurrent(&b.role))
            .map(|(_, b)| b.name.clone())
            .collect()
    }

    /// For experiments: restores a capsule, but with the recurrent and convolution state of `donor`, or zero where there
    /// is none; [`Ablation::Whole`] restores all of it. What follows is not the model's answer: that is the point. The
    /// slot refuses to be snapshotted or rolled back until it is restored or reset.
    ///
    /// # Errors
    /// As [`Engine::restore`](crate::Engine::restore).
    pub fn restore_ablated(
        &mut self,
        slot: SlotId,
        whole: &Capsule,
        ablation: Ablation,
        donor: Option<&Capsule>,
    ) -> Result<(), Error> {
        if ablation == Ablation::Whole {
            return Ok(self.engine.restore(slot, whole)?);
        }
        let names = self.recurrent_names();
        Ok(self.engine.restore_with_other_state(slot, whole, donor, &|name| {
            names.iter().any(|n| n == name)
        })?)
    }

    fn continue_from(&mut self, slot: SlotId, tokens: usize) -> Result<Vec<u32>, Error> {
        (0..tokens).map(|_| Ok(self.engine.step(slot)?)).collect()
    }
}
