//! Capsules to and from their file format. Bytes only: whoever calls does the I/O.

use std::ops::{ControlFlow, RangeInclusive};

use ampoule_backend::{BackendError, Region};
use ampoule_capsule::{CapsuleFile, CapsuleHeader, CapsuleWriter, MAX_JOURNAL_BYTES, Manifest};
use ampoule_plan::BufferTable;

use crate::chain::ChainLink;
use crate::engine::Engine;
use crate::lineage::{Capsule, RowNode, path};
use crate::piece::{Piece, PieceKind};
use crate::sampling::{Event, Stamped};
use crate::{EngineError, SamplingParams, SlotId};

impl Engine {
    /// Encodes a capsule as a file: `sink` is given the bytes piece by piece, in order, and may stop.
    ///
    /// The file is complete: all rows from position 0 on.
    ///
    /// # Errors
    /// If the capsule belongs to another engine or the device fails. What the sink was given then is no capsule.
    pub fn export(
        &self,
        capsule: &Capsule,
        sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let manifest = self.manifest(capsule);
        let chain = self.chain(capsule)?;
        let tokens: Vec<u32> = chain.links.iter().flat_map(ChainLink::tokens).copied().collect();
        let parts = chain.links.iter().map(|l| &l.rows).chain([&chain.fixed]);
        let parts: Vec<_> = parts.collect();
        let mut writer = CapsuleWriter::new(&manifest, &tokens)?;
        for (index, tensor) in self.layout.tensors.iter().enumerate() {
            // The pieces of its rows from the root on, or its only one.
            let pieces: Result<Vec<&[u8]>, _> = parts.iter().map(|p| p.tensor(index)).collect();
            writer.add(&tensor.name, &pieces?)?;
        }
        for slice in writer.finish()?.slices() {
            if sink(slice).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// What the capsule's file says about it.
    pub fn manifest(&self, capsule: &Capsule) -> Manifest {
        let node = &capsule.0.node;
        let nodes = path(Some(node));
        Manifest {
            producer: format!("ampoule {}", env!("CARGO_PKG_VERSION")),
            model: self.fingerprint.labels.weights.clone(),
            position: node.end(),
            history: node.history.clone(),
            lineage: node.id,
            parent: node.lineage_parent(),
            salt: self.scope.salt,
            fingerprint: self.fingerprint.clone(),
            layout: self.layout.clone(),
            journal: journal(&nodes),
            note: None,
        }
    }

    pub(crate) fn tensor_index(&self, region: &Region) -> usize {
        self.model
            .state()
            .iter()
            .position(|id| *id == region.buffer)
            .expect("frozen regions are State")
    }

    /// Makes a capsule in memory from a file's bytes.
    ///
    /// # Errors
    /// If the file is damaged, belongs to another tenant, or does not fit the model, plan, layout, kernels or device
    /// (the error names which), or the budget is used up.
    pub fn import(&mut self, bytes: &[u8]) -> Result<Capsule, EngineError> {
        let file = CapsuleFile::parse(bytes)?;
        file.check_fits(&self.fingerprint, &self.layout, &self.scope.salt)?;
        let manifest = file.manifest();
        let position = manifest.position;
        if position as usize > self.context() {
            return Err(EngineError::ContextFull {
                position: 0,
                wanted: position as usize,
                context: self.context(),
            });
        }
        let tokens: Vec<u32> = file.tokens().collect();
        self.check_tokens(&tokens)?;
        self.check_state(&|name| file.tensor(name).unwrap_or_default(), position)?;
        let events = self.check_journal(manifest.journal.as_deref(), 0..=position)?;
        let model = std::sync::Arc::clone(&self.model);
        let part = |regions: &[Region]| -> Vec<&[u8]> {
            let name = |r: &Region| &model.buffer(r.buffer).name;
            regions.iter().map(|r| file.tensor(name(r)).unwrap_or_default()).collect()
        };
        let fixed = self.state.fixed();
        let rows = self.state.rows(&(0..position as usize));
        let table = &model.model().buffers;
        self.has_room(fixed.iter().chain(&rows).map(|region| region.bytes(table)).sum())?;
        let fixed = self.program.freeze_bytes(fixed, &part(fixed))?;
        let fixed = Piece::new(PieceKind::Fixed, position, fixed);
        let rows = if rows.is_empty() {
            None
        } else {
            let rows = self.program.freeze_bytes(&rows, &part(&rows))?;
            Some(Piece::new(PieceKind::Rows, position, rows))
        };
        let node = RowNode::imported(tokens, manifest, events, rows);
        self.known.add(&node);
        Ok(Capsule::new(node, fixed, self.id))
    }

    /// Refuses a file that does not fit, by its header alone: before any of the state is read.
    ///
    /// # Errors
    /// As [`Engine::import`], but for the state itself.
    pub fn check_fits(&self, header: &CapsuleHeader) -> Result<(), EngineError> {
        header.check_fits(&self.fingerprint, &self.layout, &self.scope.salt)?;
        let wanted = header.manifest().position as usize;
        if wanted > self.context() {
            return Err(EngineError::ContextFull { position: 0, wanted, context: self.context() });
        }
        Ok(())
    }

    /// Whether the budget for capsules has room for so many bytes more: asked before anything is copied.
    pub(crate) fn has_room(&self, wanted: usize) -> Result<(), EngineError> {
        let (used, budget) = self.program.frozen_bytes();
        if used.checked_add(wanted).is_none_or(|sum| sum > budget) {
            return Err(BackendError::CapsuleBudget { wanted, used, budget }.into());
        }
        Ok(())
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<(), EngineError> {
        match tokens.iter().find(|&&t| t as usize >= self.vocabulary()) {
            Some(&token) => Err(EngineError::TokenRange { token, vocabulary: self.vocabulary() }),
            None => Ok(()),
        }
    }

    /// The events of a journal, all of them in `range` and in order; `None` where there is no journal.
    pub(crate) fn check_journal(
        &self,
        journal: Option<&str>,
        range: RangeInclusive<u32>,
    ) -> Result<Option<Vec<Stamped>>, EngineError> {
        let Some(journal) = journal else { return Ok(None) };
        let events: Vec<Stamped> = serde_json::from_str(journal).map_err(|e| {
            let what = "its journal is a list of sampler events".to_owned();
            EngineError::CapsuleState { what, found: e.to_string() }
        })?;
        let stamps: Vec<u32> = events.iter().map(|e| e.position).collect();
        if !stamps.is_sorted() || stamps.iter().any(|stamp| !range.contains(stamp)) {
            let what = format!("its journal is of positions {range:?}");
            return Err(EngineError::CapsuleState { what, found: format!("{stamps:?}") });
        }
        for stamped in &events {
            if let Event::Configure(params) = &stamped.event {
                self.check_sampling(params)?;
            }
        }
        Ok(Some(events))
    }

    /// That fixed state makes sense at a position: `tensor` gives its tensors by name.
    pub(crate) fn check_state<'a>(
        &self,
        tensor: &dyn Fn(&str) -> &'a [u8],
        position: u32,
    ) -> Result<(), EngineError> {
        self.check_cursor(tensor, position)?;
        self.check_sampler(tensor)
    }

    /// The sampler's own settings must be ones that somebody could have made.
    fn check_sampler<'a>(&self, tensor: &dyn Fn(&str) -> &'a [u8]) -> Result<(), EngineError> {
        let words = |name: &str| -> Vec<[u8; 4]> { tensor(name).as_chunks::<4>().0.to_vec() };
        let values: Vec<f32> =
            words("sampler.params").into_iter().map(f32::from_le_bytes).collect();
        let tokens = words("sampler.bias_tokens").into_iter().map(i32::from_le_bytes);
        let biases = words("sampler.bias_values").into_iter().map(f32::from_le_bytes);
        let params = SamplingParams::from_buffer(&values, tokens.zip(biases)).ok_or_else(|| {
            EngineError::CapsuleState {
                what: "it holds sampling parameters".to_owned(),
                found: format!("{values:?}"),
            }
        })?;
        self.check_sampling(&params)
    }

    /// The state's own position must be the manifest's: else every row after it would land in the wrong place.
    fn check_cursor<'a>(
        &self,
        tensor: &dyn Fn(&str) -> &'a [u8],
        position: u32,
    ) -> Result<(), EngineError> {
        let bytes = tensor(&self.model.buffer(self.buffers.cursor).name).first_chunk::<4>();
        let found = bytes.map_or(u32::MAX, |b| u32::from_le_bytes(*b));
        if found == position {
            return Ok(());
        }
        let (what, found) =
            (format!("it stands at position {position}"), format!("position {found}"));
        Err(EngineError::CapsuleState { what, found })
    }

