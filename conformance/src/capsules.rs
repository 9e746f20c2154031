//! The capsule suite: the exactness levels on small models of every family, on any backend, and a check that it can fail.
//!
//! | check | what is done |
//! | --- | --- |
//! | `hybrid` | [`Ampoule::verify`] on random gated delta net and attention, everything but State poisoned between replays |
//! | `hybrid, long texts` | the same with texts that pass through several token buckets and context buckets |
//! | `hybrid, KV f16` and `bf16` | the same with a KV cache of that type |
//! | `golden NAME` | the same on each checkpoint of the Hugging Face goldens |
//! | `llama from GGUF` | the same on a random Llama with weights of every type, and its logits against the reference's |
//! | `every split` | one text cut at every position: capsule, another session through the slot, restore, the rest |
//! | `trees` | random operations on sessions, against engines that copy everything ([`crate::lineage`]) |
//! | `forgotten buffers` | capsules that lack one State buffer, for each of them: the suite must notice |

use std::any::Any;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ampoule::backend::{
    Counters, Frozen, LoadOptions as Memory, Part, Program, Progress, Region, SlotId,
};
use ampoule::{
    Ampoule, Backend, BackendError, BufferId, DType, DeviceInfo, EngineError, EngineOptions, Error,
    LoadOptions, Sealed, VerifyOptions, VerifyReport, WeightSource,
};
use ampoule_reference::ReferenceBackend;

use crate::lineage::{TreeOptions, random_trees};
use crate::{goldens, llama};

const TINY: &str = "random:qwen3.5-tiny";

/// How much of it is done.
#[derive(Clone, Debug)]
pub struct CapsuleOptions {
    /// Trials of `hybrid`; the other verifications have a tenth of them.
    pub trials: usize,
    /// Tokens of `long texts` at most.
    pub long_tokens: usize,
    /// Length of the text of `every split`.
    pub split_tokens: usize,
    /// Operations of `trees`.
    pub operations: usize,
    /// Where the goldens lie; none leaves them out.
    pub goldens: Option<PathBuf>,
    /// Only checks whose name holds this.
    pub filter: String,
}

impl Default for CapsuleOptions {
    fn default() -> Self {
        Self {
            trials: 200,
            long_tokens: 3000,
            split_tokens: 200,
            operations: 10_000,
            goldens: Some(goldens::folder()),
            filter: String::new(),
        }
    }
}

/// What came of one check.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its name.
    pub check: String,
    /// What was compared, or the first difference.
    pub found: Result<String, String>,
    /// How long it took.
    pub seconds: f64,
}

type Check<'a> = Box<dyn Fn() -> Result<String, String> + 'a>;

