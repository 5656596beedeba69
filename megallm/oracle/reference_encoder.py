"""Independent float64 encoders, heads and losses in ordinary torch, beside the decoder of
`reference`.

It imports nothing of megallm but other referees. Weights are a plain dict of logical tensors, named
and shaped as in docs/architecture.md; the configuration is a plain mapping with the fields of a
resolved model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.oracle.reference import Seen, Weights, block, norm
from megallm.oracle.reference_dropout import drop_of
from megallm.oracle.reference_mla import linear
from megallm.oracle.reference_moe import Notes
from megallm.oracle.reference_trainers import TRAINER_LOSSES

Config = Mapping[str, Any]
Batch = Mapping[str, Tensor]
CLIP = 0.2  # of the critic's loss
TEMPERATURE, ENTROPY, WRONG = 0.7, 0.01, 0.1  # of the tempered loss


def hidden_states(config: Config, weights: Weights, batch: Batch, notes: Notes | None = None) -> Tensor:
    """Returns what the head reads, [B, T, D]; a batch may have `token_types` and `documents` [B,
    T]; experts need `notes`.
    """
    x = weights["embedding.weight"][batch["tokens"]] * (config["embedding_scale"] or 1.0)
    if config["positions"] == "learned":
        x = x + weights["positions.weight"][batch["positions"] + config["position_offset"]]
    if config["token_types"]:
        x = x + weights["token_types.weight"][batch["token_types"]]
    if config["embedding_norm"]:
        x = norm(config, weights, "embedding_norm", x)
    seen = Seen(batch["positions"], batch.get("documents"), notes, drop_of(config, batch))
    x = seen.drop("embedding", x)
    for layer in range(config["num_layers"]):
        x = block(config, weights, f"layers.{layer}.", layer, x, seen)
    return x if config["norm_place"] == "post" else norm(config, weights, "final_norm", x)


def scores(config: Config, weights: Weights, batch: Batch, notes: Notes | None = None) -> Tensor:
    """Logits [B, T, V or classes], or [B, T, 1] of a value head; behind them the values beside a language model's
    head: V [B, T, 1] and perhaps two Q [B, T, V].
    """
    x = hidden_states(config, weights, batch, notes)
    if config["head"] == "mlm":
        act = "tanh" if config["activation"].endswith("gelu_tanh") else "none"
        x = norm(config, weights, "head.norm", F.gelu(linear(weights, "head.dense", x), approximate=act))
    if config["pooler"]:
        x = torch.tanh(linear(weights, "head.pooler", x))
    matrix = weights["head.weight" if "head.weight" in weights else "embedding.weight"]
    found = x @ matrix.T + weights.get("head.bias", torch.zeros((), dtype=x.dtype))
    if config["head"] in ("lm", "mlm"):
        cap, found = config["logit_cap"], found / (config["logits_scaling"] or 1.0)
        found = found if cap is None else cap * torch.tanh(found / cap)
    beside = [weights[f"critic.{one}"] for one in ("value", "q1", "q2") if f"critic.{one}" in weights]
    return torch.cat([found, *(x @ one.T for one in beside)], -1)


def _nll(scores: Tensor, batch: Batch) -> Tensor:
    nll = F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return nll.view(batch["labels"].shape)


def cross_entropy(scores: Tensor, batch: Batch) -> Tensor:
    """Mean over the tokens that count."""
    return _nll(scores, batch)[batch["mask"]].mean()


def tempered(scores: Tensor, batch: Batch) -> Tensor:
    """The same of scores divided by TEMPERATURE, with ENTROPY times the entropy of their softmax, and WRONG for every
    token whose label is not the likeliest: a mean."""
    chosen = scores[batch["mask"]] / TEMPERATURE
    probability, labels = torch.softmax(chosen, -1), batch["labels"][batch["mask"]]
    entropy = -torch.special.xlogy(probability, probability).sum(-1)
    wrong = (chosen.max(-1).indices != labels).to(chosen.dtype)
    return F.cross_entropy(chosen, labels) + (ENTROPY * entropy + WRONG * wrong).mean()


def diffusion(scores: Tensor, batch: Batch) -> Tensor:
    """Hidden tokens weighted, per token that could have been hidden."""
    return (_nll(scores, batch) * batch["weight"])[batch["mask"]].mean()


def regression(scores: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of the tokens that count."""
    return F.mse_loss(scores[..., 0][batch["mask"]], batch["targets"][batch["mask"]])


def critic(scores: Tensor, batch: Batch) -> Tensor:
    """Half the mean of the larger square, plain or with the value kept within CLIP of the old
    one.
    """
    value, old, targets = (x[batch["mask"]] for x in (scores[..., 0], batch["old_values"], batch["targets"]))
    near = torch.minimum(torch.maximum(value, old - CLIP), old + CLIP)
    return torch.stack([(value - targets).square(), (near - targets).square()]).amax(0).mean() / 2


def reward(scores: Tensor, batch: Batch) -> Tensor:
    """Mean of log(1 + exp(rejected - chosen)); the tokens that count are chosen and rejected by
    turns.
    """
    found = scores[..., 0][batch["mask"]]
    return torch.log1p(torch.exp(found[1::2] - found[0::2])).mean()


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "cross_entropy": cross_entropy, "tempered": tempered, "diffusion": diffusion, "regression": regression,
    "critic": critic, "reward": reward, "sft": cross_entropy,
} | TRAINER_LOSSES  # fmt: skip


def loss_named(name: str) -> Callable[..., Tensor]:
    """Returns the loss of a model and a batch, for `reference.Trainer`; with what routers of
    experts add.
    """

    def loss(config: Config, weights: Weights, batch: Batch, notes: Notes | None = None) -> Tensor:
        notes = notes or Notes(batch["mask"], batch.get("documents"))
        return LOSSES[name](scores(config, weights, batch, notes), batch) + notes.loss()

    return loss
