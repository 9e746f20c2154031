//! The store on object storage: in memory, and on a real S3 server behind a proxy that fails on purpose.
//!
//! The tests on a server need `AMPOULE_S3_ENDPOINT` and `AMPOULE_S3_BUCKET` (and the usual `AWS_...` variables):
//! `scripts/s3_test.sh` starts one and runs them.
#![cfg(feature = "s3")]

mod support;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use ampoule_store::object_store::ObjectStore;
use ampoule_store::object_store::memory::InMemory;
use ampoule_store::{
    CapsuleId, Expected, HeadError, MaintenanceError, OpenError, Options, RemoteOptions,
    RemoteStorage, SaveError, Store,
};
use support::{Branch, Random, scope};

fn options(grace: Duration) -> Options {
    let mut options = Options::default();
    options.threads = 4;
    options.segment_bytes = 4096;
    options.grace = Some(grace);
    options
}

fn in_memory(bucket: &Arc<InMemory>, grace: Duration) -> Store {
    let store: Arc<dyn ObjectStore> = bucket.clone();
    let remote =
        RemoteStorage::over(store, "fleet/one", "memory".into(), RemoteOptions::default()).unwrap();
    Store::open_storage(Box::new(remote), options(grace)).unwrap()
}

#[test]
fn another_machine_restores_what_one_saved() {
    let bucket = Arc::new(InMemory::new());
    let here = in_memory(&bucket, Duration::from_secs(3600));
    let there = in_memory(&bucket, Duration::from_secs(3600));
    let mut branch = Branch::new(&scope(b"t"));
    for turn in 0..5 {
        branch.turn(3, 2, turn);
        let saved = branch.save(&here).unwrap();
        let before = here.head("session").unwrap();
        let expected = before.map_or(Expected::Nothing, Expected::Capsule);
        here.set_head("session", expected, saved.id).unwrap();
        let id = there.head("session").unwrap().unwrap();
        branch.check(&there, id).unwrap();
    }
    // And goes on from there, sharing what the first one published.
    branch.turn(1, 1, 9);
    let shared = branch.save(&there).unwrap();
    assert!(shared.shared > 0);
    branch.check(&here, shared.id).unwrap();
    assert!(here.fsck().unwrap().is_clean());
}

#[test]
fn what_is_condemned_is_never_relied_on() {
    let grace = Duration::from_secs(4);
    let bucket = Arc::new(InMemory::new());
    let (here, there) = (in_memory(&bucket, grace), in_memory(&bucket, grace));
    let mut branch = Branch::new(&scope(b"t"));
    branch.turn(5, 5, 1);
    let mut child = branch.clone();
    child.turn(2, 2, 2);
    let first = branch.save(&here).unwrap();
    branch.check(&there, first.id).unwrap();
    there.remove(first.id).unwrap();
    assert!(matches!(there.gc(Some(Duration::ZERO)), Err(MaintenanceError::Grace { .. })));
    let report = there.gc(None).unwrap();
    assert_eq!(report.deleted.objects, 0);
    assert!(report.condemned.objects >= 3, "{report:?}");
    // This machine still thinks that the parent's node is there; it must not build on it.
    let second = child.save(&here).unwrap();
    child.check(&there, second.id).unwrap();
    std::thread::sleep(grace + Duration::from_millis(1100));
    let report = there.gc(None).unwrap();
    assert!(report.deleted.objects >= 3, "{report:?}");
    child.check(&here, second.id).unwrap();
    assert!(here.fsck().unwrap().is_clean());
    // Uploaded before the list was written, named after it: pardoned.
    let mut other = Branch::new(&scope(b"t"));
    other.turn(4, 0, 7);
    let third = other.save(&here).unwrap();
    std::thread::sleep(2 * grace + Duration::from_millis(1100));
    there.gc(None).unwrap();
    other.check(&here, third.id).unwrap();
    child.check(&here, second.id).unwrap();
}

#[test]
fn a_save_that_takes_too_long_is_not_acknowledged() {
    let bucket = Arc::new(InMemory::new());
    let store = in_memory(&bucket, Duration::from_secs(0));
    let mut branch = Branch::new(&scope(b"t"));
    branch.turn(5, 5, 1);
    assert!(matches!(branch.save(&store), Err(SaveError::TooSlow { .. })));
    assert!(store.catalog().unwrap().capsules.is_empty());
}

#[test]
fn writers_that_race_for_a_head_win_one_at_a_time() {
    let bucket = Arc::new(InMemory::new());
    let stores: Vec<Store> =
        (0..4).map(|_| in_memory(&bucket, Duration::from_secs(3600))).collect();
    race(&stores, 30);
}

