//! Random layouts and histories round trip.

mod common;

use ampoule_capsule::{
    CapsuleFile, Growth, History, LineageScope, Origin, StateLayout, StateTensor,
};
use ampoule_plan::DType;
use common::{Parts, encode_again};
use proptest::collection::vec;
use proptest::prelude::*;

fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::I32,
        DType::U32,
        DType::U8,
    ])
}

/// A history of up to 40 positions.
fn history() -> impl Strategy<Value = History> {
    vec((any::<bool>(), 0..10_u32), 0..5).prop_map(|runs| {
        let mut history = History::new();
        for (decode, count) in runs {
            let origin = if decode { Origin::Decode } else { Origin::Prefill };
            history.append(origin, count).unwrap();
        }
        history
    })
}

/// Names are made unique by their index; rows have room for any history.
fn layout() -> impl Strategy<Value = StateLayout> {
    let tensor = ("[a-zé.]{0,12}", dtype(), vec(1..5_usize, 0..5), "[a-z_]{1,9}", any::<bool>());
    vec(tensor, 0..8).prop_map(|tensors| {
        let tensors =
            tensors.into_iter().enumerate().map(|(i, (name, dtype, mut shape, kind, rows))| {
                let growth = if rows { Growth::Rows } else { Growth::Fixed };
                if rows {
                    shape.insert(0, 40 + i);
                }
                StateTensor { name: format!("{name}{i}"), dtype, shape, kind, growth }
            });
        StateLayout { tensors: tensors.collect() }
    })
}

proptest! {
    #[test]
    fn round_trip(
        layout in layout(),
        history in history(),
        parent in any::<u32>(),
        texts in (".{0,60}", ".{0,60}", ".{0,60}", prop::option::of(".{0,200}")),
        seed in any::<u64>(),
    ) {
        let position = history.end();
        let parent = (position > 0 && parent % 3 > 0).then(|| parent % position);
        let mut parts = Parts::new(layout, history, parent, seed);
        let manifest = &mut parts.manifest;
        (manifest.producer, manifest.model, manifest.fingerprint.labels.plan, manifest.note) = texts;
        let bytes = parts.encode();
        prop_assert_eq!(&bytes, &parts.encode());

        let file = CapsuleFile::parse(&bytes).unwrap();
        prop_assert_eq!(file.manifest(), &parts.manifest);
        prop_assert_eq!(file.tokens().collect::<Vec<_>>(), parts.tokens.clone());
        for (tensor, payload) in parts.manifest.layout.tensors.iter().zip(&parts.payload) {
            prop_assert_eq!(file.tensor(&tensor.name), Some(payload.as_slice()));
        }
        prop_assert_eq!(encode_again(&file), bytes.clone());

        let opened = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(opened.len(), parts.payload.len() + 1);
        for (tensor, payload) in parts.manifest.layout.tensors.iter().zip(&parts.payload) {
            let view = opened.tensor(&tensor.name).unwrap();
            prop_assert_eq!(view.data(), payload.as_slice());
            prop_assert_eq!(view.shape(), tensor.shape_at(position));
        }
    }

    #[test]
    fn a_cut_history_is_the_history_that_was_never_longer(
        history in history(),
        at in 0..50_u32,
        seed in any::<u32>(),
    ) {
        let tokens: Vec<u32> = (0..history.end()).map(|i| seed.wrapping_mul(i)).collect();
        let mut cut = history.clone();
        cut.truncate(at);
        prop_assert_eq!(cut.end(), at.min(history.end()));
        prop_assert_eq!(&History::from_segments(cut.segments().to_vec()).unwrap(), &cut);
        // Going on from the cut is going from the start, if the cut is at a segment's end.
        let digest = ampoule_capsule::Digest::of(b"");
        let scope = LineageScope { fingerprint: digest, salt: digest };
        let middle = scope.advance(scope.root(), 0, &cut, &tokens[..cut.end() as usize]).unwrap();
        let end = scope.advance(middle, cut.end(), &history, &tokens).unwrap();
        let at_once = scope.advance(scope.root(), 0, &history, &tokens).unwrap();
        let on_edge = cut.end() == 0 || history.segments().iter().any(|s| s.end == cut.end());
        prop_assert_eq!(end == at_once, on_edge);
    }
}
