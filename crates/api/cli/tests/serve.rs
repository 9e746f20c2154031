//! The server as a process: its address, its signals, and what survives `kill -9`.

mod common;

use common::{Running, TINY, call, error, post, text};
use serde_json::{Value, json};

fn serve(more: &[&str]) -> Running {
    common::serve(TINY, more)
}

#[test]
fn what_was_stored_goes_on_after_kill_9_bit_for_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("store");
    let options = ["--store", text(&place)];
    let mut server = serve(&options);
    let first = post(
        &server.address,
        "/v1/responses",
        &json!({ "input": "Keep this well.", "max_output_tokens": 9, "temperature": 0 }),
    );
    let next = json!({
        "input": "And?", "previous_response_id": first["id"], "max_output_tokens": 12, "temperature": 0.9, "seed": 4,
        "top_logprobs": 3,
    });
    let expected = post(&server.address, "/v1/responses", &next);
    let session = post(&server.address, "/v1/sessions", &json!({}));
    let path = format!("/v1/sessions/{}", session["id"].as_str().expect("an id"));
    post(&server.address, &format!("{path}/append"), &json!({ "text": "Pinned words." }));
    post(&server.address, &format!("{path}/snapshot"), &json!({ "name": "pinned", "pin": true }));
    // A name keeps a capsule just as well.
    post(&server.address, &format!("{path}/append"), &json!({ "text": " And named ones." }));
    post(&server.address, &format!("{path}/snapshot"), &json!({ "name": "named" }));
    let ask = json!({ "max_tokens": 12, "temperature": 0, "ignore_eos": true });
    let told = post(&server.address, &format!("{path}/generate"), &ask);
    // In the middle of traffic.
    let _busy = common::stream_begun(&server.address);
    server.child.kill().expect("SIGKILL");
    server.child.wait().expect("it ends");
    let table = common::stdout("capsule list", &options);
    assert!(table.contains("\nnamed (server capsule cap_"), "{table}");
    assert!(!table.contains("server session"), "{table}");

    let server = serve(&options);
    let (status, stored) = call(
        &server.address,
        "GET",
        &format!("/v1/responses/{}", first["id"].as_str().expect("an id")),
        &Value::Null,
    );
    assert_eq!((status, &stored), (200, &first));
    let again = post(&server.address, "/v1/responses", &next);
    let content = |response: &Value| response["output"][0]["content"].clone();
    assert_eq!(content(&again), content(&expected), "logarithms included");
    assert_eq!(again["usage"], expected["usage"]);
    let back = post(&server.address, "/v1/sessions", &json!({ "capsule": "pinned" }));
    let at = back["position"].as_u64();
    assert!(at.is_some_and(|at| at > 0));
    let back = post(&server.address, "/v1/sessions", &json!({ "capsule": "named" }));
    assert!(back["position"].as_u64() > at);
    let path = format!("/v1/sessions/{}/generate", back["id"].as_str().expect("an id"));
    assert_eq!(post(&server.address, &path, &ask)["tokens"], told["tokens"]);
}

#[test]
fn a_name_of_the_command_line_is_one_over_http() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("store");
    let options = ["--store", text(&place)];
    let save = format!("generate --model {TINY} --tokens 5,6,7 -n 4 --save told");
    let said = common::json(&save, &options);
    let server = serve(&options);
    let (status, told) = call(&server.address, "GET", "/v1/capsules/told", &Value::Null);
    assert_eq!(
        (status, &told["shared"], &told["position"]),
        (200, &json!(true), &said["position"])
    );
    let session = post(&server.address, "/v1/sessions", &json!({ "capsule": "told" }));
    assert_eq!(session["position"], told["position"]);
}

#[cfg(unix)]
#[test]
fn a_signal_ends_it_in_order_and_the_port_file_says_where_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("port");
    let mut server = serve(&["--port-file", text(&file)]);
    assert_eq!(std::fs::read_to_string(&file).expect("the file").trim(), server.address);
    assert_eq!(call(&server.address, "GET", "/health", &Value::Null).0, 200);
    let status = std::process::Command::new("kill").arg(server.child.id().to_string()).status();
    assert!(status.expect("kill runs").success());
    assert!(server.child.wait().expect("it ends").success());
}

#[test]
fn what_cannot_be_served_is_said() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let said = error(1, &format!("serve --model {TINY} --port {port}"), &[]);
    assert!(said.contains("cannot listen on"), "{said}");
    for cors in ["foo", "https://", "https://a.example/app", "app.example.com"] {
        let said = error(2, &format!("serve --model {TINY} --port 0"), &["--cors", cors]);
        assert!(said.contains("--cors") && said.contains("https://app.example.com"), "{said}");
    }
    let said = error(1, &format!("serve --model {TINY} --store s3://bucket --port 0"), &[]);
    assert!(said.contains("s3"), "{said}");
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("src")).expect("a folder");
    let said =
        error(1, &format!("serve --model {TINY} --port 0"), &["--store", text(folder.path())]);
    assert!(said.contains("holds other things"), "{said}");
}
