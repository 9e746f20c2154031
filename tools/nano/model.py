"""The model that is trained: Qwen3.5's text model, with its names, and a head for the token after next (`mtp.*`).

Written for training speed with plain PyTorch: the gated delta rule is computed in chunks of 64 in which everything but
one small product for each chunk runs in parallel. `reference_rule` is the definition, token by token; `python model.py`
compares the two, and the whole model with transformers' Qwen3_5ForCausalLM.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 64


@dataclass
class Config:
    vocab_size: int = 4096
    hidden_size: int = 320
    intermediate_size: int = 896
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.25
    max_position_embeddings: int = 4096

    def layer_types(self):
        return ["full_attention" if (i + 1) % self.full_attention_interval == 0 else "linear_attention" for i in range(self.num_hidden_layers)]

    def huggingface(self, eos):
        rope = {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        own = {k: v for k, v in asdict(self).items() if k not in ("rope_theta", "partial_rotary_factor")}
        return {
            "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", **own, "layer_types": self.layer_types(), "rope_parameters": rope,
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "tie_word_embeddings": True,
            "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "initializer_range": 0.02, "use_cache": True, "dtype": "bfloat16",
            "bos_token_id": None, "eos_token_id": eos[0], "pad_token_id": eos[-1],
        }


def small(kind=None):
    """The configuration, or a miniature for tests."""
    if kind == "tiny":
        return Config(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                      head_dim=32, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=32, linear_value_head_dim=32)
    if kind == "attention":  # the control: every layer attends; four key heads make up for the missing gates and convolution
        return Config(full_attention_interval=1, num_key_value_heads=4)
    if kind == "tiny-attention":
        return Config(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
                      head_dim=32, full_attention_interval=1)
    return Config()


# The type of matrix products; float32 on a CPU.
COMPUTE = torch.bfloat16


class Linear(nn.Linear):
    def __init__(self, n, m):
        super().__init__(n, m, bias=False)

    def forward(self, x):
        return F.linear(x.to(COMPUTE), self.weight.to(COMPUTE))


class Norm(nn.Module):
    """RMS norm whose weight is an offset from one."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class GatedNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x, z):
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)) * F.silu(z.float())


# The two steps of the delta rule that are opaque to the compiler. ----------------------------------------------------


@torch.library.custom_op("nano::inverse", mutates_args=())
def inverse(a: torch.Tensor) -> torch.Tensor:
    """(I + a)^-1 of strictly lower triangular matrices [..., 64, 64] in float32.

    Blocks of 16 by the product of I + (-a)^(2^i), which is exact for nilpotent matrices and stays small at this size;
    larger blocks by the formula for the inverse of a 2 x 2 block triangular matrix.
    """
    n, size = a.shape[-1], 16
    count = n // size
    shape = a.shape[:-2]
    a = a.reshape(-1, n, n)
    eye = torch.eye(size, device=a.device, dtype=a.dtype)
    diagonal = torch.stack([a[:, i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)], 1)
    power, out = -diagonal, eye - diagonal
    for _ in range(3):
        power = power @ power
        out = out + out @ power
    full = torch.zeros(a.shape, device=a.device, dtype=a.dtype)
    for i in range(count):
        full[:, i * size : (i + 1) * size, i * size : (i + 1) * size] = out[:, i]
    while size < n:
        for i in range(0, n, 2 * size):
            top, low = slice(i, i + size), slice(i + size, i + 2 * size)
            full[:, low, top] = -(full[:, low, low] @ a[:, low, top] @ full[:, top, top])
        size *= 2
    return full.view(*shape, n, n)


@inverse.register_fake
def _(a):
    return torch.empty(a.shape, dtype=a.dtype, device=a.device)


def _inverse_setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _inverse_back(ctx, grad):
    (t,) = ctx.saved_tensors
    t = t.transpose(-1, -2)
    return -(t @ grad.contiguous() @ t).tril(-1)


