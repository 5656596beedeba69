"""The transformer block: the one unit of recompute, gradient buckets and sharding."""

from __future__ import annotations

from torch import Tensor

from megallm.models.attention import Attention, LayerCache, Places
from megallm.models.config import ModelConfig
from megallm.models.mla import LatentAttention
from megallm.models.mlp import Mlp
from megallm.models.moe import Moe
from megallm.parallel.mesh import Mesh
from megallm.parallel.tensor import Norm, ShardedModule, sequence_partial


class Block(ShardedModule):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`. Post-norm: `norm(x + attention(x))`, and so on.

    With `experts` a mixture of them, called `moe`, stands in place of the mlp.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool, recompute_mode: str, experts: bool = False) -> None:
        super().__init__(mesh)
        partial = sequence_partial(mesh, sp)
        selective = recompute_mode == "selective"
        self.post = config.norm_place == "post"
        self.attention_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.attention = (LatentAttention if config.mla.on else Attention)(config, mesh, sp, selective)
        self.mlp_norm = Norm(mesh, config.norm, config.hidden_size, config.norm_eps, partial)
        self.mlp = None if experts else Mlp(config, mesh, sp, selective)
        self.moe = Moe(config, mesh, sp, selective) if experts else None

    def forward(self, x: Tensor, places: Places, cache: LayerCache | None = None) -> Tensor:
        if self.post:
            x = self.attention_norm(x + self.attention(x, places, cache))
            return self.mlp_norm(x + self.feed_forward(x, places))
        x = x + self.attention(self.attention_norm(x), places, cache)
        return x + self.feed_forward(self.mlp_norm(x), places)

    def feed_forward(self, x: Tensor, places: Places) -> Tensor:
        """The mlp, or the experts."""
        return self.mlp(x) if self.moe is None else self.moe(x, places.seats)
