//! Frozen state in the capsule reservation, and copies of regions by one kernel over a table.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ampoule_backend::{BackendError, Frozen, Region, Residence, StateRegions, check_regions};
use ampoule_plan::{BufferId, Sealed};

use crate::device::Limits;
use crate::driver::{Event, Launch, Stream};
use crate::kernels::COPY_KERNELS;
use crate::launch::arguments::Piece;
use crate::launch::{Launcher, args};
use crate::memory::{ALIGNMENT, Layout, Resident};
use crate::pinned::PinnedPool;
use crate::pool::Pool;
use crate::staging::Downloader;

/// Bytes of each of the two areas through which frozen state is read.
const DOWNLOAD: usize = 4 << 20;

/// The reservation for frozen state of one program. Frozen state keeps it, and so the device's memory, alive.
pub(crate) struct CapsuleStore {
    pub(crate) resident: Arc<Resident>,
    /// All fixed state: at most boundaries nothing else is frozen, or this and rows.
    fixed: Arc<RegionLayout>,
    /// What grows by rows: the model's own table is large, and in no cache when a boundary is reached.
    growing: Vec<Extent>,
    ranges: Mutex<Ranges>,
    downloads: Mutex<Option<Downloader>>,
    pub(crate) pinned: PinnedPool,
    pub(crate) copies: Arc<Stream>,
    /// Events whose copies nobody asks about any more; at most as many as were in use at once.
    spare: Mutex<Vec<Event>>,
    /// Whether rows may still be on their way on `copies` that nobody has waited for.
    pub(crate) beside: AtomicBool,
    budget: usize,
    pub(crate) synchronizations: AtomicU64,
}

struct Ranges {
    pool: Pool,
    used: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for CapsuleStore {
    fn drop(&mut self) {
        // Copies may still run over the reservation, and over slots.
        let _ = self.copies.synchronize();
    }
}

impl CapsuleStore {
    /// The store over the resident's reservation.
    pub(crate) fn new(resident: &Arc<Resident>, budget: usize) -> Result<Arc<Self>, BackendError> {
        let pool = Pool::new(if budget == 0 { 0 } else { resident.capsules.bytes() });
        let copies = Stream::new(&resident.device.context)?;
        let (model, places) = (&resident.model, &resident.layout);
        let fixed = RegionLayout::new(model, places, StateRegions::of(model).fixed())?;
        Ok(Arc::new(Self {
            resident: Arc::clone(resident),
            fixed: Arc::new(fixed),
            growing: Extent::growing(model, places),
            ranges: Mutex::new(Ranges { pool, used: 0 }),
            downloads: Mutex::new(None),
            pinned: PinnedPool::default(),
            copies,
            spare: Mutex::default(),
            beside: AtomicBool::new(false),
            budget,
            synchronizations: AtomicU64::new(0),
        }))
    }

    /// Bytes of frozen state alive, and the budget.
    pub(crate) fn usage(&self) -> (usize, usize) {
        (lock(&self.ranges).used, self.budget)
    }

    /// How regions lie in a frozen range, after checking that they are of the model's State.
    pub(crate) fn layout_of(&self, regions: &[Region]) -> Result<Arc<RegionLayout>, BackendError> {
        if regions == self.fixed.regions {
            return Ok(Arc::clone(&self.fixed));
        }
        let Resident { model, layout, .. } = &*self.resident;
        let rows = RegionLayout::of_rows(&self.growing, regions);
        Ok(Arc::new(rows.map_or_else(|| RegionLayout::new(model, layout, regions), Ok)?))
    }

    /// Keeps an event for the next copy, once nobody else holds it. Streams that were told to wait for it do so for what it
    /// marked then.
    pub(crate) fn done_with(&self, event: Option<Arc<Event>>) {
        if let Some(event) = event.and_then(Arc::into_inner) {
            lock(&self.spare).push(event);
        }
    }

    /// An event without timing.
    pub(crate) fn event(&self) -> Result<Event, BackendError> {
        lock(&self.spare).pop().map_or_else(|| Event::new(&self.resident.device.context, false), Ok)
    }

