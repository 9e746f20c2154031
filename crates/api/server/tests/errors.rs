//! Errors say what to do: the right field, the right option, the right path, and no words of a parser.

mod support;

use ampoule_server::Config;
use serde_json::{Value, json};
use support::{config, get, head, nano, ok, post, raw, request, start, start_with};

/// Posts, expects a refusal of a parameter, and that its message has these words.
fn refused(at: std::net::SocketAddr, path: &str, body: &Value, param: &str, words: &[&str]) {
    let answer = post(at, path, body);
    let said = String::from_utf8_lossy(&answer.body).into_owned();
    assert_eq!(answer.status, 400, "{path} {body}: {said}");
    let error = answer.json()["error"].clone();
    let has = if param.is_empty() { Value::Null } else { json!(param) };
    assert_eq!(error["param"], has, "{path} {body}: {error}");
    let message = error["message"].as_str().unwrap();
    for word in words {
        assert!(message.contains(word), "{path} {body}: no {word:?} in {message:?}");
    }
    for word in ["usize", "u32", "i64", "f32", "invalid type", "expected"] {
        assert!(!message.contains(word), "{path} {body}: {message}");
    }
}

#[test]
fn names_of_other_apis_are_answered_with_the_name_here() {
    let server = start(config());
    let at = server.address();
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let generate = format!("/v1/sessions/{session}/generate");
    let hi = json!([{ "role": "user", "content": "Hi" }]);
    for (path, body, param, word) in [
        (
            "/v1/responses",
            json!({ "input": "Hi", "max_tokens": 4 }),
            "max_tokens",
            "max_output_tokens",
        ),
        ("/v1/responses", json!({ "messages": hi }), "messages", "'input'"),
        (
            "/v1/responses",
            json!({ "input": "Hi", "response_format": {} }),
            "response_format",
            "'text'",
        ),
        ("/v1/chat/completions", json!({ "input": "Hi" }), "input", "'messages'"),
        (
            "/v1/chat/completions",
            json!({ "messages": hi, "max_output_tokens": 4 }),
            "max_output_tokens",
            "max_completion_tokens",
        ),
        ("/v1/completions", json!({ "messages": hi }), "messages", "/v1/chat/completions"),
        ("/tokenize", json!({ "text": "Hi" }), "text", "'prompt'"),
        ("/detokenize", json!({ "ids": [1] }), "ids", "'tokens'"),
        (&generate, json!({ "prompt": "Hi" }), "prompt", "'text'"),
        (&generate, json!({ "input": "Hi" }), "input", "'text'"),
        ("/v1/sessions", json!({ "name": "mine" }), "name", "'capsule'"),
    ] {
        refused(at, path, &body, param, &[word]);
    }
    // The model may be said wherever there is one.
    let said = ok(at, &generate, &json!({ "model": "tiny", "text": "Hi", "max_tokens": 2 }));
    assert_eq!(said["usage"]["completion_tokens"], 2);
    assert_eq!(post(at, &generate, &json!({ "model": "gpt-9" })).status, 404);
    server.stop().unwrap();
}

#[test]
fn wrong_values_and_empty_prompts_are_said_in_plain_words() {
    let server = start(config());
    let at = server.address();
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let verb = |verb: &str| format!("/v1/sessions/{session}/{verb}");
    let chat = |name: &str, value: Value| json!({ "messages": [{ "role": "user", "content": "Hi" }], name: value });
    for (name, value, words) in [
        ("max_tokens", json!("ten"), ["a whole number from 0 on", "not \"ten\""]),
        ("max_tokens", json!(-1), ["from 1 to ", "not -1"]),
        ("max_tokens", json!(0), ["from 1 to ", "not 0"]),
        ("reasoning_effort", json!("hihg"), ["high, xhigh, max", "not \"hihg\""]),
        ("max_tokens", json!(2.5), ["a whole number", "not 2.5"]),
        ("temperature", json!("hot"), ["a number", "not \"hot\""]),
        ("stream", json!("yes"), ["true or false", "not \"yes\""]),
        ("seed", json!({}), ["a whole number", "not an object"]),
        ("model", json!(7), ["text", "not 7"]),
        ("tools", json!("none"), ["a list", "not \"none\""]),
    ] {
        refused(at, "/v1/chat/completions", &chat(name, value), name, &words);
    }
    refused(
        at,
        &verb("append"),
        &json!({ "tokens": [1, "two"] }),
        "tokens",
        &["a list of whole numbers"],
    );
    refused(
        at,
        "/v1/responses",
        &json!({ "input": "Hi", "reasoning": { "effort": "hard" } }),
        "reasoning.effort",
        &["none, minimal", "not \"hard\""],
    );
    refused(at, "/v1/completions", &json!({ "prompt": "" }), "prompt", &["empty"]);
    refused(at, "/v1/completions", &json!({ "prompt": [] }), "prompt", &["empty"]);
    refused(at, &verb("generate"), &json!({}), "text", &["this session is empty", "'messages'"]);
    refused(at, &verb("generate"), &json!({ "text": "" }), "text", &["empty"]);
    for (body, words) in [
        ("", "empty"),
        ("  ", "empty"),
        ("{\"a\": ", "ends in the middle"),
        ("{a}", "column 2"),
        ("[]", "object"),
    ] {
        let answer = request(at, "POST", "/v1/chat/completions", body, "");
        let said = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(answer.status == 400 && said.contains(words), "{body:?}: {said}");
    }
    // What takes no fields ignores none.
    refused(
        at,
        &verb("interrupt"),
        &json!({ "reason": "barge-in" }),
        "reason",
        &["no such parameter"],
    );
    assert_eq!(ok(at, &verb("interrupt"), &json!({}))["interrupted"], false);
    assert_eq!(request(at, "POST", &verb("interrupt"), "", "").status, 200);
    for path in ["/v1/sessions?limit=2", "/v1/capsules?name=x", "/v1/models?a=b"] {
        assert_eq!(get(at, path).status, 400, "{path}");
    }
    refused(at, "/v1/chat/completions?stream=true", &chat("n", json!(1)), "stream", &[]);
    server.stop().unwrap();
}

