"""Encoders and heads other than a language model's: models, rows of the layout oracle and negative
controls, as data. No torch."""

from __future__ import annotations

from typing import Any

from megallm.oracle.rows import Written, row

LOSSES = {
    "lm": ("next_token", "tempered"),
    "mlm": ("cross_entropy", "diffusion"),
    "classification": ("cross_entropy",),
    "value": ("regression", "critic", "reward"),
}  # by head

ENCODER_MODELS: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert", "num_kv_heads": 4},
    "bert-untied": {"family": "bert", "tie_embeddings": False, "activation": "gelu_tanh"},
    "bert-classes": {"family": "bert", "head": "classification", "num_labels": 3, "pooler": True},
    "bert-value": {"family": "bert", "num_kv_heads": 1, "head": "value", "pooler": True},
    "diffusion": {"causal": False, "head": "mlm", "tie_embeddings": True},
    "reward": {"head": "value", "qk_norm": True},
}
EXPERTS = {
    "moe": {"num_experts": 4, "ffn_hidden_size": 14, "aux_coef": 0.5, "z_coef": 0.1},
    "bias": False,
}


ENCODER_ROWS: tuple[Written, ...] = (
    row("encoder", model="bert"),
    row("encoder-packed", model="bert", packed=True, micro_batch=1, micros=2),
    row("encoder-dp2-masked-rank", "dp=2", "bert", micros=2, mask="rank"),
    row("encoder-tp2", "tp=2", "bert"),
    row("encoder-tp2-sp", "tp=2,sp=1", "bert-untied"),
    row("encoder-pp2", "pp=2", "bert", micros=3),
    row("encoder-pp2-tp2-sp", "pp=2,tp=2,sp=1", "bert", micros=2, recompute="selective"),
    row(
        "encoder-interleaved",
        "pp=2,schedule=interleaved",
        "bert",
        micros=4,
        overrides={"num_layers": 4},
    ),
    row("encoder-zb-h1", "pp=2,schedule=zb-h1", "bert-untied", micros=3),
    row(
        "encoder-zb-v-tp2", "pp=2,tp=2,schedule=zb-v", "bert", micros=3, overrides={"num_layers": 4}
    ),
    row("encoder-cp2-ring", "cp=2", "bert"),
    row("encoder-cp2-ring-packed", "cp=2", "bert", packed=True, micro_batch=1, seq_len=16),
    row("encoder-cp2-ulysses", "cp=2,cp_kind=ulysses", "bert-untied"),
    row(
        "encoder-cp2-allgather-packed",
        "cp=2,cp_kind=allgather",
        "bert",
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
    row("encoder-cp4-hybrid-tp2-sp", "cp=4,tp=2,sp=1,cp_kind=hybrid", "bert", seq_len=16),
    row("encoder-zero3-dp2-recompute", "dp=2,zero=3", "bert", micros=2, recompute="full"),
    row("encoder-zero2-dp2-cp2-pp2", "dp=2,cp=2,pp=2,zero=2", "bert", micros=2, mask="one"),
    row(
        "diffusion-dp2-cp2",
        "dp=2,cp=2",
        "diffusion",
        loss="diffusion",
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
    row("classes-tp4", "tp=4", "bert-classes"),  # fewer classes than ranks
    row("classes-tp2-sp-pp2", "tp=2,pp=2,sp=1", "bert-classes", micros=2),
    row("classes-cp2-dp2", "cp=2,dp=2", "bert-classes", micros=2, mask="one"),
    row("regression-tp2-sp", "tp=2,sp=1", "bert-value", mask="full"),
    row(
        "regression-dp2-masked-rank-zero3",
        "dp=2,zero=3",
        "reward",
        loss="regression",
        mask="rank",
        micros=2,
    ),
    row("critic-tp2-sp-cp2", "tp=2,sp=1,cp=2", "reward", loss="critic"),
    row("critic-pp2-zb-h1", "pp=2,schedule=zb-h1", "reward", loss="critic", micros=3),
    row("reward-tp2-sp-dp2", "tp=2,sp=1,dp=2", "reward", loss="reward", micros=2),
    row(
        "reward-cp2-dp2-packed",
        "cp=2,dp=2",
        "reward",
        loss="reward",
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
    row(
        "reward-pp2-dp2-masked-micro", "pp=2,dp=2", "reward", loss="reward", micros=3, mask="micro"
    ),
    row("encoder-gpipe", "pp=2,schedule=gpipe", "bert-untied", micros=3),
    row(
        "encoder-sinks-cp2-tp2-packed",
        "cp=2,tp=2,cp_kind=ulysses",
        "diffusion",
        overrides={"attention_sinks": True},
        packed=True,
        micro_batch=1,
        seq_len=16,
    ),
    row("encoder-latent-cp2-tp2", "cp=2,tp=2", "mla", overrides={"causal": False, "head": "mlm"}),
    row("encoder-experts-dp2-ep2", "dp=2,ep=2", "bert", overrides=EXPERTS, micros=2, mask="rank"),
    row("reward-experts-dp2-ep2", "dp=2,ep=2", "reward", loss="reward", overrides=EXPERTS),
)

ENCODER_CONTROLS: dict[str, str] = {"head.outputs": "regression-tp2-sp"}
