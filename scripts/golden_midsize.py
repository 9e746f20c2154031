#!/usr/bin/env python3
"""Makes one mid-size Qwen3.5 golden, too large to commit, for checks on a GPU.

    python scripts/golden_midsize.py OUT --device cuda

OUT becomes a Hugging Face folder: about 220 million random bfloat16 weights in head sizes that released models use,
and `expected.safetensors` with what transformers computes from them in float32 (upcast, no TF32, PyTorch path): the
logits of every position of a 2048-token input and a greedy continuation. Weights and ids come from numpy's PCG64, so
two machines make the same checkpoint. `--exact` adds the distance to the float64 implementation (slow, on the CPU).
"""

import argparse
import importlib.util
import json
import logging
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import goldens_qwen35 as goldens

TEXT = dict(vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=2, head_dim=256, linear_num_key_heads=8, linear_num_value_heads=16,
            linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
            tie_word_embeddings=False, full_attention_interval=4,
            rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25,
                                 mrope_section=[11, 11, 10], mrope_interleaved=True))
RECIPE = dict(seed=31337, text=TEXT, store="bfloat16", keep_f32=["A_log", "linear_attn.norm.weight"], shard="150MB")
TOKENS, PROMPT, CONTINUATION = 2048, 200, 128


@torch.no_grad()
def greedy(model, prompt, steps):
    out = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    ids, gaps = [], []
    for _ in range(steps):
        best = out.logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        out = model(input_ids=best.indices[None, :1], past_key_values=out.past_key_values, use_cache=True)
    return ids, gaps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--exact", action="store_true", help="also measure the float32 error against float64")
    args = parser.parse_args()
    for package in ("fla", "causal_conv1d"):
        if importlib.util.find_spec(package):
            sys.exit(f"{package} is installed: transformers would use it instead of its PyTorch path")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")

    began = time.monotonic()
    stage = lambda what: print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)
    args.out.mkdir(parents=True)
    goldens.write_checkpoint(args.out, RECIPE)
    stage("checkpoint written")
    model = goldens.load(args.out, RECIPE).to(args.device)
    rng = np.random.Generator(np.random.PCG64([RECIPE["seed"], TOKENS]))
    ids = rng.integers(0, TEXT["vocab_size"], TOKENS)
    on_device = torch.as_tensor(ids, device=args.device)
    logits = goldens.all_logits(model, on_device).cpu()
    stage("logits, chunked form")
    with goldens.recurrent_form():
        other = goldens.all_logits(model, on_device).cpu()
    stage("logits, recurrent form")
    continued, gaps = greedy(model, on_device[:PROMPT], CONTINUATION)
    stage("greedy continuation")

    facts = {
        "made_by": "scripts/golden_midsize.py", "seed": RECIPE["seed"], "device": args.device.split(":")[0],
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "chunked_against_recurrent": goldens.distance(other.numpy(), logits.double().numpy()),
        "smallest_gap": min(gaps), "distinct": len(set(continued)),
    }
    # The same forward in bfloat16, for scale: what a backend is held against that computes so.
    low = goldens.all_logits(goldens.load(args.out, RECIPE, torch.bfloat16).to(args.device), on_device).cpu().double()
    facts["if_computed_in_bfloat16"] = {
        "frobenius": float(f"{((low - logits).norm() / logits.double().norm()).item():.3g}"),
        "top_1": f"{(low.argmax(-1) == logits.argmax(-1)).sum().item()}/{TOKENS}",
    }
    stage("logits in bfloat16")
    if args.exact:
        exact = goldens.Reference(args.out).logits(ids)
        facts["float32_error"] = goldens.distance(logits.numpy(), exact)
        facts["float32_error_recurrent_form"] = goldens.distance(other.numpy(), exact)
        stage("float64")
    save_file({
        "greedy.gaps": torch.tensor(gaps),
        "greedy.ids": torch.tensor(continued, dtype=torch.int32),
        "greedy.prompt": torch.as_tensor(ids[:PROMPT], dtype=torch.int32),
        f"len_{TOKENS}.input_ids": torch.as_tensor(ids, dtype=torch.int32),
        f"len_{TOKENS}.logits": logits.contiguous(),
        f"len_{TOKENS}.positions": torch.arange(TOKENS, dtype=torch.int32),
    }, args.out / "expected.safetensors")
    facts["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": goldens.digest(f)}
                      for f in sorted(args.out.iterdir())}
    (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    stage("done")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
