//! Aligned, zeroed bytes.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use ampoule_backend::host::HostBytes;

/// Alignment of every buffer: one cache line, one AVX-512 register.
pub(crate) const ALIGN: usize = 64;

/// Buffers from this size on start on a page of [`HUGE`] bytes and ask for such pages.
const HUGE: usize = 2 << 20;

/// Zeroed bytes at a multiple of 64. Pages that nobody touched take no memory.
#[derive(Debug)]
pub struct AlignedBytes {
    data: NonNull<u8>,
    len: usize,
    block: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the value owns its bytes alone, as a Vec<u8> does.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// The bytes' address, to be read and written through while this value is borrowed by nobody else.
    pub(crate) fn address(&mut self) -> *mut u8 {
        self.data.as_ptr()
    }
}

impl HostBytes for AlignedBytes {
    fn zeroed(len: usize) -> Option<Self> {
        let align = if len >= HUGE { HUGE } else { ALIGN };
        // The allocator's own alignment with room to move: only so does it hand out untouched zero pages.
        let layout = Layout::from_size_align(len.max(1).checked_add(align)?, 16).ok()?;
        // SAFETY: the layout is not empty.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let skip = block.as_ptr().align_offset(align);
        // SAFETY: `skip < align`, and the block has `align` bytes more than `len`.
        let data = unsafe { block.add(skip) };
        if len >= HUGE {
            ask_for_huge_pages(data, len);
        }
        Some(Self { data, len, block, layout })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes, owned by this value.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes, owned by this value, which is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, freed once.
        unsafe { dealloc(self.block.as_ptr(), self.layout) };
    }
}

/// Large pages spare address translation when weights are streamed. A refusal costs nothing but that.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(data: NonNull<u8>, len: usize) {
    unsafe extern "C" {
        fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    const MADV_HUGEPAGE: i32 = 14;
    // SAFETY: whole pages inside an allocation of ours; the advice changes no byte.
    unsafe { madvise(data.as_ptr().cast(), len / HUGE * HUGE, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: NonNull<u8>, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_aligned_zero_and_writable() {
        for len in [0, 1, 63, 64, 4096, HUGE, 3 * HUGE + 5] {
            let mut memory = AlignedBytes::zeroed(len).unwrap();
            assert_eq!(memory.address().addr() % ALIGN, 0);
            assert_eq!(memory.bytes().len(), len);
            assert!(memory.bytes().iter().all(|b| *b == 0));
            memory.bytes_mut().fill(7);
            assert!(memory.bytes().iter().all(|b| *b == 7));
        }
        assert!(AlignedBytes::zeroed(usize::MAX - 8).is_none());
    }

    #[test]
    fn untouched_pages_take_no_memory() {
        // Far more than any machine that runs the tests has; only works if nothing is written.
        let memory = AlignedBytes::zeroed(1 << 36);
        assert!(memory.is_none_or(|m| m.bytes()[1 << 35] == 0));
    }
}
