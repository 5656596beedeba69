"""Models with latent attention, further tokens, sinks or stretched positions, their rows of the
layout oracle and their negative controls, as data. No torch."""

from __future__ import annotations

from typing import Any

from megallm.oracle.rows import Written, row

LATENT: dict[str, Any] = {
    "head_size": None,
    "num_kv_heads": None,
}  # latent attention says what a head is
LATENT_SIZES = {
    "kv_lora_dim": 7,
    "q_lora_dim": 9,
    "nope_head_size": 3,
    "rope_head_size": 4,
    "value_head_size": 5,
}
LATENT_MODELS: dict[str, dict[str, Any]] = {
    "llama31": {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_low_factor": 1.0,
        "rope_high_factor": 4.0,
        "rope_positions": 20,
        "rope_theta": 50.0,
    },
    "ntk": {"rope_scaling": "ntk", "rope_factor": 3.0},
    "dynamic": {
        "rope_scaling": "dynamic",
        "rope_factor": 3.0,
        "rope_positions": 5,
    },  # rows are longer
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_positions": 20, "rope_theta": 50.0},
    "sinks": {"attention_sinks": True},
    "sinks-window": {
        "attention_sinks": True,
        "sliding_window": 3,
        "num_kv_heads": 4,
        "tie_embeddings": True,
    },
    "mla": LATENT | {"mla": LATENT_SIZES},
    "mla-direct": LATENT
    | {
        "mla": LATENT_SIZES | {"q_lora_dim": 0, "value_head_size": 9, "norm_eps": 0.1},
        "attention_sinks": True,
    },
    "mla-yarn": LATENT
    | {
        "mla": LATENT_SIZES,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_positions": 20,
        "rope_theta": 50.0,
        "rope_mscale": 0.8,
        "rope_mscale_all_dim": 1.1,
        "rope_truncate": False,
    },
    "mtp": {"mtp": {"depth": 2}},
    "mtp-tied": {"mtp": {"depth": 2, "weight": 0.7}, "tie_embeddings": True},
    "mtp-heads": {"mtp": {"depth": 2, "kind": "heads", "weight": 2.0}},
    "mtp-heads-tied": {
        "mtp": {"depth": 1, "kind": "heads"},
        "tie_embeddings": True,
        "norm": "layernorm",
    },
    "mla-mtp": LATENT | {"mla": LATENT_SIZES, "mtp": {"depth": 1}},
}


