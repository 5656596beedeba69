"""Feed-forward layer: SwiGLU with `gate_up (2, F, D)`, or GELU with `up (F, D)`; `down (D, F)`."""

from __future__ import annotations

from torch import Tensor

from megallm.models.attention import scaled_init
from megallm.models.config import ModelConfig
from megallm.ops.activation import ACTIVATIONS
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runner
from megallm.parallel.shard import normal
from megallm.parallel.tensor import ColumnLinear, RowLinear, ShardedModule, Slot, gather_input


class Mlp(ShardedModule):
    """`[B, T/tp or T, D]` -> the same; F is split over tp."""

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool, recomputes: bool) -> None:
        super().__init__(mesh, sp)
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        d, f, init = config.hidden_size, config.ffn_hidden_size, normal(config.init_std)
        if self.gated:
            self.gate_up = ColumnLinear(mesh, (2, f, d), init, config.bias)
        else:
            self.up = ColumnLinear(mesh, (f, d), init, config.bias)
        self.scale = Slot(mesh)  # on what `down` is applied to
        self.down = RowLinear(mesh, (d, f), scaled_init(config), config.bias, sp)
        self.run = runner(recomputes)

    def inner(self, hidden: Tensor) -> Tensor:
        """Applies the nonlinearity and the local part of `down`."""
        return self.down.local(self.scale(self.activation(hidden)))

    def forward(self, x: Tensor) -> Tensor:
        x = gather_input(x, self.mesh, self.sp)
        hidden = self.gate_up(x) if self.gated else self.up(x)
        return self.down.reduce(self.run(self.inner, hidden))
