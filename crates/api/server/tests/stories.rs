//! What users of other runtimes complain about, told the other way round, on a trained model with recurrent layers. Every
//! answer is compared with a server that reads each prompt whole: tokens, words, and logarithms to the last bit.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use ampoule_server::Config;
use serde_json::{Value, json};
use support::{config, eventually, get, metric, nano, ok, post};

/// One server with capsules and one without.
struct Pair {
    warm: ampoule_server::Server,
    cold: ampoule_server::Server,
}

/// What an answer cost.
struct Cost {
    prompt: u64,
    cached: u64,
    read: u64,
    text: String,
}

fn cost(answer: &Value) -> Cost {
    let usage = &answer["usage"];
    Cost {
        prompt: usage["prompt_tokens"].as_u64().unwrap(),
        cached: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
        read: answer["timings"]["prompt_tokens_read"].as_u64().unwrap(),
        text: answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned(),
    }
}

fn body(messages: &[Value], tools: &Value, max_tokens: u32) -> Value {
    json!({
        "messages": messages, "max_tokens": max_tokens, "temperature": 0, "logprobs": true, "top_logprobs": 3,
        "tools": tools,
    })
}

impl Pair {
    fn new() -> Self {
        Self { warm: nano(config()), cold: nano(Config { caching: false, ..config() }) }
    }

    /// Asks both, expects the same, and tells what it cost the one with capsules.
    fn ask(&self, messages: &[Value]) -> Cost {
        self.ask_with(messages, &json!([]), 16)
    }

    fn ask_with(&self, messages: &[Value], tools: &Value, max_tokens: u32) -> Cost {
        let body = body(messages, tools, max_tokens);
        let warm = ok(self.warm.address(), "/v1/chat/completions", &body);
        let cold = ok(self.cold.address(), "/v1/chat/completions", &body);
        same(&warm, &cold);
        assert_eq!(cost(&cold).cached, 0);
        cost(&warm)
    }

    fn stop(self) {
        self.warm.stop().unwrap();
        self.cold.stop().unwrap();
    }
}

/// Tokens, words, calls and logarithms. Ids of calls are drawn anew each time.
fn same(warm: &Value, cold: &Value) {
    let said = |answer: &Value| {
        let choice = &answer["choices"][0];
        let mut message = choice["message"].clone();
        for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
            call["id"] = Value::Null;
        }
        json!([message, choice["logprobs"], choice["finish_reason"]])
    };
    assert!(!warm["choices"][0]["logprobs"]["content"].as_array().unwrap().is_empty());
    assert_eq!(said(warm), said(cold));
}

fn user(text: &str) -> Value {
    json!({ "role": "user", "content": text })
}

fn assistant(text: &str) -> Value {
    json!({ "role": "assistant", "content": text })
}

const SYSTEM: &str = "You help the harbour master of a small town. Answer in a few plain words. The harbour has two piers, \
     a crane that lifts four tons, and a light that must burn from dusk to dawn.";

#[test]
fn append_only_requests_are_not_read_again() {
    let pair = Pair::new();
    let mut messages =
        vec![json!({ "role": "system", "content": SYSTEM }), user("Which pier is longer?")];
    let mut before = pair.ask(&messages);
    for turn in 0..4 {
        messages.push(assistant(&before.text));
        messages
            .push(user(&format!("And what of ship {turn}, which came in at noon with timber?")));
        let now = pair.ask(&messages);
        // All of the prompt before, and of the reply what is tokenized as it was drawn.
        assert!(now.cached >= before.prompt, "turn {turn}: {} of {}", now.cached, before.prompt);
        assert!(now.read < 64, "turn {turn}: {} read", now.read);
        before = now;
    }
    pair.stop();
}

#[test]
fn a_thought_that_the_client_strips_costs_what_follows_it() {
    let pair = Pair::new();
    let mut messages = vec![
        json!({ "role": "system", "content": SYSTEM }),
        user("Is the crane strong enough for six tons?"),
    ];
    let mut before = pair.ask_with(&messages, &json!([]), 40);
    for turn in 0..3 {
        // The first words of the reply were its thoughts.
        let rest: Vec<&str> = before.text.split_whitespace().skip(5).collect();
        messages.push(assistant(&rest.join(" ")));
        messages.push(user(&format!("Are you sure? Say it again, for the log, page {turn}.")));
        let now = pair.ask_with(&messages, &json!([]), 40);
        // Only the opening of the reply is left of the prompt before.
        assert!(
            now.cached + 12 >= before.prompt,
            "turn {turn}: {} of {}",
            now.cached,
            before.prompt
        );
        before = now;
    }
    pair.stop();
}