#[test]
fn what_is_too_long_is_named_as_the_client_called_it() {
    let server = start_with(Config { body_bytes: 4096, ..config() }, 64, 1 << 30);
    let at = server.address();
    let long = "word ".repeat(100);
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let append = format!("/v1/sessions/{session}/append");
    let hi = json!([{ "role": "user", "content": long }]);
    let previous =
        ok(at, "/v1/responses", &json!({ "input": "Hi", "max_output_tokens": 2 }))["id"].clone();
    for (path, body, param) in [
        ("/v1/chat/completions", json!({ "messages": hi }), "messages"),
        ("/v1/completions", json!({ "prompt": long }), "prompt"),
        ("/v1/responses", json!({ "input": long }), "input"),
        ("/v1/responses", json!({ "input": long, "previous_response_id": previous }), "input"),
        (&append, json!({ "text": long }), "text"),
        (&append, json!({ "messages": hi }), "messages"),
        (&append, json!({ "tokens": vec![5; 100] }), "tokens"),
    ] {
        refused(at, path, &body, param, &["the context is 64", "--context"]);
        assert_eq!(post(at, path, &body).json()["error"]["code"], "context_length_exceeded");
    }
    // In a session that has begun, too.
    ok(at, &append, &json!({ "text": "A beginning." }));
    refused(at, &append, &json!({ "text": long }), "text", &["the context is 64"]);
    let large = post(at, &append, &json!({ "text": "a".repeat(5000) }));
    assert!(
        large.status == 413
            && large.json()["error"]["message"].as_str().unwrap().contains("--body-mib")
    );
    server.stop().unwrap();
}

#[test]
fn headers_paths_and_methods_that_are_wrong_are_answered_with_what_is_right() {
    let server = start(config());
    let at = server.address();
    let message =
        |answer: &support::Answer| answer.json()["error"]["message"].as_str().unwrap().to_owned();
    let form = head(
        "POST",
        "/v1/chat/completions",
        2,
        "content-type: application/x-www-form-urlencoded\r\n",
    );
    let form = raw(at, format!("{form}{{}}").as_bytes());
    assert_eq!(form.status, 415);
    assert!(message(&form).contains("content-type: application/json"), "{}", message(&form));
    let path = post(at, "/chat/completions", &json!({}));
    assert_eq!(path.status, 404);
    assert!(message(&path).contains("/v1/chat/completions"), "{}", message(&path));
    let method = get(at, "/v1/chat/completions");
    assert!(
        method.status == 405 && message(&method).contains("takes POST"),
        "{}",
        message(&method)
    );
    let unstored =
        ok(at, "/v1/responses", &json!({ "input": "Hi", "store": false, "max_output_tokens": 2 }));
    let next = post(
        at,
        "/v1/responses",
        &json!({ "input": "So?", "previous_response_id": unstored["id"] }),
    );
    assert_eq!(
        (next.status, next.json()["error"]["code"].as_str()),
        (404, Some("previous_response_not_found"))
    );
    assert!(message(&next).contains("'store': true"), "{}", message(&next));
    server.stop().unwrap();
}

