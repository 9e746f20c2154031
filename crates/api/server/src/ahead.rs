//! States of the store come to memory: what takes long, reading and checking their bytes, is done beside the engine, which goes
//! on with everybody's tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ampoule::store::CapsuleId;
use ampoule::{Capsule, StoredState};
use tokio::sync::OwnedSemaphorePermit;

use crate::app::{App, blocking};
use crate::durable::Durable;
use crate::error::{ApiError, ApiResult};
use crate::memory::lacks_room;
use crate::worker::Worker;

/// So many states are read at once; each takes as much of the host's memory as it has bytes, up to [`MOST`].
pub(crate) const READERS: usize = 2;
/// Bytes that are read ahead of one state; what it has more the engine waits for.
const MOST: u64 = 1 << 30;

/// Reads that were made slower for a test.
static TURNS: AtomicU32 = AtomicU32::new(0);

/// A state that has been read and is not in the engine yet.
pub(crate) struct Ahead {
    state: StoredState,
    /// Until the bytes are gone.
    _turn: OwnedSemaphorePermit,
}

impl Ahead {
    /// Reads the state of the capsule that `find` finds, so far as the engine lacks it. `find` is asked when it is this one's
    /// turn; it finds none where another turn has brought the state meanwhile.
    ///
    /// # Errors
    /// As [`ampoule::CapsuleStore::load`]; 507 if the memory for capsules is too small for it at any time.
    pub(crate) async fn read(
        app: &App,
        find: impl FnOnce(&Durable) -> Result<Option<CapsuleId>, ampoule::Error> + Send + 'static,
    ) -> ApiResult<Option<Self>> {
        let turn = Arc::clone(&app.readers).acquire_owned().await;
        let turn = turn.map_err(|_| ApiError::stopping())?;
        let vault = Arc::clone(&app.vault);
        let begun = blocking(move || {
            let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
            let Some(id) = find(durable)? else { return Ok(None) };
            Ok(Some(Self { state: durable.store().begin_load(id)?, _turn: turn }))
        });
        let Some(ahead) = begun.await? else { return Ok(None) };
        let (lacks, mut ahead) = app
            .call(move |worker| match worker.model.lacks(&ahead.state) {
                Err(error) if lacks_room(&error) => Err(ApiError::no_room()),
                lacks => Ok((lacks?, ahead)),
            })
            .await?;
        let (vault, longer) = (Arc::clone(&app.vault), app.config.slow_store);
        blocking(move || {
            let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
            durable.store().read_ahead(&mut ahead.state, &lacks, MOST)?;
            if !longer.is_zero() {
                let turn = TURNS.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(longer * (1 + turn % 4));
            }
            Ok(Some(ahead))
        })
        .await
    }

    /// Brings the state into the engine, with old boundaries dropped for it if need be.
    ///
    /// # Errors
    /// As [`Worker::load`].
    pub(crate) async fn load(self, app: &App) -> ApiResult<Capsule> {
        let vault = Arc::clone(&app.vault);
        let called = app.call(move |worker| {
            let load = |worker: &mut Worker| {
                let durable = vault.durable.as_ref().ok_or_else(ApiError::internal)?;
                let state = &self.state;
                worker.load(|worker| durable.store().finish_load(&mut worker.model, state))
            };
            Ok((load(worker), self))
        });
        let (loaded, ahead) = called.await?;
        // Giving so many bytes back takes a while, too.
        tokio::task::spawn_blocking(move || drop(ahead));
        loaded
    }
}
