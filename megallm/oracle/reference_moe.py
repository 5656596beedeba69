"""Independent float64 mixture of experts in ordinary torch, beside the decoder of `reference`.

It imports nothing of megallm. Every expert is applied to every token, to zeros where it was not
chosen, and weighed; choices, capacities and loads are made token by token in Python. DeepSeek-V3
(arXiv 2412.19437), equations 12 to 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]
Mlp = Callable[[Config, Weights, str, Tensor], Tensor]


@dataclass
class Notes:
    """What the routers of one pass over a whole batch leave behind: their losses, and each expert's
    load.
    """

    mask: Tensor  # bool [B, T]
    documents: Tensor | None
    losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, list[int]] = field(default_factory=dict)

    def sequences(self) -> Iterator[tuple[int, list[int]]]:
        """(row, places) of each row, or of each of its documents."""
        for row in range(len(self.mask)):
            length = self.mask.shape[1]
            if self.documents is None:
                yield row, list(range(length))
                continue
            for number in self.documents[row].unique().tolist():
                yield row, [i for i in range(length) if self.documents[row, i] == number]

    def loss(self) -> Tensor | float:
        """Of all layers, divided by the tokens of the batch that count."""
        return sum(self.losses) / int(self.mask.sum()) if self.losses else 0.0


def has_experts(config: Config, layer: int) -> bool:
    """Returns whether a layer has experts."""
    moe = config["moe"]
    first, every = moe["first_dense"], moe["every"]
    return moe["num_experts"] > 0 and layer in range(first, layer + 1, every)


def experts(config: Config, weights: Weights, at: str, x: Tensor, notes: Notes, mlp: Mlp) -> Tensor:
    """`[B, T, D]` -> the same; leaves its losses and loads in `notes`."""
    moe, number = config["moe"], config["moe"]["num_experts"]
    logits = x @ weights[at + "router.weight"].T + weights.get(at + "router.logit_bias", 0.0)
    scores = logits.sigmoid() if moe["score"] == "sigmoid" else logits.softmax(-1)
    chosen = _chosen(moe, scores.detach(), weights.get(at + "router.bias"))
    share = scores * chosen
    if moe["norm_topk_prob"]:
        share = share / share.sum(-1, keepdim=True)
    taken = chosen
    if moe["capacity"] is not None:
        taken = _kept(moe, scores.detach(), chosen, notes)
        share = share * taken
    out = torch.zeros_like(x)
    for e in range(number):
        one, names = f"{at}experts.{e}.", ("gate_up.weight", "up.weight", "down.weight")
        names += ("gate_up.bias", "up.bias", "down.bias")
        own = {one + name: weights[f"{at}experts.{name}"][e] for name in names if f"{at}experts.{name}" in weights}
        out = out + share[..., e, None] * moe["routed_scale"] * mlp(config, own, one, x * taken[..., e, None])
    if moe["shared_ffn_hidden_size"]:
        beside = mlp(config, weights, at + "shared.", x)
        gate = (x @ weights[at + "shared_gate.weight"].T).sigmoid() if moe["shared_gate"] else 1.0
        out = out + gate * beside
    _note(moe, at, logits, scores, chosen, notes)
    return out


def _chosen(moe: Config, scores: Tensor, bias: Tensor | None) -> Tensor:
    """0 or 1 for each token and expert `[B, T, X]`."""
    found = torch.zeros_like(scores)
    groups, size = moe["num_groups"], scores.shape[-1] // moe["num_groups"]
    for row, place in torch.cartesian_prod(torch.arange(scores.shape[0]), torch.arange(scores.shape[1])).tolist():
        value = scores[row, place] if bias is None else scores[row, place] + bias
        value = value.tolist()
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        best = [sorted((value[e] for e in group), reverse=True) for group in members]
        worth = [sum(v[: 1 if bias is None else 2]) for v in best]
        allowed = sorted(range(groups), key=lambda g: -worth[g])[: moe["top_groups"]]
        candidates = [e for g in allowed for e in members[g]]
        for e in sorted(candidates, key=lambda e: -value[e])[: moe["top_k"]]:
            found[row, place, e] = 1.0
    return found


def _kept(moe: Config, scores: Tensor, chosen: Tensor, notes: Notes) -> Tensor:
    """1 where an expert keeps a token of its sequence, 0 beyond its capacity.

    A token that is repeated has the same score but for rounding: scores are compared as float32,
    ties by place.
    """
    kept = chosen.clone()
    for row, places in notes.sequences():
        most = math.ceil(moe["capacity"] * len(places) * moe["top_k"] / moe["num_experts"])
        for e in range(moe["num_experts"]):
            mine = [i for i in places if chosen[row, i, e]]
            if moe["drop"] == "score":
                mine.sort(key=lambda i: -float(scores[row, i, e].to(torch.float32)))
            for i in mine[most:]:
                kept[row, i, e] = 0.0
    return kept


def _note(moe: Config, at: str, logits: Tensor, scores: Tensor, chosen: Tensor, notes: Notes) -> None:
    number, k = moe["num_experts"], moe["top_k"]
    share = scores / scores.sum(-1, keepdim=True)
    for row, places in notes.sequences():
        places = [i for i in places if notes.mask[row, i]]
        if places:
            f = chosen[row, places].sum(0) * number / (k * len(places))
            p = share[row, places].sum(0) / len(places)
            notes.losses.append(moe["aux_coef"] * len(places) * (f * p).sum())
            notes.losses.append(moe["z_coef"] * (logits[row, places].exp().sum(-1).log() ** 2).sum())
    notes.loads[at + "router.bias"] = [int(n) for n in chosen[notes.mask].sum(0)]


def moved_biases(config: Config, weights: Weights, notes: Notes) -> dict[str, Tensor]:
    """Returns the selection biases after a step whose loads are in `notes` (arXiv 2408.15664)."""
    moved = {}
    for name, loads in notes.loads.items():
        if name in weights:
            mean = sum(loads) / len(loads)
            signs = [(load < mean) - (load > mean) for load in loads]
            moved[name] = weights[name] + config["moe"]["bias_rate"] * torch.tensor(signs, dtype=weights[name].dtype)
    return moved
