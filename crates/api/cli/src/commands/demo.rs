//! `ampoule demo`: the tour. Every claim is checked as it is shown; the exit code is 1 if one does not hold.

mod script;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use ampoule::{
    Ablation, Ampoule, Capsule, CapsuleFile, Digest, FinishReason, NANO, Reply, ReplyOptions,
    SamplingParams, SlotId,
};
use anyhow::{Context, ensure};
use serde_json::Value;

use self::script::{QUESTIONS, Script};
use super::check::{TOKENS, sentence};
use super::{load, read};
use crate::args::{DemoArgs, GlobalArgs};
use crate::models::ModelRef;
use crate::output::{self, Failed, Progress, Table, figure, ms};

/// Attention and recurrent layers, for models that have attention alone. Without the feature the weights are random.
const HYBRID: &str = if cfg!(feature = "nano") { NANO } else { "random:qwen3.5-tiny" };

pub(crate) fn run(args: &DemoArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let path = args.model.model.resolve_or_fetch()?;
    let progress = Progress::new(false);
    // Two forks beside the stream they come from.
    let global = GlobalArgs { slots: global.slots.max(3), ..global.clone() };
    let start = Instant::now();
    let model = load(&ModelRef(path.clone()), &global, Some(4096), progress)?;
    let mut tour = Tour {
        fast: args.fast,
        progress,
        global,
        path,
        table: Table::new(&["step", "ms", ""]),
        failed: 0,
        model,
    };
    let (name, device) = (tour.model.name().to_owned(), tour.model.engine.device().clone());
    output::line(format!("{name} on {} ({})", device.description, device.class))?;
    tour.time("load the model", ms(start.elapsed()), "");
    tour.walk()?;
    output::line("")?;
    output::put(&tour.table.to_text())?;
    match tour.failed {
        0 => output::line("every claim held"),
        n => {
            output::line(format!("{n} of the claims did NOT hold: see ✗ above"))?;
            Err(Failed.into())
        }
    }
}

struct Tour {
    fast: bool,
    progress: Progress,
    global: GlobalArgs,
    /// What to load the model from, for a second process.
    path: String,
    table: Table,
    failed: usize,
    model: Ampoule,
}

/// What reading a question and answering it gave.
struct Answer {
    /// Milliseconds to the first token, the median of the repetitions.
    ttft: f64,
    /// Bits of the logits after the question.
    logits: Vec<u32>,
    tokens: Vec<u32>,
    text: String,
}

impl Tour {
    fn walk(&mut self) -> anyhow::Result<()> {
        let script = Script::new(&self.model, self.fast)?;
        let slot = self.model.engine.create_slot()?;
        heading("1. A shared prefix is read once and frozen")?;
        let capsule = self.freeze(slot, &script)?;
        heading("2. The same question, cold and from the capsule")?;
        self.compare(slot, &script, &capsule)?;
        heading("3. Two forks of one state")?;
        self.forks(slot, &script, &capsule)?;
        heading("4. Undo")?;
        self.undo(slot)?;
        heading("5. Saved, and loaded by another process")?;
        self.carry(slot, &script, &capsule)?;
        heading("6. What a cache of attention rows alone would give back")?;
        self.ablate(slot, &script, &capsule)
    }

    fn time(&mut self, step: &str, time: f64, remark: &str) {
        self.table.row([step.to_owned(), figure(time), remark.to_owned()]);
    }

    /// Shows a claim, and whether it holds.
    fn claim(&mut self, holds: bool, text: &str) -> anyhow::Result<()> {
        self.failed += usize::from(!holds);
        output::line(format!("  {} {text}", if holds { "✓" } else { "✗" }))
    }

    fn freeze(&mut self, slot: SlotId, script: &Script) -> anyhow::Result<Capsule> {
        let start = Instant::now();
        read(&mut self.model, slot, &script.prefix, self.progress)?;
        let reading = ms(start.elapsed());
        let start = Instant::now();
        let capsule = self.model.engine.snapshot(slot)?;
        self.model.engine.synchronize()?;
        let freezing = ms(start.elapsed());
        let n = script.prefix.len();
        if script.messages > 0 {
            let messages = script.messages;
            output::line(format!("  the prefix: an afternoon with a robot, {messages} messages"))?;
        }
        let bytes = output::bytes((capsule.fixed_bytes() + capsule.row_bytes()) as u64);
        output::line(format!(
            "  read {n} tokens in {} ms; froze {bytes} in {} ms",
            figure(reading),
            figure(freezing)
        ))?;
        self.time("read the prefix", reading, &format!("{n} tokens"));
        self.time("freeze it", freezing, &bytes);
        let again = self.model.engine.snapshot(slot)?;
        self.claim(
            capsule.position() as usize == n,
            &format!("the capsule stands at position {n}"),
        )?;
        let same = again.lineage() == capsule.lineage();
        self.claim(
            same,
            "freezing an unchanged state again copies nothing and is the same capsule",
        )?;
        Ok(capsule)
    }

