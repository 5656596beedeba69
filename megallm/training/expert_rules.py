"""Rules about experts, between the model, the layout and the way gradients are summed. Pure.

Each fault is a sentence and the nearest changes that mend it, for `validate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from megallm.models.config import ModelConfig
from megallm.run.config import JobConfig
from megallm.training.nearest import divisors, multiples, nearest_fixes

Fault = tuple[str, str, tuple[dict[str, Any], ...]]  # the key that is unusable, the sentence, fixes


def size_faults(config: JobConfig) -> Iterator[Fault]:
    """Numbers of experts and groups that do not go together, as far as they were given."""
    moe = config.model.moe
    experts, groups = moe.num_experts, moe.num_groups or 1
    if not experts or experts < 0:
        return
    if moe.top_k is not None and moe.top_k > experts:
        sentence = f"model.moe.top_k {moe.top_k} is more than model.moe.num_experts {experts}."
        yield (
            "model.moe.top_k",
            sentence,
            ({"model.moe.top_k": experts}, {"model.moe.num_experts": moe.top_k}),
        )
    if groups > 1 and experts % groups:
        sentence = f"model.moe.num_groups {groups} does not divide model.moe.num_experts {experts}."
        yield (
            "model.moe.num_groups",
            sentence,
            nearest_fixes("model.moe.num_groups", groups, divisors(experts)),
        )
        return
    if moe.top_groups is not None and moe.top_groups > groups:
        sentence = (
            f"model.moe.top_groups {moe.top_groups} is more than model.moe.num_groups {groups}."
        )
        yield "model.moe.top_groups", sentence, ({"model.moe.top_groups": groups},)
        return
    room = (moe.top_groups or 1) * (experts // groups)
    if moe.top_k is not None and room < moe.top_k <= experts:
        needed = -(-moe.top_k // (experts // groups))
        sentence = f"model.moe.top_k {moe.top_k} is more than the {room} experts of the groups that a token may take."
        fewer: dict[str, Any] = {"model.moe.top_k": room}
        if room == 1 and moe.norm_topk_prob is not False:  # see `router_faults`
            fewer["model.moe.norm_topk_prob"] = False
        yield "model.moe.top_k", sentence, (fewer, {"model.moe.top_groups": needed})


def router_faults(model: ModelConfig) -> Iterator[tuple[str, tuple[dict, ...]]]:
    """A router that nothing teaches: the one chosen weight, scaled to a sum of 1, is 1 whatever the
    router says.
    """
    moe = model.moe
    if moe.top_k != 1 or moe.num_experts < 2 or not moe.norm_topk_prob:
        return
    sentence = "model.moe.top_k 1 with model.moe.norm_topk_prob true makes the weight of the one chosen expert 1, so "
    sentence += "the router gets no gradient from the loss and never learns to choose."
    fixes: tuple[dict[str, Any], ...] = ({"model.moe.norm_topk_prob": False},)
    if moe.top_groups * (moe.num_experts // moe.num_groups) >= 2:
        fixes += ({"model.moe.top_k": 2},)
    yield sentence, fixes


def layout_faults(
    config: JobConfig, model: ModelConfig, dp: int, world: int | None
) -> Iterator[tuple[str, tuple[dict, ...]]]:
    """What a layout and a way of summing gradients ask of experts; `dp` counts as 1 when nothing
    says what it is.
    """
    layout, experts = config.layout, model.moe.num_experts
    ranks, ep = dp * layout.cp * layout.tp, layout.ep
    if ep > 1 and not experts:
        sentence = f"layout.ep is {ep}, but the model has no experts (model.moe.num_experts 0)."
        yield (
            sentence,
            ({"layout.ep": 1}, *(({"model.moe.num_experts": ep},) if ranks % ep == 0 else ())),
        )
        return
    if ranks % ep:
        sentence = f"layout.ep {ep} does not divide the {ranks} ranks of a pipeline stage, dp {dp} x cp {layout.cp} x "
        sentence += f"tp {layout.tp}, which are cut into groups that each hold every expert."
        fixes = nearest_fixes("layout.ep", ep, divisors(gcd(ranks, experts)))
        if layout.dp is None and world is None and experts % ep == 0:
            fixes += ({"layout.dp": ep // gcd(ep, ranks)},)
        yield sentence, fixes
    elif experts % ep:
        sentence = f"layout.ep {ep} does not divide model.moe.num_experts {experts}: a rank holds whole experts."
        fixes = nearest_fixes("layout.ep", ep, divisors(gcd(ranks, experts)))
        yield (
            sentence,
            fixes + nearest_fixes("model.moe.num_experts", experts, multiples(experts, ep)),
        )
    if experts and config.train.determinism == "tree":
        sentence = "train.determinism tree sums gradients over dp and cp in one fixed order; "
        sentence += "those of experts are summed over other groups, "
        sentence += "so a model with model.moe.num_experts has no such order."
        yield sentence, ({"train.determinism": "none"},)
