//! How long a connection may take to say what it wants.
//!
//! A connection that is kept open between requests may be idle for long: clients pool them. The head of a request, once it
//! has begun, must arrive soon: else a few bytes a minute would hold a connection for ever. And how long an answer may keep its
//! head back, so that it leaves with what the client waits for.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Nothing of the next request has come.
const IDLE: u8 = 0;
/// A head is on its way.
const HEAD: u8 = 1;
/// A request is being answered.
const BUSY: u8 = 2;

/// Keeps a connection from writing for a while: an extension of a response whose head can wait for its body. Whoever makes the
/// body lets go, and polls the connection's task then; what was to be written leaves in one piece.
#[derive(Clone)]
pub(crate) struct Hold {
    let_go: Arc<AtomicBool>,
    until: Instant,
}

impl Hold {
    pub(crate) fn new(time: Duration) -> Self {
        Self { let_go: Arc::default(), until: Instant::now() + time }
    }

    pub(crate) fn let_go(&self) {
        self.let_go.store(true, Ordering::Release);
    }

    pub(crate) fn holds(&self) -> bool {
        !self.let_go.load(Ordering::Acquire) && Instant::now() < self.until
    }
}

struct State {
    phase: AtomicU8,
    hold: Mutex<Option<Hold>>,
}

/// What a connection is doing, for its reader and its service.
#[derive(Clone)]
pub(crate) struct Phase(Arc<State>);

impl Phase {
    /// A head has arrived whole.
    pub(crate) fn busy(&self) {
        self.0.phase.store(BUSY, Ordering::Relaxed);
    }

    /// What comes now belongs to the next request, and what goes out is a response that may hold itself back.
    pub(crate) fn answered(&self, hold: Option<Hold>) {
        *self.hold() = hold;
        self.0.phase.store(IDLE, Ordering::Relaxed);
    }

    fn hold(&self) -> MutexGuard<'_, Option<Hold>> {
        self.0.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing may be written yet. Whoever made the hold wakes the connection when that changes.
    fn holds(&self) -> bool {
        let mut hold = self.hold();
        let holds = hold.as_ref().is_some_and(Hold::holds);
        if !holds {
            *hold = None;
        }
        holds
    }
}

/// A stream whose reads fail once a head takes too long.
pub(crate) struct Patient<S> {
    stream: S,
    phase: Phase,
    head_time: Duration,
    late: Pin<Box<Sleep>>,
}

impl<S> Patient<S> {
    /// The first head counts from now: who connects has something to ask.
    pub(crate) fn new(stream: S, head_time: Duration) -> (Self, Phase) {
        let state = State { phase: AtomicU8::new(HEAD), hold: Mutex::new(None) };
        let phase = Phase(Arc::new(state));
        let late = Box::pin(sleep(head_time));
        (Self { stream, phase: phase.clone(), head_time, late }, phase)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            let phase = &self.phase.0.phase;
            if phase.compare_exchange(IDLE, HEAD, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                self.late = Box::pin(sleep(self.head_time));
            }
        }
        if read.is_pending()
            && self.phase.0.phase.load(Ordering::Relaxed) == HEAD
            && self.late.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.phase.holds() {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.phase.holds() {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// What was written.
    #[derive(Default)]
    struct Sink(Vec<u8>);

    impl AsyncWrite for Sink {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.extend_from_slice(bytes);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn nothing_is_written_while_an_answer_holds_itself_back() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let (mut stream, phase) = Patient::new(Sink::default(), Duration::from_secs(9));
        let context = &mut Context::from_waker(Waker::noop());
        let mut write = |bytes: &[u8], parts: bool| {
            let slices = [io::IoSlice::new(bytes)];
            let stream = Pin::new(&mut stream);
            let wrote = if parts {
                stream.poll_write_vectored(context, &slices)
            } else {
                stream.poll_write(context, bytes)
            };
            wrote.map(Result::unwrap)
        };
        assert_eq!(write(b"a", false), Poll::Ready(1));
        let hold = Hold::new(Duration::from_secs(60));
        phase.answered(Some(hold.clone()));
        assert_eq!((write(b"b", false), write(b"b", true)), (Poll::Pending, Poll::Pending));
        hold.let_go();
        assert_eq!((write(b"cd", true), write(b"e", false)), (Poll::Ready(2), Poll::Ready(1)));
        // Nobody lets go: its time ends all the same. The next answer knows nothing of it.
        phase.answered(Some(Hold::new(Duration::from_millis(20))));
        assert_eq!(write(b"f", true), Poll::Pending);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(write(b"g", true), Poll::Ready(1));
        phase.answered(Some(Hold::new(Duration::from_secs(60))));
        phase.answered(None);
        assert_eq!(write(b"h", true), Poll::Ready(1));
        assert_eq!(stream.stream.0, b"acdegh");
    }
}
