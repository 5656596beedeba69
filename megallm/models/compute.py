"""How a step is computed: in which numbers (mixed precision, FP8, loss scaling), and which
activations are kept (activation checkpointing, full or selective; CPU offload). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.ops.low_precision import Fp8Options, LossScaleOptions

BlockPart = Literal[
    "norm", "attention", "core", "mlp", "activation"
]  # of a block (docs/precision.md)

BLOCK = "block"
# What of a block can be recomputed by itself, and the part that contains it.
PARTS = {"norm": None, "attention": None, "core": "attention", "mlp": None, "activation": "mlp"}


@dataclass(frozen=True)
class ComputeConfig:
    """Precision and activation checkpointing."""

    precision: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32"  # the last three keep fp32 master weights
    loss_scale: LossScaleOptions = field(default_factory=LossScaleOptions)  # fp16
    fp8: Fp8Options = field(default_factory=Fp8Options)  # fp8: bf16 with linears in FP8
    recompute: Literal["none", "selective", "full"] = "none"  # activations made again in the backward pass
    recompute_modules: tuple[BlockPart, ...] = ("core", "activation")  # selective: the parts of a block made again
    recompute_layers: int | None = None  # only the first so many of each pipeline stage; null: all
    offload: bool = False  # what the blocks keep for the backward pass waits in CPU memory
    fused_head: Literal["auto", "on", "off"] = "auto"  # logits never exist whole; auto: large, or a frozen head
    determinism: Literal["none", "tree", "strict"] = "none"  # tree: one order of sums at any dp; strict: repeats itself

    def recomputed(self, place: int) -> frozenset[str]:
        """Returns what is recomputed of the block at `place` of its stage: nothing, some of PARTS,
        or the whole BLOCK.
        """
        limit = self.recompute_layers
        if self.recompute == "none" or (limit is not None and place >= limit):
            return frozenset()
        return frozenset((BLOCK,) if self.recompute == "full" else self.recompute_modules)
