//! Capsules in a store, from the command line.

mod common;

use common::{TINY, error, json, run, stdout, text, tokens};

#[test]
fn a_list_leaves_out_what_a_server_keeps_on_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    let store = text(&store);
    save(store, "--tokens 5,6,7 -n 2 --save mine");
    let generate = format!("generate --model {TINY} --context 256 --store {store} -n 2");
    for (tokens, name) in [("1,2", "server boundary 0"), ("3,4", "server capsule cap_1")] {
        json(&generate, &["--tokens", tokens, "--save", name]);
    }
    let list = json(&format!("capsule list --store {store}"), &[]);
    assert_eq!((list["capsules"].as_array().map(Vec::len), &list["hidden"]), (Some(2), &1.into()));
    assert!(!list["capsules"].to_string().contains("boundary"), "{list}");
    let all = json(&format!("capsule list --all --store {store}"), &[]);
    assert_eq!((all["capsules"].as_array().map(Vec::len), &all["hidden"]), (Some(3), &0.into()));
    let table = stdout(&format!("capsule list --store {store}"), &[]);
    assert!(table.contains("3 capsules") && table.contains("1 of them"), "{table}");
    assert!(stdout(&format!("capsule tree --store {store}"), &[]).contains("boundary"));
}

/// Continues tokens and saves under a name.
fn save(store: &str, more: &str) -> serde_json::Value {
    json(&format!("generate --model {TINY} --context 256 --store {store} {more}"), &[])
}

#[test]
fn a_named_state_goes_on_in_another_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    let store = text(&store);
    let sampling = "--temperature 0.8 --seed 3 --presence-penalty 0.5";
    let whole = json(
        &format!("generate --model {TINY} --tokens 5,6,7,8,9 -n 40 {sampling}"),
        &["--context", "256"],
    );
    let begun = save(store, &format!("--tokens 5,6,7,8,9 -n 25 {sampling} --save first"));
    let rest = save(store, "--restore first -n 15 --save second");
    let both: Vec<u64> = [tokens(&begun["tokens"]), tokens(&rest["tokens"])].concat();
    assert_eq!(both, tokens(&whole["tokens"]), "cut in the middle, it says the same");

    // The second capsule shares the first one's rows.
    let list = json(&format!("capsule list --store {store}"), &[]);
    let capsules = list["capsules"].as_array().expect("a list");
    assert_eq!(capsules.len(), 2);
    assert_eq!(capsules[1]["parent"], capsules[0]["id"]);
    assert_eq!(capsules[1]["shared_bytes"], capsules[0]["row_bytes"]);
    let rows = list["row_bytes"].as_u64().expect("bytes");
    assert_eq!(Some(rows), capsules[1]["row_bytes"].as_u64(), "rows are kept once");
    let fixed = capsules[1]["fixed_bytes"].as_u64().expect("bytes");
    let own = |key: &str| capsules[1][key].as_u64().expect("bytes");
    assert_eq!(own("own_bytes"), fixed + own("own_row_bytes"), "accounted apart");
    assert_eq!(list["fixed_bytes"].as_u64(), Some(2 * fixed));
    assert_eq!(capsules[1]["tier"], "disk");
    let table = stdout(&format!("capsule list --store {store}"), &[]);
    assert!(table.contains("own rows") && table.contains("fixed state"), "{table}");
    let tree = stdout(&format!("capsule tree --store {store}"), &[]);
    assert!(tree.contains("position 45, own ") && tree.contains(" fixed, shared "), "{tree}");
    assert!(!tree.contains('"'), "no text of users unless it is asked for: {tree}");
    assert!(tree.contains("└─ ") && tree.contains("   └─ ") && tree.contains("second"), "{tree}");

    // Its own file is whole, and comes back.
    let file = folder.path().join("second.ampoule");
    let file = text(&file);
    stdout(&format!("capsule export second {file} --store {store}"), &[]);
    stdout(&format!("capsule verify {file}"), &[]);
    let from_file =
        json(&format!("generate --model {TINY} --restore {file} -n 5 --context 256"), &[]);
    let from_store = save(store, "--restore second -n 5");
    assert_eq!(from_file["tokens"], from_store["tokens"]);
    let id = capsules[1]["id"].as_str().expect("an id");
    let by_id = save(store, &format!("--restore {} -n 5", &id[..10]));
    assert_eq!(by_id["tokens"], from_store["tokens"]);

    // The parent goes, what the child needs stays.
    stdout(&format!("capsule rm first --store {store}"), &[]);
    stdout(&format!("capsule gc --store {store}"), &[]);
    assert_eq!(save(store, "--restore second -n 5")["tokens"], from_store["tokens"]);
    let checked = json(&format!("capsule verify second --store {store}"), &[]);
    assert_eq!(checked["whole"], true);
    let load =
        json(&format!("capsule load second --model {TINY} --context 256 --store {store}"), &[]);
    assert_eq!(load["position"], 45);
    stdout(&format!("capsule fsck --store {store}"), &[]);

    // Equal states are one capsule. A name of several goes alone, the last one with the capsule.
    for name in ["twin", "other-twin"] {
        stdout(
            &format!(
                "capsule save {name} --model {TINY} --context 64 --tokens 1,2,3 --store {store}"
            ),
            &[],
        );
    }
    let removed = json(&format!("capsule rm twin --store {store}"), &[]);
    assert_eq!((&removed["removed"], &removed["names"][0]), (&false.into(), &"other-twin".into()));
    let load = format!("capsule load other-twin --model {TINY} --context 64 --store {store}");
    assert_eq!(json(&load, &[])["position"], 3);
    assert_eq!(json(&format!("capsule rm other-twin --store {store}"), &[])["removed"], true);

    // An import of the file is a capsule of its own.
    stdout(&format!("capsule import {file} --name copy --store {store}"), &[]);
    assert_eq!(save(store, "--restore copy -n 5")["tokens"], from_store["tokens"]);
}

