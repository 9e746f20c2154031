//! Loading a model onto a device.

use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::Arc;

use ampoule_backend::{Backend, BackendError, DeviceInfo, LoadOptions as BackendOptions, StepTime};
use ampoule_cpu::CpuBackend;
use ampoule_cuda::bench::{self, GpuBandwidth, PlainCopy};
use ampoule_cuda::{CudaBackend, GpuInfo};
use ampoule_engine::{Capsule, Engine, EngineOptions, Identity, SlotId};
use ampoule_models::chat::ChatTemplate;
use ampoule_models::decoder::{BuildOptions, Precision};
use ampoule_models::model::ModelFiles;
use ampoule_models::tokenizer::{EncodeOptions, Tokenizer};
use ampoule_plan::{DType, Phase, Sealed};
use ampoule_reference::ReferenceBackend;
use serde_json::{Map, Value};

use crate::{Error, UnknownDevice};

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The fastest device there is.
    #[default]
    Auto,
    /// The CPU's tuned kernels.
    Cpu,
    /// The scalar interpreter.
    Reference,
    /// The first NVIDIA GPU.
    Cuda,
}

/// Steps that [`Ampoule::time_decode`] takes from a position on, at most.
const TIMED_STEPS: usize = 64;

/// What [`Ampoule::time_decode`] measured.
#[derive(Debug)]
pub struct DecodeTimes {
    /// The plans.
    pub sealed: Arc<Sealed>,
    /// Which of them was timed.
    pub plan: usize,
    /// Its launches, each timed beside others of its kind.
    pub steps: Vec<StepTime>,
    /// Milliseconds of the whole step.
    pub step_ms: f64,
    /// Milliseconds a step where so many of them are one launch.
    pub together: Vec<(usize, f64)>,
}

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "reference" => Ok(Self::Reference),
            "cuda" => Ok(Self::Cuda),
            other => Err(UnknownDevice { name: other.to_owned() }),
        }
    }
}

/// How to load a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Where it runs.
    pub device: Device,
    /// Threads of the CPU's kernels; 0 takes all cores. Results do not depend on it.
    pub threads: usize,
    /// Tokens a slot holds; 0 takes the model's own context, at most 8192.
    pub context: usize,
    /// Element type of the KV cache; `None` takes bf16 on a GPU, else f16 for GGUF files and f32 otherwise.
    pub kv_cache: Option<DType>,
    /// Element type of what matrix products read and write; `None` takes bf16 on a GPU, f32 otherwise.
    pub activation: Option<DType>,
    /// Slots, budget and tenant.
    pub engine: EngineOptions,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            threads: 0,
            context: 0,
            kv_cache: None,
            activation: None,
            engine: EngineOptions::default(),
        }
    }
}

/// Context taken where none is asked for, at most.
const DEFAULT_CONTEXT: usize = 8192;
/// Token bucket of prefill on the CPU: large enough to reuse a weight tile, small enough to stop soon.
const CPU_PREFILL: usize = 128;
const CPU_SCORE: usize = 64;
/// Token buckets of prefill on a GPU: a short turn, a message, a page, a chapter.
const GPU_PREFILL: &[usize] = &[32, 128, 512, 2048];
const GPU_SCORE: usize = 128;
/// Context buckets of decode on a GPU: a bucket bounds how many splits of the context attention launches.
const GPU_CONTEXTS: &[usize] = &[1024, 4096, 16_384];

/// A model on a device, ready to run.
pub struct Ampoule {
    /// Slots, prefill, decode and the capsule verbs.
    pub engine: Engine,
    name: String,
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    template: Option<ChatTemplate>,
    fallback: Option<Fallback>,
    trained_context: Option<usize>,
}

/// Why `auto` took the CPU.
struct Fallback {
    reason: String,
    /// Whether there is no NVIDIA driver at all.
    no_driver: bool,
}

/// That the system has the memory for a model in host memory: pages are taken when they are first touched, and by then
/// it is too late to say no.
fn check_memory(model: &Sealed, slots: usize) -> Result<(), Error> {
    let sum = |state: bool| -> u64 {
        let buffers = model.model().buffers.iter().filter(|(_, b)| b.role.is_state() == state);
        buffers.map(|(_, b)| b.bytes() as u64).sum()
    };
    let wanted = sum(true).saturating_mul(slots as u64).saturating_add(sum(false));
    match available_memory() {
        Some(available) if wanted > available => {
            let context = model.model().plans.iter().map(|p| p.key.context).max().unwrap_or(0);
            Err(Error::Memory { slots, context, wanted, available })
        }
        _ => Ok(()),
    }
}

/// Bytes that can be had without swapping, where the system says so.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

