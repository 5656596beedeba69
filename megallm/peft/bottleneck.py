"""Bottleneck adapters at the output of a sublayer, inside the residual.

Houlsby's read that output (arXiv 1902.00751); parallel ones read the sublayer's input (He et al.,
arXiv 2110.04366).
"""

from __future__ import annotations

from torch import Tensor

from megallm.models.decoder import Stage
from megallm.ops.activation import ACTIVATIONS
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import constant, normal
from megallm.parallel.tensor import ShardedModule, TokenLinear
from megallm.peft.injection import Injection
from megallm.peft.slots import put

NEAR_IDENTITY = 1e-2


def fill_bottleneck(stage: Stage, injection: Injection) -> None:
    """Put Houlsby's adapters behind attention and feed-forward layer of each block, or a parallel
    one beside the latter."""
    config, parallel = injection.config, injection.config.method == "parallel"
    for block in stage.layers.values():
        for slot in (block.after_mlp,) if parallel else (block.after_attention, block.after_mlp):
            sizes = injection.model.hidden_size, config.hidden
            put(slot, config.name, Bottleneck(stage.mesh, stage.sp, sizes, parallel))


class Bottleneck(ShardedModule):
    """`y + s up(f(down(z)))`, z the output y, or the input x where `parallel`; whole on every tp
    rank, on its own tokens. It starts near the identity."""

    def __init__(
        self, mesh: Mesh, sp: bool, sizes: tuple[int, int], parallel: bool = False
    ) -> None:
        super().__init__(mesh, sp)
        hidden, inner = sizes
        self.parallel, self.scale = parallel, 1.0
        up = constant(0.0) if parallel else normal(NEAR_IDENTITY)
        self.down = TokenLinear(mesh, (inner, hidden), normal(NEAR_IDENTITY), True, sp)
        self.up = TokenLinear(mesh, (hidden, inner), up, True, sp)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = ACTIVATIONS["gelu"](self.down(x if self.parallel else y))
        return y + self.up(inner) * self.scale
