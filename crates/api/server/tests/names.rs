//! Names of capsules: what they point to, where they come from, and what survives a restart.

mod support;

use std::time::Duration;

use ampoule::store::Expected;
use ampoule::{Ampoule, CapsuleStore, Device, LoadOptions, StoreOptions};
use ampoule_server::{Config, Server};
use serde_json::{Value, json};
use support::{TINY, config, get, metric, ok, post, request, start, start_with};

fn stored(place: &std::path::Path) -> Config {
    Config {
        store: Some((place.to_str().unwrap().to_owned(), StoreOptions::default())),
        ..config()
    }
}

fn session(server: &Server, text: &str) -> String {
    let id = ok(server.address(), "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    ok(server.address(), &format!("/v1/sessions/{id}/append"), &json!({ "text": text }));
    id
}

fn snapshot(server: &Server, session: &str, body: &Value) -> Value {
    ok(server.address(), &format!("/v1/sessions/{session}/snapshot"), body)
}

/// What a session that begins with a capsule says.
fn says(server: &Server, capsule: &str) -> Value {
    let at = server.address();
    let id = ok(at, "/v1/sessions", &json!({ "capsule": capsule }))["id"].clone();
    let ask = json!({ "max_tokens": 12, "temperature": 0, "ignore_eos": true });
    let path = format!("/v1/sessions/{}/generate", id.as_str().unwrap());
    ok(at, &path, &ask)["tokens"].clone()
}

fn listed(server: &Server) -> Vec<(Option<String>, bool, bool)> {
    let list = get(server.address(), "/v1/capsules").json();
    let list = list["data"].as_array().unwrap();
    let mut list: Vec<_> = list
        .iter()
        .map(|c| (c["name"].as_str().map(str::to_owned), c["stored"] == true, c["shared"] == true))
        .collect();
    list.sort();
    list
}

#[test]
fn a_name_or_a_pin_survives_a_restart_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let id = session(&server, "Words to come back to.");
    let disk = metric(server.address(), "ampoule_capsule_bytes{tier=\"disk\"}");
    let named = snapshot(&server, &id, &json!({ "name": "harbour" }));
    assert_eq!(
        (&named["stored"], &named["pinned"], &named["replaced"]),
        (&json!(true), &json!(false), &Value::Null)
    );
    let pinned = snapshot(&server, &id, &json!({ "pin": true }));
    let neither = snapshot(&server, &id, &json!({}));
    assert_eq!((&pinned["stored"], &neither["stored"]), (&json!(true), &json!(false)));
    // What sessions and capsules write is counted at once.
    assert!(disk > 10_000, "{disk}");
    let unpinned = snapshot(&server, &id, &json!({ "name": "mast", "pin": true }));
    let unpin = format!("/v1/capsules/{}/pin", unpinned["id"].as_str().unwrap());
    let unpinned = request(server.address(), "DELETE", &unpin, "", "").json();
    assert_eq!((&unpinned["stored"], &unpinned["pinned"]), (&json!(true), &json!(false)));
    let said = says(&server, "harbour");
    server.stop().unwrap();

    let server = start(stored(&place));
    assert_eq!(
        listed(&server),
        [
            (None, true, false),
            (Some("harbour".into()), true, false),
            (Some("mast".into()), true, false)
        ]
    );
    let back =
        get(server.address(), &format!("/v1/capsules/{}", named["id"].as_str().unwrap())).json();
    assert_eq!((&back["pinned"], &back["lineage"]), (&json!(false), &named["lineage"]));
    assert_eq!(says(&server, "harbour"), said);
    let gone = get(server.address(), &format!("/v1/capsules/{}", neither["id"].as_str().unwrap()));
    assert_eq!(gone.status, 404);
    // A pin without a name that is taken away leaves nothing in the store.
    let unpin = format!("/v1/capsules/{}/pin", pinned["id"].as_str().unwrap());
    assert_eq!(request(server.address(), "DELETE", &unpin, "", "").json()["stored"], false);
    server.stop().unwrap();
    let server = start(stored(&place));
    assert_eq!(listed(&server).len(), 2);
    server.stop().unwrap();
}