impl Ampoule {
    /// Loads [`NANO`](crate::NANO) (feature `nano`), a `.gguf` file, a Hugging Face folder, or `random:NAME`; `progress` is
    /// told bytes done and in all.
    ///
    /// # Errors
    /// If the model cannot be opened or built, the device is missing, or memory is short.
    pub fn load(
        model: &str,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let (backend, fallback) = choose(options)?;
        let loaded = Self::load_on(backend.as_ref(), model, options, progress)?;
        Ok(Self { fallback, ..loaded })
    }

    /// As [`Ampoule::load`], on a backend of the caller's; `options.device` and `options.threads` are ignored.
    ///
    /// # Errors
    /// As [`Ampoule::load`].
    pub fn load_on(
        backend: &dyn Backend,
        model: &str,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let files = ModelFiles::open(model)?;
        let built = files.build(&build_options(&files, options, &backend.info()))?;
        if matches!(backend.info().backend, "cpu" | "reference") {
            check_memory(&built.sealed, options.engine.slots)?;
        }
        let name = files.shape().name.clone();
        let identity =
            Identity { name: name.clone(), weights: built.weights_digest, plan: built.plan_digest };
        let engine = Engine::load(
            backend,
            built.sealed,
            &built.weights,
            &identity,
            &options.engine,
            progress,
        )?;
        let tokenizer = files.tokenizer().cloned();
        let source =
            tokenizer.as_ref().and_then(|t| Some((t.chat_template()?, t.template_variables())));
        let template = source
            .map(|(source, variables)| {
                Ok::<_, Error>(ChatTemplate::new(source)?.with_variables(variables.clone()))
            })
            .transpose()?;
        let trained_context = (!model.starts_with("random:")).then(|| files.shape().context);
        Ok(Self { engine, name, tokenizer, template, fallback: None, trained_context })
    }

    /// The plans of a model, without loading its weights.
    ///
    /// # Errors
    /// If the model cannot be opened or built.
    pub fn plans(model: &str, options: &LoadOptions) -> Result<Arc<Sealed>, Error> {
        let files = ModelFiles::open(model)?;
        let (backend, _) = choose(options)?;
        Ok(files.build(&build_options(&files, options, &backend.info()))?.sealed)
    }

    /// The model's tokenizer, without loading its weights.
    ///
    /// # Errors
    /// If the model cannot be opened or has none.
    pub fn tokenizer_of(model: &str) -> Result<Arc<Tokenizer>, Error> {
        ModelFiles::open(model)?.tokenizer().cloned().ok_or(Error::NoTokenizer)
    }

    /// What the device is that these options name.
    ///
    /// # Errors
    /// If it is not there.
    pub fn device_info(options: &LoadOptions) -> Result<DeviceInfo, Error> {
        Ok(choose(options)?.0.info())
    }

    /// The GPUs that can be used, or a sentence that says why there are none.
    ///
    /// # Errors
    /// If there is no driver or no GPU.
    pub fn gpus() -> Result<Vec<GpuInfo>, BackendError> {
        CudaBackend::gpus()
    }

    /// Whether a load with these options would first compile kernels for the GPU: up to a minute, once.
    pub fn would_compile(options: &LoadOptions) -> bool {
        matches!(options.device, Device::Auto | Device::Cuda)
            && CudaBackend::would_compile(0).unwrap_or(false)
    }

    /// What the memory of the first GPU reaches; takes about a second.
    ///
    /// # Errors
    /// If there is no GPU, or 3 GiB of its memory are not free.
    pub fn gpu_bandwidth() -> Result<GpuBandwidth, BackendError> {
        bench::bandwidth(&CudaBackend::new(0)?)
    }

    /// A copy of `bytes` within the memory of the first GPU, by the driver.
    ///
    /// # Errors
    /// If there is no GPU, or its memory is short.
    pub fn gpu_copy(bytes: usize) -> Result<PlainCopy, BackendError> {
        PlainCopy::new(&CudaBackend::new(0)?, bytes)
    }

