//! Finding capsules by id or name, in memory or in the store. Names that the command line gave in the store can be used over
//! HTTP like those that clients gave, and are neither changed nor deleted there: a server without API keys offers them all;
//! one with keys those of `--warm`, to every key.

use std::sync::Arc;

use ampoule::Capsule;
use ampoule::store::CapsuleId;

use crate::ahead::Ahead;
use crate::app::{App, Caller};
use crate::durable::Durable;
use crate::error::{ApiError, ApiResult};
use crate::named::{About, NamedCapsule, Origin};
use crate::vault::Vault;
use crate::worker::Worker;

/// What a name of the store is called over HTTP, each time the server runs.
pub(crate) fn id_of(name: &str) -> String {
    let digest = blake3::derive_key("ampoule server v1 name of the store", name.as_bytes());
    let hex = blake3::Hash::from_bytes(digest).to_hex();
    format!("cap_{}", hex.get(..32).unwrap_or_default())
}

/// What the store says of a capsule, and the model it is of where that is not the one that is served.
///
/// # Errors
/// If its records cannot be read.
pub(super) fn about(
    worker: &Worker,
    durable: &Durable,
    capsule: CapsuleId,
) -> Result<(About, Option<String>), ampoule::Error> {
    let stored = durable.store().store().capsule(capsule)?;
    let (its, scope) = (&stored.scope, worker.model.engine.chain_scope());
    let fits = (&its.fingerprint, &its.layout, &its.salt)
        == (&scope.fingerprint, &scope.layout, &scope.salt);
    Ok((About::from(&stored), (!fits).then(|| stored.model().to_owned())))
}

/// Notes what names the command line gave in the store, but for those that are known already.
pub(crate) fn fill(worker: &Worker, vault: &Vault, durable: &Durable) {
    for (name, capsule) in durable.given_names() {
        let id = id_of(&name);
        if vault.capsules.has(&id) {
            continue;
        }
        match about(worker, durable, capsule) {
            Ok((about, misfit)) => {
                let named = of_the_store(&name, capsule, Origin::Store, about);
                vault.capsules.add(&id, NamedCapsule { misfit, ..named });
            }
            Err(error) => tracing::warn!(%error, name, "a capsule of the store cannot be read"),
        }
    }
}

/// The tokens of a capsule; of one that is not in memory they are read in the store, if they can be.
pub(super) fn tokens(app: &App, named: &NamedCapsule) -> Option<Vec<u32>> {
    if let Some(capsule) = &named.capsule {
        return Some(capsule.tokens());
    }
    let store = app.vault.durable.as_ref().map(|durable| durable.store().store());
    let (store, id) = store.zip(named.stored)?;
    Some(store.capsule(id).ok()?.tokens())
}

/// A capsule that a caller may use, by its id or name.
pub(super) fn find(app: &App, caller: &Caller, which: &str) -> ApiResult<(String, NamedCapsule)> {
    let missing = |message: String| ApiError { message, ..ApiError::not_found("capsule") };
    if let Some((id, named)) = app.vault.capsules.find(&caller.key, which) {
        return match &named.misfit {
            None => Ok((id, named)),
            Some(model) => Err(missing(format!(
                "the store has this capsule, but it was made by '{model}' with weights, settings or a device that are not those \
                 of the model served here: serve what made it"
            ))),
        };
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
         POST /v1/capsules/import?name=NAME brings one from a file{more}{}",
        app.vault.or_damaged()
    )))
}

/// The state of a capsule that the caller may use, brought to memory if it is not there.
async fn state(app: &Arc<App>, id: String) -> ApiResult<Capsule> {
    let missing = || ApiError::not_found("capsule");
    loop {
        let named = app.vault.capsules.used(&id).ok_or_else(missing)?;
        if let Some(capsule) = named.capsule {
            return Ok(capsule);
        }
        let stored = named.stored.ok_or_else(missing)?;
        let (vault, which) = (Arc::clone(&app.vault), id.clone());
        let ahead = Ahead::read(app, move |_| {
            // While this waited another may have brought it.
            let here = vault.capsules.used(&which).is_none_or(|named| named.capsule.is_some());
            Ok((!here).then_some(stored))
        });
        let Some(ahead) = ahead.await? else { continue };
        let loaded = ahead.load(app).await?;
        // Or deleted it.
        app.vault.capsules.used(&id).ok_or_else(missing)?;
        app.vault.capsules.loaded(&id, &loaded);
        return Ok(loaded);
    }
}

/// As [`find`], and its state.
pub(super) async fn found(
    app: &Arc<App>,
    caller: &Caller,
    which: &str,
) -> ApiResult<(String, Capsule)> {
    let (id, _) = find(app, caller, which)?;
    let capsule = state(app, id.clone()).await?;
    Ok((id, capsule))
}

/// A capsule of the store under its name there, whose state is not in memory.
pub(crate) fn of_the_store(
    name: &str,
    capsule: CapsuleId,
    origin: Origin,
    about: About,
) -> NamedCapsule {
    NamedCapsule {
        key: [0; 32],
        created: 0,
        order: 0,
        name: Some(name.to_owned()),
        parent: None,
        pinned: true,
        origin,
        about,
        capsule: None,
        stored: Some(capsule),
        misfit: None,
    }
}

/// A capsule of the caller's own, which can be changed, whatever model it is of.
pub(super) fn own(app: &App, caller: &Caller, which: &str) -> ApiResult<(String, NamedCapsule)> {
    let known = app.vault.capsules.find(&caller.key, which);
    if let Some(own) = known.filter(|(_, named)| named.is_of(&caller.key)) {
        return Ok(own);
    }
    find(app, caller, which)?;
    Err(ApiError::conflict(
        "the command line gave this name in the store: it can be used here, and is changed there, by \
         `ampoule capsule rm` while no server runs",
    ))
}
