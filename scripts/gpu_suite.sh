#!/bin/sh
# Runs everything that needs a GPU, from the binaries that scripts/gpu_bundle.sh made. No Rust, no network.
#
#     scripts/gpu_suite.sh OUT [quick]
#
# Writes logs and JSON to OUT, prints a summary, and exits with 1 if anything failed. Two minutes on an H100 with `quick`; without
# it also compute-sanitizer, of the CUDA toolkit, for twenty more.
set -u
[ $# -gt 0 ] || { echo "usage: scripts/gpu_suite.sh OUT [quick]" >&2; exit 2; }
out=$1
mode=${2:-full}
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/.gpu
mkdir -p "$out"
failed=0
step() {
    name=$1
    shift
    start=$(date +%s)
    if "$@" > "$out/$name.txt" 2>&1; then verdict=ok; else verdict="FAILED ($?)"; failed=1; fi
    echo "$name: $verdict, $(($(date +%s) - start)) s"
}
# The op suite beneath a tool, in small parts, as many at once as there are cores: alone it would take hours. First the parts with
# the cases that take longest: what is begun last must not take minutes alone.
in_parts() {
    rm -rf "$out/parts"
    mkdir -p "$out/parts"
    "$bin/conformance" ops --backend cuda --cases 0 --list | awk '
        { part = (NR - 1) % 157 + 1 }
        /^linear\/rows=66/ || /^layer\/rows=70.*attention/ || /^attention\/rows=(70.*heads=9.*d=256|40.*position=2000)/ { long[part] = 1 }
        END { for (p = 1; p <= 157; ++p) if (p in long) print p; for (p = 1; p <= 157; ++p) if (!(p in long)) print p }
    ' | xargs -P "$(nproc)" -I {} sh -c 'out=$1 part=$2; shift 2; exec "$@" --part "$part/157" > "$out/$part.txt" 2>&1' \
        sh "$out/parts" {} "$@" "$bin/conformance" ops --backend cuda --cases 0 --verbose
    verdict=$?
    cat "$out"/parts/*.txt
    rm -rf "$out/parts"
    return $verdict
}
export AMPOULE_REQUIRE_GPU=1
if ! "$bin/ampoule" generate --model "$root/assets/ampoule-nano" --device cuda --prompt hello --max-tokens 1 > "$out/first.txt" 2>&1; then
    echo "a first token on the GPU: FAILED" >&2
    cat "$out/first.txt" >&2
    exit 1
fi
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
step gpu_tests "$bin/gpu_tests" --test-threads=1
step goldens "$bin/goldens" --backend cuda --folder "$root/conformance/golden/qwen35"
step goldens_nano "$bin/goldens" --backend cuda --folder "$root/conformance/golden/nano"
step verify_nano "$bin/ampoule" verify --model "$root/assets/ampoule-nano" --device cuda --trials 50 --json
step verify_tiny "$bin/ampoule" verify --model random:qwen3.5-tiny --device cuda --trials 200 --json
step turns "$bin/ampoule" bench turns --model random:qwen3.5-tiny --device cuda --json
step rollback "$bin/ampoule" bench rollback --model random:qwen3.5-tiny --device cuda --json
step tiers "$bin/ampoule" bench tiers --model random:qwen3.5-tiny --device cuda --prefix 128,2048 --reps 5 --json
step ops "$bin/conformance" ops --backend cuda
step capsules "$bin/conformance" capsules --backend cuda --goldens "$root/conformance/golden/qwen35"
if [ "$mode" = full ]; then
    step ops_unfused env AMPOULE_CUDA_FUSION=0 AMPOULE_CUDA_PDL=0 "$bin/conformance" ops --backend cuda
    step kernels "$bin/bench_kernels" launch gemv copy attention delta sample model
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$bin/goldens" --backend cuda --folder "$root/conformance/golden/qwen35"
    # Without chains: the tool fails on them (docs/cuda-notes.md).
    race="env AMPOULE_CUDA_CHAIN=0 AMPOULE_CUDA_TUNE=0 compute-sanitizer --tool racecheck --error-exitcode 9"
    step racecheck $race "$bin/gpu_tests" --test-threads=1 decode_does_not_depend
    # Under a tool, timing algorithms would take most of the time and show nothing.
    step memcheck_decode env AMPOULE_CUDA_TUNE=0 compute-sanitizer --tool memcheck --error-exitcode 9 "$bin/gpu_tests" --test-threads=1 decode_does_not_depend
    # Copies of state, by bulk copies and by threads.
    step memcheck_copies env AMPOULE_CUDA_TUNE=0 compute-sanitizer --tool memcheck --error-exitcode 9 "$bin/gpu_tests" --test-threads=1 regions_of_any
    step racecheck_copies $race "$bin/gpu_tests" --test-threads=1 regions_of_any
    # Copies beside replays have no shared memory, and racecheck looks at nothing else.
    step memcheck_beside env AMPOULE_CUDA_TUNE=0 compute-sanitizer --tool memcheck --error-exitcode 9 "$bin/gpu_tests" --test-threads=1 rows_copied_beside
    step memcheck_ops in_parts env AMPOULE_CUDA_TUNE=0 compute-sanitizer --tool memcheck --error-exitcode 9
    step racecheck_ops in_parts $race
fi
exit $failed
