"""Rules about experts, between the model, the layout and the way gradients are summed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from megallm.run.config import JobConfig
from megallm.training.rules.nearest import divisors, multiples, nearest_fixes
from megallm.training.rules.problem import AXES, Facts, Problem, Rules


def sizes(config: JobConfig) -> Iterator[Problem]:
    """Yields numbers of experts and groups that do not go together, as far as they were given."""
    moe = config.model.moe
    experts, groups = moe.num_experts, moe.num_groups or 1
    if not experts or experts < 0:
        return
    if moe.top_k is not None and moe.top_k > experts:
        sentence = f"model.moe.top_k {moe.top_k} is more than model.moe.num_experts {experts}."
        yield Problem(
            "expert_sizes",
            sentence,
            ({"model.moe.top_k": experts}, {"model.moe.num_experts": moe.top_k}),
            "model.moe.top_k",
        )
    if groups > 1 and experts % groups:
        sentence = f"model.moe.num_groups {groups} does not divide model.moe.num_experts {experts}."
        yield Problem(
            "expert_sizes",
            sentence,
            nearest_fixes("model.moe.num_groups", groups, divisors(experts)),
            "model.moe.num_groups",
        )
        return
    if moe.top_groups is not None and moe.top_groups > groups:
        sentence = (
            f"model.moe.top_groups {moe.top_groups} is more than model.moe.num_groups {groups}."
        )
        yield Problem(
            "expert_sizes", sentence, ({"model.moe.top_groups": groups},), "model.moe.top_groups"
        )
        return
    room = (moe.top_groups or 1) * (experts // groups)
    if moe.top_k is not None and room < moe.top_k <= experts:
        needed = -(-moe.top_k // (experts // groups))
        sentence = (
            f"model.moe.top_k {moe.top_k} is more than the {room} experts of the "
            "groups that a token may take."
        )
        fewer: dict[str, Any] = {"model.moe.top_k": room}
        if room == 1 and moe.norm_topk_prob is not False:  # see `router`
            fewer["model.moe.norm_topk_prob"] = False
        yield Problem(
            "expert_sizes", sentence, (fewer, {"model.moe.top_groups": needed}), "model.moe.top_k"
        )


def router(facts: Facts) -> Iterator[Problem]:
    """Yields a router that nothing teaches: the one chosen weight, scaled to a sum of 1, is 1
    whatever the router says.
    """
    moe = facts.model.moe
    if moe.top_k != 1 or moe.num_experts < 2 or not moe.norm_topk_prob:
        return
    sentence = (
        "model.moe.top_k 1 with model.moe.norm_topk_prob true makes the weight of the "
        "one chosen expert 1, so "
    )
    sentence += "the router gets no gradient from the loss and never learns to choose."
    fixes: tuple[dict[str, Any], ...] = ({"model.moe.norm_topk_prob": False},)
    if moe.top_groups * (moe.num_experts // moe.num_groups) >= 2:
        fixes += ({"model.moe.top_k": 2},)
    yield Problem("router", sentence, fixes)


def placement(facts: Facts) -> Iterator[Problem]:
    """Yields what a layout and a way of summing gradients ask of experts."""
    if not facts.dp_is_known:
        return
    config, model, dp, world = facts.config, facts.model, facts.dp, facts.world
    layout, experts = config.layout, model.moe.num_experts
    ranks, ep = dp * layout.cp * layout.tp, layout.ep
    if ep > 1 and not experts:
        sentence = f"layout.ep is {ep}, but the model has no experts (model.moe.num_experts 0)."
        yield Problem(
            "experts",
            sentence,
            ({"layout.ep": 1}, *(({"model.moe.num_experts": ep},) if ranks % ep == 0 else ())),
        )
        return
    if ranks % ep:
        sentence = (
            f"layout.ep {ep} does not divide the {ranks} ranks of a pipeline stage, dp "
            f"{dp} x cp {layout.cp} x "
        )
        sentence += f"tp {layout.tp}, which are cut into groups that each hold every expert."
        fixes = nearest_fixes("layout.ep", ep, divisors(gcd(ranks, experts)))
        if layout.dp is None and world is None and experts % ep == 0:
            fixes += ({"layout.dp": ep // gcd(ep, ranks)},)
        yield Problem("experts", sentence, fixes)
    elif experts % ep:
        sentence = (
            f"layout.ep {ep} does not divide model.moe.num_experts {experts}: a rank "
            "holds whole experts."
        )
        fixes = nearest_fixes("layout.ep", ep, divisors(gcd(ranks, experts)))
        yield Problem(
            "experts",
            sentence,
            fixes + nearest_fixes("model.moe.num_experts", experts, multiples(experts, ep)),
        )
    if experts and config.train.determinism == "tree":
        sentence = "train.determinism tree sums gradients over dp and cp in one fixed order; "
        sentence += "those of experts are summed over other groups, "
        sentence += "so a model with model.moe.num_experts has no such order."
        yield Problem("experts", sentence, ({"train.determinism": "none"},))


_MOE = ("num_experts", "top_k", "num_groups", "top_groups")
RULES = Rules(
    given=(sizes,),
    resolved={
        placement: (*AXES, "layout.ep", "model.moe.num_experts"),
        router: tuple(f"model.moe.{name}" for name in _MOE),
    },
)
