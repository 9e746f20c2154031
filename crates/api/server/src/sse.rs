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
use tokio::time::{Interval, MissedTickBehavior, Sleep, interval, sleep};

use crate::app::Tally;
use crate::error::ApiError;
use crate::patience::Hold;

/// Pieces on their way to the connection: few, so that what counts as sent has nearly been sent.
const PIECES: usize = 4;
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How long the head of a stream may wait for the first token, to leave in one piece with it. On the machine of a small model the
/// engine uses every core: a head sent on its own would wake the client in the midst of the prompt, and delay the token.
const HEAD_WAIT: Duration = Duration::from_millis(50);
/// Pieces, and their bytes, that wait with the head at most: the connection's own buffer has to hold them.
const WITH_HEAD: (usize, usize) = (8, 8 << 10);

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
    head: Option<Head>,
}

/// A head that waits.
struct Head {
    hold: Hold,
    late: Pin<Box<Sleep>>,
    /// What waits with it.
    pieces: usize,
    bytes: usize,
}

impl EventStream {
    /// Lets the head go, and what waits with it.
    fn send_head(&mut self) {
        if let Some(head) = self.head.take() {
            head.hold.let_go();
        }
    }

    /// A piece goes to the connection: with the first token the head leaves.
    fn count(&mut self, piece: &Piece) {
        let Some(head) = &mut self.head else { return };
        head.pieces += 1;
        head.bytes += piece.bytes.len();
        if piece.tokens > 0 || head.pieces >= WITH_HEAD.0 || head.bytes >= WITH_HEAD.1 {
            self.send_head();
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.send_head();
    }
}

impl Stream for EventStream {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.pieces.poll_recv(context) {
            Poll::Ready(Some(piece)) => {
                self.count(&piece);
                self.keep_alive.reset();
                self.sent.fetch_max(piece.tokens, Ordering::Release);
                Poll::Ready(Some(Ok(piece.bytes)))
            }
            Poll::Ready(None) => {
                self.send_head();
                Poll::Ready(None)
            }
            Poll::Pending => {
                if self
                    .head
                    .as_mut()
                    .is_some_and(|head| head.late.as_mut().poll(context).is_ready())
                {
                    self.send_head();
                }
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
    let hold = Hold::new(HEAD_WAIT);
    let late = Box::pin(sleep(HEAD_WAIT));
    let head = Some(Head { hold: hold.clone(), late, pieces: 0, bytes: 0 });
    let stream = EventStream { pieces, keep_alive, sent, head };
    let mut response = Response::new(Body::from_stream(stream));
    response.extensions_mut().insert(hold);
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
    fn the_head_leaves_with_the_first_token_and_does_not_wait_long_for_it() {
        runtime().block_on(async {
            let open = || {
                let (events, response) = response(Arc::default());
                let hold = response.extensions().get::<Hold>().cloned().unwrap();
                assert!(hold.holds());
                (events, response.into_body(), hold)
            };
            let send = async |events: &Events, length: usize, tokens| {
                assert!(events.raw("x".repeat(length), tokens).await);
            };
            // With the first token, and not with what comes before it.
            let (events, mut body, hold) = open();
            send(&events, 1, 0).await;
            assert!(frame(&mut body).await.is_some() && hold.holds());
            send(&events, 1, 1).await;
            assert!(frame(&mut body).await.is_some() && !hold.holds());
            // The connection's buffer is not filled with what waits.
            let (events, mut body, hold) = open();
            send(&events, WITH_HEAD.1, 0).await;
            assert!(frame(&mut body).await.is_some() && !hold.holds());
            let (events, mut body, hold) = open();
            for piece in 1..=WITH_HEAD.0 {
                send(&events, 1, 0).await;
                assert!(frame(&mut body).await.is_some());
                assert_eq!(hold.holds(), piece < WITH_HEAD.0);
            }
            // The end, without a token.
            let (events, mut body, hold) = open();
            drop(events);
            assert!(frame(&mut body).await.is_none() && !hold.holds());
            let (_events, body, hold) = open();
            drop(body);
            assert!(!hold.holds());
            // Nothing comes: the stream is polled once more when the time is over, which is when the connection may write.
            let (_events, body, hold) = open();
            let mut body = std::pin::pin!(body);
            let begun = std::time::Instant::now();
            let mut polls = Vec::new();
            std::future::poll_fn(|context| {
                use http_body_util::BodyExt;
                assert!(std::pin::Pin::new(&mut body.frame()).poll(context).is_pending());
                polls.push((begun.elapsed(), hold.holds()));
                if hold.holds() { Poll::Pending } else { Poll::Ready(()) }
            })
            .await;
            assert!(
                polls[0].1 && polls.last().unwrap().0 + Duration::from_millis(2) >= HEAD_WAIT,
                "{polls:?}"
            );
            assert!(polls.last().unwrap().0 < HEAD_WAIT * 10, "{polls:?}");
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