    /// Reserves room for regions; nothing is copied.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        layout: Arc<RegionLayout>,
    ) -> Result<CudaFrozen, BackendError> {
        let bytes = layout.bytes;
        let mut ranges = lock(&self.ranges);
        let refused =
            |used| BackendError::CapsuleBudget { wanted: bytes, used, budget: self.budget };
        if ranges.used.checked_add(bytes).is_none_or(|sum| sum > self.budget) {
            return Err(refused(ranges.used));
        }
        let at = if bytes == 0 {
            None
        } else {
            Some(ranges.pool.allocate(layout.length).ok_or_else(|| refused(ranges.used))?)
        };
        ranges.used += bytes;
        drop(ranges);
        Ok(CudaFrozen { store: Arc::clone(self), layout, at, ready: None, beside: false })
    }
}

/// Regions, and how they lie in a frozen range.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RegionLayout {
    pub(crate) regions: Vec<Region>,
    /// Of each region, from the start of the range.
    offsets: Vec<usize>,
    /// What copying all of it copies.
    runs: Vec<Run>,
    /// Whether no two regions overlap.
    apart: bool,
    /// Bytes of the range.
    length: usize,
    /// Bytes of the regions.
    pub(crate) bytes: usize,
}

/// A State buffer, as far as freezing it has to know.
struct Extent {
    buffer: BufferId,
    rows: usize,
    row_bytes: usize,
    /// From the start of a slot's memory.
    in_slot: usize,
}

impl Extent {
    fn of(model: &Sealed, places: &Layout, buffer: BufferId) -> Self {
        let found = &model.model().buffers[buffer];
        let (rows, row_bytes) = (found.rows(), found.row_bytes());
        Self { buffer, rows, row_bytes, in_slot: places.place(buffer).offset }
    }

    /// Those of what grows by rows, in the order of the model's State.
    fn growing(model: &Sealed, places: &Layout) -> Vec<Self> {
        let all = StateRegions::of(model).rows(&(0..1));
        all.iter().map(|region| Self::of(model, places, region.buffer)).collect()
    }

    fn span(&self, rows: &Range<usize>) -> Span {
        Span {
            in_slot: self.in_slot + rows.start * self.row_bytes,
            bytes: rows.len() * self.row_bytes,
            whole: *rows == (0..self.rows),
        }
    }
}

impl RegionLayout {
    fn new(model: &Sealed, places: &Layout, regions: &[Region]) -> Result<Self, BackendError> {
        check_regions(model, regions)?;
        let span = |r: &Region| Extent::of(model, places, r.buffer).span(&r.rows);
        let spans: Vec<Span> = regions.iter().map(span).collect();
        Ok(Self::packed(regions, &spans, apart(std::iter::once(regions))))
    }

    /// The same of the same rows of everything that grows, as at a boundary; nothing of other regions.
    fn of_rows(growing: &[Extent], regions: &[Region]) -> Option<Self> {
        let rows = regions.first()?.rows.clone();
        let span = |(region, of): (&Region, &Extent)| {
            let fits = region.buffer == of.buffer && region.rows == rows && rows.end <= of.rows;
            fits.then(|| of.span(&rows))
        };
        if regions.len() != growing.len() || rows.start > rows.end {
            return None;
        }
        let spans: Option<Vec<Span>> = regions.iter().zip(growing).map(span).collect();
        // They are of different buffers.
        Some(Self::packed(regions, &spans?, true))
    }

    fn packed(regions: &[Region], spans: &[Span], apart: bool) -> Self {
        let Packed { offsets, runs, length } = pack(spans);
        let bytes = spans.iter().map(|span| span.bytes).sum();
        Self { regions: regions.to_vec(), offsets, runs, apart, length, bytes }
    }
}

/// A region to be packed into a frozen range.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// From the start of a slot's memory.
    in_slot: usize,
    bytes: usize,
    /// Whether it is all of its buffer.
    whole: bool,
}

/// Bytes that lie one after another in a slot and in the frozen range alike: regions, and the padding between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// From the start of the frozen range.
    offset: usize,
    /// From the start of a slot's memory.
    in_slot: usize,
    bytes: usize,
}

/// Where regions lie in a frozen range of `length` bytes.
struct Packed {
    /// Of each region.
    offsets: Vec<usize>,
    runs: Vec<Run>,
    length: usize,
}

