"""What adapters may stand at, under every name that it goes by: ours, and those of Hugging Face's
folders.

A stack of matrices, such as keys and values, is a target for each of them; all experts of a linear
are one target, as in PEFT's `target_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

from megallm.base.errors import UsageError
from megallm.base.suggest import did_you_mean
from megallm.convert.families import FAMILIES
from megallm.convert.rules import WeightRule, expand, parse
from megallm.convert.weights import counts_of, logical_shapes, whole_stage
from megallm.models.config import VOCABULARY_HEADS, ModelConfig
from megallm.optim.groups import matches
from megallm.parallel.mesh import Mesh
from megallm.parallel.tensor import Linear
from megallm.parallel.vocab import VocabEmbedding
from megallm.peft.config import ALL_LINEAR

LINEAR, EXPERTS, EMBEDDING, HEAD = "linear", "experts", "embedding", "head"


class Target(NamedTuple):
    """One matrix of the base: the logical name of its module, its place in the module's stack, what
    it is, and the names of its module."""

    module: str
    member: int
    kind: str
    names: tuple[str, ...]


def find_targets(model: ModelConfig) -> list[Target]:
    """Returns everything of a resolved model that an adapter can stand at, in model order."""
    stage, theirs = whole_stage(model, Mesh.single("meta")), their_modules(model)
    found = []
    for name, module in stage.named_modules():
        if isinstance(module, Linear):
            shard = module.shards["weight"]
            kind = EXPERTS if shard.expert else LINEAR
            stack = shard.full[:-2] if kind == LINEAR else ()
            found += [
                Target(name, i, kind, _names(name, i, bool(stack), kind, theirs))
                for i in range(prod(stack))
            ]
        elif isinstance(module, VocabEmbedding):
            found.append(Target(name, 0, EMBEDDING, _names(name, 0, False, EMBEDDING, theirs)))
    if model.head in VOCABULARY_HEADS:
        found.append(Target("head", 0, HEAD, ("head", *theirs.get(("head", 0), ("lm_head",)))))
    return found


def find_modules(model: ModelConfig) -> list[Target]:
    """Returns every module of a resolved model that has parameters, under all its names."""
    stage, theirs = whole_stage(model, Mesh.single("meta")), their_modules(model)
    found = []
    for name, module in stage.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            named = [each for (at, _), names in theirs.items() if at == name for each in names]
            found.append(Target(name, 0, LINEAR, (name, *named)))
    return found


def _names(
    module: str, member: int, stacked: bool, kind: str, theirs: Mapping[tuple[str, int], list[str]]
) -> tuple[str, ...]:
    own = (module, f"{module}[{member}]") if stacked else (module,)
    named = theirs.get((module, member), [])
    if kind == EXPERTS:
        named = [name for (at, _), names in theirs.items() if at == module for name in names]
    return tuple(dict.fromkeys((*own, *named)))


def their_modules(model: ModelConfig) -> dict[tuple[str, int], list[str]]:
    """Returns the names of Hugging Face's modules for each (module, place in its stack) of ours."""
    found: dict[tuple[str, int], list[str]] = {}
    for each in weight_rules(model):
        name, _ = parse(each.theirs)
        for source in each.ours:
            ours, stack = parse(source)
            place = stack[-1] if stack else 0
            known = found.setdefault((ours.removesuffix(".weight"), place), [])
            known.append(runtime_name(name.removesuffix(".weight")))
    return found


def runtime_name(module: str) -> str:
    """Returns what transformers calls a module that older folders name otherwise (Mixtral's)."""
    return module.replace(".block_sparse_moe.", ".mlp.")


def weight_rules(model: ModelConfig) -> Iterator[WeightRule]:
    """Yields the rules of the model's matrices in its family, spelled out, in both forms of
    experts; none for a model of no family.
    """
    family = FAMILIES.get(model.family or "")
    if family is None:
        return
    held = logical_shapes(model)
    for each in expand((*family.rules_of(model.head), *family.fused), counts_of(model)):
        ours, _ = parse(each.ours[0])
        if ours.endswith(".weight") and not each.copy and each.holds(held):
            yield each


def match_targets(
    wanted: Iterable[str], found: Iterable[Target], key: str = "peft.targets"
) -> list[Target]:
    """Returns the targets that the patterns mean, in model order.

    A word means modules whose name ends with it, `*` and `?` work as in file names, and `/.../` is
    a regular expression. Raises UsageError for a pattern that means nothing.
    """
    found = list(found)
    chosen: set[tuple[str, int]] = set()
    for pattern in wanted:
        here = {(target.module, target.member) for target in found if _means(pattern, target)}
        if not here:
            endings = {name.rpartition(".")[2] for target in found for name in target.names}
            raise UsageError(
                f"{key}: '{pattern}' is no module of the model.{did_you_mean(pattern, endings)} "
                f"It has {', '.join(sorted(endings))}; write one, a pattern such as "
                "*.mlp.down, a regular expression between slashes, or all-linear."
            )
        chosen |= here
    return [target for target in found if (target.module, target.member) in chosen]


def _means(pattern: str, target: Target) -> bool:
    if pattern == ALL_LINEAR:
        in_head = target.module.partition(".")[0] == "head"
        return target.kind in (LINEAR, EXPERTS) and not in_head
    return any(named(pattern, name) for name in target.names)


def named(pattern: str, name: str) -> bool:
    """Returns whether a pattern means a module of this name: as the end of it, or as `optim.groups`
    do.
    """
    return name == pattern or name.endswith(f".{pattern}") or matches(pattern, name)


def pattern_value(patterns: Mapping[str, float], target: Target, default: float) -> float:
    """Returns the value of the first pattern that means the target, else the default."""
    for pattern, value in patterns.items():
        if any(named(pattern, name) for name in target.names):
            return value
    return default
