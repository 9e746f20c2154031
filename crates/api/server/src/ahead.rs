//! States of the store come to memory: what takes long, reading and checking their bytes, is done beside the engine, which goes
//! on with everybody's tokens.

use std::sync::Arc;

use ampoule::store::CapsuleId;
use ampoule::{Capsule, StoredState};
use tokio::sync::OwnedSemaphorePermit;

use crate::app::{App, blocking};
use crate::durable::Durable;
use crate::error::{ApiError, ApiResult};
use crate::worker::Worker;

/// So many states are read at once; each takes as much of the host's memory as it has bytes, up to [`MOST`].
pub(crate) const READERS: usize = 2;
/// Bytes that are read ahead of one state; what it has more the engine waits for.
const MOST: u64 = 1 << 30;

/// A state that has been read and is not in the engine yet.
pub(crate) struct Ahead {
    state: StoredState,
    /// Until the bytes are gone.
    _turn: OwnedSemaphorePermit,
}

impl Ahead {
    /// Reads the state of the capsule that `find` finds, so far as the engine lacks it.
    ///
    /// # Errors
    /// As [`ampoule::CapsuleStore::load`], but for the memory for capsules.
    pub(crate) async fn read(
        app: &App,
        find: impl FnOnce(&Durable) -> Result<CapsuleId, ampoule::Error> + Send + 'static,
    ) -> ApiResult<Self> {
        let turn = Arc::clone(&app.readers).acquire_owned().await;
        let turn = turn.map_err(|_| ApiError::stopping())?;
        let vault = Arc::clone(&app.vault);
        let begun = blocking(move || {
            let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
            let state = durable.store().begin_load(find(durable)?)?;
            Ok(Self { state, _turn: turn })
        });
        let mut ahead = begun.await?;
        let (lacks, back) =
            app.call(move |worker| Ok((worker.model.lacks(&ahead.state)?, ahead))).await?;
        ahead = back;
        let vault = Arc::clone(&app.vault);
        blocking(move || {
            let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
            durable.store().read_ahead(&mut ahead.state, &lacks, MOST)?;
            Ok(ahead)
        })
        .await
    }

    /// Brings the state into the engine, with old boundaries dropped for it if need be.
    ///
    /// # Errors
    /// As [`Worker::load`].
    pub(crate) fn load(&self, worker: &mut Worker, durable: &Durable) -> ApiResult<Capsule> {
        worker.load(|worker| durable.store().finish_load(&mut worker.model, &self.state))
    }
}
