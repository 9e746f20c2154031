#!/usr/bin/env python3
"""Makes the Qwen3.5 goldens: tiny random checkpoints and what Hugging Face transformers computes from them.

    python scripts/goldens_qwen35.py            # writes conformance/golden/qwen35
    python scripts/goldens_qwen35.py --check    # regenerates elsewhere and compares with what is committed

Needs torch, transformers, safetensors and numpy; CPU only. docs/goldens.md says what each checkpoint is for.

Weights and token ids come from numpy's PCG64 and are the same on every machine. The expected values come from
transformers in float32 on its pure PyTorch path, loaded back from the very files that are written here. A second
implementation below (`Reference`: numpy, float64, one token at a time, written from the formulas and reading
config.json by itself) says how far float32 is from the exact result, and how large an error each plausible mistake
would make (`MISTAKES`), so that a tolerance can be chosen between the two.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5 import modeling_qwen3_5

OUT = pathlib.Path(__file__).resolve().parent.parent / "conformance" / "golden" / "qwen35"
LENGTHS = (1, 2, 3, 7, 63, 64, 65, 130, 300)
POSITIONS = (0, 1, 2, 3, 5, 15, 16, 31, 47, 61, 62, 63, 64, 65, 66, 96, 127, 128, 129, 191, 192, 255, 256, 298, 299)
PROMPT, CONTINUATION = 20, 64
SMALLEST_GAP = 5e-3  # between the two best logits, at every step of a greedy continuation
FEWEST_DISTINCT = 16  # tokens in a greedy continuation
LARGEST_NOISE = 1.5e-5  # of transformers' float32 logits, in both forms of the delta rule, against float64

FULL, LINEAR = "full_attention", "linear_attention"

# Keys: `text` goes to Qwen3_5TextConfig; `vision` makes a Qwen3_5ForConditionalGeneration; `edit` rewrites the text
# part of config.json after transformers has written it; `store` is the dtype on disk, `keep_f32` names endings that
# stay in float32 there; `mtp` adds a draft layer; `shard` splits the weights; `full` keeps the logits of every position.
CONFIGS = {
    "base": dict(
        seed=1103, full=True, debug=True,
        about="the plain layout: interval 4, grouped heads 2:1 in both mixers, config.json without layer_types",
        text=dict(vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=False,
                  rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25,
                                       mrope_section=[11, 11, 10], mrope_interleaved=True)),
        edit=dict(drop=["layer_types"], put=dict(full_attention_interval=4, attn_output_gate=True,
                                                 mamba_ssm_dtype="float32")),
    ),
    "uneven_heads": dict(
        seed=1218, shard="130KB",
        about="key size 8, value size 24, 3 heads each; query heads 4:1; kernel 3; interval 3 of 6 layers; "
              "sharded; rope_theta and partial_rotary_factor at the top level, no rope_parameters",
        text=dict(vocab_size=151, hidden_size=36, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
                  num_key_value_heads=1, head_dim=24, linear_num_key_heads=3, linear_num_value_heads=3,
                  linear_key_head_dim=8, linear_value_head_dim=24, linear_conv_kernel_dim=3, rms_norm_eps=1e-5,
                  tie_word_embeddings=False,
                  rope_parameters=dict(rope_type="default", rope_theta=50000.0, partial_rotary_factor=0.5)),
        interval=3,
        edit=dict(drop=["layer_types", "rope_parameters"],
                  put=dict(full_attention_interval=3, rope_theta=50000.0, partial_rotary_factor=0.5)),
    ),
    "attention_first": dict(
        seed=1303,
        about="explicit layer_types: attention first, a linear tail; one key head per query head; head size 64 fully "
              "rotated; biases on the attention projections; kernel 2",
        text=dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2,
                  num_key_value_heads=2, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4,
                  linear_key_head_dim=12, linear_value_head_dim=8, linear_conv_kernel_dim=2, rms_norm_eps=1e-6,
                  tie_word_embeddings=False, attention_bias=True,
                  layer_types=[FULL, LINEAR, FULL, LINEAR, LINEAR],
                  rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0)),
    ),
    "conditional": dict(
        seed=1404,
        about="Qwen3_5ForConditionalGeneration with a tiny vision tower: nested config, model.language_model prefix, "
              "tied at the top level; interval 2; wide residual (80)",
        text=dict(vocab_size=140, hidden_size=80, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=32, linear_num_key_heads=1, linear_num_value_heads=2,
                  linear_key_head_dim=32, linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=True,
                  rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5,
                                       mrope_section=[3, 3, 2], mrope_interleaved=True)),
        interval=2, vision=True,
    ),
    "conditional_bf16": dict(
        seed=1506, store="bfloat16", keep_f32=["A_log", "linear_attn.norm.weight"], mtp=True, shard="110KB",
        about="what a released checkpoint looks like: nested config, sharded bfloat16 with A_log and the gated norm in "
              "float32, vision tensors, mtp.* tensors, untied head",
        text=dict(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=False,
                  rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25,
                                       mrope_section=[1, 1, 0], mrope_interleaved=True)),
        vision=True, edit=dict(drop=[], put=dict(full_attention_interval=4, attn_output_gate=True,
                                                 mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)),
    ),
    "mtp": dict(
        seed=1606, mtp=True,
        about="mtp.* tensors in a text-only checkpoint: set aside, logits unchanged; interval 2, so layers 1 and 3 "
              "attend; query heads 2:1, linear heads 1:1",
        text=dict(vocab_size=113, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=24, linear_num_key_heads=2, linear_num_value_heads=2,
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=3, rms_norm_eps=1e-6,
                  tie_word_embeddings=False,
                  rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.5)),
        interval=2, edit=dict(drop=[], put=dict(mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)),
    ),
    "bf16": dict(
        seed=1707, store="bfloat16",
        about="bfloat16 on disk throughout; expected values in float32 after an exact upcast",
        text=dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=False,
                  rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25)),
    ),
    "f16": dict(
        seed=1845, store="float16",
        about="float16 on disk throughout; tied; four value heads per key head; the default rotary share (key absent)",
        text=dict(vocab_size=200, hidden_size=56, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=4, head_dim=16, linear_num_key_heads=1, linear_num_value_heads=4,
                  linear_key_head_dim=24, linear_value_head_dim=12, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=True, layer_types=[LINEAR, FULL, LINEAR],
                  rope_parameters=dict(rope_type="default", rope_theta=1e5)),
        edit=dict(drop=["partial_rotary_factor"], drop_rope=["partial_rotary_factor"], put={}),
    ),
    "long_memory": dict(
        seed=1909, decay=(0.003, 0.3),
        about="linear layers only, with decays near one: what the first tokens wrote still shows at position 299",
        text=dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=False, layer_types=[LINEAR, LINEAR, LINEAR],
                  rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25)),
    ),
    "attention_only": dict(
        seed=2010,
        about="full attention only: no recurrent state at all; four query heads per key head",
        text=dict(vocab_size=120, hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
                  num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-6,
                  tie_word_embeddings=False, layer_types=[FULL, FULL],
                  rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)),
    ),
}

VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, in_channels=3, patch_size=4,
              spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def draw(name, shape, rng, recipe):
    """A random tensor whose scale makes its part of the network matter. No tensor keeps its default value."""
    normal = lambda scale, mean=0.0: mean + scale * rng.standard_normal(shape)
    hidden = recipe["text"]["hidden_size"]
    if ".visual." in name:
        return normal(0.1)
    if name.endswith("embed_tokens.weight"):
        return normal(3.5 / math.sqrt(hidden) if recipe["text"]["tie_word_embeddings"] else 1.5)
    if name == "lm_head.weight":
        return normal(2.5 / math.sqrt(hidden))
    if name.endswith("A_log"):
        low, high = recipe.get("decay", (0.05, 3.0))
        return rng.uniform(math.log(low), math.log(high), shape)
    if name.endswith("dt_bias"):
        return rng.uniform(-3.0, 1.0, shape)
    if name.endswith("conv1d.weight"):
        return normal(1.2 / math.sqrt(shape[-1]))
    if name.endswith("linear_attn.norm.weight"):
        return normal(0.4, 1.0)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return normal(0.3, 0.2)
    if name in ("model.norm.weight", "model.language_model.norm.weight") and recipe["text"]["tie_word_embeddings"]:
        return normal(1.0, -1.0)  # 1 + w of either sign, or every token would predict itself
    if "norm" in name:
        return normal(0.3)
    if name.endswith(".bias"):
        return normal(0.3)
    gain = 1.5 if name.endswith("in_proj_b.weight") else 1.0
    return normal(gain / math.sqrt(shape[-1]))


def mtp_shapes(text):
    h, i, d = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * d, text["num_key_value_heads"] * d
    layer = {
        "input_layernorm": (h,), "post_attention_layernorm": (h,),
        "self_attn.q_proj": (2 * q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q), "self_attn.q_norm": (d,), "self_attn.k_norm": (d,),
        "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
    }
    top = {"fc": (h, 2 * h), "norm": (h,), "pre_fc_norm_embedding": (h,), "pre_fc_norm_hidden": (h,)}
    return {f"mtp.{k}.weight": s for k, s in top.items()} | {f"mtp.layers.0.{k}.weight": s for k, s in layer.items()}


def write_checkpoint(folder, recipe):
    rng = np.random.Generator(np.random.PCG64(recipe["seed"]))
    text = dict(recipe["text"], max_position_embeddings=4096)
    if "interval" in recipe:
        text["full_attention_interval"] = recipe["interval"]
    if recipe.get("vision"):
        config = Qwen3_5Config(text_config=text, vision_config=dict(VISION, out_hidden_size=text["hidden_size"]),
                               image_token_id=text["vocab_size"] - 1, video_token_id=text["vocab_size"] - 2,
                               vision_start_token_id=text["vocab_size"] - 4,
                               vision_end_token_id=text["vocab_size"] - 3,
                               tie_word_embeddings=text["tie_word_embeddings"])
        model = Qwen3_5ForConditionalGeneration(config)
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape), rng, recipe).astype(np.float32)))
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    store = getattr(torch, recipe.get("store", "float32"))
    model.to(store).save_pretrained(folder, max_shard_size=recipe.get("shard", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)

    shards = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    for tensors in shards.values():
        for name in tensors:
            if name.endswith(tuple(recipe.get("keep_f32", ()))):
                tensors[name] = exact[name]
    if recipe.get("mtp"):
        last = shards[max(shards)]
        for name, shape in sorted(mtp_shapes(text).items()):
            last[name] = torch.from_numpy(draw(name, shape, rng, recipe).astype(np.float32)).to(store)
    for file, tensors in shards.items():
        save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        total = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1,
                                    sort_keys=True) + "\n")

    path = folder / "config.json"
    written = json.loads(path.read_text())
    inner = written.get("text_config", written)
    edit = recipe.get("edit", {})
    for key in edit.get("drop", ()):
        inner.pop(key, None)
    for key in edit.get("drop_rope", ()):
        inner["rope_parameters"].pop(key, None)
    inner.update(edit.get("put", {}))
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def load(folder, recipe, dtype=torch.float32):
    kind = Qwen3_5ForConditionalGeneration if recipe.get("vision") else Qwen3_5ForCausalLM
    model, report = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    left_over = [n for n in report["unexpected_keys"] if not n.startswith("mtp.")]
    assert not report["missing_keys"] and not left_over and not report["mismatched_keys"], report
    assert all(p.dtype == dtype for p in model.parameters())
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------
# The second implementation

# What a port could get wrong. Each name switches one line of `Reference`; the error that it makes is reported.
MISTAKES = (
    "norms_plain_weight", "qk_norm_plain_weight", "final_norm_plain_weight", "gated_norm_zero_centred",
    "gate_before_norm", "rms_eps_1e-4", "l2_norm_missing_on_key", "l2_norm_missing_on_query", "query_scale_missing",
    "query_key_swapped", "heads_tiled", "conv_reversed", "conv_without_activation", "conv_off_by_one",
    "decay_missing", "decay_after_update", "decay_without_dt_bias", "beta_one", "delta_missing", "read_before_update",
    "state_lost_at_64", "conv_lost_at_64", "z_missing", "output_gate_missing", "output_gate_silu",
    "output_gate_halves", "rope_missing", "rope_interleaved_pairs", "rope_all_dims", "rope_last_dims",
    "rope_theta_10000", "rope_position_off_by_64", "kv_heads_tiled", "scale_missing", "attention_window_64",
    "bias_missing",
)


class Reference:
    """The text model in float64, one token at a time, straight from the formulas."""

    def __init__(self, folder, mistake=None):
        outer = json.loads((folder / "config.json").read_text())
        c = outer.get("text_config", outer)
        weights = {}
        for path in sorted(folder.glob("model*.safetensors")):
            weights.update(load_file(path))
        prefix = "model.language_model." if "text_config" in outer else "model."
        self.w = {n.removeprefix(prefix): t.double().numpy() for n, t in weights.items()
                  if n.startswith(prefix) or n == "lm_head.weight"}
        self.head = self.w.get("lm_head.weight", self.w["embed_tokens.weight"])
        self.c, self.mistake, self.eps = c, mistake, c["rms_norm_eps"]
        if mistake == "rms_eps_1e-4":
            self.eps = 1e-4
        interval = c.get("full_attention_interval", 4)
        self.layer_types = c.get("layer_types") or [
            LINEAR if (i + 1) % interval else FULL for i in range(c["num_hidden_layers"])]
        rope = c.get("rope_parameters") or {}
        self.theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
        share = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 0.25))
        if mistake == "rope_theta_10000":
            self.theta = 10000.0
        self.rotary = c["head_dim"] if mistake == "rope_all_dims" else int(c["head_dim"] * share)
        self.trace = {"decay": [], "beta": []}

    def is_(self, mistake):
        return self.mistake == mistake

    def norm(self, x, w, plain=False):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * (w if plain else 1.0 + w)

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        bias = self.w.get(name + ".bias")
        return y if bias is None or self.is_("bias_missing") else y + bias

    def rope(self, x):  # [T, heads, d]
        if self.is_("rope_missing"):
            return x
        r, t = self.rotary, len(x)
        pos = np.arange(t)
        if self.is_("rope_position_off_by_64"):
            pos = np.where(pos >= 64, pos - 64, pos)
        angle = pos[:, None] * self.theta ** (-np.arange(0, r, 2) / r)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        start = x.shape[-1] - r if self.is_("rope_last_dims") else 0
        y = x.copy()
        if self.is_("rope_interleaved_pairs"):
            first, second = slice(start, start + r, 2), slice(start + 1, start + r, 2)
        else:
            first, second = slice(start, start + r // 2), slice(start + r // 2, start + r)
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y

    def repeat(self, x, times, tiled):
        return np.concatenate([x] * times, axis=1) if tiled else np.repeat(x, times, axis=1)

    def attention(self, x, p):
        c, t = self.c, len(x)
        nq, nkv, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        qg = self.linear(x, p + "q_proj")
        if self.is_("output_gate_halves"):
            q, gate = qg[:, : nq * d].reshape(t, nq, d), qg[:, nq * d :].reshape(t, nq, d)
        else:
            q, gate = np.split(qg.reshape(t, nq, 2 * d), 2, axis=-1)
        k = self.linear(x, p + "k_proj").reshape(t, nkv, d)
        v = self.linear(x, p + "v_proj").reshape(t, nkv, d)
        plain = self.is_("qk_norm_plain_weight")
        q = self.rope(self.norm(q, self.w[p + "q_norm.weight"], plain))
        k = self.rope(self.norm(k, self.w[p + "k_norm.weight"], plain))
        k, v = (self.repeat(u, nq // nkv, self.is_("kv_heads_tiled")) for u in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * (1.0 if self.is_("scale_missing") else d**-0.5)
        seen = np.tril(np.ones((t, t), bool))
        if self.is_("attention_window_64"):
            seen &= ~np.tril(np.ones((t, t), bool), -64)
        scores = np.where(seen, scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hts,shd->thd", probs / probs.sum(-1, keepdims=True), v)
        if self.is_("output_gate_silu"):
            out = out * gate * sigmoid(gate)
        elif not self.is_("output_gate_missing"):
            out = out * sigmoid(gate)
        return self.linear(out.reshape(t, nq * d), p + "o_proj")

    def delta_net(self, x, p):
        c, t = self.c, len(x)
        hk, hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        dk, dv, kernel = c["linear_key_head_dim"], c["linear_value_head_dim"], c["linear_conv_kernel_dim"]
        u = self.linear(x, p + "in_proj_qkv")
        taps = self.w[p + "conv1d.weight"][:, 0]
        taps = taps[:, ::-1] if self.is_("conv_reversed") else taps
        shift = 1 if self.is_("conv_off_by_one") else 0
        y = np.zeros_like(u)
        for back in range(kernel):
            tap = taps[:, kernel - 1 - back]
            for s in range(back + shift, t):
                if self.is_("conv_lost_at_64") and s - back < 64 <= s:
                    continue
                y[s] += tap * u[s - back - shift]
        if not self.is_("conv_without_activation"):
            y = y * sigmoid(y)
        q, k, v = np.split(y, [hk * dk, 2 * hk * dk], axis=-1)
        if self.is_("query_key_swapped"):
            q, k = k, q
        q, k, v = q.reshape(t, hk, dk), k.reshape(t, hk, dk), v.reshape(t, hv, dv)
        q, k = (self.repeat(r, hv // hk, self.is_("heads_tiled")) for r in (q, k))
        unit = lambda r: r / np.sqrt((r * r).sum(-1, keepdims=True) + 1e-6)
        q = q if self.is_("l2_norm_missing_on_query") else unit(q)
        k = k if self.is_("l2_norm_missing_on_key") else unit(k)
        q = q if self.is_("query_scale_missing") else q * dk**-0.5
        beta = sigmoid(self.linear(x, p + "in_proj_b"))
        if self.is_("beta_one"):
            beta = np.ones_like(beta)
        bias = 0.0 if self.is_("decay_without_dt_bias") else self.w[p + "dt_bias"]
        decay = np.exp(-np.exp(self.w[p + "A_log"]) * np.logaddexp(0.0, self.linear(x, p + "in_proj_a") + bias))
        if self.is_("decay_missing"):
            decay = np.ones_like(decay)
        self.trace["decay"].append(decay)
        self.trace["beta"].append(beta)
        state, out = np.zeros((hv, dk, dv)), np.zeros((t, hv, dv))
        for s in range(t):
            if self.is_("state_lost_at_64") and s == 64:
                state[:] = 0.0
            late = self.is_("decay_after_update")
            if not late:
                state = state * decay[s][:, None, None]
            if self.is_("read_before_update"):
                out[s] = np.einsum("hkv,hk->hv", state, q[s])
            held = np.einsum("hkv,hk->hv", state, k[s]) * (0.0 if self.is_("delta_missing") else 1.0)
            state = state + k[s][:, :, None] * ((v[s] - held) * beta[s][:, None])[:, None, :]
            if late:
                state = state * decay[s][:, None, None]
            if not self.is_("read_before_update"):
                out[s] = np.einsum("hkv,hk->hv", state, q[s])
        z = self.linear(x, p + "in_proj_z").reshape(t, hv, dv)
        z = np.ones_like(z) if self.is_("z_missing") else z * sigmoid(z)
        w = self.w[p + "norm.weight"]
        if self.is_("gate_before_norm"):
            out = self.norm(out * z, w, plain=True)
        else:
            out = self.norm(out, w, plain=not self.is_("gated_norm_zero_centred")) * z
        return self.linear(out.reshape(t, hv * dv), p + "out_proj")

    def logits(self, ids):
        x = self.w["embed_tokens.weight"][ids]
        plain = self.is_("norms_plain_weight")
        for i, kind in enumerate(self.layer_types):
            p = f"layers.{i}."
            h = self.norm(x, self.w[p + "input_layernorm.weight"], plain)
            x = x + (self.attention(h, p + "self_attn.") if kind == FULL else self.delta_net(h, p + "linear_attn."))
            h = self.norm(x, self.w[p + "post_attention_layernorm.weight"], plain)
            gate = self.linear(h, p + "mlp.gate_proj")
            x = x + self.linear(gate * sigmoid(gate) * self.linear(h, p + "mlp.up_proj"), p + "mlp.down_proj")
        return self.norm(x, self.w["norm.weight"], self.is_("final_norm_plain_weight")) @ self.head.T


def sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def distance(got, exact):
    """Largest absolute difference over the root mean square of the exact values: the relative error used throughout."""
    return float(np.abs(np.asarray(got, np.float64) - exact).max() / np.sqrt((exact * exact).mean()))


# ---------------------------------------------------------------------------------------------------------------
# Expected values


@torch.no_grad()
def all_logits(model, ids, **more):
    return model(input_ids=torch.as_tensor(ids)[None], use_cache=False, **more).logits[0]


@contextlib.contextmanager
def recurrent_form():
    """Whole sequences go through the one-token-at-a-time form of the delta rule instead of the chunked one."""
    chunked = modeling_qwen3_5.torch_chunk_gated_delta_rule
    modeling_qwen3_5.torch_chunk_gated_delta_rule = modeling_qwen3_5.torch_recurrent_gated_delta_rule
    try:
        yield
    finally:
        modeling_qwen3_5.torch_chunk_gated_delta_rule = chunked


@torch.no_grad()
def greedy(model, prompt, steps):
    # Without an attention layer transformers cannot tell how long its cache is: give positions and masks (none needed).
    blind = FULL not in model.config.get_text_config().layer_types
    where = lambda start, n: dict(position_ids=torch.arange(start, start + n)[None],
                                  attention_mask={FULL: None, LINEAR: None}) if blind else {}
    out = model(input_ids=torch.as_tensor(prompt)[None], use_cache=True, logits_to_keep=1, **where(0, len(prompt)))
    ids, gaps = [], []
    for step in range(steps):
        last = out.logits[0, -1]
        best = last.topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if step + 1 < steps:
            out = model(input_ids=torch.tensor([[ids[-1]]]), past_key_values=out.past_key_values, use_cache=True,
                        logits_to_keep=1, **where(len(prompt) + step, 1))
    return ids, gaps, last


def find_continuation(model, vocab, seed):
    """The first prompt seed whose greedy path has no near ties and does not just repeat itself."""
    for attempt in range(100):
        prompt_seed = seed * 1000 + attempt
        prompt = np.random.Generator(np.random.PCG64(prompt_seed)).integers(0, vocab, PROMPT)
        ids, gaps, last = greedy(model, prompt, CONTINUATION)
        if min(gaps) > SMALLEST_GAP and len(set(ids)) >= FEWEST_DISTINCT:
            return prompt_seed, prompt, ids, gaps, last
    raise SystemExit("no greedy continuation without near ties; change the weights' seed")


@torch.no_grad()
def debug_tensors(model, length, ids):
    """What flows between the modules of the text model, by module name, plus the state left in the cache."""
    out, hooks = {}, []
    text = model.get_decoder()
    for name, module in text.named_modules():
        if not name or name in ("layers", "rotary_emb") or name.endswith(("act_fn", "conv1d")):
            continue
        coarse = name in ("embed_tokens", "norm") or name.count(".") == 1
        if length > 7 and not coarse:
            continue

        def keep(_, __, result, name=name):
            result = result[0] if isinstance(result, tuple) else result
            out[f"len_{length}.{name}"] = result.detach().clone()

        hooks.append(module.register_forward_hook(keep))
    cache = model(input_ids=torch.as_tensor(ids)[None], use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "recurrent_states"):
            out[f"len_{length}.cache.{i}.conv"] = layer.conv_states[0]
            out[f"len_{length}.cache.{i}.recurrent"] = layer.recurrent_states[0]
        else:
            out[f"len_{length}.cache.{i}.key"] = layer.keys
            out[f"len_{length}.cache.{i}.value"] = layer.values
    # Batch is always one. The gated norm sees its heads as rows: [tokens * heads, value size].
    return {n: (t if n.endswith("linear_attn.norm") else t[0]).float().contiguous().clone() for n, t in out.items()}


def expected_values(folder, recipe):
    model, exact = load(folder, recipe), Reference(folder)
    vocab = recipe["text"]["vocab_size"]
    usable = vocab - 4 if recipe.get("vision") else vocab  # the last four are the vision tokens there
    tensors, error, recurrent = {}, {}, {}
    for length in LENGTHS:
        ids = np.random.Generator(np.random.PCG64([recipe["seed"], length])).integers(0, usable, length)
        positions = [p for p in range(length) if recipe.get("full") or length <= 7 or p in POSITIONS or p == length - 1]
        logits = all_logits(model, ids)
        want = exact.logits(ids)
        error[str(length)] = distance(logits.numpy(), want)
        if LINEAR in exact.layer_types:
            with recurrent_form():
                recurrent[str(length)] = distance(all_logits(model, ids).numpy(), want)
        tensors[f"len_{length}.input_ids"] = torch.as_tensor(ids, dtype=torch.int32)
        tensors[f"len_{length}.positions"] = torch.tensor(positions, dtype=torch.int32)
        tensors[f"len_{length}.logits"] = logits[positions].clone()
        if length == 130:
            probe, probe_logits = ids, logits.numpy()

    prompt_seed, prompt, ids, gaps, last = find_continuation(model, usable, recipe["seed"])
    path = np.concatenate([prompt, ids])
    again = exact.logits(path[:-1])[PROMPT - 1 :]
    assert again.argmax(-1).tolist() == ids, "the float64 path differs"
    error["continuation"] = distance(last.numpy(), again[-1])
    tensors |= {
        "greedy.prompt": torch.as_tensor(prompt, dtype=torch.int32),
        "greedy.ids": torch.tensor(ids, dtype=torch.int32),
        "greedy.gaps": torch.tensor(gaps, dtype=torch.float32),
        "greedy.last_logits": last.clone(),
    }

    if recipe.get("vision"):  # the text class must read the same folder to the same numbers
        text_only = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        assert distance(all_logits(text_only.eval(), probe).numpy(), probe_logits.astype(np.float64)) < 1e-5

    mistakes = {}
    for mistake in MISTAKES:
        got = Reference(folder, mistake).logits(probe)
        mistakes[mistake] = float(f"{distance(got, probe_logits.astype(np.float64)):.3g}")
    changed = probe.copy()
    changed[0] = (changed[0] + 1) % usable
    reach = np.abs(exact.logits(changed) - exact.logits(probe)).max(-1)
    exact.trace = {"decay": [], "beta": []}
    spread = exact.logits(probe).std(-1)
    quantiles = lambda name: [float(f"{q:.3g}") for q in np.quantile(
        np.concatenate([a.ravel() for a in exact.trace[name]]), [0.01, 0.1, 0.5, 0.9, 0.99])] if exact.trace[name] else None
    noise = max(*error.values(), *recurrent.values())
    assert noise < LARGEST_NOISE, f"float32 noise {noise:.2e}: change the weights' seed"
    facts = {
        "float32_error": {k: float(f"{v:.3g}") for k, v in error.items()},
        "float32_error_recurrent_form": {k: float(f"{v:.3g}") for k, v in recurrent.items()},
        "largest_float32_error": float(f"{noise:.3g}"),
        "mistakes": mistakes,
        "logits_standard_deviation": float(f"{spread.mean():.3g}"),
        "decay_quantiles_1_10_50_90_99": quantiles("decay"),
        "beta_quantiles_1_10_50_90_99": quantiles("beta"),
        "change_of_token_0_seen_at_64_and_129": [float(f"{reach[p]:.3g}") for p in (64, 129)],
        "greedy": {"prompt_seed": prompt_seed, "smallest_gap": float(f"{min(gaps):.3g}"), "distinct": len(set(ids))},
    }
    if recipe.get("store"):  # the same forward in the stored dtype, for scale; not a golden
        low = load(folder, recipe, getattr(torch, recipe["store"]))
        facts["error_if_computed_in_stored_dtype"] = float(
            f"{distance(all_logits(low, probe).float().numpy(), probe_logits.astype(np.float64)):.3g}")
    debug = None
    if recipe.get("debug"):
        debug = {}
        for length in (7, 65):
            debug |= debug_tensors(model, length, tensors[f"len_{length}.input_ids"].long())
    return tensors, debug, facts


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(out):
    manifest = {"made_by": "scripts/goldens_qwen35.py", "numpy": np.__version__, "torch": torch.__version__.split("+")[0],
                "transformers": transformers.__version__, "compute": "float32, cpu, 1 thread, eager attention",
                "error_measure": "max |got - expected| / rms(expected), over all stored or computed logits of one input",
                "configs": {}}
    precision = {}
    for name, recipe in CONFIGS.items():
        folder = out / name
        folder.mkdir(parents=True)
        write_checkpoint(folder, recipe)
        tensors, debug, facts = expected_values(folder, recipe)
        save_file(dict(sorted(tensors.items())), folder / "expected.safetensors")
        if debug:
            save_file(dict(sorted(debug.items())), folder / "debug.safetensors")
        files = sorted(folder.iterdir())
        manifest["configs"][name] = {
            "about": recipe["about"], "seed": recipe["seed"], "greedy": facts.pop("greedy"),
            "layer_types": Reference(folder).layer_types, "stored_dtype": recipe.get("store", "float32"),
            "files": {f.name: {"bytes": f.stat().st_size, "sha256": digest(f)} for f in files},
        }
        precision[name] = facts
        missed = [m for m, e in facts["mistakes"].items() if e < 1e-3]
        print(f"{name:18} {sum(f.stat().st_size for f in files) / 1024:6.0f} KiB  f32 error "
              f"{facts['largest_float32_error']:.1e}  reach {facts['change_of_token_0_seen_at_64_and_129']}  "
              f"decay {facts['decay_quantiles_1_10_50_90_99']}  blind to {missed}", flush=True)
    best = {m: max((precision[c]["mistakes"][m], c) for c in precision) for m in MISTAKES}
    summary = {"largest_float32_error": max(p["largest_float32_error"] for p in precision.values()),
               "mistakes_seen_best": {m: {"config": c, "error": e} for m, (e, c) in best.items()}}
    (out / "precision.json").write_text(json.dumps({"summary": summary, "configs": precision}, indent=1) + "\n")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print("largest float32 error", summary["largest_float32_error"])
    print("mistakes, best seen:", {m: f"{e:.1e} {c}" for m, (e, c) in best.items()})
    return manifest


def check(out):
    """Checkpoints must come out byte for byte; expected values within a tenth of the conformance tolerance."""
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        made = make(pathlib.Path(scratch))
        kept = json.loads((out / "manifest.json").read_text())
        for name, config in made["configs"].items():
            for file, entry in config["files"].items():
                there = digest(out / name / file)
                if there != kept["configs"][name]["files"][file]["sha256"]:
                    bad += 1
                    print(f"not what manifest.json says: {name}/{file}")
                same = there == entry["sha256"]
                if same:
                    continue
                if file not in ("expected.safetensors", "debug.safetensors"):
                    same = False
                else:
                    a, b = load_file(out / name / file), load_file(pathlib.Path(scratch) / name / file)
                    same = a.keys() == b.keys() and all(
                        torch.equal(a[k], b[k]) if a[k].dtype == torch.int32
                        else distance(b[k].numpy(), a[k].double().numpy()) < 1e-5 for k in a)
                if not same:
                    bad += 1
                    print(f"differs: {name}/{file}")
    print("differences:", bad)
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of replacing it")
    args = parser.parse_args()
    for package in ("fla", "causal_conv1d"):
        if importlib.util.find_spec(package):
            sys.exit(f"{package} is installed: transformers would use it instead of its PyTorch path")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if args.check:
        sys.exit(1 if check(args.out) else 0)
    if args.out.exists():
        shutil.rmtree(args.out)
    make(args.out)


if __name__ == "__main__":
    main()