/// Runs all checks, and tells of each when it is done.
pub fn run(
    backend: &dyn Backend,
    options: &CapsuleOptions,
    observer: &mut dyn FnMut(&Outcome),
) -> Vec<Outcome> {
    let mut checks: Vec<(String, Check<'_>)> = Vec::new();
    let few = options.trials.div_ceil(10);
    let trials =
        |trials, max_tokens| VerifyOptions { trials, max_tokens, ..VerifyOptions::default() };
    let whole = trials(options.trials, 200);
    checks.push(("hybrid".into(), Box::new(move || verify(backend, TINY, &whole, None))));
    let long = trials(few, options.long_tokens);
    checks
        .push(("hybrid, long texts".into(), Box::new(move || verify(backend, TINY, &long, None))));
    for (name, kv) in [("f16", DType::F16), ("bf16", DType::BF16)] {
        let some = trials(few, 160);
        checks.push((
            format!("hybrid, KV {name}"),
            Box::new(move || verify(backend, TINY, &some, Some(kv))),
        ));
    }
    let folder = options.goldens.as_deref();
    let checkpoints = folder.map_or_else(|| Ok(Vec::new()), goldens::checkpoints);
    match checkpoints {
        Err(error) => checks.push(("golden".into(), Box::new(move || Err(error.clone())))),
        Ok(found) => {
            for checkpoint in found {
                let name = checkpoint.file_name().unwrap_or_default().to_string_lossy().to_string();
                let some = VerifyOptions { seed: 7, ..trials(few, 160) };
                checks.push((
                    format!("golden {name}"),
                    Box::new(move || verify(backend, &checkpoint.to_string_lossy(), &some, None)),
                ));
            }
        }
    }
    checks.push(("llama from GGUF".into(), Box::new(move || from_gguf(backend, few))));
    let len = options.split_tokens;
    checks.push(("every split".into(), Box::new(move || every_split(backend, TINY, len))));
    let operations = options.operations;
    checks.push(("trees".into(), Box::new(move || trees(backend, operations))));
    checks.push(("forgotten buffers".into(), Box::new(move || forgotten(backend))));
    checks.retain(|(name, _)| name.contains(&options.filter));
    let mut outcomes = Vec::new();
    for (check, work) in checks {
        let start = Instant::now();
        let found = work();
        let outcome = Outcome { check, found, seconds: start.elapsed().as_secs_f64() };
        observer(&outcome);
        outcomes.push(outcome);
    }
    outcomes
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn load(
    backend: &dyn Backend,
    model: &str,
    context: usize,
    kv_cache: Option<DType>,
) -> Result<Ampoule, Error> {
    let options = LoadOptions { context, kv_cache, ..LoadOptions::default() };
    Ampoule::load_on(backend, model, &options, &mut |_, _| {})
}

/// What a report says: everything compared, or the first difference.
fn judged(report: &VerifyReport) -> Result<String, String> {
    let counts = report.levels.iter().map(|l| format!("{} {}", l.level, l.checks));
    let counts = counts.collect::<Vec<_>>().join(", ");
    let bad = report.levels.iter().find(|l| l.mismatches > 0 || l.checks == 0);
    match bad {
        None => Ok(counts),
        Some(level) => {
            let first = level.first.as_deref().unwrap_or("nothing was compared");
            let (level, mismatches, checks) = (level.level, level.mismatches, level.checks);
            Err(format!("{level}: {mismatches} of {checks} differ, first {first}"))
        }
    }
}

/// [`Ampoule::verify`] with everything but State poisoned between replays.
///
/// # Errors
/// The first difference, or what failed.
pub fn verify(
    backend: &dyn Backend,
    model: &str,
    options: &VerifyOptions,
    kv_cache: Option<DType>,
) -> Result<String, String> {
    let context = (options.max_tokens + 4 * options.decode + 64).next_multiple_of(512);
    let mut model = load(backend, model, context, kv_cache).map_err(words)?;
    model.engine.poison_between_replays(true);
    judged(&model.verify(options, &mut |_, _| {}).map_err(words)?)
}

/// Largest relative Frobenius error of logits against the reference's: of a device that widens weights to bf16 and multiplies
/// in it, and of one that takes them as they are.
const ERROR_BF16: f64 = 4e-2;
const ERROR_F32: f64 = 1e-3;

/// A random Llama from a GGUF file.
///
/// # Errors
/// The first difference, or what failed.
pub fn from_gguf(backend: &dyn Backend, trials: usize) -> Result<String, String> {
    let mut file = tempfile::Builder::new().suffix(".gguf").tempfile().map_err(words)?;
    file.write_all(&llama::gguf(11)).map_err(words)?;
    let path = file.path().to_string_lossy();
    let logits = |backend: &dyn Backend| -> Result<Vec<f32>, Error> {
        let mut model = load(backend, &path, 512, None)?;
        let tokens = ampoule::sample_tokens(&model, 150, 5)?;
        let slot = model.slot_with(&tokens[..100])?;
        let mut all = model.engine.logits(slot)?;
        for &token in &tokens[100..] {
            model.engine.step_forced(slot, token)?;
            all.extend(model.engine.logits(slot)?);
        }
        Ok(all)
    };
    let (got, expected) =
        (logits(backend).map_err(words)?, logits(&ReferenceBackend).map_err(words)?);
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = got.iter().zip(&expected).map(|(a, b)| f64::from(*a) - f64::from(*b));
    let norm = square(&mut expected.iter().map(|v| f64::from(*v)));
    let error = (square(&mut { difference }) / norm).sqrt();
    let most = if backend.info().backend == "cuda" { ERROR_BF16 } else { ERROR_F32 };
    if got.len() != expected.len() || error.is_nan() || error > most {
        return Err(format!("logits are {error:.1e} from the reference's, allowed are {most:.0e}"));
    }
    let options = VerifyOptions { trials, ..VerifyOptions::default() };
    let levels = verify(backend, &path, &options, None)?;
    Ok(format!("logits within {error:.1e} of the reference's, {levels}"))
}

/// Every split point of one text, not a sample of them.
///
/// # Errors
/// The first difference, or what failed.
pub fn every_split(backend: &dyn Backend, model: &str, len: usize) -> Result<String, String> {
    split_everywhere(backend, model, len).map_err(words)?
}

fn split_everywhere(
    backend: &dyn Backend,
    model: &str,
    len: usize,
) -> Result<Result<String, String>, Error> {
    let mut model = load(backend, model, (len + 64).next_multiple_of(512), None)?;
    let tokens = ampoule::sample_tokens(&model, len, 3)?;
    let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let cold = model.slot_with(&tokens)?;
    let cold_logits = bits(model.engine.logits(cold)?);
    let cold_bytes = model.engine.state_bytes(cold)?;
    let warm = model.engine.create_slot()?;
    for split in 1..len {
        model.engine.reset(warm)?;
        model.append(warm, &tokens[..split])?;
        let capsule = model.engine.snapshot(warm)?;
        // Another session passes through the slot.
        model.engine.reset(warm)?;
        model.append(warm, &tokens[len - split..])?;
        model.engine.step(warm)?;
        model.engine.restore(warm, &capsule)?;
        model.append(warm, &tokens[split..])?;
        if bits(model.engine.logits(warm)?) != cold_logits {
            return Ok(Err(format!("logits differ at split {split}")));
        }
        if model.engine.state_bytes(warm)? != cold_bytes {
            return Ok(Err(format!("state differs at split {split}")));
        }
    }
    Ok(Ok(format!("{} splits", len - 1)))
}

/// Random trees of boundaries.
///
/// # Errors
/// The first difference, or what failed.
pub fn trees(backend: &dyn Backend, operations: usize) -> Result<String, String> {
    let options = TreeOptions { operations, ..TreeOptions::default() };
    let load = || {
        let engine = EngineOptions { slots: options.sessions, ..EngineOptions::default() };
        let options = LoadOptions { context: 128, engine, ..LoadOptions::default() };
        Ampoule::load_on(backend, TINY, &options, &mut |_, _| {}).map_err(words)
    };
    let (mut model, mut naive) = (load()?, load()?);
    let report = random_trees(&mut model, &mut naive, &options, &mut |_, _| {}).map_err(words)?;
    if let Some((never, _)) = report.operations.iter().find(|(_, times)| *times == 0) {
        return Err(format!("'{never}' never ran: more operations are needed"));
    }
    let left = report.left_bytes + naive.engine.capsule_bytes().0;
    if left > 0 {
        return Err(format!("{left} bytes of capsules stay behind"));
    }
    Ok(format!("{operations} operations"))
}

/// A backend that loses one State buffer, or none, whenever a capsule is taken.
struct Forgetful<'a> {
    inner: &'a dyn Backend,
    lost: Option<String>,
}

struct ForgetfulProgram {
    inner: Box<dyn Program>,
    lost: Option<BufferId>,
}

/// Frozen state that says it has all regions; where each lies in what was frozen.
struct Stub(Vec<Region>, Arc<dyn Frozen>, Vec<Option<usize>>);

impl Frozen for Stub {
    fn regions(&self) -> &[Region] {
        &self.0
    }
    fn bytes(&self) -> usize {
        self.1.bytes()
    }
    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        match self.2.get(index) {
            Some(Some(inner)) => self.1.read(*inner, into),
            _ => Ok(()),
        }
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Backend for Forgetful<'_> {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }
    fn load(
        &self,
        model: Arc<Sealed>,
        weights: &dyn WeightSource,
        options: Memory,
        progress: Progress<'_>,
    ) -> Result<Box<dyn Program>, BackendError> {
        let lost = self.lost.as_ref().and_then(|name| {
            model.state().iter().copied().find(|&id| model.buffer(id).name == *name)
        });
        let inner = self.inner.load(model, weights, options, progress)?;
        Ok(Box::new(ForgetfulProgram { inner, lost }))
    }
}

impl Program for ForgetfulProgram {
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
        let mut out: Vec<Arc<dyn Frozen>> = Vec::new();
        for part in parts {
            let regions = part.regions;
            let kept: Vec<Region> =
                regions.iter().filter(|r| Some(r.buffer) != self.lost).cloned().collect();
            let inner = self.inner.freeze(slot, &kept)?;
            let map = regions.iter().map(|r| kept.iter().position(|k| k == r)).collect();
            out.push(Arc::new(Stub(regions.to_vec(), inner, map)));
        }
        Ok(out)
    }
    fn thaw(&mut self, slot: SlotId, parts: &[Arc<dyn Frozen>]) -> Result<(), BackendError> {
        let own = |p: &Arc<dyn Frozen>| {
            p.as_any().downcast_ref::<Stub>().map_or_else(|| Arc::clone(p), |s| Arc::clone(&s.1))
        };
        let parts: Vec<_> = parts.iter().map(own).collect();
        self.inner.thaw(slot, &parts)
    }
    fn freeze_bytes(
        &mut self,
        regions: &[Region],
        bytes: &[&[u8]],
    ) -> Result<Arc<dyn Frozen>, BackendError> {
        self.inner.freeze_bytes(regions, bytes)
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
        self.inner.frozen_bytes()
    }
}