/// Whole buffers that lie one after another in the slot keep their distance, so that one copy moves them; what lies between
/// them is padding. At most one byte in 64 is: the budget does not count it.
fn pack(spans: &[Span]) -> Packed {
    let mut padding = spans.iter().map(|span| span.bytes).sum::<usize>() / 64;
    let mut packed =
        Packed { offsets: Vec::with_capacity(spans.len()), runs: Vec::new(), length: 0 };
    let mut before: Option<Span> = None;
    for &span in spans {
        let gap = before.filter(|before| before.whole && span.whole).and_then(|before| {
            let gap = span.in_slot.checked_sub(before.in_slot + before.bytes)?;
            (gap < ALIGNMENT && gap <= padding).then_some(gap)
        });
        let offset = match (gap, packed.runs.last_mut()) {
            (Some(gap), Some(run)) => {
                padding -= gap;
                run.bytes += gap + span.bytes;
                packed.length + gap
            }
            _ => {
                // Both ends of a copy have the same address modulo 16, so that it goes by vectors.
                let offset = packed.length.next_multiple_of(16) + span.in_slot % 16;
                packed.runs.push(Run { offset, in_slot: span.in_slot, bytes: span.bytes });
                offset
            }
        };
        packed.offsets.push(offset);
        packed.length = offset + span.bytes;
        before = Some(span);
    }
    packed
}

/// Regions frozen on the device.
pub(crate) struct CudaFrozen {
    pub(crate) store: Arc<CapsuleStore>,
    pub(crate) layout: Arc<RegionLayout>,
    /// Where in the reservation the range lies; none if nothing was frozen.
    at: Option<usize>,
    /// Recorded after the copy that filled it.
    ready: Option<Arc<Event>>,
    /// Whether that copy was not on the program's stream.
    beside: bool,
}

impl CudaFrozen {
    /// Whether it lies in this store.
    pub(crate) fn is_of(&self, store: &Arc<CapsuleStore>) -> bool {
        Arc::ptr_eq(&self.store, store)
    }

    /// The device address of region `index`.
    pub(crate) fn address(&self, index: usize) -> u64 {
        self.base() + self.layout.offsets[index] as u64
    }

    /// The device address of the range.
    fn base(&self) -> u64 {
        self.store.resident.capsules.at() + self.at.unwrap_or(0) as u64
    }

    /// Whether no two of its regions overlap.
    pub(crate) fn is_apart(&self) -> bool {
        self.layout.apart
    }

    /// The copies that fill it from the slot at `slot`.
    pub(crate) fn taken(&self, slot: u64) -> impl Iterator<Item = Transfer> {
        self.whole(slot).map(|t| Transfer { from: t.to, to: t.from, bytes: t.bytes })
    }

    /// The copies that put all of it into the slot at `slot`; of regions that overlap the later would have to win.
    pub(crate) fn whole(&self, slot: u64) -> impl Iterator<Item = Transfer> {
        let base = self.base();
        self.layout.runs.iter().filter(|run| run.bytes > 0).map(move |run| Transfer {
            from: base + run.offset as u64,
            to: slot + run.in_slot as u64,
            bytes: run.bytes,
        })
    }

    /// Marks the copies enqueued so far on the program's stream as those that fill it.
    pub(crate) fn filled(&mut self) -> Result<(), BackendError> {
        let event = self.store.event()?;
        event.record(&self.store.resident.stream)?;
        self.filled_at(Arc::new(event), false);
        Ok(())
    }

    /// What the event marks fills it; `beside`: on the stream of copies.
    pub(crate) fn filled_at(&mut self, event: Arc<Event>, beside: bool) {
        self.ready = Some(event);
        self.beside = beside;
    }

    /// Lets `stream` wait until the state is there.
    pub(crate) fn awaited(&self, stream: &Stream) -> Result<(), BackendError> {
        self.ready.as_ref().map_or(Ok(()), |ready| stream.wait(ready))
    }

    /// Lets the program's stream wait for a copy that still runs beside it.
    pub(crate) fn settle(&self) -> Result<(), BackendError> {
        match &self.ready {
            Some(ready) if self.beside && !ready.done()? => self.store.resident.stream.wait(ready),
            _ => Ok(()),
        }
    }
}

