//! Many clients at once, and `kill -9` in the middle of them at moments that nobody chose: whatever a client was told is there
//! goes on bit for bit.

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::Duration;

use common::{Running, json as ask_json, repository, text};
use serde_json::{Value, json};

const ROUNDS: u64 = 5;

fn serve(store: &str) -> Running {
    common::serve(&repository("assets/ampoule-nano"), &["--store", store])
}

/// Status and body; `None` where the server went away.
fn call(address: &str, method: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).ok()?;
    let mut all = String::new();
    stream.read_to_string(&mut all).ok()?;
    let (head, body) = all.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    Some((status, serde_json::from_str(body).ok()?))
}

fn post(address: &str, path: &str, body: &Value) -> Value {
    let (status, value) = call(address, "POST", path, body).expect("it answers");
    assert!((200..300).contains(&status), "{path}: {status} {value}");
    value
}

/// Streams that end when the server does: what was complete by then.
fn stream(address: &str, path: &str, body: &Value, complete: &mut dyn FnMut(Value)) -> Option<()> {
    let mut stream = TcpStream::connect(address).ok()?;
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).ok()?;
    for line in BufReader::new(stream).lines() {
        let line = line.ok()?;
        if let Some(data) = line.strip_prefix("data: ")
            && let Ok(value) = serde_json::from_str::<Value>(data)
            && (value["type"] == "response.completed" || value["type"] == "response.incomplete")
        {
            complete(value["response"].clone());
        }
    }
    Some(())
}

fn id(value: &Value) -> String {
    value["id"].as_str().expect("an id").to_owned()
}

/// Continues a response, with logarithms.
fn next(address: &str, id: &str) -> Value {
    let ask = json!({
        "input": "And after that?", "previous_response_id": id, "max_output_tokens": 10, "temperature": 0.8, "seed": 11,
        "top_logprobs": 2, "store": false,
    });
    let answer = post(address, "/v1/responses", &ask);
    json!([answer["output"][0]["content"], answer["usage"]])
}

const GREEDY: &str = r#"{ "max_tokens": 8, "temperature": 0, "ignore_eos": true }"#;

fn greedy() -> Value {
    serde_json::from_str(GREEDY).expect("JSON")
}

/// Says something in a session that is thrown away, from a capsule.
fn from_capsule(address: &str, capsule: &str) -> Value {
    let session = id(&post(address, "/v1/sessions", &json!({ "capsule": capsule })));
    let said = post(address, &format!("/v1/sessions/{session}/generate"), &greedy());
    call(address, "DELETE", &format!("/v1/sessions/{session}"), &Value::Null).expect("it answers");
    said["tokens"].clone()
}

