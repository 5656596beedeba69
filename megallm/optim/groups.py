"""Param groups: which update rule, learning rate and weight decay each parameter gets, from its
logical name and its Shard. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from megallm.base.errors import UsageError
from megallm.optim.buckets import ParamGroup
from megallm.optim.config import GroupConfig, OptimConfig
from megallm.parallel.shard import Shard

HIDDEN = (
    "layers.",
    "mtp.",
)  # where Muon's matrices are: the blocks of a model, not its embeddings and heads


def param_group(config: OptimConfig, name: str, shard: Shard) -> ParamGroup:
    """Returns how the optimizer of a resolved configuration treats one parameter."""
    group = next((group for group in config.groups if matches(group.match, name)), GroupConfig())
    decay = config.weight_decay if shard.decay else 0.0
    decay = decay if group.weight_decay is None else group.weight_decay
    return ParamGroup(rule_of(config.rule, name, shard), decay, group.lr_scale, group.frozen)


def rule_of(rule: str, name: str, shard: Shard) -> str:
    """Returns the update of one parameter: Muon leaves all but hidden matrices to AdamW, Adafactor
    does not factor vectors.
    """
    if rule == "muon" and not (is_matrix(shard) and name.startswith(HIDDEN)):
        return "adamw"
    if rule == "adafactor" and not is_matrix(shard):
        return "adafactor.vector"
    return rule


def is_matrix(shard: Shard) -> bool:
    """Returns whether the last two dims are a matrix; norms and biases are vectors, stacked ones
    too.
    """
    return len(shard.full) >= 2 and shard.decay


def matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern means a name: between slashes it is a regular expression that
    occurs in the name, any other a glob of all of it.
    """
    if len(pattern) >= 2 and pattern[0] == pattern[-1] == "/":
        return re.search(pattern[1:-1], name) is not None
    return fnmatchcase(name, pattern)


def pattern_problem(pattern: str) -> str | None:
    """Returns why a pattern cannot be used, as the end of a sentence; None when it can."""
    if not pattern:
        return "is empty; give a pattern of logical names, such as *.mlp.down.weight or /norm/"
    if len(pattern) >= 2 and pattern[0] == pattern[-1] == "/":
        try:
            re.compile(pattern[1:-1])
        except re.error as error:
            return f"is no regular expression between the slashes: {error}"
    return None


def check_groups(config: OptimConfig, names: Iterable[str]) -> None:
    """Raise UsageError for a group that is the first match of no parameter of the whole model."""
    names = sorted(set(names))
    groups = list(enumerate(config.groups))
    taken = {next((i for i, group in groups if matches(group.match, name)), None) for name in names}
    for i, group in groups:
        if i not in taken:
            earlier = any(matches(group.match, name) for name in names)
            why = (
                "all it matches belongs to an earlier group"
                if earlier
                else "no parameter has such a name"
            )
            raise UsageError(
                f"optim.groups[{i}].match '{group.match}' takes no parameter: {why}. The model "
                f"has, for example, {', '.join(names[:: max(1, len(names) // 6)][:6])}."
            )
