//! What goes wrong gets the right status, and takes nothing else with it.

mod support;

use std::io::{Read, Write};
use std::time::Duration;

use ampoule_server::Config;
use serde_json::{Value, json};
use support::{
    answer, config, eventually, get, head, metric, ok, open, post, raw, request, start, start_with,
};

fn hello(max_tokens: usize) -> Value {
    json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

#[test]
fn malformed_requests_get_a_400_that_names_the_fault() {
    let server = start(config());
    let at = server.address();
    let refuse = |body: Value, param: &str| {
        let answer = post(at, "/v1/chat/completions", &body);
        assert_eq!(answer.status, 400, "{body}: {}", String::from_utf8_lossy(&answer.body));
        let error = answer.json()["error"].clone();
        assert_eq!(error["param"], param, "{error}");
        assert!(answer.header("x-request-id").is_some());
    };
    let hi = json!([{ "role": "user", "content": "Hi" }]);
    refuse(json!({}), "messages");
    refuse(json!({ "messages": [] }), "messages");
    refuse(json!({ "messages": [{ "role": "robot", "content": "x" }] }), "messages[0].role");
    refuse(
        json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] }),
        "messages[0].content[0].type",
    );
    refuse(json!({ "messages": hi, "temperature": 3 }), "temperature");
    refuse(json!({ "messages": hi, "n": 0 }), "n");
    refuse(json!({ "messages": hi, "logit_bias": { "9999": 1 } }), "logit_bias");
    refuse(json!({ "messages": hi, "functions": [] }), "functions");
    refuse(json!({ "messages": hi, "nonsense": true }), "nonsense");
    refuse(json!({ "messages": hi, "tool_choice": "required" }), "tool_choice");
    refuse(json!({ "messages": hi, "top_logprobs": 2 }), "top_logprobs");
    refuse(
        json!({ "messages": hi, "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": { "type": "nonsense" } } } }),
        "response_format",
    );
    for body in [
        &b"{"[..],
        b"[1]",
        b"\"text\"",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}",
    ] {
        let mut bytes = head("POST", "/v1/chat/completions", body.len(), "").into_bytes();
        bytes.extend_from_slice(body);
        assert_eq!(raw(at, &bytes).status, 400);
    }
    assert_eq!(
        post(at, "/v1/chat/completions", &json!({ "model": "gpt-9", "messages": hi })).status,
        404
    );
    assert_eq!(get(at, "/v1/nothing").status, 404);
    assert_eq!(get(at, "/v1/chat/completions").status, 405);
    assert_eq!(get(at, "/v1/responses/../../etc/passwd").status, 404);
    ok(at, "/v1/chat/completions", &hello(2));
    server.stop().unwrap();
}

#[test]
fn floods_are_refused_and_the_server_goes_on() {
    let server = start_with(config(), 512, 1 << 28);
    let at = server.address();
    let long = json!({ "messages": [{ "role": "user", "content": "x y ".repeat(2000) }] });
    let answer = post(at, "/v1/chat/completions", &long);
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("context_length_exceeded"))
    );
    let ten_megabytes =
        json!({ "messages": [{ "role": "user", "content": "x".repeat(10 << 20) }] });
    let answer = post(at, "/v1/chat/completions", &ten_megabytes);
    // A client that writes on while it is refused may lose the answer to a reset, but never gets another.
    assert!(matches!(answer.status, 413 | 0), "{answer:?}");
    let headers = "x-flood: 1\r\n".repeat(500);
    let status = request(at, "GET", "/health", "", &headers).status;
    assert!(matches!(status, 431 | 400), "{status}");
    let huge = format!("x-huge: {}\r\n", "a".repeat(200 << 10));
    let status = request(at, "GET", "/health", "", &huge).status;
    assert!(matches!(status, 431 | 400 | 0), "{status}");
    // A context that fills up while a reply is generated ends it as too long.
    let full = post(
        at,
        "/v1/completions",
        &json!({ "prompt": "x y ".repeat(100), "max_tokens": 4000, "ignore_eos": true }),
    );
    assert_eq!(
        (full.status, full.json()["choices"][0]["finish_reason"].as_str()),
        (200, Some("length"))
    );
    ok(at, "/v1/chat/completions", &hello(2));
    server.stop().unwrap();
}

