"""Has the teacher write the raw text: one process for each GPU, for a fixed time.

Writes shards `raw.R.N.npz` with the task numbers and the tokens of finished streams, the sampled ones marked; prepare.py
makes documents of them. Task numbers of the processes interleave, so that no two do the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHUNK = 256


def tokenizer_of(path):
    from tokenizers import Tokenizer

    from gguf_file import GgufFile, tokenizer_json

    return Tokenizer.from_str(json.dumps(tokenizer_json(GgufFile(path))))


def feed(tokenizer, seed, first, stride, script, room, queue):
    """Fills the queue with (task numbers, scripts)."""
    import numpy as np
    import prompts

    i = first
    while True:
        numbers, rows = [], np.zeros((CHUNK, script), np.int32)
        while len(numbers) < CHUNK:
            entries, size = [], 0
            for part in prompts.task(seed, i).script:
                ids = [-part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids
                size += part if isinstance(part, int) else len(ids)
                entries += ids
            if size < room and len(entries) < script:
                rows[len(numbers), : len(entries)] = entries
                numbers.append(i)
            i += stride
        queue.put((np.array(numbers), rows))


def worker(args):
    import multiprocessing

    import numpy as np

    # The feeders start before torch is loaded, so that forking is cheap and safe.
    context = multiprocessing.get_context("fork")
    queue = context.Queue(maxsize=64)
    import prompts

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizer_of(args.teacher)
    start = tokenizer.encode(prompts.PREFIX, add_special_tokens=False).ids
    script = 224
    feeders = []
    stride = args.workers * args.feeders
    for f in range(args.feeders):
        first = args.rank * args.feeders + f
        process = context.Process(target=feed, daemon=True, args=(tokenizer, args.seed, first, stride, script, args.length - len(start) - 2, queue))
        process.start()
        feeders.append(process)

    import torch

    import teacher as T

    def log(text):
        print(f"[{time.time() - args.began:6.1f}s] generate {args.rank}: {text}", flush=True)

    cuda = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(args.seed * 1000 + args.rank)
    with torch.no_grad():
        model = T.Teacher(args.teacher, args.slots, args.length, script, device, torch.bfloat16 if cuda else torch.float32,
                          args.temperature, args.min_p, args.penalty, args.partial)
        log(f"teacher loaded, {args.slots} slots of {args.length}")
        model.prefix(start)
        if cuda:
            choose_attention(model, log)
        replay, per = model.step, 1
        if cuda:
            try:
                replay, per = capture(model)
                log("decode step captured")
            except Exception as error:
                log(f"no CUDA graph ({error!r}); going on without")
        model.prefix(start)

        chunk, used = None, CHUNK

        def take(n):
            nonlocal chunk, used
            numbers, rows = [], []
            while n > 0:
                if used == CHUNK:
                    chunk, used = queue.get(), 0
                m = min(n, CHUNK - used)
                numbers.append(chunk[0][used : used + m])
                rows.append(chunk[1][used : used + m])
                used, n = used + m, n - m
            return np.concatenate(numbers), np.concatenate(rows)

        owner = np.zeros(args.slots, np.int64)
        numbers, scripts = take(args.slots)
        owner[:] = numbers
        model.refill(np.arange(args.slots), scripts)
        done, shard, steps, tokens, held = [], 0, 0, 0, 0
        began = last = time.time()
        end = args.began + args.until if args.until else began + args.seconds

        def flush():
            nonlocal done, shard, held
            if done:
                name = Path(args.out) / f"raw.{args.rank}.{shard}"
                np.savez(f"{name}.part.npz", task=np.concatenate([d[0] for d in done]), tokens=np.concatenate([d[1] for d in done]),
                         length=np.concatenate([d[2] for d in done]))
                os.rename(f"{name}.part.npz", f"{name}.npz")
                done, shard, held = [], shard + 1, 0

        while time.time() < end:
            for _ in range(args.block // per):
                replay()
            steps += args.block
            rows = model.idle.nonzero()[:, 0]
            if len(rows):
                at = rows.cpu().numpy()
                record = model.record[rows].to(torch.int32).cpu().numpy()
                length = (model.position[rows] + 1).cpu().numpy()
                # Behind the shared beginning only.
                done.append((owner[at].copy(), record[:, len(start) :], length - len(start)))
                tokens += int((length - len(start)).sum())
                held += len(at)
                numbers, scripts = take(len(at))
                owner[at] = numbers
                model.refill(at, scripts)
            if time.time() - last > 10:
                last = time.time()
                rate = steps * args.slots / (last - began)
                log(f"{steps} steps, {rate:,.0f} tokens/s, {tokens:,} tokens in finished streams")
                flush()
        flush()
        seconds = time.time() - began
        log(f"finished: {steps} steps in {seconds:.0f} s, {tokens:,} tokens in finished streams")
        summary = {"rank": args.rank, "steps": steps, "seconds": seconds, "tokens": tokens, "slots": args.slots,
                   "device": torch.cuda.get_device_name() if cuda else "cpu"}
        (Path(args.out) / f"raw.{args.rank}.json").write_text(json.dumps(summary))
    for process in feeders:
        process.terminate()
    sys.stdout.flush()
    os._exit(0)


def choose_attention(model, log):
    """Times the two forms on the device and takes the faster of those that agree."""
    import torch

    times, outputs = {}, {}
    model.position.fill_(model.length // 2)
    for name in ("sdpa", "bmm"):
        try:
            model.attention = getattr(model, f"attention_{name}")
            for _ in range(3):
                out = model.logits()
            torch.cuda.synchronize()
            began = time.time()
            for _ in range(5):
                out = model.logits()
            torch.cuda.synchronize()
            times[name], outputs[name] = (time.time() - began) / 5, out
        except Exception as error:
            log(f"attention {name} failed: {error!r}")
            torch.cuda.synchronize()
    if len(outputs) == 2:
        a, b = outputs["sdpa"], outputs["bmm"]
        difference = ((a - b).norm() / b.norm()).item()
        log(f"attention forms differ by {difference:.1e}")
        if not difference < 0.05:
            del times["sdpa"]
    best = min(times, key=times.get)
    model.attention = getattr(model, f"attention_{best}")
    log("attention: " + ", ".join(f"{n} {t * 1e3:.1f} ms" for n, t in times.items()) + f"; taking {best}")


def capture(model):
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=120, help="time for decoding, without the start")
    parser.add_argument("--until", type=float, default=0, help="stop so many seconds after --began instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes; one for each GPU unless given")
    parser.add_argument("--slots", type=int, default=4096, help="streams of each process")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--block", type=int, default=16, help="steps between two looks at what has finished")
    parser.add_argument("--feeders", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--min-p", type=float, default=0.08)
    parser.add_argument("--penalty", type=float, default=0.25)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--partial", action="store_true", help="the file is cut short: time only")
    parser.add_argument("--began", type=float, default=0)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.began = args.began or time.time()
    if args.rank >= 0:
        return worker(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if not args.workers:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout if not args.cpu else ""
        args.workers = max(1, listed.count("GPU "))
    processes = []
    for rank in range(args.workers):
        command = [sys.executable, str(HERE / "generate.py"), "--rank", str(rank), "--workers", str(args.workers), "--began", str(args.began)]
        for name in ("teacher", "out", "seconds", "until", "seed", "slots", "length", "block", "feeders", "temperature", "min_p", "penalty"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        command += ["--cpu"] * args.cpu + ["--partial"] * args.partial
        processes.append(subprocess.Popen(command, env=dict(os.environ, CUDA_VISIBLE_DEVICES=str(rank))))
    failed = sum(process.wait() != 0 for process in processes)
    if failed == len(processes):
        raise SystemExit("every generator failed")


if __name__ == "__main__":
    main()
