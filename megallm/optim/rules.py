"""The update rules: what each keeps for a parameter, and what a shard of it must not cut. Pure.

State that is shaped like the parameter lies in flat buffers beside it; any other state has a Shard
of its own. Both are saved as boxes of logical tensors `optim.STATE.PARAMETER`, so that they can be
read at any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from megallm.optim.buckets import ALIGN
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.shard import Shard


@dataclass(frozen=True)
class State:
    """One tensor for each parameter; `shard` makes its record from the parameter's, None: shaped
    like it.

    `kept` says whether settings call for it at all.
    """

    name: str
    shard: Callable[[Shard], Shard] | None = None
    kept: Callable[[OptimConfig], bool] = lambda config: True


@dataclass(frozen=True)
class UpdateRule:
    """`matrix` rules need whole matrices (the last two dims): shards end where matrices end."""

    states: tuple[State, ...]
    granularity: Literal["element", "matrix"] = "element"

    def like(self, config: OptimConfig) -> list[str]:
        """Names of the state that is shaped like the parameter."""
        return [state.name for state in self.states if state.shard is None and state.kept(config)]


def row_factor(shard: Shard) -> Shard:
    """Returns one number for each row of each matrix: the parameter without its last dim."""
    last = len(shard.full) - 1
    return replace(
        shard,
        full=shard.full[:-1],
        split={d: a for d, a in shard.split.items() if d != last},
        partial=(),
    )


def column_factor(shard: Shard) -> Shard:
    """Returns one number for each column of each matrix: the parameter without its last dim but
    one.
    """
    last = len(shard.full) - 1
    split = {min(d, last - 1): a for d, a in shard.split.items() if d != last - 1}
    return replace(shard, full=(*shard.full[:-2], shard.full[-1]), split=split, partial=())


def whole_elements(rule: str, shard: Shard, layout: Layout, local: tuple[int, ...]) -> int:
    """Returns `BucketParam.whole` of a parameter of this rule whose piece on this rank has the
    shape `local`.
    """
    if RULES[rule].granularity == "element":
        return 0
    rows, columns = local[-2:]
    count = rows * columns
    even = all(shard.full[dim] % layout.size(axis) == 0 for dim, axis in shard.split.items())
    return count if even and count % ALIGN == 0 else prod(local)


_MOMENTUM = State("momentum", kept=lambda config: config.momentum != 0)
_MOMENTS = (State("exp_avg"), State("exp_avg_sq"))
RULES: dict[str, UpdateRule] = {
    "adamw": UpdateRule(_MOMENTS),  # arXiv 1711.05101
    "adam": UpdateRule(_MOMENTS),  # arXiv 1412.6980
    "sgd": UpdateRule((_MOMENTUM,)),  # Sutskever et al. 2013
    "adagrad": UpdateRule((State("sum"),)),  # Duchi et al. 2011
    "rmsprop": UpdateRule((State("square_avg"), _MOMENTUM)),  # Hinton 2012, lecture 6e
    "lion": UpdateRule((State("exp_avg"),)),  # arXiv 2302.06675
    "adafactor": UpdateRule(
        (State("rows", row_factor), State("columns", column_factor))
    ),  # arXiv 1804.04235
    "adafactor.vector": UpdateRule((State("exp_avg_sq"),)),
    "muon": UpdateRule((_MOMENTUM,), "matrix"),  # Jordan 2024; arXiv 2502.16982
}