#[test]
fn a_full_queue_says_when_to_come_back_and_health_answers_meanwhile() {
    let server = start(Config { queue: 3, slots: 1, ..config() });
    let at = server.address();
    let stream = |n: usize| {
        let mut body = hello(3500);
        body["stream"] = json!(true);
        body["seed"] = json!(n);
        let body = body.to_string();
        let mut stream = open(at);
        stream
            .write_all(
                format!("{}{body}", head("POST", "/v1/chat/completions", body.len(), ""))
                    .as_bytes(),
            )
            .unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first[9..], b"200");
        stream
    };
    let streams: Vec<_> = (0..3).map(stream).collect();
    let refused = post(at, "/v1/chat/completions", &hello(1));
    assert_eq!(refused.status, 429);
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    let begun = std::time::Instant::now();
    assert_eq!(get(at, "/health").status, 200);
    assert!(begun.elapsed() < Duration::from_millis(500));
    assert!(metric(at, "ampoule_requests_rejected_total") >= 1);
    // Clients that go away give their places back, in the queue and in the slot.
    drop(streams);
    eventually("the places are free", || post(at, "/v1/chat/completions", &hello(1)).status == 200);
    assert!(metric(at, "ampoule_requests_cancelled_total") >= 3);
    server.stop().unwrap();
}

#[test]
fn a_panic_ends_one_request_and_no_other() {
    let server = start(config());
    let at = server.address();
    let session = ok(at, "/v1/sessions", &json!({}));
    let path = format!("/v1/sessions/{}", session["id"].as_str().unwrap());
    ok(at, &format!("{path}/append"), &json!({ "text": "A session that lives on." }));
    for _ in 0..5 {
        let broken = request(
            at,
            "POST",
            "/v1/chat/completions",
            &hello(4).to_string(),
            "x-ampoule-fault: 1\r\n",
        );
        assert_eq!(broken.status, 500);
        let said = broken.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(!said.contains("fault that was asked"), "{said}");
    }
    assert_eq!(metric(at, "ampoule_engine_panics_total"), 5);
    ok(at, "/v1/chat/completions", &hello(4));
    ok(at, &format!("{path}/generate"), &json!({ "max_tokens": 4 }));
    assert_eq!(get(at, "/health").status, 200);
    server.stop().unwrap();
}

#[test]
fn deadlines_hold_while_waiting_and_while_generating() {
    let server = start(Config { deadline: Duration::from_millis(300), slots: 1, ..config() });
    let at = server.address();
    let answer = post(
        at,
        "/v1/completions",
        &json!({ "prompt": "x", "max_tokens": 4000, "ignore_eos": true }),
    );
    assert_eq!(answer.status, 504, "{}", String::from_utf8_lossy(&answer.body));
    ok(at, "/v1/chat/completions", &hello(1));
    server.stop().unwrap();
}

#[test]
fn a_session_stands_where_its_client_went_away() {
    let server = start(config());
    let at = server.address();
    let id = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sessions/{id}");
    let start_at =
        ok(at, &format!("{path}/append"), &json!({ "text": "Once upon a time" }))["position"]
            .as_u64()
            .unwrap();
    let body = json!({ "max_tokens": 3000, "temperature": 0, "ignore_eos": true, "stream": true })
        .to_string();
    let mut stream = open(at);
    stream
        .write_all(
            format!("{}{body}", head("POST", &format!("{path}/generate"), body.len(), ""))
                .as_bytes(),
        )
        .unwrap();
    let mut got = vec![0; 3000];
    stream.read_exact(&mut got).unwrap();
    drop(stream);
    let state = || get(at, &path).json();
    eventually("the session is free", || state()["busy"] == false);
    let position = state()["position"].as_u64().unwrap();
    let received = String::from_utf8_lossy(&got).matches("event: delta").count() as u64;
    assert!(position >= start_at + received, "{position}: {received} were received");
    assert!(position < start_at + 3000, "what nobody got was taken back");
    let kept = state()["reply_tokens"].as_u64().unwrap();
    assert_eq!(position, start_at + kept, "the state is that of the tokens that went out");
    // It goes on exactly as a session that was only ever asked for so much.
    let twin = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    ok(at, &format!("/v1/sessions/{twin}/append"), &json!({ "text": "Once upon a time" }));
    let greedy = |id: &str, n: u64| {
        ok(
            at,
            &format!("/v1/sessions/{id}/generate"),
            &json!({ "max_tokens": n, "temperature": 0, "ignore_eos": true }),
        )
    };
    if position > start_at {
        greedy(&twin, position - start_at);
    }
    assert_eq!(greedy(&id, 20)["tokens"], greedy(&twin, 20)["tokens"]);
    server.stop().unwrap();
}