    fn compare(&mut self, slot: SlotId, script: &Script, capsule: &Capsule) -> anyhow::Result<()> {
        let whole: Vec<u32> = script.prefix.iter().chain(&script.questions[0]).copied().collect();
        let cold = self.answer(slot, None, &whole)?;
        let warm = self.answer(slot, Some(capsule), &script.questions[0])?;
        let ratio = cold.ttft / warm.ttft;
        output::line(format!(
            "  first token: {} ms cold, {} ms restored, {ratio:.1} times faster",
            figure(cold.ttft),
            figure(warm.ttft)
        ))?;
        self.time("first token, cold", cold.ttft, &format!("{} tokens read", whole.len()));
        let read = script.questions[0].len();
        self.time(
            "first token, restored",
            warm.ttft,
            &format!("{read} tokens read, {ratio:.1} x faster"),
        );
        if !warm.text.is_empty() {
            output::line(format!("  user:     {}", quoted(QUESTIONS[0])))?;
            output::line(format!("  cold:     {}", quoted(&cold.text)))?;
            output::line(format!("  restored: {}", quoted(&warm.text)))?;
        }
        output::line(format!(
            "  digest of the logits: {} cold, {} restored",
            digest(&cold.logits),
            digest(&warm.logits)
        ))?;
        let same = cold.logits == warm.logits;
        self.claim(same, &format!("all {} logits are the same bits", cold.logits.len()))?;
        let same = cold.tokens == warm.tokens;
        self.claim(same, &format!("all {} tokens of the reply are the same", warm.tokens.len()))?;
        self.claim(ratio > 1.0, "the restored state answers sooner")?;
        let other = self.answer(slot, Some(capsule), &script.questions[1])?;
        let again = self.answer(slot, Some(capsule), &script.questions[0])?;
        let same = again.tokens == warm.tokens && again.logits == warm.logits;
        self.claim(
            same && other.logits != warm.logits,
            "another question in between leaves no trace: asked again, the answer is the same",
        )
    }

    /// Answers greedily, from a capsule or from nothing.
    fn answer(
        &mut self,
        slot: SlotId,
        from: Option<&Capsule>,
        tokens: &[u32],
    ) -> anyhow::Result<Answer> {
        let mut times = Vec::new();
        for _ in 0..if self.fast { 1 } else { 3 } {
            let engine = &mut self.model.engine;
            // Rows of another session, so that the restore has all of its own to copy.
            engine.reset(slot)?;
            self.model.append(slot, &other(tokens))?;
            self.model.engine.synchronize()?;
            let start = Instant::now();
            match from {
                Some(capsule) => self.model.engine.restore(slot, capsule)?,
                None => self.model.engine.reset(slot)?,
            }
            self.model.append(slot, tokens)?;
            let boundary = self.model.engine.snapshot(slot)?;
            self.model.engine.step(slot)?;
            times.push(ms(start.elapsed()));
            self.model.engine.restore(slot, &boundary)?;
        }
        times.sort_by(f64::total_cmp);
        let logits = self.model.engine.logits(slot)?.into_iter().map(f32::to_bits).collect();
        let (tokens, text) = self.reply(slot)?;
        Ok(Answer { ttft: times[times.len() / 2], logits, tokens, text })
    }

    /// A reply, and its text.
    fn reply(&mut self, slot: SlotId) -> anyhow::Result<(Vec<u32>, String)> {
        let max_tokens = if self.fast { 16 } else { 32 };
        let options = ReplyOptions { max_tokens, ..ReplyOptions::default() };
        let reply = Reply::begin(&mut self.model, slot, &options)?;
        let (tokens, text, reason) = reply.finish(&mut self.model)?;
        ensure!(
            reason != FinishReason::Context,
            "the context is too short for the demo; raise --context"
        );
        Ok((tokens, text))
    }