#[test]
fn a_name_moves_and_the_older_capsule_keeps_its_id() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let at = server.address();
    let id = session(&server, "First words.");
    let first = snapshot(&server, &id, &json!({ "name": "latest", "pin": true }));
    ok(at, &format!("/v1/sessions/{id}/append"), &json!({ "text": " And more." }));
    let second = snapshot(&server, &id, &json!({ "name": "latest" }));
    ok(at, &format!("/v1/sessions/{id}/append"), &json!({ "text": " And more again." }));
    let third = snapshot(&server, &id, &json!({ "name": "latest" }));
    assert_eq!((&second["replaced"], &third["replaced"]), (&first["id"], &second["id"]));
    let read = |which: &Value| get(at, &format!("/v1/capsules/{}", which.as_str().unwrap()));
    assert_eq!(read(&json!("latest")).json()["id"], third["id"]);
    for (older, stored) in [(&first, true), (&second, false)] {
        let older = read(&older["id"]).json();
        assert_eq!((&older["name"], older["stored"] == true), (&Value::Null, stored));
    }
    server.stop().unwrap();
    // A pin keeps the older one in the store; what has neither pin nor name went with the process.
    let server = start(stored(&place));
    assert_eq!(listed(&server), [(None, true, false), (Some("latest".into()), true, false)]);
    let latest = get(server.address(), "/v1/capsules/latest").json();
    assert_eq!(latest["position"], third["position"]);
    server.stop().unwrap();
}

/// Saves capsules as the command line does.
fn save(place: &std::path::Path, model: &str, text: &str, name: &str) {
    let options =
        LoadOptions { device: Device::Cpu, threads: 1, context: 64, ..LoadOptions::default() };
    let model = Ampoule::load(model, &options, &mut |_, _| {}).unwrap();
    let mut model = model.with_stand_in_tokenizer().unwrap();
    let tokens = model
        .tokenizer()
        .unwrap()
        .encode(text, ampoule::EncodeOptions { add_special: true, parse_special: true });
    let slot = model.slot_with(&tokens.unwrap()).unwrap();
    let capsule = model.engine.snapshot(slot).unwrap();
    let store = CapsuleStore::open(place.to_str().unwrap(), StoreOptions::default()).unwrap();
    store.save(&model, &capsule, Some((name, Expected::Nothing)), None).unwrap();
}

#[test]
fn names_that_the_command_line_gave_can_be_used_over_http() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    save(&place, TINY, "Told by the command line.", "told");
    save(&place, support::NANO, "Of another model.", "other");
    let server = start(stored(&place));
    let at = server.address();
    assert_eq!(listed(&server), [(Some("told".into()), true, true)]);
    let told = get(at, "/v1/capsules/told").json();
    let tree = get(at, "/v1/capsules/tree").json();
    assert_eq!((&tree["data"][0]["id"], &tree["data"][0]["below"]), (&told["id"], &Value::Null));
    let own = session(&server, "Told by the command line.");
    let own = snapshot(&server, &own, &json!({ "name": "own" }));
    assert_eq!(own["position"], told["position"]);
    // The same tokens, the same state, by name and by id; nothing is read for it.
    let read = metric(at, "ampoule_prompt_tokens_read_total");
    assert_eq!(says(&server, "told"), says(&server, "own"));
    assert_eq!(says(&server, told["id"].as_str().unwrap()), says(&server, "own"));
    assert_eq!(metric(at, "ampoule_prompt_tokens_read_total"), read);
    let empty = ok(at, "/v1/sessions", &json!({}))["id"].as_str().unwrap().to_owned();
    let back = ok(at, &format!("/v1/sessions/{empty}/restore"), &json!({ "capsule": "told" }));
    assert_eq!(back["position"], told["position"]);
    assert_eq!(get(at, "/v1/capsules/told/export").status, 200);
    assert_eq!(listed(&server).len(), 2, "loaded, it is still one");
    // It is changed where it was made.
    for path in ["/v1/capsules/told", "/v1/capsules/told/pin"] {
        let refused = request(at, "DELETE", path, "", "");
        assert_eq!(refused.status, 409);
        assert!(refused.json()["error"]["message"].as_str().unwrap().contains("capsule rm"));
    }
    assert_eq!(ok(at, "/v1/capsules/told/pin", &json!({}))["id"], told["id"]);
    let other = post(at, "/v1/sessions", &json!({ "capsule": "other" }));
    let said = other.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(other.status == 404 && said.contains("nano"), "{said}");
    let missing = get(at, "/v1/capsules/nobody").json()["error"]["message"].to_string();
    assert!(missing.contains("GET /v1/capsules") && missing.contains("import"), "{missing}");
    server.stop().unwrap();

    // With keys a name of the store is open to all of them where the operator says so.
    let keys =
        vec![ampoule_server::key_digest("key-of-alice"), ampoule_server::key_digest("key-of-bob")];
    let ask = |server: &Server, key: &str, path: &str| {
        request(server.address(), "GET", path, "", &format!("authorization: Bearer {key}\r\n"))
    };
    let server = start(Config { keys: keys.clone(), ..stored(&place) });
    let closed = ask(&server, "key-of-alice", "/v1/capsules/told");
    assert_eq!(closed.status, 404);
    assert!(closed.json()["error"]["message"].as_str().unwrap().contains("--warm"));
    assert_eq!(
        ask(&server, "key-of-alice", "/v1/capsules").json()["data"],
        json!([]),
        "own too was made without a key"
    );
    server.stop().unwrap();
    let server = start(Config { keys, warm: vec!["told".to_owned()], ..stored(&place) });
    for key in ["key-of-alice", "key-of-bob"] {
        assert_eq!(ask(&server, key, "/v1/capsules/told").json()["id"], told["id"], "{key}");
    }
    server.stop().unwrap();
}