#[test]
fn damage_and_mistakes_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    let store = text(&store);
    let said = error(1, &format!("capsule list --store {store}"), &[]);
    assert!(said.contains("store"), "{said}");
    stdout(&format!("capsule save one --store {store} --model {TINY} --tokens 1,2,3,4"), &[]);
    stdout(&format!("capsule save two --store {store} --model {TINY} --tokens 9,8,7,6,5"), &[]);
    let said = error(1, &format!("capsule verify three --store {store}"), &[]);
    assert!(said.contains("'three'"), "{said}");
    error(2, &format!("capsule save one --store {store} --model {TINY}"), &[]);
    let said =
        error(1, &format!("generate --model {TINY}@7 --restore one -n 1 --store {store}"), &[]);
    assert!(said.contains("weights"), "the component is named: {said}");

    // One flipped byte in a segment: named, and the other capsule is whole.
    let segments = std::fs::read_dir(folder.path().join("store/segments")).expect("segments");
    let victim = segments.map(|e| e.expect("an entry").path()).next().expect("a segment");
    let mut bytes = std::fs::read(&victim).expect("bytes");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&victim, bytes).expect("written");
    let checked = run(&format!("capsule fsck --store {store}"), &[]);
    assert_eq!(checked.status.code(), Some(1));
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(said.contains("lost with it"), "{said}");
    let whole =
        |name: &str| run(&format!("capsule verify {name} --store {store}"), &[]).status.success();
    assert_ne!(whole("one"), whole("two"), "one is lost, the other is not");
}

#[test]
fn turns_tiers_and_rollback_are_measured() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    let turns = json(
        &format!("bench turns --model {TINY} --turns 6 --store {}", text(&store)),
        &["--device", "cpu"],
    );
    let point = &turns["points"][0];
    assert_eq!(point["turns"].as_array().map(Vec::len), Some(6));
    assert_eq!((&point["restored"], &point["mismatches"]), (&6.into(), &0.into()));
    assert_eq!(point["held_bytes"], point["own_bytes"]);
    assert!(point["over_floor"].as_f64() <= Some(1.15), "{point}");
    assert!(point["store"]["over_floor"].as_f64() <= Some(1.15), "{point}");
    assert!(point["copies_over_held"].as_f64() > Some(1.5), "{point}");
    let list = json(&format!("capsule list --store {}", text(&store)), &[]);
    assert_eq!(list["capsules"].as_array().map(Vec::len), Some(6));
    let rollback = json(
        &format!("bench rollback --model {TINY} --prefix 128,512 --reps 3"),
        &["--device", "cpu"],
    );
    let points = rollback["points"].as_array().expect("points");
    assert_eq!(points.len(), 3);
    assert!(points[2]["slowest_over_fastest"].as_f64() >= Some(1.0), "{rollback}");
    let tiers =
        json(&format!("bench tiers --model {TINY} --prefix 64 --reps 2"), &["--device", "cpu"]);
    let names: Vec<_> =
        tiers["points"].as_array().expect("points").iter().map(|p| &p["tier"]).collect();
    assert_eq!(names, ["host", "disk"]);
}

#[test]
fn a_sealed_store_needs_its_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, key) = (folder.path().join("store"), folder.path().join("key"));
    let (store, key) = (text(&store), text(&key));
    std::fs::write(key, "07".repeat(32)).expect("a key");
    let place = format!("--store {store} --store-key-file {key}");
    stdout(&format!("capsule save secret {place} --model {TINY} --tokens 1,2,3,4"), &[]);
    stdout(&format!("capsule verify secret {place}"), &[]);
    let said = error(1, &format!("capsule list --store {store}"), &[]);
    assert!(said.contains("key"), "{said}");
}

#[test]
fn chat_is_warm_from_a_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    let args = format!("chat --context 512 -n 8 --temperature 0 --json --store {}", text(&store));
    let first = common::piped(&args, &[], "My name is Ada. I live in Oslo.\n/save ada\n");
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let args = format!("{args} --warm ada");
    let second = common::piped(&args, &[], "/switch ada\nWhat is my name?\n");
    let said = String::from_utf8_lossy(&second.stdout).into_owned();
    assert!(second.status.success(), "{said}");
    let mut reply = said.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let reply = reply.rfind(|v| v["event"] == "reply").expect("a reply");
    assert!(reply["cached_tokens"].as_u64() > Some(20), "{reply}");
    assert!(reply["read_tokens"].as_u64() < Some(20), "nothing is read twice: {reply}");
    assert!(reply["text"].as_str().is_some_and(|t| t.contains("Ada")), "{reply}");
}
