"""Trains the model for a fixed time, on one GPU or several (torchrun-style variables RANK and WORLD_SIZE).

The learning rate follows the clock, so that the run ends annealed however fast the machine is. Hidden matrices are
updated by Muon (momentum, orthogonalised), the rest by AdamW. Each process holds the whole model; gradients are
averaged in one piece. Writes to --out: model.pt (float32 weights), log.jsonl (one line for each measurement).
"""

import argparse
import json
import math
import os
import queue
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as M


class Rows:
    """Rows of whole documents, in an order that depends on seed and epoch only; part `rank` of `world`."""

    def __init__(self, folder, name, length, seed, rank=0, world=1):
        self.tokens = np.fromfile(Path(folder) / f"{name}.bin", np.uint16)
        self.starts = np.fromfile(Path(folder) / f"{name}.idx", np.uint64).astype(np.int64)
        self.sizes = np.diff(self.starts)
        self.length, self.seed, self.rank, self.world = length + 2, seed, rank, world

    def epoch(self, number):
        """Each row begins with a document; the last one of a row is cut and its rest left for another epoch."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.sizes))
        ends = self.sizes[order].cumsum()
        at, row = 0, 0
        while at < len(order):
            before = ends[at - 1] if at else 0
            end = int(np.searchsorted(ends, before + self.length))
            if end >= len(order):
                return
            if row % self.world == self.rank:
                parts = [self.tokens[self.starts[d] : self.starts[d + 1]] for d in order[at : end + 1]]
                yield np.concatenate(parts)[: self.length]
            at, row = end + 1, row + 1

    def __iter__(self):
        number = 0
        while True:
            yield from ((row, number) for row in self.epoch(number))
            number += 1


def batches(rows, count, device, depth=8):
    """Batches as tensors on the device, made ahead by a thread."""
    ready = queue.Queue(depth)

    def fill():
        batch = []
        for row, epoch in rows:
            batch.append(row)
            if len(batch) == count:
                tensor = torch.from_numpy(np.stack(batch).astype(np.int64))
                ready.put((tensor.pin_memory() if device.type == "cuda" else tensor, epoch))
                batch = []

    threading.Thread(target=fill, daemon=True).start()
    while True:
        tensor, epoch = ready.get()
        yield tensor.to(device, non_blocking=True), epoch


def orthogonal(x):
    """Newton-Schulz: the nearest matrices with equal singular values, roughly; x [N, rows, columns]."""
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x.to(M.COMPUTE)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon:
    def __init__(self, parameters, decay=0.05, momentum=0.95):
        self.groups = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.state = {shape: torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self.groups.items()}
        self.decay, self.momentum = decay, momentum

    @torch.no_grad()
    def step(self, rate):
        for shape, ps in self.groups.items():
            grads = torch.stack([p.grad for p in ps])
            state = self.state[shape]
            state.lerp_(grads, 1 - self.momentum)
            update = orthogonal(grads.lerp(state, self.momentum)) * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(ps, 1 - rate * self.decay)
            torch._foreach_add_(ps, list(update.unbind(0)), alpha=-rate)


def heldout(model, rows, vocabulary_bytes):
    """Loss in nats for each token and in bits for each byte of text, over packed rows; MTP's too."""
    model.eval()
    sums, count, size = np.zeros(4), 0, 0
    with torch.no_grad():
        for batch in rows:
            sums += np.array([x.item() for x in model(batch)])
            count += 1
            size += vocabulary_bytes[batch[:, 1:-1]].float().mean().item()
    model.train()
    loss, mtp, right, ahead = sums / count
    return {"loss": loss, "bits_per_byte": loss / math.log(2) / (size / count), "accuracy": right, "mtp_loss": mtp, "mtp_accuracy": ahead}


