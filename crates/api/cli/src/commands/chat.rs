//! `ampoule chat`: a conversation in the terminal, one line a message.

use std::io::{self, BufRead, IsTerminal};
use std::path::Path;

use ampoule::{Ampoule, CapsuleStore, FinishReason, SamplingParams};
use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{load, store};
use crate::args::{ChatArgs, GlobalArgs};
use crate::output::{self, Failed, Progress, Table, figure};
use session::{Branch, Session};

mod session;

const HELP: &str = "\
Type a message, or one of these:
  /fork NAME     start a branch here and go on in it
  /switch NAME   go to another branch
  /branches      list the branches
  /undo          take the last turn back
  /retry         answer the last message again, with another seed
  /save FILE     save this branch's state as a capsule; with --store, under a name
  /load FILE     replace this branch by a saved state; with --store, by name or id
  /stats         position, tokens cached and read, bytes, speed
  /help          this text
  /quit          end";

pub(crate) fn run(args: &ChatArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let progress = Progress::new(args.json);
    let one_slot = GlobalArgs { slots: 1, ..global.clone() };
    let mut model = load(&args.model.model, &one_slot, None, progress)?;
    model.tokenizer()?;
    model.template()?;
    let default = SamplingParams { temperature: 0.6, top_p: 0.95, ..SamplingParams::default() };
    let params = args.sampling.over(&default);
    let store = args.store.store.is_some().then(|| store::open(&args.store)).transpose()?;
    let mut session = Session::new(&mut model, args, &params, progress)?;
    for name in &args.warm {
        let store = store.as_ref().context("--warm needs a --store")?;
        let capsule = store::fetch(store, &mut model, name, progress)?;
        session.warm(&model, name, capsule)?;
    }
    let interactive = io::stdin().is_terminal();
    let mut door = Door { model, session, store, json: args.json, interactive };
    door.serve()
}

/// The terminal's side of a session.
struct Door {
    model: Ampoule,
    session: Session,
    /// Where /save and /load go, unless to files.
    store: Option<CapsuleStore>,
    json: bool,
    interactive: bool,
}

enum Next {
    Goes,
    Quits,
}

