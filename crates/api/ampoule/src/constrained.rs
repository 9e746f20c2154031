//! Draws on the host: among some tokens only, for replies that must follow a grammar, and of a reply's first token before
//! it is read.

use ampoule_engine::{EngineError, SamplingParams, SlotId};
use ampoule_plan::{SEEN_AS_PROMPT, sampler_params};
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
        let mut words = |name: &str| self.words(slot, name);
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
        let token = self.draw(slot, &params, [low, high], bias, &counts, Some(allowed))?;
        self.engine.step_forced(slot, token)?;
        Ok(token)
    }

    /// The first token of a reply with `params`, before anything of the reply is done: nothing changes. What follows is
    /// [`configure`](crate::Engine::configure) with the same parameters, [`begin_reply`](crate::Engine::begin_reply), and a
    /// forced step with this token; that leaves tokens and state as if the token had been drawn by
    /// [`Engine::step`](crate::Engine::step), or by [`step_where`](Self::step_where) where `allowed` is given. So whoever
    /// waits for the token need not wait until it is read, and the boundary before the reply can be frozen after it is known.
    ///
    /// `None` where the device's own draw might be another one: a GPU's exponential function and products are not the host's.
    /// Without penalties the greedy choice is the same everywhere.
    ///
    /// # Errors
    /// If no token is allowed, nothing has been read, or the device fails.
    pub fn first_draw(
        &mut self,
        slot: SlotId,
        params: &SamplingParams,
        allowed: Option<&dyn Fn(u32) -> bool>,
    ) -> Result<Option<u32>, Error> {
        let penalties = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let host = matches!(self.engine.device().backend, "cpu" | "reference");
        if !host && allowed.is_none() && (params.temperature != 0.0 || penalties) {
            return Ok(None);
        }
        let counts: Vec<u32> = if penalties {
            let counts = self.words(slot, "sampler.counts")?;
            // As beginning a reply leaves them.
            let begun = |word| if u32::from_le_bytes(word) == 0 { 0 } else { SEEN_AS_PROMPT };
            counts.into_iter().map(begun).collect()
        } else {
            Vec::new()
        };
        let bias = params.logit_bias.iter().map(|&(token, value)| (token.cast_signed(), value));
        let seed = [params.seed as u32, (params.seed >> 32) as u32];
        let values = params.buffer(self.engine.vocabulary());
        self.draw(slot, &values, seed, bias.collect(), &counts, allowed).map(Some)
    }

    /// A Fixed State buffer in words of four bytes.
    fn words(&mut self, slot: SlotId, name: &str) -> Result<Vec<[u8; 4]>, Error> {
        let bytes = self.engine.fixed_state(slot, name)?;
        let bytes = bytes.ok_or_else(|| EngineError::Model { what: format!("buffer '{name}'") })?;
        Ok(bytes.as_chunks::<4>().0.to_vec())
    }

    /// A draw from the slot's logits. Tokens beyond `counts` count as never seen.
    fn draw(
        &mut self,
        slot: SlotId,
        params: &[f32],
        seed: [u32; 2],
        bias: Vec<(i32, f32)>,
        counts: &[u32],
        allowed: Option<&dyn Fn(u32) -> bool>,
    ) -> Result<u32, Error> {
        let position = self.engine.position(slot)?;
        let mut logits = self.engine.logits(slot)?;
        if let Some(allowed) = allowed {
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
        }
        let token =
            sample(Draw { logits: &mut logits, params, seed, bias, position, counts }) as u32;
        match allowed {
            // Where every allowed logit is negative infinity too the definition takes token 0.
            Some(allowed) if !allowed(token) => {
                let first = (0..logits.len() as u32).find(|t| allowed(*t));
                first.ok_or(Error::NothingAllowed { position })
            }
            _ => Ok(token),
        }
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
    /// A token that is known before it is read is the one that a step draws, and reading it leaves the state of that step.
    #[test]
    fn the_first_draw_is_that_of_the_first_step() {
        for device in [Device::Cpu, Device::Reference] {
            let options = LoadOptions { device, context: 128, ..LoadOptions::default() };
            let mut model = Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap();
            let mut differ = 0;
            for round in 0..24_u64 {
                let params = SamplingParams {
                    temperature: [0.0, 0.7, 1.0][round as usize % 3],
                    top_k: [0, 40][round as usize % 2],
                    top_p: [1.0, 0.9][round as usize / 2 % 2],
                    min_p: [0.0, 0.01][round as usize / 3 % 2],
                    repetition_penalty: [1.0, 1.7][round as usize / 4 % 2],
                    frequency_penalty: [0.0, 1.5][round as usize / 5 % 2],
                    presence_penalty: [0.0, 1.5][round as usize / 6 % 2],
                    seed: round.wrapping_mul(0x9E37_79B9_7F4A_7C15),
                    logit_bias: vec![(round as u32, 2.5), (9, -2.0)],
                };
                let prompt = [5, 6, 7, 8, 9, 300 + round as u32];
                let slots: Vec<_> = (0..2)
                    .map(|_| {
                        // A reply before this one, so that counts are not those of a prompt.
                        let slot = model.slot_with(&prompt).unwrap();
                        for token in [11, 11, 12, 40] {
                            model.engine.step_forced(slot, token).unwrap();
                        }
                        slot
                    })
                    .collect();
                let before = model.engine.state_bytes(slots[1]).unwrap();
                let known = model.first_draw(slots[1], &params, None).unwrap().unwrap();
                assert!(before == model.engine.state_bytes(slots[1]).unwrap(), "nothing changes");
                for slot in &slots {
                    model.engine.configure(*slot, &params).unwrap();
                    model.engine.begin_reply(*slot).unwrap();
                }
                let drawn = model.engine.step(slots[0]).unwrap();
                assert_eq!(known, drawn, "{params:?}");
                model.engine.step_forced(slots[1], known).unwrap();
                for _ in 0..4 {
                    let next = slots.iter().map(|s| model.engine.step(*s).unwrap());
                    let next: Vec<u32> = next.collect();
                    assert_eq!(next[0], next[1]);
                }
                let states = slots.iter().map(|s| model.engine.state_bytes(*s).unwrap());
                let states: Vec<_> = states.collect();
                assert!(states[0] == states[1]);
                let odd = |token: u32| token % 2 == 1;
                let slot = slots[0];
                let capsule = model.engine.snapshot(slot).unwrap();
                let some = model.first_draw(slot, &params, Some(&odd)).unwrap().unwrap();
                model.engine.restore(slot, &capsule).unwrap();
                model.engine.configure(slot, &params).unwrap();
                model.engine.begin_reply(slot).unwrap();
                assert_eq!(model.step_where(slot, &odd).unwrap(), some);
                differ += usize::from(some != drawn);
                assert!(model.first_draw(slot, &params, Some(&|_| false)).is_err());
                for slot in slots {
                    model.engine.drop_slot(slot).unwrap();
                }
            }
            assert!(differ > 0);
        }
    }
}
