"""Expert parallelism, dropless (no capacity factor), token dispatch and combine: tokens travel to
the ranks that hold their experts, and back (GShard, arXiv 2006.16668).

The tp ranks of a tensor-parallel group share out the tokens, since all of them would hold the same
(under sequence parallelism they already have different ones). Each copy of a token then goes by
all-to-all over ep to the rank of its expert; a rank holds X/ep whole experts. How many rows travel
depends on the router, so with ep > 1 a layer waits for the device once, to learn it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.grouped_gemm import Runs, grouped_linear
from megallm.ops.moe_permute import permute, unpermute
from megallm.parallel import comm
from megallm.parallel.fp8 import fp8_grouped_linear
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Init, Shard, constant
from megallm.parallel.tensor import Linear


def scatter_over_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Maps `[N, ...]`, the same on every tp rank -> this rank's share `[ceil(N / tp), ...]`, zeros
    after the last.
    """
    missing = -len(x) % mesh.tp.size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
    return comm.slice_fwd_gather_bwd(x, mesh.tp, 0, "moe.enter")


def gather_over_tp(y: Tensor, count: int, mesh: Mesh) -> Tensor:
    """Gathers the shares of all tp ranks, `[count, ...]` on each; collective over tp."""
    return comm.gather_fwd_slice_bwd(y, mesh.tp, 0, "moe.leave")[:count]


@dataclass(frozen=True)
class DispatchPlan:
    """Rows to and from each ep rank; `order` sorts what came by local expert (None: it is
    sorted).
    """

    sent: list[int]
    received: list[int]
    order: Tensor | None
    runs: Runs


def plan_dispatch(counts: Tensor, mesh: Mesh) -> DispatchPlan:
    """Returns the plan of the exchange from the number of rows for each expert here, int64 `[X]`;
    collective over ep, and waits for the device then.
    """
    size, device = mesh.ep.size, counts.device
    if size == 1:
        return DispatchPlan([], [], None, Runs(counts.cumsum(0).to(torch.int32)))
    mine = counts.view(size, -1)
    theirs = comm.exchange_rows(mine, mesh.ep, [1] * size, [1] * size, "sizes")
    out, here = torch.stack((mine, theirs)).tolist()
    sent, received = [sum(row) for row in out], [sum(row) for row in here]
    local = torch.arange(mine.shape[1], device=device).repeat(size)
    local = torch.repeat_interleave(local, theirs.flatten(), output_size=sum(received))
    order = local.argsort(stable=True)
    return DispatchPlan(
        sent, received, order, Runs.of([sum(column) for column in zip(*here, strict=True)], device)
    )


def dispatch(x: Tensor, plan: DispatchPlan, mesh: Mesh) -> Tensor:
    """Copies sorted by expert `[M, D]` -> the rows of this rank's experts, sorted by expert;
    collective over ep.
    """
    x = comm.exchange_rows_fwd_exchange_rows_bwd(
        x, mesh.ep, plan.sent, plan.received, "moe.dispatch"
    )
    return x if plan.order is None else permute(x, plan.order, 1)


def combine_rows(y: Tensor, plan: DispatchPlan, mesh: Mesh) -> Tensor:
    """Sends the experts' outputs back to where `dispatch` took their rows from; collective over ep.
    """
    y = y if plan.order is None else unpermute(y, plan.order, len(y))
    return comm.exchange_rows_fwd_exchange_rows_bwd(
        y, mesh.ep, plan.received, plan.sent, "moe.combine"
    )


def expert_replicas(mesh: Mesh) -> Axis:
    """Returns the ranks that have the other rows of an expert's input in a microbatch; collective
    over the world, once.

    That input is what one data rank sends where ep divides tp x cp, and otherwise what the fewest
    neighbouring data ranks send that are whole runs of ep. The ranks are neighbours on edp.
    """
    tokens = mesh.layout.tp * mesh.layout.cp
    return mesh.view("expert_grads", lcm(mesh.layout.ep, tokens) // mesh.layout.ep)[1]


class GroupedLinear(Linear):
    """A linear of each expert: W `(X, *stack, out, in)` and perhaps a bias `(X, *stack, out)`;
    whole experts divided over ep, never split over tp.
    """

    def __init__(self, mesh: Mesh, full: tuple[int, ...], init: Init, bias: bool = False) -> None:
        super().__init__(mesh)
        self.add_parameter("weight", Shard(full, {0: "ep"}, (), init))
        self.register_parameter("bias", None)
        if bias:
            shard = Shard(full[:-1], {0: "ep"}, (), constant(0.0), decay=False)
            self.add_parameter("bias", shard)

    def forward(self, x: Tensor, runs: Runs) -> Tensor:
        """Maps rows sorted by expert `[N, in]` -> `[N, stack * out]`."""
        if self.quantized is not None:
            y = self.quantized.grouped_linear(x, runs)
        elif self.fp8 is not None:
            y = fp8_grouped_linear(x, self.weight.flatten(1, -2), runs, self.fp8, self.weight_grads)
        else:
            y = grouped_linear(x, self.weight.flatten(1, -2), runs, self.weight_grads)
        if self.bias is not None:
            places = torch.arange(len(x), dtype=runs.ends.dtype, device=x.device)
            experts = torch.searchsorted(runs.ends, places, right=True)
            y = y + self.bias.flatten(1).index_select(0, experts)
        return self.adapted(x, y, runs)

    @property
    def divided(self) -> dict[str, tuple[Axis, ...]]:
        return {"tokens": (expert_replicas(self.mesh),), "in": (), "out": ()}