#[test]
fn an_imported_capsule_takes_its_name_from_the_query_and_unknown_parameters_are_refused() {
    let server = start(config());
    let at = server.address();
    let id = session(&server, "A file.");
    let made = snapshot(&server, &id, &json!({}));
    let file = get(at, &format!("/v1/capsules/{}/export", made["id"].as_str().unwrap())).body;
    let import = |query: &str| {
        let path = format!("/v1/capsules/import{query}");
        let mut bytes = support::head("POST", &path, file.len(), "").into_bytes();
        bytes.extend_from_slice(&file);
        support::raw(at, &bytes)
    };
    let named = import("?name=two%20words+more&pin=true");
    assert_eq!(named.status, 201);
    assert_eq!(
        (&named.json()["name"], &named.json()["pinned"]),
        (&json!("two words more"), &json!(true))
    );
    assert_eq!(get(at, "/v1/capsules/two%20words%20more").json()["id"], named.json()["id"]);
    let again = import("?name=two%20words%20more").json();
    assert_eq!(again["replaced"], named.json()["id"]);
    for (query, param) in
        [("?nam=x", "nam"), ("?name=a&name=b", "name"), ("?pin=perhaps", "pin"), ("?name=", "name")]
    {
        let refused = import(query);
        assert_eq!(
            (refused.status, &refused.json()["error"]["param"]),
            (400, &json!(param)),
            "{query}"
        );
    }
    server.stop().unwrap();
}

#[test]
fn a_client_that_hangs_up_without_a_stream_leaves_its_message_saved() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let at = server.address();
    let id = session(&server, "Before.");
    let path = format!("/v1/sessions/{id}");
    let ask = json!({ "messages": [{ "role": "user", "content": "Go on." }], "max_tokens": 2000, "ignore_eos": true }).to_string();
    let mut stream = support::open(at);
    let head = support::head("POST", &format!("{path}/generate"), ask.len(), "");
    std::io::Write::write_all(&mut stream, format!("{head}{ask}").as_bytes()).unwrap();
    support::eventually("it replies", || metric(at, "ampoule_generation_tokens_total") > 3);
    drop(stream);
    support::eventually("it is free", || get(at, &path).json()["busy"] == false);
    let left = get(at, &path).json();
    assert_eq!((&left["messages"], &left["reply_tokens"]), (&json!(1), &json!(0)), "{left}");
    let position = left["position"].clone();
    server.stop().unwrap();
    // The store has it as memory had it.
    let server = start(stored(&place));
    let left = get(server.address(), &path).json();
    assert_eq!((&left["messages"], &left["position"]), (&json!(1), &position));
    server.stop().unwrap();
}

