"""The transformer block: the one unit of recompute, gradient buckets and sharding."""

from __future__ import annotations

from torch import Tensor

from megallm.models.attention import Attention, AttentionInputs, LayerCache
from megallm.models.compute import BLOCK
from megallm.models.config import ModelConfig
from megallm.models.mla import LatentAttention
from megallm.models.mlp import Mlp
from megallm.models.moe import Moe
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import input_runner, runner
from megallm.parallel.tensor import Norm, ShardedModule, Slot, sequence_partial


class Block(ShardedModule):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`. Post-norm: `norm(x +
    attention(x))`, and so on.

    With `experts` a mixture of them, called `moe`, stands in place of the mlp. `recompute` are the
    parts whose activations are made again in the backward pass (`models.compute.PARTS`); a stage
    calls `block.run(block, ...)`, which recomputes the whole block where that is asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sp: bool,
        recompute: frozenset[str],
        experts: bool = False,
    ) -> None:
        super().__init__(mesh)
        partial = sequence_partial(mesh, sp)
        core, activation = "core" in recompute, "activation" in recompute
        self.post = config.norm_place == "post"
        self.attention_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.attention = (LatentAttention if config.mla.on else Attention)(config, mesh, sp, core)
        self.mlp_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.mlp = None if experts else Mlp(config, mesh, sp, activation)
        self.moe = Moe(config, mesh, sp, activation) if experts else None
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
        x = x + self.run_normed(self.attention_norm, x, self.attention_sublayer, inputs, cache)
        return x + self.run_normed(self.mlp_norm, x, self.mlp_sublayer, inputs)

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