    fn forks(&mut self, slot: SlotId, script: &Script, capsule: &Capsule) -> anyhow::Result<()> {
        self.model.engine.restore(slot, capsule)?;
        self.model.append(slot, &script.questions[2])?;
        let params = SamplingParams { temperature: 1.0, top_p: 0.95, ..SamplingParams::default() };
        self.model.engine.configure(slot, &params)?;
        let question = self.model.engine.snapshot(slot)?;
        let own = question.fixed_bytes() + question.own_row_bytes();
        let start = Instant::now();
        let forks = self.model.engine.fork(&question, &[Some(1), Some(2)])?;
        self.model.engine.synchronize()?;
        let time = ms(start.elapsed());
        self.time("fork twice", time, "into empty slots");
        let replies = [self.reply(forks[0])?, self.reply(forks[1])?];
        output::line(format!("  forked twice in {} ms; no token was read", figure(time)))?;
        if script.messages > 0 {
            output::line(format!("  user:    {}", quoted(QUESTIONS[2])))?;
        }
        for (name, (_, text)) in ["first: ", "second:"].iter().zip(&replies) {
            if !text.is_empty() {
                output::line(format!("  {name}  {}", quoted(text)))?;
            }
        }
        self.claim(replies[0].0 != replies[1].0, "the two seeds say different things")?;
        self.model.engine.restore(slot, &question)?;
        self.model.engine.reseed(slot, 1)?;
        let again = self.reply(slot)?;
        let same = again.0 == replies[0].0;
        self.claim(same, "the first seed drawn again, beside its siblings, says the same")?;
        let shared = question.row_bytes() - question.own_row_bytes();
        self.claim(
            shared == capsule.row_bytes() && question.own_row_bytes() < question.row_bytes(),
            &format!(
                "the question's capsule holds {} of its own and shares {} with the prefix",
                output::bytes(own as u64),
                output::bytes(shared as u64)
            ),
        )?;
        for fork in forks {
            self.model.engine.drop_slot(fork)?;
        }
        Ok(())
    }

    fn undo(&mut self, slot: SlotId) -> anyhow::Result<()> {
        // The next reply begins here: a rollback to this position keeps that.
        self.model.engine.begin_reply(slot)?;
        let before = self.model.engine.snapshot(slot)?;
        let bytes = self.model.engine.state_bytes(slot)?;
        let said = self.steps(slot)?;
        let start = Instant::now();
        self.model.engine.rollback(slot, before.position())?;
        self.model.engine.synchronize()?;
        let time = ms(start.elapsed());
        self.time("undo", time, &format!("{} tokens taken back", said.len()));
        let text = |tokens: &[u32]| {
            self.model.tokenizer().map_or(String::new(), |t| quoted(&t.decode(tokens)))
        };
        output::line(format!(
            "  took {} tokens back in {} ms: {}",
            said.len(),
            figure(time),
            text(&said)
        ))?;
        let same = self.model.engine.state_bytes(slot)? == bytes;
        let all: usize = bytes.iter().map(|(_, b)| b.len()).sum();
        let all = output::bytes(all as u64);
        self.claim(same, &format!("all {all} of state are the bytes they were"))?;
        let again = self.steps(slot)?;
        if let Ok(tokenizer) = self.model.tokenizer() {
            output::line(format!("  said again: {}", quoted(&tokenizer.decode(&again))))?;
        }
        self.claim(again == said, "and the same tokens follow again")
    }

    /// Tokens past every end.
    fn steps(&mut self, slot: SlotId) -> anyhow::Result<Vec<u32>> {
        (0..24).map(|_| Ok(self.model.engine.step(slot)?)).collect()
    }

    fn carry(&mut self, slot: SlotId, script: &Script, capsule: &Capsule) -> anyhow::Result<()> {
        self.model.engine.restore(slot, capsule)?;
        self.model.append(slot, &script.questions[1])?;
        let begun = Reply::begin(
            &mut self.model,
            slot,
            &ReplyOptions { max_tokens: 0, ..ReplyOptions::default() },
        )?;
        begun.finish(&mut self.model)?;
        let question = self.model.engine.snapshot(slot)?;
        let file = Temporary::new("capsule.ampoule");
        let start = Instant::now();
        let bytes = self.model.save(&question, &file.0)?;
        let time = ms(start.elapsed());
        let bytes = output::bytes(bytes);
        self.time("save to a file", time, &bytes);
        output::line(format!("  saved {bytes} in {} ms, synced to the disk", figure(time)))?;
        let (said, _) = self.reply(slot)?;
        let answer = self.elsewhere(&file.0)?;
        let tokens = answer["tokens"].as_array().context("the other process printed no tokens")?;
        let same = tokens.iter().map(Value::as_u64).eq(said.iter().map(|&t| Some(u64::from(t))));
        let restore = answer["timing"]["restore_ms"].as_f64().unwrap_or_default();
        self.time("load in another process", restore, "checked, restored");
        let cached = answer["cached_tokens"].as_u64();
        self.claim(
            same && !said.is_empty(),
            &format!(
                "another process loaded it in {} ms and said the same {} tokens",
                figure(restore),
                said.len()
            ),
        )?;
        self.claim(
            cached == Some(u64::from(question.position())) && answer["prompt_tokens"] == 0,
            &format!("it read none of the {} tokens again", question.position()),
        )?;
        let mut damaged = std::fs::read(&file.0).context("the capsule cannot be read back")?;
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        self.claim(
            CapsuleFile::parse(&damaged).is_err(),
            "with one bit of it flipped the file is refused",
        )?;
        damaged[middle] ^= 1;
        damaged.pop();
        self.claim(CapsuleFile::parse(&damaged).is_err(), "and so it is with its last byte missing")
    }

