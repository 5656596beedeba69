"""Whether answers share their prompts in the rows of a run, and what that saves. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megallm.base.errors import UsageError
from megallm.data.shared_prefix import PrefixSharing, SharedPrefix
from megallm.models.config import ModelConfig

# Name of the metric: the share of the tokens of plain rows that shared rows do not compute.
SAVING = "perf/shared_prefix_saving"


def saving_said(section: str, wanted: SharedPrefix, saved: float) -> str:
    """Returns what a run says of its first step."""
    found = f"share their prompt, {saved:.0%} fewer tokens" if saved else "have rows of their own"
    return f"answers to a prompt {found} ({section}.shared_prefix {wanted})"


def sharing_said(wanted: SharedPrefix, common: float) -> str:
    """Returns what a run on pairs says of its rows; `common` is the share of their tokens."""
    when = "wherever" if wanted == "on" else "where that is cheaper"
    return f"answers share their prompt {when}: {common:.0%} of the tokens (data.shared_prefix)"


def obstacle(model: ModelConfig) -> str | None:
    """Returns why a model's answers cannot share a prompt, as a clause; None where they can."""
    if not model.causal:
        return "model.causal is false: a prompt sees its answer"
    if model.moe.num_experts and model.moe.capacity is not None:
        return "model.moe.capacity counts the tokens of a sequence, and prompts are part of several"
    return None


def sharing_of(
    wanted: SharedPrefix, model: ModelConfig, key: str, further: str | None = None
) -> PrefixSharing | None:
    """Returns when prompts are shared, None for never; `key` is the setting's, `further` another
    clause against it. Errors: UsageError where it is on and the model cannot.
    """
    why = obstacle(model) or further
    if wanted == "on" and why is not None:
        raise UsageError(f"{key} is on, but {why}. Set it to auto or off.")
    if wanted == "off" or why is not None:
        return None
    return PrefixSharing(wanted == "on", product_cost(model))


def saving_of(batches: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the metric of microbatches that share prompts; nothing of others."""
    if not any("prefix_of" in batch for batch in batches):
        return {}
    spared = computed = 0
    for batch in batches:
        ends, before = batch["cu_seqlens"].tolist(), batch["prefix_of"].tolist()
        again = [parent for parent in before if parent >= 0]
        spared += sum(ends[n + 1] - ends[n] for n in again)
        spared -= sum(ends[n + 1] - ends[n] for n in {*again})
        computed += ends[-1]
    return {SAVING: spared / (spared + computed)}


def product_cost(model: ModelConfig) -> float:
    """Returns the FLOPs of one product of a query with a key, in all layers, beside those of a
    token; the head is left out, which meets the same tokens either way.
    """
    token = model.num_flops(0) - 6 * model.head_matrices
    return (model.num_flops(1) - model.num_flops(0)) / token
