"""The names of adapters in PEFT's files, made of the rules of the base's weights.

Where a matrix of theirs is ours, A and B are too: B has the rows of the matrix, in its order, and A
its input. Where theirs joins several of ours (Phi-3's qkv_proj), our A lie end to end, and our B
are the blocks of a diagonal. Experts lie in two dims there: `A (X r, in)` and `B (out, r X)`, the
expert the faster one in B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from megallm.convert.families import FAMILIES
from megallm.convert.rules import Bridge, WeightRule, expand, parse, plan_bridge
from megallm.convert.weights import counts_of
from megallm.models.config import ModelConfig
from megallm.parallel.tensor import ADAPTER
from megallm.peft.lora import MAGNITUDE, A, B
from megallm.peft.targets import runtime_name, weight_rules

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


class Leaf(NamedTuple):
    """A parameter of an adapter: its ending in their files, and whether its rows are those of the
    matrix."""

    ending: str
    of_rows: bool


LEAVES: dict[str, Leaf] = {
    A: Leaf(".lora_A.weight", False),
    B: Leaf(".lora_B.weight", True),
    MAGNITUDE: Leaf(".lora_magnitude_vector", True),
    "lora_embedding_A": Leaf(".lora_embedding_A", False),
    "lora_embedding_B": Leaf(".lora_embedding_B", False),
}


@dataclass(frozen=True)
class KeyPlan:
    """How the tensors of one adapter are theirs: the bridge between both, which of our B stand in a
    block of columns `(first, all)` of theirs, and their modules with our parts in order."""

    bridge: Bridge
    blocks: Mapping[str, tuple[int, int]]
    modules: Mapping[str, tuple[str, ...]]


def plan_keys(model: ModelConfig, ours: Shapes, name: str) -> KeyPlan:
    """Returns the plan for the tensors `ours` of the adapter `name`, and for what of the base
    is among them. Raises InternalError for a tensor that the family's files have no place for."""
    rules, modules = [], {}
    shapes, blocks = dict(ours), {}
    for each in weight_rules(model):
        module, place = parse(each.theirs)
        module = runtime_name(module.removesuffix(".weight"))
        for leaf, how in LEAVES.items():
            sources = [
                found for source in each.ours if (found := _source(source, leaf, name, ours))
            ]
            if not sources or bool(parse(sources[0])[1]) != bool(place):
                continue  # PEFT has the experts of a layer in one tensor
            sources = list(dict.fromkeys(sources))
            theirs = PREFIX + module + how.ending + (f"[{place[0]}]" if place else "")
            kept = each if how.of_rows else WeightRule("", ())
            made = replace(kept, theirs=theirs, ours=tuple(sources), transpose=False)
            rules.append(replace(made, where="", copy=False))
            tensors = [parse(source)[0] for source in sources]
            if leaf == A:
                modules[module] = tuple(text.rpartition(".")[0] for text in tensors)
            if leaf == B and not place:
                blocks |= _blocks(tensors, ours)
    shapes |= {text: (*ours[text][:-1], total) for text, (_, total) in blocks.items()}
    rules += _whole(model, ours)
    return KeyPlan(plan_bridge(_distinct(rules), shapes, counts_of(model)), blocks, modules)


def _source(source: str, leaf: str, name: str, ours: Shapes) -> str | None:
    """Our tensor of the adapter of a matrix, as a rule names it; None where there is none."""
    tensor, stack = parse(source)
    slot = tensor.removesuffix(".weight") + ADAPTER + name
    member = f"{slot}.{stack[-1] if stack else 0}.{leaf}"
    if member in ours:
        return member
    whole = f"{slot}.{leaf}"
    if whole not in ours:
        return None
    inner = stack[: len(ours[whole]) - 2]
    return whole + (f"[{','.join(map(str, inner))}]" if inner else "")


def _blocks(tensors: list[str], ours: Shapes) -> dict[str, tuple[int, int]]:
    """Which columns each of several B that are joined has; none for one alone."""
    if len(tensors) == 1:
        return {}
    total, first, found = sum(ours[text][-1] for text in tensors), 0, {}
    for text in tensors:
        found[text] = (first, total)
        first += ours[text][-1]
    return found


def _whole(model: ModelConfig, ours: Shapes) -> Iterator[WeightRule]:
    """The rules of the base's own tensors, those of `modules_to_save`."""
    family = FAMILIES.get(model.family or "")
    for each in () if family is None else expand(family.rules_of(model.head), counts_of(model)):
        if all(parse(source)[0] in ours for source in each.ours) and not each.copy:
            yield replace(each, theirs=PREFIX + each.theirs)


def _distinct(rules: Iterable[WeightRule]) -> list[WeightRule]:
    """Each rule once: both forms of a family's rules may make the same."""
    return list({(each.theirs, each.ours): each for each in rules}.values())


def in_file(theirs: str, names: Iterable[str]) -> str:
    """Returns the name in a file of a tensor of the bridge, whose names are `names`.

    PEFT wraps the parameters of a module of experts one around the other: `gate_up_proj` is inside.
    """
    head, dot, leaf = theirs.partition(".lora_")
    module, _, parameter = head.rpartition(".")
    if not module.endswith(".experts"):
        return theirs
    inside = parameter == "gate_up_proj" and f"{module}.down_proj{dot}{leaf}" in names
    return f"{module}{'.base_layer' if inside else ''}{dot}{leaf}"


def to_file(theirs: str, tensor: Tensor) -> Tensor:
    """Returns a tensor of the bridge as it lies in a file: that of experts in two dims."""
    if tensor.dim() == 3:
        of_b = theirs.endswith(LEAVES[B].ending)
        return tensor.permute(1, 2, 0).flatten(1) if of_b else tensor.flatten(0, 1)
    return tensor


def from_file(theirs: str, tensor: Tensor, full: tuple[int, ...]) -> Tensor:
    """Returns a tensor of a file in the shape `full` that the bridge has; the reverse of
    `to_file`."""
    if len(full) == 3 and theirs.endswith(LEAVES[B].ending):
        return tensor.view(full[1], full[2], full[0]).permute(2, 0, 1)
    return tensor.view(full)
