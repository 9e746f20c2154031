//! `ampoule capsule` over a store, and the store behind `--store` elsewhere.

use std::collections::HashMap;
use std::time::Instant;

use ampoule::store::{CapsuleId, Catalog, Compression, Expected, Listed, Saved, StoreKey};
use ampoule::{Ampoule, Capsule, CapsuleStore, StoreOptions, Tokenizer};
use std::sync::Arc;

use anyhow::Context;
use serde_json::{Value, json};

use super::load;
use crate::args::{
    GlobalArgs, StoreArgs, StoreExportArgs, StoreImportArgs, StoreListArgs, StoreLoadArgs,
    StoreOneArgs, StoreOnlyArgs,
};
use crate::output::{self, Failed, Progress, Table, figure, ms};

/// The environment variable that holds a store's key, as 64 hexadecimal digits.
const KEY_VARIABLE: &str = "AMPOULE_STORE_KEY";

pub(crate) fn options(args: &StoreArgs) -> anyhow::Result<StoreOptions> {
    let mut options = StoreOptions::default();
    options.key = match &args.store_key_file {
        Some(path) => Some(StoreKey::from_file(path)?),
        None => StoreKey::from_environment(KEY_VARIABLE)?,
    };
    if args.store_zstd {
        options.compression = Compression::Zstd { level: 3 };
    }
    options.quota = args.store_quota_mib.map(|mib| mib.saturating_mul(1 << 20));
    Ok(options)
}

/// The store that was asked for, to write.
pub(crate) fn open(args: &StoreArgs) -> anyhow::Result<CapsuleStore> {
    Ok(CapsuleStore::open(place(args)?, options(args)?)?)
}

/// The store that was asked for, to read.
pub(crate) fn open_read_only(args: &StoreArgs) -> anyhow::Result<CapsuleStore> {
    Ok(CapsuleStore::open_read_only(place(args)?, options(args)?)?)
}

fn place(args: &StoreArgs) -> anyhow::Result<&str> {
    args.store.as_deref().with_context(|| "give a store: --store DIR or --store s3://BUCKET/PREFIX")
}

/// Saves under a name, which moves there if it was taken.
pub(crate) fn save(
    store: &CapsuleStore,
    model: &Ampoule,
    capsule: &Capsule,
    name: &str,
    progress: Progress,
) -> anyhow::Result<Saved> {
    let bytes = (capsule.fixed_bytes() + capsule.row_bytes()) as u64;
    let save = || store.save(model, capsule, Some((name, Expected::Anything)), None);
    Ok(watch(store, progress, "saving", bytes, save)?)
}

/// Runs a long call to a store with a bar of the bytes that it moves.
fn watch<T>(
    store: &CapsuleStore,
    progress: Progress,
    what: &str,
    bytes: u64,
    work: impl FnOnce() -> T,
) -> T {
    progress.watch(what, bytes, || store.store().moved_bytes(), work)
}

/// Bytes of a stored capsule, its whole chain included.
fn bytes_of(store: &CapsuleStore, id: CapsuleId) -> anyhow::Result<u64> {
    let stored = store.store().capsule(id)?;
    Ok(stored.fixed_bytes() + stored.row_bytes())
}

/// What a save did, in words.
pub(crate) fn saved_text(name: &str, saved: &Saved) -> String {
    let (written, shared) = (output::bytes(saved.written), output::bytes(saved.shared));
    format!("saved {name} ({written} written, {shared} were there)")
}

/// Loads by name or id.
pub(crate) fn fetch(
    store: &CapsuleStore,
    model: &mut Ampoule,
    which: &str,
    progress: Progress,
) -> anyhow::Result<Capsule> {
    let id = store.find(which)?;
    let bytes = bytes_of(store, id)?;
    Ok(watch(store, progress, "loading", bytes, || store.load(model, id))?)
}

