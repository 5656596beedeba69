"""Mixture of experts (MoE, its grouped GEMMs in `ops.grouped_gemm`) in place of a feed-forward
layer, with an optional dense layer beside it.

Experts are whole matrices on the ranks of an ep group: `gate_up (X, 2, F, D)` or `up (X, F, D)`,
and `down (X, D, F)`.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.models.attention import scaled_init
from megallm.models.balance import RoutingInputs
from megallm.models.config import ModelConfig
from megallm.models.mlp import Mlp
from megallm.models.router import Choice, Router
from megallm.ops.activation import ACTIVATIONS
from megallm.ops.grouped_gemm import Runs
from megallm.ops.moe_permute import combine, order_of, permute
from megallm.parallel.expert import (
    GroupedLinear,
    combine_rows,
    dispatch,
    gather_over_tp,
    plan_dispatch,
    scatter_over_tp,
)
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runner
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import ShardedModule, Slot, sequence_partial


class Experts(ShardedModule):
    """The experts of this rank: rows sorted by expert `[N, D]` -> `[N, D]`."""

    def __init__(self, config: ModelConfig, mesh: Mesh, recomputes: bool) -> None:
        super().__init__(mesh)
        moe, d, init = config.moe, config.hidden_size, normal(config.init_std)
        if moe.num_experts % mesh.ep.size:
            raise UsageError(
                f"layout.ep {mesh.ep.size} does not divide model.moe.num_experts {moe.num_experts}."
            )
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        experts, f = moe.num_experts, moe.ffn_hidden_size
        if self.gated:
            self.gate_up = GroupedLinear(mesh, (experts, 2, f, d), init, moe.bias)
        else:
            self.up = GroupedLinear(mesh, (experts, f, d), init, moe.bias)
        self.scale = Slot(mesh)  # on what `down` is applied to
        self.down = GroupedLinear(mesh, (experts, d, f), scaled_init(config), moe.bias)
        self.run = runner(recomputes)

    def inner(self, hidden: Tensor, runs: Runs) -> Tensor:
        """Applies the nonlinearity and `down`."""
        return self.down(self.scale(self.activation(hidden), None, runs), runs)

    def forward(self, x: Tensor, runs: Runs) -> Tensor:
        hidden = self.gate_up(x, runs) if self.gated else self.up(x, runs)
        return self.run(self.inner, hidden, runs)


class SharedGate(ShardedModule):
    """One sigmoid for each token, `[..., D] -> [..., 1]` (Qwen2-MoE)."""

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool) -> None:
        super().__init__(mesh)
        shard = Shard(
            (1, config.hidden_size), {}, sequence_partial(mesh, sp), normal(config.init_std)
        )
        self.add_parameter("weight", shard)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid()


class Moe(ShardedModule):
    """`[B, T/tp or T, D]` -> the same; `routing` says where the tokens stand (None in decoding)."""

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool, recomputes: bool) -> None:
        super().__init__(mesh, sp)
        self.router = Router(config, mesh)
        self.experts = Experts(config, mesh, recomputes)
        self.shared = self.shared_gate = None
        size = config.moe.shared_ffn_hidden_size
        if size:
            self.shared = Mlp(
                dataclasses.replace(config, ffn_hidden_size=size), mesh, sp, recomputes
            )
            self.shared_gate = SharedGate(config, mesh, sp) if config.moe.shared_gate else None

    def routed(self, tokens: Tensor, choice: Choice) -> Tensor:
        """Returns the weighted sum of each token's experts, `[n, D]`; collective over ep."""
        weights = choice.weights
        order, counts = order_of(choice.experts, self.router.moe.num_experts, choice.keep)
        plan = plan_dispatch(counts, self.mesh)
        if choice.keep is not None and (plan.sent or self.experts.down.fp8 is not None):
            # The host knows what is sent; FP8 scales must not see what is dropped.
            order = order[: sum(plan.sent or plan.runs.sizes)]
        elif choice.keep is not None:  # without a wait: dropped copies weigh nothing
            plan = dataclasses.replace(plan, runs=plan.runs.with_rest(len(order)))
            weights = weights.masked_fill(~choice.keep, 0.0)
        rows = dispatch(permute(tokens, order, self.router.moe.top_k), plan, self.mesh)
        y = combine_rows(self.experts(rows, plan.runs), plan, self.mesh)
        return combine(y, order, weights)

    def forward(self, x: Tensor, routing: RoutingInputs | None = None) -> Tensor:
        flat = x.flatten(0, 1)
        tokens = flat if self.sp else scatter_over_tp(flat, self.mesh)
        choice = self.router(tokens, routing)
        y = self.router.stats.attach(self.routed(tokens, choice), choice.sums)
        y = (y if self.sp else gather_over_tp(y, len(flat), self.mesh)).view_as(x)
        if self.shared is None:
            return y
        beside = self.shared(x)
        return y + (beside if self.shared_gate is None else beside * self.shared_gate(x))
