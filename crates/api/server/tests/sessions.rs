//! Going back in sessions: into replies, to messages, to what a client got before it went away.

mod support;

use std::io::{Read, Write};
use std::net::SocketAddr;

use ampoule_server::Config;
use serde_json::{Value, json};
use support::{config, eventually, get, head, metric, ok, open, post, start, start_with};

const REPLAYED: &str = "ampoule_rollback_tokens_read_total";

struct Talk {
    at: SocketAddr,
    id: String,
}

impl Talk {
    fn new(at: SocketAddr) -> Self {
        Self { at, id: ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned() }
    }

    fn path(&self, verb: &str) -> String {
        format!("/v1/sessions/{}/{verb}", self.id)
    }

    fn call(&self, verb: &str, body: &Value) -> Value {
        ok(self.at, &self.path(verb), body)
    }

    fn state(&self) -> Value {
        get(self.at, &format!("/v1/sessions/{}", self.id)).json()
    }

    fn position(&self) -> u64 {
        self.state()["position"].as_u64().unwrap()
    }

    /// A sampled reply: random stream, penalties and filters travel too.
    fn say(&self, tokens: u64) -> Vec<u64> {
        let body = json!({
            "max_tokens": tokens, "ignore_eos": true, "temperature": 0.9, "top_k": 60, "seed": 11, "presence_penalty": 0.4,
        });
        serde_json::from_value(self.call("generate", &body)["tokens"].clone()).unwrap()
    }

    /// Its lineage, and every byte of its state, the logits included, tensor by tensor.
    fn bytes(&self) -> Vec<(String, Vec<u8>)> {
        let capsule = self.call("snapshot", &json!({}));
        let path = format!("/v1/capsules/{}/export", capsule["id"].as_str().unwrap());
        let file = get(self.at, &path);
        assert_eq!(file.status, 200);
        let (length, rest) = file.body.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let (header, data) = rest.split_at(length);
        let header: Value = serde_json::from_slice(header).unwrap();
        let tensors =
            header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
        let mut all: Vec<(String, Vec<u8>)> = tensors
            .map(|(name, tensor)| {
                let at = |n: usize| tensor["data_offsets"][n].as_u64().unwrap() as usize;
                (name.clone(), data[at(0)..at(1)].to_vec())
            })
            .collect();
        assert!(all.iter().any(|(name, _)| name == "sampler.logits"));
        all.push((capsule["lineage"].as_str().unwrap().to_owned(), Vec::new()));
        all
    }
}

/// That two states are one, or which tensors differ.
fn same(a: &Talk, b: &Talk, what: &str) {
    let (a, b) = (a.bytes(), b.bytes());
    assert_eq!(a.len(), b.len(), "{what}");
    let differ: Vec<_> =
        a.iter().zip(&b).filter(|(a, b)| a != b).map(|(a, b)| (&a.0, &b.0)).collect();
    assert!(differ.is_empty(), "{what}: {differ:?}");
}

#[test]
fn a_cut_reads_no_more_than_lies_between_two_places_and_leaves_the_state_of_a_shorter_reply() {
    let server = start(config());
    let at = server.address();
    let text = json!({ "text": "The harbour lay still, and the old lighthouse" });
    // Three hundred tokens, cut at many places, from the whole reply each time and then further down.
    let talk = Talk::new(at);
    talk.call("append", &text);
    let start = talk.position();
    let whole = talk.say(300);
    assert_eq!(whole.len(), 300);
    let fork = talk.call("fork", &json!({}))["data"][0]["id"].as_str().unwrap().to_owned();
    let fork = Talk { at, id: fork };
    let mut all = 0;
    for kept in [299, 290, 255, 131, 40, 8, 5] {
        let before = metric(at, REPLAYED);
        let cut = talk.call("truncate", &json!({ "heard_tokens": kept }));
        let read = metric(at, REPLAYED) - before;
        assert_eq!(cut["tokens_replayed"].as_u64(), Some(read));
        assert!(read <= 31, "{read} tokens were read again for a cut at {kept}");
        all += read;
        assert_eq!(talk.position(), start + kept);
        let twin = Talk::new(at);
        twin.call("append", &text);
        assert_eq!(twin.say(kept), whole[..kept as usize]);
        same(&talk, &twin, &format!("the state is that of a reply of {kept} tokens"));
    }
    assert!(all > 0, "cuts between places read something");
    // A cut at its very end leaves the places within a reply.
    let uncut = Talk::new(at);
    uncut.call("append", &text);
    uncut.say(300);
    assert_eq!(uncut.call("truncate", &json!({ "heard_tokens": 300 }))["tokens_replayed"], 0);
    let cut = uncut.call("truncate", &json!({ "heard_tokens": 200 }));
    assert!(cut["tokens_replayed"].as_u64().unwrap() <= 31, "{cut}");
    // What follows: the same, bit for bit.
    let twin = Talk::new(at);
    twin.call("append", &text);
    twin.say(5);
    assert_eq!(talk.say(30), twin.say(30));
    same(&talk, &twin, "afterwards");
    // A fork has the places too, although its origin went on; so has a rollback to a token.
    let back = fork.call("rollback", &json!({ "tokens": start + 290 }));
    assert!(back["tokens_replayed"].as_u64().unwrap() <= 31, "{back}");
    let back = fork.call("rollback", &json!({ "tokens": start + 100 }));
    assert!(back["tokens_replayed"].as_u64().unwrap() <= 31, "{back}");
    let twin = Talk::new(at);
    twin.call("append", &text);
    twin.say(100);
    same(&fork, &twin, "afterwards");
    server.stop().unwrap();
}

