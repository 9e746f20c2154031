//! `ampoule doctor`: what this machine is.

use ampoule::{Ampoule, Device, LoadOptions};
use serde::Serialize;

use crate::args::{DoctorArgs, GlobalArgs};
use crate::hardware::{Bandwidth, Hardware, cpu_features, memory, nvidia_driver};
use crate::models;
use crate::output::{self, Progress, figure};

#[derive(Debug, Serialize)]
struct Doctor {
    version: &'static str,
    hardware: Hardware,
    memory_available_bytes: Option<u64>,
    cpu_features: Vec<Feature>,
    bandwidth: Bandwidth,
    devices: Vec<DeviceReport>,
    /// The version of NVIDIA's kernel driver.
    nvidia_driver: Option<String>,
    gpus: Vec<Gpu>,
    /// Part of this program.
    built_in_models: Vec<&'static str>,
    model_folders: Vec<Folder>,
}

#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    there: bool,
}

#[derive(Debug, Serialize)]
struct DeviceReport {
    /// What --device calls it.
    device: &'static str,
    there: bool,
    /// Why it is not there, or is not a GPU.
    reason: Option<String>,
    backend: Option<&'static str>,
    /// Devices of one class give the same bits.
    class: Option<String>,
    kernels: Option<String>,
    description: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    name: String,
    /// Compute capability.
    capability: String,
    multiprocessors: usize,
    memory_bytes: u64,
    /// Of the first GPU: reading, copying (bytes read and written), and both ways over the link.
    read_gb_s: Option<f64>,
    copy_gb_s: Option<f64>,
    to_host_gb_s: Option<f64>,
    from_host_gb_s: Option<f64>,
}

/// The GPUs; the first one is measured.
fn gpus() -> Vec<Gpu> {
    let found = Ampoule::gpus().unwrap_or_default();
    let measured = if found.is_empty() { None } else { Ampoule::gpu_bandwidth().ok() };
    let gpu = |(i, g): (usize, ampoule::GpuInfo)| {
        let b = measured.filter(|_| i == 0);
        Gpu {
            capability: format!("{}.{}", g.capability.0, g.capability.1),
            name: g.name,
            multiprocessors: g.multiprocessors,
            memory_bytes: g.memory,
            read_gb_s: b.map(|b| b.read_gb_s),
            copy_gb_s: b.map(|b| b.copy_gb_s),
            to_host_gb_s: b.map(|b| b.to_host_gb_s),
            from_host_gb_s: b.map(|b| b.from_host_gb_s),
        }
    };
    found.into_iter().enumerate().map(gpu).collect()
}

#[derive(Debug, Serialize)]
struct Folder {
    path: String,
    there: bool,
    models: Vec<String>,
}