/// Every capsule's id, name and pin, of those that the store has.
fn kept(server: &Server) -> Vec<(String, Value, Value)> {
    let list = get(server.address(), "/v1/capsules").json();
    let list = list["data"].as_array().unwrap().iter().filter(|c| c["stored"] == true);
    let mut list: Vec<_> = list
        .map(|c| (c["id"].as_str().unwrap().to_owned(), c["name"].clone(), c["pinned"].clone()))
        .collect();
    list.sort_by(|a, b| a.0.cmp(&b.0));
    list
}

#[test]
fn what_clients_change_at_once_is_in_the_store_as_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let at = server.address();
    let id = session(&server, "Words that many keep at once.");
    let freeze = format!("/v1/sessions/{id}/snapshot");
    std::thread::scope(|scope| {
        for client in 0..4 {
            let freeze = &freeze;
            scope.spawn(move || {
                for round in 0..12 {
                    let made = post(at, freeze, &json!({ "name": "agent" })).json();
                    let pin = format!("/v1/capsules/{}/pin", made["id"].as_str().unwrap());
                    // Meanwhile another client takes the name, or this one's other hand takes the pin or the capsule away.
                    scope.spawn({
                        let pin = pin.clone();
                        move || {
                            let path = pin.trim_end_matches("/pin");
                            match (client + round) % 3 {
                                0 => request(at, "DELETE", path, "", "").status,
                                1 => request(at, "DELETE", &pin, "", "").status,
                                _ => 200,
                            }
                        }
                    });
                    let status = post(at, &pin, &json!({})).status;
                    assert!(status == 200 || status == 404, "{status}");
                }
            });
        }
        // Clients that do not wait for the answer.
        scope.spawn(|| {
            for round in 0..24 {
                let ask = json!({ "name": "agent" }).to_string();
                let head = support::head("POST", &freeze, ask.len(), "");
                let mut stream = support::open(at);
                std::io::Write::write_all(&mut stream, format!("{head}{ask}").as_bytes()).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(250 * round));
            }
        });
    });
    // What those asked for who left may still be under way.
    let mut memory = kept(&server);
    support::eventually("nothing changes any more", || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        let before = std::mem::replace(&mut memory, kept(&server));
        before == memory
    });
    let agents = memory.iter().filter(|c| c.1 == "agent").count();
    assert!(agents <= 1 && memory.len() > 10, "{agents} of {}", memory.len());
    server.stop().unwrap();
    let server = start(stored(&place));
    assert_eq!(kept(&server), memory);
    server.stop().unwrap();
}

