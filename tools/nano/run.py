"""Everything in one go, within a time: generate, prepare, train (and the control), export, measure, pack.

The trainers start first and compile while the generators run; they wait for the data. A phase that fails leaves what
the earlier ones made. Times in the log are seconds since the start.
"""

import argparse
import json
import lzma
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
PART = 15 * 1024 * 1024


class Run:
    def __init__(self, args):
        self.args, self.began = args, time.time()
        self.work, self.out = Path(args.work), Path(args.out)
        for folder in (self.work / "raw", self.work / "data", self.work / "main", self.work / "control", self.out):
            shutil.rmtree(folder, ignore_errors=True) if folder != self.out else None
            folder.mkdir(parents=True, exist_ok=True)
        self.logfile = open(self.work / "run.log", "w")
        self.children = []

    def now(self):
        return time.time() - self.began

    def log(self, text):
        line = f"[{self.now():6.1f}s] run: {text}"
        print(line, flush=True)
        self.logfile.write(line + "\n")
        self.logfile.flush()

    def start(self, name, *parts, gpu=None, **env):
        """A script of this folder as a process of its own group; its output goes to the log and to ours."""
        command = [sys.executable, "-u", str(HERE / parts[0]), *map(str, parts[1:])]
        environment = dict(os.environ, PYTHONUNBUFFERED="1", TORCHINDUCTOR_COMPILE_THREADS=str(self.args.compilers), **{k: str(v) for k, v in env.items()})
        environment.setdefault("OMP_NUM_THREADS", "4")
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        file = open(self.work / f"{name}.log", "a")
        tee = subprocess.Popen(["tee", "-a", str(self.work / "all.log")], stdin=subprocess.PIPE)
        process = subprocess.Popen(command, stdout=tee.stdin, stderr=file, env=environment, start_new_session=True)
        tee.stdin.close()
        process.name, process.log = name, self.work / f"{name}.log"
        self.children.append(process)
        return process

    def stop(self, processes):
        for process in processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()

    def tail(self, process, lines=25):
        text = process.log.read_text(errors="replace").splitlines()[-lines:]
        self.log(f"{process.name} ended with {process.returncode}:\n" + "\n".join("    " + line[:300] for line in text))

    def trainers(self, world, extra=()):
        a = self.args
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = ["--data", self.work / "data", "--wait", "ready", "--began", self.began, "--until", a.train_until, "--length", a.length, "--rows", a.rows,
                  "--measure", a.measure, "--seed", a.seed, "--rate", a.rate, *(["--cpu"] if a.cpu else [])]
        main = [self.start(f"main.{r}", "train.py", *common, "--out", self.work / "main", "--kind", a.kind, *extra, gpu=r,
                           RANK=r, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for r in range(world)]
        return main

    def control(self, world, gpu):
        a = self.args
        kind = {"": "attention", "tiny": "tiny-attention"}[a.kind]
        return self.start("control", "train.py", "--data", self.work / "data", "--wait", "ready", "--began", self.began, "--until", a.train_until, "--length", a.length,
                          "--rows", a.rows, "--measure", a.measure, "--seed", a.seed, "--rate", a.rate, "--out", self.work / "control", "--kind", kind,
                          "--accumulate", world, "--constant", 1, *(["--cpu"] if a.cpu else []), *(["--eager"] if a.eager else []), gpu=gpu)

    def whole(self):
        a = self.args
        extra = ["--eager"] if a.eager else []
        world = a.world
        main = self.trainers(world, extra)
        control = self.control(world, world) if a.control else None
        generators = self.start("generate", "generate.py", "--teacher", a.teacher, "--out", self.work / "raw", "--began", self.began, "--until", a.generate_until,
                                "--seed", a.seed, "--slots", a.slots, "--workers", a.gpus, "--feeders", a.feeders,
                                *(["--cpu"] if a.cpu else []), *(["--partial"] if a.partial else []))
        self.log(f"started {world} trainers, {'a control, ' if control else ''}{a.gpus} generators")
        while generators.poll() is None and self.now() < a.generate_until + 15:
            for p in main:
                if p.poll() not in (None, 0):
                    self.tail(p)
                    raise SystemExit("a trainer ended before the data was there")
            if self.now() > a.check_at and not list((self.work / "raw").glob("raw.*.*.npz")):
                self.tail(generators, 60)
                raise SystemExit(f"no text after {a.check_at} s")
            time.sleep(0.5)
        self.stop([generators])
        if generators.returncode:
            self.tail(generators)
        self.log(f"raw text: {sum(f.stat().st_size for f in (self.work / 'raw').glob('*.npz')) / 1e6:.0f} MB of tokens")
        self.prepare()
        (self.work / "data" / "ready").write_text("")
        attempts = [(1, extra), (1, ["--eager"])]
        while True:
            while any(p.poll() is None for p in main) and self.now() < a.train_until + 45:
                if any(p.poll() not in (None, 0) for p in main):
                    break
                time.sleep(0.5)
            bad = [p for p in main if p.poll() not in (None, 0)]
            if not bad or self.now() > a.train_until - 60 or not attempts:
                break
            self.tail(bad[0])
            self.stop(main)
            w, e = attempts.pop(0)
            self.log(f"starting again with {w} process, {e}")
            main = self.trainers(w, e)
        self.stop(main)
        for p in main:
            if p.returncode not in (0, -9):
                self.tail(p)
        self.finish(control)

    def prepare(self):
        a = self.args
        p = self.start("prepare", "prepare.py", "--raw", self.work / "raw", "--teacher", a.teacher, "--out", self.work / "data", "--seed", a.seed,
                       "--began", self.began, "--jobs", a.jobs, *a.prepare_extra.split())
        p.wait()
        if p.returncode:
            self.tail(p, 60)
            (self.work / "data" / "failed").write_text("")
            raise SystemExit("prepare failed")

    def step(self, name, *parts, limit=60, **env):
        p = self.start(name, *parts, **env)
        try:
            p.wait(limit)
        except subprocess.TimeoutExpired:
            self.log(f"{name} took longer than {limit} s")
            self.stop([p])
        if p.returncode:
            self.tail(p)

    def finish(self, control):
        a, device = self.args, "cpu" if self.args.cpu else "cuda"
        folder = self.work / "ampoule-nano"
        self.step("export", "export.py", "--weights", self.work / "main" / "model.pt", "--tokenizer", self.work / "data" / "tokenizer.json", "--out", folder, "--kind", a.kind)
        # First what must not be lost.
        self.pack()
        if control is not None:
            while control.poll() is None and self.now() < a.train_until + 30:
                time.sleep(0.2)
            self.stop([control])
        evaluations = [self.start("samples", "eval.py", "samples", "--model", folder, "--kind", a.kind, "--device", device, "--out", self.work / "samples.md", gpu=0),
                       self.start("measure", "eval.py", "measure", "--model", folder, "--kind", a.kind, "--device", device, "--heldout", self.work / "data" / "heldout.jsonl",
                                  "--out", self.work / "measure.json", "--limit", a.measured, gpu=min(1, a.gpus - 1))]
        if (self.work / "control" / "log.jsonl").exists():
            evaluations.append(self.start("curve", "eval.py", "curve", f"hybrid={self.work / 'main' / 'log.jsonl'}", f"attention={self.work / 'control' / 'log.jsonl'}", "--out", self.work / "curve.svg", "--top", 2))
        end = time.time() + a.evaluate_seconds
        while any(p.poll() is None for p in evaluations) and time.time() < end:
            time.sleep(0.2)
        self.stop(evaluations)
        for p in evaluations:
            if p.returncode:
                self.tail(p)
        self.pack(small_only=True)
        self.log("done: " + ", ".join(f"{f.name} {f.stat().st_size / 2**20:.1f} MiB" for f in sorted(self.out.iterdir())))

    def pack(self, small_only=False):
        """At most 8 files of less than 16 MiB each: the model in parts, everything small in one archive, texts."""
        folder = self.work / "ampoule-nano"
        small = [folder / n for n in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")]
        small += [self.work / "data" / n for n in ("stats.json", "heldout.jsonl")] + [self.work / n for n in ("samples.md", "measure.json", "curve.svg")]
        small += sorted(self.work.glob("*.log")) + [self.work / d / "log.jsonl" for d in ("main", "control")] + sorted((self.work / "raw").glob("raw.*.json"))
        with tarfile.open(self.out / "small.tar.xz.part", "w:xz", preset=2) as tar:
            for path in small:
                if path.exists():
                    tar.add(path, arcname=str(path.relative_to(self.work)))
        os.replace(self.out / "small.tar.xz.part", self.out / "small.tar.xz")
        if small_only:
            return
        weights = folder / "model.safetensors"
        if weights.exists():
            data = weights.read_bytes()
            for i in range(0, len(data), PART):
                (self.out / f"model.safetensors.{i // PART}").write_bytes(data[i : i + PART])
        sample = self.work / "data" / "train.sample.jsonl"
        if sample.exists():
            data = sample.read_bytes()
            # Whole lines in each piece.
            cuts = [0]
            for i in range(1, 8):
                cuts.append(data.find(b"\n", max(cuts[-1], len(data) * i // 8)) + 1 or len(data))
            pieces = [data[x:y] for x, y in zip(cuts, [*cuts[1:], len(data)])]
            with ProcessPoolExecutor(8) as pool:
                packed = list(pool.map(compress, pieces))
            # xz files may follow each other in one file.
            n, room, file = 0, 0, None
            for piece in packed:
                if file is None or room + len(piece) > PART:
                    if n == self.args.sample_files:
                        break
                    file = open(self.out / f"train.sample.{n}.jsonl.xz", "wb")
                    n, room = n + 1, 0
                file.write(piece)
                file.flush()
                room += len(piece)
        self.log("packed")


def compress(piece):
    return lzma.compress(piece, preset=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", required=True, help="folder for everything")
    parser.add_argument("--out", required=True, help="folder for what is kept")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--world", type=int, default=3, help="processes of the main training run")
    parser.add_argument("--control", type=int, default=1, help="1: the all-attention control on the next GPU")
    parser.add_argument("--generate-until", type=float, default=140)
    parser.add_argument("--check-at", type=float, default=100, help="give up if there is no text by then")
    parser.add_argument("--train-until", type=float, default=450)
    parser.add_argument("--evaluate-seconds", type=float, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--feeders", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=min(60, os.cpu_count()))
    parser.add_argument("--compilers", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--measure", type=int, default=400)
    parser.add_argument("--measured", type=int, default=2000, help="held-out documents that are measured here")
    parser.add_argument("--sample-files", type=int, default=2)
    parser.add_argument("--kind", default="")
    parser.add_argument("--prepare-extra", default="--sample-mb 110")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--partial", action="store_true", help="only part of the teacher's file is there: try everything out")
    args = parser.parse_args()
    run = Run(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("told to stop"))
    try:
        run.whole()
    except BaseException as error:
        run.log(f"ended: {error!r}")
        raise
    finally:
        run.stop(run.children)
        try:
            run.pack(small_only=True)
        except Exception as error:
            run.log(f"could not pack: {error!r}")


if __name__ == "__main__":
    main()
