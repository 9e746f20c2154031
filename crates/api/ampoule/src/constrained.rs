//! Draws among some tokens only, for replies that must follow a grammar.

use ampoule_engine::{EngineError, SlotId};
use ampoule_plan::sampler_params;
use ampoule_reference::{Draw, sample};

use crate::{Ampoule, Error};

impl Ampoule {
    /// Draws a token among those that `allowed` holds for, and reads it.
    ///
    /// The draw is that of `docs/sampling.md`, made on the host, with the logit of every other token at negative
    /// infinity after step 2; the token is then read by a forced step of decode. So the state afterwards is that of a step
    /// which drew this token, rollback and capsules work as ever, and where everything is allowed the token is the one that
    /// [`Engine::step`](crate::Engine::step) draws with the same logits and exponential function.
    ///
    /// # Errors
    /// If no token is allowed or nothing has been read, nothing changes; else as [`Engine::step`](crate::Engine::step).
    pub fn step_where(
        &mut self,
        slot: SlotId,
        allowed: &dyn Fn(u32) -> bool,
    ) -> Result<u32, Error> {
        let position = self.engine.position(slot)?;
        let mut logits = self.engine.logits(slot)?;
        let mut words = |name: &str| -> Result<Vec<[u8; 4]>, Error> {
            let bytes = self.engine.fixed_state(slot, name)?;
            let bytes =
                bytes.ok_or_else(|| EngineError::Model { what: format!("buffer '{name}'") })?;
            Ok(bytes.as_chunks::<4>().0.to_vec())
        };
        let params: Vec<f32> =
            words("sampler.params")?.into_iter().map(f32::from_le_bytes).collect();
        let seed: Vec<u32> = words("sampler.seed")?.into_iter().map(u32::from_le_bytes).collect();
        let counts: Vec<u32> =
            words("sampler.counts")?.into_iter().map(u32::from_le_bytes).collect();
        let tokens = words("sampler.bias_tokens")?.into_iter().map(i32::from_le_bytes);
        let values = words("sampler.bias_values")?.into_iter().map(f32::from_le_bytes);
        let bias: Vec<(i32, f32)> = tokens.zip(values).collect();
        let (&[low, high], true) = (seed.as_slice(), params.len() == sampler_params::LEN) else {
            return Err(
                EngineError::Model { what: "sampler of the expected shape".to_owned() }.into()
            );
        };
        let mut any = false;
        for (token, logit) in logits.iter_mut().enumerate() {
            if allowed(token as u32) {
                any = true;
            } else {
                // Neither penalty nor bias brings it back.
                *logit = f32::NEG_INFINITY;
            }
        }
        if !any {
            return Err(Error::NothingAllowed { position });
        }
        let token = sample(Draw {
            logits: &mut logits,
            params: &params,
            seed: [low, high],
            bias,
            position,
            counts: &counts,
        }) as u32;
        // Where every allowed logit is negative infinity too the definition takes token 0.
        let token = if allowed(token) {
            token
        } else {
            let first = (0..logits.len() as u32).find(|t| allowed(*t));
            first.ok_or(Error::NothingAllowed { position })?
        };
        self.engine.step_forced(slot, token)?;
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Ampoule, Device, LoadOptions, SamplingParams};

    #[test]
    fn a_draw_among_all_is_a_step_and_a_mask_is_obeyed() {
        let options = LoadOptions { device: Device::Cpu, context: 128, ..LoadOptions::default() };
        let mut model = Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap();
        for temperature in [0.0, 0.9] {
            let params = SamplingParams {
                temperature,
                top_k: 40,
                repetition_penalty: 1.1,
                frequency_penalty: 0.3,
                seed: 7,
                logit_bias: vec![(3, 1.5), (9, -2.0)],
                ..SamplingParams::default()
            };
            let mut slots = Vec::new();
            for _ in 0..3 {
                let slot = model.slot_with(&[5, 6, 7, 8, 9, 300]).unwrap();
                model.engine.configure(slot, &params).unwrap();
                model.engine.begin_reply(slot).unwrap();
                slots.push(slot);
            }
            for _ in 0..30 {
                let free = model.engine.step(slots[0]).unwrap();
                assert_eq!(model.step_where(slots[1], &|_| true).unwrap(), free);
                let some = model.step_where(slots[2], &|t| (100..110).contains(&t)).unwrap();
                assert!((100..110).contains(&some));
            }
            let (a, b) = (model.engine.state_bytes(slots[0]), model.engine.state_bytes(slots[1]));
            assert!(a.unwrap() == b.unwrap(), "a forced step leaves the state of a drawn one");
            let before = model.engine.position(slots[2]).unwrap();
            assert!(model.step_where(slots[2], &|_| false).is_err());
            assert_eq!(model.engine.position(slots[2]).unwrap(), before);
            for slot in slots {
                model.engine.drop_slot(slot).unwrap();
            }
        }
    }
}
