"""The examples of docs/server.md and docs/voice-and-robotics.md, as they stand there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from conftest import NANO, ROOT, running

PAGES = {page: re.findall(r"^```(bash|python|javascript)\n(.*?)^```$", (ROOT / f"docs/{page}.md").read_text(), re.M | re.S)
         for page in ("server", "voice-and-robotics")}
BLOCKS = [block for blocks in PAGES.values() for block in blocks]
ADDRESS = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def documented():
    """A server under the name that the examples use."""
    names = {name for _, block in BLOCKS for name in re.findall(r"""["']?model["']?\s*[:=]\s*["']([^"']+)""", block)}
    assert len(names) == 1, f"the examples name one model, not {names}"
    with running("--model-name", names.pop(), model=NANO) as server:
        yield server


def test_there_is_an_example_of_each():
    assert {"bash", "python", "javascript"} == {language for language, _ in PAGES["server"]}
    assert len(PAGES["voice-and-robotics"]) == 3
    assert all(ADDRESS in block for _, block in BLOCKS)


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=[
    f"{page}-{n}-{language}" for page, blocks in PAGES.items() for n, (language, _) in enumerate(blocks)])
def test_example(documented, language, block, tmp_path):
    block = block.replace(ADDRESS, documented.url)
    folder = pathlib.Path(os.environ["AMPOULE_NODE_FOLDER"]) if language == "javascript" else tmp_path
    file = folder / {"bash": "example.sh", "python": "example.py", "javascript": "example.mjs"}[language]
    file.write_text(block)
    command = {"bash": ["bash", "-eu", "-o", "pipefail"], "python": [sys.executable], "javascript": ["node"]}[language]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run([*command, str(file)], cwd=folder, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and '"error"' not in done.stdout, done.stdout + done.stderr
    # What an example promises is in a comment behind "#=>" or "//=>": a pattern of its output.
    for wanted in re.findall(r"(?:#|//)=> (.*)", block):
        assert re.search(wanted, done.stdout), (wanted, done.stdout)
