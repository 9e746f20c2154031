"""What goes over the wire, byte by byte: curl, sockets, streams, faults."""

import json
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import Server, running

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}


def curl(*arguments, data=None):
    """Body and status of a request by curl."""
    command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code} %{content_type}", *arguments]
    if data is not None:
        command += ["-H", "content-type: application/json", "--data-binary", "@-"]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    body, _, last = done.stdout.rpartition(b"\n")
    status, _, kind = last.decode().partition(" ")
    return int(status), kind, body


def post(server, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def dial(server):
    return socket.create_connection((server.host, server.port), 30)


def send(server, data, wait=30.0):
    """All that comes back for some bytes, until the server closes or says nothing for so long."""
    with dial(server) as stream:
        stream.settimeout(wait)
        out = b""
        try:
            stream.sendall(data)
            while piece := stream.recv(65536):
                out += piece
        except (TimeoutError, ConnectionError):
            pass
        return out


def status(answer):
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def works(server):
    code, _, body = post(server, "/v1/chat/completions", HELLO)
    assert code == 200 and json.loads(body)["usage"]["completion_tokens"] == 8
    assert server.alive()


# curl.


def test_curl(server, tmp_path):
    chat = f"{server.url}/v1/chat/completions"
    code, kind, body = curl(chat, data=json.dumps(HELLO).encode())
    assert (code, kind) == (200, "application/json")
    said = json.loads(body)["choices"][0]["message"]["content"]
    code, kind, body = curl("-N", chat, data=json.dumps({**HELLO, "stream": True}).encode())
    assert (code, kind) == (200, "text/event-stream; charset=utf-8")
    lines = body.decode().strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    deltas = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(deltas) == said
    assert curl("--http1.0", chat, data=json.dumps(HELLO).encode())[0] == 200
    assert curl("-H", "expect: 100-continue", chat, data=json.dumps(HELLO).encode())[0] == 200
    assert curl("-H", "transfer-encoding: chunked", chat, data=json.dumps(HELLO).encode())[0] == 200
    assert curl(f"{server.url}/v1/models")[0] == 200
    # A capsule leaves as a file and comes back.
    session = json.loads(curl(f"{server.url}/v1/sessions", data=b"{}")[2])["id"]
    base = f"{server.url}/v1/sessions/{session}"
    assert curl(f"{base}/append", data=b'{"text": "The harbour lay still."}')[0] == 200
    capsule = json.loads(curl(f"{base}/snapshot", data=b'{"name": "../../etc/passwd"}')[2])
    file = tmp_path / "harbour.ampoule"
    assert curl("-o", str(file), f"{server.url}/v1/capsules/{capsule['id']}/export")[0] == 200
    code, _, body = curl("-H", "content-type: application/octet-stream", "--data-binary", f"@{file}", f"{server.url}/v1/capsules/import")
    assert code == 201 and json.loads(body)["lineage"] == capsule["lineage"]


def test_errors_have_one_shape(server):
    cases = [
        (400, "/v1/chat/completions", b"{"), (400, "/v1/chat/completions", b"[]"), (400, "/v1/chat/completions", b""),
        (400, "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
        (400, "/v1/chat/completions", b'{"messages": ' + b"[" * 100_000),
        (400, "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        (404, "/v1/nothing", b"{}"), (404, "/v1/responses/resp_x/cancel", b"{}"), (405, "/v1/models", b"{}"), (405, "/health", b"{}"),
        (400, "/v1/sessions/%ff/append", b'{"text": "x"}'), (404, "/v1/sessions/..%2f..%2fetc/append", b'{"text": "x"}'),
        (400, "/v1/capsules/import", b"not a capsule"), (400, "/v1/capsules/import", b""),
        (400, "/detokenize", b'{"tokens": [-1]}'), (400, "/tokenize", b'{"prompt": 5}'),
    ]
    for wanted, path, body in cases:
        code, headers, answer = post(server, path, body)
        assert code == wanted, (path, body[:80], code, answer)
        assert headers["x-request-id"].startswith("req_") and headers["content-type"] == "application/json"
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert not re.search(r"/(home|root|tmp|usr|src)/|\.rs\b|panick", error["message"]), error
    works(server)


def test_wrong_kinds_and_methods(server):
    body = json.dumps(HELLO).encode()
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", "x"]:
        assert post(server, "/v1/chat/completions", body, content_type=kind)[0] == 415, kind
    for kind in ["application/json", "Application/JSON; charset=utf-8"]:
        assert post(server, "/v1/chat/completions", body, content_type=kind)[0] == 200, kind
    for method in ["PUT", "PATCH", "DELETE", "TRACE", "BREW"]:
        answer = send(server, f"{method} /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        assert status(answer) == 405, (method, answer)
    head = send(server, b"HEAD /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert status(head) == 200 and head.endswith(b"\r\n\r\n")


def test_pages_of_others_cannot_use_the_server(server):
    """A browser on this machine may be made to send requests; nothing of them is taken."""
    body = json.dumps(HELLO).encode()
    code, headers, answer = post(server, "/v1/chat/completions", body, origin="https://evil.example")
    assert code == 403 and json.loads(answer)["error"]["type"] == "permission_error"
    assert headers["access-control-allow-origin"] is None
    for host in ["evil.example", "evil.example:8080", "127.0.0.1.evil.example"]:
        answer = send(server, f"GET /v1/sessions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        assert status(answer) == 403, answer
    for host in ["localhost", "127.0.0.1:1", "[::1]:8080"]:
        answer = send(server, f"GET /v1/sessions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        assert status(answer) == 200, answer
    preflight = send(server, b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\norigin: https://a.example\r\n"
                             b"access-control-request-method: POST\r\nconnection: close\r\n\r\n")
    assert b"access-control" not in preflight.lower() and status(preflight) != 200


def test_one_origin_may_be_allowed():
    with running("--model-name", "tiny", "--cors", "https://a.example") as server:
        body = json.dumps(HELLO).encode()
        code, headers, _ = post(server, "/v1/chat/completions", body, origin="https://a.example")
        assert code == 200 and headers["access-control-allow-origin"] == "https://a.example"
        assert headers["access-control-expose-headers"] == "x-request-id, retry-after"
        assert post(server, "/v1/chat/completions", body, origin="https://b.example")[0] == 403
        preflight = send(server, b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\norigin: https://a.example\r\n"
                                 b"access-control-request-headers: authorization,content-type,x-stainless-lang\r\n"
                                 b"access-control-request-method: POST\r\nconnection: close\r\n\r\n")
        assert status(preflight) == 204 and b"x-stainless-lang" in preflight and b"GET, POST, DELETE" in preflight


def test_other_machines_need_keys():
    with pytest.raises(RuntimeError, match="AMPOULE_API_KEYS"):
        Server("--host", "0.0.0.0")
    for extra, keys in [(["--without-keys"], None), ([], ["a-key-of-tests"])]:
        with running("--host", "0.0.0.0", *extra, keys=keys) as server:
            assert server.alive()


def test_keys_guard_all_but_health_and_the_document(guarded):
    document = json.loads(urllib.request.urlopen(f"{guarded.url}/openapi.json").read())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            line = f"{method.upper()} {path.replace('{id}', 'x')} HTTP/1.1"
            for key in ["", "authorization: Bearer wrong-key\r\n", "authorization: Basic Zmlyc3Q6a2V5\r\n", "authorization: \xff\r\n"]:
                request = f"{line}\r\nhost: x\r\ncontent-length: 2\r\nconnection: close\r\n{key}\r\n{{}}".encode("latin-1")
                open_to_all = operation.get("security") == []
                assert status(send(guarded, request)) == (200 if open_to_all else 401), (line, key)
    assert json.loads(urllib.request.urlopen(f"{guarded.url}/health").read()) == {"status": "ok"}


# Streams.


def events(server, path, body):
    code, headers, text = post(server, path, {**body, "stream": True})
    assert code == 200 and headers["content-type"] == "text/event-stream; charset=utf-8", text
    blocks = text.decode().strip().split("\n\n")
    return [json.loads(line[6:]) for block in blocks for line in block.split("\n") if line.startswith("data: {")]


def forced(*texts):
    """A format that leaves the model these texts alone. Its tokens are bytes: every character of several is cut."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "enum": list(texts)}}}


def test_characters_are_held_until_they_are_whole(server):
    text = "é東京🚆🏳️‍🌈 naïve"
    body = {**HELLO, "max_tokens": 200, "response_format": forced(text)}
    deltas = [e["choices"][0]["delta"].get("content") or "" for e in events(server, "/v1/chat/completions", body)]
    assert "".join(deltas) == json.dumps(text, ensure_ascii=False)
    assert not any("\ufffd" in delta for delta in deltas)
    assert sum(1 for delta in deltas if delta) > 10, "it came in pieces"
    body = {"input": "Hello", "max_output_tokens": 200, "temperature": 0,
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "string", "enum": [text]}}}}
    deltas = [e["delta"] for e in events(server, "/v1/responses", body) if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == json.dumps(text, ensure_ascii=False) and not any("\ufffd" in delta for delta in deltas)


def test_stop_strings_are_found_across_tokens(server):
    text = "before ST ST京 STOP京🚆after"
    for stop in ["STOP京🚆", "京🚆", "P京"]:
        body = {**HELLO, "max_tokens": 200, "response_format": forced(text), "stop": [stop]}
        chunks = events(server, "/v1/chat/completions", body)
        said = ""
        wanted = '"' + text[: text.index(stop)]
        for chunk in chunks:
            said += chunk["choices"][0]["delta"].get("content") or ""
            assert wanted.startswith(said), (stop, said)
        assert said == wanted, stop
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["stop"]
    # What only began like a stop string comes out after all.
    body = {**HELLO, "max_tokens": 200, "response_format": forced("ends in STO"), "stop": ["STOP"]}
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in events(server, "/v1/chat/completions", body))
    assert said == '"ends in STO"'


def test_calls_come_whole_or_not_at_all(server):
    schema = {"type": "object", "properties": {"q": {"enum": ["</tool_call> in a text 🚆", "<tool_call>"]}, "n": {"enum": [1, 2]}},
              "required": ["q", "n"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    body = {**HELLO, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    whole = events(server, "/v1/chat/completions", {**body, "max_tokens": 300})
    tokens = sum(1 for _ in whole)
    calls = [c for e in whole for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert [c["function"]["name"] for c in calls] == ["look"] and tokens < 10
    assert json.loads(calls[0]["function"]["arguments"]).keys() == {"q", "n"}
    for length in [1, 5, 12, 13, 14, 20, 30, 40]:
        chunks = events(server, "/v1/chat/completions", {**body, "max_tokens": length})
        deltas = [e["choices"][0]["delta"] for e in chunks]
        assert not any(d.get("content") or d.get("tool_calls") for d in deltas), (length, deltas)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        code, _, answer = post(server, "/v1/chat/completions", {**body, "max_tokens": length})
        choice = json.loads(answer)["choices"][0]
        assert code == 200 and choice["finish_reason"] == "length" and not choice["message"]["content"]
        assert "tool_calls" not in choice["message"]
    kinds = [e["type"] for e in events(server, "/v1/responses", {
        "input": "Hello", "tools": [{"type": "function", **tools[0]["function"]}], "tool_choice": "required",
        "max_output_tokens": 20, "temperature": 0})]
    assert not any("function_call" in kind for kind in kinds) and kinds[-1] == "response.incomplete"


def test_the_first_byte_comes_early():
    """Before the prompt has been read: a proxy or a client that waits sees that it was heard."""
    with running("--model-name", "tiny", "--context", "16384") as server:
        prompt = "words of a long prompt " * 600
        body = json.dumps({**HELLO, "messages": [{"role": "user", "content": prompt}], "stream": True, "max_tokens": 2}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with dial(server) as stream:
            begun = time.monotonic()
            stream.sendall(head.encode() + body)
            got = b""
            while b'"role"' not in got:
                piece = stream.recv(4096)
                assert piece, got
                got += piece
            first = time.monotonic() - begun
            while b"[DONE]" not in got:
                piece = stream.recv(4096)
                assert piece, got[-2000:]
                got += piece
            whole = time.monotonic() - begun
        read = server.metric("ampoule_prompt_tokens_read_total")
        assert read > 10_000 and first < whole / 2, (first, whole)


# Faults.


def test_clients_that_are_killed_free_their_places(narrow):
    """curl is killed in the middle of a stream: its place is free at once, and nothing else is lost."""
    cancelled = narrow.metric("ampoule_requests_cancelled_total")
    for _ in range(3):
        body = json.dumps({**HELLO, "stream": True, "max_tokens": 6000, "ignore_eos": True})
        client = subprocess.Popen(["curl", "-sN", f"{narrow.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body],
                                  stdout=subprocess.PIPE)
        assert client.stdout.readline().startswith(b"data: ")
        code, headers, answer = post(narrow, "/v1/chat/completions", HELLO)
        assert code == 429 and int(headers["retry-after"]) >= 1 and json.loads(answer)["error"]["code"] == "queue_full"
        assert narrow.alive(), "health answers while the queue is full"
        client.kill()
        client.wait()
        client.stdout.close()
        for _ in range(200):
            if post(narrow, "/v1/chat/completions", HELLO)[0] == 200:
                break
            time.sleep(0.02)
        else:
            raise AssertionError("the place was not given back")
    assert narrow.metric("ampoule_requests_cancelled_total") >= cancelled + 3
    works(narrow)


def test_large_things_are_refused(server):
    chat = "/v1/chat/completions"
    code, _, answer = post(server, chat, {"messages": [{"role": "user", "content": "word " * 100_000}]})
    assert code == 400 and json.loads(answer)["error"]["code"] == "context_length_exceeded"
    line = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    answer = send(server, line + b"content-length: 10485760\r\n\r\n" + b"x" * (10 << 20))
    assert status(answer) in {413, 0}, answer[:200]
    # Only said to be large: refused before it is sent.
    answer = send(server, line + b"content-length: 99999999999\r\nconnection: close\r\n\r\n{", wait=5)
    assert status(answer) == 413, answer[:200]
    for extra in [b"x-flood: 1\r\n" * 5000, b"x: " + b"a" * 300_000 + b"\r\n"]:
        answer = send(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + extra + b"\r\n", wait=5)
        assert status(answer) in {431, 400, 0}, answer[:200]
    answer = send(server, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", wait=5)
    assert status(answer) in {414, 431, 400, 0}, answer[:200]
    tools = [{"type": "function", "function": {"name": f"t{n}", "parameters": {"type": "object"}}} for n in range(2000)]
    assert post(server, chat, {**HELLO, "tools": tools, "tool_choice": "required"})[0] == 400
    deep = {}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    assert post(server, chat, {**HELLO, "response_format": schema})[0] in {200, 400}
    works(server)


def test_bytes_that_are_no_http(server):
    for garbage in [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 1000, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                    b"POST /v1/models HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
                    b"POST /v1/models HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]:
        assert status(send(server, garbage, wait=3)) in {400, 403, 405, 505, 0}, garbage
    both = (b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
            b"content-length: 4\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert send(server, both, wait=3).count(b"HTTP/1.1 200") <= 1, "one request is not two"
    works(server)


def test_slow_clients_are_let_go(server):
    """A head that trickles is cut off after 15 s; a connection that was useful may be idle for longer."""
    def trickle(stream, out):
        begun = time.monotonic()
        try:
            for _ in range(60):
                stream.sendall(b"x")
                stream.settimeout(0.5)
                try:
                    if stream.recv(100) == b"":
                        break
                except TimeoutError:
                    pass
        except OSError:
            pass
        out.append(time.monotonic() - begun)

    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    slow = dial(server)
    slow.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
    again = dial(server)
    again.sendall(ask)
    assert again.recv(4096).startswith(b"HTTP/1.1 200")
    again.sendall(b"GET /hea")
    idle = dial(server)
    idle.sendall(ask)
    assert idle.recv(4096).startswith(b"HTTP/1.1 200")
    times = []
    threads = [threading.Thread(target=trickle, args=(stream, times)) for stream in (slow, again)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 2 and all(13 < t < 20 for t in times), times
    idle.settimeout(5)
    idle.sendall(ask)
    assert idle.recv(4096).startswith(b"HTTP/1.1 200"), "an idle connection is still good"
    for stream in (slow, again, idle):
        stream.close()
    works(server)


def test_requests_can_be_found_in_the_log(server):
    code, headers, _ = post(server, "/v1/chat/completions", {**HELLO, "temperature": 9})
    line = next(line for line in server.log.read_text().splitlines() if headers["x-request-id"] in line)
    assert code == 400 and "status=400" in line and "path=\"/v1/chat/completions\"" in line and "micros=" in line
    secret = "a-secret-that-nobody-should-log"
    post(server, "/v1/chat/completions", {**HELLO, "messages": [{"role": "user", "content": secret}]}, authorization=f"Bearer {secret}")
    assert secret not in server.log.read_text(), "what was said and keys are in no log"


def test_metrics_are_what_prometheus_reads(server):
    works(server)
    post(server, "/v1/chat/completions", HELLO)
    text = urllib.request.urlopen(f"{server.url}/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(text.read().decode())}
    kinds = {name: family.type for name, family in families.items()}
    for name in ["time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "e2e_request_latency_seconds", "capsule_restore_time_seconds"]:
        family = families[f"ampoule_{name}"]
        assert kinds[f"ampoule_{name}"] == "histogram"
        buckets = [s for s in family.samples if s.name.endswith("_bucket")]
        counts = [s.value for s in buckets]
        count = next(s.value for s in family.samples if s.name.endswith("_count"))
        assert counts == sorted(counts) and buckets[-1].labels["le"] == "+Inf" and counts[-1] == count > 0, name
    for name in ["prompt_tokens", "prompt_tokens_cached", "prompt_tokens_read", "generation_tokens", "requests"]:
        assert kinds[f"ampoule_{name}"] == "counter" and families[f"ampoule_{name}"].samples[0].value > 0, name
    for name in ["queue_depth", "requests_running", "http_connections", "capsule_bytes"]:
        assert kinds[f"ampoule_{name}"] == "gauge"
    assert {s.labels["tier"] for s in families["ampoule_capsule_bytes"].samples} == {"device", "host", "disk"}


def test_a_file_of_keys(tmp_path):
    """Keys of a file are those that count; one that others can read is told of."""
    file = tmp_path / "keys"
    file.write_text("# not a comment: a key\nkey-in-a-file\n\n")
    for mode, noted in [(0o644, True), (0o600, False)]:
        file.chmod(mode)
        with running("--model-name", "tiny", "--api-key-file", str(file)) as server:
            assert ("others can read" in server.log.read_text()) is noted
            assert post(server, "/v1/chat/completions", HELLO, authorization="Bearer key-in-a-file")[0] == 200
            assert post(server, "/v1/chat/completions", HELLO, authorization="Bearer key-in-a-fil")[0] == 401
            assert post(server, "/v1/chat/completions", HELLO)[0] == 401
            assert "key-in-a-file" not in server.log.read_text()
    for text in ["", "\n\n", "short\n"]:
        file.write_text(text)
        with pytest.raises(RuntimeError, match="key"):
            Server("--api-key-file", str(file))