#[test]
fn a_long_prompt_delays_a_stream_but_little() {
    let server = start_with(Config { slots: 2, ..config() }, 16_384, 1 << 30);
    let at = server.address();
    let long = std::thread::spawn(move || {
        post(
            at,
            "/v1/completions",
            &json!({ "prompt": "many words to read ".repeat(600), "max_tokens": 1 }),
        )
    });
    eventually("it is being read", || metric(at, "ampoule_requests_running") >= 1);
    let before = metric(at, "ampoule_prompt_tokens_read_total");
    let short = ok(at, "/v1/chat/completions", &hello(30));
    assert_eq!(short["usage"]["completion_tokens"], 30);
    let done = long.join().unwrap();
    assert_eq!(done.status, 200);
    let all = done.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(
        before < all,
        "the short request came while the long prompt was being read ({before} of {all})"
    );
    server.stop().unwrap();
}

#[test]
fn connections_that_say_nothing_harm_nobody() {
    let server = start(config());
    let at = server.address();
    let idle: Vec<_> = (0..200).map(|_| open(at)).collect();
    for _ in 0..5 {
        ok(at, "/v1/chat/completions", &hello(2));
        let begun = std::time::Instant::now();
        assert_eq!(get(at, "/health").status, 200);
        assert!(begun.elapsed() < Duration::from_millis(500));
    }
    assert!(metric(at, "ampoule_http_connections") >= 200);
    drop(idle);
    server.stop().unwrap();
}

#[test]
fn half_a_request_gets_no_answer_and_holds_nothing() {
    let server = start(config());
    let at = server.address();
    let mut stream = open(at);
    stream
        .write_all(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"mess",
        )
        .unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(matches!(answer(stream).status, 0 | 400));
    ok(at, "/v1/chat/completions", &hello(1));
    server.stop().unwrap();
}

#[test]
fn slow_requests_are_cut_off_and_idle_connections_are_not() {
    let server = start(Config {
        head_time: Duration::from_millis(300),
        body_time: Duration::from_millis(300),
        ..config()
    });
    let at = server.address();
    let mut kept = open(at);
    let ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut ask_again = || {
        kept.write_all(ask).unwrap();
        let mut piece = [0; 4096];
        let got = kept.read(&mut piece).unwrap();
        assert!(piece[..got].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&piece));
    };
    ask_again();
    // Nothing, half a head, and half a head after a request that was whole.
    for (first, rest) in
        [(&b""[..], &b""[..]), (b"", b"GET /health HTTP/1.1\r\nx-slow: "), (ask, b"GET /he")]
    {
        let mut stream = open(at);
        stream.write_all(first).unwrap();
        if !first.is_empty() {
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            // Between requests there is time.
            std::thread::sleep(Duration::from_millis(500));
        }
        stream.write_all(rest).unwrap();
        let begun = std::time::Instant::now();
        let mut end = Vec::new();
        let _ = stream.read_to_end(&mut end);
        let waited = begun.elapsed();
        assert!(
            waited > Duration::from_millis(200) && waited < Duration::from_secs(5),
            "{waited:?}"
        );
    }
    // A body that stops in the middle.
    let mut stream = open(at);
    stream.write_all(head("POST", "/tokenize", 100, "").as_bytes()).unwrap();
    stream.write_all(b"{\"pro").unwrap();
    assert_eq!(answer(stream).status, 408);
    ask_again();
    ok(at, "/v1/chat/completions", &hello(1));
    server.stop().unwrap();
}

#[test]
fn connections_beyond_the_limit_are_turned_away() {
    let server = start(Config { connections: 3, ..config() });
    let at = server.address();
    let held: Vec<_> = (0..3).map(|_| open(at)).collect();
    eventually("more are turned away", || get(at, "/health").status == 503);
    let refused = get(at, "/health");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    drop(held);
    eventually("there is room again", || get(at, "/health").status == 200);
    server.stop().unwrap();
}
