//! `ampoule serve`.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use ampoule_server::{Config, key_digest};
use anyhow::{Context, ensure};

use super::load;
use crate::args::{GlobalArgs, ServeArgs};
use crate::models::ModelRef;
use crate::output::{self, Progress};

/// The environment variable with API keys, separated by commas.
const KEYS_VARIABLE: &str = "AMPOULE_API_KEYS";

fn keys(args: &ServeArgs) -> anyhow::Result<Vec<[u8; 32]>> {
    let text = match &args.api_key_file {
        Some(path) => {
            if others_read(path) {
                output::note(format!(
                    "{}: others can read these keys; chmod 600 it",
                    path.display()
                ));
            }
            std::fs::read_to_string(path)
                .with_context(|| format!("{}: cannot be read", path.display()))?
        }
        None => std::env::var(KEYS_VARIABLE).unwrap_or_default(),
    };
    let given = args.api_key_file.is_some() || std::env::var_os(KEYS_VARIABLE).is_some();
    // One a line or between commas; a line that begins with '#' is a comment.
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let keys: Vec<&str> =
        lines.flat_map(|line| line.split(',')).map(str::trim).filter(|k| !k.is_empty()).collect();
    ensure!(
        !given || !keys.is_empty(),
        "there are no API keys where they should be: nobody could ask"
    );
    ensure!(
        keys.iter().all(|k| k.len() >= 8),
        "an API key has fewer than 8 characters: use longer ones in {KEYS_VARIABLE} or --api-key-file"
    );
    Ok(keys.into_iter().map(key_digest).collect())
}

/// Whether users other than the owner may read a file.
#[cfg(unix)]
fn others_read(path: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o044 != 0)
}

#[cfg(not(unix))]
const fn others_read(_: &std::path::Path) -> bool {
    false
}

/// What clients call the model: the name it was asked for by, or a file's name without its ending.
fn name(model: &ModelRef) -> String {
    let path = std::path::Path::new(&model.0);
    if !path.exists() {
        return model.0.clone();
    }
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.map_or_else(|| model.0.clone(), |n| n.to_string_lossy().into_owned())
}

/// Loads the model and serves it until a signal ends it.
pub(crate) fn run(args: &ServeArgs, global: &GlobalArgs) -> anyhow::Result<()> {
    let keys = keys(args)?;
    if keys.is_empty() && !args.host.is_loopback() {
        ensure!(
            args.without_keys,
            "other machines reach {} and there are no API keys: set AMPOULE_API_KEYS or --api-key-file, \
             or say --without-keys if whoever reaches it may use it",
            args.host
        );
        output::note("there are no API keys: whoever reaches this address may use it");
    }
    let store = match &args.store.store {
        Some(place) => Some((place.clone(), super::store::options(&args.store)?)),
        None => None,
    };
    let slots = global.slots;
    // One more, for the verbs of the native API.
    let more = GlobalArgs { slots: slots + 1, ..global.clone() };
    let model = load(&args.model.model, &more, None, Progress::new(false))?;
    let config = Config {
        address: SocketAddr::new(args.host, args.port),
        model_name: Some(args.model_name.clone().unwrap_or_else(|| name(&args.model.model))),
        slots,
        queue: args.queue,
        body_bytes: args.body_mib << 20,
        deadline: Duration::from_secs(args.deadline.max(1)),
        keys,
        cors: args.cors.clone(),
        caching: !args.no_capsules,
        host_capsule_bytes: args.host_capsule_mib.saturating_mul(1 << 20),
        store,
        warm: args.warm.clone(),
        ..Config::default()
    };
    if args.log {
        log::install();
    }
    let server = ampoule_server::serve(model, config, true)?;
    for words in server.notes() {
        output::note(words);
    }
    let address = server.address();
    if let Some(path) = &args.port_file {
        ampoule::write_atomically(path, |out| {
            let text = format!("{address}\n");
            let failed =
                |source| ampoule::Error::Io { path: path.clone(), action: "write", source };
            out.write_all(text.as_bytes()).map_err(failed)
        })?;
    }
    output::line(format!("listening on http://{address}"))?;
    std::io::stdout().flush()?;
    server.wait()?;
    Ok(())
}

/// Events as lines on standard error.
mod log {
    use std::fmt::Write;

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Level, Metadata, Subscriber};

    struct Lines;

    #[derive(Default)]
    struct Text(String);

    impl Visit for Text {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            let _ = match field.name() {
                "message" => write!(self.0, " {value:?}"),
                name => write!(self.0, " {name}={value:?}"),
            };
        }
    }

    impl Subscriber for Lines {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            *metadata.level() <= Level::INFO && metadata.target().starts_with("ampoule")
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, event: &Event<'_>) {
            let mut text = Text::default();
            event.record(&mut text);
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let seconds = now.map_or(0.0, |d| d.as_secs_f64());
            eprintln!("{seconds:.3} {}{}", event.metadata().level(), text.0);
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    pub(super) fn install() {
        let _ = tracing::subscriber::set_global_default(Lines);
    }
}
