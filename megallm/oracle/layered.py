"""Models whose layers differ, with caps, scales and other norms, their rows of the layout oracle and
their negative controls, as data. No torch."""

from __future__ import annotations

from typing import Any

from megallm.oracle.rows import Written, row

YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_positions": 20, "rope_theta": 50.0}
GEMMA: dict[str, Any] = {
    "layer_pattern": "wf",
    "sliding_window": 3,
    "window_rope_theta": 30.0,
    "norm": "rmsnorm_unit",
    "norm_place": "both",
    "activation": "geglu_tanh",
    "qk_norm": True,
    "attention_scale": 0.7,
    "attention_cap": 1.5,
    "logit_cap": 2.0,
    "embedding_scale": 4.5,
    "tie_embeddings": True,
}
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 14, "aux_coef": 0.5, "z_coef": 0.1}
LAYERED_MODELS: dict[str, dict[str, Any]] = {
    "gemma": GEMMA,
    "olmo": YARN
    | {
        "layer_pattern": "wf",
        "sliding_window": 3,
        "window_rope_theta": 50.0,
        "norm_place": "output",
        "qk_norm": True,
        "qk_norm_span": "all",
    },
    "gpt-oss": YARN
    | {
        "layer_pattern": "wf",
        "sliding_window": 3,
        "attention_sinks": True,
        "qkv_bias": True,
        "o_bias": True,
        "activation": "swiglu_clamped",
        "rope_truncate": False,
        "moe": EXPERTS | {"bias": True, "router_bias": True},
    },
    "granite": {
        "embedding_scale": 3.0,
        "residual_scale": 0.4,
        "attention_scale": 0.2,
        "logits_scaling": 1.7,
        "tie_embeddings": True,
    },
    "neox": {
        "parallel_residual": True,
        "norm": "layernorm",
        "bias": True,
        "activation": "gelu",
        "num_kv_heads": 4,
        "rope_fraction": 0.7,
    },
    "longrope": {
        "rope_fraction": 0.7,
        "rope_scaling": "longrope",
        "rope_factor": 8.0,
        "rope_positions": 5,  # rows are longer
        "rope_short_factors": (1.0, 1.5),
        "rope_long_factors": (1.2, 4.0),
    },
    "unrotated": {"layer_pattern": "fnm", "sliding_window": 3, "num_layers": 3},
    "attention-biased": {"qkv_bias": True, "o_bias": True},
    "modernbert": {
        "causal": False,
        "head": "mlm",
        "norm": "layernorm_unbiased",
        "embedding_norm": True,
        "first_norm": False,
        "layer_pattern": "fw",
        "sliding_window": 3,
        "window_rope_theta": 30.0,
        "activation": "geglu",
        "num_kv_heads": 4,
        "head_bias": True,
        "head_dense_bias": False,
        "tie_embeddings": True,
    },
    "roberta": {"family": "bert", "num_kv_heads": 4, "position_offset": 2},
}

LAYERED_ROWS: tuple[Written, ...] = (
    row("gemma-tp2-sp", "tp=2,sp=1", "gemma", recompute="selective"),
    row("gemma-pp2-fused", "pp=2", "gemma", micros=2, fused_head="on"),
    row("gemma-tp2-fused", "tp=2", "gemma", fused_head="on", small_pieces=True),
    row("gemma-cp2-ring-packed", "cp=2", "gemma", packed=True, micro_batch=1, seq_len=16),
    row("gemma-cp2-ulysses", "cp=2,cp_kind=ulysses", "gemma"),
    row("gemma-zero3-dp2-tempered", "dp=2,zero=3", "gemma", loss="tempered", recompute="full"),
    row("olmo-tp2", "tp=2", "olmo"),
    row("olmo-tp2-cp2-sp", "tp=2,cp=2,sp=1", "olmo"),
    row("olmo-pp2-zb-h1", "pp=2,schedule=zb-h1", "olmo", micros=3),
    row("gpt-oss-tp2-ep2-sp", "tp=2,sp=1,ep=2", "gpt-oss"),
    row("gpt-oss-dp2-ep2", "dp=2,ep=2", "gpt-oss", micros=2),
    row("gpt-oss-pp2", "pp=2", "gpt-oss", micros=2, recompute="full"),
    row("gpt-oss-cp2-ep2-ring", "cp=2,ep=2", "gpt-oss"),
    row("granite-tp2-sp", "tp=2,sp=1", "granite"),
    row("granite-pp2", "pp=2", "granite", micros=2, fused_head="on"),
    row("neox-tp2-sp", "tp=2,sp=1", "neox", recompute="selective"),
    row("neox-pp2-cp2", "pp=2,cp=2", "neox", micros=2),
    row("longrope-tp2", "tp=2", "longrope"),
    row("longrope-cp2-short", "cp=2", "longrope", overrides={"rope_positions": 20}),
    row("unrotated-tp2-sp", "tp=2,sp=1", "unrotated"),
    row("unrotated-pp3-cp2", "pp=3,cp=2", "unrotated", micros=2, seq_len=12),
    row("attention-biased-tp2", "tp=2", "attention-biased"),
    row("modernbert-tp2-sp", "tp=2,sp=1", "modernbert"),
    row("modernbert-cp2-ring-packed", "cp=2", "modernbert", packed=True, micro_batch=1, seq_len=16),
    row("modernbert-cp2-allgather-long", "cp=2,cp_kind=allgather", "modernbert", seq_len=76),
    row("roberta-pp2", "pp=2", "roberta", micros=2),
)

# Rows in which leaving out a reduction must show, by what is new in them.
LAYERED_CONTROLS: tuple[tuple[str, str], ...] = (
    ("gemma-tp2-sp", "grads.partial"),
    ("gemma-tp2-fused", "vocab.sum"),
    ("gemma-pp2-fused", "grads.tie"),
    ("gemma-cp2-ring-packed", "cp.kv_grads"),
    ("olmo-tp2", "tp.qk_norm"),
    ("gpt-oss-tp2-ep2-sp", "grads.partial"),
    ("gpt-oss-cp2-ep2-ring", "cp.lse"),
    ("gpt-oss-dp2-ep2", "moe.combine"),
    ("granite-tp2-sp", "sp.leave"),
    ("neox-tp2-sp", "sp.enter"),
    ("modernbert-cp2-ring-packed", "cp.lse"),
)
