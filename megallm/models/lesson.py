"""What a teacher's last stage says of a microbatch: hidden states that its head would multiply, or
its likeliest tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from megallm.models.heads import MASK_ON_CPU, counted_tokens, put_back, select_counted
from megallm.ops.cross_entropy import Projection
from megallm.parallel.divergence import top_log_probs
from megallm.parallel.tensor import gather_input
from megallm.parallel.units import run_unit

if TYPE_CHECKING:
    from megallm.models.decoder import Stage


def lesson(stage: Stage, x: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a teacher is asked for: `hidden` `[n, D]` of this rank's tokens that count,
    `whole_hidden` `[B, T, D]`, or `ids` and `log_probs` `[B, T, K]` of its likeliest entries, 0
    where tokens do not count.
    """
    mask, keys = batch.get(MASK_ON_CPU, batch["mask"]), stage.head_keys
    counted = counted_tokens(stage.context.local(mask), x.device)
    if stage.wanted.names == ("hidden",):
        found = run_unit(stage.units, keys, partial(_hidden, stage), x)
        return {"hidden": select_counted(found, counted).flatten(0, -2)}
    if stage.wanted.names == ("whole_hidden",):
        found = run_unit(stage.units, keys, partial(_hidden, stage), x)
        return {"whole_hidden": stage.context.whole(found)}
    shape = stage.context.local(batch["labels"]).shape
    found = run_unit(stage.units, keys, partial(_top_entries, stage), x, counted)
    made = (put_back(y, counted, shape).view(*shape, -1) for y in found)
    return dict(zip(("ids", "log_probs"), map(stage.context.whole, made), strict=True))


def _hidden(stage: Stage, x: Tensor) -> Tensor:
    """What a head would multiply, `[B, T/cp, D]`, on every tp rank."""
    return gather_input(stage.features(x), stage.mesh, stage.sp, "vocab.logits")


def _top_entries(stage: Stage, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids and log-probs `[n, K]` of the likeliest entries of tokens that count."""
    hidden = select_counted(_hidden(stage, x), counted).flatten(0, -2)
    head, wanted = Projection(stage.head_weight, stage.head_bias), stage.wanted
    whole = stage.mesh, stage.config.vocab_size
    return top_log_probs(hidden, head, wanted.top_k, wanted.temperature, whole)