impl Door {
    /// Takes lines until the end. Where nobody sits there, a line that failed makes the exit code 1.
    fn serve(&mut self) -> anyhow::Result<()> {
        if self.interactive && !self.json {
            output::note(format!("{}; /help lists the commands", self.model.name()));
        }
        let mut failures = 0;
        loop {
            if self.interactive && !self.json {
                output::put(&format!("{}> ", self.session.name))?;
            }
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line);
            if read.context("standard input cannot be read")? == 0 {
                break;
            }
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            match self.take(line) {
                Ok(Next::Goes) => {}
                Ok(Next::Quits) => break,
                Err(error) if error.downcast_ref::<io::Error>().is_some() => return Err(error),
                Err(error) => {
                    failures += 1;
                    self.complain(&error)?;
                }
            }
        }
        if failures > 0 && !self.interactive { Err(Failed.into()) } else { Ok(()) }
    }

    fn complain(&self, error: &anyhow::Error) -> anyhow::Result<()> {
        let message = output::one_line(error);
        if self.json {
            return output::json_line(&json!({ "event": "error", "message": message }));
        }
        output::note(format!("error: {message}"));
        Ok(())
    }

    fn take(&mut self, line: &str) -> anyhow::Result<Next> {
        let Some(command) = line.strip_prefix('/') else {
            self.say(|session, model, show| session.turn(model, line, show))?;
            return Ok(Next::Goes);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let needs = |what: &str| {
            if rest.is_empty() {
                bail!("/{name} needs a {what}")
            }
            Ok(rest)
        };
        match name {
            "quit" | "exit" => return Ok(Next::Quits),
            "help" => self.tell(json!({ "text": HELP }), "help", HELP)?,
            "fork" => {
                self.session.fork(needs("name")?)?;
                let position = self.session.branch().end().position();
                let text = format!("now on {rest}, at position {position}; nothing was copied");
                self.done(name, &text)?;
            }
            "switch" => {
                let time = self.session.switch(&mut self.model, needs("name")?)?;
                let position = self.session.branch().end().position();
                self.done(
                    name,
                    &format!("now on {rest}, at position {position} ({} ms)", figure(time)),
                )?;
            }
            "undo" => {
                let (turn, time) = self.session.undo(&mut self.model)?;
                let position = self.session.branch().end().position();
                let text = format!(
                    "took back \"{}\"; position {position} ({} ms)",
                    short(&turn.user),
                    figure(time)
                );
                self.done(name, &text)?;
            }
            "retry" => {
                if self.session.greedy() && !self.json {
                    output::note("the temperature is 0, so every seed gives the same reply");
                }
                self.say(|session, model, show| session.retry(model, show))?;
            }
            "save" => {
                let path = needs("file")?;
                let end = self.session.branch().end();
                let text = if let Some(store) = &self.store {
                    let progress = Progress::new(self.json);
                    let saved = store::save(store, &self.model, end, path, progress)?;
                    store::saved_text(path, &saved)
                } else {
                    let bytes = self.model.save(end, Path::new(path))?;
                    format!("saved {path} ({})", output::bytes(bytes))
                };
                self.done(name, &text)?;
            }
            "load" => {
                let path = needs("file")?;
                let capsule = match &self.store {
                    Some(store) => {
                        let progress = Progress::new(self.json);
                        store::fetch(store, &mut self.model, path, progress)?
                    }
                    None => self.model.open_capsule(Path::new(path))?,
                };
                let time = self.session.load(&mut self.model, capsule)?;
                let position = self.session.branch().end().position();
                let text = format!(
                    "loaded {rest}, position {position}: nothing is read again ({} ms)",
                    figure(time)
                );
                self.done(name, &text)?;
            }
            "branches" => self.branches()?,
            "stats" => self.stats()?,
            other => bail!("there is no command '/{other}'; /help lists them"),
        }
        Ok(Next::Goes)
    }

    /// Runs a turn, showing its text as it comes.
    fn say(
        &mut self,
        turn: impl FnOnce(
            &mut Session,
            &mut Ampoule,
            &mut dyn FnMut(&str) -> anyhow::Result<()>,
        ) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let shown = !self.json;
        let result = turn(&mut self.session, &mut self.model, &mut |text| {
            if shown { output::put(text) } else { Ok(()) }
        });
        if shown && result.is_ok() {
            output::line("")?;
        }
        result?;
        let cut = self.session.branch().turns.last().map(|turn| turn.finish);
        match cut {
            Some(FinishReason::Length) if !self.json => {
                output::note("(cut off: --max-tokens makes replies longer)");
            }
            Some(FinishReason::Context) if !self.json => {
                output::note(
                    "(cut off: the context is full; /undo some turns, or use a longer --context)",
                );
            }
            _ => {}
        }
        if !self.json {
            return Ok(());
        }
        let branch = &self.session.name;
        let Some(turn) = self.session.branch().turns.last() else { return Ok(()) };
        output::json_line(&json!({
            "event": "reply",
            "branch": branch,
            "text": turn.reply,
            "tokens": turn.tokens,
            "finish_reason": turn.finish,
            "position": turn.end.position(),
            "cached_tokens": turn.advance.cached,
            "read_tokens": turn.advance.read,
            "ttft_ms": turn.ttft_ms,
            "tokens_per_second": turn.tokens_per_second,
        }))
    }

    /// Says that a command is done.
    fn done(&self, event: &str, text: &str) -> anyhow::Result<()> {
        if self.json {
            let position = self.session.branch().end().position();
            return output::json_line(
                &json!({ "event": event, "branch": self.session.name, "position": position }),
            );
        }
        output::note(text);
        Ok(())
    }

    /// Shows what a command was asked to show.
    fn tell(&self, mut value: Value, event: &str, text: &str) -> anyhow::Result<()> {
        if self.json {
            value["event"] = Value::from(event);
            return output::json_line(&value);
        }
        output::line(text.trim_end())
    }

    fn branches(&self) -> anyhow::Result<()> {
        let mut table =
            Table::new(&["branch", "turns", "position", "own rows", "shared rows", "last message"]);
        let mut list = Vec::new();
        for (name, branch) in &self.session.branches {
            let (here, own, shared) = (*name == self.session.name, own(branch), shared(branch));
            let mark = if here { "* " } else { "  " };
            let last = branch.turns.last().map_or(String::new(), |t| short(&t.user));
            let (turns, position) = (branch.turns.len(), branch.end().position());
            list.push(json!({
                "name": name, "current": here, "turns": turns, "position": position,
                "own_row_bytes": own, "shared_row_bytes": shared,
            }));
            table.row([
                format!("{mark}{name}"),
                turns.to_string(),
                position.to_string(),
                output::bytes(own),
                output::bytes(shared),
                last,
            ]);
        }
        self.tell(json!({ "branches": list }), "branches", &table.to_text())
    }

    fn stats(&self) -> anyhow::Result<()> {
        let branch = self.session.branch();
        let end = branch.end();
        let (used, budget) = self.model.engine.capsule_bytes();
        let (own, shared, fixed) = (own(branch), shared(branch), end.fixed_bytes() as u64);
        let last = branch.turns.last();
        let (cached, read) = last.map_or((0, 0), |t| (t.advance.cached, t.advance.read));
        let (ttft, speed) = (last.map(|t| t.ttft_ms), last.and_then(|t| t.tokens_per_second));
        let context = self.model.engine.context();
        let value = json!({
            "branch": self.session.name,
            "position": end.position(),
            "context": context,
            "cached_tokens": cached,
            "read_tokens": read,
            "capsule": { "fixed_bytes": fixed, "own_row_bytes": own, "shared_row_bytes": shared },
            "capsules_bytes": used,
            "capsules_budget_bytes": budget,
            "ttft_ms": ttft,
            "tokens_per_second": speed,
        });
        let figure = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), figure);
        let text = format!(
            "branch     {}, position {} of {context}\nlast turn  {cached} tokens were there, {read} were read; first token after {} ms; {} tokens/s\n\
             capsule    {} fixed, {} rows of its own, {} shared with its ancestors\nall        {} of {}",
            self.session.name,
            end.position(),
            figure(ttft),
            figure(speed),
            output::bytes(fixed),
            output::bytes(own),
            output::bytes(shared),
            output::bytes(used as u64),
            output::bytes(budget as u64),
        );
        self.tell(value, "stats", &text)
    }
}

/// Rows since the boundary before.
fn own(branch: &Branch) -> u64 {
    branch.end().own_row_bytes() as u64
}

/// Rows that the boundaries before hold as well.
fn shared(branch: &Branch) -> u64 {
    branch.end().row_bytes() as u64 - own(branch)
}

/// The beginning of a message.
fn short(text: &str) -> String {
    let mut short: String = text.chars().take(40).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
