//! From a loaded model to a server that runs, and to an orderly end.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ampoule::Ampoule;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::Config;
use crate::app::App;
use crate::durable::{Durable, Record};
use crate::memory::Relief;
use crate::metrics::Metrics;
use crate::named::{About, NamedCapsule, Origin};
use crate::prompt::ModelInfo;
use crate::vault::{Limits, Vault};
use crate::worker::{Command, Worker};

/// A reply is cut soon after it was heard or not at all: after that the places to cut it at go before anything else.
const CUT_WITHIN: Duration = Duration::from_secs(60);

/// A capsule that the store has leaves memory before boundaries that would have to be read again, unless it was used lately.
const UNUSED: Duration = Duration::from_secs(60);

/// Boundaries that are parked when the server stops.
const PARKED: usize = 32;

/// The server could not start, or ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The system gave no thread or no runtime.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
    /// The model or the store cannot be used.
    #[error(transparent)]
    Model(#[from] ampoule::Error),
    /// The engine's thread ended.
    #[error("the engine's thread ended; the log has the cause")]
    Engine,
}

/// A server that runs.
pub struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    http: Option<std::thread::JoinHandle<Result<(), ServeError>>>,
    notes: Vec<String>,
}

impl Server {
    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What whoever started it should know, a sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Tells it to stop, and waits until sessions are parked.
    ///
    /// # Errors
    /// If it ended badly.
    pub fn stop(self) -> Result<(), ServeError> {
        let _ = self.stop.send(true);
        self.wait()
    }

    /// Waits until it was told to stop by a signal.
    ///
    /// # Errors
    /// If it ended badly.
    pub fn wait(mut self) -> Result<(), ServeError> {
        match self.http.take().map(std::thread::JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(ServeError::Engine),
            None => Ok(()),
        }
    }
}

/// Serves a model in the background. SIGINT and SIGTERM end it in order if `signals`.
///
/// # Errors
/// If the address cannot be listened on, the store cannot be opened, or the model cannot be used.
pub fn serve(model: Ampoule, config: Config, signals: bool) -> Result<Server, ServeError> {
    let model = model.with_stand_in_tokenizer()?;
    let info = Arc::new(ModelInfo::new(&model, config.model_name.clone())?);
    let metrics = Arc::new(Metrics::default());
    let durable = match &config.store {
        None => None,
        Some((place, options)) => {
            Some(Durable::open(place, options.clone(), Arc::clone(&metrics))?)
        }
    };
    let limits = Limits {
        responses: config.responses,
        sessions: config.sessions.max(1),
        capsules: config.capsules,
    };
    let vault = Arc::new(Vault::new(limits, Arc::clone(&metrics), durable));
    let relieved = Arc::clone(&vault);
    let relieve = Box::new(move |relief| match relief {
        Relief::Idle => {
            relieved.relieve_of_waypoints(CUT_WITHIN) || relieved.capsules.relieve(UNUSED)
        }
        Relief::Waypoints => relieved.relieve_of_waypoints(Duration::ZERO),
        Relief::Any => relieved.relieve(),
    });
    let fingerprint = model.engine.fingerprint().digest().to_string();
    let mut worker = Worker::new(
        model,
        config.slots,
        Arc::clone(&info),
        Arc::clone(&metrics),
        config.host_capsule_bytes,
        relieve,
    )?;
    let notes = bring_back(&mut worker, &vault, &config.warm, &config.keys)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .thread_name("ampoule-http")
        .enable_all()
        .build()?;
    let address = config.address;
    let listen = |source| ServeError::Listen { address, source };
    let listener = runtime.block_on(TcpListener::bind(address)).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let (engine, commands) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("ampoule-engine".to_owned())
        .spawn(move || worker.run(&commands))?;
    let (stop, stopped) = watch::channel(false);
    let grace = config.grace;
    let app = Arc::new(App {
        info,
        metrics,
        vault: Arc::clone(&vault),
        fingerprint: format!("fp_{}", fingerprint.get(..12).unwrap_or(&fingerprint)),
        engine: engine.clone(),
        places: Arc::new(Semaphore::new(config.queue)),
        readers: Arc::new(Semaphore::new(crate::ahead::READERS)),
        stopping: AtomicBool::new(false),
        requests: AtomicU64::new(0),
        config,
    });
    let told = stop.clone();
    let http = std::thread::Builder::new().name("ampoule-serve".to_owned()).spawn(move || {
        let served = runtime.block_on(async {
            if signals {
                tokio::spawn(async move {
                    signal().await;
                    let _ = told.send(true);
                });
            }
            let (app, mut stopped) = (Arc::clone(&app), stopped);
            let mut watched = stopped.clone();
            let watcher = Arc::clone(&app);
            tokio::spawn(async move {
                let _ = watched.wait_for(|stop| *stop).await;
                watcher.stopping.store(true, Ordering::Relaxed);
            });
            stopped.mark_unchanged();
            tokio::spawn(crate::native::expire(Arc::clone(&app)));
            crate::http::serve(app, listener, stopped, grace).await
        });
        let _ = engine.send(Command::Stop);
        let ended = thread.join();
        runtime.shutdown_timeout(Duration::from_secs(1));
        let worker = ended.map_err(|_| ServeError::Engine)?;
        park(&worker, &vault);
        served.map_err(ServeError::from)
    })?;
    Ok(Server { address, stop, http: Some(http), notes })
}

