"""The transformer block: the one unit of recompute, gradient buckets and sharding."""

from __future__ import annotations

from torch import Tensor

from megallm.models.attention import Attention, LayerCache, Places
from megallm.models.config import ModelConfig
from megallm.models.mla import LatentAttention
from megallm.models.mlp import Mlp
from megallm.models.moe import Moe
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import recompute, remake
from megallm.parallel.tensor import Norm, ShardedModule, sequence_partial


class Block(ShardedModule):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`. Post-norm: `norm(x + attention(x))`, and so on.

    With `experts` a mixture of them, called `moe`, stands in place of the mlp. `remade` are the parts whose activations
    are made again in the backward pass (`parallel.remade.PARTS`).
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, sp: bool, remade: frozenset[str], experts: bool = False
    ) -> None:  # fmt: skip
        super().__init__(mesh)
        partial = sequence_partial(mesh, sp)
        core, activation = "core" in remade, "activation" in remade
        self.remade = remade
        self.post = config.norm_place == "post"
        self.attention_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.attention = (LatentAttention if config.mla.on else Attention)(config, mesh, sp, core)
        self.mlp_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.mlp = None if experts else Mlp(config, mesh, sp, activation)
        self.moe = Moe(config, mesh, sp, activation) if experts else None

    def forward(self, x: Tensor, places: Places, cache: LayerCache | None = None) -> Tensor:
        if self.post:
            x = self.attention_norm(x + self.attend(x, places, cache))
            return self.mlp_norm(x + self.feed_forward(x, places))
        norm = "norm" in self.remade
        x = x + remake(norm, self.attention_norm, x, self.attend, places, cache)
        return x + remake(norm, self.mlp_norm, x, self.feed_forward, places)

    def attend(self, x: Tensor, places: Places, cache: LayerCache | None) -> Tensor:
        """Attention of either kind."""
        return recompute("attention" in self.remade, self.attention, x, places, cache)

    def feed_forward(self, x: Tensor, places: Places) -> Tensor:
        """The mlp, or the experts."""
        again = "mlp" in self.remade
        return recompute(again, self.mlp, x) if self.moe is None else recompute(again, self.moe, x, places.seats)
