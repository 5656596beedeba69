"""Rows of the oracle for what saves memory and for FP8: `(name, layout, model, settings)`. No torch."""

from __future__ import annotations

from typing import Any

Rows = tuple[tuple[str, str, str, dict[str, Any]], ...]

MEMORY_ROWS: Rows = (
    ("recompute-norm", "", "qwen3", {"recompute": "selective", "recompute_modules": ("norm",)}),
    ("tp2-recompute-attention", "tp=2", "llama", {"recompute": "selective", "recompute_modules": ("attention",)}),
    (
        "tp2-sp-recompute-all-parts",
        "tp=2,sp=1",
        "llama",
        {"recompute": "selective", "recompute_modules": ("attention", "mlp")},
    ),
    (
        "tp2-recompute-norm-mlp",
        "tp=2",
        "llama",
        {"recompute": "selective", "recompute_modules": ("norm", "mlp", "core")},
    ),
    (
        "zb-h1-recompute-norm",
        "pp=2,schedule=zb-h1",
        "llama",
        {"recompute": "selective", "recompute_modules": ("norm",), "micros": 3},
    ),
    (
        "zero3-dp2-recompute-one-layer",
        "dp=2,zero=3",
        "llama",
        {"recompute": "full", "recompute_layers": 1, "micros": 2},
    ),
    ("offload", "", "llama", {"offload": True, "micros": 2}),
    ("offload-tp2-sp-selective", "tp=2,sp=1", "llama", {"recompute": "selective", "offload": True}),
    ("offload-pp2-recompute-full", "pp=2", "tied", {"recompute": "full", "offload": True, "micros": 3}),
    ("offload-zero3-dp2", "dp=2,zero=3", "qwen3", {"offload": True, "micros": 2}),
    (
        "offload-zb-v-cp2",
        "pp=2,cp=2,schedule=zb-v",
        "llama",
        {"offload": True, "micros": 3, "overrides": {"num_layers": 4}},
    ),
    ("fused-tp2", "tp=2", "llama", {"fused_head": "on"}),
    ("fused-tp2-sp", "tp=2,sp=1", "tied", {"fused_head": "on"}),
    ("fused-tp4-one-token", "tp=4", "llama", {"fused_head": "on", "mask": "one"}),
    ("fused-encoder-tp2-sp", "tp=2,sp=1", "bert", {"fused_head": "on"}),
    ("fused-pp2-tied", "pp=2", "tied", {"micros": 3, "fused_head": "on"}),
    ("fused-cp2-tp2", "cp=2,tp=2", "llama", {"fused_head": "on"}),
    ("fused-zb-h1-tied-tp2", "pp=2,tp=2,schedule=zb-h1", "tied", {"micros": 3, "fused_head": "on"}),
    ("fused-zero3-dp2", "dp=2,zero=3", "tied", {"micros": 2, "fused_head": "on"}),
)
FP8_ROWS: Rows = (
    ("fp8", "", "llama", {"fp8": "tensorwise", "micros": 2}),
    ("fp8-tp2", "tp=2", "four-kv", {"fp8": "tensorwise"}),
    ("fp8-tp2-sp-biased", "tp=2,sp=1", "biased", {"fp8": "tensorwise", "recompute": "full"}),
    ("fp8-rowwise-tp2", "tp=2", "qwen3", {"fp8": "rowwise"}),
    ("fp8-rowwise-tp2-sp-zb-h1", "pp=2,tp=2,sp=1,schedule=zb-h1", "gpt2", {"fp8": "rowwise", "micros": 3}),
    ("fp8-cp2-tp2", "cp=2,tp=2", "four-kv", {"fp8": "tensorwise"}),
    ("fp8-zero3-dp2", "dp=2,zero=3", "llama", {"fp8": "rowwise", "micros": 1}),
)