/// Verifies a model whose capsules lack the buffer.
fn without(backend: &dyn Backend, lost: Option<String>) -> Result<VerifyReport, Error> {
    let mut model = load(&Forgetful { inner: backend, lost }, TINY, 512, None)?;
    // A slot's own session leaves other bytes in every buffer, so each trial must miss each buffer.
    let options =
        VerifyOptions { trials: 3, max_tokens: 60, decode: 4, ..VerifyOptions::default() };
    model.verify(&options, &mut |_, _| {})
}

/// That the suite misses each State buffer that a capsule lacks.
///
/// # Errors
/// The first that nobody missed, or what failed.
pub fn forgotten(backend: &dyn Backend) -> Result<String, String> {
    let model = load(backend, TINY, 512, None).map_err(words)?;
    let sealed = model.engine.model();
    let names: Vec<String> =
        sealed.state().iter().map(|&id| sealed.buffer(id).name.clone()).collect();
    drop(model);
    let sampler = ["logits", "params", "seed", "counts", "bias_tokens", "bias_values"];
    for kind in ["recurrent", "conv", "kv.key", "kv.value"] {
        if !names.iter().any(|name| name.contains(kind)) {
            return Err(format!("no layer has '{kind}': {names:?}"));
        }
    }
    let whole = sampler.map(|name| format!("sampler.{name}"));
    for name in whole.iter().map(String::as_str).chain(["cursor"]) {
        if !names.iter().any(|known| known == name) {
            return Err(format!("no State buffer is called '{name}': {names:?}"));
        }
    }
    // The machinery of this check loses nothing by itself.
    judged(&without(backend, None).map_err(words)?)?;
    for lost in &names {
        match without(backend, Some(lost.clone())) {
            Ok(report) => {
                let first = report.levels[0].first.as_deref().unwrap_or_default();
                if report.passed() {
                    return Err(format!("nobody missed '{lost}'"));
                }
                if !first.contains(lost.as_str()) {
                    return Err(format!("E1 names another state than '{lost}': {first}"));
                }
            }
            // The engine knows where a slot stands: a state that says otherwise ends the run.
            Err(_) if lost == "cursor" => {}
            // A file without sampler settings holds zeros there, which nobody can have set: import refuses it.
            Err(Error::Engine(EngineError::Sampling { .. })) if lost == "sampler.params" => {}
            Err(error) => return Err(format!("without '{lost}': {error}")),
        }
    }
    Ok(format!("each of {} State buffers is missed", names.len()))
}
