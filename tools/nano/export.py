"""Writes the Hugging Face folder: config.json, model.safetensors in bf16, tokenizer files with the chat template."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import model as M
import programs

HEAD, TAIL = json.dumps(programs.TOOLS_HEAD), json.dumps(programs.TOOLS_TAIL)
TEMPLATE = (
    "{%- set head = " + HEAD + " %}\n"
    "{%- set tail = " + TAIL + " %}\n"
    r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- head }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- tail + '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.content %}
            {{- message.content + '\n' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {%- if not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
)


def export(weights, tokenizer, out, kind=""):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = M.small(kind)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})
    shutil.copy(tokenizer, out / "tokenizer.json")
    tokens = {t["content"]: t for t in json.loads(Path(tokenizer).read_text())["added_tokens"]}
    end, text_end = tokens["<|im_end|>"]["id"], tokens["<|endoftext|>"]["id"]

    def write(name, value):
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    write("config.json", config.huggingface([end, text_end]))
    write("generation_config.json", {"eos_token_id": [end, text_end], "pad_token_id": text_end, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40})
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings, "clean_up_tokenization_spaces": False,
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens.values()},
        "chat_template": TEMPLATE,
    })
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, {len(state)} tensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="model.pt of train.py")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--kind", default="")
    args = parser.parse_args()
    export(args.weights, args.tokenizer, args.out, args.kind)
