"""Rows of the layout oracle for branches that tiny models in float64 do not take by themselves, as
data. No torch.

The limit of a clip that is not reached, the relative step of Adafactor, the kernel for grouped
products (which refuses float64), and what is done bucket by bucket or chunk by chunk.
"""

from __future__ import annotations

from typing import Any

from megallm.oracle.experts import DEEPSEEK, EXPERTS
from megallm.oracle.rows import Written, row

LARGE_STEPS = (0.9, 0.9, 0.5)  # 1/sqrt(count) is 1, 0.71, 0.58: the second step is the relative one
ALIGNED = {"moe": EXPERTS | {"ffn_hidden_size": 16}}  # rows of 16 bytes, as the kernel asks for
ALIGNED_DEEPSEEK = {"moe": EXPERTS | DEEPSEEK | {"ffn_hidden_size": 16}}
GROUPED: dict[str, Any] = {"precision": "fp32", "overrides": ALIGNED}
SMALL: dict[str, Any] = {"small_pieces": True}

BRANCH_ROWS: tuple[Written, ...] = (
    row("clip-not-reached", "", "llama", clip=1e3),
    row("clip-reached-in-some-steps", "tp=2", "tied", clip=8.0, rule="sgd"),
    row("adafactor-relative-step", "", "llama", rule="adafactor", rates=LARGE_STEPS),
    row("adafactor-relative-step-zero2-dp2-tp2", "dp=2,tp=2,zero=2", "biased", rule="adafactor", rates=LARGE_STEPS),
    row("grouped", "", "moe", micros=2, **GROUPED),
    row("grouped-ep2-over-dp", "dp=2,ep=2", "moe", **GROUPED),
    row("grouped-ep2-zb-h1", "pp=2,tp=2,ep=2,schedule=zb-h1", "moe-qwen", micros=3, **GROUPED),
    row(
        "grouped-ep2-zero3-recompute-deepseek",
        "dp=2,ep=2,zero=3",
        "moe-deepseek",
        recompute="full",
        precision="fp32",
        overrides=ALIGNED_DEEPSEEK,
    ),
    row("pieces", "", "llama", micros=2, **SMALL),
    row("pieces-fused", "", "biased", fused_head="on", **SMALL),
    row("pieces-fused-tp2-sp-tied", "tp=2,sp=1", "tied", fused_head="on", **SMALL),
    row("pieces-fused-mtp-zb-h1", "pp=2,schedule=zb-h1", "mtp", fused_head="on", micros=3, **SMALL),
    row("pieces-fused-encoder-tp2", "tp=2", "bert", fused_head="on", **SMALL),
    row("pieces-dp2-pp2-tied", "dp=2,pp=2", "tied", micros=2, **SMALL),
    row("pieces-zero2-dp2-ep2", "dp=2,ep=2,zero=2", "moe", micros=2, **SMALL),
    row("pieces-zero2-interleaved", "dp=2,pp=2,schedule=interleaved,zero=2", "llama", micros=2,
        overrides={"num_layers": 4}, **SMALL),
    row("pieces-tree-dp2", "dp=2", "llama", micros=2, tree=True, **SMALL),
    row("pieces-muon-zero1-dp2", "dp=2,zero=1", "llama", rule="muon", **SMALL),
    row("pieces-adafactor-zero1-dp3", "dp=3,zero=1", "llama", rule="adafactor", **SMALL),
    row("pieces-rmsprop-zero1-dp2", "dp=2,zero=1", "llama", rule="rmsprop", **SMALL),
)  # fmt: skip
