"""The transformer block: the one unit of recompute, gradient buckets and sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megallm.models.attention import Attention, AttentionInputs, LayerCache
from megallm.models.compute import BLOCK
from megallm.models.config import ModelConfig
from megallm.models.layer_plan import LayerPlan
from megallm.models.mla import LatentAttention
from megallm.models.mlp import Mlp
from megallm.models.moe import Moe
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import input_runner, runner
from megallm.parallel.tensor import Norm, ShardedModule, Slot, sequence_partial


class Block(ShardedModule):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`. Post-norm: `norm(x +
    attention(x))`, and so on. Norms of the output: `x + norm(attention(x))`, or both. With a
    parallel residual both sublayers read the same `x` (GPT-J).

    With experts a mixture of them, called `moe`, stands in place of the mlp. `recompute` are the
    parts whose activations are made again in the backward pass (`models.compute.PARTS`); a stage
    calls `block.run(block, ...)`, which recomputes the whole block where that is asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sp: bool,
        recompute: frozenset[str],
        plan: LayerPlan,
    ) -> None:
        super().__init__(mesh)
        partial = sequence_partial(mesh, sp)
        core, activation = "core" in recompute, "activation" in recompute

        def norm(here: bool) -> Norm | None:
            size, eps = config.hidden_size, config.norm_eps
            return Norm(mesh, config.norm, size, eps, partial) if here else None

        place, self.parallel = config.norm_place, config.parallel_residual
        self.post, outputs = place == "post", place in ("output", "both")
        self.scale = config.residual_scale or 1.0
        self.plain = place == "pre" and plan.attention_norm and not self.parallel
        self.plain = self.plain and self.scale == 1
        self.attention_norm = norm(plan.attention_norm)
        kind = LatentAttention if config.mla.on else Attention
        self.attention = kind(config, mesh, sp, core, plan)
        self.attention_output_norm, self.mlp_output_norm = norm(outputs), norm(outputs)
        self.mlp_norm = norm(place != "output")
        self.mlp = None if plan.experts else Mlp(config, mesh, sp, activation)
        self.moe = Moe(config, mesh, sp, activation) if plan.experts else None
        self.after_attention, self.after_mlp = Slot(mesh), Slot(mesh)  # called with (output, input)
        self.run_attention = runner("attention" in recompute)
        self.run_mlp = runner("mlp" in recompute)
        self.run_normed, self.run = input_runner("norm" in recompute), runner(BLOCK in recompute)

    def forward(
        self, x: Tensor, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> Tensor:
        if self.post:
            x = self.attention_norm(x + self.attention_sublayer(x, inputs, cache))
            return self.mlp_norm(x + self.mlp_sublayer(x, inputs))
        norms = self.attention_norm, self.attention_output_norm
        y = x + self.branch(norms, x, self.attention_sublayer, inputs, cache)
        norms = self.mlp_norm, self.mlp_output_norm
        return y + self.branch(norms, x if self.parallel else y, self.mlp_sublayer, inputs)

    def branch(
        self,
        norms: tuple[Norm | None, Norm | None],
        x: Tensor,
        sublayer: Callable[..., Tensor],
        *rest: Any,
    ) -> Tensor:
        """Returns what a sublayer adds to the residual stream, with the norms before and after it.
        """
        before, after = norms
        y = sublayer(x, *rest) if before is None else self.run_normed(before, x, sublayer, *rest)
        y = y if after is None else after(y)
        return y if self.scale == 1 else y * self.scale

    def attention_sublayer(
        self, x: Tensor, inputs: AttentionInputs, cache: LayerCache | None
    ) -> Tensor:
        """Returns attention of either kind, or what an adapter makes of its output."""
        return self.after_attention(self.run_attention(self.attention, x, inputs, cache), x)

    def mlp_sublayer(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Returns the output of the mlp, or of the experts, or what an adapter makes of it."""
        if self.moe is None:
            return self.after_mlp(self.run_mlp(self.mlp, x), x)
        return self.after_mlp(self.run_mlp(self.moe, x, inputs.routing), x)
