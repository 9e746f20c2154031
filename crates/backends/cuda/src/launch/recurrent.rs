//! Launches of `recurrent.cu`.

use ampoule_backend::BackendError;
use ampoule_plan::{CausalConv, GatedDelta, GatedRmsNorm};

use super::arguments::DeltaArgs;
use super::{BLOCK, Launcher, args};
use crate::memory::DELTA_DONE;

/// Lanes that share a pair of value columns: `GROUPS` in `recurrent.cu`.
const GROUPS: usize = 8;

impl Launcher<'_> {
    pub(super) fn causal_conv(&self, o: &CausalConv) -> Result<(), BackendError> {
        let (x, out) = (self.matrix(&o.x), self.matrix(&o.out));
        let (weight, bias) = (self.address(&o.weight), self.optional(o.bias.as_ref()));
        let (count, state) = (self.optional(o.count.as_ref()), self.address(&o.state));
        let taps = o.weight.width();
        // A span must hold the whole state, so that only the first one reads it.
        let (rows, channels) = (o.x.height(), o.x.width());
        let span = taps.max(if rows <= 128 { 8 } else { 64 });
        let grid = [channels.div_ceil(BLOCK as usize) as u32, rows.div_ceil(span) as u32, 1];
        let how = self.early(grid, BLOCK);
        let (rows, channels, taps, span) = (rows as i32, channels as i32, taps as i32, span as i32);
        self.go(
            "causal_conv",
            how,
            args![x, weight, bias, count, state, out, rows, channels, taps, span],
        )
    }

    pub(super) fn gated_delta(
        &self,
        o: &GatedDelta,
        norm: Option<&GatedRmsNorm>,
    ) -> Result<(), BackendError> {
        let chunks = match o.key_dim {
            0..=32 => 1,
            33..=64 => 2,
            65..=128 => 4,
            129..=256 => 8,
            more => {
                return Err(self.unsupported(format!("key heads of {more} elements; at most 256")));
            }
        };
        // Heads are cut so that all multiprocessors work; in decode, time goes to latency, and one block a head needs no
        // meeting of blocks before the norm.
        let wide = norm.is_some() && o.value_dim <= 128 && chunks <= 4;
        let columns = o.value_dim.min(if wide { 128 } else { 32 });
        let mut p = DeltaArgs {
            qkv: self.matrix(&o.qkv),
            decay: self.matrix(&o.decay),
            beta: self.matrix(&o.beta),
            out: self.matrix(&o.out),
            a_log: self.address(&o.a_log),
            dt_bias: self.address(&o.dt_bias),
            count: self.optional(o.count.as_ref()),
            state: self.address(&o.state),
            rows: o.out.height() as i32,
            key_heads: o.key_heads as i32,
            value_heads: o.value_heads as i32,
            key_dim: o.key_dim as i32,
            value_dim: o.value_dim as i32,
            columns: columns as i32,
            early: i32::from(
                self.is_weight(&o.a_log)
                    && self.is_weight(&o.dt_bias)
                    && self.only_writer(&o.state),
            ),
            ..DeltaArgs::default()
        };
        if let Some(norm) = norm {
            p.gate = self.matrix(&norm.gate);
            p.normed = self.matrix(&norm.out);
            p.norm_weight = self.address(&norm.weight);
            p.eps = norm.eps;
            p.done = self.resident.sample_work.at() + DELTA_DONE as u64;
        }
        let threads = (columns.div_ceil(2) * GROUPS).next_multiple_of(32) as u32;
        let grid = [o.value_heads as u32, o.value_dim.div_ceil(columns) as u32, 1];
        let kind = match norm {
            None => "tokens",
            Some(_) if wide => "step_wide",
            Some(_) => "step",
        };
        let name = format!("gated_delta_{kind}_{chunks}");
        self.go(&name, self.early(grid, threads), args![p])
    }
}
