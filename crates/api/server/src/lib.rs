//! The agent server: OpenAI's APIs and a native one over execution-state capsules.
//!
//! One thread owns the model; the HTTP side talks to it by messages. Every turn, retry, branch and sub-agent starts from the
//! deepest boundary that was read before. docs/server.md has the contract; [`serve`] runs it.
#![forbid(unsafe_code)]

mod ahead;
mod app;
mod cache;
mod chat;
mod completions;
mod durable;
mod error;
mod fields;
mod grammar;
mod http;
mod memory;
mod metrics;
mod named;
mod native;
mod openapi;
mod output;
mod patience;
mod pieces;
mod prompt;
mod recent;
mod responses;
mod rewind;
mod sse;
mod start;
mod vault;
mod worker;

use std::net::SocketAddr;
use std::time::Duration;

pub use start::{ServeError, Server, serve};

/// How to serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen. Port 0 takes a free one.
    pub address: SocketAddr,
    /// What the model is called; its own name where `None`.
    pub model_name: Option<String>,
    /// Replies at the same time. The model should have one slot more, for the verbs of the native API.
    pub slots: usize,
    /// Requests that may run or wait; beyond that the answer is 429.
    pub queue: usize,
    /// Connections at most.
    pub connections: usize,
    /// Bytes of a request's body at most.
    pub body_bytes: usize,
    /// For the head of a request to arrive.
    pub head_time: Duration,
    /// Between the requests of a connection that is kept open.
    pub idle_time: Duration,
    /// For the body of a request to arrive.
    pub body_time: Duration,
    /// From a request's arrival to its end.
    pub deadline: Duration,
    /// Given to what runs when the server is told to stop.
    pub grace: Duration,
    /// Digests of the API keys ([`key_digest`]); none lets everybody in.
    pub keys: Vec<[u8; 32]>,
    /// The origin that browsers may call from; `None` allows none.
    pub cors: Option<String>,
    /// Whether boundaries are kept and used without anybody asking.
    pub caching: bool,
    /// Responses that can be continued, at most.
    pub responses: usize,
    /// Sessions of one key in memory, at most. With a store those used least recently go there, without one the answer
    /// is 429.
    pub sessions: usize,
    /// After so long without a call a session leaves memory; without a store it is gone.
    pub session_idle: Duration,
    /// Capsules of one key that were asked for, at most.
    pub capsules: usize,
    /// Bytes of host memory for capsules that have to leave a device's own; where there is none the model's budget for
    /// capsules is all there is.
    pub host_capsule_bytes: u64,
    /// A folder for a durable store, and how to open it.
    pub store: Option<(String, ampoule::StoreOptions)>,
    /// Capsules of the store to have in memory from the start, by name.
    pub warm: Vec<String>,
    /// For tests: a request with the header `x-ampoule-fault` makes the engine panic.
    #[doc(hidden)]
    pub faults: bool,
    /// For tests: how much longer it takes to read a state from the store: once, twice, three or four times that, in turns.
    #[doc(hidden)]
    pub slow_store: Duration,
}

impl Default for Config {
    /// Loopback, port 8080, no keys, 4 slots.
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            model_name: None,
            slots: 4,
            queue: 64,
            connections: 1024,
            body_bytes: 8 << 20,
            head_time: Duration::from_secs(15),
            idle_time: Duration::from_secs(600),
            body_time: Duration::from_secs(60),
            deadline: Duration::from_secs(600),
            grace: Duration::from_secs(10),
            keys: Vec::new(),
            cors: None,
            caching: true,
            responses: 1024,
            sessions: 256,
            session_idle: Duration::from_secs(3600),
            capsules: 1024,
            host_capsule_bytes: 0,
            store: None,
            warm: Vec::new(),
            faults: false,
            slow_store: Duration::ZERO,
        }
    }
}

/// The digest under which an API key is known: the server never holds the key itself.
pub fn key_digest(key: &str) -> [u8; 32] {
    blake3::derive_key("ampoule server v1 api key", key.as_bytes())
}
