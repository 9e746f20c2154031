//! One file per family of commands.

pub(crate) mod capsule;
pub(crate) mod chat;
pub(crate) mod check;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod generate;
pub(crate) mod plan;
pub(crate) mod score;
pub(crate) mod serve;
pub(crate) mod store;
pub(crate) mod tokens;

use std::ops::ControlFlow;

use ampoule::{Ampoule, SlotId};

use crate::args::GlobalArgs;
use crate::models::ModelRef;
use crate::output::{Progress, follow, note};

/// Loads a model, with a bar. A command that needs less than the default context says how much.
pub(crate) fn load(
    model: &ModelRef,
    global: &GlobalArgs,
    enough: Option<usize>,
    progress: Progress,
) -> anyhow::Result<Ampoule> {
    let path = model.resolve()?;
    let options = global.load_options(enough);
    if Ampoule::would_compile(&options) {
        note("compiling kernels for the GPU: up to a minute, once");
    }
    let bar = progress.bytes("loading");
    let loaded = Ampoule::load(&path, &options, &mut follow(&bar));
    bar.finish_and_clear();
    let loaded = loaded?;
    if let Some(fault) = loaded.gpu_fault() {
        note(format!("the GPU is not used, the CPU is: {fault}"));
    }
    for remark in &loaded.engine.device().remarks {
        note(remark);
    }
    if let Some(trained) = loaded.trained_context()
        && loaded.engine.context() > trained
    {
        note(format!(
            "a context of {} tokens is more than the {trained} that {} was made for: what it says beyond them is likely to \
             be wrong",
            loaded.engine.context(),
            loaded.name()
        ));
    }
    Ok(loaded)
}

/// Reads tokens into a slot, with a bar where there are many.
pub(crate) fn read(
    model: &mut Ampoule,
    slot: SlotId,
    tokens: &[u32],
    progress: Progress,
) -> anyhow::Result<()> {
    if tokens.is_empty() {
        return Ok(());
    }
    let shown = tokens.len() > 256;
    let bar = if shown { progress } else { Progress::new(true) }.count(tokens.len(), "reading");
    let read = model.engine.append(slot, tokens, &mut |at| {
        bar.set_position(at.done as u64);
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    read?;
    Ok(model.engine.synchronize()?)
}
