//! What each API says, in what order, and that states do what their names say.

mod support;

use std::io::{Read, Write};
use std::time::Duration;

use ampoule::TEXTS;
use ampoule_server::Config;
use serde_json::{Value, json};
use support::{config, get, head, metric, ok, open, post, request, start};

fn tool(name: &str) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": {
        "type": "object", "properties": { "n": { "type": "integer", "minimum": 0, "maximum": 9 }, "colour": { "enum": ["red", "blue"] } },
        "required": ["n", "colour"], "additionalProperties": false,
    }}})
}

#[test]
fn streams_say_what_whole_answers_say() {
    let server = start(config());
    let at = server.address();
    let variants = [
        json!({}),
        json!({ "n": 3 }),
        json!({ "stop": ["e", "qq"] }),
        json!({ "tools": [tool("a"), tool("b")], "tool_choice": "required", "max_tokens": 200 }),
        json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": tool("x")["function"]["parameters"] } }, "max_tokens": 200 }),
        json!({ "chat_template_kwargs": { "enable_thinking": true } }),
    ];
    for variant in variants {
        let mut body = json!({
            "messages": [{ "role": "user", "content": "Say something, é 東京 🚆." }], "max_tokens": 40, "seed": 11,
            "temperature": 0.8, "logprobs": true, "top_logprobs": 1,
        });
        for (name, value) in variant.as_object().unwrap() {
            body[name] = value.clone();
        }
        let whole = ok(at, "/v1/chat/completions", &body);
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let streamed = post(at, "/v1/chat/completions", &body);
        assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
        assert!(String::from_utf8(streamed.body.clone()).unwrap().ends_with("data: [DONE]\n\n"));
        let events = streamed.events();
        let usage = &events.last().unwrap().1["usage"];
        assert_eq!(usage["completion_tokens"], whole["usage"]["completion_tokens"], "{variant}");
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let (mut content, mut thoughts, mut calls, mut finish, mut logprobs) =
                (String::new(), String::new(), Vec::new(), Value::Null, Vec::new());
            for (_, event) in &events {
                for part in
                    event["choices"].as_array().unwrap().iter().filter(|c| c["index"] == index)
                {
                    content.push_str(part["delta"]["content"].as_str().unwrap_or_default());
                    thoughts
                        .push_str(part["delta"]["reasoning_content"].as_str().unwrap_or_default());
                    calls.extend(
                        part["delta"]["tool_calls"].as_array().cloned().unwrap_or_default(),
                    );
                    logprobs.extend(
                        part["logprobs"]["content"].as_array().cloned().unwrap_or_default(),
                    );
                    if !part["finish_reason"].is_null() {
                        assert!(finish.is_null(), "one finish reason");
                        finish = part["finish_reason"].clone();
                    }
                }
            }
            let message = &choice["message"];
            assert_eq!(content, message["content"].as_str().unwrap_or_default(), "{variant}");
            assert_eq!(thoughts, message["reasoning_content"].as_str().unwrap_or_default());
            assert_eq!(finish, choice["finish_reason"]);
            assert_eq!(json!(logprobs), choice["logprobs"]["content"]);
            let whole_calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
            assert_eq!(calls.len(), whole_calls.len());
            for (a, b) in calls.iter().zip(&whole_calls) {
                assert_eq!(a["function"], b["function"]);
                let arguments: Value =
                    serde_json::from_str(a["function"]["arguments"].as_str().unwrap()).unwrap();
                assert!(arguments["n"].as_u64().unwrap() <= 9 && arguments["colour"].is_string());
            }
            if variant.get("tools").is_some() && finish == "tool_calls" {
                assert!(!calls.is_empty());
            }
            if variant.get("stop").is_some() {
                assert!(!content.contains('e') && !content.contains("qq"), "{content}");
            }
            if variant.get("response_format").is_some() && finish == "stop" {
                let value: Value = serde_json::from_str(&content).unwrap();
                assert!(value["n"].as_u64().unwrap() <= 9);
            }
        }
    }
    // A named tool, and no call where there must be none.
    let named = ok(
        at,
        "/v1/chat/completions",
        &json!({
            "messages": [{ "role": "user", "content": "Go" }], "tools": [tool("a"), tool("b")], "max_tokens": 200,
            "tool_choice": { "type": "function", "function": { "name": "b" } },
        }),
    );
    assert_eq!(named["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "b");
    assert_eq!(named["choices"][0]["finish_reason"], "tool_calls");
    server.stop().unwrap();
}

/// The head of a stream leaves with its first token: on a machine whose cores the engine uses, what wakes the client earlier delays
/// the token. One that the engine has no time for leaves all the same.
#[test]
fn a_stream_begins_with_its_first_token_or_soon() {
    let server = start(Config { slots: 1, ..config() });
    let at = server.address();
    let send = |tokens: usize, round: usize| {
        let body = json!({
            "messages": [{ "role": "user", "content": format!("{round} {}", TEXTS[0]) }], "max_tokens": tokens, "seed": round,
            "ignore_eos": true, "stream": true, "logprobs": true,
        });
        let body = body.to_string();
        let mut stream = open(at);
        let head = head("POST", "/v1/chat/completions", body.len(), "");
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut bytes = vec![0; 64 << 10];
        let read = stream.read(&mut bytes).unwrap();
        let text = String::from_utf8(bytes[..read].to_vec()).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        // The role comes first and has no probabilities.
        (stream, text.contains("\"logprob\":"))
    };
    let together = (0..12).filter(|round| send(3, *round).1).count();
    // Nearly all do; on a busy machine some tokens take longer than a head waits. Unless heads wait, none does.
    assert!(together >= 3, "{together} of 12 heads came with a token");
    let (busy, _) = send(3500, 20);
    let begun = std::time::Instant::now();
    let (waiting, token) = send(1, 21);
    assert!(!token && begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop((busy, waiting));
    server.stop().unwrap();
}

#[test]
fn completions_tokens_and_models() {
    let server = start(config());
    let at = server.address();
    let tokens = ok(at, "/tokenize", &json!({ "prompt": "the harbour" }))["tokens"].clone();
    assert_eq!(ok(at, "/detokenize", &json!({ "tokens": tokens }))["prompt"], "the harbour");
    let body = |prompt: Value| json!({ "prompt": prompt, "max_tokens": 9, "temperature": 0, "echo": true, "logprobs": 2 });
    let by_text = ok(at, "/v1/completions", &body(json!("the harbour")));
    let by_tokens = ok(at, "/v1/completions", &body(tokens));
    assert_eq!(by_text["choices"], by_tokens["choices"]);
    assert!(by_text["choices"][0]["text"].as_str().unwrap().starts_with("the harbour"));
    assert_eq!(by_text["choices"][0]["finish_reason"], "length");
    assert_eq!(
        by_tokens["usage"]["prompt_tokens_details"]["cached_tokens"],
        by_tokens["usage"]["prompt_tokens"]
    );
    let mut streamed = body(json!("the harbour"));
    streamed["stream"] = json!(true);
    let text: String = post(at, "/v1/completions", &streamed)
        .events()
        .iter()
        .map(|(_, e)| e["choices"][0]["text"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(json!(text), by_text["choices"][0]["text"]);
    assert_eq!(get(at, "/v1/models").json()["data"][0]["id"], "tiny");
    assert_eq!(get(at, "/v1/models/tiny").status, 200);
    assert_eq!(get(at, "/v1/models/other").status, 404);
    server.stop().unwrap();
}

#[test]
fn responses_stream_in_order_continue_fork_and_go() {
    let server = start(config());
    let at = server.address();
    let first = post(
        at,
        "/v1/responses",
        &json!({ "input": "Hello", "max_output_tokens": 10, "temperature": 0, "stream": true, "instructions": "Be short." }),
    );
    let events = first.events();
    let mut names: Vec<&str> = events.iter().map(|(n, _)| n.as_str()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    for (index, (name, event)) in events.iter().enumerate() {
        assert_eq!(
            (event["type"].as_str(), event["sequence_number"].as_u64()),
            (Some(name.as_str()), Some(index as u64))
        );
    }
    let body = &events.last().unwrap().1["response"];
    let id = body["id"].as_str().unwrap();
    let text: String = events.iter().filter_map(|(_, e)| e["delta"].as_str()).collect();
    assert_eq!(body["output"][0]["content"][0]["text"], text);
    assert_eq!(body["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(get(at, &format!("/v1/responses/{id}")).json(), *body);
    let items = get(at, &format!("/v1/responses/{id}/input_items")).json();
    assert_eq!(items["data"][0]["content"][0]["text"], "Hello");

    let next = |previous: &str, input: &str| {
        ok(
            at,
            "/v1/responses",
            &json!({
                "input": input, "previous_response_id": previous, "instructions": "Be short.", "max_output_tokens": 10, "temperature": 0,
            }),
        )
    };
    let two = next(id, "And then?");
    let three = next(two["id"].as_str().unwrap(), "And then?");
    assert!(three["usage"]["input_tokens"].as_u64() > two["usage"]["input_tokens"].as_u64());
    // Time travel: the same question from the older place has the same answer, whatever came since.
    assert_eq!(next(id, "And then?")["output"][0]["content"], two["output"][0]["content"]);
    // Other instructions begin otherwise: the conversation is read again, and is no error.
    let other = ok(
        at,
        "/v1/responses",
        &json!({ "input": "So?", "previous_response_id": id, "max_output_tokens": 3 }),
    );
    assert_eq!(other["previous_response_id"], id);

    let calls = ok(
        at,
        "/v1/responses",
        &json!({
            "input": "Go", "tools": [{ "type": "function", "name": "a", "parameters": tool("a")["function"]["parameters"] }],
            "tool_choice": { "type": "function", "name": "a" }, "max_output_tokens": 200,
        }),
    );
    assert_eq!(
        (calls["output"][0]["type"].as_str(), calls["output"][0]["name"].as_str()),
        (Some("function_call"), Some("a"))
    );
    let result = json!([{ "type": "function_call_output", "call_id": calls["output"][0]["call_id"], "output": "42" }]);
    let after = ok(
        at,
        "/v1/responses",
        &json!({
            "input": result, "previous_response_id": calls["id"], "max_output_tokens": 5,
            "tools": [{ "type": "function", "name": "a", "parameters": tool("a")["function"]["parameters"] }],
        }),
    );
    assert!(
        after["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap()
            >= calls["usage"]["total_tokens"].as_u64().unwrap()
    );

    assert_eq!(
        request(at, "DELETE", &format!("/v1/responses/{id}"), "", "").json()["deleted"],
        true
    );
    assert_eq!(get(at, &format!("/v1/responses/{id}")).status, 404);
    let gone = post(at, "/v1/responses", &json!({ "input": "x", "previous_response_id": id }));
    assert_eq!(gone.status, 404);
    let unstored =
        ok(at, "/v1/responses", &json!({ "input": "x", "store": false, "max_output_tokens": 2 }));
    assert_eq!(get(at, &format!("/v1/responses/{}", unstored["id"].as_str().unwrap())).status, 404);
    server.stop().unwrap();
}

#[test]
fn sessions_fork_roll_back_truncate_and_travel_as_capsules() {
    let server = start(config());
    let at = server.address();
    let create = |body: Value| ok(at, "/v1/sessions", &body)["id"].as_str().unwrap().to_owned();
    let call =
        |id: &str, verb: &str, body: Value| ok(at, &format!("/v1/sessions/{id}/{verb}"), &body);
    let say = |id: &str, n: u64| {
        call(id, "generate", json!({ "max_tokens": n, "temperature": 0, "ignore_eos": true }))
    };
    let id = create(json!({}));
    let asked =
        call(&id, "append", json!({ "text": "The sea was grey." }))["position"].as_u64().unwrap();
    let capsule = call(&id, "snapshot", json!({ "name": "grey", "pin": true }));
    let ten = say(&id, 10);
    assert_eq!(ten["position"].as_u64().unwrap(), asked + 10);
    // What was heard, by tokens and by text, and then the same words again.
    let cut = call(&id, "truncate", json!({ "heard_tokens": 4 }));
    assert_eq!(cut["position"].as_u64().unwrap(), asked + 4);
    let rest = say(&id, 6);
    assert_eq!(
        json!([ten["tokens"].as_array().unwrap()[4..]]),
        json!([rest["tokens"].as_array().unwrap()])
    );
    let heard =
        post(at, &format!("/v1/sessions/{id}/truncate"), &json!({ "heard_text": "not this" }));
    assert_eq!(heard.status, 400);
    // By token and by boundary; then ten again.
    assert_eq!(
        call(&id, "rollback", json!({ "tokens": asked }))["position"].as_u64().unwrap(),
        asked
    );
    assert_eq!(say(&id, 10)["tokens"], ten["tokens"]);
    let boundary = get(at, &format!("/v1/sessions/{id}")).json()["boundaries"][0]["id"].clone();
    call(&id, "rollback", json!({ "boundary": boundary }));
    // Forks go on as their origin would.
    let read = metric(at, "ampoule_prompt_tokens_read_total");
    let forks = call(&id, "fork", json!({ "n": 3 }));
    for fork in forks["data"].as_array().unwrap() {
        assert_eq!(
            say(fork["id"].as_str().unwrap(), 10)["tokens"],
            say(&create(json!({ "capsule": "grey" })), 10)["tokens"]
        );
    }
    assert_eq!(metric(at, "ampoule_prompt_tokens_read_total"), read, "nothing was read again");
    // A capsule leaves as a file and comes back.
    let file = get(at, &format!("/v1/capsules/{}/export", capsule["id"].as_str().unwrap()));
    let mut bytes = support::head("POST", "/v1/capsules/import", file.body.len(), "").into_bytes();
    bytes.extend_from_slice(&file.body);
    let back = support::raw(at, &bytes);
    assert_eq!(back.status, 201);
    assert_eq!(back.json()["lineage"], capsule["lineage"]);
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    assert_eq!(support::raw(at, &bytes).status, 400, "a flipped bit");
    let travelled = create(json!({ "capsule": back.json()["id"] }));
    assert_eq!(say(&travelled, 10)["tokens"], ten["tokens"]);
    let tree = get(at, "/v1/capsules/tree").json();
    assert_eq!(tree["data"].as_array().unwrap().len(), 2);
    // Messages by the template, and an interruption.
    let chat = create(json!({}));
    let reply = call(
        &chat,
        "generate",
        json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 5, "temperature": 0 }),
    );
    let next = call(
        &chat,
        "generate",
        json!({ "messages": [{ "role": "user", "content": "More" }], "max_tokens": 5, "temperature": 0 }),
    );
    assert!(
        next["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64()
            >= reply["position"].as_u64()
    );
    call(&chat, "interrupt", json!({}));
    assert_eq!(call(&chat, "rollback", json!({ "message": 2 }))["messages"], 2);
    assert_eq!(request(at, "DELETE", &format!("/v1/sessions/{chat}"), "", "").status, 200);
    assert_eq!(get(at, &format!("/v1/sessions/{chat}")).status, 404);
    server.stop().unwrap();
}

#[test]
fn a_store_brings_everything_back() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store").to_str().unwrap().to_owned();
    let with_store =
        || Config { store: Some((place.clone(), ampoule::StoreOptions::default())), ..config() };
    let server = start(with_store());
    let at = server.address();
    let first = ok(
        at,
        "/v1/responses",
        &json!({ "input": "Remember the harbour.", "max_output_tokens": 8, "temperature": 0 }),
    );
    let next = json!({ "input": "What was it?", "previous_response_id": first["id"], "max_output_tokens": 12, "temperature": 0 });
    let expected = ok(at, "/v1/responses", &next);
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let position = ok(
        at,
        &format!("/v1/sessions/{session}/append"),
        &json!({ "text": "A session." }),
    )["position"]
        .as_u64();
    let chat = json!({ "messages": [{ "role": "user", "content": "A prompt of some length, parked." }], "max_tokens": 4, "temperature": 0 });
    ok(at, "/v1/chat/completions", &chat);
    server.stop().unwrap();

    let server = start(with_store());
    let at = server.address();
    let again = ok(at, "/v1/responses", &next);
    assert_eq!(again["output"][0]["content"], expected["output"][0]["content"]);
    assert_eq!(again["usage"], expected["usage"], "the state came from the store");
    assert_eq!(get(at, &format!("/v1/sessions/{session}")).json()["position"].as_u64(), position);
    let warm = ok(at, "/v1/chat/completions", &chat);
    assert_eq!(
        warm["usage"]["prompt_tokens_details"]["cached_tokens"], warm["usage"]["prompt_tokens"],
        "restart, then a hit"
    );
    server.stop().unwrap();
}

#[test]
fn the_document_has_every_path() {
    let server = start(config());
    let document = get(server.address(), "/openapi.json").json();
    for path in document["paths"].as_object().unwrap() {
        for method in path.1.as_object().unwrap().keys() {
            let path = path.0.replace("{id}", "x");
            let answer = request(server.address(), &method.to_uppercase(), &path, "", "");
            assert_ne!(answer.status, 405, "{method} {path}");
            let unknown = answer.status == 404
                && answer.json()["error"]["message"].as_str().unwrap().contains("path");
            assert!(!unknown, "{method} {path}");
            assert!(answer.status < 500, "{method} {path}: {}", answer.status);
        }
    }
    assert!(document["paths"].as_object().unwrap().len() > 20);
    server.stop().unwrap();
}