    /// Loads a model and times its decode step at a position, launch by launch and as a whole.
    ///
    /// # Errors
    /// If the model cannot be loaded, no decode plan reaches the position, or the backend does not time its launches.
    pub fn time_decode(
        model: &str,
        options: &LoadOptions,
        position: usize,
    ) -> Result<DecodeTimes, Error> {
        let files = ModelFiles::open(model)?;
        let (backend, _) = choose(options)?;
        let built = files.build(&build_options(&files, options, &backend.info()))?;
        let plans = &built.sealed.model().plans;
        let built_context = plans.iter().map(|plan| plan.key.context).max().unwrap_or(0);
        // Steps go on from the position: into the next bucket's plan rather than out of this one's.
        let reaches = |i: &usize| {
            let context = plans[*i].key.context;
            context > position + TIMED_STEPS || context > position && context == built_context
        };
        let plan = (0..plans.len())
            .filter(|&i| plans[i].key.phase == Phase::Decode)
            .filter(reaches)
            .min_by_key(|&i| plans[i].key.context)
            .ok_or(BackendError::NoSuchPlan { plan: position, plans: plans.len() })?;
        let load = BackendOptions { slots: 1, capsule_bytes: 0 };
        let mut program =
            backend.load(Arc::clone(&built.sealed), &built.weights, load, &mut |_, _| {})?;
        let slot = program.create_slot()?;
        let steps = program.time_steps(slot, plan, position as u32)?;
        let mut times = Vec::new();
        for _ in 0..9 {
            // Four in a row: the launch of one hides behind the one before.
            program.synchronize()?;
            let begun = std::time::Instant::now();
            for _ in 0..4 {
                program.run(slot, plan)?;
            }
            program.synchronize()?;
            times.push(begun.elapsed().as_secs_f64() * 1e3 / 4.0);
        }
        times.sort_by(f64::total_cmp);
        let mut together = Vec::new();
        for replays in [1, 2, 4, 8] {
            let each = program.time_together(slot, plan, position as u32, replays)?;
            together.push((replays, each));
        }
        let step_ms = times[times.len() / 2];
        Ok(DecodeTimes { sealed: built.sealed, plan, steps, step_ms, together })
    }

    /// Why [`Device::Auto`] took the CPU and not a GPU; `None` where it took a GPU, or another device was asked for.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_ref().map(|f| f.reason.as_str())
    }

    /// As [`Ampoule::fallback`], but `None` where there is no NVIDIA driver at all: that is no fault, and nobody needs
    /// to be told.
    pub fn gpu_fault(&self) -> Option<&str> {
        self.fallback.as_ref().filter(|f| !f.no_driver).map(|f| f.reason.as_str())
    }

    /// Gives a model without a tokenizer the one of [`Tokenizer::stand_in`], so that it takes text. A model that has one
    /// keeps it.
    ///
    /// # Errors
    /// If its vocabulary is too small.
    pub fn with_stand_in_tokenizer(mut self) -> Result<Self, Error> {
        if self.tokenizer.is_none() {
            let tokenizer = Tokenizer::stand_in(self.engine.vocabulary())?;
            self.template = tokenizer.chat_template().map(ChatTemplate::new).transpose()?;
            self.tokenizer = Some(Arc::new(tokenizer));
        }
        Ok(self)
    }

    /// What the model calls itself.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of the longest text that the model was made for, as its files say; none where its weights are random. A
    /// longer context can be asked for, but what the model says there is likely to be wrong.
    pub const fn trained_context(&self) -> Option<usize> {
        self.trained_context
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If the model has none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>, Error> {
        self.tokenizer.as_ref().ok_or(Error::NoTokenizer)
    }

    /// The chat template.
    ///
    /// # Errors
    /// If the model has none.
    pub fn template(&self) -> Result<&ChatTemplate, Error> {
        self.template.as_ref().ok_or(Error::NoChatTemplate)
    }

    /// Tokens of a raw prompt; special tokens written in it are taken as such.
    ///
    /// # Errors
    /// If the model has no tokenizer or the text cannot be tokenized.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.tokenizer()?.encode(text, EncodeOptions::PROMPT)?)
    }

    /// Tokens of a conversation, by the chat template.
    ///
    /// # Errors
    /// If there is no tokenizer or template, or the template refuses the conversation.
    pub fn encode_chat(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        prompt: bool,
    ) -> Result<Vec<u32>, Error> {
        let text = self.template()?.render(messages, tools, prompt, &Map::new())?;
        Ok(self.tokenizer()?.encode(&text, EncodeOptions::TEMPLATE)?)
    }

    /// Reads tokens into a slot without asking whether to stop.
    ///
    /// # Errors
    /// As [`Engine::append`].
    pub fn append(&mut self, slot: SlotId, tokens: &[u32]) -> Result<(), Error> {
        self.engine.append(slot, tokens, &mut |_| ControlFlow::Continue(()))?;
        Ok(())
    }

    /// A new slot that holds `tokens`.
    ///
    /// # Errors
    /// If no slot is free or the tokens cannot be read; no slot is left behind then.
    pub fn slot_with(&mut self, tokens: &[u32]) -> Result<SlotId, Error> {
        let slot = self.engine.create_slot()?;
        match self.append(slot, tokens) {
            Ok(()) => Ok(slot),
            Err(error) => {
                let _ = self.engine.drop_slot(slot);
                Err(error)
            }
        }
    }

    /// Tokens that end a reply.
    pub fn end_tokens(&self) -> Vec<u32> {
        self.tokenizer.as_ref().map(|t| t.eos_ids().to_vec()).unwrap_or_default()
    }

    /// Saves a capsule; see [`crate::write_atomically`].
    ///
    /// # Errors
    /// If the file cannot be written; an older file of that name is then as it was.
    pub fn save(&self, capsule: &Capsule, path: &std::path::Path) -> Result<u64, Error> {
        crate::files::save(&self.engine, capsule, path)
    }

    /// Loads a capsule from a file, checked before any of it is used.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or does not fit this model and device (the error names what differs).
    pub fn open_capsule(&mut self, path: &std::path::Path) -> Result<Capsule, Error> {
        crate::files::load(&mut self.engine, path)
    }
}