pub(crate) fn load_one(args: &StoreLoadArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let progress = Progress::new(args.json);
    let store = open_read_only(&args.store)?;
    let id = store.find(&args.which)?;
    let mut model = load(&args.model.model, global, None, progress)?;
    let start = Instant::now();
    let bytes = bytes_of(&store, id)?;
    let capsule = watch(&store, progress, "loading", bytes, || store.load(&mut model, id))?;
    let load_ms = ms(start.elapsed());
    let slot = model.engine.create_slot()?;
    let start = Instant::now();
    model.engine.restore(slot, &capsule)?;
    model.engine.synchronize()?;
    let restore_ms = ms(start.elapsed());
    let bytes = (capsule.fixed_bytes() + capsule.row_bytes()) as u64;
    if args.json {
        return output::json(&json!({
            "id": id.to_string(), "position": capsule.position(), "bytes": bytes,
            "load_and_check_ms": load_ms, "restore_ms": restore_ms,
        }));
    }
    output::line(format!(
        "{}: position {}, {}, every byte checked and loaded in {} ms, restored in {} ms",
        args.which,
        capsule.position(),
        output::bytes(bytes),
        figure(load_ms),
        figure(restore_ms)
    ))
}

fn names(catalog: &Catalog) -> HashMap<CapsuleId, Vec<&str>> {
    let mut names: HashMap<CapsuleId, Vec<&str>> = HashMap::new();
    for head in &catalog.heads {
        names.entry(head.capsule).or_default().push(&head.name);
    }
    names
}

fn describe(listed: &Listed, names: &HashMap<CapsuleId, Vec<&str>>) -> Value {
    let capsule = &listed.capsule;
    let saved = listed.saved.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    json!({
        "id": capsule.id.to_string(),
        "names": names.get(&capsule.id).cloned().unwrap_or_default(),
        "parent": listed.parent.map(|id| id.to_string()),
        "model": capsule.model(),
        "position": capsule.position(),
        "lineage": capsule.lineage().to_string(),
        "tier": "disk",
        "own_bytes": listed.own_bytes,
        "own_row_bytes": own_rows(listed),
        "shared_bytes": listed.shared_bytes,
        "fixed_bytes": capsule.fixed_bytes(),
        "row_bytes": capsule.row_bytes(),
        "note": capsule.note(),
        "saved_unix_s": saved,
    })
}

/// Bytes of rows that only this capsule needs.
fn own_rows(listed: &Listed) -> u64 {
    listed.own_bytes.saturating_sub(listed.capsule.fixed_bytes())
}

/// The beginning of an id.
fn short(id: CapsuleId) -> String {
    id.to_string().chars().take(12).collect()
}

/// What was lost to damage, if anything; then the exit code says so too.
fn unreadable(catalog: &Catalog) -> anyhow::Result<()> {
    for (id, damaged) in &catalog.unreadable {
        output::note(format!("{} cannot be read: {damaged}", short(*id)));
    }
    for damaged in &catalog.damaged_heads {
        output::note(format!("a name cannot be read: {damaged}"));
    }
    let whole = catalog.unreadable.is_empty() && catalog.damaged_heads.is_empty();
    if whole { Ok(()) } else { Err(Failed.into()) }
}

/// Whether a server keeps this name on its own, as docs/server.md says. What clients pinned is theirs.
fn automatic(name: &str) -> bool {
    ["server session ", "server response ", "server boundary "].iter().any(|p| name.starts_with(p))
}

/// What a capsule is called in a table. Of one that a client of a server named that name, with the server's own; what else
/// the server calls it only where everything is shown.
fn called(store: &CapsuleStore, names: &[&str], all: bool) -> String {
    let shown = names.iter().filter(|name| all || !automatic(name)).map(|name| {
        let memo = name.starts_with("server capsule ").then(|| store.store().memo(name).ok()?);
        let record = memo.flatten().and_then(|memo| serde_json::from_slice::<Value>(&memo).ok());
        match record.as_ref().and_then(|record| record["name"].as_str()) {
            // A client gave it: it may have control characters.
            Some(given) => format!("{} ({name})", given.escape_debug()),
            None => (*name).to_owned(),
        }
    });
    shown.collect::<Vec<_>>().join(", ")
}

