//! What clients come back to: stored responses, sessions, and capsules with a name.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ampoule::{Capsule, Waypoints};
use axum::http::StatusCode;
use serde_json::Value;

use crate::durable::Durable;
use crate::error::{ApiError, ApiResult};
use crate::metrics::Metrics;
use crate::named::Names;

/// A response that can be read, continued and deleted.
pub(crate) struct StoredResponse {
    pub key: [u8; 32],
    /// As the client got it.
    pub body: Value,
    /// Its own input items, as they were given.
    pub input: Vec<Value>,
    /// The whole conversation in the chat API's messages, the reply included.
    pub history: Vec<Value>,
    /// The end token in the state, if the reply ended with one.
    pub end_token: Option<u32>,
    /// The state after the reply, while there is memory for it.
    pub end: Mutex<Option<Capsule>>,
    used: AtomicU64,
}

impl StoredResponse {
    pub(crate) fn new(
        key: [u8; 32],
        body: Value,
        input: Vec<Value>,
        history: Vec<Value>,
        end_token: Option<u32>,
        end: Option<Capsule>,
    ) -> Self {
        Self { key, body, input, history, end_token, end: Mutex::new(end), used: AtomicU64::new(0) }
    }
}

/// A place in a session that it can go back to.
#[derive(Clone)]
pub(crate) struct Mark {
    pub id: String,
    /// `messages`, `text`, `reply` and the like.
    pub kind: String,
    pub capsule: Capsule,
    /// The end token in the state, if it ends with one.
    pub end_token: Option<u32>,
    /// Messages known at that place.
    pub messages: usize,
    /// Whether it ends with a whole message, and no reply has been asked for.
    pub closed: bool,
    /// Of the last reply: places within it that it can be cut at, while there is memory for them.
    pub waypoints: Option<Waypoints>,
}

/// A session's state between calls.
#[derive(Clone, Default)]
pub(crate) struct SessionState {
    pub marks: Vec<Mark>,
    /// What was said, where it was said in messages.
    pub messages: Vec<Value>,
    /// Where each of them ends, so far as that is known: of those that came in one call, the last.
    pub ends: Vec<Option<MessageEnd>>,
    /// The position before all of them: that of the capsule that the session began with.
    pub origin: u32,
    pub tools: Vec<Value>,
    /// Whether a call is under way; then others are refused.
    pub busy: bool,
    /// Told to end the reply under way.
    pub interrupt: Option<Arc<std::sync::atomic::AtomicBool>>,
    /// Where the last reply began, and what it said.
    pub reply: Option<LastReply>,
}

#[derive(Clone)]
pub(crate) struct LastReply {
    /// Position before it.
    pub start: u32,
    pub tokens: Vec<u32>,
}

/// The place after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct MessageEnd {
    pub position: u32,
    /// As in [`Mark`].
    pub closed: bool,
}

impl SessionState {
    pub(crate) fn capsule(&self) -> Option<&Capsule> {
        self.marks.last().map(|mark| &mark.capsule)
    }

    /// Forgets the places within replies.
    pub(crate) fn drop_waypoints(&mut self) {
        self.marks.iter_mut().for_each(|mark| mark.waypoints = None);
    }

    /// Forgets messages, but for the first `count`.
    pub(crate) fn cut_messages(&mut self, count: usize) {
        self.messages.truncate(count);
        self.ends.truncate(count);
    }
}

/// Where each message of a session ends while its last boundary is this one, so far as that could be told.
pub(crate) struct Listed {
    pub mark: String,
    pub ends: Vec<Option<u32>>,
}

/// A session that lies in the store alone, as a list tells of it.
#[derive(Clone)]
pub(crate) struct Parked {
    pub key: [u8; 32],
    pub created: u64,
    pub parent: Option<String>,
    pub position: u32,
    pub messages: usize,
    pub reply_tokens: Option<usize>,
}

pub(crate) struct Session {
    pub key: [u8; 32],
    pub created: u64,
    pub parent: Option<String>,
    state: Mutex<SessionState>,
    used: Mutex<Instant>,
    /// What a listing of its messages found.
    pub listed: Mutex<Option<Listed>>,
    /// Whether the store has it as it stands.
    saved: AtomicBool,
    /// Whether its owner deleted it: then it must not be saved again.
    deleted: AtomicBool,
}

