#!/bin/sh
# Fuzzes one reader with libFuzzer, on stable Rust.
#
#     scripts/fuzz.sh TARGET SECONDS [libFuzzer options]
#
# Targets: capsule, gguf, safetensors. It starts from fuzz/seeds/TARGET. Inputs that were found interesting stay in fuzz/corpus/TARGET, inputs that
# failed in fuzz/artifacts/TARGET; run one again with: scripts/fuzz.sh TARGET 0 fuzz/artifacts/TARGET/FILE
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
target=$1 seconds=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
host=$(rustc -vV | sed -n 's/^host: //p')
cd "$root/fuzz"
# Coverage instrumentation that nightly's -Zsanitizer would add; the explicit target keeps it off build scripts.
RUSTFLAGS="-Cpasses=sancov-module \
 -Cllvm-args=-sanitizer-coverage-level=4 \
 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
 -Cllvm-args=-sanitizer-coverage-pc-table \
 -Cllvm-args=-sanitizer-coverage-trace-compares \
 -Ccodegen-units=1" \
    cargo build --release --target "$host" --features "$target" --bin "$target"
binary=${CARGO_TARGET_DIR:-$root/fuzz/target}/$host/release/$target
mkdir -p "corpus/$target" "artifacts/$target" "seeds/$target"
if [ "$seconds" = 0 ]; then
    cd "$root"
    exec "$binary" "$@"
fi
exec "$binary" "corpus/$target" "seeds/$target" "-artifact_prefix=artifacts/$target/" "-max_total_time=$seconds" -rss_limit_mb=2048 "$@"