#[test]
fn a_store_that_is_full_says_so_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store").to_str().unwrap().to_owned();
    let mut options = StoreOptions::default();
    options.quota = Some(1 << 20);
    let small = || Config { store: Some((place.clone(), options.clone())), ..config() };
    let server = start(small());
    let at = server.address();
    let id = session(&server, "Some words.");
    let path = format!("/v1/sessions/{id}");
    let position = |server: &Server| get(server.address(), &path).json()["position"].clone();
    let (mut names, mut saved) = (0, position(&server));
    let full = loop {
        let grown =
            post(at, &format!("/v1/sessions/{id}/append"), &json!({ "text": " And more words." }));
        let path = format!("/v1/sessions/{id}/snapshot");
        let made = post(at, &path, &json!({ "name": format!("name {names}") }));
        if grown.status == 200 {
            saved = grown.json()["position"].clone();
        }
        if made.status != 201 {
            break made;
        }
        assert!(grown.status == 200 && names < 1000);
        names += 1;
    };
    assert_eq!((full.status, &full.json()["error"]["code"]), (507, &json!("store_full")));
    assert!(full.json()["error"]["message"].as_str().unwrap().contains("--store-quota-mib"));
    // The words are in the session, and its client is told so; the store has it as it was.
    let before = position(&server).as_u64().unwrap();
    let more = post(at, &format!("{path}/append"), &json!({ "text": " And more words." }));
    assert_eq!((more.status, &more.json()["error"]["code"]), (507, &json!("session_not_saved")));
    assert!(position(&server).as_u64().unwrap() > before);
    let capsules = |server: &Server| {
        let list = get(server.address(), "/v1/capsules").json()["data"].clone();
        let list = list.as_array().unwrap().iter();
        let mut list: Vec<_> =
            list.map(|c| (c["name"].to_string(), c["position"].as_u64())).collect();
        list.sort();
        list
    };
    let here = capsules(&server);
    assert!(names > 0 && here.len() == names);
    server.stop().unwrap();
    let server = start(small());
    assert_eq!((capsules(&server), position(&server)), (here, saved));
    // What is deleted makes room at once.
    for n in 0..names / 2 {
        delete(&server, &format!("/v1/capsules/name%20{n}"));
    }
    let at = server.address();
    ok(at, &format!("{path}/append"), &json!({ "text": " And more words." }));
    assert_eq!(post(at, &format!("{path}/snapshot"), &json!({ "name": "again" })).status, 201);
    let (here, grown) = (capsules(&server), position(&server));
    assert_eq!(here.len(), names - names / 2 + 1);
    server.stop().unwrap();
    let server = start(small());
    assert_eq!((capsules(&server), position(&server)), (here, grown));
    server.stop().unwrap();
}

#[test]
fn what_nobody_can_reach_is_said_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    assert!(server.notes().is_empty());
    session(&server, "Made without a key.");
    server.stop().unwrap();
    let key = ampoule_server::key_digest("key-of-alice");
    let server = start(Config { keys: vec![key], ..stored(&place) });
    assert!(server.notes()[0].ends_with("(sessions: 1)"), "{:?}", server.notes());
    server.stop().unwrap();
    let server = start(stored(&place));
    assert!(server.notes().is_empty());
    server.stop().unwrap();
}

fn delete(server: &Server, path: &str) -> Value {
    let answer = request(server.address(), "DELETE", path, "", "");
    assert_eq!(answer.status, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
    answer.json()
}

#[test]
fn named_capsules_beyond_memory_lie_in_the_store_and_say_what_they_said() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let budget = 400 << 10;
    let begin = || start_with(stored(&place), 2048, budget);
    let server = begin();
    let (mut bytes, mut known) = (0, Vec::new());
    for n in 0..24 {
        let id = session(&server, &format!("Story {n} of the {} harbour.", n * n));
        // Every third has a pin and no name.
        let how =
            if n % 3 == 0 { json!({ "pin": true }) } else { json!({ "name": format!("n{n}") }) };
        let made = snapshot(&server, &id, &how);
        let of = &made["bytes"];
        bytes += of["fixed"].as_u64().unwrap() + of["rows"].as_u64().unwrap();
        let id = made["id"].as_str().unwrap().to_owned();
        known.push((says(&server, &id), made));
    }
    assert!(bytes as usize > 2 * budget, "{bytes} bytes would fit: nothing is tried");
    let all_say_the_same = |server: &Server| {
        for (said, made) in known.iter().rev() {
            let path = format!("/v1/capsules/{}", made["id"].as_str().unwrap());
            let mut back = get(server.address(), &path).json();
            back["replaced"] = Value::Null;
            assert_eq!(&back, made, "the store's figures are those of memory");
            let which = made["name"].as_str().or(made["id"].as_str()).unwrap();
            assert_eq!(&says(server, which), said, "{made}");
        }
        assert_eq!(listed(server).len(), known.len());
    };
    all_say_the_same(&server);
    server.stop().unwrap();
    let server = begin();
    all_say_the_same(&server);
    // One leaves the store, by its pin or by its name that moves: it is still there, in memory.
    let (said, pinned) = &known[0];
    let id = pinned["id"].as_str().unwrap();
    assert_eq!(delete(&server, &format!("/v1/capsules/{id}/pin"))["stored"], false);
    assert_eq!(&says(&server, id), said);
    let (said, named) = &known[1];
    let other = session(&server, "Another story.");
    let moved = snapshot(&server, &other, &json!({ "name": "n1" }));
    assert_eq!(moved["replaced"], named["id"]);
    let old =
        get(server.address(), &format!("/v1/capsules/{}", named["id"].as_str().unwrap())).json();
    assert_eq!((&old["name"], &old["stored"]), (&Value::Null, &json!(false)));
    assert_eq!(&says(&server, named["id"].as_str().unwrap()), said);
    // A pin on one that only the store has costs no state.
    let (said, named) = &known[2];
    let pin = format!("/v1/capsules/{}/pin", named["id"].as_str().unwrap());
    let both = ok(server.address(), &pin, &json!({}));
    assert_eq!((&both["pinned"], &both["stored"]), (&json!(true), &json!(true)));
    assert_eq!(&says(&server, "n2"), said);
    server.stop().unwrap();
    let server = begin();
    assert_eq!(listed(&server).len(), known.len() - 1, "a pin and a name went, a name came");
    assert_eq!(says(&server, "n2"), *said);
    server.stop().unwrap();
}