impl Session {
    pub(crate) fn new(
        key: [u8; 32],
        created: u64,
        parent: Option<String>,
        state: SessionState,
    ) -> Self {
        let (state, used) = (Mutex::new(state), Mutex::new(Instant::now()));
        let (saved, deleted) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { key, created, parent, state, used, listed: Mutex::new(None), saved, deleted }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, SessionState> {
        lock(&self.state)
    }

    pub(crate) fn set_saved(&self, saved: bool) {
        self.saved.store(saved, Ordering::Release);
    }

    fn parked(&self) -> Parked {
        let state = self.lock();
        Parked {
            key: self.key,
            created: self.created,
            parent: self.parent.clone(),
            position: state.capsule().map_or(0, Capsule::position),
            messages: state.messages.len(),
            reply_tokens: state.reply.as_ref().map(|reply| reply.tokens.len()),
        }
    }

    fn idle(&self) -> Duration {
        lock(&self.used).elapsed()
    }

    fn touch(&self) {
        *lock(&self.used) = Instant::now();
    }

    pub(crate) fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    /// Whether it can leave memory and be fetched again: the store has it, and no call is about to use it.
    fn can_park(self: &Arc<Self>) -> bool {
        self.saved.load(Ordering::Acquire) && Arc::strong_count(self) == 1
    }
}

/// A lock that a panic elsewhere does not take away.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything that outlives a request.
pub(crate) struct Vault {
    responses: Mutex<HashMap<String, Arc<StoredResponse>>>,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    /// Taken while `sessions` is, never the other way round.
    parked: Mutex<HashMap<String, Parked>>,
    pub capsules: Names,
    /// For each key: held while one of its capsules changes in memory and in the store.
    turns: Mutex<HashMap<[u8; 32], Arc<tokio::sync::Mutex<()>>>>,
    /// Records of the store that could not be read at the start.
    pub unreadable: AtomicUsize,
    /// Held by who brings a parked session to memory; ids share them by their hash.
    fetches: [tokio::sync::Mutex<()>; FETCHES],
    /// Sessions that were idle for too long, for a while: whoever comes back is told why they are gone.
    expired: Mutex<VecDeque<([u8; 32], String)>>,
    clock: AtomicU64,
    limits: Limits,
    pub metrics: Arc<Metrics>,
    pub durable: Option<Durable>,
}

/// How many of each there may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Responses in all; the one used least recently goes.
    pub responses: usize,
    /// Sessions of a key in memory.
    pub sessions: usize,
    /// Capsules of a key that were asked for.
    pub capsules: usize,
}

/// Expired sessions that are remembered.
const EXPIRED: usize = 4096;
/// More than fetches that are ever under way at once without waiting for the store.
const FETCHES: usize = 64;

impl Vault {
    pub(crate) fn new(limits: Limits, metrics: Arc<Metrics>, durable: Option<Durable>) -> Self {
        Self {
            responses: Mutex::default(),
            sessions: Mutex::default(),
            parked: Mutex::default(),
            capsules: Names::new(Arc::clone(&metrics)),
            turns: Mutex::default(),
            unreadable: AtomicUsize::new(0),
            fetches: [const { tokio::sync::Mutex::const_new(()) }; FETCHES],
            expired: Mutex::default(),
            clock: AtomicU64::new(0),
            limits,
            metrics,
            durable,
        }
    }

    pub(crate) fn add_response(&self, id: &str, response: StoredResponse) -> Arc<StoredResponse> {
        let response = Arc::new(response);
        self.touch(&response);
        let mut all = lock(&self.responses);
        all.insert(id.to_owned(), Arc::clone(&response));
        let mut gone = None;
        if all.len() > self.limits.responses.max(1) {
            let oldest = all.iter().min_by_key(|(_, r)| r.used.load(Ordering::Relaxed));
            gone = oldest.map(|(id, _)| id.clone());
        }
        if let Some(id) = &gone {
            all.remove(id);
        }
        self.metrics.responses.set(all.len());
        drop(all);
        if let (Some(id), Some(durable)) = (gone, &self.durable) {
            durable.forget_response(&id);
        }
        response
    }

