"""A linear through Transformer Engine, with our parameters and its FP8 recipes. Never run: no
machine here has it.

`ops.backends` says what is installed; nothing imports the library before a linear is made.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from megallm.ops import backends
from megallm.ops.low_precision import Fp8Options


class TeLinear:
    """`x W^T + b` of local shapes; the weight may be a view of a parameter, the module of the
    library owns nothing.
    """

    def __init__(self, options: Fp8Options, group: torch.distributed.ProcessGroup | None) -> None:
        self.te: ModuleType = backends.require("transformer_engine")
        self.options, self.group = options, group
        self.recipe = te_recipe(options)
        self.module: torch.nn.Module | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.module is None:
            self.module = self.te.Linear(
                weight.shape[1], weight.shape[0], bias=False, params_dtype=x.dtype, device="meta"
            )
        with self._autocast():
            y = torch.func.functional_call(self.module, {"weight": weight}, (x,))
        return y if bias is None else y + bias

    def _autocast(self) -> AbstractContextManager[None]:
        if "autocast" in vars(self.te):  # from 2.8 on; the older name is to be removed
            return self.te.autocast(
                enabled=True, recipe=self.recipe, amax_reduction_group=self.group
            )
        return self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe, fp8_group=self.group)


def te_recipe(options: Fp8Options) -> object:
    """Returns our options as a recipe of the library."""
    recipe = backends.require("transformer_engine", "transformer_engine.common.recipe")
    if options.recipe == "delayed":
        return recipe.DelayedScaling(
            margin=options.margin, amax_history_len=options.history, fp8_format=recipe.Format.HYBRID
        )
    if options.recipe == "tensorwise":
        return recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID)
    return recipe.Float8BlockScaling(fp8_format=recipe.Format.E4M3)