inverse.register_autograd(_inverse_back, setup_context=_inverse_setup)


@torch.library.custom_op("nano::scan", mutates_args=())
def scan(m: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The states before each chunk: s[0] = 0, s[n + 1] = m[n] s[n] + b[n]; m [N, B, K, K], b [N, B, K, V]."""
    s = torch.empty(b.shape, device=b.device, dtype=b.dtype)
    s[0].zero_()
    for n in range(len(b) - 1):
        torch.baddbmm(b[n], m[n], s[n], out=s[n + 1])
    return s


@scan.register_fake
def _(m, b):
    return torch.empty(b.shape, device=b.device, dtype=b.dtype)


@torch.library.custom_op("nano::scan_back", mutates_args=())
def scan_back(m: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of b: d[n] = grad[n + 1] + m[n + 1]^T d[n + 1], with d[N - 1] = 0."""
    d = torch.empty(grad.shape, device=grad.device, dtype=grad.dtype)
    d[-1].zero_()
    t = m.transpose(-1, -2)
    for n in range(len(grad) - 2, -1, -1):
        torch.baddbmm(grad[n + 1], t[n + 1], d[n + 1], out=d[n])
    return d


@scan_back.register_fake
def _(m, grad):
    return torch.empty(grad.shape, device=grad.device, dtype=grad.dtype)


def _scan_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _scan_back(ctx, grad):
    m, s = ctx.saved_tensors
    d = scan_back(m, grad.contiguous())
    return d @ s.transpose(-1, -2), d


scan.register_autograd(_scan_back, setup_context=_scan_setup)


def delta_rule(q, k, v, beta, g):
    """Gated delta rule over [B, T, H, D], float32; beta and g (log decay) [B, T, H]. T is a multiple of 64."""
    batch, length, heads, width = v.shape
    n = length // CHUNK

    def chunks(x):  # [N, B, H, C, ...]
        return x.reshape(batch, n, CHUNK, heads, *x.shape[3:]).permute(1, 0, 3, 2, *range(4, x.dim() + 1))

    q, k, v, beta, g = (chunks(x) for x in (q, k, v, beta, g))
    total = g.cumsum(-1)
    difference = total[..., :, None] - total[..., None, :]
    mask = torch.ones(CHUNK, CHUNK, device=q.device, dtype=torch.bool).tril()
    decay = torch.where(mask, difference, -torch.inf).exp()
    keys = k * beta[..., None]
    a = (keys @ k.transpose(-1, -2)) * decay.tril(-1)
    t = inverse(a)
    u = t @ (v * beta[..., None])
    w = t @ (keys * total.exp()[..., None])
    last = total[..., -1:]
    carried = (k * (last - total).exp()[..., None]).transpose(-1, -2)
    eye = torch.eye(k.shape[-1], device=q.device, dtype=q.dtype)
    m = eye * last.exp()[..., None] - carried @ w
    b = carried @ u
    # The scan wants [N, B * H, ...] in one piece.
    s = scan(m.flatten(1, 2).contiguous(), b.flatten(1, 2).contiguous()).view(b.shape)
    u = u - w @ s
    out = (q * total.exp()[..., None]) @ s + ((q @ k.transpose(-1, -2)) * decay) @ u
    return out.permute(1, 0, 3, 2, 4).reshape(batch, length, heads, width)


def reference_rule(q, k, v, beta, g):
    """The definition, one token at a time."""
    state = torch.zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3], dtype=q.dtype)
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - read))
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


# Layers. -------------------------------------------------------------------------------------------------------------


class DeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.kd, self.vd = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
        self.in_proj_qkv = Linear(c.hidden_size, 2 * self.kd + self.vd)
        self.in_proj_z = Linear(c.hidden_size, self.vd)
        self.in_proj_b = Linear(c.hidden_size, c.linear_num_value_heads)
        self.in_proj_a = Linear(c.hidden_size, c.linear_num_value_heads)
        self.conv1d = nn.Conv1d(2 * self.kd + self.vd, 2 * self.kd + self.vd, c.linear_conv_kernel_dim, groups=2 * self.kd + self.vd, bias=False)
        self.A_log = nn.Parameter(torch.empty(c.linear_num_value_heads).uniform_(1, 16).log())
        step = torch.exp(torch.rand(c.linear_num_value_heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = GatedNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = Linear(self.vd, c.hidden_size)

    def forward(self, x, cos, sin):
        c = self.c
        batch, length, _ = x.shape
        x = x.to(COMPUTE)
        qkv = self.in_proj_qkv(x).float()
        taps = self.conv1d.weight[:, 0]
        width = taps.shape[1]
        padded = F.pad(qkv, (0, 0, width - 1, 0))
        qkv = F.silu(sum(padded[:, j : j + length] * taps[:, j] for j in range(width)))
        q, k, v = qkv.split([self.kd, self.kd, self.vd], -1)
        q = q.reshape(batch, length, -1, c.linear_key_head_dim)
        k = k.reshape(batch, length, -1, c.linear_key_head_dim)
        v = v.reshape(batch, length, -1, c.linear_value_head_dim)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * c.linear_key_head_dim**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        repeat = c.linear_num_value_heads // c.linear_num_key_heads
        if repeat > 1:
            q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
        beta = self.in_proj_b(x).float().sigmoid()
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        pad = -length % CHUNK
        if pad:
            q, k, v = (F.pad(y, (0, 0, 0, 0, 0, pad)) for y in (q, k, v))
            beta, g = (F.pad(y, (0, 0, 0, pad)) for y in (beta, g))
        out = delta_rule(q, k, v, beta, g)[:, :length]
        z = self.in_proj_z(x).view(batch, length, -1, c.linear_value_head_dim)
        return self.out_proj(self.norm(out, z).flatten(2))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = Linear(c.hidden_size, 2 * c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = Norm(c.head_dim, c.rms_norm_eps)
        self.k_norm = Norm(c.head_dim, c.rms_norm_eps)

    def rotate(self, x, cos, sin):
        n = cos.shape[-1]
        a, b, rest = x[..., : n], x[..., n : 2 * n], x[..., 2 * n :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def forward(self, x, cos, sin):
        c = self.c
        batch, length, _ = x.shape
        x = x.to(COMPUTE)
        q, gate = self.q_proj(x).view(batch, length, -1, 2 * c.head_dim).chunk(2, -1)
        k = self.k_proj(x).view(batch, length, -1, c.head_dim)
        v = self.v_proj(x).view(batch, length, -1, c.head_dim)
        q = self.rotate(self.q_norm(q), cos, sin).to(COMPUTE)
        k = self.rotate(self.k_norm(k), cos, sin).to(COMPUTE)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        repeat = c.num_attention_heads // c.num_key_value_heads
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        out = out.flatten(2) * gate.flatten(2).sigmoid()
        return self.o_proj(out)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        x = x.to(COMPUTE)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        if kind == "full_attention":
            self.self_attn = Attention(c)
        else:
            self.linear_attn = DeltaNet(c)
        self.kind = kind
        self.mlp = Mlp(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):
        mixer = self.self_attn if self.kind == "full_attention" else self.linear_attn
        x = x + mixer(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Mtp(nn.Module):
    """Predicts the token after next from the normed last hidden state of a place and the embedding of its next token."""

    def __init__(self, c):
        super().__init__()
        self.fc = Linear(2 * c.hidden_size, c.hidden_size)
        self.pre_fc_norm_embedding = Norm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = Norm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList([Layer(c, "full_attention")])
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, hidden, embedded, cos, sin):
        x = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1)
        return self.norm(self.layers[0](self.fc(x).float(), cos, sin))


class Text(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c, kind) for kind in c.layer_types()])
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


def head_loss(hidden, weight, targets):
    """Mean cross entropy, and the share of places where the most likely token is right."""
    logits = F.linear(hidden.to(COMPUTE), weight.to(COMPUTE)).flatten(0, 1).float()
    loss = F.cross_entropy(logits, targets.flatten())
    return loss, (logits.detach().argmax(-1) == targets.flatten()).float().mean()


class Nano(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = Text(c)
        self.mtp = Mtp(c)
        for name, p in self.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                deep = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.5 / math.sqrt(c.num_hidden_layers) if deep else 0.7))
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        nn_width = int(c.head_dim * c.partial_rotary_factor)
        frequency = c.rope_theta ** (-torch.arange(0, nn_width, 2).float() / nn_width)
        angle = torch.arange(c.max_position_embeddings)[:, None] * frequency
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)
        self.loss = head_loss

    def compile(self):
        """Compiles the layers, not the whole: few shapes, and code that layers of a kind share."""
        for layer in [*self.model.layers, self.mtp]:
            layer.compile()
        self.loss = torch.compile(head_loss)

    def hidden(self, tokens):
        length = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.model.norm(x)

    def forward(self, rows):
        """Rows of T + 2 tokens: (loss, MTP loss, accuracy, MTP accuracy)."""
        length = rows.shape[1] - 2
        hidden = self.hidden(rows[:, :length])
        weight = self.model.embed_tokens.weight
        main, right = self.loss(hidden, weight, rows[:, 1 : length + 1])
        embedded = self.model.embed_tokens(rows[:, 1 : length + 1])
        ahead = self.mtp(hidden, embedded, self.cos[:length], self.sin[:length])
        mtp, ahead_right = self.loss(ahead, weight, rows[:, 2:])
        return main, mtp, right, ahead_right


