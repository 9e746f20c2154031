"""Servers for the tests of clients: the binary itself, on a free port, with a model that needs no download."""

import contextlib
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("AMPOULE_BINARY", ROOT / "target/debug/ampoule"))
# Random weights: every token is possible, so what a grammar or a stop string does not force goes wrong somewhere.
RANDOM = "random:qwen3.5-tiny"
# Weights of the repository: text that is real.
NANO = str(ROOT / "assets/ampoule-nano")


class Server:
    """A server that runs until `stop`."""

    def __init__(self, *arguments, model=RANDOM, keys=None):
        self.folder = tempfile.TemporaryDirectory()
        port_file = pathlib.Path(self.folder.name, "port")
        self.log = pathlib.Path(self.folder.name, "log")
        environment = {name: value for name, value in os.environ.items() if name != "AMPOULE_API_KEYS"}
        if keys:
            environment["AMPOULE_API_KEYS"] = ",".join(keys)
        command = [str(BINARY), "serve", "--model", model, "--port", "0", "--port-file", str(port_file), "--log",
                   "--capsule-mib", "256", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().strip()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {self.log.read_text()}")
            time.sleep(0.02)
        self.address = port_file.read_text().strip()
        self.host, port = self.address.rsplit(":", 1)
        self.port = int(port)
        self.url = f"http://{self.address}"

    def metric(self, name):
        """A figure of /metrics."""
        for line in urllib.request.urlopen(f"{self.url}/metrics").read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
        raise AssertionError(f"/metrics has no {name}")

    def alive(self):
        """Whether it runs and answers."""
        return self.process.poll() is None and urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        log = self.log.read_text()
        self.folder.cleanup()
        assert code == 0, f"the server ended with {code}: {log[-4000:]}"
        assert "panicked" not in log, log[-4000:]


@contextlib.contextmanager
def running(*arguments, **options):
    """A server for a test; it must end in order."""
    server = Server(*arguments, **options)
    try:
        yield server
    except BaseException:
        server.process.kill()
        raise
    server.stop()


@pytest.fixture(scope="session")
def server():
    """Random weights, no keys."""
    with running("--model-name", "tiny") as server:
        yield server


@pytest.fixture(scope="session")
def guarded():
    """A server that wants a key."""
    with running("--model-name", "tiny", keys=["first-key-of-tests", "second-key-of-tests"]) as server:
        yield server


@pytest.fixture(scope="session")
def narrow():
    """A server with one slot and a queue of one."""
    with running("--model-name", "tiny", "--queue", "1", "--slots", "1") as server:
        yield server


@pytest.fixture(scope="session")
def nano():
    """The model of the repository."""
    with running(model=NANO) as server:
        yield server
