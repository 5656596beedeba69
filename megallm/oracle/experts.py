"""Models with experts, their rows of the layout oracle and their negative controls, as data. No
torch.
"""

from __future__ import annotations

from typing import Any

from megallm.oracle.latents import LATENT_MODELS
from megallm.oracle.rows import Written, row

# Coefficients so large that the router losses are a part of every gradient; the bias step is a
# power of two.
EXPERTS: dict[str, Any] = {"num_experts": 4, "ffn_hidden_size": 14, "aux_coef": 0.5, "z_coef": 0.1}
DEEPSEEK: dict[str, Any] = {
    "num_experts": 8,
    "first_dense": 1,
    "shared_ffn_hidden_size": 10,
    "score": "sigmoid",
    "routed_scale": 2.5,
    "num_groups": 4,
    "top_groups": 2,
    "selection_bias": True,
    "bias_rate": 0.125,
}
EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "moe": {"moe": EXPERTS},
    "moe-deepseek": {"moe": EXPERTS | DEEPSEEK, "num_layers": 3, "tie_embeddings": True},
    "moe-qwen": {
        "moe": EXPERTS
        | {"norm_topk_prob": False, "shared_ffn_hidden_size": 10, "shared_gate": True}
    },
    "moe-capacity": {"moe": EXPERTS | {"capacity": 0.75}},
    "moe-positions": {"moe": EXPERTS | {"capacity": 1.0, "drop": "position", "top_k": 3}},
    "moe-mla-mtp": LATENT_MODELS["mla-mtp"] | {"moe": EXPERTS | DEEPSEEK},
    "moe-gelu": {"family": "gpt2", "bias": False, "num_kv_heads": 4, "moe": EXPERTS | {"every": 2}},
}


