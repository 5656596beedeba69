"""An independent float64 decoder and optimizer in ordinary torch: the referee of the layout oracle.

It imports nothing of megallm. Weights are a plain dict of logical tensors, named and shaped as in
docs/architecture.md; the configuration is a plain mapping with the fields of a resolved model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def forward(
    config: Mapping[str, Any], weights: Weights, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] int64 at positions [B, T] int64; attention stays inside `documents` [B, T]."""
    x = weights["embedding.weight"][tokens]
    if config["positions"] == "learned":
        x = x + weights["positions.weight"][positions]
    for layer in range(config["num_layers"]):
        at = f"layers.{layer}."
        y = norm(config, weights, at + "attention_norm", x)
        x = x + attention(config, weights, at + "attention.", y, positions, documents)
        x = x + mlp(config, weights, at + "mlp.", norm(config, weights, at + "mlp_norm", x))
    head = "embedding.weight" if config["tie_embeddings"] else "head.weight"
    return norm(config, weights, "final_norm", x) @ weights[head].T


def norm(config: Mapping[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    if config["norm"] == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + config["norm_eps"])
        return centred * scale * weights[name + ".weight"] + weights[name + ".bias"]
    return _rms(x, weights[name + ".weight"], config["norm_eps"])


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def linear(weights: Weights, name: str, x: Tensor, part: int | None = None) -> Tensor:
    """x @ W.T + b; `part` picks one of a stacked weight (K or V, gate or up)."""
    weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
    if part is not None:
        weight, bias = weight[part], None if bias is None else bias[part]
    y = x @ weight.T
    return y if bias is None else y + bias


def _rotate(x: Tensor, positions: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Rotary embedding, Su et al. 2021 (arXiv 2104.09864), halves paired as in Llama; x [B, T, heads, E]."""
    size = x.shape[-1]
    speed = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    if config.get("rope_scaling") is not None:
        speed = torch.stack([_slower(one, config) for one in speed])
    angle = (positions[..., None].to(x.dtype) * speed)[:, :, None, :]
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1)


def attention(
    config: Mapping[str, Any], weights: Weights, at: str, x: Tensor, positions: Tensor, documents: Tensor | None
) -> Tensor:
    batch, length, _ = x.shape
    size, heads, kv_heads = config["head_size"], config["num_heads"], config["num_kv_heads"]
    q = linear(weights, at + "q", x).view(batch, length, heads, size)
    k = linear(weights, at + "kv", x, 0).view(batch, length, kv_heads, size)
    v = linear(weights, at + "kv", x, 1).view(batch, length, kv_heads, size)
    if config["qk_norm"]:
        q = _rms(q, weights[at + "q_norm.weight"], config["norm_eps"])
        k = _rms(k, weights[at + "k_norm.weight"], config["norm_eps"])
    if config["positions"] == "rope":
        q, k = (_rotate(z, positions, config) for z in (q, k))
    k, v = (z.repeat_interleave(heads // kv_heads, dim=2) for z in (k, v))
    scores = torch.einsum("bihe,bjhe->bhij", q, k) / size**0.5
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible = (j <= i) & (j > i - (config["sliding_window"] or length))
    visible = visible | (not config["causal"])
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    mixed = torch.einsum("bhij,bjhe->bihe", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    return linear(weights, at + "o", mixed.reshape(batch, length, heads * size))


def _slower(speed: Tensor, config: Mapping[str, Any]) -> Tensor:
    """One frequency after linear or llama3 stretching, case by case on its wavelength."""
    factor = config["rope_factor"]
    if config["rope_scaling"] == "linear":
        return speed / factor
    wavelength, old = 2 * torch.pi / speed, config["rope_positions"]
    if wavelength > old / config["rope_low_factor"]:
        return speed / factor
    if wavelength < old / config["rope_high_factor"]:
        return speed
    smooth = (old / wavelength - config["rope_low_factor"]) / (config["rope_high_factor"] - config["rope_low_factor"])
    return (1 - smooth) * speed / factor + smooth * speed


def mlp(config: Mapping[str, Any], weights: Weights, at: str, x: Tensor) -> Tensor:
    if config["activation"] == "swiglu":
        hidden = F.silu(linear(weights, at + "gate_up", x, 0)) * linear(weights, at + "gate_up", x, 1)
    else:
        approximate = "tanh" if config["activation"] == "gelu_tanh" else "none"
        hidden = F.gelu(linear(weights, at + "up", x), approximate=approximate)
    return linear(weights, at + "down", hidden)


def masked_loss(config: Mapping[str, Any], weights: Weights, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of mask x negative log-likelihood over the whole batch [B, T], divided by the sum of the mask."""
    logits = forward(config, weights, batch["tokens"], batch["positions"], batch.get("documents"))
    nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["mask"].flatten().to(nll.dtype)
    return (nll * mask).sum() / mask.sum()


def decays(name: str) -> bool:
    """Weight decay skips norms and biases and nothing else."""
    return not name.endswith(".bias") and "norm" not in name


@dataclass(frozen=True)
class Adam:
    """AdamW as torch.optim.AdamW, after clipping as torch.nn.utils.clip_grad_norm_; `clip` 0 is off."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float


@dataclass
class Trainer:
    """One process that trains the logical weights; `step` returns (loss, unclipped gradients, global norm)."""

    config: Mapping[str, Any]
    adam: Adam
    weights: dict[str, Tensor]
    loss: Callable[[Mapping[str, Any], Weights, Mapping[str, Tensor]], Tensor] = masked_loss
    count: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def step(self, batch: Mapping[str, Tensor], lr: float) -> tuple[float, dict[str, Tensor], float]:
        leaves = {name: w.detach().clone().requires_grad_() for name, w in self.weights.items()}
        loss = self.loss(self.config, leaves, batch)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())
        scale = min(1.0, self.adam.clip / (norm + 1e-6)) if self.adam.clip > 0 else 1.0
        self.count += 1
        self.weights = {name: self._update(name, w, grads[name] * scale, lr) for name, w in self.weights.items()}
        return loss.item(), grads, norm

    def _update(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> Tensor:
        """Decoupled decay, then Adam with both bias corrections (arXiv 1711.05101)."""
        beta1, beta2 = self.adam.betas
        first = beta1 * self.first.get(name, 0.0) + (1 - beta1) * grad
        second = beta2 * self.second.get(name, 0.0) + (1 - beta2) * grad.square()
        self.first[name], self.second[name] = first, second
        mean, spread = first / (1 - beta1**self.count), (second / (1 - beta2**self.count)).sqrt()
        kept = weight * (1 - lr * self.adam.weight_decay) if decays(name) else weight
        return kept - lr * mean / (spread + self.adam.eps)
