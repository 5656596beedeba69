"""Rows of the layout oracle in which some parameters are frozen, as data. No torch.

A frozen parameter has no gradient, no part in the norm and no update; what lies below it may still
need its gradient.
"""

from __future__ import annotations

from megallm.oracle.rows import Written, row

EMBEDDING = ("embedding.weight",)
BELOW = ("embedding.weight", "layers.0.*")  # nothing at the bottom needs a gradient
BLOCKS = ("layers.*.weight",)  # embedding and head train through frozen blocks
# All but what makes keys and values of latents: no input of their exchange over cp needs a
# gradient.
BUT_KEYS = (
    "embedding.weight",
    "head.*",
    "*norm.*",
    "*.q*",
    "*.kv_down.*",
    "*.k_rope.*",
    "*.o.*",
    "*.mlp.*",
)

FROZEN_ROWS: tuple[Written, ...] = (
    row("frozen-embedding-zero3", "dp=2,zero=3", frozen=EMBEDDING, micros=2),
    row("frozen-below-zero3-recompute", "dp=2,zero=3", frozen=BELOW, micros=2, recompute="full"),
    row("frozen-blocks-zero3-tp2-sp", "dp=2,tp=2,sp=1,zero=3", "biased", frozen=BLOCKS, micros=2),
    row("frozen-below-pp2", "pp=2", frozen=BELOW, micros=3),
    row("frozen-blocks-zb-h1-tied", "pp=2,dp=2,schedule=zb-h1", "tied", frozen=BLOCKS, micros=3),
    row("frozen-tied-embedding-pp2-zero1", "pp=2,dp=2,zero=1", "tied", frozen=EMBEDDING, micros=2),
    row(
        "frozen-experts-ep2-zero2",
        "dp=2,tp=2,ep=2,zero=2",
        "moe",
        frozen=("*.experts.*",),
        micros=2,
    ),
    row(
        "frozen-router-mla-cp2",
        "cp=2,tp=2",
        "moe-mla-mtp",
        frozen=("*.router.weight", "mtp.*"),
        micros=2,
    ),
    row("frozen-blocks-muon-zero1", "dp=2,zero=1", frozen=("layers.0.*",), rule="muon", micros=2),
    row(
        "frozen-blocks-adafactor", "dp=2,zero=2", frozen=("layers.1.*",), rule="adafactor", micros=2
    ),
    row(
        "frozen-below-moe-recompute",
        "",
        "moe-deepseek",
        frozen=("embedding.weight", "layers.*"),
        recompute="full",
    ),
    row("frozen-below-moe-pp2", "pp=2", "moe", frozen=("embedding.weight", "layers.*"), micros=2),
    row("frozen-but-keys-mla-cp2", "cp=2", "mla", frozen=BUT_KEYS),
    row("frozen-norms-tree", "dp=2", "qwen3", frozen=("*norm*",), micros=2, tree=True),
)