impl Drop for CudaFrozen {
    fn drop(&mut self) {
        // Copies from and to the range that are still pending come before whatever fills it next: that is enqueued on the
        // program's stream, which waits for the copy that fills the range now, or on the stream of copies, which waits for the
        // program's. Reads hold a reference until they are done.
        let ordered = self.settle().or_else(|_| self.store.copies.synchronize());
        let mut ranges = lock(&self.store.ranges);
        // Where neither can be had the device may still write: nobody gets the range again.
        if let (Some(at), Ok(())) = (self.at, ordered) {
            ranges.pool.release(at, self.layout.length);
        }
        ranges.used -= self.layout.bytes;
        drop(ranges);
        self.store.done_with(self.ready.take());
    }
}

impl Frozen for CudaFrozen {
    fn regions(&self) -> &[Region] {
        &self.layout.regions
    }

    fn bytes(&self) -> usize {
        self.layout.bytes
    }

    fn read(&self, index: usize, into: &mut [u8]) -> Result<(), BackendError> {
        let wrong =
            |problem| BackendError::WrongBuffer { buffer: "frozen state".to_owned(), problem };
        let Some(region) = self.layout.regions.get(index) else {
            return Err(wrong(format!("has {} regions, not {index}", self.layout.regions.len())));
        };
        let bytes = region.bytes(&self.store.resident.model.model().buffers);
        if bytes != into.len() {
            return Err(wrong(format!("region {index} has {bytes} bytes, not {}", into.len())));
        }
        self.awaited(&self.store.copies)?;
        let mut downloads = lock(&self.store.downloads);
        if downloads.is_none() {
            *downloads = Some(Downloader::new(&self.store.resident.device.context, DOWNLOAD)?);
        }
        self.store.synchronizations.fetch_add(1, Ordering::Relaxed);
        let Some(downloads) = downloads.as_mut() else { return Ok(()) };
        // SAFETY: the region lies in the reservation, which lives as long as the store.
        unsafe { downloads.download(&self.store.copies, self.address(index), into) }
    }

