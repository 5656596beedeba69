"""Which layers a pipeline stage holds. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.base.errors import UsageError
from megallm.parallel.shard import piece


@dataclass(frozen=True)
class StageSpan:
    """Layers `begin <= n < end`; the first stage also embeds, the last one also holds the head."""

    begin: int
    end: int
    first: bool
    last: bool


def plan_stages(num_layers: int, num_stages: int) -> list[StageSpan]:
    """Divide the layers as evenly as they go, earlier stages longer by one: the last also computes the loss."""
    if num_stages > num_layers:
        raise UsageError(f"{num_stages} pipeline stages need at least {num_stages} layers; the model has {num_layers}.")
    spans = [piece(num_layers, num_stages, stage) for stage in range(num_stages)]
    return [StageSpan(b, e, stage == 0, stage == num_stages - 1) for stage, (b, e) in enumerate(spans)]