#[test]
fn kill_9_during_traffic_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("store");
    let mut server = serve(text(&place));
    let at = server.address.clone();
    // What must go on, and how.
    let mut responses: HashMap<String, Value> = HashMap::new();
    let mut bodies: HashMap<String, Value> = HashMap::new();
    let root = post(
        &at,
        "/v1/responses",
        &json!({ "input": "The tide turned at noon.", "max_output_tokens": 8 }),
    );
    responses.insert(id(&root), next(&at, &id(&root)));
    let session = id(&post(&at, "/v1/sessions", &json!({})));
    let path = format!("/v1/sessions/{session}");
    post(&at, &format!("{path}/append"), &json!({ "text": "Words that are pinned. " }));
    post(&at, &format!("{path}/snapshot"), &json!({ "name": "pinned", "pin": true }));
    let pinned = from_capsule(&at, "pinned");
    let mut lost = 0;
    for round in 0..ROUNDS {
        let at = server.address.clone();
        // A session that talks, and its twin that says what it will have to say.
        let talk = id(&post(&at, "/v1/sessions", &json!({})));
        let path = format!("/v1/sessions/{talk}");
        post(
            &at,
            &format!("{path}/append"),
            &json!({ "text": format!("Round {round}. The gulls ") }),
        );
        let stood = post(&at, &format!("{path}/generate"), &greedy())["position"].clone();
        let twin = id(&post(&at, &format!("{path}/fork"), &json!({}))["data"][0]);
        let expected =
            post(&at, &format!("/v1/sessions/{twin}/generate"), &greedy())["tokens"].clone();
        let done: Mutex<Vec<Value>> = Mutex::new(Vec::new());
        let wait =
            Duration::from_millis(150 + (std::process::id() as u64 * 7919 + round * 104_729) % 900);
        std::thread::scope(|scope| {
            for client in 0..4 {
                let (at, root, done) = (&at, id(&root), &done);
                scope.spawn(move || {
                    for n in 0.. {
                        let body = json!({
                            "input": format!("Client {client} asks {n}."), "previous_response_id": root,
                            "max_output_tokens": 6 + n % 20, "stream": true,
                        });
                        let mut complete = |response| done.lock().expect("no panic").push(response);
                        if stream(at, "/v1/responses", &body, &mut complete).is_none()
                            || TcpStream::connect(at).is_err()
                        {
                            return;
                        }
                    }
                });
            }
            let at = &at;
            scope.spawn(move || {
                let chat = json!({ "prompt": "The pilot", "max_tokens": 1200, "ignore_eos": true, "stream": true });
                stream(at, "/v1/completions", &chat, &mut |_| ())
            });
            std::thread::sleep(wait);
            server.child.kill().expect("SIGKILL");
            server.child.wait().expect("it ends");
        });
        for response in done.into_inner().expect("no panic") {
            bodies.insert(id(&response), response);
        }
        server = serve(text(&place));
        let at = server.address.clone();
        assert_eq!(from_capsule(&at, "pinned"), pinned, "round {round}");
        for (id, expected) in &responses {
            assert_eq!(
                next(&at, id),
                *expected,
                "round {round}: logarithms and cached tokens included"
            );
        }
        for (id, body) in &bodies {
            let (status, found) =
                call(&at, "GET", &format!("/v1/responses/{id}"), &Value::Null).expect("it answers");
            assert_eq!((status, &found), (200, body), "round {round}");
            if !responses.contains_key(id) && responses.len() < 12 {
                let said = next(&at, id);
                let held = &body["usage"]["total_tokens"];
                assert_eq!(
                    said[1]["input_tokens_details"]["cached_tokens"], *held,
                    "its state came back"
                );
                responses.insert(id.clone(), said);
            } else {
                lost += usize::from(!responses.contains_key(id));
            }
        }
        // The session stands where it stood, and says what its twin said.
        let (status, found) = call(&at, "GET", &path, &Value::Null).expect("it answers");
        assert_eq!((status, &found["position"]), (200, &stood), "round {round}: {found}");
        assert_eq!(post(&at, &format!("{path}/generate"), &greedy())["tokens"], expected);
    }
    assert!(bodies.len() > 4, "{} responses were complete when the server died", bodies.len());
    println!(
        "{} kills, {} responses complete before one, {lost} of them only read again",
        ROUNDS,
        bodies.len()
    );
}

/// The short form of `ampoule bench serve --load 300`.
#[test]
fn idle_connections_and_active_streams_disturb_nobody() {
    let model = repository("assets/ampoule-nano");
    let args = "bench serve --device cpu --load 15 --connections 100 --streams 4 --model";
    let load = &ask_json(args, &[&model])["points"][0];
    assert_eq!(load["errors"], json!([]));
    assert_eq!(load["idle_alive"], 100);
    assert!(load["replies"].as_u64().expect("a number") > 8, "{load}");
    let health = &load["health"];
    assert!(health["asked"].as_u64().expect("a number") > 50, "{health}");
    // Under 50 ms on a machine that does nothing else; tests share theirs.
    assert!(health["median_ms"].as_f64().expect("a number") < 50.0, "{health}");
    assert_eq!(load["metrics"]["engine_panics"], 0.0);
    assert_eq!(load["metrics"]["request_failures"], 0.0);
}

#[test]
fn what_http_adds_is_measured_against_the_engine() {
    let model = repository("assets/ampoule-nano");
    let report = ask_json("bench serve --device cpu --turns 6 --model", &[&model]);
    for (point, name) in report["points"].as_array().expect("a list").iter().zip(["append", "date"])
    {
        assert_eq!(point["conversation"], name);
        for side in ["http", "engine"] {
            assert_eq!(point[side]["reps_ms"].as_array().expect("a list").len(), 5, "{point}");
            assert!(point[side]["median_ms"].as_f64().expect("a number") > 0.0);
        }
        // Warm: the turns are not read again.
        let read = point["tokens_read_a_turn"].as_f64().expect("a number");
        assert!(read < point["final_tokens"].as_f64().expect("a number") / 2.0, "{point}");
    }
}