#[test]
fn a_start_loads_no_capsule_and_another_model_takes_no_name_away() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let id = session(&server, "Of the tiny model.");
    let tiny = snapshot(&server, &id, &json!({ "name": "latest" }));
    let tiny_too = snapshot(&server, &id, &json!({ "pin": true }));
    let said = says(&server, "latest");
    delete(&server, &format!("/v1/sessions/{id}"));
    let mut left = Vec::new();
    let sessions = get(server.address(), "/v1/sessions").json();
    for session in sessions["data"].as_array().unwrap() {
        left.push(format!("/v1/sessions/{}", session["id"].as_str().unwrap()));
    }
    for path in left {
        delete(&server, &path);
    }
    server.stop().unwrap();

    let server = support::nano(stored(&place));
    let at = server.address();
    assert_eq!(listed(&server), []);
    let refused = get(at, &format!("/v1/capsules/{}", tiny["id"].as_str().unwrap()));
    let why = refused.json()["error"]["message"].to_string();
    assert!(refused.status == 404 && why.contains("tiny") && why.contains("serve what"), "{why}");
    assert!(server.notes().iter().any(|n| n.contains("another model")), "{:?}", server.notes());
    let id = session(&server, "Of the other model.");
    let nano = snapshot(&server, &id, &json!({ "name": "latest" }));
    assert_eq!(nano["replaced"], Value::Null);
    assert_eq!(get(at, "/v1/capsules/latest").json()["id"], nano["id"]);
    server.stop().unwrap();

    // Whoever made it can delete it, whatever model is served.
    let server = support::nano(stored(&place));
    let (at, other) = (server.address(), tiny_too["id"].as_str().unwrap());
    assert_eq!(get(at, &format!("/v1/capsules/{other}")).status, 404);
    delete(&server, &format!("/v1/capsules/{other}"));
    let sessions = get(at, "/v1/sessions").json()["data"].clone();
    let sessions = sessions.as_array().unwrap();
    assert_eq!((sessions.len(), &sessions[0]["id"]), (1, &json!(id)), "listed, and not loaded");
    assert_eq!(metric(at, "ampoule_sessions"), 0);
    server.stop().unwrap();

    let server = start(stored(&place));
    assert_eq!(listed(&server).len(), 1);
    assert_eq!(get(server.address(), "/v1/capsules/latest").json()["id"], tiny["id"]);
    let held = || {
        metric(server.address(), "ampoule_capsule_bytes{tier=\"host\"}")
            + metric(server.address(), "ampoule_capsule_bytes{tier=\"device\"}")
    };
    assert_eq!(held(), 0, "nobody asked for it");
    assert_eq!(says(&server, "latest"), said);
    assert!(held() > 0);
    server.stop().unwrap();
}