    fn residence(&self) -> Residence {
        Residence::Device
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A copy of bytes on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: usize,
}

/// Enqueues copies as one kernel, or as few as their number allows. Ranges written must not overlap.
pub(crate) fn copy(resident: &Resident, transfers: &[Transfer]) -> Result<(), BackendError> {
    copy_on(resident, &resident.stream, 0, transfers)
}

/// The same on another stream. `beside`: with so many small blocks a multiprocessor that replays find room; 0: with all.
pub(crate) fn copy_on(
    resident: &Resident,
    stream: &Stream,
    beside: u32,
    transfers: &[Transfer],
) -> Result<(), BackendError> {
    for part in transfers.chunks(960) {
        let sized = match part.len() {
            0..=8 => launch_copy::<9, 8>,
            9..=96 => launch_copy::<97, 96>,
            _ => launch_copy::<961, 960>,
        };
        sized(resident, stream, beside, part)?;
    }
    Ok(())
}

/// `Pieces<N>` of `memory.cu`.
#[repr(C)]
struct Table<const ENDS: usize, const N: usize> {
    count: i32,
    depth: i32,
    first: [i64; ENDS],
    piece: [Piece; N],
}

/// Threads of a block that copies beside replays: `BESIDE` in `memory.cu`; and vectors that each has on their way there.
const BESIDE: u32 = 64;
const BESIDE_DEPTH: i32 = 12;
/// The same of blocks that have the device to themselves.
const ALONE: u32 = 256;
const ALONE_DEPTH: i32 = 8;
/// Bytes of a tile of a bulk copy, and most tiles of its ring: `BULK_TILE` and `BULK_TILES` in `memory.cu`.
const BULK_TILE: u32 = 16384;
const BULK_TILES: u32 = 12;

/// 64 MiB: from so many on, blocks of threads move larger tiles.
const MANY_VECTORS: i64 = 4 << 20;

fn launch_copy<const ENDS: usize, const N: usize>(
    resident: &Resident,
    stream: &Stream,
    beside: u32,
    transfers: &[Transfer],
) -> Result<(), BackendError> {
    let Limits { multiprocessors, bulk_copies, .. } = resident.device.limits;
    let bulk = bulk_copies && beside == 0;
    // Of a piece that bulk copies move, the whole vectors alone are in tiles.
    let units = |t: &Transfer| {
        if bulk {
            let head = (t.from.wrapping_neg() % 16) as usize;
            (t.bytes.saturating_sub(head) / 16 * 16).div_ceil(BULK_TILE as usize)
        } else {
            ((t.from % 16) as usize + t.bytes).div_ceil(16)
        }
    };
    let mut table = Table::<ENDS, N> {
        count: transfers.len() as i32,
        depth: 0,
        first: [0; ENDS],
        piece: [Piece::default(); N],
    };
    let mut all = 0;
    for (i, t) in transfers.iter().enumerate() {
        debug_assert_eq!(t.from % 16, t.to % 16);
        table.piece[i] = Piece { from: t.from, to: t.to, bytes: t.bytes as i64 };
        all += units(t) as i64;
        table.first[i + 1] = all;
    }
    let row = if bulk { 0 } else { 1 + usize::from(beside > 0) };
    let column = match N {
        8 => 0,
        96 => 1,
        _ => 2,
    };
    let (kernel, name) = (resident.device.kernels.copy(row, column), COPY_KERNELS[row][column]);
    let how = if bulk {
        // A ring begins at a multiple of 128.
        let limit = kernel.shared_limit.saturating_sub(128);
        let depth = (limit / BULK_TILE).clamp(2, BULK_TILES);
        table.depth = depth as i32;
        let blocks = all.clamp(1, i64::from(multiprocessors)) as u32;
        Launch { shared: depth * BULK_TILE + 128, ..Launch::new([blocks, 1, 1], 32) }
    } else {
        // Blocks of 256 threads; at most 32 a multiprocessor, and more than it holds at a time: the last ones to end are short.
        let (threads, each, many) =
            if beside > 0 { (BESIDE, beside, BESIDE_DEPTH) } else { (ALONE, 32, ALONE_DEPTH) };
        table.depth = if beside > 0 || all >= MANY_VECTORS { many } else { 2 };
        let most = multiprocessors * each;
        let tiles = all / (i64::from(threads) * i64::from(table.depth)) + 1;
        Launch::new([tiles.clamp(1, i64::from(most)) as u32, 1, 1], threads)
    };
    Launcher::plain(resident).go_on(stream, kernel, name, how, args![table])
}

/// Rows of one buffer to be thawed: part, region, and rows counted from the region's first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) part: usize,
    pub(crate) region: usize,
    pub(crate) buffer: BufferId,
    pub(crate) rows: Range<usize>,
}

/// What remains of regions when of two that overlap the later wins, so that no byte is written twice.
pub(crate) fn resolve(parts: &[&[Region]]) -> Vec<Wanted> {
    let mut all: Vec<(BufferId, usize, usize)> = Vec::new();
    for (part, regions) in parts.iter().enumerate() {
        all.extend(regions.iter().enumerate().map(|(region, r)| (r.buffer, part, region)));
    }
    all.sort_unstable();
    let mut wanted = Vec::with_capacity(all.len());
    for one in all.chunk_by(|a, b| a.0 == b.0) {
        let mut taken: Vec<Range<usize>> = Vec::new();
        for &(buffer, part, region) in one.iter().rev() {
            let rows = &parts[part][region].rows;
            for rows in uncovered(rows, &taken) {
                wanted.push(Wanted { part, region, buffer, rows });
            }
            taken.push(rows.clone());
        }
    }
    wanted
}

/// Whether no two regions of all parts share a row.
pub(crate) fn apart<'a>(parts: impl Iterator<Item = &'a [Region]>) -> bool {
    let bounds = |region: &Region| (region.buffer, region.rows.start, region.rows.end);
    let mut all: Vec<_> = parts.flatten().map(bounds).collect();
    // A plan's regions come in the order of its buffers.
    if !all.is_sorted() {
        all.sort_unstable();
    }
    all.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1)
}

