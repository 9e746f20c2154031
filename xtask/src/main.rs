//! Project chores: `cargo xtask check-deps` holds the dependency arrows of ARCHITECTURE.md.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use serde_json::Value;

/// What each crate of ours may depend on among our crates (dev-dependencies are free).
///
/// A crate that is not listed fails the check, so a new one must say where it stands.
const ARROWS: &[(&str, &[&str])] = &[
    ("ampoule-plan", &[]),
    ("ampoule-backend", &["ampoule-plan"]),
    ("ampoule-capsule", &["ampoule-plan"]),
    ("ampoule-engine", &["ampoule-plan", "ampoule-backend", "ampoule-capsule"]),
    ("ampoule-reference", &["ampoule-plan", "ampoule-backend"]),
    ("ampoule-cpu", &["ampoule-plan", "ampoule-backend"]),
    ("ampoule-cuda", &["ampoule-plan", "ampoule-backend"]),
    ("ampoule-models", &["ampoule-plan"]),
    ("ampoule-store", &["ampoule-capsule"]),
    (
        "ampoule",
        &[
            "ampoule-plan",
            "ampoule-backend",
            "ampoule-capsule",
            "ampoule-engine",
            "ampoule-reference",
            "ampoule-cpu",
            "ampoule-cuda",
            "ampoule-models",
            "ampoule-store",
        ],
    ),
    ("ampoule-cli", &["ampoule"]),
    ("ampoule-server", &["ampoule"]),
    (
        "ampoule-conformance",
        &[
            "ampoule",
            "ampoule-plan",
            "ampoule-backend",
            "ampoule-capsule",
            "ampoule-engine",
            "ampoule-reference",
            "ampoule-cpu",
            "ampoule-cuda",
            "ampoule-models",
        ],
    ),
    ("xtask", &[]),
];

/// External crates that may not appear below the doors.
const NOT_IN_CORE: &[&str] = &["tokio", "cudarc", "anyhow", "clap"];
const CORE: &[&str] = &["ampoule-plan", "ampoule-backend", "ampoule-capsule", "ampoule-engine"];

fn main() -> ExitCode {
    let result = match std::env::args().nth(1).as_deref() {
        Some("check-deps") => check_deps(),
        _ => Err(anyhow::anyhow!("usage: cargo xtask check-deps")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check_deps() -> anyhow::Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo).args(["metadata", "--format-version=1", "--no-deps"]).output()?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata is not JSON")?;
    let arrows: BTreeMap<&str, BTreeSet<&str>> =
        ARROWS.iter().map(|(name, allowed)| (*name, allowed.iter().copied().collect())).collect();
    let packages = metadata["packages"].as_array().context("no packages")?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        let Some(allowed) = arrows.get(name) else {
            wrong.push(format!("{name} has no place in the arrows: add it to xtask and ARCHITECTURE.md"));
            continue;
        };
        let dependencies = package["dependencies"].as_array().context("no dependencies")?;
        for dependency in dependencies.iter().filter(|d| d["kind"].as_str() != Some("dev")) {
            let target = dependency["name"].as_str().context("a dependency without a name")?;
            if ours.contains(target) && !allowed.contains(target) {
                wrong.push(format!("{name} -> {target} is not an arrow of ARCHITECTURE.md"));
            }
            if CORE.contains(&name) && NOT_IN_CORE.contains(&target) {
                wrong.push(format!("{name} -> {target}: core has no I/O, no runtime, no CUDA"));
            }
        }
    }
    if !wrong.is_empty() {
        bail!("dependency arrows:\n  {}", wrong.join("\n  "));
    }
    println!("dependency arrows hold for {} crates", ours.len());
    Ok(())
}