pub(crate) fn run(args: &DoctorArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let device = |(name, device)| {
        let options = LoadOptions { device, threads: global.threads, ..LoadOptions::default() };
        let info = Ampoule::device_info(&options);
        DeviceReport {
            device: name,
            there: info.is_ok(),
            reason: info.as_ref().err().map(|e| output::one_line(&anyhow::anyhow!("{e}"))),
            backend: info.as_ref().ok().map(|i| i.backend),
            class: info.as_ref().ok().map(|i| i.class.clone()),
            kernels: info.as_ref().ok().map(|i| i.kernels.clone()),
            description: info.ok().map(|i| i.description),
        }
    };
    let devices = [
        ("auto", Device::Auto),
        ("cpu", Device::Cpu),
        ("cuda", Device::Cuda),
        ("reference", Device::Reference),
    ];
    let mut devices: Vec<DeviceReport> = devices.into_iter().map(device).collect();
    let no_gpu = devices.iter().find(|d| d.device == "cuda").and_then(|d| d.reason.clone());
    if let Some(auto) = devices.iter_mut().find(|d| d.device == "auto" && d.backend == Some("cpu"))
    {
        auto.reason = no_gpu;
    }
    let features = cpu_features().into_iter().map(|(name, there)| Feature { name, there });
    let doctor = Doctor {
        version: env!("CARGO_PKG_VERSION"),
        hardware: Hardware::here(),
        memory_available_bytes: memory("MemAvailable"),
        cpu_features: features.collect(),
        bandwidth: Bandwidth::measure(global.threads, Progress::new(args.json)),
        devices,
        nvidia_driver: nvidia_driver(),
        gpus: gpus(),
        built_in_models: if cfg!(feature = "nano") { vec![ampoule::NANO] } else { Vec::new() },
        model_folders: models::folders().iter().map(|f| folder(f)).collect(),
    };
    if args.json {
        return output::json(&doctor);
    }
    let Hardware { cpu, cores, memory_bytes, arch, os } = &doctor.hardware;
    output::line(format!("ampoule    {} ({arch} {os})", doctor.version))?;
    output::line(format!("cpu        {cpu}, {cores} cores"))?;
    let has = |there| {
        let names = doctor.cpu_features.iter().filter(|f| f.there == there).map(|f| f.name);
        let names: Vec<_> = names.collect();
        if names.is_empty() { "none".to_owned() } else { names.join(" ") }
    };
    output::line(format!("features   {}", has(true)))?;
    output::line(format!("missing    {}", has(false)))?;
    let size = |n: Option<u64>| n.map_or_else(|| "unknown".to_owned(), output::bytes);
    let available = size(doctor.memory_available_bytes);
    output::line(format!("memory     {}, {available} available", size(*memory_bytes)))?;
    let b = &doctor.bandwidth;
    output::line(format!(
        "bandwidth  read {} GB/s with {} threads, {} with one; copy {} GB/s with one",
        figure(b.read_gb_s),
        b.threads,
        figure(b.read_one_thread_gb_s),
        figure(b.copy_gb_s)
    ))?;
    for d in &doctor.devices {
        let text = |t: &Option<String>| t.clone().unwrap_or_default();
        let what = if d.there {
            let not = d.reason.as_ref().map(|r| format!("; not cuda: {r}")).unwrap_or_default();
            format!("{} [{}; {}]{not}", text(&d.description), text(&d.class), text(&d.kernels))
        } else {
            format!("not there: {}", text(&d.reason))
        };
        output::line(format!("device     {:<9} {what}", d.device))?;
    }
    if let Some(version) = &doctor.nvidia_driver {
        output::line(format!("driver     NVIDIA {version}"))?;
    }
    for (number, g) in doctor.gpus.iter().enumerate() {
        let memory = output::bytes(g.memory_bytes);
        let what = format!(
            "{}, sm {}, {} multiprocessors, {memory}",
            g.name, g.capability, g.multiprocessors
        );
        let speed = |v: Option<f64>| v.map_or_else(|| "not measured".to_owned(), figure);
        output::line(format!(
            "gpu {number}      {what}; GB/s: read {}, copy {} (read and written), to host {}, from host {}",
            speed(g.read_gb_s),
            speed(g.copy_gb_s),
            speed(g.to_host_gb_s),
            speed(g.from_host_gb_s)
        ))?;
    }
    for name in &doctor.built_in_models {
        output::line(format!("models     in this program: {name}"))?;
    }
    for f in &doctor.model_folders {
        let what = match (f.there, f.models.is_empty()) {
            (false, _) => "not there".to_owned(),
            (true, true) => "no models".to_owned(),
            (true, false) => f.models.join(", "),
        };
        output::line(format!("models     {}: {what}", f.path))?;
    }
    Ok(())
}

fn folder(path: &std::path::Path) -> Folder {
    let entries = std::fs::read_dir(path);
    let there = entries.is_ok();
    let mut models: Vec<String> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let is_model = entry.path().extension().is_some_and(|e| e == "gguf")
                || entry.path().join("config.json").exists();
            is_model.then_some(name)
        })
        .collect();
    models.sort();
    Folder { path: path.display().to_string(), there, models }
}
