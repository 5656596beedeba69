"""An independent float64 decoder and optimizer in ordinary torch: the referee of the layout oracle.

It imports nothing of megallm but the referee's other parts. Weights are a plain dict of logical
tensors, named and shaped as in docs/architecture.md; the configuration is a plain mapping with the
fields of a resolved model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.oracle.reference_dropout import Drop
from megallm.oracle.reference_mla import Weights, attention, linear, of_layer, rms
from megallm.oracle.reference_moe import Notes, experts, has_experts, moved_biases
from megallm.oracle.reference_mtp import further_loss


def forward(
    config: Mapping[str, Any], weights: Weights, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] int64 at positions [B, T] int64; attention stays inside
    `documents` [B, T].
    """
    seen = Seen(positions, documents, Notes(torch.ones_like(tokens, dtype=torch.bool), documents))
    return _logits(config, weights, _last_layer(config, weights, tokens, seen))


NOT_DECAYED = (
    ".bias", ".sinks", ".lora_E", ".lora_magnitude_vector", ".ia3_l", ".keys", ".values",
    ".logit_bias",
)  # fmt: skip


def _whole(place: str, x: Tensor) -> Tensor:
    return x


class Seen(NamedTuple):
    """Where tokens stand, what the routers of experts leave behind (None: there are none), and what
    drops hidden states."""

    positions: Tensor
    documents: Tensor | None
    notes: Notes | None
    drop: Drop = _whole


def _last_layer(config: Mapping[str, Any], weights: Weights, tokens: Tensor, seen: Seen) -> Tensor:
    x = weights["embedding.weight"][tokens] * (config["embedding_scale"] or 1.0)
    if config["positions"] == "learned":
        x = x + weights["positions.weight"][seen.positions + config["position_offset"]]
    for layer in range(config["num_layers"]):
        x = block(config, weights, f"layers.{layer}.", layer, x, seen)
    return x


def block(config: Mapping[str, Any], weights: Weights, at: str, layer: int, x: Tensor, seen: Seen) -> Tensor:
    """Returns the layer of this number, with the weights at this prefix; norms stand before or
    after.
    """

    own = of_layer(config, layer)

    def attend(y: Tensor) -> Tensor:
        made = attention(own, weights, at + "attention.", y, seen.positions, seen.documents)
        return seen.drop(at + "attention", _bottleneck(weights, at, "after_attention", y, made))

    def feed(y: Tensor) -> Tensor:
        if has_experts(config, layer):
            made = experts(config, weights, at + "moe.", y, seen.notes, mlp)
        else:
            made = mlp(config, weights, at + "mlp.", y)
        return seen.drop(at + "mlp", _bottleneck(weights, at, "after_mlp", y, made))

    if config["norm_place"] == "post":
        x = norm(config, weights, at + "attention_norm", x + attend(x))
        return norm(config, weights, at + "mlp_norm", x + feed(x))

    def branch(name: str, sublayer: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        if at + name + "_norm.weight" in weights:
            y = norm(config, weights, at + name + "_norm", y)
        y = sublayer(y)
        if at + name + "_output_norm.weight" in weights:
            y = norm(config, weights, at + name + "_output_norm", y)
        return y * (config["residual_scale"] or 1.0)

    if config["parallel_residual"]:
        return x + branch("attention", attend, x) + branch("mlp", feed, x)
    x = x + branch("attention", attend, x)
    return x + branch("mlp", feed, x)


def _bottleneck(weights: Weights, at: str, place: str, x: Tensor, y: Tensor) -> Tensor:
    """The output `y` of a sublayer, and what an adapter behind it adds: Houlsby's, which stand behind
    both sublayers, read `y`, a parallel one the input `x`.
    """
    own = {part: f"{at}{place}.adapter.default.{part}" for part in ("down", "up")}
    if own["down"] + ".weight" not in weights:
        return y
    both = f"{at}after_attention.adapter.default.down.weight" in weights
    return y + linear(weights, own["up"], F.gelu(linear(weights, own["down"], y if both else x)))


def _logits(config: Mapping[str, Any], weights: Weights, x: Tensor) -> Tensor:
    head = "head.weight" if "head.weight" in weights else "embedding.weight"
    logits = norm(config, weights, "final_norm", x) @ weights[head].T / (config["logits_scaling"] or 1.0)
    cap = config["logit_cap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def norm(config: Mapping[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = weights[name + ".weight"]
    if config["norm"].startswith("layernorm"):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + config["norm_eps"])
        scaled = centred * scale * weight
        return scaled + weights[name + ".bias"] if config["norm"] == "layernorm" else scaled
    return rms(x, 1 + weight if config["norm"] == "rmsnorm_unit" else weight, config["norm_eps"])


_SEVEN = torch.tensor(7.0, dtype=torch.float64)


def mlp(config: Mapping[str, Any], weights: Weights, at: str, x: Tensor) -> Tensor:
    kind = config["activation"]
    approximate = "tanh" if kind.endswith("tanh") else "none"
    if kind.startswith("gelu"):
        hidden = F.gelu(linear(weights, at + "up", x), approximate=approximate)
    else:
        gate, up = (linear(weights, at + "gate_up", x, part) for part in (0, 1))
        if kind == "swiglu_clamped":
            gate, up = torch.minimum(gate, _SEVEN), torch.maximum(torch.minimum(up, _SEVEN), -_SEVEN)
            hidden = (1 + up) * gate / (1 + torch.exp(-1.702 * gate))
        else:
            hidden = (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate=approximate)) * up
    return linear(weights, at + "down", hidden)


