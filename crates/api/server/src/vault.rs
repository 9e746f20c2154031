//! What clients come back to: stored responses, sessions, and capsules with a name.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ampoule::Capsule;
use serde_json::Value;

use crate::durable::Durable;
use crate::metrics::Metrics;

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

/// A capsule that a client asked for.
#[derive(Clone)]
pub(crate) struct NamedCapsule {
    pub key: [u8; 32],
    pub created: u64,
    pub name: Option<String>,
    pub parent: Option<String>,
    pub pinned: bool,
    pub capsule: Capsule,
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
}

/// A session's state between calls.
#[derive(Clone, Default)]
pub(crate) struct SessionState {
    pub marks: Vec<Mark>,
    /// What was said, where it was said in messages.
    pub messages: Vec<Value>,
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

impl SessionState {
    pub(crate) fn capsule(&self) -> Option<&Capsule> {
        self.marks.last().map(|mark| &mark.capsule)
    }
}

pub(crate) struct Session {
    pub key: [u8; 32],
    pub created: u64,
    pub parent: Option<String>,
    pub state: Mutex<SessionState>,
}

impl Session {
    pub(crate) fn lock(&self) -> MutexGuard<'_, SessionState> {
        lock(&self.state)
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
    capsules: Mutex<HashMap<String, NamedCapsule>>,
    clock: AtomicU64,
    /// Responses at most; the one used least recently goes.
    most: usize,
    metrics: Arc<Metrics>,
    pub durable: Option<Durable>,
}

impl Vault {
    pub(crate) fn new(most: usize, metrics: Arc<Metrics>, durable: Option<Durable>) -> Self {
        Self {
            responses: Mutex::default(),
            sessions: Mutex::default(),
            capsules: Mutex::default(),
            clock: AtomicU64::new(0),
            most: most.max(1),
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
        if all.len() > self.most {
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

    /// Gives up the state of the response that was not used for the longest time; it can still be read, and continued by
    /// reading its conversation again or from the store.
    pub(crate) fn relieve(&self) -> bool {
        let all = lock(&self.responses);
        let held = all.values().filter(|r| lock(&r.end).is_some());
        let oldest = held.min_by_key(|r| r.used.load(Ordering::Relaxed));
        oldest.is_some_and(|r| lock(&r.end).take().is_some())
    }

    pub(crate) fn add_session(&self, id: &str, session: Session) -> Arc<Session> {
        let session = Arc::new(session);
        let mut all = lock(&self.sessions);
        all.insert(id.to_owned(), Arc::clone(&session));
        self.metrics.sessions.set(all.len());
        session
    }

    pub(crate) fn session(&self, key: &[u8; 32], id: &str) -> Option<Arc<Session>> {
        lock(&self.sessions).get(id).filter(|s| s.key == *key).cloned()
    }

    pub(crate) fn remove_session(&self, key: &[u8; 32], id: &str) -> Option<Arc<Session>> {
        let mut all = lock(&self.sessions);
        let found = all.get(id).filter(|s| s.key == *key).cloned()?;
        all.remove(id);
        self.metrics.sessions.set(all.len());
        Some(found)
    }

    /// The sessions of a key, by id.
    pub(crate) fn sessions(&self, key: Option<&[u8; 32]>) -> Vec<(String, Arc<Session>)> {
        let all = lock(&self.sessions);
        let mine = all.iter().filter(|(_, s)| key.is_none_or(|key| s.key == *key));
        let mut list: Vec<_> = mine.map(|(id, s)| (id.clone(), Arc::clone(s))).collect();
        list.sort_by(|a, b| (a.1.created, &a.0).cmp(&(b.1.created, &b.0)));
        list
    }

    pub(crate) fn add_capsule(&self, id: &str, capsule: NamedCapsule) {
        lock(&self.capsules).insert(id.to_owned(), capsule);
    }

    /// A capsule by id or by the name that its owner gave it.
    pub(crate) fn capsule(&self, key: &[u8; 32], which: &str) -> Option<(String, NamedCapsule)> {
        let all = lock(&self.capsules);
        if let Some(found) = all.get(which).filter(|c| c.key == *key) {
            return Some((which.to_owned(), found.clone()));
        }
        let named = all.iter().filter(|(_, c)| c.key == *key && c.name.as_deref() == Some(which));
        named.max_by_key(|(_, c)| c.created).map(|(id, c)| (id.clone(), c.clone()))
    }

    pub(crate) fn pin(&self, key: &[u8; 32], id: &str, pinned: bool) -> Option<NamedCapsule> {
        let mut all = lock(&self.capsules);
        let found = all.get_mut(id).filter(|c| c.key == *key)?;
        found.pinned = pinned;
        Some(found.clone())
    }

    pub(crate) fn remove_capsule(&self, key: &[u8; 32], id: &str) -> bool {
        let mut all = lock(&self.capsules);
        let mine = all.get(id).is_some_and(|c| c.key == *key);
        if mine {
            all.remove(id);
        }
        mine
    }

    pub(crate) fn capsules(&self, key: &[u8; 32]) -> Vec<(String, NamedCapsule)> {
        let all = lock(&self.capsules);
        let mine = all.iter().filter(|(_, c)| c.key == *key);
        let mut list: Vec<_> = mine.map(|(id, c)| (id.clone(), c.clone())).collect();
        list.sort_by(|a, b| (a.1.created, &a.0).cmp(&(b.1.created, &b.0)));
        list
    }
}
