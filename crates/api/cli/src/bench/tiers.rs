//! Restoring a capsule from each memory it can lie in: the device's, the host's, a store on disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ampoule::store::tiers::{Budgets, Tier};
use ampoule::{
    Ampoule, CacheOptions, CapsuleCache, CapsuleStore, Residence, StoreOptions, sample_tokens,
};
use anyhow::ensure;
use serde_json::json;

use super::chart::{Chart, Series};
use super::{Outcome, Times, evict};
use crate::args::BenchArgs;
use crate::hardware::Copier;
use crate::output::{self, Progress, Table, figure, ms};

/// A folder for the disk tier, gone at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn run(
    model: &mut Ampoule,
    args: &BenchArgs,
    progress: Progress,
) -> anyhow::Result<Outcome> {
    let folder = std::env::temp_dir().join(format!("ampoule-bench-{}", std::process::id()));
    let folder = Folder(folder);
    let place = folder.0.to_string_lossy().into_owned();
    let store = Arc::new(CapsuleStore::open(&place, StoreOptions::default())?);
    let most = u64::MAX / 4;
    let budgets = Budgets { device: most, host: most, disk: most };
    let options = CacheOptions { budgets, forget: false };
    let mut cache = CapsuleCache::new(model, Some(store), options);
    let mut tiers = vec![Tier::Host, Tier::Disk];
    if model.engine.residence() == Residence::Device {
        tiers.insert(0, Tier::Device);
    }
    let slot = model.engine.create_slot()?;
    let mut copier = Copier::new(0);
    let bar = progress.count(args.prefix.len() * args.reps, "tiers");
    let mut table = Table::new(&["tier", "prefix", "bytes", "move there ms", "restore ms"]);
    let mut points = Vec::new();
    let mut lines = vec![Vec::new(); tiers.len()];
    for &prefix in &args.prefix {
        let tokens = sample_tokens(model, prefix, prefix as u64)?;
        model.engine.reset(slot)?;
        model.append(slot, &tokens)?;
        let state = model.engine.state_bytes(slot)?;
        let key = cache.snapshot(model, slot, false)?;
        let bytes: usize = state.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut times = vec![(Vec::new(), Vec::new()); tiers.len()];
        for _ in 0..args.reps {
            for (tier, (moves, restores)) in tiers.iter().zip(&mut times) {
                evict(model, slot)?;
                let start = Instant::now();
                cache.place(model, key, *tier)?;
                model.engine.synchronize()?;
                moves.push(ms(start.elapsed()));
                copier.sweep();
                let start = Instant::now();
                cache.restore(model, key, slot)?;
                model.engine.synchronize()?;
                restores.push(ms(start.elapsed()));
                let same = model.engine.state_bytes(slot)? == state;
                ensure!(same, "restored from the {tier} tier at {prefix} tokens, state differs");
            }
            bar.inc(1);
        }
        for ((tier, (moves, restores)), line) in tiers.iter().zip(times).zip(&mut lines) {
            let (moves, restores) = (Times::from(moves), Times::from(restores));
            table.row([
                tier.to_string(),
                prefix.to_string(),
                output::bytes(bytes as u64),
                figure(moves.median_ms),
                figure(restores.median_ms),
            ]);
            line.push((prefix as f64, restores.median_ms));
            points.push(json!({
                "tier": tier.to_string(), "prefix": prefix, "bytes": bytes,
                "move_there": moves, "restore": restores, "state_equal": true,
            }));
        }
        cache.remove(model, key)?;
    }
    bar.finish_and_clear();
    model.engine.drop_slot(slot)?;
    let series = tiers.iter().zip(lines);
    let chart = Chart {
        title: "Restore from each tier".to_owned(),
        x: "tokens of the prefix".to_owned(),
        y: "ms".to_owned(),
        log: true,
        series: series.map(|(tier, points)| Series { name: tier.to_string(), points }).collect(),
    };
    let text = vec![
        "move there: to the tier from where restores are fastest; the first move to disk saves, later ones find it saved"
            .to_owned(),
        "restore: to the slot, from that tier; from disk every byte is checked".to_owned(),
    ];
    Ok(Outcome { points, table, chart, text })
}