def check():
    """Compares the chunked rule with its definition, gradients too, and the model with transformers."""
    global COMPUTE
    COMPUTE = torch.float32
    torch.manual_seed(0)
    shape = (2, 192, 3)
    values = [torch.randn(*shape, 32, dtype=torch.float64) for _ in range(3)]
    values[0], values[1] = (F.normalize(x, dim=-1) for x in values[:2])
    values[1] = F.normalize(values[1].abs() + 0.5, dim=-1)  # keys that resemble each other are the hard case
    values += [torch.rand(*shape, dtype=torch.float64), -torch.rand(*shape, dtype=torch.float64) * 0.2]
    target = torch.randn(*shape, 32, dtype=torch.float64)
    grads = []
    for rule, kind in ((reference_rule, torch.float64), (delta_rule, torch.float64), (delta_rule, torch.float32)):
        inputs = [x.detach().clone().to(kind).requires_grad_() for x in values]
        out = rule(*inputs)
        (out * target.to(kind)).sum().backward()
        grads.append([out.detach(), *(x.grad for x in inputs)])
    for name, i in (("float64", 1), ("float32", 2)):
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads[i], grads[0])]
        print(f"delta rule, {name}: output and gradients differ by", " ".join(f"{e:.1e}" for e in errors))
        assert max(errors) < (1e-10 if name == "float64" else 1e-4)
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    c = small()
    model = Nano(c)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data += torch.randn_like(p) * 0.1
    config = Qwen3_5TextConfig(**{k: v for k, v in c.huggingface([2, 0]).items() if k not in ("architectures", "model_type", "dtype")})
    other = Qwen3_5ForCausalLM(config).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    missing = other.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing
    other.tie_weights()
    tokens = torch.randint(0, c.vocab_size, (2, 200))
    with torch.no_grad():
        ours = F.linear(model.hidden(tokens), model.model.embed_tokens.weight)
        theirs = other(tokens).logits
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"model: logits differ from transformers' by {error:.1e}; {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(p.numel() for p in model.mtp.parameters()):,} of them for MTP")
    print(f"control: {sum(p.numel() for p in Nano(small('attention')).parameters()):,} parameters")
    assert error < 1e-5


if __name__ == "__main__":
    check()
