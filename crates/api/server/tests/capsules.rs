//! Nothing is read twice, and no answer changes because of it.

mod support;

use serde_json::{Value, json};
use support::{config, eventually, get, metric, ok, post, start, start_with};

fn ask(address: std::net::SocketAddr, messages: &[Value], tools: &Value) -> Value {
    ok(
        address,
        "/v1/chat/completions",
        &json!({
            "messages": messages, "max_tokens": 24, "temperature": 0, "tools": tools, "logprobs": true, "top_logprobs": 3,
        }),
    )
}

fn tools() -> Value {
    json!([{ "type": "function", "function": { "name": "look", "description": "Looks.", "parameters": {
        "type": "object", "properties": { "at": { "type": "string" } }, "required": ["at"],
    }}}])
}

/// Everything an answer says of its tokens: bit for bit, the logarithms are printed whole.
fn said(answer: &Value) -> Value {
    let choice = &answer["choices"][0];
    json!([
        choice["message"]["content"],
        choice["message"]["reasoning_content"],
        choice["logprobs"],
        choice["finish_reason"]
    ])
}

#[test]
fn twenty_turns_sent_whole_each_time_cost_what_is_new_and_say_what_a_cold_server_says() {
    let warm = start_with(config(), 8192, 1 << 30);
    let cold = start_with(ampoule_server::Config { caching: false, ..config() }, 8192, 1 << 30);
    let tools = tools();
    let mut history = vec![json!({ "role": "system", "content": "You are terse. ".repeat(20) })];
    let (mut new, mut seen): (usize, Vec<Vec<u64>>) = (0, Vec::new());
    let mut read = 0;
    for turn in 0..20 {
        if turn % 4 == 3 {
            let id = format!("call_{turn}");
            history.push(json!({ "role": "assistant", "content": "", "tool_calls": [{ "id": id, "type": "function",
                "function": { "name": "look", "arguments": format!("{{\"at\": \"place {turn}\"}}") } }] }));
            history.push(json!({ "role": "tool", "tool_call_id": id, "content": format!("There were {turn} ships, all of them grey and small.") }));
        }
        history.push(json!({ "role": "user", "content": format!("Question {turn}: what do the harbour books say about the day?") }));
        // A line near the end that changes each time.
        let mut messages = history.clone();
        messages.push(json!({ "role": "system", "content": format!("Now: 2026-01-{:02} 10:{:02}", turn + 1, turn * 2) }));
        let tokens = ok(cold.address(), "/tokenize", &json!({ "messages": messages }));
        let tokens: Vec<u64> = serde_json::from_value(tokens["tokens"].clone()).unwrap();
        let common =
            |other: &Vec<u64>| other.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        new += tokens.len() - seen.iter().map(common).max().unwrap_or(0);
        seen.push(tokens);
        let (a, b) =
            (ask(warm.address(), &messages, &tools), ask(cold.address(), &messages, &tools));
        assert_eq!(said(&a), said(&b), "turn {turn}");
        assert_eq!(b["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        read += a["timings"]["prompt_tokens_read"].as_u64().unwrap() as usize;
        history
            .push(json!({ "role": "assistant", "content": a["choices"][0]["message"]["content"] }));
    }
    // The first prompt has the tools before it, which /tokenize does not know of: they are new once.
    let tools_tokens = {
        let with =
            ask(cold.address(), &history[..1], &tools)["usage"]["prompt_tokens"].as_u64().unwrap();
        let without = ask(cold.address(), &history[..1], &json!([]))["usage"]["prompt_tokens"]
            .as_u64()
            .unwrap();
        (with - without) as usize
    };
    new += tools_tokens;
    assert!(read as f64 <= 1.1 * new as f64, "{read} tokens were read, {new} were new");
    assert_eq!(metric(warm.address(), "ampoule_prompt_tokens_read_total") as usize, read);
    warm.stop().unwrap();
    cold.stop().unwrap();
}

#[test]
fn a_line_changed_in_the_middle_costs_what_follows_it() {
    let server = start(config());
    let message = |n: usize, text: &str| json!({ "role": if n.is_multiple_of(2) { "user" } else { "assistant" }, "content": format!("{text} {n}. {}", "Some words follow. ".repeat(6)) });
    let mut messages: Vec<Value> = (0..12).map(|n| message(n, "Message")).collect();
    messages.push(json!({ "role": "user", "content": "And?" }));
    let first = ask(server.address(), &messages, &json!([]));
    let total = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(first["timings"]["prompt_tokens_read"], total);
    messages[8] = message(8, "Another");
    let second = ask(server.address(), &messages, &json!([]));
    let follows =
        ok(server.address(), "/tokenize", &json!({ "messages": &messages[8..] }))["count"]
            .as_u64()
            .unwrap();
    let read = second["timings"]["prompt_tokens_read"].as_u64().unwrap();
    assert!(read <= follows + follows / 8 + 2, "{read} read, {follows} follow the change");
    assert!(read >= follows / 2, "{read} read, {follows} follow the change");
    server.stop().unwrap();
}

#[test]
fn short_prompts_hit_at_the_first_second_sighting_and_stripped_thoughts_cost_little() {
    let server = start(config());
    let ask = |messages: Value, thinking: bool| {
        let kwargs = json!({ "enable_thinking": thinking });
        ok(
            server.address(),
            "/v1/chat/completions",
            &json!({ "messages": messages, "max_tokens": 8, "temperature": 0, "chat_template_kwargs": kwargs }),
        )
    };
    let one = json!([{ "role": "user", "content": "Hi" }]);
    assert_eq!(ask(one.clone(), false)["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let again = ask(one, false);
    assert_eq!(
        again["usage"]["prompt_tokens_details"]["cached_tokens"],
        again["usage"]["prompt_tokens"]
    );
    // Appended only: everything before is a capsule.
    let longer = json!([{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "Yes" }, { "role": "user", "content": "So?" }]);
    let cached =
        ask(longer, false)["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= 14, "{cached}");
    // The model thought in its turn; the template leaves thoughts out of history.
    let think = json!([{ "role": "user", "content": "Think of the sea and of ships." }]);
    let answer = ask(think, true);
    assert!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 0);
    assert!(answer["choices"][0]["message"]["reasoning_content"].is_string(), "{answer}");
    let next = json!([
        { "role": "user", "content": "Think of the sea and of ships." }, { "role": "assistant", "content": "Done" },
        { "role": "user", "content": "And now?" },
    ]);
    let answer = ask(next, true);
    let (cached, all) = (
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
        ok(server.address(), "/tokenize", &json!({ "messages": [{ "role": "user", "content": "Think of the sea and of ships." }] }))["count"].as_u64().unwrap(),
    );
    // All but the header of the reply, which the template opened with a thought.
    assert!(cached + 16 >= all, "{cached} of {all}");
    server.stop().unwrap();
}

#[test]
fn ten_choices_and_ten_branches_read_their_prefix_once() {
    let server = start(config());
    let prompt = "A long story about a harbour. ".repeat(12);
    let before = metric(server.address(), "ampoule_prompt_tokens_read_total");
    let answer = ok(
        server.address(),
        "/v1/chat/completions",
        &json!({
            "messages": [{ "role": "user", "content": prompt }], "n": 10, "seed": 5, "max_tokens": 12,
        }),
    );
    let read = metric(server.address(), "ampoule_prompt_tokens_read_total") - before;
    assert_eq!(read, answer["usage"]["prompt_tokens"].as_u64().unwrap());
    let texts: std::collections::HashSet<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["message"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 10);
    assert!(texts.len() > 5, "{texts:?}");
    // The first of several choices is the only one of a request for one.
    let one = ok(
        server.address(),
        "/v1/chat/completions",
        &json!({
            "messages": [{ "role": "user", "content": prompt }], "seed": 5, "max_tokens": 12,
        }),
    );
    assert_eq!(one["choices"][0]["message"], answer["choices"][0]["message"]);

    let root = ok(
        server.address(),
        "/v1/responses",
        &json!({ "input": prompt, "max_output_tokens": 8, "temperature": 0 }),
    );
    let before = metric(server.address(), "ampoule_prompt_tokens_read_total");
    let mut new = 0;
    for branch in 0..10 {
        let input = format!("Branch {branch}?");
        let answer = ok(
            server.address(),
            "/v1/responses",
            &json!({
                "input": input, "previous_response_id": root["id"], "max_output_tokens": 8, "temperature": 0,
            }),
        );
        let usage = &answer["usage"];
        let cached = usage["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
        let so_far = root["usage"]["total_tokens"].as_u64().unwrap();
        assert_eq!(cached, so_far, "the whole state, the reply included");
        new += usage["input_tokens"].as_u64().unwrap() - cached;
    }
    assert_eq!(metric(server.address(), "ampoule_prompt_tokens_read_total") - before, new);
    assert!(new < 400, "{new}");
    server.stop().unwrap();
}

#[test]
fn keys_and_cache_keys_share_nothing() {
    let keys = ["key-of-alice", "key-of-bob"];
    let digests = keys.iter().map(|k| ampoule_server::key_digest(k)).collect();
    let server = start(ampoule_server::Config { keys: digests, ..config() });
    let ask = |key: &str, cache_key: Option<&str>| {
        let body = json!({ "messages": [{ "role": "user", "content": "The same words of both." }], "max_tokens": 2, "prompt_cache_key": cache_key });
        let more = format!("authorization: Bearer {key}\r\n");
        let answer = support::request(
            server.address(),
            "POST",
            "/v1/chat/completions",
            &body.to_string(),
            &more,
        );
        assert_eq!(answer.status, 200);
        answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(ask(keys[0], None), 0);
    assert!(ask(keys[0], None) > 0);
    assert_eq!(ask(keys[1], None), 0, "another key");
    assert_eq!(ask(keys[0], Some("a")), 0, "another cache key");
    assert!(ask(keys[0], Some("a")) > 0);
    let refused = post(server.address(), "/v1/chat/completions", &json!({}));
    assert_eq!(refused.status, 401);
    let wrong = support::request(
        server.address(),
        "GET",
        "/v1/models",
        "",
        "authorization: Bearer key-of-alicE\r\n",
    );
    assert_eq!(wrong.status, 401);
    // Nobody sees another's response or session.
    let more = |key: &str| format!("authorization: Bearer {key}\r\n");
    let made = support::request(
        server.address(),
        "POST",
        "/v1/responses",
        &json!({ "input": "Hi", "max_output_tokens": 2 }).to_string(),
        &more(keys[0]),
    )
    .json();
    let path = format!("/v1/responses/{}", made["id"].as_str().unwrap());
    assert_eq!(support::request(server.address(), "GET", &path, "", &more(keys[0])).status, 200);
    assert_eq!(support::request(server.address(), "GET", &path, "", &more(keys[1])).status, 404);
    assert_eq!(get(server.address(), "/health").status, 200);
    server.stop().unwrap();
}

#[test]
fn a_budget_that_is_full_changes_no_answer() {
    let (small, large) =
        (start_with(config(), 2048, 200 << 10), start_with(config(), 2048, 1 << 30));
    for round in 0..12 {
        let messages = json!([{ "role": "user", "content": format!("Round {}. {}", round % 5, "word ".repeat(40 + round)) }]);
        let body = json!({ "messages": messages, "max_tokens": 8, "temperature": 0 });
        let (a, b) = (
            ok(small.address(), "/v1/chat/completions", &body),
            ok(large.address(), "/v1/chat/completions", &body),
        );
        assert_eq!(a["choices"], b["choices"]);
    }
    assert!(metric(small.address(), "ampoule_capsule_evictions_total") > 0);
    assert!(metric(small.address(), "ampoule_capsule_bytes{tier=\"host\"}") <= 200 << 10);
    eventually("the slots are free", || metric(small.address(), "ampoule_requests_running") == 0);
    small.stop().unwrap();
    large.stop().unwrap();
}

#[test]
fn a_reply_that_comes_back_in_a_prompt_is_not_read_and_changes_nothing() {
    let warm = start(config());
    let cold = start(ampoule_server::Config { caching: false, ..config() });
    let at = warm.address();
    let tokens =
        ok(at, "/tokenize", &json!({ "prompt": "A harbour at night, and " }))["tokens"].clone();
    let mut prompt: Vec<u64> = serde_json::from_value(tokens).unwrap();
    let complete = |address, prompt: &[u64]| {
        let body = json!({ "prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": true, "logprobs": 5 });
        ok(address, "/v1/completions", &body)
    };
    for _ in 0..4 {
        let (a, b) = (complete(at, &prompt), complete(cold.address(), &prompt));
        assert_eq!(a["choices"], b["choices"]);
        // The same tokens, for completions do not tell ids.
        let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
        ok(at, &format!("/v1/sessions/{session}/append"), &json!({ "tokens": prompt }));
        let greedy = json!({ "max_tokens": 30, "temperature": 0, "ignore_eos": true });
        let said = ok(at, &format!("/v1/sessions/{session}/generate"), &greedy)["tokens"].clone();
        prompt.extend(serde_json::from_value::<Vec<u64>>(said).unwrap());
        let before = prompt.len() as u64;
        prompt.extend([5, 6, 7]);
        let (a, b) = (complete(at, &prompt), complete(cold.address(), &prompt));
        assert_eq!(a["choices"], b["choices"], "bit for bit: the logarithms are whole");
        // The CPU's decode leaves what its prefill leaves, so the reply need not be read.
        assert_eq!(a["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64(), Some(before));
    }
    warm.stop().unwrap();
    cold.stop().unwrap();
}
