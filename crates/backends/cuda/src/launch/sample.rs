//! The launch of `sample.cu`.

use ampoule_backend::BackendError;
use ampoule_plan::Sample;

use super::arguments::SampleArgs;
use super::{Launcher, args};
use crate::driver::Launch;

/// Blocks of the cooperative launch: few enough for cheap barriers, many enough for the bandwidth of the cache.
const BLOCKS: u32 = 64;
const THREADS: u32 = 512;

impl Launcher<'_> {
    pub(super) fn sample(&self, o: &Sample) -> Result<(), BackendError> {
        let vocabulary = o.logits.width();
        let blocks = BLOCKS.min(self.resident.device.limits.multiprocessors).max(1);
        let blocks = blocks.min(vocabulary.div_ceil(THREADS as usize) as u32).max(1);
        let slice = vocabulary.div_ceil(blocks as usize);
        let p = SampleArgs {
            logits: self.address(&o.logits),
            params: self.address(&o.params),
            seed: self.address(&o.seed),
            bias_tokens: self.address(&o.bias_tokens),
            bias_values: self.address(&o.bias_values),
            cursor: self.address(&o.cursor),
            forced: self.address(&o.forced),
            counts: self.address(&o.counts),
            adjusted: self.address(&o.adjusted),
            token: self.address(&o.token),
            mirror: self.resident.mirror_at,
            work: self.resident.sample_work.at(),
            vocabulary: vocabulary as i32,
            biases: o.bias_tokens.width() as i32,
            slice: slice as i32,
            pad: 0,
        };
        let how = Launch {
            shared: (slice * 4) as u32,
            cooperative: true,
            ..Launch::new([blocks, 1, 1], THREADS)
        };
        self.go("sample", how, args![p])
    }
}