#[test]
fn places_within_replies_go_before_anything_else_and_change_no_answer() {
    // Room for a few boundaries only.
    let server = start_with(config(), 2048, 400 << 10);
    let at = server.address();
    let talk = Talk::new(at);
    talk.call("append", &json!({ "text": "A small budget." }));
    let whole = talk.say(200);
    for round in 0..6 {
        let messages = json!([{ "role": "user", "content": format!("Round {round}. {}", "word ".repeat(40)) }]);
        ok(at, "/v1/chat/completions", &json!({ "messages": messages, "max_tokens": 8 }));
    }
    let cut = talk.call("truncate", &json!({ "heard_tokens": 150 }));
    assert_eq!(cut["reply_tokens"], 150);
    let twin = Talk::new(at);
    twin.call("append", &json!({ "text": "A small budget." }));
    assert_eq!(twin.say(150), whole[..150]);
    same(&talk, &twin, &format!("{cut}"));
    assert_eq!(talk.say(10), twin.say(10));
    server.stop().unwrap();
}

#[test]
fn others_go_on_while_a_session_is_brought_back() {
    let server = start(config());
    let at = server.address();
    let talk = Talk::new(at);
    talk.call("append", &json!({ "text": "A long story." }));
    let start = talk.position();
    talk.say(900);
    // The next reply takes the places of this one away: a token of it is far from any boundary.
    talk.say(1);
    let before = metric(at, REPLAYED);
    let (id, target) = (talk.id.clone(), start + 890);
    let back = std::thread::spawn(move || {
        ok(at, &format!("/v1/sessions/{id}/rollback"), &json!({ "tokens": target }))
    });
    eventually("it is being read again", || metric(at, REPLAYED) > before);
    let short = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 8, "ignore_eos": true });
    let answer = ok(at, "/v1/chat/completions", &short);
    let read = metric(at, REPLAYED) - before;
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    assert!(read < 890, "the reply came while the session was being brought back ({read} of 890)");
    assert_eq!(post(at, &talk.path("generate"), &json!({})).status, 409, "it is busy");
    let back = back.join().unwrap();
    assert_eq!(back["tokens_replayed"], 890);
    assert_eq!(back["position"].as_u64(), Some(target));
    server.stop().unwrap();
}

#[test]
fn a_cut_by_text_keeps_the_tokens_that_lie_within_it() {
    let server = start(config());
    let at = server.address();
    let talk = Talk::new(at);
    talk.call("append", &json!({ "text": "Bytes of many kinds" }));
    let tokens = talk.say(120);
    let decode = |count: usize| {
        let body = json!({ "tokens": tokens[..count] });
        ok(at, "/detokenize", &body)["prompt"].as_str().unwrap().to_owned()
    };
    let whole = decode(120);
    for cut in [whole.len(), whole.len() * 2 / 3, whole.len() / 5, 0] {
        let cut = (0..=cut).rev().find(|at| whole.is_char_boundary(*at)).unwrap();
        let kept = (0..=120).rev().find(|n| decode(*n).len() <= cut).unwrap();
        let fork = talk.call("fork", &json!({}))["data"][0]["id"].as_str().unwrap().to_owned();
        let body = json!({ "heard_text": whole[..cut] });
        let state = ok(at, &format!("/v1/sessions/{fork}/truncate"), &body);
        assert_eq!(state["heard_tokens"], kept, "{cut} bytes of {}", whole.len());
    }
    server.stop().unwrap();
}

fn message(role: &str, text: &str) -> Value {
    json!({ "role": role, "content": text })
}