#[test]
fn short_prompts_and_first_second_sightings_hit() {
    let pair = Pair::new();
    let first = pair.ask(&[user("Hi")]);
    assert_eq!(first.cached, 0);
    let again = pair.ask(&[user("Hi")]);
    assert_eq!(
        (again.cached, again.read),
        (again.prompt, 0),
        "a prompt of {} tokens",
        again.prompt
    );
    // The second prompt that begins so is the first that can gain by it, and does.
    let system = json!({ "role": "system", "content": SYSTEM });
    let first = pair.ask(&[system.clone(), user("Who owns the crane?")]);
    let second = pair.ask(&[system.clone(), user("When does the light go out in June?")]);
    let shared = ok(pair.cold.address(), "/tokenize", &json!({ "messages": [system] }))["count"]
        .as_u64()
        .unwrap();
    // The rendering of the system message alone ends with the opening of a reply.
    assert!(second.cached + 8 >= shared, "{} of {shared} shared", second.cached);
    assert!(first.cached < 8 && second.read < second.prompt - second.cached + 1);
    pair.stop();
}

#[test]
fn after_a_restart_a_conversation_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    for key in [None, Some(ampoule::store::StoreKey::new(&[9; 32]))] {
        let place = folder.path().join(if key.is_some() { "sealed" } else { "plain" });
        let mut options = ampoule::StoreOptions::default();
        options.key = key;
        let stored = || Config {
            store: Some((place.to_str().unwrap().to_owned(), options.clone())),
            ..config()
        };
        let pair = Pair { warm: nano(stored()), cold: nano(Config { caching: false, ..config() }) };
        let mut messages = vec![
            json!({ "role": "system", "content": SYSTEM }),
            user("What is for the log today?"),
        ];
        let before = pair.ask(&messages);
        messages.push(assistant(&before.text));
        messages.push(user("And for tomorrow?"));
        let Pair { warm, cold } = pair;
        warm.stop().unwrap();
        let pair = Pair { warm: nano(stored()), cold };
        let now = pair.ask(&messages);
        assert!(now.cached >= before.prompt, "{} of {}", now.cached, before.prompt);
        pair.stop();
        // Where there is a key nothing that was said can be read in the store.
        let mut seen = false;
        for file in std::fs::read_dir(place.join("memos")).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            seen |= bytes.windows(5).any(|w| w == b"space");
        }
        assert_eq!(seen, options.key.is_none());
    }
}

fn tools() -> Value {
    json!([
        { "type": "function", "function": { "name": "look_up", "description": "Looks a ship up in the harbour's book.",
            "parameters": { "type": "object", "properties": { "ship": { "type": "string" } }, "required": ["ship"] } } },
        { "type": "function", "function": { "name": "write_log", "description": "Writes a line to the log.",
            "parameters": { "type": "object", "properties": { "line": { "type": "string" } }, "required": ["line"] } } },
    ])
}