pub(crate) fn list(args: &StoreListArgs, all: bool) -> anyhow::Result<()> {
    let store = open_read_only(&args.store)?;
    let catalog = store.store().catalog()?;
    let names = names(&catalog);
    let kept = |id: &CapsuleId| names.get(id).is_some_and(|n| n.iter().all(|n| automatic(n)));
    let (shown, hidden): (Vec<_>, Vec<_>) =
        catalog.capsules.iter().partition(|listed| all || !kept(&listed.capsule.id));
    let (rows, fixed) = catalog.state_bytes();
    if args.json {
        let capsules: Vec<Value> = shown.iter().map(|l| describe(l, &names)).collect();
        let damaged: Vec<Value> = catalog
            .unreadable
            .iter()
            .map(|(id, damaged)| json!({ "id": id.to_string(), "problem": damaged.to_string() }))
            .collect();
        output::json(&json!({
            "store": store.place(), "capsules": capsules, "hidden": hidden.len(), "unreadable": damaged,
            "row_bytes": rows, "fixed_bytes": fixed,
        }))?;
        return unreadable(&catalog);
    }
    let tokenizer = tokenizer_of(args)?;
    let mut columns =
        vec!["name", "id", "position", "own rows", "fixed state", "shared rows", "tier", "model"];
    if tokenizer.is_some() {
        columns.push("text");
    }
    let mut table = Table::new(&columns);
    for listed in &shown {
        let capsule = &listed.capsule;
        let mut row = vec![
            names.get(&capsule.id).map_or_else(|| "-".to_owned(), |n| called(&store, n, all)),
            short(capsule.id),
            capsule.position().to_string(),
            output::bytes(own_rows(listed)),
            output::bytes(capsule.fixed_bytes()),
            output::bytes(listed.shared_bytes),
            "disk".to_owned(),
            capsule.model().to_owned(),
        ];
        row.extend(tokenizer.as_ref().map(|t| preview(t, &capsule.tokens()).trim().to_owned()));
        table.row(row);
    }
    output::put(&table.to_text())?;
    output::line(format!(
        "{} capsules: {} of rows, {} of fixed state",
        catalog.capsules.len(),
        output::bytes(rows),
        output::bytes(fixed)
    ))?;
    if !hidden.is_empty() {
        let count = hidden.len();
        output::line(format!(
            "{count} of them, kept by a server, are not shown; --all shows them"
        ))?;
    }
    unreadable(&catalog)
}

