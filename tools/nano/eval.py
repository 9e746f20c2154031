"""Measures an exported model: held-out bits per byte against zstd, the MTP head, sampled answers, the training curve.

`measure` scores every held-out document on its own, in float32, from a fresh state (only <|endoftext|> before it).
`zstd` compresses the same texts with zstd -19 and a dictionary trained on the training split, each document on its own
and all in one piece. `samples` answers fixed prompts. `curve` draws log.jsonl as SVG.
"""

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load(folder, device="cpu", kind=""):
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    import model as M

    M.COMPUTE = torch.float32
    net = M.Nano(M.small(kind))
    net.load_state_dict({k: v.float() for k, v in load_file(str(Path(folder) / "model.safetensors")).items()})
    return net.to(device).eval(), Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def documents(path, limit=0):
    lines = [json.loads(line) for line in open(path)]
    return lines[:limit] if limit else lines


def measure(args):
    import torch
    import torch.nn.functional as F

    net, tokenizer = load(args.model, args.device, args.kind)
    docs = documents(args.heldout, args.limit)
    end = tokenizer.token_to_id("<|endoftext|>")
    rows = [[end, *tokenizer.encode(d["text"], add_special_tokens=False).ids, end] for d in docs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    kinds, began, at = {}, time.time(), 0
    with torch.no_grad():
        while at < len(order):
            batch = order[at : at + max(1, args.tokens // len(rows[order[min(at + 63, len(order) - 1)]]))]
            at += len(batch)
            width = max(len(rows[i]) for i in batch)
            tokens = torch.full((len(batch), width), end)
            for r, i in enumerate(batch):
                tokens[r, : len(rows[i])] = torch.tensor(rows[i])
            tokens = tokens.to(args.device)
            weight = net.model.embed_tokens.weight
            hidden = net.hidden(tokens)
            n = width - 1
            nats = F.cross_entropy(F.linear(hidden[:, :-1], weight).transpose(1, 2), tokens[:, 1:], reduction="none")
            ahead = net.mtp(hidden[:, :-1], net.model.embed_tokens(tokens[:, 1:]), net.cos[:n], net.sin[:n])
            main = F.linear(hidden, weight).argmax(-1)
            guess = F.linear(ahead, weight).argmax(-1)
            for r, i in enumerate(batch):
                size = len(rows[i])
                k = kinds.setdefault(docs[i]["kind"], dict(documents=0, bytes=0, tokens=0, nats=0.0, pairs=0, mtp_text=0, mtp_main=0, right=0))
                k["documents"] += 1
                k["bytes"] += len(docs[i]["text"].encode())
                k["tokens"] += size - 1
                k["nats"] += nats[r, : size - 1].sum().item()
                k["right"] += (main[r, : size - 1] == tokens[r, 1:size]).sum().item()
                # The head at t sees the token at t + 1 and says the one at t + 2: right against the text, and against
                # what the model itself would say there, which is what a greedy verifier accepts.
                k["pairs"] += size - 2
                k["mtp_text"] += (guess[r, : size - 2] == tokens[r, 2:size]).sum().item()
                k["mtp_main"] += (guess[r, : size - 2] == main[r, 1 : size - 1]).sum().item()
    total = {key: sum(k[key] for k in kinds.values()) for key in next(iter(kinds.values()))}

    def shares(k):
        return {"documents": k["documents"], "bytes": k["bytes"], "tokens": k["tokens"], "nats_per_token": k["nats"] / k["tokens"],
                "bits_per_byte": k["nats"] / math.log(2) / k["bytes"], "accuracy": k["right"] / k["tokens"],
                "mtp_accuracy_text": k["mtp_text"] / k["pairs"], "mtp_accepted_greedy": k["mtp_main"] / k["pairs"]}

    result = {"all": shares(total), "kinds": {name: shares(k) for name, k in sorted(kinds.items())}, "seconds": time.time() - began}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["all"]))


def zstd(args):
    """zstd's best: level 19, a dictionary from the training split."""
    train, held = documents(args.train), documents(args.heldout, args.limit)
    size = sum(len(d["text"].encode()) for d in held)
    result = {"bytes": size, "train_sample_bytes": sum(len(d["text"].encode()) for d in train)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "train").mkdir()
        (folder / "held").mkdir()
        (folder / "packed").mkdir()
        step = max(1, len(train) // 40000)
        for i, d in enumerate(train[::step]):
            (folder / "train" / f"{i}.txt").write_text(d["text"])
        (folder / "all.txt").write_text("".join(d["text"] for d in held))
        for kib in args.dictionary:
            name = folder / f"dictionary.{kib}"
            subprocess.run(["zstd", "-q", "--train", "-r", str(folder / "train"), f"--maxdict={kib * 1024}", "-o", str(name), "-f"], check=True, stderr=subprocess.DEVNULL)
            whole = subprocess.run(["zstd", "-q", "-19", "--long=27", "-D", str(name), "-c", str(folder / "all.txt")], check=True, capture_output=True).stdout
            for i, d in enumerate(held):
                (folder / "held" / f"{i}.txt").write_text(d["text"])
            subprocess.run(["zstd", "-q", "-19", "--no-check", "-D", str(name), "-r", str(folder / "held"), "--output-dir-flat", str(folder / "packed"), "-f"], check=True)
            packed = sum(f.stat().st_size for f in (folder / "packed").iterdir())
            result[f"dictionary_{kib}_kib"] = {"one_piece_bits_per_byte": 8 * len(whole) / size, "each_document_bits_per_byte": 8 * packed / size}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def samples(args):
    """Answers to fixed prompts, one draw each, as they come."""
    import torch
    import torch.nn.functional as F

    net, tokenizer = load(args.model, args.device, args.kind)
    asks = [line.strip() for line in open(args.prompts) if line.strip()]
    stops = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    torch.manual_seed(args.seed)
    rows = [tokenizer.encode(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids for ask in asks]
    begin = [len(r) for r in rows]
    live = set(range(len(rows)))
    with torch.no_grad():
        for _ in range(args.most):
            if not live:
                break
            width = max(map(len, rows))
            tokens = torch.zeros((len(rows), width), dtype=torch.long)
            for i, row in enumerate(rows):
                tokens[i, : len(row)] = torch.tensor(row)
            hidden = net.hidden(tokens.to(args.device)).cpu()
            last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
            logits = F.linear(last, net.model.embed_tokens.weight.cpu())
            if args.temperature > 0:
                p = (logits / args.temperature).softmax(-1)
                ordered, index = p.sort(-1, descending=True)
                ordered[ordered.cumsum(-1) - ordered > args.top_p] = 0
                pick = index.gather(1, torch.multinomial(ordered, 1))[:, 0]
            else:
                pick = logits.argmax(-1)
            for i in list(live):
                if pick[i].item() in stops:
                    live.discard(i)
                else:
                    rows[i].append(pick[i].item())
    with open(args.out, "w") as file:
        for i, (ask, row) in enumerate(zip(asks, rows)):
            answer = tokenizer.decode(row[begin[i] :], skip_special_tokens=False)
            cut = " [cut at the limit]" if i in live else ""
            file.write(f"### {i + 1}. {ask}\n\n{answer}{cut}\n\n")
    print(Path(args.out).read_text(), flush=True)


def curve(args):
    series = []
    for spec in args.logs:
        name, path = spec.split("=", 1)
        points = [json.loads(line) for line in open(path)]
        series.append((name, [(p["tokens"] / 1e6, p["bits_per_byte"]) for p in points]))
    wide, high, left, bottom = 720, 360, 60, 44
    most = max(x for _, points in series for x, _ in points)
    values = [y for _, points in series for x, y in points if x > 0.01 * most]
    low, top = min([*values, *args.line_values]) * 0.97, min(max([*values, *args.line_values]) * 1.03, args.top)
    x_of = lambda x: left + (wide - left - 16) * x / most
    # Logarithmic: what matters at the end is small beside what happens at the beginning.
    y_of = lambda y: 16 + (high - 16 - bottom) * math.log(top / min(y, top)) / math.log(top / low)
    colors = ["#1b6ca8", "#c2571a", "#3a7d44"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
             f'<rect width="{wide}" height="{high}" fill="white"/>']
    for i in range(6):
        y = low * (top / low) ** (i / 5)
        parts.append(f'<line x1="{left}" x2="{wide - 16}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" stroke="#ddd"/><text x="{left - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.2f}</text>')
        x = most * i / 5
        parts.append(f'<text x="{x_of(x):.1f}" y="{high - bottom + 18}" text-anchor="middle">{x:.0f}</text>')
    parts.append(f'<text x="{(left + wide) / 2}" y="{high - 8}" text-anchor="middle">training tokens, millions</text>')
    parts.append(f'<text transform="translate(14 {high / 2}) rotate(-90)" text-anchor="middle">held-out bits per byte</text>')
    for i, (name, points) in enumerate(series):
        d = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{d}" fill="none" stroke="{colors[i % 3]}" stroke-width="2"/><text x="{wide - 24}" y="{34 + 16 * i}" text-anchor="end" fill="{colors[i % 3]}">{name}: {points[-1][1]:.3f}</text>')
    for name, y in zip(args.line_names, args.line_values):
        parts.append(f'<line x1="{left}" x2="{wide - 16}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" stroke="#555" stroke-dasharray="5 4"/><text x="{left + 130}" y="{y_of(y) - 5:.1f}" fill="#555">{name}: {y:.3f}</text>')
    parts.append("</svg>")
    Path(args.out).write_text("\n".join(parts) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("measure")
    p.add_argument("--tokens", type=int, default=16384, help="tokens of a batch, about")
    p.set_defaults(run=measure)
    q = commands.add_parser("samples")
    q.add_argument("--prompts", default=str(HERE / "prompts_fixed.txt"))
    q.add_argument("--temperature", type=float, default=0.6)
    q.add_argument("--top-p", type=float, default=0.9)
    q.add_argument("--most", type=int, default=220)
    q.add_argument("--seed", type=int, default=1)
    q.set_defaults(run=samples)
    for c in (p, q):
        c.add_argument("--model", required=True)
        c.add_argument("--device", default="cpu")
        c.add_argument("--kind", default="")
    z = commands.add_parser("zstd")
    z.add_argument("--train", required=True)
    z.add_argument("--dictionary", type=int, nargs="+", default=[110, 1024])
    z.set_defaults(run=zstd)
    for c in (p, z):
        c.add_argument("--heldout", required=True)
        c.add_argument("--limit", type=int, default=0)
    c = commands.add_parser("curve")
    c.add_argument("logs", nargs="+", help="NAME=log.jsonl")
    c.add_argument("--top", type=float, default=10.0)
    c.add_argument("--line-names", nargs="*", default=[])
    c.add_argument("--line-values", nargs="*", type=float, default=[])
    c.set_defaults(run=curve)
    for c in (p, q, z, c):
        c.add_argument("--out", required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