fn uncovered(rows: &Range<usize>, taken: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut open = vec![rows.clone()];
    for t in taken {
        let mut rest = Vec::with_capacity(open.len());
        for piece in open {
            if t.end <= piece.start || piece.end <= t.start {
                rest.push(piece);
            } else {
                rest.extend(
                    [piece.start..t.start, t.end..piece.end]
                        .into_iter()
                        .filter(|p| p.start < p.end),
                );
            }
        }
        open = rest;
    }
    open.retain(|p| p.start < p.end);
    open
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(buffer: u32, rows: Range<usize>) -> Region {
        Region { buffer: BufferId(buffer), rows }
    }

    #[test]
    fn whole_neighbours_are_one_run() {
        let whole = |in_slot, bytes| Span { in_slot, bytes, whole: true };
        let run = |offset, in_slot, bytes| Run { offset, in_slot, bytes };
        let packed = pack(&[whole(512, 60_000), whole(60_672, 4096), whole(65_536, 8)]);
        // 512 + 60,000 is 160 below the next buffer; then 768 bytes are another buffer's.
        assert_eq!(packed.offsets, [0, 60_160, 64_256]);
        assert_eq!(packed.runs, [run(0, 512, 64_256), run(64_256, 65_536, 8)]);
        assert_eq!(packed.length, 64_264);
        // What lies behind some rows of a buffer is more of its rows.
        let rows = Span { whole: false, ..whole(512, 60_000) };
        assert_eq!(pack(&[rows, whole(60_672, 4096)]).runs.len(), 2);
        assert_eq!(
            pack(&[whole(512, 60_000), Span { whole: false, ..whole(60_672, 9) }]).runs.len(),
            2
        );
        // Small buffers would be more padding than bytes.
        let small: Vec<Span> = (0..8).map(|i| whole(i * 256, 12)).collect();
        let packed = pack(&small);
        assert_eq!((packed.runs.len(), packed.length), (8, 7 * 16 + 12));
        // Addresses keep their place among 16 bytes.
        let odd = pack(&[
            Span { whole: false, ..whole(3, 5) },
            Span { whole: false, ..whole(1030, 100) },
        ]);
        assert_eq!(odd.offsets, [3, 22]);
        // In another order they do not follow each other.
        assert_eq!(pack(&[whole(60_672, 4096), whole(512, 60_000)]).runs.len(), 2);
    }

    #[test]
    fn rows_at_a_boundary_lie_as_any_regions() {
        let sealed = crate::memory::tests::tiny();
        let (places, state) = (Layout::new(&sealed), StateRegions::of(&sealed));
        let growing = Extent::growing(&sealed, &places);
        let all = state.at(64);
        let whole = all.last().unwrap().rows.end;
        for rows in [0..1, 0..17, 5..6, 3..whole, 0..whole, whole - 1..whole] {
            let regions = state.rows(&rows);
            let layout = RegionLayout::of_rows(&growing, &regions).unwrap();
            assert_eq!(layout, RegionLayout::new(&sealed, &places, &regions).unwrap(), "{rows:?}");
            assert_eq!((layout.regions.len(), layout.apart), (growing.len(), true));
            let table = &sealed.model().buffers;
            for (run, region) in layout.runs.iter().zip(&regions).filter(|_| rows.start > 0) {
                let row = table[region.buffer].row_bytes();
                let in_slot = places.place(region.buffer).offset + rows.start * row;
                assert_eq!((run.in_slot, run.bytes), (in_slot, region.bytes(table)), "{rows:?}");
            }
        }
        // Anything else is looked up.
        let mut other = state.rows(&(0..9));
        other[1].rows = 0..8;
        let mut swapped = state.rows(&(0..9));
        swapped.swap(0, 1);
        let few = state.rows(&(0..9))[1..].to_vec();
        let beyond = state.rows(&(0..whole + 1));
        #[expect(clippy::reversed_empty_ranges)]
        let reversed =
            state.rows(&(0..9)).into_iter().map(|r| Region { rows: 9..0, ..r }).collect();
        for regions in [other, swapped, few, beyond, reversed, all, Vec::new()] {
            assert_eq!(RegionLayout::of_rows(&growing, &regions), None, "{regions:?}");
        }
        assert!(RegionLayout::new(&sealed, &places, &state.rows(&(0..whole + 1))).is_err());
    }

    #[test]
    fn the_later_of_two_overlapping_regions_wins() {
        let first = [region(0, 0..10), region(1, 0..4)];
        let second = [region(0, 4..6), region(1, 0..4)];
        let got: Vec<_> =
            resolve(&[&first, &second]).into_iter().map(|w| (w.part, w.region, w.rows)).collect();
        assert_eq!(got.len(), 4);
        assert!(got.contains(&(0, 0, 0..4)) && got.contains(&(0, 0, 6..10)));
        assert!(got.contains(&(1, 0, 4..6)) && got.contains(&(1, 1, 0..4)));
    }

    #[test]
    fn regions_that_share_a_row_are_not_apart() {
        let one = |regions: &[Region]| apart(std::iter::once(regions));
        assert!(one(&[region(0, 0..10), region(1, 0..10), region(0, 10..12)]));
        assert!(!one(&[region(0, 0..10), region(0, 5..15)]));
        assert!(!one(&[region(0, 0..10), region(0, 3..4)]));
        assert!(!one(&[region(0, 3..4), region(1, 0..1), region(0, 0..10)]));
        let (rows, more) = ([region(0, 0..10), region(1, 0..10)], [region(1, 10..12)]);
        assert!(apart([&more[..], &rows[..]].into_iter()));
        assert!(!apart([&more[..], &rows[..], &[region(1, 11..12)][..]].into_iter()));
    }

    #[test]
    fn resolved_regions_write_each_row_once_with_the_last_value() {
        let fill = ampoule_plan::RandomFill { seed: 9, centre: 0.5, half_width: 0.5 };
        for round in 0..200_u64 {
            let pick = |i: u64, n: usize| (fill.value(round * 64 + i) * n as f32) as usize % n;
            let regions: Vec<Vec<Region>> = (0..4)
                .map(|p| {
                    (0..3)
                        .map(|r| {
                            let start = pick(p * 16 + r * 2, 20);
                            region(
                                pick(p * 16 + r * 2 + 8, 2) as u32,
                                start..start + pick(p * 16 + r * 2 + 1, 12),
                            )
                        })
                        .collect()
                })
                .collect();
            let parts: Vec<&[Region]> = regions.iter().map(Vec::as_slice).collect();
            let mut expected = vec![[None; 40]; 2];
            for (p, part) in regions.iter().enumerate() {
                for (r, region) in part.iter().enumerate() {
                    for row in region.rows.clone() {
                        expected[region.buffer.index()][row] = Some((p, r));
                    }
                }
            }
            let mut got = vec![[None; 40]; 2];
            for w in resolve(&parts) {
                for row in w.rows {
                    let cell = &mut got[w.buffer.index()][row];
                    assert_eq!(cell.replace((w.part, w.region)), None, "written twice");
                }
            }
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn the_sizes_are_those_of_the_kernels() {
        let text = |name| crate::compile::SOURCES.iter().find(|s| s.0 == name).unwrap().1;
        let memory = text("memory");
        for line in [
            format!("#define BESIDE {BESIDE}\n"),
            format!("#define BULK_TILE {BULK_TILE}\n"),
            format!("#define BULK_TILES {BULK_TILES}\n"),
        ] {
            assert!(memory.contains(&line), "{line}");
        }
        assert!(crate::compile::COMMON.contains(&format!("#define BLOCK {ALONE}\n")));
        for size in [8, 96, 960] {
            for body in [
                format!("copy_body<{size}, BESIDE, {BESIDE_DEPTH}>(t)"),
                format!("copy_body<{size}, BLOCK, {ALONE_DEPTH}>(t)"),
                format!("bulk_body<{size}>(t)"),
            ] {
                assert_eq!(memory.matches(&body).count(), 1, "{body}");
            }
        }
        for name in COPY_KERNELS.iter().flatten() {
            assert!(memory.contains(&format!(" {name}(")), "{name}");
        }
    }

    #[test]
    fn the_tables_are_those_of_the_kernel() {
        assert_eq!(size_of::<Table<9, 8>>(), 8 + 9 * 8 + 8 * 24);
        assert_eq!(size_of::<Table<97, 96>>(), 8 + 97 * 8 + 96 * 24);
        assert!(size_of::<Table<97, 96>>() <= 4096);
        assert!(size_of::<Table<961, 960>>() <= 32764);
    }
}
