//! Server-sent events: a channel of pieces, with comments while nothing comes.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_core::Stream;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::app::Tally;
use crate::error::ApiError;

/// Pieces on their way to the connection: few, so that what counts as sent has nearly been sent.
const PIECES: usize = 4;
const KEEP_ALIVE: Duration = Duration::from_secs(10);

struct Piece {
    bytes: Bytes,
    /// Tokens that are out once this is.
    tokens: u64,
}

/// Where a handler writes events.
#[derive(Clone)]
pub(crate) struct Events {
    out: mpsc::Sender<Piece>,
}

impl Events {
    /// Sends a piece of data; false if the client has gone.
    pub(crate) async fn data(&self, value: &Value, tokens: u64) -> bool {
        self.raw(format!("data: {value}\n\n"), tokens).await
    }

    /// Sends a named event.
    pub(crate) async fn event(&self, name: &str, value: &Value, tokens: u64) -> bool {
        self.raw(format!("event: {name}\ndata: {value}\n\n"), tokens).await
    }

    pub(crate) async fn raw(&self, text: String, tokens: u64) -> bool {
        self.out.send(Piece { bytes: Bytes::from(text), tokens }).await.is_ok()
    }

    /// Ends a stream of the chat and completion APIs with an error.
    pub(crate) async fn fail(&self, error: &ApiError) {
        self.data(&error.body(), 0).await;
    }

    /// Ends a stream of the chat and completion APIs: `last` gets usage and times, where the client asked for them.
    pub(crate) async fn end(&self, last: Option<Value>, tally: &Tally) {
        let sent = tally.generated as u64;
        if let Some(mut last) = last {
            last["usage"] = tally.usage();
            last["timings"] = tally.timings();
            self.data(&last, sent).await;
        }
        self.raw("data: [DONE]\n\n".to_owned(), sent).await;
    }

    /// Ends when the client has gone.
    pub(crate) async fn gone(&self) {
        self.out.closed().await;
    }
}

struct EventStream {
    pieces: mpsc::Receiver<Piece>,
    keep_alive: Interval,
    sent: Arc<AtomicU64>,
}

impl Stream for EventStream {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.pieces.poll_recv(context) {
            Poll::Ready(Some(piece)) => {
                self.keep_alive.reset();
                self.sent.fetch_max(piece.tokens, Ordering::Release);
                Poll::Ready(Some(Ok(piece.bytes)))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                if self.keep_alive.poll_tick(context).is_ready() {
                    // The tick after this one has to wake the stream too.
                    let _ = self.keep_alive.poll_tick(context);
                    return Poll::Ready(Some(Ok(Bytes::from_static(b": keep-alive\n\n"))));
                }
                Poll::Pending
            }
        }
    }
}

/// A response of events; `sent` is told how many tokens went out.
pub(crate) fn response(sent: Arc<AtomicU64>) -> (Events, Response) {
    response_kept(sent, KEEP_ALIVE)
}

fn response_kept(sent: Arc<AtomicU64>, period: Duration) -> (Events, Response) {
    let (out, pieces) = mpsc::channel(PIECES);
    let mut keep_alive = interval(period);
    keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    keep_alive.reset();
    let mut response = Response::new(Body::from_stream(EventStream { pieces, keep_alive, sent }));
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    (Events { out }, response)
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    async fn frame(body: &mut Body) -> Option<String> {
        let frame = body.frame().await?.unwrap().into_data().unwrap();
        Some(String::from_utf8(frame.to_vec()).unwrap())
    }

    #[test]
    fn silence_is_filled_with_comments_and_events_are_not() {
        runtime().block_on(async {
            let period = Duration::from_millis(20);
            let sent = Arc::new(AtomicU64::new(0));
            let (events, response) = response_kept(Arc::clone(&sent), period);
            assert_eq!(
                response.headers()[header::CONTENT_TYPE],
                "text/event-stream; charset=utf-8"
            );
            let mut body = response.into_body();
            // As during a long prefill: nothing comes for a while, and then the first token.
            let begun = std::time::Instant::now();
            for _ in 0..3 {
                assert_eq!(frame(&mut body).await.as_deref(), Some(": keep-alive\n\n"));
            }
            assert!(begun.elapsed() >= period * 5 / 2, "{:?}", begun.elapsed());
            assert_eq!(sent.load(Ordering::Acquire), 0, "a comment delivers no token");
            assert!(events.event("delta", &serde_json::json!({ "a": "b\n\nc" }), 7).await);
            let said = frame(&mut body).await.unwrap();
            assert_eq!(said, "event: delta\ndata: {\"a\":\"b\\n\\nc\"}\n\n");
            assert_eq!(sent.load(Ordering::Acquire), 7);
            // An event puts the next comment off.
            tokio::time::sleep(period / 2).await;
            assert!(events.data(&serde_json::json!(1), 8).await);
            assert_eq!(frame(&mut body).await.as_deref(), Some("data: 1\n\n"));
            drop(events);
            assert_eq!(frame(&mut body).await, None);
        });
    }

    #[test]
    fn a_client_that_leaves_is_seen() {
        runtime().block_on(async {
            let (events, response) = response(Arc::new(AtomicU64::new(0)));
            drop(response);
            events.gone().await;
            assert!(!events.raw("data: 1\n\n".to_owned(), 1).await);
        });
    }
}