#[test]
fn twenty_turns_with_tools_and_a_changing_date_read_what_is_new() {
    let pair = Pair::new();
    let tools = tools();
    let mut history = vec![json!({ "role": "system", "content": SYSTEM })];
    let (mut read, mut new, mut all) = (0, 0, 0);
    let mut seen: Vec<Vec<u64>> = Vec::new();
    let ships = ["Astrid", "Borealis", "Cormorant", "Dolphin", "Elsinore"];
    for turn in 0..20 {
        let ship = ships[turn % ships.len()];
        if turn % 3 == 2 {
            let id = format!("call_{turn}");
            history.push(json!({ "role": "assistant", "content": "", "tool_calls": [{ "id": id, "type": "function",
                "function": { "name": "look_up", "arguments": format!("{{\"ship\": \"{ship}\"}}") } }] }));
            history.push(json!({ "role": "tool", "tool_call_id": id, "content": format!("The {ship}: {} tons of timber, pier {}.", 10 + turn, 1 + turn % 2) }));
        }
        history.push(user(&format!(
            "Turn {turn}. The {ship} asks for a berth. What do we tell her captain?"
        )));
        let mut messages = history.clone();
        messages.push(json!({ "role": "system", "content": format!("It is {:02}:{:02} on day {turn}.", 8 + turn / 2, turn * 3) }));
        let now = pair.ask_with(&messages, &tools, 16);
        (read, all) = (read + now.read, all + now.prompt);
        // New is what no earlier prompt had in this place. The tools stand before everything and are new once.
        let tokens = ok(pair.cold.address(), "/tokenize", &json!({ "messages": messages }));
        let tokens: Vec<u64> = serde_json::from_value(tokens["tokens"].clone()).unwrap();
        let common =
            |other: &Vec<u64>| other.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        new += tokens.len() as u64 - seen.iter().map(common).max().unwrap_or(0) as u64;
        if turn == 0 {
            new += now.prompt - tokens.len() as u64;
        }
        seen.push(tokens);
        history.push(assistant(&now.text));
    }
    println!(
        "20 turns: {all} tokens of prompts, {new} new, {read} read: {:.3} x",
        read as f64 / new as f64
    );
    assert!(read as f64 <= 1.1 * new as f64, "{read} tokens were read, {new} were new");
    assert!(all > 5 * new, "the conversation is sent whole each time");
    // A line in the middle: what follows it, and an eighth of that, is read again.
    let middle = history.len() / 2;
    let whole = pair.ask_with(&history, &tools, 8);
    let at = (middle..history.len()).find(|&i| history[i]["role"] == "user").unwrap();
    let tail =
        ok(pair.cold.address(), "/tokenize", &json!({ "messages": &history[at..] }))["count"]
            .as_u64()
            .unwrap();
    history[at] = user("Strike that. Another ship asks: the Fulmar, with salt.");
    let now = pair.ask_with(&history, &tools, 8);
    println!(
        "a line in the middle: {} tokens, {tail} follow the change, {} read",
        whole.prompt, now.read
    );
    assert!(now.read <= tail + tail / 8 + 8, "{} read, {tail} follow the change", now.read);
    assert!(now.read >= tail / 2, "{} read, {tail} follow the change", now.read);
    pair.stop();
}

