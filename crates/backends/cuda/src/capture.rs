//! Graph capture behind a guard, and graphs that own what they touch.

use std::ptr;
use std::sync::Arc;

use ampoule_backend::BackendError;
use cudarc::driver::sys;

use crate::driver::{Call, Stream, check, counted};

/// A capture in progress. Dropping it, also in a panic, ends the capture and throws its graph away.
pub(crate) struct CaptureGuard<'a> {
    stream: &'a Arc<Stream>,
    active: bool,
}

impl<'a> CaptureGuard<'a> {
    /// Begins to capture the stream. Other threads may go on with other streams.
    pub(crate) fn begin(stream: &'a Arc<Stream>) -> Result<Self, BackendError> {
        stream.context().enter()?;
        counted(Call::Capture);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and is not the default stream.
        check(unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) }, "beginning a capture")?;
        Ok(Self { stream, active: true })
    }

    /// Ends the capture and makes a graph of it, which keeps `owns` alive.
    pub(crate) fn finish<O: Send + Sync>(mut self, owns: Arc<O>) -> Result<Graph<O>, BackendError> {
        let mut graph = ptr::null_mut();
        self.active = false;
        self.stream.context().enter()?;
        // SAFETY: this guard began the capture; `graph` is written.
        let status = unsafe { sys::cuStreamEndCapture(self.stream.raw(), &raw mut graph) };
        check(status, "ending a capture")?;
        let captured = Captured(graph);
        let mut nodes = 0;
        // SAFETY: a null array asks for the number of nodes alone.
        let status = unsafe { sys::cuGraphGetNodes(captured.0, ptr::null_mut(), &raw mut nodes) };
        check(status, "counting a graph's nodes")?;
        let mut executable = ptr::null_mut();
        // SAFETY: the graph is complete; `executable` is written.
        let status =
            unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, captured.0, 0) };
        check(status, "instantiating a graph")?;
        let graph = Graph { executable, nodes, stream: Arc::clone(self.stream), owns };
        // SAFETY: graph and stream are alive.
        let status = unsafe { sys::cuGraphUpload(graph.executable, self.stream.raw()) };
        check(status, "uploading a graph")?;
        Ok(graph)
    }
}

impl Drop for CaptureGuard<'_> {
    fn drop(&mut self) {
        if self.active && self.stream.context().enter().is_ok() {
            let mut graph = ptr::null_mut();
            // SAFETY: this guard began the capture; what it yields is destroyed.
            unsafe { sys::cuStreamEndCapture(self.stream.raw(), &raw mut graph) };
            drop(Captured(graph));
        }
    }
}

/// A captured, not executable graph.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: came from a capture, destroyed once.
            unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// An executable graph and everything it touches.
pub(crate) struct Graph<O: Send + Sync> {
    executable: sys::CUgraphExec,
    nodes: usize,
    stream: Arc<Stream>,
    /// Buffers, modules, workspaces: dropped after the graph.
    #[allow(dead_code)]
    owns: Arc<O>,
}

// SAFETY: an executable graph may be launched from any thread, one at a time; `&mut` programs see to that.
unsafe impl<O: Send + Sync> Send for Graph<O> {}

impl<O: Send + Sync> Graph<O> {
    /// Enqueues one replay.
    pub(crate) fn launch(&self) -> Result<(), BackendError> {
        self.stream.context().enter()?;
        counted(Call::Graph);
        // SAFETY: the graph is instantiated and owns what it touches; the stream is alive.
        check(
            unsafe { sys::cuGraphLaunch(self.executable, self.stream.raw()) },
            "launching a graph",
        )
    }

    /// Kernels and copies in it.
    pub(crate) const fn nodes(&self) -> usize {
        self.nodes
    }
}

impl<O: Send + Sync> Drop for Graph<O> {
    fn drop(&mut self) {
        // A replay may still run over the buffers that go next.
        let _ = self.stream.synchronize();
        // SAFETY: instantiated once, destroyed once; no replay is pending.
        unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}
