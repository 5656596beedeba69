"""The transformer block: the one unit of recompute, gradient buckets and sharding."""

from __future__ import annotations

from torch import Tensor

from megallm.models.attention import Attention, AttentionInputs, LayerCache
from megallm.models.config import ModelConfig
from megallm.models.mla import LatentAttention
from megallm.models.mlp import Mlp
from megallm.models.moe import Moe
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import recompute, recompute_input
from megallm.parallel.tensor import Norm, ShardedModule, Slot, sequence_partial


class Block(ShardedModule):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`. Post-norm: `norm(x +
    attention(x))`, and so on.

    With `experts` a mixture of them, called `moe`, stands in place of the mlp. `recomputed` are the
    parts whose activations are made again in the backward pass (`parallel.recompute_policy.PARTS`).
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sp: bool,
        recomputed: frozenset[str],
        experts: bool = False,
    ) -> None:
        super().__init__(mesh)
        partial = sequence_partial(mesh, sp)
        core, activation = "core" in recomputed, "activation" in recomputed
        self.recomputed = recomputed
        self.post = config.norm_place == "post"
        self.attention_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.attention = (LatentAttention if config.mla.on else Attention)(config, mesh, sp, core)
        self.mlp_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.mlp = None if experts else Mlp(config, mesh, sp, activation)
        self.moe = Moe(config, mesh, sp, activation) if experts else None
        self.after_attention, self.after_mlp = Slot(mesh), Slot(mesh)  # called with (output, input)

    def forward(
        self, x: Tensor, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> Tensor:
        if self.post:
            x = self.attention_norm(x + self.attention_sublayer(x, inputs, cache))
            return self.mlp_norm(x + self.mlp_sublayer(x, inputs))
        norm = "norm" in self.recomputed
        x = x + recompute_input(
            norm, self.attention_norm, x, self.attention_sublayer, inputs, cache
        )
        return x + recompute_input(norm, self.mlp_norm, x, self.mlp_sublayer, inputs)

    def attention_sublayer(
        self, x: Tensor, inputs: AttentionInputs, cache: LayerCache | None
    ) -> Tensor:
        """Attention of either kind, and what an adapter makes of its output."""
        y = recompute("attention" in self.recomputed, self.attention, x, inputs, cache)
        return self.after_attention(y, x)

    def mlp_sublayer(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """The mlp, or the experts, and what an adapter makes of the output."""
        again = "mlp" in self.recomputed
        y = (
            recompute(again, self.mlp, x)
            if self.moe is None
            else recompute(again, self.moe, x, inputs.routing)
        )
        return self.after_mlp(y, x)