pub(crate) fn tree(args: &StoreListArgs) -> anyhow::Result<()> {
    if args.json {
        return list(args, true);
    }
    let store = open_read_only(&args.store)?;
    let catalog = store.store().catalog()?;
    let names = names(&catalog);
    let tokenizer = tokenizer_of(args)?;
    let mut lines = Vec::new();
    // Depth first without recursion: a branch may be as long as a conversation.
    let mut open: Vec<(&Listed, String, bool)> = Vec::new();
    open_children(&catalog, None, "", &mut open);
    while let Some((listed, prefix, last)) = open.pop() {
        let capsule = &listed.capsule;
        let (branch, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let name =
            names.get(&capsule.id).map_or_else(String::new, |n| format!(" {}", n.join(", ")));
        let mut line = format!(
            "{prefix}{branch}{}{name}  position {}, own {} of rows + {} fixed, shared {}, disk",
            short(capsule.id),
            capsule.position(),
            output::bytes(own_rows(listed)),
            output::bytes(capsule.fixed_bytes()),
            output::bytes(listed.shared_bytes),
        );
        if let Some(tokenizer) = &tokenizer {
            line.push_str(&preview(tokenizer, &capsule.tokens()));
        }
        lines.push(line);
        open_children(&catalog, Some(capsule.id), &format!("{prefix}{below}"), &mut open);
    }
    output::line(store.place())?;
    for line in lines {
        output::line(line)?;
    }
    unreadable(&catalog)
}

/// Puts the capsules below `parent` on the stack, so that the first is on top.
fn open_children<'a>(
    catalog: &'a Catalog,
    parent: Option<CapsuleId>,
    prefix: &str,
    open: &mut Vec<(&'a Listed, String, bool)>,
) {
    let children: Vec<&Listed> = catalog.children(parent).collect();
    for (index, child) in children.iter().enumerate().rev() {
        open.push((child, prefix.to_owned(), index + 1 == children.len()));
    }
}

/// What decodes the text that was asked for with `--text`.
fn tokenizer_of(args: &StoreListArgs) -> anyhow::Result<Option<Arc<Tokenizer>>> {
    let model = args.text.as_ref();
    model.map(|model| Ok(Ampoule::tokenizer_of(&model.resolve()?)?)).transpose()
}

/// The end of the text, on one line.
fn preview(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let tail = &tokens[tokens.len().saturating_sub(16)..];
    let text: String = tokenizer.decode(tail).split_whitespace().collect::<Vec<_>>().join(" ");
    format!("  \"…{text}\"")
}

pub(crate) fn inspect(args: &StoreOneArgs) -> anyhow::Result<()> {
    let store = open_read_only(&args.store)?;
    let id = store.find(&args.which)?;
    let catalog = store.store().catalog()?;
    let names = names(&catalog);
    let listed = catalog.capsules.iter().find(|listed| listed.capsule.id == id);
    let listed = listed.with_context(|| format!("{}: it cannot be read; see fsck", args.which))?;
    let value = describe(listed, &names);
    if args.json {
        return output::json(&value);
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        output::line(format!("{key:<13} {value}"))?;
    }
    output::line(format!("chain         {} links", listed.capsule.nodes.len()))
}

pub(crate) fn verify(args: &StoreOneArgs) -> anyhow::Result<()> {
    let store = open_read_only(&args.store)?;
    let id = store.find(&args.which)?;
    let start = Instant::now();
    let bytes = bytes_of(&store, id)?;
    let verify = || store.verify(id);
    let (capsule, bytes) = watch(&store, Progress::new(args.json), "checking", bytes, verify)?;
    let time = ms(start.elapsed());
    if args.json {
        return output::json(&json!({
            "id": id.to_string(), "whole": true, "bytes": bytes, "position": capsule.position(),
            "ms": time,
        }));
    }
    let (bytes, position) = (output::bytes(bytes), capsule.position());
    output::line(format!(
        "{}: whole, {bytes} checked in {} ms, position {position}",
        args.which,
        figure(time)
    ))
}

pub(crate) fn export(args: &StoreExportArgs) -> anyhow::Result<()> {
    let store = open_read_only(&args.store)?;
    let id = store.find(&args.which)?;
    let bytes = bytes_of(&store, id)?;
    let export = || store.export(id, &args.file);
    let bytes = watch(&store, Progress::new(args.json), "exporting", bytes, export)?;
    let path = args.file.display();
    if args.json {
        return output::json(&json!({ "file": path.to_string(), "bytes": bytes }));
    }
    output::line(format!("wrote {path} ({}): the whole chain", output::bytes(bytes)))
}

pub(crate) fn import(args: &StoreImportArgs) -> anyhow::Result<()> {
    let store = open(&args.store)?;
    let name = args.name.as_deref().map(|name| (name, Expected::Anything));
    let bytes = std::fs::metadata(&args.file).map_or(1, |file| file.len());
    let import = || store.import(&args.file, name);
    let saved = watch(&store, Progress::new(args.json), "importing", bytes, import)?;
    tell(args.json, &saved, args.name.as_deref())
}

/// What was saved: id, bytes written and shared.
pub(crate) fn tell(json: bool, saved: &Saved, name: Option<&str>) -> anyhow::Result<()> {
    if json {
        return output::json(&json!({
            "id": saved.id.to_string(), "name": name,
            "written_bytes": saved.written, "shared_bytes": saved.shared,
        }));
    }
    output::line(format!("{} {}", saved.id, saved_text(name.unwrap_or("it"), saved)))
}

pub(crate) fn remove(args: &StoreOneArgs) -> anyhow::Result<()> {
    let store = open(&args.store)?;
    let id = store.find(&args.which)?;
    let heads = store.store().heads()?.0;
    let names = heads.iter().filter(|head| head.capsule == id).map(|head| head.name.as_str());
    let (called, others): (Vec<&str>, Vec<&str>) = names.partition(|name| *name == args.which);
    if !called.is_empty() && !others.is_empty() {
        // Equal states are one capsule: what is asked for is one of its names.
        store.store().remove_head(&args.which)?;
        if args.json {
            return output::json(&json!({
                "id": id.to_string(), "removed": false, "removed_name": args.which, "names": others,
            }));
        }
        return output::line(format!(
            "removed the name '{}'; the capsule {} stays, which is also called {}",
            args.which,
            short(id),
            others.join(", ")
        ));
    }
    let removed = store.remove(id)?;
    if args.json {
        return output::json(&json!({ "id": id.to_string(), "removed": removed }));
    }
    output::line(format!(
        "removed {}; what others share stays, `ampoule capsule gc` frees the rest",
        short(id)
    ))
}

pub(crate) fn gc(args: &StoreOnlyArgs) -> anyhow::Result<()> {
    let report = open(&args.store)?.gc()?;
    let amount = |a: ampoule::store::Amount| json!({ "objects": a.objects, "bytes": a.bytes });
    if args.json {
        return output::json(&json!({
            "deleted": amount(report.deleted), "condemned": amount(report.condemned),
            "kept": amount(report.kept),
        }));
    }
    let text =
        |a: ampoule::store::Amount| format!("{} objects, {}", a.objects, output::bytes(a.bytes));
    output::line(format!("deleted    {}", text(report.deleted)))?;
    output::line(format!(
        "condemned  {} (deleted by a gc after the store's grace, for those still reading)",
        text(report.condemned)
    ))?;
    output::line(format!("in use     {}", text(report.kept)))
}

pub(crate) fn fsck(args: &StoreOnlyArgs) -> anyhow::Result<()> {
    let store = open_read_only(&args.store)?;
    let bytes = store.store().stored_bytes()?;
    let report = watch(&store, Progress::new(args.json), "checking", bytes, || store.fsck())?;
    if args.json {
        let problems: Vec<Value> = report
            .problems
            .iter()
            .map(|p| {
                let capsules: Vec<String> = p.capsules.iter().map(ToString::to_string).collect();
                json!({ "problem": p.damaged.to_string(), "capsules": capsules })
            })
            .collect();
        output::json(&json!({
            "sound": report.sound.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "problems": problems, "objects": report.objects, "state_bytes": report.state_bytes,
            "garbage_objects": report.garbage,
        }))?;
    } else {
        for problem in &report.problems {
            let lost: Vec<String> = problem.capsules.iter().map(|id| short(*id)).collect();
            let lost = if lost.is_empty() { "nothing".to_owned() } else { lost.join(", ") };
            output::line(format!("{}; lost with it: {lost}", problem.damaged))?;
        }
        output::line(format!(
            "{} capsules are whole; {} objects, {} checked; {} objects are garbage",
            report.sound.len(),
            report.objects,
            output::bytes(report.state_bytes),
            report.garbage
        ))?;
    }
    if report.is_clean() { Ok(()) } else { Err(Failed.into()) }
}
