//! Capsules to and from their file format. Bytes only: whoever calls does the I/O.

use std::ops::ControlFlow;

use ampoule_backend::{Region, fixed_regions, row_regions};
use ampoule_capsule::{CapsuleFile, CapsuleHeader, CapsuleWriter, MAX_JOURNAL_BYTES, Manifest};
use ampoule_plan::BufferTable;

use crate::engine::Engine;
use crate::lineage::{Capsule, RowNode, path};
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
        if capsule.0.engine != self.id {
            return Err(EngineError::ForeignCapsule);
        }
        let manifest = self.manifest(capsule);
        let nodes = path(Some(&capsule.0.node));
        let tokens: Vec<u32> = nodes.iter().flat_map(|n| n.tokens.iter().copied()).collect();
        let frozen = nodes.iter().filter_map(|n| n.rows.as_ref()).chain([&capsule.0.fixed]);
        let table = &self.model.model().buffers;
        // Per tensor, the pieces of its rows from the root on.
        let mut pieces: Vec<Vec<Vec<u8>>> = vec![Vec::new(); self.layout.tensors.len()];
        for part in frozen {
            for (index, region) in part.regions().iter().enumerate() {
                let mut bytes = vec![0; region.bytes(table)];
                part.read(index, &mut bytes)?;
                pieces[self.tensor_index(region)].push(bytes);
            }
        }
        let mut writer = CapsuleWriter::new(&manifest, &tokens)?;
        for (tensor, pieces) in self.layout.tensors.iter().zip(&pieces) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            writer.add(&tensor.name, &pieces)?;
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

    fn tensor_index(&self, region: &Region) -> usize {
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
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= self.vocabulary()) {
            return Err(EngineError::TokenRange { token, vocabulary: self.vocabulary() });
        }
        self.check_cursor(&file, position)?;
        self.check_sampler(&file)?;
        let events: Option<Vec<Stamped>> =
            manifest.journal.as_deref().map(serde_json::from_str).transpose().map_err(|e| {
                EngineError::CapsuleState {
                    what: "its journal is a list of sampler events".to_owned(),
                    found: e.to_string(),
                }
            })?;
        let stamps: Vec<u32> = events.iter().flatten().map(|e| e.position).collect();
        if !stamps.is_sorted() || stamps.last().is_some_and(|&last| last > position) {
            let found = format!("positions {stamps:?}");
            return Err(EngineError::CapsuleState {
                what: format!("its journal ends at position {position}"),
                found,
            });
        }
        for stamped in events.iter().flatten() {
            if let Event::Configure(params) = &stamped.event {
                self.check_sampling(params)?;
            }
        }
        let model = std::sync::Arc::clone(&self.model);
        let part = |regions: &[Region]| -> Vec<&[u8]> {
            let name = |r: &Region| &model.buffer(r.buffer).name;
            regions.iter().map(|r| file.tensor(name(r)).unwrap_or_default()).collect()
        };
        let fixed = fixed_regions(&model);
        let fixed = self.program.freeze_bytes(&fixed, &part(&fixed))?;
        let rows = row_regions(&model, &(0..position as usize));
        let rows = if rows.is_empty() {
            None
        } else {
            Some(self.program.freeze_bytes(&rows, &part(&rows))?)
        };
        let node = RowNode::imported(tokens, manifest, events, rows);
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

    /// The sampler's own settings must be ones that somebody could have made.
    fn check_sampler(&self, file: &CapsuleFile<'_>) -> Result<(), EngineError> {
        let words = |name: &str| -> Vec<[u8; 4]> {
            file.tensor(name).unwrap_or_default().as_chunks::<4>().0.to_vec()
        };
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
    fn check_cursor(&self, file: &CapsuleFile<'_>, position: u32) -> Result<(), EngineError> {
        let name = &self.model.buffer(self.buffers.cursor).name;
        let bytes = file.tensor(name).and_then(|b| b.first_chunk::<4>());
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
