"""The official JavaScript client: its tests are in openai.test.mjs."""

import os
import subprocess

HERE = os.path.dirname(__file__)


def test_the_javascript_client(server, guarded):
    environment = {**os.environ, "AMPOULE_URL": server.url, "AMPOULE_GUARDED_URL": guarded.url}
    folder = os.environ.get("AMPOULE_NODE_FOLDER", HERE)
    # node finds packages beside the file.
    done = subprocess.run(["node", "--test", "--test-reporter=spec", "openai.test.mjs"], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "pass 8" in done.stdout and "fail 0" in done.stdout, done.stdout[-2000:]