LATENT_ROWS: tuple[Written, ...] = (
    row("llama31", model="llama31"),
    row("ntk-tp2", "tp=2", "ntk"),
    row("dynamic-cp2-packed", "cp=2", "dynamic", packed=True, micro_batch=1, micros=2, seq_len=16),
    row("yarn-tp2-sp", "tp=2,sp=1", "yarn"),
    row("sinks-tp2", "tp=2", "sinks"),
    row("sinks-cp2-ring", "cp=2", "sinks"),
    row("sinks-cp2-tp2-ulysses", "cp=2,tp=2,cp_kind=ulysses", "sinks"),
    row(
        "sinks-window-cp2-packed",
        "cp=2,cp_kind=allgather",
        "sinks-window",
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
    row("sinks-pp2-dp2-zero3", "pp=2,dp=2,zero=3", "sinks-window", micros=2, recompute="full"),
    row("mla", model="mla"),
    row("mla-tp2", "tp=2", "mla"),
    row("mla-tp2-sp", "tp=2,sp=1", "mla"),
    row("mla-direct-tp2", "tp=2", "mla-direct"),
    row("mla-direct-tp4-sp", "tp=4,sp=1", "mla-direct"),
    row("mla-tp2-sp-selective", "tp=2,sp=1", "mla", recompute="selective"),
    row("mla-pp2", "pp=2", "mla", micros=3),
    row("mla-fp8-tp2-sp", "tp=2,sp=1", "mla", fp8="tensorwise"),
    row("mla-fp8-cp2-ring", "cp=2", "mla", fp8="tensorwise"),
    row("mla-zb-h1", "pp=2,schedule=zb-h1", "mla", micros=3),
    row("mla-packed", model="mla", packed=True, micro_batch=1, micros=2),
    row("mla-cp2-ring", "cp=2", "mla"),
    row("mla-zb-h1-cp2", "pp=2,cp=2,schedule=zb-h1", "mla", micros=3),
    row("mla-zero3-cp4-ring-recompute", "cp=4,zero=3", "mla", seq_len=16, recompute="full"),
    row("mla-direct-cp2-ulysses", "cp=2,cp_kind=ulysses", "mla-direct"),
    row(
        "mla-cp2-allgather-packed",
        "cp=2,cp_kind=allgather",
        "mla",
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
    row("mla-cp4-hybrid", "cp=4,cp_kind=hybrid", "mla"),
    row(
        "mla-yarn-cp2-tp2-sp", "cp=2,tp=2,sp=1", "mla-yarn", packed=True, micro_batch=1, seq_len=16
    ),
    row("mla-zero3-dp2-recompute", "dp=2,zero=3", "mla", micros=2, recompute="full"),
    row("mtp", model="mtp"),
    row("mtp-packed", model="mtp", packed=True, micro_batch=1, micros=2),
    row(
        "mtp-deeper-than-documents",
        model="mtp",
        packed=True,
        micro_batch=1,
        micros=2,
        overrides={"mtp": {"depth": 5}},
    ),
    row("mtp-dp2-masked-rank", "dp=2", "mtp", micros=2, mask="rank"),
    row("mtp-dp2-one-token", "dp=2", "mtp", mask="one"),
    row("mtp-tp2", "tp=2", "mtp"),
    row("mtp-tp2-sp-tied", "tp=2,sp=1", "mtp-tied"),
    row("mtp-pp2", "pp=2", "mtp", micros=3),
    row("mtp-pp2-tied", "pp=2", "mtp-tied", micros=3),
    row("mtp-pp3-head-alone", "pp=3", "mtp", micros=3, stages="E|t*2|L"),
    row(
        "mtp-interleaved", "pp=2,schedule=interleaved", "mtp", micros=4, overrides={"num_layers": 4}
    ),
    row("mtp-one-rank-chunks", "pp=1,chunks=2,schedule=interleaved", "mtp", micros=2),
    row("mtp-zb-h1", "pp=2,schedule=zb-h1", "mtp", micros=3),
    row(
        "mtp-zb-v-tied-tp2",
        "pp=2,tp=2,schedule=zb-v",
        "mtp-tied",
        micros=3,
        overrides={"num_layers": 4},
    ),
    row("mtp-cp2-ring", "cp=2", "mtp"),
    row("mtp-cp2-tp2-sp-packed", "cp=2,tp=2,sp=1", "mtp", packed=True, micro_batch=1, seq_len=16),
    row("mtp-zero2-dp2-tied", "dp=2,zero=2", "mtp-tied", micros=2),
    row("mtp-zero3-dp2-pp2", "dp=2,pp=2,zero=3", "mtp", micros=2),
    row("mtp-zero3-dp2-tied-recompute", "dp=2,zero=3", "mtp-tied", micros=2, recompute="full"),
    row("mtp-tree-dp2", "dp=2", "mtp-tied", micros=4, tree=True),
    row("mtp-heads", model="mtp-heads"),
    row("mtp-heads-pp2-tp2-sp", "pp=2,tp=2,sp=1", "mtp-heads", micros=2),
    row("mtp-heads-zero2-dp2-pp2-tied", "dp=2,pp=2,zero=2", "mtp-heads-tied", micros=3),
    row(
        "mla-mtp-cp2-pp2-tp2-sp", "cp=2,pp=2,tp=2,sp=1", "mla-mtp", micros=2, recompute="selective"
    ),
    row("mla-mtp-8-ranks-zero3", "dp=2,tp=2,pp=2,sp=1,zero=3", "mla-mtp", micros=3),
)

LATENT_CONTROLS: dict[str, str] = {
    "tp.latents": "mla-tp2",
    "sp.latents": "mla-tp2-sp",
}