#[test]
fn every_message_can_be_gone_back_to() {
    let server = start(config());
    let at = server.address();
    let greedy = |talk: &Talk, messages: &[Value]| {
        let mut body = json!({ "max_tokens": 12, "temperature": 0, "ignore_eos": true, "seed": 3 });
        if !messages.is_empty() {
            body["messages"] = json!(messages);
        }
        let answer = talk.call("generate", &body);
        serde_json::from_value::<Vec<u64>>(answer["tokens"].clone()).unwrap()
    };
    let (system, first, second) = (
        message("system", "You are terse."),
        message("user", "Name a river."),
        message("user", "And a lake?"),
    );
    let talk = Talk::new(at);
    // Two messages in one call, their reply; one message, its reply.
    let one = greedy(&talk, &[system.clone(), first.clone()]);
    let after_two = talk.position() - 12;
    let two = greedy(&talk, std::slice::from_ref(&second));
    let end = talk.position();
    assert_eq!(talk.state()["messages"], 5);
    let refused = post(at, &talk.path("rollback"), &json!({ "message": 6 }));
    assert_eq!(refused.status, 400);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("at most 5"));
    let fork = || {
        let fork = talk.call("fork", &json!({}))["data"][0]["id"].as_str().unwrap().to_owned();
        Talk { at, id: fork }
    };
    let back = |to: usize| {
        let fork = fork();
        let state = fork.call("rollback", &json!({ "message": to }));
        assert_eq!(state["messages"].as_u64(), Some(to as u64), "{state}");
        assert_eq!(
            state["boundaries"].as_array().unwrap().last().map(|b| b["messages"].clone()),
            (to > 0).then(|| json!(to))
        );
        fork
    };
    // 5: where it is, nothing is lost. 4: the reply is asked for again, and is the same.
    assert_eq!((back(5).position(), back(5).state()["reply_tokens"].clone()), (end, json!(12)));
    let four = back(4);
    assert_eq!(four.position(), end - 12);
    assert_eq!(greedy(&four, &[]), two);
    same(&four, &fork(), "afterwards");
    // 3: after the first reply; the second question leads to the same answer.
    let three = back(3);
    assert_eq!(three.position(), after_two + 12);
    assert_eq!(greedy(&three, std::slice::from_ref(&second)), two);
    same(&three, &fork(), "afterwards");
    let again = back(2);
    assert_eq!((again.position(), greedy(&again, &[])), (after_two, one.clone()));
    // 1: inside the first call. What follows is what a session says that was only told so much.
    let other = message("user", "Name a mountain.");
    let inside = back(1);
    assert!(inside.position() > 0 && inside.position() < after_two);
    let straight = Talk::new(at);
    assert_eq!(
        greedy(&inside, std::slice::from_ref(&other)),
        greedy(&straight, &[system.clone(), other])
    );
    assert_eq!(inside.position(), straight.position());
    // What the first message alone leads to, without saying it again.
    let asked = Talk::new(at);
    let both = [first.clone(), second.clone()];
    greedy(&asked, &both);
    let state = asked.call("rollback", &json!({ "message": 1 }));
    assert_eq!(state["messages"], 1);
    let alone = Talk::new(at);
    assert_eq!(greedy(&asked, &[]), greedy(&alone, std::slice::from_ref(&first)));
    assert_eq!(asked.position(), alone.position());
    // 0: nothing was said yet.
    let empty = back(0);
    assert_eq!(empty.position(), 0);
    assert_eq!(greedy(&empty, &[system, first]), one);
    assert_eq!(back(0).call("rollback", &json!({ "message": 0 }))["position"], 0, "and again");
    // A token within a message keeps those before it.
    let token = fork().call("rollback", &json!({ "tokens": after_two + 5 }));
    assert_eq!(token["messages"], 2);
    // A session that began with a capsule goes back to that.
    let capsule = three.call("snapshot", &json!({}))["id"].clone();
    let from = ok(at, "/v1/sessions", &json!({ "capsule": capsule }));
    let from = Talk { at, id: from["id"].as_str().unwrap().to_owned() };
    let begin = from.position();
    greedy(&from, &[message("user", "More?")]);
    assert_eq!(from.call("rollback", &json!({ "message": 0 }))["position"].as_u64(), Some(begin));
    server.stop().unwrap();
}

#[test]
fn messages_can_be_gone_back_to_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store").to_str().unwrap().to_owned();
    let with_store =
        || Config { store: Some((place.clone(), ampoule::StoreOptions::default())), ..config() };
    let server = start(with_store());
    let talk = Talk::new(server.address());
    let ask = |talk: &Talk, text: &str| {
        let body = json!({ "messages": [message("user", text)], "max_tokens": 6, "temperature": 0, "ignore_eos": true });
        talk.call("generate", &body);
        talk.position()
    };
    let ends = [ask(&talk, "One"), ask(&talk, "Two"), ask(&talk, "Three")];
    server.stop().unwrap();
    let server = start(with_store());
    let talk = Talk { at: server.address(), id: talk.id };
    for (messages, position) in [(6, ends[2]), (4, ends[1]), (3, ends[1] - 6), (2, ends[0]), (0, 0)]
    {
        let state = talk.call("rollback", &json!({ "message": messages }));
        assert_eq!(state["position"].as_u64(), Some(position), "{messages}: {state}");
    }
    assert_eq!(ask(&talk, "One"), ends[0]);
    server.stop().unwrap();
}

