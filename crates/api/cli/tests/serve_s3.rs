//! A server whose store lies on object storage: what it stored goes on in the next process, after an orderly end and after
//! `kill -9`.
//!
//! Needs an S3 server in `AWS_ENDPOINT` (and the usual `AWS_...` variables) and its bucket in `AMPOULE_S3_BUCKET`:
//! `scripts/s3_test.sh` starts one and runs this.
#![cfg(all(feature = "s3", unix))]

mod common;

use common::{Running, TINY, call, post};
use serde_json::{Value, json};

/// A prefix of the bucket that nobody else uses; `None` where there is no bucket.
fn place(test: &str) -> Option<String> {
    let Ok(bucket) = std::env::var("AMPOULE_S3_BUCKET") else {
        println!("no AMPOULE_S3_BUCKET: not run; see scripts/s3_test.sh");
        return None;
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
    Some(format!("s3://{bucket}/serve-{test}-{}-{}", std::process::id(), now.as_nanos()))
}

fn start(place: &str) -> Running {
    common::serve(TINY, &["--store", place])
}

/// Tokens that the server has read by prefill.
fn read(server: &Running) -> u64 {
    let text = common::get_text(&server.address, "/metrics");
    let line = text.lines().find_map(|l| l.strip_prefix("ampoule_prompt_tokens_read_total "));
    line.and_then(|n| n.parse().ok()).expect("the metric")
}

/// What a client left on a server, and what going on from it must give.
struct Left {
    response: Value,
    next: Value,
    next_answer: Value,
    next_read: u64,
    session: String,
    session_answer: Value,
    pinned_answer: Value,
}

fn sampled(seed: u64) -> Value {
    json!({ "max_tokens": 12, "temperature": 0.9, "seed": seed, "ignore_eos": true })
}

fn leave(server: &Running) -> Left {
    let at = &server.address;
    let ask = json!({ "input": "Keep this well.", "max_output_tokens": 9, "temperature": 0 });
    let response = post(at, "/v1/responses", &ask);
    let next = json!({
        "input": "And?", "previous_response_id": response["id"], "max_output_tokens": 12, "temperature": 0.9, "seed": 4,
        "top_logprobs": 3, "include": ["message.output_text.logprobs"], "store": false,
    });
    let before = read(server);
    let next_answer = post(at, "/v1/responses", &next);
    let next_read = read(server) - before;
    let made = post(at, "/v1/sessions", &json!({}));
    let session = format!("/v1/sessions/{}", made["id"].as_str().expect("an id"));
    post(at, &format!("{session}/append"), &json!({ "text": "Words of a session." }));
    post(at, &format!("{session}/generate"), &sampled(1));
    post(at, &format!("{session}/snapshot"), &json!({ "name": "pinned words", "pin": true }));
    // Branches tell what the session and the capsule would say; they themselves stay where they are.
    let fork = post(at, &format!("{session}/fork"), &json!({ "n": 1 }));
    let fork = fork["data"][0]["id"].as_str().expect("a fork").to_owned();
    let session_answer = post(at, &format!("/v1/sessions/{fork}/generate"), &sampled(2));
    let pinned_answer = from_pinned(server);
    Left { response, next, next_answer, next_read, session, session_answer, pinned_answer }
}

fn from_pinned(server: &Running) -> Value {
    let made = post(&server.address, "/v1/sessions", &json!({ "capsule": "pinned words" }));
    let path = format!("/v1/sessions/{}/generate", made["id"].as_str().expect("an id"));
    post(&server.address, &path, &sampled(3))
}

/// That everything goes on as it would have, and that nothing was read for it but what is new.
fn check(server: &Running, left: &Left, forks: bool) {
    let at = &server.address;
    assert_eq!(read(server), 0, "a start reads no tokens");
    let id = left.response["id"].as_str().expect("an id");
    let (status, stored) = call(at, "GET", &format!("/v1/responses/{id}"), &Value::Null);
    assert_eq!((status, &stored), (200, &left.response));
    let answer = post(at, "/v1/responses", &left.next);
    assert_eq!(answer["output"][0]["content"], left.next_answer["output"][0]["content"]);
    assert!(answer["output"][0]["content"][0]["logprobs"][0]["logprob"].is_number(), "{answer}");
    assert_eq!(answer["usage"], left.next_answer["usage"]);
    assert_eq!(read(server), left.next_read, "only the new message");
    assert_eq!(from_pinned(server)["tokens"], left.pinned_answer["tokens"]);
    let going = if forks {
        // The session itself is left as it was, for the next check.
        let fork = post(at, &format!("{}/fork", left.session), &json!({ "n": 1 }));
        format!("/v1/sessions/{}", fork["data"][0]["id"].as_str().expect("a fork"))
    } else {
        left.session.clone()
    };
    let answer = post(at, &format!("{going}/generate"), &sampled(2));
    assert_eq!(answer["tokens"], left.session_answer["tokens"]);
    assert_eq!(read(server), left.next_read, "sessions and capsules are not read again");
}

#[test]
fn responses_sessions_and_pinned_capsules_go_on_from_object_storage() {
    let Some(place) = place("go-on") else { return };
    let mut server = start(&place);
    let left = leave(&server);
    let asked = std::process::Command::new("kill").arg(server.child.id().to_string()).status();
    assert!(asked.expect("kill runs").success());
    assert!(server.child.wait().expect("it ends").success(), "an orderly end");

    let mut server = start(&place);
    check(&server, &left, true);
    server.child.kill().expect("SIGKILL");
    server.child.wait().expect("it ends");

    let mut server = start(&place);
    check(&server, &left, true);
    // What is left in the middle of traffic was durable before its client was told.
    let more = leave_more(&server);
    server.child.kill().expect("SIGKILL");
    server.child.wait().expect("it ends");

    let server = start(&place);
    check(&server, &left, false);
    let next = json!({
        "input": "More.", "previous_response_id": more.0, "max_output_tokens": 6, "temperature": 0, "store": false,
    });
    let answer = post(&server.address, "/v1/responses", &next);
    assert_eq!(answer["output"][0]["content"], more.1["output"][0]["content"]);
}

/// A stored response, what continues it, and a stream that is under way.
fn leave_more(server: &Running) -> (Value, Value) {
    let at = &server.address;
    let ask = json!({ "input": "Another one.", "max_output_tokens": 5, "temperature": 0 });
    let response = post(at, "/v1/responses", &ask);
    let next = json!({
        "input": "More.", "previous_response_id": response["id"], "max_output_tokens": 6, "temperature": 0,
        "store": false,
    });
    let answer = post(at, "/v1/responses", &next);
    let _busy = common::stream_begun(at);
    (response["id"].clone(), answer)
}
