"""Perplexity of SmolLM2-135M-Instruct (Q4_1, dequantised to float32) by Hugging Face transformers.

    pip install torch==2.11.0 transformers==5.17.0 gguf accelerate
    ampoule tokenize --model smollm2 --file conformance/golden/perplexity/kjv.txt > /tmp/ids
    python scripts/golden_perplexity.py models/SmolLM2-135M-Instruct.Q4_1.gguf /tmp/ids

Reads conformance/golden/perplexity/kjv.txt (King James Version, public domain: passages of Genesis, Psalms,
Ecclesiastes, Ruth, Jonah, Luke, Proverbs, Job) in one window, writes smollm2.json beside it: the token ids, the mean
negative log-likelihood of tokens 1.. given those before, and the logits' log-probability of each token.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM

root = pathlib.Path(__file__).resolve().parent.parent / "conformance/golden"
model_file = pathlib.Path(sys.argv[1]).resolve()
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(str(model_file.parent), gguf_file=model_file.name, dtype=torch.float32)
model.eval()
ids = [int(t) for t in pathlib.Path(sys.argv[2]).read_text().replace(",", " ").split()]
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0].float()
    scores = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
nll = -scores.mean().item()
out = {
    "model": model_file.name,
    "tokens": len(ids),
    "mean_nll": nll,
    "perplexity": float(torch.tensor(nll).exp()),
    "last_logits_norm": logits[-1].norm().item(),
    "first_log_probabilities": [round(s, 6) for s in scores[:64].tolist()],
}
(root / "perplexity/smollm2.json").write_text(json.dumps(out, indent=1) + "\n")
print(out["tokens"], out["mean_nll"], out["perplexity"])