EXPERT_ROWS: tuple[Written, ...] = (
    row("moe-single", model="moe"),
    row("moe-single-deepseek", model="moe-deepseek", micros=2),
    row("moe-dp2-replicated", "dp=2", "moe"),
    row("moe-ep2-over-dp", "dp=2,ep=2", "moe", micros=2),
    row("moe-ep2-over-dp-masked-rank", "dp=2,ep=2", "moe-deepseek", mask="rank"),
    row("moe-ep2-over-dp-one-token", "dp=2,ep=2", "moe-qwen", mask="one"),
    row("moe-tp2-replicated", "tp=2", "moe"),
    row("moe-ep2-over-tp", "tp=2,ep=2", "moe"),
    row("moe-ep2-over-tp-uneven", "tp=2,ep=2", "moe-qwen", seq_len=7, micro_batch=1),
    row("moe-ep2-over-tp-sp", "tp=2,sp=1,ep=2", "moe-qwen"),
    row("moe-ep2-over-tp-sp-deepseek", "tp=2,sp=1,ep=2", "moe-deepseek", micros=2),
    row("moe-ep2-over-cp", "cp=2,ep=2", "moe"),
    row(
        "moe-ep2-over-cp-packed",
        "cp=2,ep=2",
        "moe-deepseek",
        packed=True,
        micro_batch=1,
        seq_len=16,
        micros=2,
    ),
    row("moe-ep4-over-tp-dp", "dp=2,tp=2,ep=4", "moe-deepseek", mask="rank"),
    row("moe-ep2-dp2-tp2", "dp=2,tp=2,ep=2", "moe", micros=2),
    row("moe-ep4-over-tp-cp", "cp=2,tp=2,sp=1,ep=4", "moe-deepseek"),
    row("moe-ep8-over-tp-cp-dp", "dp=2,cp=2,tp=2,ep=8", "moe-deepseek"),
    row(
        "moe-ep2-astride-tp3",
        "tp=3,cp=2,ep=2",
        "moe",
        overrides={"num_heads": 6, "num_kv_heads": 3},
        seq_len=12,
    ),
    row("moe-ep2-pp2", "pp=2,dp=2,ep=2", "moe", micros=3),
    row("moe-ep2-pp2-gelu", "pp=2,tp=2,ep=2", "moe-gelu", micros=2),
    row("moe-ep2-pp2-zb-h1", "pp=2,tp=2,ep=2,schedule=zb-h1", "moe-deepseek", micros=3),
    row(
        "moe-ep2-zb-v", "pp=2,dp=2,ep=2,schedule=zb-v", "moe", micros=4, overrides={"num_layers": 4}
    ),
    row(
        "moe-ep2-interleaved",
        "pp=2,dp=2,ep=2,schedule=interleaved",
        "moe-qwen",
        micros=4,
        overrides={"num_layers": 4},
    ),
    row("moe-ep2-recompute-full", "tp=2,sp=1,ep=2", "moe-deepseek", recompute="full"),
    row("moe-ep2-recompute-selective", "dp=2,ep=2", "moe-qwen", recompute="selective", micros=2),
    row(
        "moe-ep2-recompute-mlp-norm",
        "tp=2,sp=1,ep=2",
        "moe-qwen",
        recompute="selective",
        recompute_modules=("norm", "mlp"),
    ),
    row("moe-ep2-offload", "dp=2,ep=2", "moe-deepseek", offload=True, micros=2),
    row(
        "moe-ep2-recompute-zb-h1",
        "pp=2,dp=2,ep=2,schedule=zb-h1",
        "moe",
        recompute="full",
        micros=3,
    ),
    row("moe-ep2-zero1", "dp=2,tp=2,ep=2,zero=1", "moe", micros=2),
    row("moe-ep2-zero2", "dp=2,tp=2,ep=2,zero=2", "moe-deepseek", micros=2, mask="rank"),
    row("moe-ep2-zero3", "dp=2,tp=2,sp=1,ep=2,zero=3", "moe-qwen", micros=2),
    row("moe-ep2-zero3-dp4-hybrid", "dp=4,ep=2,zero=3", "moe", shard_size=2, micros=2),
    row("moe-ep2-zero2-dp4-tp2-hybrid", "dp=4,tp=2,ep=2,zero=2", "moe", shard_size=2),
    row("moe-ep2-zero3-zb-h1", "pp=2,dp=2,ep=2,zero=3,schedule=zb-h1", "moe-qwen", micros=3),
    row("moe-ep2-zero3-dp2-all-of-edp", "dp=2,ep=2,zero=3", "moe-deepseek", recompute="full"),
    row("moe-ep2-zero2-zb-h1", "pp=2,dp=2,tp=2,ep=2,zero=2,schedule=zb-h1", "moe", micros=3),
    row(
        "moe-stages-empty-rank", "pp=3,dp=2,ep=2", "moe", stages="Et||tL", micros=3
    ),  # a stage without a router
    row("moe-ep2-mla-mtp", "dp=2,tp=2,ep=2", "moe-mla-mtp", micros=2),
    row("moe-capacity", model="moe-capacity"),
    row("moe-capacity-tp2-cp2", "cp=2,tp=2,ep=4", "moe-capacity"),
    row("moe-capacity-positions-cp2", "cp=2,dp=2,ep=2", "moe-positions", micros=2),
    row(
        "moe-capacity-repeated-token",  # a document begins with one token twice: equal but for rounding
        "tp=2,ep=2",
        "moe-capacity",
        packed=True,
        micro_batch=1,
        micros=2,
        seq_len=12,
        clip=0.0,
        mask="full",
        overrides={"num_layers": 1, "vocab_size": 70},
        seed=1027989582,
    ),
    row(
        "moe-capacity-packed-sp",
        "tp=2,sp=1,ep=2",
        "moe-positions",
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
)

# For every reduction (and mistake) that only they have, a small row in which it must show.
EXPERT_CONTROLS: dict[str, str] = {
    "grads.expert": "moe-dp2-replicated",
    "moe.enter": "moe-ep2-over-tp",
    "moe.leave": "moe-ep2-over-tp",
    "moe.dispatch": "moe-ep2-over-dp",
    "moe.combine": "moe-ep2-over-dp",
    "moe.counts": "moe-ep2-over-cp",
    "moe.capacity": "moe-capacity-tp2-cp2",
    "moe.load": "moe-ep2-over-tp-sp-deepseek",
    "moe.report": "moe-ep2-over-dp",
    "moe.twice": "moe-ep2-over-tp",
    "grads.wrong_group": "moe-tp2-replicated",
}
