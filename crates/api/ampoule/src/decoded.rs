//! Whether decode leaves what prefill leaves.

use crate::{Ampoule, Error, sample_tokens};

/// Tokens read both ways: past the end of a prefill chunk.
const TOKENS: usize = 160;

impl Ampoule {
    /// Whether a token read by decode leaves the same bits as one read by prefill, in every State buffer but the sampler's
    /// own: so that a reply may stand for a prompt that repeats it.
    ///
    /// The backends of the CPU keep one order of reduction for both, whatever runs beside a row. That is a property of their
    /// kernels, which this checks once for the model at hand: a text is read both ways and all state compared. Other
    /// backends choose kernels by the number of rows; for them the answer is no. Takes two slots for the time.
    ///
    /// # Errors
    /// If there are no two free slots, or the device fails.
    pub fn decode_reads_as_prefill(&mut self) -> Result<bool, Error> {
        if !matches!(self.engine.device().backend, "cpu" | "reference") {
            return Ok(false);
        }
        let length = TOKENS.min(self.engine.context() / 2).max(2);
        let tokens = sample_tokens(self, length, 1)?;
        let whole = self.slot_with(&tokens)?;
        let stepped = self.slot_with(&tokens[..1]);
        let same = stepped.and_then(|stepped| {
            let compared = tokens[1..]
                .iter()
                .try_for_each(|token| self.engine.step_forced(stepped, *token))
                .and_then(|()| {
                    // Counts of what was generated become those of what was read when a reply begins.
                    self.engine.begin_reply(stepped)?;
                    self.engine.begin_reply(whole)?;
                    Ok(self.engine.state_bytes(whole)? == self.engine.state_bytes(stepped)?)
                });
            self.engine.drop_slot(stepped)?;
            Ok(compared?)
        });
        self.engine.drop_slot(whole)?;
        same
    }
}

#[cfg(test)]
mod tests {
    use crate::{Ampoule, Device, LoadOptions};

    #[test]
    fn the_cpu_reads_both_ways_alike() {
        for device in [Device::Cpu, Device::Reference] {
            let options = LoadOptions { device, context: 512, ..LoadOptions::default() };
            let load = Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {});
            let mut model = load.unwrap();
            assert!(model.decode_reads_as_prefill().unwrap());
            // The slots are free again.
            for _ in 0..4 {
                model.engine.create_slot().unwrap();
            }
        }
    }
}
