#!/bin/sh
# Makes .gpu/: stripped release binaries that test and measure Ampoule on a GPU machine without Rust.
#
#     scripts/gpu_bundle.sh           # then copy the repository with .gpu/ to the GPU machine
#     scripts/gpu_suite.sh OUT        # there: runs everything, writes JSON and logs to OUT
#
# The binaries need libcuda, NVRTC and cuBLASLt of CUDA 13 there, and glibc 2.34; docs/gpu-testing.md says how they are found.
# They are built in a folder of their own: the program here lacks the model that `target/release/ampoule` carries.
set -eu
cd "$(dirname "$0")/.."
profile=${PROFILE:-release}
if [ "$profile" = release ]; then flag=--release; else flag=; fi
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/bundle
# Without the model that the program carries: its folder travels with the repository.
cargo build $flag -p ampoule-cli -p ampoule-conformance --bins --no-default-features
cargo build $flag -p ampoule-cuda --examples
tests=$(cargo test $flag -p ampoule-cuda --test gpu --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*gpu-[^"]*\)".*/\1/p' | tail -n 1)
mkdir -p .gpu
target=$CARGO_TARGET_DIR/$profile
if [ "$profile" != release ]; then target=$CARGO_TARGET_DIR/debug; fi
for binary in ampoule conformance goldens examples/bench_kernels; do
    strip -o ".gpu/$(basename "$binary")" "$target/$binary"
done
strip -o .gpu/gpu_tests "$tests"
ls -l .gpu
