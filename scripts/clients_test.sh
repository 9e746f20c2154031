#!/usr/bin/env bash
# Runs the official clients, an agent framework, curl, schemathesis and the examples of docs/server.md and
# docs/voice-and-robotics.md against the binary.
# Needs Python 3.11 or later with venv, Node 20 or later with npm, and curl. Arguments go to pytest.
# AMPOULE_BINARY tests another binary; SCHEMATHESIS_SECONDS bounds schemathesis (75 by default).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${AMPOULE_BINARY:-}" ]; then
    cargo build --quiet -p ampoule-cli
    AMPOULE_BINARY=${CARGO_TARGET_DIR:-$PWD/target}/debug/ampoule
fi
tools=$PWD/target/clients
mkdir -p "$tools/js"
# What is installed already is not installed again.
if ! cmp --silent tests/clients/requirements.txt "$tools/requirements.txt"; then
    rm -rf "$tools/venv" "$tools/requirements.txt"
    python3 -m venv "$tools/venv"
    "$tools/venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r tests/clients/requirements.txt
    cp tests/clients/requirements.txt "$tools/requirements.txt"
fi
if ! cmp --silent tests/clients/package-lock.json "$tools/js/installed.json"; then
    cp tests/clients/package.json tests/clients/package-lock.json "$tools/js/"
    (cd "$tools/js" && npm ci --silent --no-audit --no-fund --ignore-scripts)
    cp tests/clients/package-lock.json "$tools/js/installed.json"
fi
cp tests/clients/*.mjs "$tools/js/"

export AMPOULE_BINARY AMPOULE_NODE_FOLDER=$tools/js PYTHONDONTWRITEBYTECODE=1
exec "$tools/venv/bin/python" -m pytest -q -p no:cacheprovider --tb=short --durations=5 tests/clients "$@"
