"""Rows of the oracle for what saves memory and for FP8. No torch."""

from __future__ import annotations

from megallm.oracle.rows import Written

MEMORY_ROWS: tuple[Written, ...] = (
    ("recompute-norm", "", "qwen3", {"recompute": "selective", "recompute_modules": ("norm",)}),
    (
        "tp2-recompute-attention",
        "tp=2",
        "llama",
        {"recompute": "selective", "recompute_modules": ("attention",)},
    ),
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
    (
        "offload-pp2-recompute-full",
        "pp=2",
        "tied",
        {"recompute": "full", "offload": True, "micros": 3},
    ),
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
FP8_ROWS: tuple[Written, ...] = (
    ("fp8", "", "llama", {"fp8": "tensorwise", "micros": 2}),
    ("fp8-tp2", "tp=2", "four-kv", {"fp8": "tensorwise"}),
    ("fp8-tp2-sp-biased", "tp=2,sp=1", "biased", {"fp8": "tensorwise", "recompute": "full"}),
    ("fp8-rowwise-tp2", "tp=2", "qwen3", {"fp8": "rowwise"}),
    (
        "fp8-rowwise-tp2-sp-zb-h1",
        "pp=2,tp=2,sp=1,schedule=zb-h1",
        "gpt2",
        {"fp8": "rowwise", "micros": 3},
    ),
    ("fp8-cp2-tp2", "cp=2,tp=2", "four-kv", {"fp8": "tensorwise"}),
    ("fp8-zero3-dp2", "dp=2,zero=3", "llama", {"fp8": "rowwise", "micros": 1}),
    ("fp8-delayed-dp2-tp2", "dp=2,tp=2", "four-kv", {"fp8": "delayed", "micros": 2}),
    ("fp8-mtp-tp2-sp", "tp=2,sp=1", "mtp", {"fp8": "tensorwise"}),
    ("fp8-mtp-heads-pp2", "pp=2", "mtp-heads", {"fp8": "rowwise", "micros": 2}),
    ("fp8-moe", "", "moe", {"fp8": "tensorwise", "micros": 2}),
    ("fp8-moe-tp2-replicated", "tp=2", "moe", {"fp8": "tensorwise"}),
    ("fp8-moe-ep2-over-dp", "dp=2,ep=2", "moe", {"fp8": "tensorwise", "micros": 2}),
    ("fp8-moe-ep2-over-tp", "tp=2,ep=2", "moe-qwen", {"fp8": "rowwise"}),
    (
        "fp8-moe-ep2-tp2-sp-deepseek",
        "dp=2,tp=2,sp=1,ep=2",
        "moe-deepseek",
        {"fp8": "tensorwise", "mask": "rank"},
    ),
    ("fp8-moe-ep2-cp2-tp2", "cp=2,tp=2,ep=2", "moe", {"fp8": "rowwise"}),
    (
        "fp8-moe-ep2-astride-tp3",
        "dp=2,tp=3,ep=2",
        "moe",
        {"fp8": "tensorwise", "overrides": {"num_heads": 6, "num_kv_heads": 3}},
    ),
    ("fp8-moe-delayed-ep2", "dp=2,tp=2,ep=2", "moe-deepseek", {"fp8": "delayed", "micros": 2}),
    ("fp8-moe-delayed-replicated", "dp=2", "moe", {"fp8": "delayed", "mask": "rank"}),
    ("fp8-moe-ep2-pp2", "pp=2,dp=2,ep=2", "moe", {"fp8": "rowwise", "micros": 3}),
    (
        "fp8-moe-ep2-pp2-zb-h1",
        "pp=2,tp=2,ep=2,schedule=zb-h1",
        "moe-qwen",
        {"fp8": "tensorwise", "micros": 3},
    ),
    (
        "fp8-moe-ep2-recompute-full",
        "tp=2,sp=1,ep=2",
        "moe-deepseek",
        {"fp8": "delayed", "recompute": "full"},
    ),
    (
        "fp8-moe-ep2-recompute-selective",
        "dp=2,ep=2",
        "moe-qwen",
        {"fp8": "tensorwise", "recompute": "selective"},
    ),
    ("fp8-moe-ep2-zero2", "dp=2,tp=2,ep=2,zero=2", "moe", {"fp8": "tensorwise", "micros": 2}),
    ("fp8-moe-ep2-zero3", "dp=4,ep=2,zero=3", "moe", {"fp8": "rowwise"}),
    (
        "fp8-moe-on-one-stage",
        "pp=2,dp=2,tp=2",
        "moe-gelu",
        {"fp8": "tensorwise", "micros": 2},
    ),  # none on the other
    ("fp8-moe-capacity", "tp=2,ep=2", "moe-capacity", {"fp8": "tensorwise", "micros": 2}),
    ("fp8-moe-mla-mtp", "dp=2,tp=2,ep=2", "moe-mla-mtp", {"fp8": "tensorwise", "micros": 2}),
)
