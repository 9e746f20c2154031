#!/usr/bin/env python3
"""Compiles every CUDA kernel with NVRTC for the architectures we support. Needs no GPU and no toolkit.

NVRTC 13.0 comes from PyPI into target/cuda-check, unless AMPOULE_CUDA_LIBS or an importable `nvidia` package has it.
Prints registers, stack and spills where ptxas reports them. Exit code 1 if a kernel does not compile.
"""

import ctypes
import glob
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "crates/backends/cuda/kernels"
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a", "sm_120a"]
WHEELS = ["nvidia-cuda-nvrtc==13.0.88", "nvidia-cuda-runtime==13.0.96"]
# What goes before a source, after common.cuh: see SOURCES in src/compile.rs.
SHARED = {"chain": ["products.cuh", "bulk.cuh"], "gemv": ["products.cuh"], "memory": ["bulk.cuh"]}
# As the backend compiles them: see OPTIONS in src/compile.rs.
OPTIONS = ["--std=c++17", "--fmad=true"]


def library_folders():
    yield from filter(None, os.environ.get("AMPOULE_CUDA_LIBS", "").split(os.pathsep))
    for base in sys.path:
        yield from glob.glob(os.path.join(base, "nvidia", "*", "lib"))
    target = ROOT / "target/cuda-check"
    found = glob.glob(str(target / "nvidia/*/lib/libnvrtc.so.*"))
    if not found:
        print(f"installing {' '.join(WHEELS)} to {target}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *WHEELS]
        subprocess.run(command, check=True)
    yield from glob.glob(str(target / "nvidia/*/lib"))


def load_nvrtc():
    for folder in library_folders():
        names = sorted(glob.glob(os.path.join(folder, "libnvrtc.so.13*")))
        if not names:
            continue
        for builtins in sorted(glob.glob(os.path.join(folder, "libnvrtc-builtins.so.13*"))):
            ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
        nvrtc = ctypes.CDLL(names[0])
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        return nvrtc
    sys.exit("no libnvrtc.so.13 found")


def compile_kernel(nvrtc, name, source, architecture):
    program = ctypes.c_void_p()
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if code:
        return False, nvrtc.nvrtcGetErrorString(code).decode(), 0
    options = [*OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    cubin = ctypes.c_size_t()
    if code == 0:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(cubin))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code == 0, log.value.decode(errors="replace"), cubin.value


def report(log):
    """One line per kernel: registers, stack, spills, shared memory."""
    name = None
    spill = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = "" if match[1] == match[2] == match[3] == "0" else f"  stack {match[1]} spills {match[2]}/{match[3]}"
        elif name and (match := re.search(r"Used (\d+) registers(.*)", line)):
            shared = re.search(r"(\d+) bytes smem", match[2])
            yield f"    {name:32} {match[1]:>3} registers  {shared[1] if shared else 0:>6} bytes shared{spill}"
            name = None


def main():
    only = sys.argv[1:]
    known = {path.stem for path in KERNELS.glob("*.cu")} | set(ARCHITECTURES)
    if unknown := [word for word in only if word not in known]:
        sys.exit(f"unknown: {' '.join(unknown)}\nusage: cuda_check.py [KERNEL|ARCHITECTURE]...  of {' '.join(sorted(known))}")
    nvrtc = load_nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    print(f"NVRTC {major.value}.{minor.value}")
    common = (KERNELS / "common.cuh").read_text()
    jobs = [
        (architecture, path)
        for architecture in ARCHITECTURES
        for path in sorted(KERNELS.glob("*.cu"))
        if not only or path.stem in only or architecture in only
    ]

    def compile_job(job):
        architecture, path = job
        shared = "".join((KERNELS / name).read_text() for name in SHARED.get(path.stem, []))
        return compile_kernel(nvrtc, path.name, common + shared + path.read_text(), architecture)

    failed = 0
    # ctypes lets go of the interpreter while NVRTC works, so threads share out the work.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (architecture, path), (good, log, cubin) in zip(jobs, pool.map(compile_job, jobs)):
            print(f"{architecture:8} {path.name:16} {'ok' if good else 'FAILED'} {cubin} bytes", flush=True)
            if architecture == "sm_90a":
                print("\n".join(report(log)))
            # A warning is a failure: a variable once hid a function, and a kernel wrote zeros.
            problems = [l for l in log.splitlines() if "error" in l or "warning" in l]
            if not good or problems:
                print(log if not good else "\n".join(problems))
            failed += bool(not good or problems)
    if failed:
        sys.exit(f"{failed} compilations failed")


if __name__ == "__main__":
    main()
