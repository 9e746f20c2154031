//! The model that is part of the program, and folders from memory.

use ampoule_models::model::{ModelFiles, NANO};
use ampoule_models::tokenizer::TokenizerParts;
use ampoule_models::weights_dir::WeightsParts;

fn file(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/ampoule-nano/");
    std::fs::read(format!("{folder}{name}")).expect(name)
}

fn parts(weights: Vec<u8>) -> WeightsParts {
    let files = vec![("model.safetensors".to_owned(), weights.into())];
    WeightsParts { config: file("config.json"), index: None, files }
}

#[cfg(feature = "nano")]
#[test]
fn it_opens_by_its_name() {
    let files = ModelFiles::open(NANO).unwrap();
    assert_eq!((files.shape().name.as_str(), files.shape().context), (NANO, 4096));
    assert!(files.tokenizer().is_some_and(|t| t.chat_template().is_some()));
}

#[cfg(not(feature = "nano"))]
#[test]
fn a_program_without_it_says_so() {
    let error = ModelFiles::open(NANO).err().expect("it was left out");
    assert!(matches!(error, ampoule_models::model::OpenError::NotBuiltIn), "{error}");
    assert!(error.to_string().contains("assets/ampoule-nano"), "{error}");
}

#[test]
fn a_folder_in_memory_is_checked_as_one_on_disk() {
    let tokenizer = TokenizerParts { tokenizer: file("tokenizer.json"), ..Default::default() };
    let whole = file("model.safetensors");
    let files = ModelFiles::from_parts("held", parts(whole.clone()), Some(&tokenizer)).unwrap();
    assert_eq!((files.shape().name.as_str(), files.shape().vocabulary), ("held", 4096));
    let mut cut = whole;
    cut.pop();
    let error =
        ModelFiles::from_parts("held", parts(cut), None).err().expect("it is cut").to_string();
    assert!(error.contains("held/model.safetensors") && error.contains("tensor"), "{error}");
    let broken = TokenizerParts { tokenizer: b"{}".to_vec(), ..Default::default() };
    let error = ModelFiles::from_parts("held", parts(file("model.safetensors")), Some(&broken));
    let error = error.err().expect("it is broken").to_string();
    assert!(error.contains("held/tokenizer.json"), "{error}");
}
