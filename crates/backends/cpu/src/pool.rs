//! A pool of threads that share the tasks of one call.
//!
//! The caller works too, and waits only for workers that have taken part: a worker that sleeps, or that the system
//! gave no core, holds nobody up. Which thread runs which task is left to chance, so a task's result must depend
//! on its index alone.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker watches for work before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// In [`Shared::state`]: workers may join.
const OPEN: u64 = 1 << 31;
/// In [`Shared::state`]: workers that take part.
const ACTIVE: u64 = OPEN - 1;

/// The function of the current call: thread and task index.
type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

struct Call {
    /// Borrowed from the caller of [`Pool::run`], who returns only once no worker is active.
    task: Option<Task<'static>>,
    tasks: usize,
}

/// A counter alone on its cache lines.
#[repr(align(128))]
struct Line(AtomicUsize);

struct Shared {
    /// Number of the call in the upper half; then [`OPEN`] and [`ACTIVE`].
    state: AtomicU64,
    /// Each thread's next task. Threads begin with a range of their own, so that neighbouring tasks run one after
    /// another, and then help the others.
    next: Vec<Line>,
    stop: AtomicBool,
    call: UnsafeCell<Call>,
    asleep: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `call` is written only while the state is closed and no worker is active, and read only by active ones.
unsafe impl Sync for Shared {}

impl Shared {
    /// The first task of a thread's own range.
    fn start_of(&self, thread: usize, tasks: usize) -> usize {
        tasks * thread / self.next.len()
    }

    /// Runs tasks until none is left; keeps the first panic.
    fn work(&self, thread: usize, call: &Call) {
        let Some(task) = call.task else { return };
        let run = || {
            for owner in 0..self.next.len() {
                let owner = (thread + owner) % self.next.len();
                let end = self.start_of(owner + 1, call.tasks);
                loop {
                    let index = self.next[owner].0.fetch_add(1, Ordering::Relaxed);
                    if index >= end {
                        break;
                    }
                    task(thread, index);
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            for next in &self.next {
                next.0.store(call.tasks, Ordering::Relaxed); // no more tasks of this call
            }
            self.panic
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .get_or_insert(panic);
        }
    }

    fn worker(&self, thread: usize) {
        let mut seen = 0;
        let mut idle = Instant::now();
        let mut looks = 0_u32;
        while !self.stop.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::SeqCst);
            if state & OPEN != 0 && state >> 32 != seen {
                let joined = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    seen = state >> 32;
                    // SAFETY: this worker is active, so the caller leaves the call as it is.
                    self.work(thread, unsafe { &*self.call.get() });
                    self.state.fetch_sub(1, Ordering::Release);
                    idle = Instant::now();
                }
                continue;
            }
            looks += 1;
            if !looks.is_multiple_of(64) || idle.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            // Say so first, then look once more: the caller opens first, then looks who sleeps.
            self.asleep[thread].store(true, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            let work = state & OPEN != 0 && state >> 32 != seen;
            if !work && !self.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.asleep[thread].store(false, Ordering::SeqCst);
            idle = Instant::now();
        }
    }
}

/// Threads that wait for calls.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool in which so many threads work at once, the caller among them. Where the system gives fewer, fewer do.
    pub(crate) fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: (0..threads).map(|_| Line(AtomicUsize::new(0))).collect(),
            stop: AtomicBool::new(false),
            call: UnsafeCell::new(Call { task: None, tasks: 0 }),
            asleep: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        let spawn = |thread: usize| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("ampoule-cpu-{thread}"));
            builder.spawn(move || shared.worker(thread)).ok()
        };
        let workers = (1..threads).map_while(spawn).collect();
        Self { shared, workers }
    }

    /// Threads that work, the caller among them. Their numbers are below this.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(thread, index)` for every index below `tasks`; returns when all are done.
    ///
    /// # Panics
    /// If a task does: with its panic, once no thread works on the call any more.
    pub(crate) fn run(&mut self, tasks: usize, task: Task<'_>) {
        if tasks <= 1 || self.workers.is_empty() {
            for index in 0..tasks {
                task(0, index);
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; no worker uses the reference after this function has returned.
        let task = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        let before = shared.state.load(Ordering::Acquire);
        debug_assert_eq!(before & (OPEN | ACTIVE), 0, "calls do not overlap: run takes &mut self");
        // SAFETY: closed and nobody active: no worker reads the cell, and `&mut self` keeps other callers out.
        unsafe { *shared.call.get() = Call { task: Some(task), tasks } };
        for (thread, next) in shared.next.iter().enumerate() {
            next.0.store(shared.start_of(thread, tasks), Ordering::Relaxed);
        }
        let number = ((before >> 32) + 1) & u64::from(u32::MAX);
        shared.state.store((number << 32) | OPEN, Ordering::SeqCst);
        for (worker, asleep) in self.workers.iter().zip(&shared.asleep[1..]) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        // SAFETY: nobody writes the cell while the call is open.
        shared.work(0, unsafe { &*shared.call.get() });
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0_u32;
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            looks += 1;
            if looks.is_multiple_of(4096) {
                std::thread::yield_now(); // the worker may need this core
            }
            std::hint::spin_loop();
        }
        // SAFETY: closed and nobody active, as above.
        unsafe { (*shared.call.get()).task = None };
        let panic = shared.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join(); // its panics were given to the caller
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..5 {
            let mut pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                for _ in 0..200 {
                    let seen: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|thread, index| {
                        assert!(thread < threads);
                        seen[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1));
                }
            }
            std::thread::sleep(Duration::from_millis(2)); // until the workers sleep
            let sum = AtomicUsize::new(0);
            pool.run(50, &|_, index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 1225);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(3);
        for round in 0..50 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, &|_, index| assert!(index != round % 20, "task {index}"));
            }));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|_, index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }
}