def masked_loss(
    config: Mapping[str, Any], weights: Weights, batch: Mapping[str, Tensor], notes: Notes | None = None
) -> Tensor:
    """Sum of mask x negative log-likelihood over the whole batch [B, T], divided by the sum of the
    mask.

    And what predicts further tokens and the routers of experts add; `notes` gets the loads of the
    experts.
    """
    notes = notes or Notes(batch["mask"], batch.get("documents"))
    seen = Seen(batch["positions"], batch.get("documents"), notes)
    last = _last_layer(config, weights, batch["tokens"], seen)
    nll = F.cross_entropy(_logits(config, weights, last).flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["mask"].flatten().to(nll.dtype)
    loss = (nll * mask).sum() / mask.sum()
    if config["mtp"]["depth"]:
        of_norm = partial(norm, config, weights)
        loss = loss + further_loss(
            config, weights, last, batch, of_norm, lambda at, layer, x: block(config, weights, at, layer, x, seen)
        )
    return loss + notes.loss()


def decays(name: str) -> bool:
    """Weight decay skips norms, biases and attention sinks; of adapters all that is no matrix that
    is multiplied by.
    """
    return not name.endswith(NOT_DECAYED) and "norm" not in name and "prompt.adapter" not in name


def is_state(name: str) -> bool:
    """The selection bias of a router has no gradient."""
    return name.endswith(".router.bias")


class Rule(Protocol):
    """An update rule with its state (`oracle.reference_rules`); `clip` is the largest global norm,
    0 is off.
    """

    clip: float

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor: ...


After = Callable[[dict[str, Tensor], dict[str, Tensor], int], dict[str, Tensor]]


@dataclass
class Trainer:
    """One process that trains the logical weights; `step` returns (loss, unclipped gradients,
    global norm).
    """

    config: Mapping[str, Any]
    rule: Rule
    weights: dict[str, Tensor]
    loss: Callable[[Mapping[str, Any], Weights, Mapping[str, Tensor]], Tensor] = masked_loss
    frozen: frozenset[str] = frozenset()  # names that have no gradient and stay as they are
    after: After | None = None  # what else an update does to the weights that it moved
    count: int = 0

    def step(self, batch: Mapping[str, Tensor], lr: float) -> tuple[float, dict[str, Tensor], float]:
        state = {name: w for name, w in self.weights.items() if is_state(name)}
        fixed = state | {name: self.weights[name] for name in self.frozen}
        leaves = {name: w.detach().clone().requires_grad_() for name, w in self.weights.items() if name not in fixed}
        loss = self.loss(self.config, leaves | fixed, batch)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())
        scale = min(1.0, self.rule.clip / (norm + 1e-6)) if self.rule.clip > 0 else 1.0
        self.count += 1
        update, count = self.rule.update, self.count
        if state:
            notes = Notes(batch["mask"], batch.get("documents"))
            with torch.no_grad():
                self.loss(self.config, self.weights, batch, notes)
            state = moved_biases(self.config, self.weights, notes)
        moved = {name: update(name, self.weights[name], grad * scale, lr, count) for name, grad in grads.items()}
        if self.after is not None:
            clipped = {name: grad * scale for name, grad in grads.items()}
            moved = self.after(moved, clipped, self.count)
        self.weights = fixed | moved | state
        return loss.item(), grads, norm