/// The backend that the options name, and why `auto` fell back on the CPU if it did.
///
/// # Errors
/// If a GPU is asked for and cannot be used. `auto` takes the CPU then.
fn choose(options: &LoadOptions) -> Result<(Box<dyn Backend>, Option<Fallback>), Error> {
    let cpu = || Box::new(CpuBackend::new(options.threads));
    Ok(match options.device {
        Device::Cpu => (cpu(), None),
        Device::Reference => (Box::new(ReferenceBackend), None),
        Device::Cuda => (Box::new(CudaBackend::new(0)?), None),
        Device::Auto => match CudaBackend::new(0) {
            Ok(gpu) => (Box::new(gpu), None),
            Err(error) => (cpu(), Some(Fallback::from(&error))),
        },
    })
}

impl From<&BackendError> for Fallback {
    fn from(error: &BackendError) -> Self {
        let no_driver = matches!(error, BackendError::Device { device, problem }
            if device == "NVIDIA driver" && problem.contains("libcuda was not found"));
        Self { reason: error.to_string(), no_driver }
    }
}

fn build_options(files: &ModelFiles, options: &LoadOptions, device: &DeviceInfo) -> BuildOptions {
    let context = match options.context {
        0 => files.shape().context.min(DEFAULT_CONTEXT),
        n => n,
    };
    let gpu = device.backend == "cuda";
    let host_kv = if files.is_gguf() { DType::F16 } else { DType::F32 };
    let precision = Precision {
        activation: options.activation.unwrap_or(if gpu { DType::BF16 } else { DType::F32 }),
        kv_cache: options.kv_cache.unwrap_or(if gpu { DType::BF16 } else { host_kv }),
    };
    let fitting = |buckets: &[usize]| -> Vec<usize> {
        buckets.iter().copied().filter(|&b| b <= context.next_power_of_two()).collect()
    };
    if gpu {
        let prefill = fitting(GPU_PREFILL);
        let prefill = if prefill.is_empty() { vec![GPU_PREFILL[0]] } else { prefill };
        BuildOptions {
            context,
            prefill,
            score: GPU_SCORE,
            decode_contexts: fitting(GPU_CONTEXTS),
            precision,
        }
    } else {
        BuildOptions {
            context,
            prefill: vec![CPU_PREFILL],
            score: CPU_SCORE,
            decode_contexts: Vec::new(),
            precision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert_eq!("auto".parse(), Ok(Device::Auto));
        assert_eq!("cuda".parse(), Ok(Device::Cuda));
        let unknown = "tpu".parse::<Device>().unwrap_err();
        assert!(unknown.to_string().contains("'tpu'"), "{unknown}");
    }

    #[test]
    fn auto_says_why_it_took_the_cpu() {
        let options = LoadOptions { context: 64, ..LoadOptions::default() };
        let load = |options: &LoadOptions| {
            Ampoule::load("random:qwen3.5-tiny", options, &mut |_, _| {}).unwrap()
        };
        let model = load(&options);
        match Ampoule::gpus() {
            Ok(_) if model.engine.device().backend == "cuda" => assert!(model.fallback().is_none()),
            Ok(_) => assert!(model.fallback().is_some() && model.gpu_fault().is_some()),
            Err(error) => {
                let reason = error.to_string();
                assert_eq!(model.fallback(), Some(reason.as_str()));
                // Without a driver that is how things are; with one something is wrong.
                let fault = !reason.contains("there is no NVIDIA driver here");
                assert_eq!(model.gpu_fault().is_some(), fault, "{reason}");
            }
        }
        let model = load(&LoadOptions { device: Device::Cpu, ..options });
        assert!(model.fallback().is_none() && model.gpu_fault().is_none());
    }
}