    fn touch(&self, response: &StoredResponse) {
        response.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// A response of this key's.
    pub(crate) fn response(&self, key: &[u8; 32], id: &str) -> Option<Arc<StoredResponse>> {
        let found = lock(&self.responses).get(id).filter(|r| r.key == *key).cloned()?;
        self.touch(&found);
        Some(found)
    }

    pub(crate) fn remove_response(&self, key: &[u8; 32], id: &str) -> bool {
        let mut all = lock(&self.responses);
        let mine = all.get(id).is_some_and(|r| r.key == *key);
        if mine {
            all.remove(id);
        }
        self.metrics.responses.set(all.len());
        mine
    }

    /// Gives up the places within the last reply of the session that was used least recently, and not for `idle`: cutting
    /// that reply takes longer then. False if there are none.
    pub(crate) fn relieve_of_waypoints(&self, idle: Duration) -> bool {
        let all = lock(&self.sessions);
        let has = |s: &Session| s.lock().marks.iter().any(|mark| mark.waypoints.is_some());
        let long = all.values().filter(|session| session.idle() >= idle && has(session));
        let Some(oldest) = long.max_by_key(|session| session.idle()) else { return false };
        oldest.lock().drop_waypoints();
        true
    }

    /// Gives up something that can be had again, of the first of these kinds that there is: places within replies; the state of
    /// a response, which can still be read, and continued by reading its conversation again or from the store; that of a capsule
    /// that the store has; a session that the store has; the older boundaries of a session. It is what was used least recently
    /// of its kind. False if there is nothing.
    pub(crate) fn relieve(&self) -> bool {
        if self.relieve_of_waypoints(Duration::ZERO) {
            return true;
        }
        let all = lock(&self.responses);
        let held = all.values().filter(|r| lock(&r.end).is_some());
        let oldest = held.min_by_key(|r| r.used.load(Ordering::Relaxed));
        if oldest.is_some_and(|r| lock(&r.end).take().is_some()) {
            return true;
        }
        drop(all);
        if self.capsules.relieve(Duration::ZERO) || self.park(None) {
            return true;
        }
        let all = lock(&self.sessions);
        let long = all.values().filter(|session| session.lock().marks.len() > 1);
        let Some(oldest) = long.max_by_key(|session| session.idle()) else { return false };
        let mut state = oldest.lock();
        let older = state.marks.len() - 1;
        state.marks.drain(..older);
        true
    }

    /// Lets the session go from memory that was idle longest of those that the store has.
    fn park(&self, key: Option<&[u8; 32]>) -> bool {
        let mut all = lock(&self.sessions);
        let mine = all.iter().filter(|(_, s)| key.is_none_or(|key| s.key == *key) && s.can_park());
        let Some(id) = mine.max_by_key(|(_, s)| s.idle()).map(|(id, _)| id.clone()) else {
            return false;
        };
        if let Some(session) = all.remove(&id) {
            lock(&self.parked).insert(id, session.parked());
        }
        self.metrics.sessions.set(all.len());
        self.metrics.sessions_parked.add(1);
        true
    }

    /// Lets sessions go that were idle for so long. Those that the store has can be fetched again, others are gone.
    pub(crate) fn expire(&self, idle: Duration) {
        let mut all = lock(&self.sessions);
        let mut expired = lock(&self.expired);
        all.retain(|id, session| {
            if session.idle() < idle || Arc::strong_count(session) > 1 {
                return true;
            }
            if session.can_park() {
                lock(&self.parked).insert(id.clone(), session.parked());
                self.metrics.sessions_parked.add(1);
                return false;
            }
            if self.durable.is_some() {
                // A save that failed: what is here is all there is.
                return true;
            }
            self.metrics.sessions_expired.add(1);
            expired.push_back((session.key, id.clone()));
            false
        });
        let over = expired.len().saturating_sub(EXPIRED);
        expired.drain(..over);
        self.metrics.sessions.set(all.len());
    }

    /// Why there is no such session.
    pub(crate) fn no_session(&self, key: &[u8; 32], id: &str, idle: Duration) -> ApiError {
        let gone = lock(&self.expired).iter().any(|(owner, gone)| owner == key && gone == id);
        if !gone {
            return ApiError::not_found("session");
        }
        ApiError {
            code: Some("session_expired"),
            message: format!(
                "this session was idle for {} s and is gone: begin a new one; with --store idle sessions are kept",
                idle.as_secs()
            ),
            ..ApiError::not_found("session")
        }
    }

    /// Whether this key has as many sessions in memory as it may.
    pub(crate) fn full_of_sessions(&self, key: &[u8; 32]) -> bool {
        let all = lock(&self.sessions);
        all.values().filter(|s| s.key == *key).count() >= self.limits.sessions
    }

    /// Makes room for one session more of this key's.
    ///
    /// # Errors
    /// 429 where none of its sessions can leave memory.
    pub(crate) fn room_for_session(&self, key: &[u8; 32], idle: Duration) -> ApiResult<()> {
        if !self.full_of_sessions(key) || self.park(Some(key)) {
            return Ok(());
        }
        self.metrics.rejected.add(1);
        Err(too_many(
            "too_many_sessions",
            format!(
                "this key has {} sessions: delete some, or wait until one was idle for {} s",
                self.limits.sessions,
                idle.as_secs()
            ),
        ))
    }

    /// # Errors
    /// 429 where this key has as many capsules as it may.
    pub(crate) fn room_for_capsule(&self, key: &[u8; 32]) -> ApiResult<()> {
        if self.capsules.count(key) < self.limits.capsules {
            return Ok(());
        }
        self.metrics.rejected.add(1);
        let most = self.limits.capsules;
        Err(too_many("too_many_capsules", format!("this key has {most} capsules: delete some")))
    }

    /// A session that is there already stays.
    pub(crate) fn add_session(&self, id: &str, session: Session) -> Arc<Session> {
        let mut all = lock(&self.sessions);
        let session = Arc::clone(all.entry(id.to_owned()).or_insert_with(|| Arc::new(session)));
        lock(&self.parked).remove(id);
        self.metrics.sessions.set(all.len());
        session
    }

    /// Notes a session that lies in the store alone.
    pub(crate) fn add_parked(&self, id: &str, parked: Parked) {
        lock(&self.parked).insert(id.to_owned(), parked);
    }

    pub(crate) fn session(&self, key: &[u8; 32], id: &str) -> Option<Arc<Session>> {
        let found = lock(&self.sessions).get(id).filter(|s| s.key == *key).cloned()?;
        found.touch();
        Some(found)
    }

    pub(crate) fn remove_session(&self, key: &[u8; 32], id: &str) -> Option<Arc<Session>> {
        let mut all = lock(&self.sessions);
        let mut parked = lock(&self.parked);
        if parked.get(id).is_some_and(|p| p.key == *key) {
            parked.remove(id);
        }
        let found = all.get(id).filter(|s| s.key == *key).cloned()?;
        found.deleted.store(true, Ordering::Release);
        all.remove(id);
        self.metrics.sessions.set(all.len());
        Some(found)
    }

    /// The sessions of a key: those in memory, and those that lie in the store alone.
    #[allow(clippy::type_complexity)]
    pub(crate) fn sessions(
        &self,
        key: &[u8; 32],
    ) -> (Vec<(String, Arc<Session>)>, Vec<(String, Parked)>) {
        let (here, away) = (lock(&self.sessions), lock(&self.parked));
        let mine = here.iter().filter(|(_, s)| s.key == *key);
        let here = mine.map(|(id, s)| (id.clone(), Arc::clone(s))).collect();
        let mine = away.iter().filter(|(_, parked)| parked.key == *key);
        (here, mine.map(|(id, parked)| (id.clone(), parked.clone())).collect())
    }

    /// What a change of a key's capsules holds. There are as many as keys.
    pub(crate) fn turn(&self, key: &[u8; 32]) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(lock(&self.turns).entry(*key).or_default())
    }

    /// To be said where something is not found: what is damaged in the store is known by no id.
    pub(crate) fn or_damaged(&self) -> String {
        match self.unreadable.load(Ordering::Relaxed) {
            0 => String::new(),
            1 => "; one record of the store is damaged and may be its: `ampoule capsule fsck` names it".to_owned(),
            n => format!("; {n} records of the store are damaged, one may be its: `ampoule capsule fsck` names them"),
        }
    }

    /// The turn to bring a session to memory: whoever has it, and finds the session not there, may rely on that no other call
    /// brings it, changes it and sends it to the store again.
    pub(crate) async fn fetch_turn(&self, id: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let hash = blake3::hash(id.as_bytes());
        self.fetches[usize::from(hash.as_bytes()[0]) % FETCHES].lock().await
    }
}

fn too_many(code: &'static str, message: String) -> ApiError {
    ApiError {
        code: Some(code),
        ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
    }
}
