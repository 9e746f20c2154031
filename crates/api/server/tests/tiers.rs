//! Capsules in two memories: what has no room beside the model lies in the host's, and nothing is read again for it.

mod support;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ampoule::backend::{
    Backend, BackendError, Counters, DeviceInfo, Frozen, LoadOptions, Part, Program, Progress,
    Region, Residence, SlotId,
};
use ampoule::backends::CpuBackend;
use ampoule::plan::{BufferId, Sealed, WeightSource};
use ampoule::{Ampoule, EngineOptions};
use ampoule_server::{Config, Server, serve};
use serde_json::{Value, json};
use support::{TINY, config, get, metric, ok, start};

/// The CPU as a device with a memory of its own, as small as it is told: state must be copied there to be thawed.
struct TwoMemories(CpuBackend);

struct Apart {
    inner: Box<dyn Program>,
    used: Arc<AtomicUsize>,
    budget: usize,
}

/// State in one of the memories.
struct Lies {
    inner: Arc<dyn Frozen>,
    /// What it counts in, on the device.
    used: Option<Arc<AtomicUsize>>,
}

impl Drop for Lies {
    fn drop(&mut self) {
        if let Some(used) = &self.used {
            used.fetch_sub(self.inner.bytes(), Ordering::Relaxed);
        }
    }
}

impl Frozen for Lies {
    fn regions(&self) -> &[Region] {
        self.inner.regions()
    }
    fn bytes(&self) -> usize {
        self.inner.bytes()
    }
    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        self.inner.read(index, into)
    }
    fn residence(&self) -> Residence {
        if self.used.is_some() { Residence::Device } else { Residence::Host }
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn of(frozen: &Arc<dyn Frozen>) -> Result<&Lies, BackendError> {
    frozen.as_any().downcast_ref().ok_or(BackendError::ForeignState)
}

impl Apart {
    fn on_device(&self, inner: Arc<dyn Frozen>) -> Result<Arc<dyn Frozen>, BackendError> {
        let (wanted, used) = (inner.bytes(), self.used.load(Ordering::Relaxed));
        if used + wanted > self.budget {
            return Err(BackendError::CapsuleBudget { wanted, used, budget: self.budget });
        }
        self.used.fetch_add(wanted, Ordering::Relaxed);
        Ok(Arc::new(Lies { inner, used: Some(Arc::clone(&self.used)) }))
    }
}

impl Backend for TwoMemories {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }
    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        let all = LoadOptions { capsule_bytes: 1 << 40, ..options };
        let inner = self.0.load(model, weights, all, progress)?;
        Ok(Box::new(Apart { inner, used: Arc::default(), budget: options.capsule_bytes }))
    }
}

impl Program for Apart {
    fn model(&self) -> &Arc<Sealed> {
        self.inner.model()
    }
    fn create_slot(&mut self) -> Result<SlotId, BackendError> {
        self.inner.create_slot()
    }
    fn drop_slot(&mut self, slot: SlotId) -> Result<(), BackendError> {
        self.inner.drop_slot(slot)
    }
    fn write_input(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), BackendError> {
        self.inner.write_input(buffer, bytes)
    }
    fn run(&mut self, slot: SlotId, plan: usize) -> Result<(), BackendError> {
        self.inner.run(slot, plan)
    }
    fn read_output(
        &mut self,
        buffer: BufferId,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.inner.read_output(buffer, offset, into)
    }
    fn read_state(
        &mut self,
        slot: SlotId,
        region: &Region,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        self.inner.read_state(slot, region, into)
    }
    fn freeze_parts(
        &mut self,
        slot: SlotId,
        parts: &[Part<'_>],
    ) -> Result<Vec<Arc<dyn Frozen>>, BackendError> {
        let parts = self.inner.freeze_parts(slot, parts)?;
        parts.into_iter().map(|inner| self.on_device(inner)).collect()
    }
    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        let here = |part: &Arc<dyn Frozen>| match of(part)? {
            Lies { inner, used: Some(_) } => Ok(Arc::clone(inner)),
            _ => Err(BackendError::ForeignState),
        };
        let parts = parts.iter().map(here).collect::<Result<Vec<_>, _>>()?;
        self.inner.thaw(slot, &parts)
    }
    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let inner = self.inner.freeze_bytes(regions, bytes)?;
        self.on_device(inner)
    }
    fn residence(&self) -> Residence {
        Residence::Device
    }
    fn relocate(
        &mut self,
        frozen: &Arc<dyn Frozen>,
        to: Residence,
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        let inner = Arc::clone(&of(frozen)?.inner);
        match to {
            Residence::Device => self.on_device(inner),
            Residence::Host => Ok(Arc::new(Lies { inner, used: None })),
        }
    }
    fn poison(&mut self) -> Result<(), BackendError> {
        self.inner.poison()
    }
    fn synchronize(&mut self) -> Result<(), BackendError> {
        self.inner.synchronize()
    }
    fn counters(&self) -> Counters {
        self.inner.counters()
    }
    fn frozen_bytes(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.budget)
    }
}

