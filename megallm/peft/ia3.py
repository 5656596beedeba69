"""(IA)3: activations scaled by learned vectors that start at one (Liu et al., arXiv 2205.05638).

Keys and values are scaled behind their projection, and the inner activation of a feed-forward
layer in front of `down`. A vector is divided as the features are that it scales.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.models.decoder import Stage
from megallm.models.mlp import Mlp
from megallm.models.moe import Experts
from megallm.ops.grouped_gemm import Runs
from megallm.parallel.expert import GroupedLinear
from megallm.parallel.shard import Shard, constant
from megallm.parallel.tensor import Linear, RowLinear, ShardedModule
from megallm.peft.injection import Injection
from megallm.peft.lora import rows_of
from megallm.peft.slots import put
from megallm.peft.targets import Target

SCALE = "ia3_l"
DOWN = ".down"


def usual_targets(found: list[Target]) -> list[Target]:
    """Returns keys, values and the feed-forward layers' `down`, as the paper has them."""
    keys = (".attention.kv", ".attention.k_up", ".attention.v_up", DOWN)
    return [target for target in found if target.module.endswith(keys)]


def fill_ia3(stage: Stage, injection: Injection) -> None:
    """Scale the output of each target of the stage; of `down` its input."""
    modules, name = dict(stage.named_modules()), injection.config.name
    for at, targets in groupby(injection.chosen, attrgetter("module")):
        if at not in modules:
            continue
        members, parent = tuple(target.member for target in targets), at.removesuffix(DOWN)
        if parent != at:
            put(modules[f"{parent}.scale"], name, InnerScale(modules[parent]))
        else:
            put(modules[at], name, ScaledOutputs(modules[at], members))


class OutputScale(ShardedModule):
    """One vector `(out,)` for one matrix of a linear."""

    def __init__(self, base: Linear) -> None:
        super().__init__(base.mesh, base.sp)
        shard, tp = base.shards["weight"], ("tp",) if base.mesh.tp.size > 1 else ()
        axis = shard.split.get(len(shard.full) - 2)
        partial = tp if isinstance(base, RowLinear) else shard.partial
        split, partial = ({}, partial) if axis is None else ({0: axis}, ())
        self.add_parameter(SCALE, Shard((shard.full[-2],), split, partial, constant(1.0), False))

    def forward(self, y: Tensor, rows: slice | None) -> Tensor:
        return y * rows_of(self.ia3_l, rows)


class ScaledOutputs(nn.ModuleDict):
    """The vectors of the matrices of one linear, by their place in its stack.

    Raises UsageError for a linear whose bias is added behind the slot, or that holds experts.
    """

    def __init__(self, base: Linear, members: tuple[int, ...]) -> None:
        late_bias = isinstance(base, RowLinear) and base.bias is not None
        if not isinstance(base, Linear) or isinstance(base, GroupedLinear) or late_bias:
            raise UsageError(
                "peft.method ia3 scales outputs of linears that are no experts, and not of an "
                "output projection with a bias; name other modules in peft.targets."
            )
        super().__init__({str(member): OutputScale(base) for member in members})
        shard = base.shards["weight"]
        self.stack = shard.full[:-2]

    def forward(self, x: Tensor, y: Tensor, rows: slice | None) -> Tensor:
        if not self.stack:
            return self["0"](y, rows)
        parts = list(y.chunk(self.stack[0], dim=-1))
        for member, scale in self.items():
            parts[int(member)] = scale(parts[int(member)], rows)
        return torch.cat(parts, dim=-1)


class InnerScale(ShardedModule):
    """The vector `(F,)` in front of `down` of a feed-forward layer; `(X, F)` of experts."""

    def __init__(self, base: Mlp | Experts) -> None:
        super().__init__(base.mesh)
        shard = base.down.shards["weight"]
        full = (*shard.full[:-2], shard.full[-1])
        split = {0: "ep"} if shard.expert else {0: "tp"}
        self.add_parameter(SCALE, Shard(full, split, (), constant(1.0), False))

    def forward(self, x: None, y: Tensor, runs: Runs | None = None) -> Tensor:
        if runs is None:
            return y * self.ia3_l
        rows = torch.arange(len(y), dtype=torch.int32, device=y.device)
        return y * self.ia3_l[torch.searchsorted(runs.ends, rows, right=True)]