#[test]
fn a_capsule_that_is_damaged_in_the_store_is_said_to_be_when_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let (one, two) = (session(&server, "One story."), session(&server, "A second, longer story."));
    let one = snapshot(&server, &one, &json!({ "name": "one" }));
    snapshot(&server, &two, &json!({ "name": "two" }));
    let said = says(&server, "two");
    server.stop().unwrap();
    let store = CapsuleStore::open(place.to_str().unwrap(), StoreOptions::default()).unwrap();
    let heads = store.store().heads().unwrap().0;
    let one = format!("server capsule {}", one["id"].as_str().unwrap());
    let one = heads.iter().find(|head| head.name == one).unwrap().capsule;
    let segment = store.store().capsule(one).unwrap().segments()[0];
    drop(store);
    let file = files(&place).into_iter().find(|path| {
        path.file_name().unwrap().to_string_lossy().starts_with(&segment.id.to_string())
    });
    let file = file.unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();

    let server = start(stored(&place));
    let at = server.address();
    assert_eq!(listed(&server).len(), 2);
    for answer in
        [post(at, "/v1/sessions", &json!({ "capsule": "one" })), get(at, "/v1/capsules/one/export")]
    {
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["code"]), (500, &json!("capsule_unreadable")), "{error}");
        assert!(error["message"].as_str().unwrap().contains("capsule fsck"), "{error}");
    }
    assert_eq!(says(&server, "two"), said);
    // Its name can be given to another, and it can be deleted.
    let again = session(&server, "One story, told again.");
    assert_eq!(snapshot(&server, &again, &json!({ "name": "one" }))["stored"], true);
    delete(&server, "/v1/capsules/one");
    // The damaged one has no name any more; it goes with this process, as others do that lost theirs.
    let two = (Some("two".into()), true, false);
    assert_eq!(listed(&server), [(None, false, false), two.clone()]);
    server.stop().unwrap();
    let server = start(stored(&place));
    assert_eq!(listed(&server), [two]);
    server.stop().unwrap();
}

#[test]
fn a_session_whose_record_is_damaged_is_said_to_be_and_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let (one, two) = (session(&server, "One story."), session(&server, "A second story."));
    let named = snapshot(&server, &two, &json!({ "name": "two" }));
    server.stop().unwrap();
    let store = CapsuleStore::open(place.to_str().unwrap(), StoreOptions::default()).unwrap();
    let (kept, before) = (files(&place).len(), store.store().memos().unwrap().0.len());
    drop(store);
    let capsule = named["id"].as_str().unwrap();
    for file in files(&place.join("memos")) {
        let mut bytes = std::fs::read(&file).unwrap();
        let of = |id: &str| {
            let name = [&b"session "[..], b"capsule "].map(|kind| [kind, id.as_bytes()].concat());
            name.iter().any(|name| bytes.windows(name.len()).any(|words| words == name))
        };
        if of(&one) || of(capsule) {
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&file, bytes).unwrap();
        }
    }

    let server = start(stored(&place));
    let at = server.address();
    let notes = server.notes().join("\n");
    assert!(notes.contains("damaged in the store: 2") && notes.contains("capsule fsck"), "{notes}");
    let path = format!("/v1/sessions/{one}");
    let append = json!({ "text": " It went on." });
    let answers = [
        get(at, &path),
        post(at, &format!("{path}/append"), &append),
        request(at, "DELETE", &path, "", ""),
    ];
    for answer in answers {
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["code"]), (500, &json!("capsule_unreadable")), "{error}");
        assert!(error["message"].as_str().unwrap().contains("capsule fsck"), "{error}");
    }
    assert_eq!(get(at, "/v1/sessions/ses_0").status, 404);
    // A name is in its record alone.
    let answer = get(at, "/v1/capsules/two");
    let error = answer.json()["error"].clone();
    assert_eq!(answer.status, 404, "{error}");
    assert!(
        error["message"].as_str().unwrap().contains("2 records of the store are damaged"),
        "{error}"
    );
    assert_eq!(get(at, &format!("/v1/sessions/{two}")).status, 200);
    server.stop().unwrap();
    assert_eq!(files(&place).len(), kept);
    let store = CapsuleStore::open(place.to_str().unwrap(), StoreOptions::default()).unwrap();
    let (memos, damaged) = store.store().memos().unwrap();
    assert_eq!((memos.len(), damaged.len()), (before - 2, 2));
}

