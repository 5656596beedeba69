"""Rows of the layout oracle for what fine-tunes a model: adapters, supervised fine-tuning, rewards,
preferences and policies, with their negative controls, as data. No torch.

Every kind runs on the same layouts; the batches are `feed`'s, the losses `objectives`'. A batch has
several sequences a microbatch, rows or documents, and pairs of them where a loss wants pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megallm.oracle.encoders import EXPERTS
from megallm.oracle.rows import Written, row

ADAPTER_NAME = ".adapter.default."
ATTENTION_ONLY: dict[str, Any] = {"targets": ("*.attention.*",)}
_LORA: dict[str, Any] = {"method": "lora", "dim": 3, "alpha": 5.0}
_ENDS: dict[str, Any] = {"targets": ("all-linear", "embedding", "lm_head")}
_ADALORA: dict[str, Any] = {
    "method": "adalora", "dim": 2, "init_dim": 4, "alpha": 5.0, "warmup_steps": 1, "final_steps": 1,
}  # fmt: skip
_VIRTUAL: dict[str, Any] = {"virtual_tokens": 3, "hidden": 5}
# Fields of `peft.config.PeftConfig`.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": _LORA,
    "lora-ends": _LORA | _ENDS,
    "rslora": _LORA | {"rs": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"*.o": 2.0}},
    "dora": _LORA | {"dora": True},
    "dora-attention": _LORA | {"dora": True} | ATTENTION_ONLY,
    "adalora": _ADALORA,
    "adalora-attention": _ADALORA | ATTENTION_ONLY,
    "ia3": {"method": "ia3"},
    "prefix": _VIRTUAL | {"method": "prefix"},
    "prompt": _VIRTUAL | {"method": "prompt"},
    "p-tuning": _VIRTUAL | {"method": "p-tuning"},
    "houlsby": _VIRTUAL | {"method": "houlsby"},
    "parallel": _VIRTUAL | {"method": "parallel"},
    "qlora": _LORA | {"quantize": "nf4"},
}


class Distilled(NamedTuple):
    """What a loss of a student is one from: a live teacher, the student's own base, or stored
    log-probs; beta, and what becomes of the tail of stored ones."""

    teacher: str = "live"
    beta: float = 0.5
    tail: str = "rest"


DISTILLED = {
    "distill": Distilled(),
    "distill_forward": Distilled(beta=0.0),
    "distill_reverse": Distilled(beta=1.0),
    "distill_nll": Distilled(beta=0.3),
    "distill_self": Distilled("self", 0.7),
    "distill_stored": Distilled("stored"),
    "distill_stored_reverse": Distilled("stored", 1.0),
    "distill_renormalized": Distilled("stored", 0.3, "renormalize"),
}
STORED_CLASSES = 5
PAIRED = ("bradley_terry", "dpo", "dpo_mixed", "simpo")  # losses of two sequences each
ADALORA_STEPS = 4  # updates that AdaLoRA's budget is planned for


class Kind(NamedTuple):
    """What one `--trainer` trains: the loss, the adapter (None: all weights), and the models of its
    rows, dense, tied, and with experts (None: it takes none)."""

    loss: str
    adapter: str | None = None
    dense: str = "llama"
    tied: str = "tied"
    experts: str | None = "moe"
    experts_adapter: str | None = None  # for models with experts, where it is another one
    critic: str | None = None  # values beside the head
    further: tuple[Written, ...] = ()


def _reward(name: str, layout: str, **rest: Any) -> Written:
    return row(name, layout, "reward", overrides=EXPERTS, **rest)


VALUE: dict[str, Any] = {"loss": "awr_value", "overrides": {"critic": "value"}}
FUSED_Q: dict[str, Any] = {"fused_head": "on", "overrides": {"critic": "q"}}
ENDS: dict[str, Any] = {"adapter": "lora-ends"}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.3}
FOUR: dict[str, Any] = {"overrides": {"num_layers": 4}}
PACKED: dict[str, Any] = {"packed": True, "micro_batch": 1, "seq_len": 16}
TRAINERS: dict[str, Kind] = {
    "sft": Kind("sft", further=(
        row("dft", "dp=2,tp=2", loss="dft", micros=2, mask="rank"),
        row("dropout-tp2-sp-full", "tp=2,sp=1", recompute="full", micros=2, **DROPOUT),
        row("dropout-cp2-dp2-zero3-packed", "cp=2,dp=2,zero=3", **DROPOUT | PACKED),
        row("dropout-zb-v-tied", "pp=2,schedule=zb-v", "tied", micros=3, **DROPOUT | FOUR),
        row("dropout-experts-ep2-tp2-sp", "dp=2,tp=2,sp=1,ep=2", "moe", **DROPOUT),
        row("mtp", "dp=2,zero=2", "mtp", loss="next_token", micros=2, mask="rank"),
    )),
    "lora": Kind("sft", "lora", further=(
        row("dropout-dp2-tp2-sp", "dp=2,tp=2,sp=1", micros=2, mask="rank", **DROPOUT),
        row("ends-tied-pp2-sp", "pp=2,tp=2,sp=1", "tied", micros=3, **ENDS),
        row("fused-tp2-sp-tied", "tp=2,sp=1", "tied", fused_head="on", micros=2, small_pieces=True),
        row("ends-zero3-fused", "dp=2,zero=3", micros=2, fused_head="on", **ENDS),
        row("biased-tp2-sp", "tp=2,sp=1", "biased", recompute="selective"),
        row("mla-cp2-tp2-sp", "cp=2,tp=2,sp=1", "mla"),
        row("deepseek-ep2-tp2", "dp=2,tp=2,ep=4", "moe-deepseek", mask="rank", recompute="full"),
    )),
    "rslora": Kind("sft", "rslora"),
    "dora": Kind("sft", "dora", experts_adapter="dora-attention", further=(
        row("biased-tp2", "tp=2", "biased"),
    )),
    "adalora": Kind("sft", "adalora", experts_adapter="adalora-attention"),
    "ia3": Kind("sft", "ia3", further=(row("biased-tp4", "tp=4", "biased"),)),
    "prefix": Kind("sft", "prefix", further=(
        row("window-cp2", "cp=2", "mistral", packed=True, micro_batch=1, seq_len=16),
    )),
    "prompt": Kind("sft", "prompt", experts=None),
    "p-tuning": Kind("sft", "p-tuning", experts=None),
    "houlsby": Kind("sft", "houlsby", further=(row("dropout-pp2", "pp=2", micros=3, **DROPOUT),)),
    "parallel": Kind("sft", "parallel"),
    "qlora": Kind("sft", "qlora"),
    "reward": Kind("bradley_terry", None, "reward", "reward", None, further=(
        _reward("dropout-tp2-sp", "tp=2,sp=1", micro_batch=4, **DROPOUT),
        _reward("experts-ep2", "dp=2,ep=2", micro_batch=4, mask="full"),
    )),
    "dpo": Kind("dpo", further=(
        row("mixed-dp2-masked-rank", "dp=2,zero=1", loss="dpo_mixed", micros=2, mask="rank"),
        row("mixed-packed-cp2", "cp=2", loss="dpo_mixed", packed=True, micro_batch=1, seq_len=16),
        row("simpo-tp2-sp", "tp=2,sp=1", loss="simpo"),
        row("lora-dp2-tp2", "dp=2,tp=2", adapter="lora", micros=2, mask="rank"),
    )),
    "kto": Kind("kto", further=(
        row("lora-zb-h1", "pp=2,schedule=zb-h1", adapter="lora", micros=3),
    )),
    "grpo": Kind("grpo", further=(
        row("dapo-dp2-masked-rank", "dp=2", loss="dapo", micros=2, mask="rank"),
        row("lora-dp2-zero2", "dp=2,zero=2", adapter="lora", micros=2),
        row("lora-fused-tp2", "tp=2", adapter="lora", fused_head="on"),
    )),
    "gspo": Kind("gspo"),
    "awr": Kind("awr", further=(
        row("value-tp2-sp", "tp=2,sp=1", micros=2, **VALUE),
        row("value-dp2-cp2-zero3", "dp=2,cp=2,zero=3", "tied", micros=2, recompute="full", **VALUE),
        row("value-zb-h1-packed", "pp=2,schedule=zb-h1", micros=3, packed=True, micro_batch=1, seq_len=16, **VALUE),
        row("value-experts-ep2", "dp=2,ep=2", "moe", mask="rank", **VALUE),
    )),
    "ilql": Kind("ilql", critic="q", further=(
        row("fused-tp2-sp", "tp=2,sp=1", micros=2, **FUSED_Q),
        row("fused-zb-h1-tied", "pp=2,schedule=zb-h1", "tied", micros=3, **FUSED_Q),
    )),
    "distill": Kind("distill", further=(
        row("forward-tp2-sp", "tp=2,sp=1", loss="distill_forward", micros=2),
        row("forward-masked-rank", "dp=2,zero=2", loss="distill_forward", micros=2, mask="rank"),
        row("reverse-cp2-tp2-sp", "cp=2,tp=2,sp=1", loss="distill_reverse"),
        row("reverse-zb-h1", "pp=2,schedule=zb-h1", "tied", loss="distill_reverse", micros=3),
        row("nll-zero3-small", "dp=2,zero=3", loss="distill_nll", micros=2, small_pieces=True),
        row("biased-nll-tp2", "tp=2", "biased", loss="distill_nll"),
        row("lora-dp2-tp2", "dp=2,tp=2", adapter="lora", micros=2, mask="rank"),
        row("self-lora-pp2-tp2", "pp=2,tp=2", loss="distill_self", adapter="lora-ends", micros=3),
        row("self-lora-zero3", "dp=2,zero=3", loss="distill_self", adapter="lora", micros=2),
        row("stored-tp4", "tp=4", loss="distill_stored", small_pieces=True),
        row("stored-cp2-packed", "cp=2", loss="distill_stored", packed=True, micro_batch=1, seq_len=16),
        row("stored-masked-rank", "dp=2", loss="distill_stored_reverse", micros=2, mask="rank"),
        row("stored-interleaved", "pp=2,tp=2,schedule=interleaved", loss="distill_renormalized",
            micros=4, overrides={"num_layers": 4}),
    )),
}  # fmt: skip

DENSE, TIED, MOE = "dense", "tied", "experts"
LAYOUTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("single", "", DENSE, {}),
    ("accumulation", "", DENSE, {"micros": 3, "mask": "uneven"}),
    ("packed", "", DENSE, PACKED | {"micros": 2}),
    ("tp4-two-kv", "tp=4", DENSE, {}),
    ("tp2-sp", "tp=2,sp=1", DENSE, {"micros": 2}),
    ("tp2-sp-tied-full", "tp=2,sp=1", TIED, {"recompute": "full"}),
    ("cp2-ring", "cp=2", DENSE, {"micros": 2}),
    ("cp2-ulysses-packed", "cp=2,cp_kind=ulysses", DENSE, PACKED),
    ("cp2-tp2-sp-ring-packed", "cp=2,tp=2,sp=1", DENSE, PACKED),
    ("dp2-zero1-masked-rank", "dp=2,zero=1", DENSE, {"micros": 2, "mask": "rank"}),
    ("dp2-zero2-masked-micro", "dp=2,zero=2", TIED, {"micros": 2, "mask": "micro"}),
    ("dp2-zero3-full", "dp=2,zero=3", DENSE, {"micros": 2, "recompute": "full"}),
    ("dp3-uneven", "dp=3", DENSE, {"micros": 2, "mask": "uneven"}),
    ("dp2-one", "dp=2", DENSE, {"mask": "one"}),
    ("ep2-masked-rank", "dp=2,ep=2", MOE, {"micros": 2, "mask": "rank"}),
    ("ep2-tp2-sp-zero2", "dp=2,tp=2,sp=1,ep=2,zero=2", MOE, {"recompute": "full"}),
    ("pp2-tied", "pp=2", TIED, {"micros": 3}),
    ("interleaved", "pp=2,schedule=interleaved", DENSE, FOUR | {"micros": 4}),
    ("zb-v", "pp=2,schedule=zb-v", DENSE, FOUR | {"micros": 3, "recompute": "full"}),
    ("zb-h1-tp2-sp", "pp=2,tp=2,sp=1,schedule=zb-h1", DENSE, {"micros": 3}),
    ("dp2-tp2-pp2-zero2", "dp=2,tp=2,pp=2,zero=2", DENSE, {"micros": 3}),
)


def _rows(name: str, kind: Kind) -> Iterator[Written]:
    standard = {"trainer": name, "loss": kind.loss, "adapter": kind.adapter, "mask": "answer"}
    for title, layout, model, changes in LAYOUTS:
        used = {DENSE: kind.dense, TIED: kind.tied, MOE: kind.experts}[model]
        if used is None:
            continue
        settings = standard | {"micro_batch": 4 if kind.loss in PAIRED else 2} | changes
        if model == MOE and kind.experts_adapter:
            settings["adapter"] = kind.experts_adapter
        if kind.critic:
            settings["overrides"] = settings.get("overrides", {}) | {"critic": kind.critic}
        yield row(f"{name}-{title}", layout, used, **settings)
    for title, layout, model, changes in kind.further:
        yield row(f"{name}-{title}", layout, model, **(standard | changes))


TRAINER_ROWS: tuple[Written, ...] = tuple(
    written for name, kind in TRAINERS.items() for written in _rows(name, kind)
)

# What `--break` does besides leaving a reduction out.
TRAINER_MISTAKES = {
    "lora.partial": "gradients of the low-rank matrices that are partial over tp are not summed",
    "dropout.keys": "every tp rank drops by the keys of the first rank's tokens",
    "frozen.touched": "the last bit of one frozen weight flipped after the first step",
    "target.sign": "the target's Q, which values are fitted to, has its sign turned",
    "counts.doubled": "each term divided by twice its count",
    "distill.temperature": "logits of one side, teacher or student, not divided by the temperature",
    "pairs.split": "each pair of sequences torn apart: its second one stands with the next first",
}
_COUNTS = {"loss.counts": "dp3-uneven", "loss.report": "dp3-uneven", "grads.data": "dp3-uneven"}
_OUTPUTS = {"head.outputs": "tp2-sp"}
_FROZEN = {"frozen.touched": "single", "clip.norm": "pp2-tied"}
_LOW_RANK = _FROZEN | {"lora.partial": "tp4-two-kv", "grads.partial": "tp2-sp"}
# For every kind the names that its path uses, and the end of a row's name in which each must show.
CONTROLS_OF: dict[str, dict[str, str]] = {
    "sft": _COUNTS | {
        "cp.outputs": "cp2-ring", "vocab.label": "tp2-sp", "dropout.keys": "dropout-tp2-sp-full",
    },
    "lora": _COUNTS | _LOW_RANK | {"zero.parameters": "dp2-zero2-masked-micro"},
    "rslora": _LOW_RANK,
    "dora": _LOW_RANK | {"dora.norm": "tp2-sp"},
    "adalora": _FROZEN | {"adalora.gram": "tp2-sp", "adalora.scores": "tp2-sp"},
    "ia3": _FROZEN | {"grads.partial": "tp4-two-kv"},
    "prefix": _FROZEN | {"grads.partial": "tp4-two-kv", "cp.lse": "cp2-ring"},
    "prompt": _FROZEN | {"grads.partial": "tp2-sp"},
    "p-tuning": _FROZEN | {"grads.partial": "tp2-sp"},
    "houlsby": _FROZEN | {"grads.partial": "tp2-sp"},
    "parallel": _FROZEN | {"grads.partial": "tp2-sp"},
    "qlora": _LOW_RANK,
    "reward": _COUNTS | _OUTPUTS | {"cp.outputs": "cp2-ring", "pairs.split": "experts-ep2"},
    "dpo": _COUNTS | {"cp.outputs": "cp2-ring", "pairs.split": "single", "counts.doubled": "single"},
    "kto": _COUNTS | {"cp.outputs": "cp2-ring", "counts.doubled": "accumulation"},
    "grpo": _COUNTS | {"vocab.entropy": "tp2-sp", "cp.outputs": "cp2-ring"},
    "gspo": _COUNTS | {"cp.outputs": "cp2-ring"},
    "awr": _COUNTS | {"cp.outputs": "cp2-ring", "head.outputs": "value-tp2-sp"},
    "ilql": _COUNTS | _OUTPUTS | {
        "cp.outputs": "cp2-ring", "vocab.label": "tp4-two-kv", "vocab.sum": "tp2-sp", "target.sign": "single",
    },
    "distill": _COUNTS | {
        "vocab.divergence": "tp2-sp", "vocab.sum": "tp2-sp", "vocab.logits": "tp2-sp",
        "vocab.label": "stored-tp4", "cp.outputs": "cp2-ring", "distill.temperature": "single",
    },
}