/// All stores move one head at the same time, over and over: each time exactly one wins, and the others are told who did.
fn race(stores: &[Store], rounds: u32) {
    // Two capsules a store: one of them is somewhere else than where the head is.
    let ids: Vec<Vec<CapsuleId>> = stores
        .iter()
        .enumerate()
        .map(|(index, store)| {
            let mut branch = Branch::new(&scope(b"race"));
            let mut save = |turn| {
                branch.turn(2, 2, 2 * index as u64 + turn);
                branch.save(store).unwrap().id
            };
            vec![save(0), save(1)]
        })
        .collect();
    let name = format!("race {:?}", Instant::now());
    let mut current: Option<CapsuleId> = None;
    let barrier = Barrier::new(stores.len());
    let (mut wins, mut told) = (vec![0; stores.len()], 0);
    for round in 0..rounds {
        let expected = current.map_or(Expected::Nothing, Expected::Capsule);
        let results: Vec<Result<CapsuleId, String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = stores
                .iter()
                .zip(&ids)
                .map(|(store, ids)| {
                    let id = *ids.iter().find(|&&id| current != Some(id)).unwrap();
                    let (barrier, name) = (&barrier, &name);
                    scope.spawn(move || {
                        barrier.wait();
                        match store.set_head(name, expected, id) {
                            Ok(()) => Ok(id),
                            Err(HeadError::Conflict { found, .. }) => Err(found),
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let won: Vec<usize> = (0..results.len()).filter(|&i| results[i].is_ok()).collect();
        assert_eq!(won.len(), 1, "round {round}: {} writers won", won.len());
        current = stores[0].head(&name).unwrap();
        assert_eq!(current, results[won[0]].as_ref().ok().copied());
        for loser in results.iter().filter_map(|r| r.as_ref().err()) {
            let winner = current.unwrap().to_string();
            assert!(
                loser.contains(&winner),
                "round {round}: {winner} won, a loser was told: {loser}"
            );
            told += 1;
        }
        wins[won[0]] += 1;
    }
    println!(
        "{rounds} races of {} writers: won {wins:?}, told that they lost: {told}",
        stores.len()
    );
    assert!(
        rounds < 20 || wins.iter().filter(|&&n| n > 0).count() > 1,
        "no race took place: {wins:?}"
    );
}

// --- a real server, and a proxy before it -------------------------------------------------------------------------

struct Server {
    endpoint: String,
    bucket: String,
}

fn server() -> Option<Server> {
    let Ok(endpoint) = std::env::var("AMPOULE_S3_ENDPOINT") else {
        println!("no AMPOULE_S3_ENDPOINT: not run; see scripts/s3_test.sh");
        return None;
    };
    Some(Server { endpoint, bucket: std::env::var("AMPOULE_S3_BUCKET").unwrap() })
}

impl Server {
    fn open(&self, prefix: &str, endpoint: &str, timeout: Duration) -> Result<Store, OpenError> {
        let mut remote = RemoteOptions::default();
        remote.endpoint = Some(endpoint.to_owned());
        remote.timeout = timeout;
        remote.tries = 12;
        remote.backoff = Duration::from_millis(10);
        let storage = RemoteStorage::s3(&format!("s3://{}/{prefix}", self.bucket), remote)?;
        Store::open_storage(Box::new(storage), options(Duration::from_secs(3600)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fault {
    /// 503 before anything reaches the server.
    Refused,
    /// 500 although the server did what was asked.
    DoneButFailed,
    /// The server did it, and the connection breaks before the answer.
    AnswerLost,
    /// The answer ends half way.
    AnswerCut,
    /// Nothing comes back within the client's timeout, though the server did it.
    TooLate,
}

struct Proxy {
    endpoint: String,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    faults: Arc<Mutex<HashMap<Fault, u64>>>,
}

impl Proxy {
    /// `per_mille`: how often each fault happens.
    fn start(server: &str, per_mille: Vec<(Fault, usize)>, hang: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let upstream = server.trim_start_matches("http://").to_owned();
        let stop = Arc::new(AtomicBool::new(false));
        let faults: Arc<Mutex<HashMap<Fault, u64>>> = Arc::default();
        let requests = Arc::new(AtomicU64::new(0));
        let random = Arc::new(Mutex::new(Random(0x5eed)));
        let proxy = Self {
            endpoint,
            stop: stop.clone(),
            requests: requests.clone(),
            faults: faults.clone(),
        };
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(client) = client else { continue };
                let (upstream, per_mille) = (upstream.clone(), per_mille.clone());
                let (random, faults, requests) = (random.clone(), faults.clone(), requests.clone());
                std::thread::spawn(move || {
                    let mut draw = random.lock().unwrap().below(1000);
                    let mut fault = None;
                    for (kind, weight) in per_mille {
                        if draw < weight {
                            fault = Some(kind);
                            break;
                        }
                        draw -= weight;
                    }
                    requests.fetch_add(1, Ordering::Relaxed);
                    if let Some(kind) = fault {
                        *faults.lock().unwrap().entry(kind).or_default() += 1;
                    }
                    // A connection that breaks is what this is about.
                    let _ = relay(client, &upstream, fault, hang);
                });
            }
        });
        proxy
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.endpoint.trim_start_matches("http://"));
    }
}

/// The head and the body of one request.
fn read_request(client: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut request = Vec::new();
    let mut buffer = [0; 16384];
    let mut more = |request: &mut Vec<u8>| match client.read(&mut buffer)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        read => {
            request.extend_from_slice(&buffer[..read]);
            Ok::<(), std::io::Error>(())
        }
    };
    let head = loop {
        if let Some(end) = request.windows(4).position(|w| w == b"\r\n\r\n") {
            break end + 4;
        }
        more(&mut request)?;
    };
    let text = String::from_utf8_lossy(&request[..head]).into_owned();
    let line = text.lines().find(|l| l.to_ascii_lowercase().starts_with("content-length:"));
    let length = line.and_then(|l| l[15..].trim().parse::<usize>().ok()).unwrap_or(0);
    while request.len() < head + length {
        more(&mut request)?;
    }
    Ok((text, request.split_off(head)))
}

/// Carries one request to the server and its answer back; each connection is used once.
fn relay(
    mut client: TcpStream,
    upstream: &str,
    fault: Option<Fault>,
    hang: Duration,
) -> std::io::Result<()> {
    let (text, body) = read_request(&mut client)?;
    let error = |status: &str| {
        format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes()
    };
    if fault == Some(Fault::Refused) {
        return client.write_all(&error("503 Slow Down"));
    }
    let mut server = TcpStream::connect(upstream)?;
    for line in text.trim_end().split("\r\n") {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        if name != "connection" {
            write!(server, "{line}\r\n")?;
        }
    }
    write!(server, "Connection: close\r\n\r\n")?;
    server.write_all(&body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    match fault {
        None | Some(Fault::Refused) => {
            // One request a connection: the client must know.
            let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(0);
            let lower = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
            if !lower.contains("connection: close") {
                let status = answer.iter().position(|b| *b == b'\n').unwrap_or(0) + 1;
                answer.splice(status..status, *b"Connection: close\r\n");
            }
            client.write_all(&answer)
        }
        Some(Fault::DoneButFailed) => client.write_all(&error("500 Internal Server Error")),
        Some(Fault::AnswerLost) => Ok(()),
        Some(Fault::AnswerCut) => client.write_all(&answer[..answer.len() * 2 / 3]),
        Some(Fault::TooLate) => {
            std::thread::sleep(hang);
            Ok(())
        }
    }
}

/// A server that keeps objects and ignores one of the two conditions; signatures it does not look at.
fn lying_server(ignored: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut objects: HashMap<String, (u64, Vec<u8>)> = HashMap::new();
        let mut writes = 0;
        for client in listener.incoming() {
            let Ok(mut client) = client else { continue };
            let Ok((head, body)) = read_request(&mut client) else { continue };
            let mut words = head.split_whitespace();
            let (method, path) = (words.next().unwrap(), words.next().unwrap().to_owned());
            let condition = |name: &str| {
                let line = head.lines().find(|l| l.to_ascii_lowercase().starts_with(name));
                line.filter(|_| name != ignored).map(|l| l[name.len() + 1..].trim().to_owned())
            };
            let etag = |n: u64| format!("\"{n}\"");
            let found = objects.get(&path).cloned();
            let fits = condition("if-none-match").is_none_or(|_| found.is_none())
                && condition("if-match")
                    .is_none_or(|wanted| found.as_ref().is_some_and(|(n, _)| etag(*n) == wanted));
            let xml = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
            let (status, tag, answer) = match (method, found) {
                ("GET", _) if path.contains('?') => ("200 OK", 0, xml.as_bytes().to_vec()),
                ("PUT", _) if !fits => ("412 Precondition Failed", 0, Vec::new()),
                ("PUT", _) => {
                    writes += 1;
                    objects.insert(path, (writes, body));
                    ("200 OK", writes, Vec::new())
                }
                ("DELETE", _) => {
                    objects.remove(&path);
                    ("204 No Content", 0, Vec::new())
                }
                (_, Some((n, bytes))) => ("200 OK", n, bytes),
                (_, None) => ("404 Not Found", 0, Vec::new()),
            };
            let length = answer.len();
            let _ = write!(
                client,
                "HTTP/1.1 {status}\r\nETag: {}\r\nLast-Modified: Sun, 22 Nov 2026 00:00:00 GMT\r\n\
                 Content-Length: {length}\r\nConnection: close\r\n\r\n",
                etag(tag)
            );
            if method != "HEAD" {
                let _ = client.write_all(&answer);
            }
        }
    });
    endpoint
}

#[test]
fn a_server_that_ignores_conditions_is_refused() {
    for ignored in ["if-none-match", "if-match", "nothing"] {
        let mut remote = RemoteOptions::default();
        remote.endpoint = Some(lying_server(ignored));
        remote.tries = 2;
        // Credentials that nobody checks; the environment's, where there are some.
        let storage = RemoteStorage::s3_with_credentials("s3://bucket/x", remote, "id", "secret");
        let opened = Store::open_storage(Box::new(storage.unwrap()), Options::default());
        let text = match opened {
            Ok(_) => "opened".to_owned(),
            Err(error) => {
                assert!(matches!(error, OpenError::NoConditionalWrites { .. }), "{error}");
                error.to_string().to_ascii_lowercase()
            }
        };
        assert!(
            text.contains(&format!("{ignored}:")) || (ignored == "nothing" && text == "opened"),
            "{text}"
        );
    }
}

#[test]
fn saves_and_loads_survive_faults() {
    let Some(server) = server() else { return };
    let total: usize =
        std::env::var("AMPOULE_S3_SAVES").ok().and_then(|n| n.parse().ok()).unwrap_or(120);
    let writers = 8;
    let timeout = Duration::from_millis(1500);
    let per_mille = vec![
        (Fault::Refused, 60),
        (Fault::DoneButFailed, 30),
        (Fault::AnswerLost, 30),
        (Fault::AnswerCut, 20),
        (Fault::TooLate, 4),
    ];
    let proxy = Proxy::start(&server.endpoint, per_mille, timeout * 2);
    let prefix = format!("faults-{}", std::process::id());
    let begun = Instant::now();
    let acknowledged: Mutex<Vec<(CapsuleId, Branch)>> = Mutex::default();
    std::thread::scope(|threads| {
        for writer in 0..writers {
            let (server, proxy, prefix, acknowledged) = (&server, &proxy, &prefix, &acknowledged);
            threads.spawn(move || {
                let store = server.open(prefix, &proxy.endpoint, timeout).unwrap();
                let name = format!("session {writer}");
                let mut branch = Branch::new(&scope(b"t"));
                let mut at = None;
                for turn in 0..total.div_ceil(writers) as u64 {
                    if branch.boundaries.len() == 10 {
                        branch = Branch::new(&scope(b"t"));
                    }
                    branch.turn(2, 2, turn * 100 + writer as u64);
                    let saved = branch.save(&store).unwrap();
                    let expected = at.map_or(Expected::Nothing, Expected::Capsule);
                    store.set_head(&name, expected, saved.id).unwrap();
                    at = Some(saved.id);
                    branch.check(&store, saved.id).unwrap();
                    acknowledged.lock().unwrap().push((saved.id, branch.clone()));
                }
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let acknowledged = acknowledged.into_inner().unwrap();
    // Another machine, without faults: all of it is there.
    let store = server.open(&prefix, &server.endpoint, Duration::from_secs(20)).unwrap();
    let mut lost = 0;
    for (id, branch) in &acknowledged {
        lost += usize::from(branch.check(&store, *id).is_err());
    }
    let fsck = store.fsck().unwrap();
    let faults = proxy.faults.lock().unwrap();
    let mut counts: Vec<String> = faults.iter().map(|(k, n)| format!("\"{k:?}\": {n}")).collect();
    counts.sort();
    println!(
        "{{\"saves_and_loads\": {}, \"writers\": {writers}, \"requests\": {}, \"faults\": {{{}}}, \"lost\": {lost}, \
         \"fsck_problems\": {}, \"seconds\": {seconds:.1}}}",
        acknowledged.len(),
        proxy.requests.load(Ordering::Relaxed),
        counts.join(", "),
        fsck.problems.len(),
    );
    assert_eq!(lost, 0);
    assert_eq!(fsck.problems, []);
    assert_eq!(store.heads().unwrap().0.len(), writers);
    assert!(faults.len() == 5, "not every kind of fault happened: {faults:?}");
}

#[test]
fn writers_race_on_a_server_with_faults() {
    let Some(server) = server() else { return };
    let timeout = Duration::from_secs(2);
    let prefix = format!("race-{}", std::process::id());
    let direct: Vec<Store> =
        (0..2).map(|_| server.open(&prefix, &server.endpoint, timeout).unwrap()).collect();
    race(&direct, 25);
    // Refusals do not change who wins; lost answers are found out by reading back.
    let faults = vec![(Fault::Refused, 100), (Fault::DoneButFailed, 50), (Fault::AnswerLost, 50)];
    let proxy = Proxy::start(&server.endpoint, faults, timeout);
    let faulty: Vec<Store> =
        (0..3).map(|_| server.open(&prefix, &proxy.endpoint, timeout).unwrap()).collect();
    race(&faulty, 25);
}
