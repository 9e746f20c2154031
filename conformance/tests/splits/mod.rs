//! E3 at many splits of a text.

use ampoule::Ampoule;

/// Reads a text in two parts, cut after every `apart` tokens: restored after the first and gone on with the second, it has the
/// bits of the text read in one.
pub(crate) fn splits_are_cold(model: &mut Ampoule, tokens: &[u32], apart: usize) {
    let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let cold = model.slot_with(tokens).unwrap();
    let cold_logits = bits(model.engine.logits(cold).unwrap());
    let cold_bytes = model.engine.state_bytes(cold).unwrap();
    let (growing, warm) =
        (model.engine.create_slot().unwrap(), model.engine.create_slot().unwrap());
    for split in (apart..tokens.len()).step_by(apart) {
        model.append(growing, &tokens[split - apart..split]).unwrap();
        let capsule = model.engine.snapshot(growing).unwrap();
        model.engine.restore(warm, &capsule).unwrap();
        model.append(warm, &tokens[split..]).unwrap();
        let same = bits(model.engine.logits(warm).unwrap()) == cold_logits;
        assert!(same, "logits differ at split {split}");
        let same = model.engine.state_bytes(warm).unwrap() == cold_bytes;
        assert!(same, "state differs at split {split}");
    }
}