const DEVICE: usize = 200 << 10;

fn start_apart(host: u64) -> Server {
    let config = Config { host_capsule_bytes: host, ..config() };
    let engine = EngineOptions {
        slots: config.slots + 1,
        capsule_bytes: DEVICE,
        ..EngineOptions::default()
    };
    let options = ampoule::LoadOptions { context: 4096, engine, ..ampoule::LoadOptions::default() };
    let backend = TwoMemories(CpuBackend::new(1));
    let model = Ampoule::load_on(&backend, TINY, &options, &mut |_, _| {}).unwrap();
    serve(model, config, false).unwrap()
}

fn tier(server: &Server, of: &str, tier: &str) -> u64 {
    metric(server.address(), &format!("ampoule_capsule_{of}{{tier=\"{tier}\"}}"))
}

#[test]
fn what_has_no_room_on_the_device_comes_back_from_the_host() {
    let (apart, large) = (start_apart(1 << 30), start(config()));
    assert_eq!(tier(&apart, "budget_bytes", "device"), DEVICE as u64);
    assert_eq!(tier(&apart, "budget_bytes", "host"), 1 << 30);
    let mut most = 0;
    for round in 0..15 {
        let text = format!("Round {}. {}", round % 5, "word ".repeat(40 + round % 3));
        let body = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "temperature": 0 });
        let (a, b) = (
            ok(apart.address(), "/v1/chat/completions", &body),
            ok(large.address(), "/v1/chat/completions", &body),
        );
        assert_eq!(a["choices"], b["choices"]);
        assert_eq!(a["usage"], b["usage"], "as much came from capsules");
        let device = tier(&apart, "bytes", "device");
        assert!(device <= DEVICE as u64, "{device}");
        most = most.max(tier(&apart, "bytes", "host"));
    }
    assert!(most > 2 * DEVICE as u64, "{most} bytes at most lay in the host's memory");
    assert_eq!(metric(apart.address(), "ampoule_capsule_evictions_total"), 0);
    assert!(metric(apart.address(), "ampoule_capsule_moves_total") > 0);
    // A session whose state lies there is cut, forked, exported and goes on as it would anywhere.
    let session = |server: &Server| {
        let at = server.address();
        let call = |path: &str, body: &Value| ok(at, path, body);
        let id = call("/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
        let say = json!({ "max_tokens": 70, "temperature": 0, "ignore_eos": true, "seed": 1 });
        call(&format!("/v1/sessions/{id}/append"), &json!({ "text": "In two places." }));
        call(&format!("/v1/sessions/{id}/generate"), &say);
        for n in 0..6 {
            let text = format!("{n} {}", "other ".repeat(30));
            let body =
                json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 4 });
            call("/v1/chat/completions", &body);
        }
        let cut = call(&format!("/v1/sessions/{id}/truncate"), &json!({ "heard_tokens": 50 }));
        assert_eq!(cut["reply_tokens"], 50);
        let fork = call(&format!("/v1/sessions/{id}/fork"), &json!({}))["data"][0]["id"].clone();
        let fork = fork.as_str().unwrap();
        let capsule = call(&format!("/v1/sessions/{fork}/snapshot"), &json!({}))["id"].clone();
        let path = format!("/v1/capsules/{}/export", capsule.as_str().unwrap());
        assert_eq!(get(at, &path).status, 200);
        call(&format!("/v1/sessions/{fork}/generate"), &say)["tokens"].clone()
    };
    assert_eq!(session(&apart), session(&large));
    // The places within that reply made way for others' boundaries, not those for the places.
    let text = format!("Round 0. {}", "word ".repeat(40));
    let body = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "temperature": 0 });
    let again = ok(apart.address(), "/v1/chat/completions", &body);
    assert_eq!(again["usage"], ok(large.address(), "/v1/chat/completions", &body)["usage"]);
    assert_eq!(again["timings"]["prompt_tokens_read"], 0);
    apart.stop().unwrap();
    large.stop().unwrap();
}

#[test]
fn both_memories_are_bounded() {
    let (apart, large) = (start_apart(300 << 10), start(config()));
    for round in 0..12 {
        let text = format!("Round {}. {}", round % 5, "word ".repeat(40 + round));
        let body = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "temperature": 0 });
        let (a, b) = (
            ok(apart.address(), "/v1/chat/completions", &body),
            ok(large.address(), "/v1/chat/completions", &body),
        );
        assert_eq!(a["choices"], b["choices"]);
        assert!(tier(&apart, "bytes", "device") <= DEVICE as u64);
        assert!(tier(&apart, "bytes", "host") <= 300 << 10);
    }
    assert!(metric(apart.address(), "ampoule_capsule_evictions_total") > 0);
    assert!(tier(&apart, "bytes", "host") > 0);
    apart.stop().unwrap();
    large.stop().unwrap();
}
