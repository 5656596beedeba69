"""An independent float64 decoder and optimizer in ordinary torch: the referee of the layout oracle.

It imports nothing of megallm but the referee's other parts. Weights are a plain dict of logical tensors, named and
shaped as in docs/architecture.md; the configuration is a plain mapping with the fields of a resolved model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.oracle.reference_mla import Weights, attention, linear, rms
from megallm.oracle.reference_mtp import further_loss


def forward(
    config: Mapping[str, Any], weights: Weights, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] int64 at positions [B, T] int64; attention stays inside `documents` [B, T]."""
    return _logits(config, weights, _last_layer(config, weights, tokens, positions, documents))


def _last_layer(
    config: Mapping[str, Any], weights: Weights, tokens: Tensor, positions: Tensor, documents: Tensor | None
) -> Tensor:
    x = weights["embedding.weight"][tokens]
    if config["positions"] == "learned":
        x = x + weights["positions.weight"][positions]
    for layer in range(config["num_layers"]):
        x = _block(config, weights, f"layers.{layer}.", x, positions, documents)
    return x


def _block(
    config: Mapping[str, Any], weights: Weights, at: str, x: Tensor, positions: Tensor, documents: Tensor | None
) -> Tensor:
    y = norm(config, weights, at + "attention_norm", x)
    x = x + attention(config, weights, at + "attention.", y, positions, documents)
    return x + mlp(config, weights, at + "mlp.", norm(config, weights, at + "mlp_norm", x))


def _logits(config: Mapping[str, Any], weights: Weights, x: Tensor) -> Tensor:
    head = "embedding.weight" if config["tie_embeddings"] else "head.weight"
    return norm(config, weights, "final_norm", x) @ weights[head].T


def norm(config: Mapping[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    if config["norm"] == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + config["norm_eps"])
        return centred * scale * weights[name + ".weight"] + weights[name + ".bias"]
    return rms(x, weights[name + ".weight"], config["norm_eps"])


def mlp(config: Mapping[str, Any], weights: Weights, at: str, x: Tensor) -> Tensor:
    if config["activation"] == "swiglu":
        hidden = F.silu(linear(weights, at + "gate_up", x, 0)) * linear(weights, at + "gate_up", x, 1)
    else:
        approximate = "tanh" if config["activation"] == "gelu_tanh" else "none"
        hidden = F.gelu(linear(weights, at + "up", x), approximate=approximate)
    return linear(weights, at + "down", hidden)


def masked_loss(config: Mapping[str, Any], weights: Weights, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of mask x negative log-likelihood over the whole batch [B, T], divided by the sum of the mask."""
    place = batch["positions"], batch.get("documents")
    last = _last_layer(config, weights, batch["tokens"], *place)
    nll = F.cross_entropy(_logits(config, weights, last).flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["mask"].flatten().to(nll.dtype)
    loss = (nll * mask).sum() / mask.sum()
    if config["mtp"]["depth"]:
        of_norm = partial(norm, config, weights)
        loss = loss + further_loss(
            config, weights, last, batch, of_norm, lambda at, layer, x: _block(config, weights, at, x, *place)
        )
    return loss


def decays(name: str) -> bool:
    """Weight decay skips norms, biases and attention sinks and nothing else."""
    return not name.endswith((".bias", ".sinks")) and "norm" not in name


class Rule(Protocol):
    """An update rule with its state (`oracle.reference_rules`); `clip` is the largest global norm, 0 is off."""

    clip: float

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor: ...


@dataclass
class Trainer:
    """One process that trains the logical weights; `step` returns (loss, unclipped gradients, global norm)."""

    config: Mapping[str, Any]
    rule: Rule
    weights: dict[str, Tensor]
    loss: Callable[[Mapping[str, Any], Weights, Mapping[str, Tensor]], Tensor] = masked_loss
    count: int = 0

    def step(self, batch: Mapping[str, Tensor], lr: float) -> tuple[float, dict[str, Tensor], float]:
        leaves = {name: w.detach().clone().requires_grad_() for name, w in self.weights.items()}
        loss = self.loss(self.config, leaves, batch)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())
        scale = min(1.0, self.rule.clip / (norm + 1e-6)) if self.rule.clip > 0 else 1.0
        self.count += 1
        update, count = self.rule.update, self.count
        self.weights = {name: update(name, w, grads[name] * scale, lr, count) for name, w in self.weights.items()}
        return loss.item(), grads, norm