async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// What the store has: responses and sessions, capsules asked for, boundaries parked.
fn bring_back(
    worker: &mut Worker,
    vault: &Vault,
    warm: &[String],
    keys: &[[u8; 32]],
) -> Result<Vec<String>, ServeError> {
    let Some(durable) = &vault.durable else {
        return match warm.first() {
            Some(_) => Err(ServeError::System(std::io::Error::other("--warm needs --store"))),
            None => Ok(Vec::new()),
        };
    };
    for name in warm {
        let id = durable.store().find(name)?;
        let loaded = worker.load(|worker| durable.store().load(&mut worker.model, id));
        let capsule = loaded.map_err(|error| std::io::Error::other(error.message))?;
        let tokens = capsule.tokens();
        let everybody = if keys.is_empty() { &[[0; 32]][..] } else { keys };
        for key in everybody {
            worker.cache.keep(&crate::app::space(key, None), &tokens, capsule.clone());
        }
        let about = About::from(&capsule);
        let named = crate::native::of_the_store(name, id, Origin::Warm, about);
        let named = NamedCapsule { capsule: Some(capsule), ..named };
        vault.capsules.add(&crate::native::id_of(name), named);
    }
    if keys.is_empty() {
        crate::native::fill_shelf(worker, vault, durable);
    }
    let (records, unreadable) = durable.records()?;
    crate::responses::bring_back(vault, &records);
    let others = crate::native::bring_back(worker, vault, durable, &records);
    for Record { id, value, .. } in records.iter().filter(|r| r.kind == "boundary") {
        let space = value["space"].as_str().and_then(from_hex);
        let loaded = worker.load(|worker| durable.capsule(&mut worker.model, "boundary", id));
        if let (Some(space), Ok(capsule)) = (space, loaded) {
            let tokens = capsule.tokens();
            worker.cache.keep(&space, &tokens, capsule);
        }
        durable.forget("boundary", id);
    }
    durable.count();
    let mut notes: Vec<String> = unreachable_records(&records, keys).into_iter().collect();
    vault.unreadable.store(unreadable, Ordering::Relaxed);
    if unreadable > 0 {
        notes.push(format!(
            "records that are damaged in the store: {unreadable}; `ampoule capsule fsck` names them; no session, response or capsule \
             of theirs is deleted"
        ));
    }
    if others > 0 {
        notes.push(format!(
            "the store has capsules and sessions that only another model, or other settings or another device, can use: {others}"
        ));
    }
    Ok(notes)
}

/// Says what nobody can reach as long as the server asks for these keys.
fn unreachable_records(records: &[Record], keys: &[[u8; 32]]) -> Option<String> {
    let nobody = [0; 32];
    let hidden = |kind: &str| {
        let of = records.iter().filter(|record| record.kind == kind);
        let keys_of = of.filter_map(|record| record.value["key"].as_str().and_then(from_hex));
        keys_of
            .filter(|key| if keys.is_empty() { *key != nobody } else { !keys.contains(key) })
            .count()
    };
    let all = [("sessions", "session"), ("responses", "response"), ("capsules", "capsule")];
    let counted = all.map(|(words, kind)| (words, hidden(kind)));
    let some: Vec<String> = counted
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(words, count)| format!("{words}: {count}"))
        .collect();
    let why = if keys.is_empty() {
        "belongs to API keys, and this server asks for none"
    } else {
        "was made without an API key, or with one that this server does not know"
    };
    (!some.is_empty()).then(|| {
        format!("some of the store {why}, so nobody can reach it now ({})", some.join(", "))
    })
}

/// Saves what a client may come back to.
fn park(worker: &Worker, vault: &Vault) {
    let Some(durable) = &vault.durable else { return };
    for (index, (space, capsule)) in worker.cache.latest(PARKED).into_iter().enumerate() {
        let record = json!({ "space": to_hex(&space) });
        let saved = worker.model.detach(&capsule).and_then(|capsule| {
            durable.save("boundary", &index.to_string(), Some(&capsule), record)
        });
        if let Err(error) = saved {
            tracing::warn!(%error, "a boundary was not parked");
        }
    }
}

pub(crate) fn to_hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_hex().to_string()
}

pub(crate) fn from_hex(text: &str) -> Option<[u8; 32]> {
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}