#[test]
fn heard_text_is_forgiving_about_spaces_and_clear_about_words() {
    let server = nano(config());
    let at = server.address();
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let verb = |verb: &str| format!("/v1/sessions/{session}/{verb}");
    let ask = json!({ "messages": [{ "role": "user", "content": "Name three rivers." }], "max_tokens": 24, "temperature": 0 });
    let reply = ok(at, &verb("generate"), &ask);
    let text = reply["text"].as_str().unwrap().trim_start();
    let words: Vec<&str> = text.split_whitespace().take(4).collect();
    let other = format!("{} nobody said that", words[..3].join(" "));
    let count = words[..3].join(" ").chars().count();
    refused(
        at,
        &verb("truncate"),
        &json!({ "heard_text": other }),
        "heard_text",
        &["heard_tokens", "nobody said", words[3], &format!("after {}", count + 1)],
    );
    // As it was played: without the space before it, with others between.
    let cut =
        ok(at, &verb("truncate"), &json!({ "heard_text": format!("  {}  ", words.join("  ")) }));
    let kept = cut["heard_tokens"].as_u64().unwrap() as usize;
    let tokens: Vec<u64> = serde_json::from_value(reply["tokens"].clone()).unwrap();
    let heard = ok(at, "/detokenize", &json!({ "tokens": tokens[..kept] }))["prompt"].clone();
    let heard: Vec<&str> = heard.as_str().unwrap().split_whitespace().collect();
    assert_eq!(heard, words);
    server.stop().unwrap();
}

#[test]
fn messages_are_listed_with_the_places_that_rollbacks_go_to() {
    let server = nano(config());
    let at = server.address();
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let verb = |verb: &str| format!("/v1/sessions/{session}/{verb}");
    let list = || get(at, &verb("messages")).json()["data"].as_array().unwrap().clone();
    assert!(list().is_empty());
    // Several in one call: their places are found in the state.
    let first = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "What is the weather in Oslo?" },
        { "role": "assistant", "content": "", "tool_calls": [{ "id": "c1", "type": "function",
            "function": { "name": "weather", "arguments": "{\"city\": \"Oslo\"}" } }] },
        { "role": "tool", "tool_call_id": "c1", "content": "Rain." },
    ]);
    let one = ok(
        at,
        &verb("generate"),
        &json!({ "messages": first, "max_tokens": 8, "temperature": 0, "ignore_eos": true }),
    );
    let two = ok(
        at,
        &verb("generate"),
        &json!({ "messages": [{ "role": "user", "content": "And Lima?" }], "max_tokens": 8, "temperature": 0, "ignore_eos": true }),
    );
    let messages = list();
    let column = |name: &str| messages.iter().map(|m| m[name].clone()).collect::<Vec<_>>();
    assert_eq!(
        column("role"),
        ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    );
    assert_eq!(column("message"), (1..=7).map(|n| json!(n)).collect::<Vec<_>>());
    assert_eq!(
        (&messages[1]["content"], &messages[4]["content"]),
        (&json!("What is the weather in Oslo?"), &one["text"])
    );
    let call: Value = serde_json::from_str(
        messages[2]["tool_calls"][0]["function"]["arguments"].as_str().unwrap(),
    )
    .unwrap();
    assert_eq!(call, json!({ "city": "Oslo" }));
    assert_eq!(
        (&messages[0]["start"], &messages[4]["end"], &messages[6]["end"]),
        (&json!(0), &one["position"], &two["position"])
    );
    for pair in messages.windows(2) {
        assert_eq!(pair[0]["end"], pair[1]["start"]);
        assert!(pair[0]["start"].as_u64() < pair[0]["end"].as_u64(), "{pair:?}");
    }
    // Every place that is told is where the rollback to that message ends.
    for message in messages.iter().rev() {
        let back = ok(at, &verb("rollback"), &json!({ "message": message["message"] }));
        assert_eq!(back["position"], message["end"], "{message}");
        let left = message["message"].as_u64().unwrap() as usize;
        assert_eq!(list(), messages[..left]);
        assert_eq!(list(), messages[..left], "what the first listing found");
    }
    // As many messages as there were once, and other ones.
    for words in ["Be brief.", "Be brief, and write of nothing but the weather."] {
        let pair = [words, "Well?"].map(|text| json!({ "role": "user", "content": text }));
        ok(at, &verb("rollback"), &json!({ "message": 1 }));
        let session = ok(at, &verb("append"), &json!({ "messages": pair }));
        let now = list();
        assert_eq!((now.len(), &now[2]["end"]), (3, &session["position"]));
        assert!(now[1]["end"].as_u64() < now[2]["end"].as_u64(), "{now:?}");
    }
    server.stop().unwrap();
}
