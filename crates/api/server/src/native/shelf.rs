//! Names that the command line gave in the store: they can be used over HTTP like those that clients gave, and are neither
//! changed nor deleted there. A server without API keys offers them all; one with keys those of `--warm`, to every key.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::app::{App, Caller};
use crate::durable::Durable;
use crate::error::{ApiError, ApiResult};
use crate::vault::{NamedCapsule, Origin, Shelved, Vault};
use crate::worker::Worker;

/// A capsule that a caller may use.
pub(super) enum Found {
    /// In memory.
    Here(String, NamedCapsule),
    /// In the store alone.
    Shelf(Arc<Shelved>),
}

impl Found {
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Here(id, _) => id,
            Self::Shelf(shelved) => &shelved.id,
        }
    }
}

/// What a name of the store is called over HTTP, each time the server runs.
pub(crate) fn id_of(name: &str) -> String {
    let digest = blake3::derive_key("ampoule server v1 name of the store", name.as_bytes());
    let hex = blake3::Hash::from_bytes(digest).to_hex();
    format!("cap_{}", hex.get(..32).unwrap_or_default())
}

/// Notes what names the store has.
pub(crate) fn fill(worker: &Worker, vault: &Vault, durable: &Durable) {
    let scope = worker.model.engine.chain_scope();
    let mut shelf = Vec::new();
    for (name, capsule) in durable.given_names() {
        let stored = match durable.store().store().capsule(capsule) {
            Ok(stored) => stored,
            Err(error) => {
                tracing::warn!(%error, name, "a capsule of the store cannot be read");
                continue;
            }
        };
        let its = &stored.scope;
        let fits = (&its.fingerprint, &its.layout, &its.salt)
            == (&scope.fingerprint, &scope.layout, &scope.salt);
        shelf.push(Arc::new(Shelved {
            id: id_of(&name),
            name,
            capsule,
            model: stored.model().to_owned(),
            fits,
            position: stored.position(),
            lineage: stored.lineage().to_string(),
            fixed_bytes: stored.fixed_bytes(),
            own_row_bytes: stored.own_row_bytes(),
            row_bytes: stored.row_bytes(),
        }));
    }
    *vault.shelf() = shelf;
}

pub(super) fn object(shelved: &Shelved) -> Value {
    json!({
        "id": shelved.id, "object": "capsule", "created_at": null, "name": shelved.name, "parent": null,
        "pinned": true, "shared": true, "stored": true, "position": shelved.position, "lineage": shelved.lineage,
        "bytes": { "fixed": shelved.fixed_bytes, "own_rows": shelved.own_row_bytes, "rows": shelved.row_bytes },
    })
}

/// All that a caller may use: what is in memory, oldest first, then what is in the store alone, by name.
pub(super) fn all(app: &App, caller: &Caller) -> Vec<Found> {
    let here = app.vault.capsules(&caller.key);
    let mut out: Vec<Found> = here.into_iter().map(|(id, named)| Found::Here(id, named)).collect();
    if app.config.keys.is_empty() {
        let known: std::collections::HashSet<String> =
            out.iter().map(|found| found.id().to_owned()).collect();
        let shelf = app.vault.shelf();
        let rest = shelf.iter().filter(|shelved| shelved.fits && !known.contains(&shelved.id));
        out.extend(rest.cloned().map(Found::Shelf));
    }
    out
}

/// The tokens of a capsule; those of the store are read there.
pub(super) fn tokens(app: &App, found: &Found) -> Vec<u32> {
    match found {
        Found::Here(_, named) => named.capsule.tokens(),
        Found::Shelf(shelved) => {
            let store = app.vault.durable.as_ref().map(|durable| durable.store().store());
            let stored = store.and_then(|store| store.capsule(shelved.capsule).ok());
            stored.map(|stored| stored.tokens()).unwrap_or_default()
        }
    }
}

/// A capsule that a caller may use, by its id or name.
pub(super) fn find(app: &App, caller: &Caller, which: &str) -> ApiResult<Found> {
    if let Some((id, named)) = app.vault.capsule(&caller.key, which) {
        return Ok(Found::Here(id, named));
    }
    let missing = |message: String| ApiError { message, ..ApiError::not_found("capsule") };
    if app.config.keys.is_empty() {
        let shelf = app.vault.shelf();
        let is = |shelved: &&Arc<Shelved>| shelved.id == which || shelved.name == which;
        match shelf.iter().find(is) {
            Some(shelved) if shelved.fits => return Ok(Found::Shelf(Arc::clone(shelved))),
            Some(shelved) => {
                return Err(missing(format!(
                    "the store has a capsule of this name, but it was made by '{}' with weights, settings or a device that are \
                     not those of the model served here: serve what made it",
                    shelved.model
                )));
            }
            None => {}
        }
    }
    let more = match &app.vault.durable {
        None => "; names of a store are known with --store",
        Some(_) if app.config.keys.is_empty() => "",
        Some(_) => {
            "; names that the command line gave in the store are open to API keys with --warm NAME"
        }
    };
    Err(missing(format!(
        "there is no such capsule, or it belongs to another key or to none: GET /v1/capsules lists yours, with their names, and \
         POST /v1/capsules/import?name=NAME brings one from a file{more}"
    )))
}

/// As [`find`], brought to memory.
pub(super) async fn named(
    app: &Arc<App>,
    caller: &Caller,
    which: &str,
) -> ApiResult<(String, NamedCapsule)> {
    let shelved = match find(app, caller, which)? {
        Found::Here(id, named) => return Ok((id, named)),
        Found::Shelf(shelved) => shelved,
    };
    let (vault, capsule) = (Arc::clone(&app.vault), shelved.capsule);
    let loaded = app
        .call(move |worker| {
            let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
            worker.load(|worker| durable.store().load(&mut worker.model, capsule))
        })
        .await?;
    let named = of_the_store(&shelved.name, loaded, Origin::Store);
    app.vault.add_capsule(&shelved.id, named.clone());
    Ok((shelved.id.clone(), named))
}

/// A capsule of the store under its name there.
pub(crate) fn of_the_store(name: &str, capsule: ampoule::Capsule, origin: Origin) -> NamedCapsule {
    NamedCapsule {
        key: [0; 32],
        created: 0,
        order: 0,
        name: Some(name.to_owned()),
        parent: None,
        pinned: true,
        origin,
        capsule,
    }
}

/// A capsule of the caller's own, which can be changed.
pub(super) fn own(app: &App, caller: &Caller, which: &str) -> ApiResult<(String, NamedCapsule)> {
    match find(app, caller, which)? {
        Found::Here(id, named) if named.is_of(&caller.key) => Ok((id, named)),
        _ => Err(ApiError::conflict(
            "the command line gave this name in the store: it can be used here, and is changed there, by \
             `ampoule capsule rm` while no server runs",
        )),
    }
}
