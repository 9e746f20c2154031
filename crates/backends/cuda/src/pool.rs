//! The sub-allocator of frozen state: one reservation, first fit, neighbours merge when freed.

use std::collections::BTreeMap;

/// Every allocation starts at a multiple of this.
pub(crate) const ALIGNMENT: usize = 256;

/// Free ranges of a reservation, by offset.
#[derive(Debug)]
pub(crate) struct Pool {
    free: BTreeMap<usize, usize>,
    size: usize,
    used: usize,
}

impl Pool {
    /// A pool of `size` bytes, all free.
    pub(crate) fn new(size: usize) -> Self {
        let size = size / ALIGNMENT * ALIGNMENT;
        let free = if size > 0 { BTreeMap::from([(0, size)]) } else { BTreeMap::new() };
        Self { free, size, used: 0 }
    }

    /// The offset of `bytes` free bytes, or `None` where no free range is that long.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Option<usize> {
        let bytes = rounded(bytes)?;
        let (&offset, &length) = self.free.iter().find(|&(_, &length)| length >= bytes)?;
        self.free.remove(&offset);
        if length > bytes {
            self.free.insert(offset + bytes, length - bytes);
        }
        self.used += bytes;
        Some(offset)
    }

    /// Gives back what `allocate` returned for the same number of bytes.
    pub(crate) fn release(&mut self, offset: usize, bytes: usize) {
        let Some(mut length) = rounded(bytes) else { return };
        debug_assert!(offset + length <= self.size && self.used >= length);
        self.used -= length;
        let mut start = offset;
        if let Some((&before, &its)) = self.free.range(..offset).next_back()
            && before + its == offset
        {
            self.free.remove(&before);
            start = before;
            length += its;
        }
        if let Some(its) = self.free.remove(&(start + length)) {
            length += its;
        }
        self.free.insert(start, length);
    }

    /// Bytes handed out, in whole alignments.
    #[cfg(test)]
    pub(crate) const fn used(&self) -> usize {
        self.used
    }
}

/// Whole alignments, at least one, so that every allocation has an offset of its own.
fn rounded(bytes: usize) -> Option<usize> {
    bytes.max(1).checked_next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_fit_reuses_and_merges() {
        let mut pool = Pool::new(4096);
        let a = pool.allocate(1000).unwrap();
        let b = pool.allocate(1).unwrap();
        let c = pool.allocate(2560).unwrap();
        assert_eq!((a, b, c), (0, 1024, 1280));
        assert_eq!(pool.allocate(512), None);
        pool.release(b, 1);
        assert_eq!(pool.allocate(257), None);
        pool.release(a, 1000);
        assert_eq!(pool.allocate(1280), Some(0));
        pool.release(0, 1280);
        pool.release(c, 2560);
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.allocate(4096), Some(0));
    }

    #[test]
    fn random_use_never_overlaps_and_ends_in_one_range() {
        let fill = ampoule_plan::RandomFill { seed: 3, centre: 0.5, half_width: 0.5 };
        let mut pool = Pool::new(1 << 20);
        let mut alive: Vec<(usize, usize)> = Vec::new();
        for i in 0..5000 {
            let r = fill.value(i);
            if r < 0.55 {
                let bytes = 1 + (fill.value(i + 10_000) * 30_000.0) as usize;
                if let Some(offset) = pool.allocate(bytes) {
                    assert_eq!(offset % ALIGNMENT, 0);
                    assert!(alive.iter().all(|&(o, b)| offset + bytes <= o || o + b <= offset));
                    alive.push((offset, bytes));
                }
            } else if !alive.is_empty() {
                let (offset, bytes) = alive.swap_remove((r * 1e6) as usize % alive.len());
                pool.release(offset, bytes);
            }
        }
        for (offset, bytes) in alive {
            pool.release(offset, bytes);
        }
        assert_eq!((pool.used(), pool.free.len()), (0, 1));
    }

    #[test]
    fn an_empty_pool_gives_nothing() {
        assert_eq!(Pool::new(0).allocate(0), None);
        assert_eq!(Pool::new(1024).allocate(usize::MAX), None);
    }
}
