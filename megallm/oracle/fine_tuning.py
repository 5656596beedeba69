"""The oracle's rows for what fine-tunes a model, and any row made into one. No torch."""

from __future__ import annotations

from dataclasses import replace

from megallm.oracle.table import CONTROLS, ROWS, Row, made_row
from megallm.oracle.trainers import ADAPTERS, CONTROLS_OF, PAIRED, TRAINER_ROWS, TRAINERS

FINE_TUNING: tuple[Row, ...] = tuple(map(made_row, TRAINER_ROWS))


def control_row(name: str, trainer: str = "pretrain") -> Row | None:
    """Returns the row in which leaving `name` out must show; None where the trainer has none."""
    end = CONTROLS_OF.get(trainer, {}).get(name)
    wanted = CONTROLS[name] if trainer == "pretrain" else f"{trainer}-{end}"
    return next((row for row in (*ROWS, *FINE_TUNING) if row.name == wanted), None)


def as_trainer(row: Row, trainer: str) -> Row:
    """Returns a row of a causal language model as one of the same layout that `trainer` trains."""
    kind = TRAINERS[trainer]
    experts = row.config.moe.num_experts > 0
    adapter = (kind.experts_adapter or kind.adapter) if experts else kind.adapter
    row = replace(row, trainer=trainer, adapter=adapter, loss=kind.loss, rule="adamw")
    row = replace(row, overrides=dict(row.overrides) | {"max_positions": 64})
    if kind.loss == "bradley_terry":
        head = {"head": "value", "tie_embeddings": False}
        row = replace(row, overrides=dict(row.overrides) | head, fused_head="off")
    if kind.critic:
        row = replace(row, overrides=dict(row.overrides) | {"critic": kind.critic})
    if kind.loss in PAIRED:
        row = replace(row, micro_batch=1 if row.packed else 2 * row.micro_batch)
    return replace(row, mask="answer" if row.mask in ("uneven", "full") else row.mask)


def fits_trainer(row: Row, trainer: str) -> bool:
    """Whether a row's model is one that `trainer` trains here: a causal language model without
    further tokens; latent attention takes no prefix, and experts no prompt.
    """
    config, kind = row.config, TRAINERS[trainer]
    method = ADAPTERS[kind.adapter]["method"] if kind.adapter else ""
    return not (
        not config.causal
        or config.head != "lm"
        or config.mtp.depth
        or (config.mla.kv_lora_dim and method == "prefix")
        or (config.moe.num_experts and kind.experts is None)
    )