def token_bytes(folder, vocabulary):
    """How many bytes of text each token stands for; the end of a document for none."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    sizes = torch.zeros(vocabulary)
    added = tokenizer.get_added_tokens_decoder()
    for text, i in tokenizer.get_vocab(True).items():
        sizes[i] = len(text)  # one character stands for one byte
    for i, token in added.items():
        sizes[i] = 0 if token.content == "<|endoftext|>" else len(token.content)
    return sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--kind", default="", help="'' or tiny, attention, tiny-attention")
    parser.add_argument("--seconds", type=float, default=240, help="time for training, compilation not counted")
    parser.add_argument("--until", type=float, default=0, help="end so many seconds after --began instead")
    parser.add_argument("--steps", type=int, default=0, help="end after so many steps at the latest")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch on each device")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--constant", type=float, default=0.45, help="share of the time before the rate falls; 1 to keep it")
    parser.add_argument("--mtp", type=float, default=0.2, help="weight of the MTP head's loss")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--measure", type=int, default=250, help="steps between measurements on the held-out split")
    parser.add_argument("--wait", default="", help="compile on random tokens first, then wait for this file in the data folder")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--began", type=float, default=0)
    args = parser.parse_args()
    args.began = args.began or time.time()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    name = args.kind or "main"

    def log(text):
        print(f"[{time.time() - args.began:6.1f}s] train {name}.{rank}: {text}", flush=True)

    if not cuda:
        M.COMPUTE = torch.float32
    torch.manual_seed(args.seed)
    config = M.small(args.kind)
    model = M.Nano(config).to(device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "in_proj_a" not in n and "in_proj_b" not in n]
    chosen = {id(p) for p in matrices}
    plain = [p for n, p in model.named_parameters() if id(p) not in chosen and "norm" not in n and p.dim() > 1]
    bare = [p for n, p in model.named_parameters() if id(p) not in chosen and not ("norm" not in n and p.dim() > 1)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW([{"params": plain, "weight_decay": 0.01}, {"params": bare, "weight_decay": 0.0}], lr=args.rate, betas=(0.9, 0.95), fused=cuda)
    parameters = list(model.parameters())
    log(f"{sum(p.numel() for p in parameters):,} parameters")

    def backward(batch):
        main_loss, mtp_loss, _, _ = model(batch)
        ((main_loss + args.mtp * mtp_loss) / args.accumulate).backward()
        return main_loss.detach()

    if not args.eager:
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = 64
        model.compile()
    # Compilation and the libraries' start, before the clock runs.
    fake = torch.randint(0, config.vocab_size, (args.rows, args.length + 2), device=device)
    for i in range(3):
        began = time.time()
        backward(fake)
        for p in parameters:
            p.grad = None
        if cuda:
            torch.cuda.synchronize()
        log(f"warm-up {i}: {time.time() - began:.1f} s")
    if rank == 0:
        with torch.no_grad():
            model.eval()
            model(fake)
            model.train()
        log("ready")
    del fake
    if cuda:
        torch.cuda.empty_cache()
    flat = torch.zeros(sum(p.numel() for p in parameters), device=device)
    if world > 1:
        import torch.distributed as dist

        dist.init_process_group("nccl" if cuda else "gloo", init_method="env://")
        dist.all_reduce(flat)
        log("processes connected")
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    if args.wait:
        while not (Path(args.data) / args.wait).exists():
            if (Path(args.data) / "failed").exists():
                raise SystemExit("no data")
            time.sleep(0.2)
    sizes = token_bytes(args.data, config.vocab_size).to(device)
    # With accumulation the batches are those that several processes would have had.
    sources = [batches(Rows(args.data, "train", args.length, args.seed, r, world * args.accumulate), args.rows, device)
               for r in range(rank * args.accumulate, (rank + 1) * args.accumulate)]
    held = []
    if rank == 0:
        rows = [row for row, _ in zip(Rows(args.data, "heldout", args.length, 0).epoch(0), range(8 * args.rows))]
        held = [torch.from_numpy(np.stack(rows[i : i + args.rows]).astype(np.int64)).to(device) for i in range(0, len(rows) - args.rows + 1, args.rows)]
    record = open(out / "log.jsonl", "w") if rank == 0 else None
    per_step = args.rows * args.length * world * args.accumulate
    if world > 1:
        dist.barrier()
    began = time.time()
    seconds = args.began + args.until - began if args.until else args.seconds
    log(f"begins: {seconds:.0f} s, {per_step:,} tokens a step, {sources and len(held)} held-out batches")
    losses, step, spent, stop = [], 0, 0.0, torch.zeros(1, device=device)
    share = 0.0
    while True:
        # One clock for all processes, so that all stop at the same step.
        if step % 10 == 0:
            share = max((time.time() - began) / seconds, step / args.steps if args.steps else 0.0)
            stop.fill_(share)
            if world > 1:
                dist.broadcast(stop, 0)
                share = stop.item()
            if share >= 1:
                break
        rate = min(1.0, (step + 1) / args.warmup)
        if args.constant < 1:
            rate *= min(1.0, max(0.0, (1 - share) / (1 - args.constant)))
        flat.zero_()
        for source in sources:
            batch, epoch = next(source)
            loss = backward(batch)
        if world > 1:
            small = flat.to(M.COMPUTE)
            dist.all_reduce(small)
            flat.copy_(small.float() / world)
        flat.mul_((1.0 / (flat.norm() + 1e-6)).clamp(max=1.0))
        muon.step(args.rate * rate)
        for group in adam.param_groups:
            group["lr"] = args.rate * rate
        adam.step()
        step += 1
        if step % 20 == 0:
            losses.append(loss)
        if rank == 0 and (step % args.measure == 0 or step in (20, 50, 100)):
            value = torch.stack(losses[-10:]).mean().item() if losses else None
            pause = time.time()
            line = {"step": step, "tokens": step * per_step, "seconds": time.time() - began, "epoch": epoch, "rate": rate, "train": value, **heldout(model, held, sizes)}
            record.write(json.dumps(line) + "\n")
            record.flush()
            torch.save(model.state_dict(), out / "model.part.pt")
            os.rename(out / "model.part.pt", out / "model.pt")
            log(f"step {step}, {step * per_step / 1e6:.0f}M tokens ({per_step * step / (time.time() - began) / 1e3:,.0f}k/s), epoch {epoch}, train {value or 0:.3f}, "
                f"held-out {line['loss']:.4f} = {line['bits_per_byte']:.4f} bits/byte, MTP {line['mtp_accuracy']:.3f} (measured in {time.time() - pause:.1f} s)")
            if not math.isfinite(line["loss"]):
                raise SystemExit("the loss is not finite")
        if world > 1 and step % 500 == 0:
            for p in parameters:
                dist.broadcast(p.data, 0)
    if rank == 0:
        torch.save(model.state_dict(), out / "model.pt")
        line = {"step": step, "tokens": step * per_step, "seconds": time.time() - began, "final": True, "parameters": sum(p.numel() for p in parameters), **heldout(model, held, sizes)}
        record.write(json.dumps(line) + "\n")
        record.close()
        log(f"finished: {step} steps, {step * per_step / 1e6:.0f}M tokens, held-out {line['bits_per_byte']:.4f} bits/byte, accuracy {line['accuracy']:.3f}, MTP {line['mtp_accuracy']:.3f}")
    leave()


def leave():
    """Without the interpreter's farewell, which can hang in a library's threads."""
    import sys

    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
