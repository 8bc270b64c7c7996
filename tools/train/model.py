"""A llama decoder with grouped-query attention, as small as it can be said.

RoPE turns NEIGHBOURING pairs (x[2i], x[2i+1]), which is what a GGUF file of
architecture "llama" means, so export needs no permutation of the weights.
"""
import dataclasses

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import gguf


@dataclasses.dataclass
class Config:
    vocab: int = 2048
    context: int = 512
    width: int = 256
    layers: int = 5
    heads: int = 8
    kv_heads: int = 8
    ffn: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0

    @property
    def head_dim(self):
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rope_table(cfg):
    """cos and sin, [context, head_dim / 2]."""
    freq = cfg.rope_base ** (-torch.arange(0, cfg.head_dim, 2).double() / cfg.head_dim)
    angle = torch.arange(cfg.context).double()[:, None] * freq
    return angle.cos().float(), angle.sin().float()


def rope(x, cos, sin):
    """x: [batch, heads, time, head_dim]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        kv = cfg.kv_heads * cfg.head_dim
        self.attn_norm = RMSNorm(cfg.width, cfg.eps)
        self.attn_q = nn.Linear(cfg.width, cfg.width, bias=False)
        self.attn_k = nn.Linear(cfg.width, kv, bias=False)
        self.attn_v = nn.Linear(cfg.width, kv, bias=False)
        self.attn_output = nn.Linear(cfg.width, cfg.width, bias=False)
        self.ffn_norm = RMSNorm(cfg.width, cfg.eps)
        self.ffn_gate = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.ffn_up = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.ffn_down = nn.Linear(cfg.ffn, cfg.width, bias=False)

    def attention(self, x, cos, sin, mask):
        c = self.cfg
        batch, time, _ = x.shape
        group = c.heads // c.kv_heads
        q = self.attn_q(x).view(batch, time, c.heads, c.head_dim).transpose(1, 2)
        k = self.attn_k(x).view(batch, time, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.attn_v(x).view(batch, time, c.kv_heads, c.head_dim).transpose(1, 2)
        # Query heads g*group .. g*group+group-1 read key/value head g: stacked
        # along time they are one product with it, and nothing is repeated.
        q = rope(q * c.head_dim ** -0.5, cos, sin)
        q = q.reshape(batch, c.kv_heads, group * time, c.head_dim)
        scores = q @ rope(k, cos, sin).to(q.dtype).transpose(-2, -1)
        # In place and in the product's own type: this is the largest tensor.
        scores = scores.view(batch, c.kv_heads, group, time, time).add_(mask.to(scores.dtype))
        weights = scores.softmax(-1).view(batch, c.kv_heads, group * time, time)
        out = (weights @ v.to(weights.dtype)).view(batch, c.heads, time, c.head_dim)
        return self.attn_output(out.transpose(1, 2).reshape(batch, time, c.width))

    def forward(self, x, cos, sin, mask):
        x = x + self.attention(self.attn_norm(x), cos, sin, mask)
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.token_embd = nn.Embedding(cfg.vocab, cfg.width)
        self.blk = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.output_norm = RMSNorm(cfg.width, cfg.eps)
        cos, sin = rope_table(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        mask = torch.full((cfg.context, cfg.context), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # The two matrices that write into the residual stream start
                # smaller, so that its size does not grow with the depth.
                into = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(p, std=0.02 * ((2 * cfg.layers) ** -0.5 if into else 1))

    def hidden(self, ids):
        t = ids.shape[1]
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, self.cos[:t], self.sin[:t], self.mask[:t, :t])
        return self.output_norm(x)

    def forward(self, ids):
        """Logits [batch, time, vocab]; the embedding is the output matrix too."""
        return F.linear(self.hidden(ids), self.token_embd.weight)

    def loss(self, ids, targets):
        logits = self(ids).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def save(path, model, **extra):
    torch.save({"config": dataclasses.asdict(model.cfg), "model": model.state_dict(), **extra}, path)


def load(path):
    """(model, the whole checkpoint); of a GGUF file there is only the model."""
    if path.endswith(".gguf"):
        return from_gguf(path), {}
    ckpt = torch.load(path, map_location="cpu")
    model = Llama(Config(**ckpt["config"]))
    model.load_state_dict(ckpt["model"])
    return model, ckpt


def from_gguf(path):
    """The model of a GGUF file with F16 or F32 tensors, in float32."""
    r = gguf.Reader(path)
    if r.metadata["general.architecture"] != "llama":
        raise SystemExit(f"{path}: architecture {r.metadata['general.architecture']}, not llama")
    meta = {k[len("llama."):]: v for k, v in r.metadata.items() if k.startswith("llama.")}
    cfg = Config(vocab=len(r.metadata["tokenizer.ggml.tokens"]), context=meta["context_length"],
                 width=meta["embedding_length"], layers=meta["block_count"],
                 heads=meta["attention.head_count"], kv_heads=meta["attention.head_count_kv"],
                 ffn=meta["feed_forward_length"], eps=meta["attention.layer_norm_rms_epsilon"],
                 rope_base=meta["rope.freq_base"])
    scaling = [k for k in meta if k.startswith("rope.scaling.")]
    if meta.get("rope.dimension_count", cfg.head_dim) != cfg.head_dim or scaling:
        raise SystemExit(f"{path}: RoPE over part of a head, or scaled: {scaling}")
    net = Llama(cfg)
    missing = net.state_dict().keys() ^ r.tensors.keys()
    if missing:   # an untied output, biases, norms of q and k: models that this is not
        raise SystemExit(f"{path}: not this model's tensors: {', '.join(sorted(missing))}")
    net.load_state_dict({n: torch.from_numpy(a.astype(np.float32))
                         for n, a in r.tensors.items()})
    return net