    /// Continues a saved state in a process of its own.
    fn elsewhere(&self, file: &Path) -> anyhow::Result<Value> {
        let program = std::env::current_exe().context("this program's own file cannot be found")?;
        let engine = &self.model.engine;
        let (device, context) = (engine.device().backend.parse()?, engine.context());
        let global = GlobalArgs { device, context, slots: 1, ..self.global.clone() };
        let mut command = Command::new(program);
        command.args(["generate", "--json", "--model"]).arg(&self.path).arg("--restore").arg(file);
        command.args(["--max-tokens", if self.fast { "16" } else { "32" }]);
        command.args(global.arguments());
        let output =
            command.stdin(Stdio::null()).output().context("a second process cannot be started")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the second process failed: {}", said.trim());
        serde_json::from_slice(&output.stdout).context("the second process printed no JSON")
    }

    fn ablate(&mut self, slot: SlotId, script: &Script, capsule: &Capsule) -> anyhow::Result<()> {
        let prefix = if self.fast { 96 } else { 300 };
        let own = self.model.ablate(prefix, TOKENS, 1)?;
        if own.recurrent {
            if script.messages > 0 {
                self.without(slot, script, capsule)?;
            }
            self.ablation(&own)?;
        } else {
            output::line(format!(
                "  {} has no recurrent state: its KV cache is all of it",
                own.model
            ))?;
            self.claim(own.passed(), "restored, its greedy tokens are the same")?;
        }
        if own.recurrent {
            return Ok(());
        }
        let global = GlobalArgs { context: 0, ..self.global.clone() };
        let mut hybrid = load(&ModelRef(HYBRID.to_owned()), &global, Some(512), self.progress)?;
        let report = hybrid.ablate(prefix, TOKENS, 1)?;
        self.ablation(&report)
    }

    /// What the model answers where its recurrent state is lost, in words.
    fn without(&mut self, slot: SlotId, script: &Script, capsule: &Capsule) -> anyhow::Result<()> {
        self.model.engine.restore(slot, capsule)?;
        self.model.append(slot, &script.questions[0])?;
        let question = self.model.engine.snapshot(slot)?;
        let (_, whole) = self.reply(slot)?;
        self.model.restore_ablated(slot, &question, Ablation::Zeroed, None)?;
        let (_, zeroed) = self.reply(slot)?;
        output::line(format!("  user:          {}", quoted(QUESTIONS[0])))?;
        output::line(format!("  whole capsule: {}", quoted(&whole)))?;
        output::line(format!("  rows alone:    {}", quoted(&zeroed)))
    }

    fn ablation(&mut self, report: &ampoule::AblationReport) -> anyhow::Result<()> {
        output::line(format!("  {}, after {} tokens:", report.model, report.prefix))?;
        for &(ablation, differ) in &report.differ {
            let holds = match ablation {
                Ablation::Whole => differ == 0,
                Ablation::Zeroed | Ablation::Stale => differ > 0,
            };
            self.claim(holds, &sentence(report, ablation, differ))?;
        }
        Ok(())
    }
}

fn heading(text: &str) -> anyhow::Result<()> {
    output::line(format!("\n{text}"))
}

/// A token of another session.
fn other(tokens: &[u32]) -> [u32; 1] {
    [tokens.last().map_or(0, |t| t ^ 1)]
}

/// The beginning of a digest of logits' bits.
fn digest(bits: &[u32]) -> String {
    let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
    Digest::of(&bytes).to_string()[..16].to_owned()
}

/// One line of a reply.
fn quoted(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let cut: String = line.chars().take(100).collect();
    format!("\"{cut}{}\"", if cut.len() < line.len() { "…" } else { "" })
}

/// A file that is gone afterwards.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("ampoule-demo-{}-{name}", std::process::id())))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