#[test]
fn others_are_answered_while_a_state_is_read_from_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let server = start(stored(&place));
    let id = session(&server, "A story.");
    snapshot(&server, &id, &json!({ "name": "story" }));
    let said = says(&server, "story");
    server.stop().unwrap();
    let slow = Config { slow_store: Duration::from_millis(1500), ..stored(&place) };
    let server = start(slow);
    let at = server.address();
    std::thread::scope(|scope| {
        let fetched = scope.spawn(|| says(&server, "story"));
        let appended = scope.spawn(|| {
            let body = json!({ "text": " It went on." });
            ok(at, &format!("/v1/sessions/{id}/append"), &body)
        });
        let ask = json!({
            "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 8, "ignore_eos": true,
        });
        for _ in 0..3 {
            ok(at, "/v1/chat/completions", &ask);
        }
        assert!(!fetched.is_finished() && !appended.is_finished(), "the store was not slow");
        assert_eq!(fetched.join().unwrap(), said);
        appended.join().unwrap();
    });
    server.stop().unwrap();
}

/// Two sessions fit into memory and six are called at once: each call brings one back from the store and sends another there.
/// No turn is lost to a state that was read before it, clients that hang up leave nothing behind, and what is deleted stays so.
#[test]
fn sessions_that_come_and_go_lose_no_turn() {
    const CALLERS: usize = 3;
    const TURNS: usize = 6;
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let slow_store = Duration::from_millis(10);
    let few = || Config { sessions: 2, slow_store, ..stored(&place) };
    let server = start(few());
    let at = server.address();
    let ids: Vec<String> = (0..6).map(|i| session(&server, &format!("Story {i}."))).collect();
    let position = |id: &str| {
        let said = get(at, &format!("/v1/sessions/{id}")).json();
        said["position"].as_u64().unwrap_or_else(|| panic!("{said}"))
    };
    let before: Vec<u64> = ids.iter().map(|id| position(id)).collect();
    let append = |id: &str| {
        let body = json!({ "text": " It went on." });
        post(at, &format!("/v1/sessions/{id}/append"), &body).status
    };
    assert_eq!(append(&ids[0]), 200);
    let each = position(&ids[0]) - before[0];
    let (told, hung, gone) = (&ids[..4], &ids[4], &ids[5]);
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let append = &append;
            scope.spawn(move || {
                for turn in 0..TURNS * told.len() {
                    let id = &told[(turn + caller) % told.len()];
                    // Busy, or all that are in memory are: again.
                    while !matches!(append(id), 200) {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..40 {
                let body = json!({ "text": " Nobody waits." }).to_string();
                let head =
                    support::head("POST", &format!("/v1/sessions/{hung}/append"), body.len(), "");
                let mut stream = support::open(at);
                let _ = std::io::Write::write_all(&mut stream, format!("{head}{body}").as_bytes());
            }
        });
        scope.spawn(|| {
            append(gone);
            let path = format!("/v1/sessions/{gone}");
            support::eventually("it is deleted", || {
                request(at, "DELETE", &path, "", "").status == 200
            });
            for _ in 0..20 {
                assert_eq!(append(gone), 404);
            }
        });
    });
    let turns = (CALLERS * TURNS) as u64;
    for (i, id) in told.iter().enumerate() {
        let first = if i == 0 { each } else { 0 };
        assert_eq!(position(id), before[i] + first + turns * each, "session {i}");
    }
    assert!(metric(at, "ampoule_sessions_fetched_total") > 4);
    // Whatever those that hung up did, the session can be called.
    support::eventually("it can be called", || append(hung) == 200);
    assert_eq!(get(at, &format!("/v1/sessions/{gone}")).status, 404);
    server.stop().unwrap();

    let server = start(few());
    let at = server.address();
    for (i, id) in told.iter().enumerate() {
        let said = get(at, &format!("/v1/sessions/{id}")).json();
        let first = if i == 0 { each } else { 0 };
        assert_eq!(said["position"], json!(before[i] + first + turns * each), "session {i}");
    }
    server.stop().unwrap();
}

/// All files below a folder.
fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}