    /// Compares the slot's position with the device's own: a check for tests and `verify`.
    ///
    /// # Errors
    /// If they differ, or the device fails.
    pub fn check_position(&mut self, slot: SlotId) -> Result<(), EngineError> {
        let (here, device) = (self.position(slot)?, self.cursor(slot)?);
        if here == device {
            return Ok(());
        }
        let (what, found) =
            (format!("the slot stands at position {here}"), format!("position {device}"));
        Err(EngineError::CapsuleState { what, found })
    }

    /// The buffers, for whoever names tensors.
    pub fn buffers(&self) -> &BufferTable {
        &self.model.model().buffers
    }
}

/// The sampler events of a branch, if all of them are known and fit.
fn journal(nodes: &[std::sync::Arc<RowNode>]) -> Option<String> {
    let events: Option<Vec<_>> = nodes.iter().map(|n| n.events.as_ref()).collect();
    let events: Vec<&Stamped> = events?.into_iter().flatten().collect();
    serde_json::to_string(&events).ok().filter(|text| text.len() <= MAX_JOURNAL_BYTES)
}

/// The journals of a chain's links, from the root on, as that of the whole branch; `None` where one is not known or the
/// whole does not fit a capsule file.
pub fn join_journals(journals: &[Option<&str>]) -> Option<String> {
    let mut events = Vec::<Stamped>::new();
    for journal in journals {
        events.extend(serde_json::from_str::<Vec<Stamped>>((*journal)?).ok()?);
    }
    serde_json::to_string(&events).ok().filter(|text| text.len() <= MAX_JOURNAL_BYTES)
}
