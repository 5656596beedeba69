"""A plain Llama in torch, as a user of torch's own parallelisms would write it, with megallm's initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megallm.models.build import initial_values
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.parallel_model import ParallelModel
from megallm.parallel.config import LayoutConfig
from megallm.parallel.mesh import Mesh


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `[B, heads, T, E]`, halves as pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.head_size = config.hidden_size, config.head_size
        self.q = nn.Linear(d, config.num_heads * config.head_size, bias=False)
        self.k = nn.Linear(d, config.num_kv_heads * config.head_size, bias=False)
        self.v = nn.Linear(d, config.num_kv_heads * config.head_size, bias=False)
        self.o = nn.Linear(config.num_heads * config.head_size, d, bias=False)
        self.grouped = config.num_heads != config.num_kv_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o(out.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Layers `begin` to `end`; the first stage embeds, the last one has the head: `[B, T]` -> logits `[B, T, V]`."""

    def __init__(self, config: ModelConfig, tokens: int, span: tuple[int, int] | None = None) -> None:
        super().__init__()
        begin, end = span or (0, config.num_layers)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size) if begin == 0 else None
        self.layers = nn.ModuleDict({str(n): Block(config) for n in range(begin, end)})
        last = end == config.num_layers
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if last else None
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if last else None
        half = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
        angles = torch.outer(torch.arange(tokens, dtype=torch.float64), config.rope_theta**-half).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.layers.values():
            x = block(x, self.cos, self.sin)
        return x if self.head is None else self.head(self.final_norm(x))


@torch.no_grad()
def load(model: Llama, config: ModelConfig, seed: int) -> None:
    """Give a stage megallm's initial weights, one tensor at a time."""
    params = dict(model.named_parameters())
    for name, _, shard, _ in ParallelModel(config, LayoutConfig(), ComputeConfig(), Mesh.single()).entries():
        stem, part = name.rsplit(".", 2)[0], name.split(".")[-2]
        names = [f"{stem}.{half}.weight" for half in {"kv": ("k", "v"), "gate_up": ("gate", "up")}.get(part, (part,))]
        if part == name.split(".")[0]:
            names = [name]
        if names[0] in params:
            value = initial_values(name, shard, (0,) * len(shard.full), shard.full, seed)
            for target, half in zip(names, value if len(names) > 1 else [value], strict=True):
                params.pop(target).copy_(half)
    if params:
        raise ValueError(f"no initial weights for {', '.join(params)}")