#[test]
fn a_session_is_free_when_an_error_is_told() {
    // With a store: a call that failed is over when the session is saved, which takes a while.
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store").to_str().unwrap().to_owned();
    let config = Config { store: Some((place, ampoule::StoreOptions::default())), ..config() };
    let server = start_with(config, 256, 1 << 30);
    let at = server.address();
    let session = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let path = |call: &str| format!("/v1/sessions/{session}/{call}");
    ok(at, &path("append"), &json!({ "text": "the harbour" }));
    let long = "the old house ".repeat(300);
    for call in ["append", "generate"].repeat(10) {
        assert_eq!(post(at, &path(call), &json!({ "text": long })).status, 400);
        let next = post(at, &path("append"), &json!({ "text": "x" }));
        assert_eq!(next.status, 200, "after {call}: {next:?}");
    }
    server.stop().unwrap();
}

#[test]
fn an_interrupted_session_is_free_for_a_cut_at_once() {
    let server = start(config());
    let at = server.address();
    let talk = Talk::new(at);
    talk.call("append", &json!({ "text": "The harbour lay still, and the old lighthouse" }));
    let start = talk.position();
    for _ in 0..8 {
        let path = talk.path("generate");
        let reply = std::thread::spawn(move || {
            post(at, &path, &json!({ "max_tokens": 2000, "ignore_eos": true, "seed": 5 })).json()
        });
        while !talk.state()["busy"].as_bool().unwrap() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(talk.call("interrupt", &json!({}))["interrupted"], true);
        let cut = talk.call("truncate", &json!({ "heard_tokens": 4 }));
        assert_eq!(cut["position"].as_u64(), Some(start + 4));
        assert_eq!(reply.join().unwrap()["finish_reason"], "cancelled");
        talk.call("rollback", &json!({ "tokens": start }));
    }
    server.stop().unwrap();
}

#[test]
fn a_client_that_goes_away_frees_its_session_at_once_and_exactly() {
    let server = start(config());
    let at = server.address();
    for round in 0..3 {
        let talk = Talk::new(at);
        let text = json!({ "text": format!("Once upon a time, {round}") });
        let start_at = talk.call("append", &text)["position"].as_u64().unwrap();
        let body = json!({ "max_tokens": 3000, "ignore_eos": true, "temperature": 0.9, "top_k": 60, "seed": 11,
            "presence_penalty": 0.4, "stream": true })
        .to_string();
        let before = (metric(at, REPLAYED), metric(at, "ampoule_generation_tokens_total"));
        let mut stream = open(at);
        let request = format!("{}{body}", head("POST", &talk.path("generate"), body.len(), ""));
        stream.write_all(request.as_bytes()).unwrap();
        let mut got = vec![0; 20_000];
        stream.read_exact(&mut got).unwrap();
        drop(stream);
        eventually("the session is free", || talk.state()["busy"] == false);
        let kept = talk.state()["reply_tokens"].as_u64().unwrap();
        let read = metric(at, REPLAYED) - before.0;
        let said = metric(at, "ampoule_generation_tokens_total") - before.1;
        let received = String::from_utf8_lossy(&got).matches("event: delta").count() as u64;
        assert!(kept >= received && kept < 3000, "{kept} kept, {received} received");
        assert_eq!(talk.position(), start_at + kept);
        assert!(read <= 31.max(said / 8), "{read} tokens were read again of {said}");
        let twin = Talk::new(at);
        twin.call("append", &text);
        twin.say(kept);
        same(&talk, &twin, &format!("it stands where a reply of {kept} tokens ends"));
    }
    // Whoever leaves while a prompt is being read leaves the session as it was.
    let talk = Talk::new(at);
    let body =
        json!({ "messages": [message("user", &"word ".repeat(700))], "stream": true }).to_string();
    let mut stream = open(at);
    let request = format!("{}{body}", head("POST", &talk.path("generate"), body.len(), ""));
    stream.write_all(request.as_bytes()).unwrap();
    eventually("it is being read", || metric(at, "ampoule_requests_running") > 0);
    drop(stream);
    eventually("the session is free", || talk.state()["busy"] == false);
    let state = talk.state();
    assert_eq!((&state["position"], &state["messages"]), (&json!(0), &json!(0)), "{state}");
    server.stop().unwrap();
}
