//! The ampoule command.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod commands;
mod conversation;
mod hardware;
mod models;
mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, PlanCommand};
use crate::output::{Failed, Usage};

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|fault| {
        let place = fault.location().map(|at| format!(" ({}:{})", at.file(), at.line()));
        let place = place.unwrap_or_default();
        let message = message(fault.payload()).replace('\n', " ");
        eprintln!("error: an internal fault, please report it: {message}{place}");
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" that go to standard output with code 0; a closed pipe is no matter.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match std::panic::catch_unwind(|| run(cli)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => report(&error),
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Generate(args) => commands::generate::run(&args, global),
        Command::Chat(args) => commands::chat::run(&args, global),
        Command::Logits(args) => commands::score::logits(&args, global),
        Command::Perplexity(args) => commands::score::perplexity(&args, global),
        Command::Tokenize(args) => commands::tokens::tokenize(&args),
        Command::Detokenize(args) => commands::tokens::detokenize(&args),
        Command::Verify(args) => commands::check::verify(&args, global),
        Command::Ablate(args) => commands::check::ablate(&args, global),
        Command::Capsule(command) => commands::capsule::run(command, global),
        Command::Plan(PlanCommand::Print(args)) => commands::plan::print(&args, global),
        Command::Plan(PlanCommand::Check(args)) => commands::plan::check(&args, global),
        Command::Plan(PlanCommand::Roofline(args)) => commands::plan::roofline(&args, global),
        Command::Doctor(args) => commands::doctor::run(&args, global),
        Command::Bench(command) => bench::run(command, global),
        Command::Serve(args) => commands::serve::run(&args, global),
        Command::Demo(args) => commands::demo::run(&args, global),
        Command::Fetch(args) => models::fetch(&args.name).map(|_| ()),
    }
}

/// What a panic says.
fn message(payload: &(dyn std::any::Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}

/// Says what went wrong in one line. Whoever closed the pipe does not want to know.
fn report(error: &anyhow::Error) -> ExitCode {
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        let cause = cause.downcast_ref::<std::io::Error>();
        cause.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(closed) {
        return ExitCode::SUCCESS;
    }
    // A check that failed has said so on standard output already.
    if error.downcast_ref::<Failed>().is_none() {
        eprintln!("error: {}", output::one_line(error));
    }
    ExitCode::from(if error.downcast_ref::<Usage>().is_some() { 2 } else { 1 })
}
