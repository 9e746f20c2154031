//! Pinned host memory for copies: a ring for uploads that must not block, a pair of areas for downloads.

use std::sync::Arc;

use ampoule_backend::BackendError;

use crate::driver::{Context, Event, PinnedMemory, Stream};

const SEGMENTS: usize = 8;

/// A ring of segments. A segment is written again only after the copies from it are done.
pub(crate) struct UploadRing {
    memory: PinnedMemory,
    segment: usize,
    current: usize,
    used: usize,
    events: Vec<Event>,
    pending: [bool; SEGMENTS],
}

impl UploadRing {
    /// A ring of eight segments of `segment` bytes.
    pub(crate) fn new(context: &Arc<Context>, segment: usize) -> Result<Self, BackendError> {
        let memory = PinnedMemory::new(context, segment * SEGMENTS)?;
        let events = (0..SEGMENTS).map(|_| Event::new(context, false)).collect::<Result<_, _>>()?;
        Ok(Self { memory, segment, current: 0, used: 0, events, pending: [false; SEGMENTS] })
    }

    /// Bytes of one segment.
    pub(crate) const fn segment(&self) -> usize {
        self.segment
    }

    /// Enqueues a copy to the device, from bytes that `write` puts into pinned memory. Returns whether it had to wait
    /// for room, which only happens when more than the ring is in flight.
    ///
    /// # Safety
    /// `to..to + bytes` must lie in one device allocation that outlives the stream's work; `bytes` fits a segment.
    pub(crate) unsafe fn upload(
        &mut self,
        stream: &Stream,
        to: u64,
        bytes: usize,
        write: impl FnOnce(&mut [u8]) -> Result<(), BackendError>,
    ) -> Result<bool, BackendError> {
        debug_assert!(bytes <= self.segment);
        let mut waited = false;
        if self.used + bytes > self.segment {
            self.events[self.current].record(stream)?;
            self.pending[self.current] = true;
            self.current = (self.current + 1) % SEGMENTS;
            self.used = 0;
            if self.pending[self.current] {
                self.events[self.current].synchronize()?;
                self.pending[self.current] = false;
                waited = true;
            }
        }
        // SAFETY: inside the allocation, and no copy from this part is pending: it is past `used` in a segment
        // whose earlier copies are done.
        let area = unsafe {
            std::slice::from_raw_parts_mut(
                self.memory.at().add(self.current * self.segment + self.used),
                bytes,
            )
        };
        write(area)?;
        self.used = (self.used + bytes).next_multiple_of(64).min(self.segment);
        // SAFETY: the area is pinned and stays unchanged until the segment's event; the destination is the caller's
        // promise.
        unsafe { stream.upload(to, area.as_ptr(), bytes)? };
        Ok(waited)
    }
}

/// Downloads of any size through two pinned areas, so that the link and the copy out of pinned memory overlap.
pub(crate) struct Downloader {
    areas: [PinnedMemory; 2],
    events: [Event; 2],
}

impl Downloader {
    /// Two areas of `bytes`.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, BackendError> {
        Ok(Self {
            areas: [PinnedMemory::new(context, bytes)?, PinnedMemory::new(context, bytes)?],
            events: [Event::new(context, false)?, Event::new(context, false)?],
        })
    }

    /// Copies `from..from + into.len()` of the device out, after the stream's work so far.
    ///
    /// # Safety
    /// The range must lie in one device allocation.
    pub(crate) unsafe fn download(
        &mut self,
        stream: &Stream,
        from: u64,
        into: &mut [u8],
    ) -> Result<(), BackendError> {
        let size = self.areas[0].bytes();
        let total = into.len();
        let enqueue = |this: &Self, index: usize| {
            let start = index * size;
            let bytes = size.min(total - start);
            let area = &this.areas[index % 2];
            // SAFETY: the area holds `bytes` and was copied out before it is used again; the source is the caller's
            // promise.
            unsafe { stream.download(area.at(), from + start as u64, bytes)? };
            this.events[index % 2].record(stream)
        };
        let chunks = total.div_ceil(size);
        if chunks > 0 {
            enqueue(self, 0)?;
        }
        for index in 0..chunks {
            if index + 1 < chunks {
                enqueue(self, index + 1)?;
            }
            self.events[index % 2].synchronize()?;
            let start = index * size;
            let bytes = size.min(total - start);
            // SAFETY: the copy into the area is done, and the next one into it comes after this.
            let area = unsafe { std::slice::from_raw_parts(self.areas[index % 2].at(), bytes) };
            into[start..start + bytes].copy_from_slice(area);
        }
        Ok(())
    }
}
