//! A Hugging Face folder from bytes: two weights files and an index, or one file.
#![no_main]

use ampoule_models::tensors::TensorSource;
use ampoule_models::weights_dir::{WeightsDir, WeightsParts};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // The first byte says how the rest is divided: with 0 it is one weights file.
    let Some((&first, rest)) = data.split_first() else { return };
    let parts = if first == 0 {
        WeightsParts {
            config: b"{}".to_vec(),
            index: None,
            files: vec![("model.safetensors".into(), rest.to_vec().into())],
        }
    } else {
        let (index, shards) = rest.split_at(usize::from(first).min(rest.len()));
        let (a, b) = shards.split_at(shards.len() / 2);
        let files = vec![("a".into(), a.to_vec().into()), ("b".into(), b.to_vec().into())];
        WeightsParts { config: b"{}".to_vec(), index: Some(index.to_vec()), files }
    };
    let dir = match WeightsDir::from_parts("fuzz", parts) {
        Ok(dir) => dir,
        Err(error) => {
            assert!(error.to_string().contains("fuzz"));
            return;
        }
    };
    let mut ranges = Vec::new();
    for name in dir.names() {
        let view = dir.tensor(name).expect("a name that the folder lists");
        assert_eq!(view.dtype.bytes_for(view.shape.iter().product()), Some(view.bytes.len()));
        ranges.push(view.bytes.as_ptr_range());
    }
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "tensors share bytes");
    dir.digest();
    if first == 0 {
        // The library is the judge of the format: what we open it opens too.
        let bytes = rest.to_vec();
        assert_eq!(
            safetensors::SafeTensors::deserialize(&bytes).expect("the library refuses it").len(),
            dir.names().len()
        );
    }
});
