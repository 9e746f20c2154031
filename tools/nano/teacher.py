"""SmolLM2-135M as one decode step over a static cache, for many streams at once.

Every stream has a slot with its own position and a script: tokens that are forced, and numbers that mean "now sample an
answer of at most so many tokens". The step runs wholly on the device and never changes its shapes, so that on a GPU it
is captured once as a CUDA graph and replayed.
"""

import re

import torch
import torch.nn.functional as F

from gguf_file import GgufFile

HEADS, GROUPS, WIDTH, LAYERS = 9, 3, 64, 30
THETA, EPS = 100_000.0, 1e-5
EOS = 2
SAMPLED = 1 << 20


class Teacher:
    def __init__(self, path, slots, length, script, device, dtype, temperature=0.7, min_p=0.08, penalty=0.25, partial=False):
        self.device, self.dtype, self.slots, self.length = device, dtype, slots, length
        self.temperature, self.min_p, self.penalty = temperature, min_p, penalty
        file = GgufFile(path, partial)

        def tensor(name, kind=dtype):
            return torch.from_numpy(file.tensor(name)).to(device=device, dtype=kind)

        self.embedding = tensor("token_embd.weight")
        # Only these are sampled: plain ASCII text, and the end of an answer.
        allowed = [i for i, text in enumerate(file.fields["tokenizer.ggml.tokens"]) if i == EOS or (i > 16 and re.fullmatch("[!-~ĠĊ]+", text))]
        self.ban = torch.full((len(self.embedding),), -1e9, device=device)
        self.ban[allowed] = 0.0
        self.back = torch.arange(64, device=device)
        self.final = tensor("output_norm.weight")
        self.blocks = []
        for i in range(LAYERS):
            b = f"blk.{i}."
            qkv = torch.cat([tensor(b + f"attn_{n}.weight") for n in "qkv"])
            up = torch.cat([tensor(b + "ffn_gate.weight"), tensor(b + "ffn_up.weight")])
            self.blocks.append((tensor(b + "attn_norm.weight"), qkv, tensor(b + "attn_output.weight"),
                                tensor(b + "ffn_norm.weight"), up, tensor(b + "ffn_down.weight")))
        shape = (slots, GROUPS, length, WIDTH)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(LAYERS)]
        self.vals = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(LAYERS)]
        angle = torch.arange(length, device=device)[:, None] * THETA ** (-torch.arange(0, WIDTH, 2, device=device) / WIDTH)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.rows = torch.arange(slots, device=device)
        self.places = torch.arange(length, device=device)

        def integers(*shape):
            return torch.zeros(shape, device=device, dtype=torch.long)

        self.token, self.position, self.cursor, self.left = (integers(slots) for _ in range(4))
        self.script = integers(slots, script)
        self.record = integers(slots, length)
        self.idle = torch.ones(slots, device=device, dtype=torch.bool)
        self.attention = self.attention_sdpa

    # Attention: two ways to say the same, because which is faster depends on the device and the library.
    def attention_sdpa(self, q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, GROUPS, HEADS // GROUPS, -1))

    def attention_bmm(self, q, k, v, bias):
        scores = torch.matmul(q * WIDTH**-0.5, k.transpose(2, 3)).float() + bias.float()
        return torch.matmul(scores.softmax(-1).to(q.dtype), v)

    def norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, EPS)

    def rotate(self, x, cos, sin):
        """Pairs of neighbours, as the GGUF file orders the rows of Q and K."""
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    def logits(self):
        x = self.embedding[self.token]
        cos, sin = self.cos[self.position][:, None], self.sin[self.position][:, None]
        hidden = self.places[None] > self.position[:, None]
        bias = torch.zeros(hidden.shape, device=self.device, dtype=self.dtype).masked_fill_(hidden, -30000.0)[:, None, None]
        for (n1, qkv, out, n2, up, down), keys, vals in zip(self.blocks, self.keys, self.vals):
            y = F.linear(self.norm(x, n1), qkv).view(self.slots, HEADS + 2 * GROUPS, WIDTH)
            q = self.rotate(y[:, :HEADS], cos, sin)
            keys[self.rows, :, self.position] = self.rotate(y[:, HEADS : HEADS + GROUPS], cos, sin)
            vals[self.rows, :, self.position] = y[:, HEADS + GROUPS :]
            o = self.attention(q.view(self.slots, GROUPS, HEADS // GROUPS, WIDTH), keys, vals, bias)
            x = x + F.linear(o.reshape(self.slots, -1), out)
            gate, value = F.linear(self.norm(x, n2), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, down)
        return F.linear(self.norm(x, self.final), self.embedding).float()

    def sample(self, logits):
        # A token loses by how often it is among the last 64: the teacher is small and falls into loops.
        recent = (self.position[:, None] - self.back).clamp(min=0)
        recent = self.record.gather(1, recent) & (SAMPLED - 1)
        logits = logits + self.ban
        logits.scatter_add_(1, recent, torch.full_like(recent, -self.penalty, dtype=logits.dtype))
        p = (logits / self.temperature).softmax(-1)
        p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def step(self):
        """One token of every stream that is not idle."""
        drawn = self.sample(self.logits())
        forced = self.script.gather(1, self.cursor[:, None])[:, 0]
        waiting = self.left == 0
        left = torch.where(waiting & (forced < 0), -forced, self.left)
        sampling = left > 0
        cut = left == 1  # the answer's last place: the end token goes there, whatever was drawn
        ends = sampling & ((drawn == EOS) | cut)
        token = torch.where(sampling, torch.where(cut, EOS, drawn), forced.clamp(min=0))
        stop = waiting & (forced == 0)
        idle = self.idle | stop
        self.cursor.add_((waiting & (forced != 0) & ~self.idle).long())
        self.left.copy_(torch.where(ends | idle, 0, left - sampling.long()))
        self.position.add_((~idle).long())
        self.token.copy_(torch.where(idle, EOS, token))
        mark = token + SAMPLED * (sampling & ((drawn == EOS) | ~cut)).long()
        place = self.position[:, None]
        old = self.record.gather(1, place)[:, 0]
        self.record.scatter_(1, place, torch.where(idle, old, mark)[:, None])
        self.idle.copy_(idle)

    def prefix(self, tokens):
        """Runs `tokens` through every slot; they stay in the cache, and streams start behind them."""
        self.idle.fill_(False)
        for i, token in enumerate(tokens):
            self.token.fill_(token)
            self.position.fill_(i)
            self.logits()
        self.start = len(tokens)
        self.position.fill_(self.start)
        self.cursor.zero_()
        self.left.zero_()
        self.idle.fill_(True)

    def refill(self, rows, scripts):
        """Puts new scripts into slots; a script's first entry is a token."""
        rows = torch.as_tensor(rows).to(self.device)
        scripts = torch.as_tensor(scripts).long().to(self.device)
        self.script[rows] = scripts
        self.token[rows] = scripts[:, 0]
        self.position[rows] = self.start
        self.cursor[rows] = 1
        self.left[rows] = 0
        self.record[rows, self.start] = scripts[:, 0]
        self.idle[rows] = False
