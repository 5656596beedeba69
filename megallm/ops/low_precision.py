"""Settings of the low precisions: the loss scale of fp16, and the recipes of FP8 as a table. No
torch.

e4m3 has three bits of mantissa and reaches 448, e5m2 two bits and reaches 57344 (arXiv 2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LossScaleOptions:
    """Dynamic loss scaling of fp16."""

    initial: float = 65536.0  # halved at every overflow
    growth_steps: int = 1000  # updates without an overflow after which it doubles
    minimum: float = 1.0  # it is not made smaller than this
    overflows: int = 4  # in a row at the minimum: the run has diverged


@dataclass(frozen=True)
class Recipe:
    """`scaled`: one scale per tensor, per row (along the dim that a product sums over), or per
    block: 1 x 128 of activations and gradients, 128 x 128 of weights. `delayed`: from the amax of
    earlier steps instead of the tensor at hand. `powers`: scales are rounded down to powers of two,
    which loses no bit of a value."""

    scaled: Literal["tensor", "row", "block"]
    gradients: Literal["e4m3", "e5m2"]
    delayed: bool = False
    powers: bool = False


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe("tensor", "e5m2", delayed=True),  # Transformer Engine's DelayedScaling
    "tensorwise": Recipe("tensor", "e5m2"),  # Transformer Engine's Float8CurrentScaling
    "rowwise": Recipe("row", "e4m3", powers=True),  # torchao's rowwise
    "blockwise": Recipe(
        "block", "e4m3", powers=True
    ),  # DeepSeek-V3 (arXiv 2412.19437, section 3.3)
}


@dataclass(frozen=True)
class Fp8Options:
    """Which linears compute in FP8, and how: those of blocks, experts and further tokens.
    Embedding, norms, routers, attention itself and head never do."""

    recipe: Literal["delayed", "tensorwise", "rowwise", "blockwise"] = "tensorwise"  # how values are scaled
    history: int = 16  # delayed: steps whose largest amax gives the scale
    margin: int = 0  # delayed and tensorwise: scales are 2^margin smaller than what would just fit
    bf16_first: int = 0  # layers from the first on whose linears stay in bf16
    bf16_last: int = 0  # layers up to the last whose linears stay in bf16
    backend: Literal["megallm", "transformer_engine"] = "megallm"  # transformer_engine: an optional library
