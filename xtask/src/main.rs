//! Project chores: `cargo xtask check-deps` holds the dependency arrows of ARCHITECTURE.md, `cargo xtask test` fetches
//! the small test model once and runs every test that needs no GPU.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

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
    ("ampoule-models", &["ampoule-plan", "ampoule-nano"]),
    ("ampoule-nano", &[]),
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
    ("ampoule-cli", &["ampoule", "ampoule-server"]),
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
        Some("test") => test(),
        _ => Err(anyhow::anyhow!(
            "usage: cargo xtask check-deps | cargo xtask test [cargo test options]"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn cargo() -> Command {
    Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
}

/// Fetches the test model unless it is there or its tests are to be skipped, then runs all tests.
fn test() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no repository root")?;
    let options: Vec<String> = std::env::args().skip(2).collect();
    let skip = std::env::var_os("AMPOULE_SKIP_SMOLLM2").is_some()
        || std::env::var_os("AMPOULE_SMOLLM2").is_some();
    if !skip && !root.join("models").join(TEST_MODEL).exists() {
        let status = Command::new(built_program(root, &options)?)
            .args(["fetch", "smollm2"])
            .current_dir(root)
            .env("AMPOULE_MODELS", root.join("models"))
            .status()?;
        if !status.success() {
            bail!(
                "the test model could not be fetched; AMPOULE_SKIP_SMOLLM2=1 runs the tests that do not need it"
            );
        }
    }
    let status = cargo().current_dir(root).args(["test", "--workspace"]).args(options).status()?;
    if !status.success() {
        bail!("tests failed");
    }
    Ok(())
}

/// Builds what the tests need and returns the `ampoule` among it.
///
/// `cargo run --package ampoule-cli` would give the dependencies other features than the tests do, and compile all of
/// them twice.
fn built_program(root: &Path, options: &[String]) -> anyhow::Result<PathBuf> {
    let of_cargo = options.iter().take_while(|option| *option != "--");
    let output = cargo()
        .current_dir(root)
        .args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .args(of_cargo)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("the tests could not be built");
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|built| {
            built["target"]["name"] == "ampoule" && built["target"]["kind"][0] == "bin" && built["profile"]["test"] == false
        })
        .and_then(|built| built["executable"].as_str().map(PathBuf::from))
        .context("these options do not build `ampoule`, which fetches the test model: run `cargo xtask test` once, or set AMPOULE_SKIP_SMOLLM2=1")
}

const TEST_MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn check_deps() -> anyhow::Result<()> {
    let output = cargo().args(["metadata", "--format-version=1", "--no-deps"]).output()?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata is not JSON")?;
    let arrows: BTreeMap<&str, BTreeSet<&str>> =
        ARROWS.iter().map(|(name, allowed)| (*name, allowed.iter().copied().collect())).collect();
    let packages = metadata["packages"].as_array().context("no packages")?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        let Some(allowed) = arrows.get(name) else {
            wrong.push(format!(
                "{name} has no place in the arrows: add it to xtask and ARCHITECTURE.md"
            ));
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