#[test]
fn ten_choices_and_ten_continuations_read_their_prefix_once() {
    let server = nano(config());
    let at = server.address();
    let read = || metric(at, "ampoule_prompt_tokens_read_total");
    let messages = json!([{ "role": "system", "content": SYSTEM }, user("Tell me of the night of the storm.")]);
    let before = read();
    let ten = ok(
        at,
        "/v1/chat/completions",
        &json!({ "messages": messages, "n": 10, "seed": 3, "max_tokens": 12 }),
    );
    assert_eq!(read() - before, ten["usage"]["prompt_tokens"].as_u64().unwrap());
    let texts: std::collections::HashSet<&str> = ten["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["message"]["content"].as_str().unwrap())
        .collect();
    assert!(texts.len() >= 5, "{texts:?}");
    let root = ok(
        at,
        "/v1/responses",
        &json!({ "input": format!("{SYSTEM} Who keeps the light?"), "max_output_tokens": 12, "temperature": 0 }),
    );
    let held = root["usage"]["total_tokens"].as_u64().unwrap();
    let (before, mut new) = (read(), 0);
    for branch in 0..10 {
        let answer = ok(
            at,
            "/v1/responses",
            &json!({
                "input": format!("Branch {branch}: and then?"), "previous_response_id": root["id"], "max_output_tokens": 6, "temperature": 0,
            }),
        );
        let usage = &answer["usage"];
        assert_eq!(usage["input_tokens_details"]["cached_tokens"], held);
        new += usage["input_tokens"].as_u64().unwrap() - held;
    }
    assert_eq!(read() - before, new);
    println!("10 branches: a prefix of {held} tokens, {new} read in all");
    server.stop().unwrap();
}

fn new_session(at: SocketAddr) -> String {
    ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned()
}

fn code(answer: &support::Answer) -> (u16, String) {
    (answer.status, answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn sessions_and_capsules_have_limits_and_idle_sessions_go() {
    let server = nano(Config {
        sessions: 3,
        capsules: 2,
        session_idle: Duration::from_millis(900),
        ..config()
    });
    let at = server.address();
    let ids: Vec<String> = (0..3).map(|_| new_session(at)).collect();
    assert_eq!(code(&post(at, "/v1/sessions", &json!({}))), (429, "too_many_sessions".to_owned()));
    let path = format!("/v1/sessions/{}", ids[0]);
    ok(at, &format!("{path}/append"), &json!({ "text": "Some words." }));
    for _ in 0..2 {
        ok(at, &format!("{path}/snapshot"), &json!({}));
    }
    assert_eq!(
        code(&post(at, &format!("{path}/snapshot"), &json!({}))),
        (429, "too_many_capsules".to_owned())
    );
    assert_eq!(metric(at, "ampoule_capsules_named"), 2);
    // The one that is used stays.
    eventually("idle sessions go", || {
        assert_eq!(get(at, &path).status, 200);
        metric(at, "ampoule_sessions_expired_total") == 2
    });
    assert_eq!(metric(at, "ampoule_sessions"), 1);
    assert_eq!(
        code(&get(at, &format!("/v1/sessions/{}", ids[1]))),
        (404, "session_expired".to_owned())
    );
    assert_eq!(code(&get(at, "/v1/sessions/sess_never")), (404, "not_found".to_owned()));
    server.stop().unwrap();
}

#[test]
fn with_a_store_idle_sessions_are_parked_and_come_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        Some((folder.path().to_str().unwrap().to_owned(), ampoule::StoreOptions::default()));
    let server =
        nano(Config { store, sessions: 2, session_idle: Duration::from_millis(900), ..config() });
    let at = server.address();
    let greedy = json!({ "max_tokens": 10, "temperature": 0, "ignore_eos": true });
    let mut known = Vec::new();
    // More than may be in memory: those used least recently make room.
    for n in 0..4 {
        let id = new_session(at);
        let path = format!("/v1/sessions/{id}");
        ok(
            at,
            &format!("{path}/append"),
            &json!({ "text": format!("Session {n} of the harbour. ") }),
        );
        ok(at, &format!("{path}/generate"), &greedy);
        let capsule = ok(at, &format!("{path}/snapshot"), &json!({}))["id"].clone();
        known.push((path, capsule));
    }
    assert!(
        metric(at, "ampoule_sessions") <= 2 && metric(at, "ampoule_sessions_parked_total") >= 2
    );
    eventually("all are parked", || metric(at, "ampoule_sessions") == 0);
    // They are still the caller's sessions.
    let list = get(at, "/v1/sessions").json()["data"].clone();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 4);
    for (path, _) in &known {
        let id = path.trim_start_matches("/v1/sessions/");
        let one = list.iter().find(|session| session["id"] == id).unwrap();
        assert_eq!((&one["reply_tokens"], &one["busy"]), (&json!(10), &json!(false)), "{one}");
        assert!(one["position"].as_u64() > Some(10), "{one}");
    }
    let gone = known.pop().unwrap().0;
    assert_eq!(support::request(at, "DELETE", &gone, "", "").status, 200);
    assert_eq!(get(at, &gone).status, 404);
    assert_eq!(get(at, "/v1/sessions").json()["data"].as_array().unwrap().len(), 3);
    assert_eq!(metric(at, "ampoule_sessions"), 0, "neither a list nor a deletion fetches any");
    for (path, capsule) in &known {
        // What a session says that never left memory.
        let twin = ok(at, "/v1/sessions", &json!({ "capsule": capsule }))["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let expected = ok(at, &format!("/v1/sessions/{twin}/generate"), &greedy);
        let back = get(at, path).json();
        assert_eq!(back["reply_tokens"], 10, "{back}");
        let said = ok(at, &format!("{path}/generate"), &greedy);
        assert_eq!(
            (&said["tokens"], &said["position"]),
            (&expected["tokens"], &expected["position"])
        );
        // The last reply is known, so that it can be cut to what was heard.
        let cut = ok(at, &format!("{path}/truncate"), &json!({ "heard_tokens": 4 }));
        assert_eq!(cut["position"].as_u64().unwrap(), said["position"].as_u64().unwrap() - 6);
        assert_eq!(post(at, &format!("/v1/sessions/{twin}"), &json!({})).status, 405);
    }
    assert_eq!(metric(at, "ampoule_sessions_expired_total"), 0);
    assert!(metric(at, "ampoule_sessions_fetched_total") >= 3);
    server.stop().unwrap();
}
