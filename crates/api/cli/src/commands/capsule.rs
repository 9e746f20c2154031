//! `ampoule capsule`: files here, stores beside.

use ampoule::{CapsuleFile, CapsuleHeader, CapsuleReader, Component, Manifest};
use anyhow::{Context, bail};
use serde_json::{Map, Value, json};

use super::store;
use crate::args::{CapsuleCommand, GlobalArgs, StoreOneArgs, StoreSaveArgs};
use crate::hardware::memory;
use crate::output::{self, Progress, Table};

pub(crate) fn run(command: CapsuleCommand, global: &GlobalArgs) -> anyhow::Result<()> {
    match command {
        CapsuleCommand::Inspect(args) if args.store.store.is_some() => store::inspect(&args),
        CapsuleCommand::Inspect(args) => inspect(&args),
        CapsuleCommand::Verify(args) if args.store.store.is_some() => store::verify(&args),
        CapsuleCommand::Verify(args) => verify(&args),
        CapsuleCommand::Save(args) => save(&args, global),
        CapsuleCommand::Load(args) => store::load_one(&args, global),
        CapsuleCommand::List(args) => store::list(&args.list, args.all),
        CapsuleCommand::Tree(args) => store::tree(&args),
        CapsuleCommand::Export(args) => store::export(&args),
        CapsuleCommand::Import(args) => store::import(&args),
        CapsuleCommand::Rm(args) => store::remove(&args),
        CapsuleCommand::Gc(args) => store::gc(&args),
        CapsuleCommand::Fsck(args) => store::fsck(&args),
    }
}

fn save(args: &StoreSaveArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let progress = Progress::new(args.json);
    let capsules = store::open(&args.store)?;
    let mut model = super::load(&args.model.model, global, None, progress)?;
    let tokens = match (&args.tokens, &args.prompt, &args.prompt_file) {
        (Some(tokens), ..) => tokens.0.clone(),
        (_, Some(text), _) => model.encode_prompt(text)?,
        (_, _, Some(path)) => model.encode_prompt(&output::read_text(path)?)?,
        _ => Vec::new(),
    };
    if tokens.is_empty() {
        return Err(output::Usage("the text is empty: there is no state to save".to_owned()).into());
    }
    let slot = model.engine.create_slot()?;
    super::read(&mut model, slot, &tokens, progress)?;
    let capsule = model.engine.snapshot(slot)?;
    let saved = store::save(&capsules, &model, &capsule, &args.name, progress)?;
    store::tell(args.json, &saved, Some(&args.name))
}

fn inspect(args: &StoreOneArgs) -> anyhow::Result<()> {
    let reader = CapsuleReader::open(args.which.as_ref())?;
    let header = reader.header();
    if args.json {
        return output::json(&describe(header));
    }
    let manifest = header.manifest();
    output::line(format!("model      {}", manifest.model))?;
    output::line(format!("position   {}", manifest.position))?;
    output::line(format!("lineage    {}", manifest.lineage))?;
    if let Some(parent) = &manifest.parent {
        output::line(format!("parent     {} at {}", parent.id, parent.position))?;
    }
    output::line(format!("history    {}", segments(manifest)))?;
    output::line(format!("journal    {}", if manifest.journal.is_some() { "yes" } else { "no" }))?;
    output::line(format!("written by {}", manifest.producer))?;
    output::line(format!("bytes      {}", header.total_bytes()))?;
    output::line("fingerprint")?;
    for component in Component::ALL {
        let fingerprint = &manifest.fingerprint;
        let digest = fingerprint.component(component).to_string();
        let (name, label) = (component.name(), fingerprint.label(component));
        output::line(format!("  {name:<10} {}  {label}", &digest[..16]))?;
    }
    let mut table = Table::new(&["tensor", "kind", "dtype", "shape", "bytes"]);
    for tensor in header.tensors() {
        table.row([
            tensor.name.to_owned(),
            kind(manifest, tensor.name),
            tensor.dtype.to_string(),
            shape(&tensor.shape),
            (tensor.range.end - tensor.range.start).to_string(),
        ]);
    }
    output::put(&table.to_text())
}

fn verify(args: &StoreOneArgs) -> anyhow::Result<()> {
    let shown = &args.which;
    let reader = CapsuleReader::open(shown.as_ref())?;
    let needed = reader.header().total_bytes();
    if let Some(available) = memory("MemAvailable").filter(|&available| needed > available) {
        let (needed, available) = (output::bytes(needed), output::bytes(available));
        bail!("{shown}: {needed} are read to check it, but only {available} of memory are free");
    }
    let bytes = reader.read()?;
    let capsule = CapsuleFile::parse(&bytes).with_context(|| shown.clone())?;
    let position = capsule.manifest().position;
    let tensors = capsule.tensors().count();
    if args.json {
        return output::json(&json!({
            "file": shown,
            "whole": true,
            "bytes": bytes.len(),
            "position": position,
            "tensors": tensors,
        }));
    }
    output::line(format!(
        "{shown}: whole, {} checked, {tensors} tensors, position {position}",
        output::bytes(bytes.len() as u64)
    ))
}

fn kind(manifest: &Manifest, name: &str) -> String {
    manifest.layout.tensor(name).map_or_else(|| "tokens".to_owned(), |t| t.kind.clone())
}

fn shape(shape: &[usize]) -> String {
    format!("[{}]", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
}

fn segments(manifest: &Manifest) -> String {
    let segments = manifest.history.segments().iter();
    let text = segments.map(|s| format!("{}..{} {}", s.start, s.end, origin(s.origin)));
    text.collect::<Vec<_>>().join(", ")
}

const fn origin(origin: ampoule::Origin) -> &'static str {
    match origin {
        ampoule::Origin::Prefill => "prefill",
        ampoule::Origin::Decode => "decode",
    }
}

/// Everything but the tokens and the journal.
fn describe(header: &CapsuleHeader) -> Value {
    let manifest = header.manifest();
    let history: Vec<Value> = manifest
        .history
        .segments()
        .iter()
        .map(|s| json!({ "start": s.start, "end": s.end, "origin": origin(s.origin) }))
        .collect();
    let fingerprint: Map<String, Value> = Component::ALL
        .into_iter()
        .map(|component| {
            let digest = manifest.fingerprint.component(component).to_string();
            let label = manifest.fingerprint.label(component);
            (component.name().to_owned(), json!({ "digest": digest, "label": label }))
        })
        .collect();
    let tensors: Vec<Value> = header
        .tensors()
        .map(|t| {
            json!({
                "name": t.name,
                "kind": kind(manifest, t.name),
                "dtype": t.dtype.to_string(),
                "shape": t.shape,
                "bytes": t.range.end - t.range.start,
                "blake3": t.digest.to_string(),
            })
        })
        .collect();
    let parent = manifest.parent.as_ref();
    json!({
        "model": manifest.model,
        "position": manifest.position,
        "lineage": manifest.lineage.to_string(),
        "parent": parent.map(|p| json!({ "lineage": p.id.to_string(), "position": p.position })),
        "history": history,
        "journal": manifest.journal.is_some(),
        "note": manifest.note,
        "producer": manifest.producer,
        "bytes": header.total_bytes(),
        "fingerprint": fingerprint,
        "tensors": tensors,
    })
}
