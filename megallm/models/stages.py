"""Which layers a pipeline stage holds. Pure.

Stages are balanced by work: a layer counts 1, the loss counts what its matrix multiply costs in
layers. Or the user writes the layout down: `Et*3|t*4|t*4|t*3L` is four stages, embedding and 3
layers, 4, 4, 3 and the loss.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from megallm.base.errors import UsageError
from megallm.models.config import ModelConfig


@dataclass(frozen=True)
class StageSpan:
    """Layers `begin <= n < end`; the first stage also embeds, the last one also holds the head."""

    begin: int
    end: int
    first: bool
    last: bool


def plan_stages(
    num_layers: int, num_stages: int, layout: str | None = None, loss_work: float = 0.0
) -> list[StageSpan]:
    """Returns the layers of each stage, by `layout` or balanced; each balanced stage has at least
    one layer.

    `loss_work` is the cost of the head in layers (`head_work`). Raises UsageError when it cannot be
    done.
    """
    if layout is not None:
        counts = parse_stages(layout, num_layers, num_stages)
    elif num_stages > num_layers:
        raise UsageError(
            f"{num_stages} pipeline stages need at least {num_stages} layers; the model has "
            f"{num_layers}."
        )
    else:
        counts = _balanced(num_layers, num_stages, loss_work)
    ends = [sum(counts[: stage + 1]) for stage in range(num_stages)]
    return [
        StageSpan(end - count, end, stage == 0, stage == num_stages - 1)
        for stage, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def head_work(config: ModelConfig) -> float:
    """Number of matrix-multiply FLOPs of the head, and of what predicts further tokens, over those
    of one layer.

    The embedding is a look-up and counts 0.
    """
    layer, ahead = config.block_matrices, config.mtp.depth
    return ((1 + ahead) * config.head_matrices + ahead * config.mtp_matrices) / layer + ahead


def _balanced(num_layers: int, num_stages: int, loss_work: float) -> list[int]:
    """The smallest possible largest work; then the earlier stages take what does not divide."""
    body = num_stages - 1
    if body == 0:
        return [num_layers]
    most, even = num_layers - body, num_layers / num_stages  # the others keep a layer each
    last = min(
        range(1, most + 1),
        key=lambda n: (max(n + loss_work, -(-(num_layers - n) // body)), abs(n - even)),
    )
    base, extra = divmod(num_layers - last, body)
    return [base + (stage < extra) for stage in range(body)] + [last]


MAX_WRITTEN, MAX_EXPANDED = (
    4_096,
    100_000,
)  # characters of a layout string, before and after its repeats
_TOKEN = re.compile(r"([EtL|])(?:\*(\d+))?")


def parse_stages(layout: str, num_layers: int, num_stages: int) -> list[int]:
    """Returns layers per stage of a layout string: `E` embedding, `t` a layer, `L` loss, `|`
    between stages, `*n` repeats what stands before it, `(...)` groups.
    """
    stages = _expand(layout.replace(" ", "")).split("|")
    problem = None
    if len(stages) != num_stages:
        problem = f"it has {len(stages)} stages, the layout needs pp x chunks = {num_stages}"
    elif not re.fullmatch(r"Et*(\|t*)*\|t*L|Et*L", "|".join(stages)):
        problem = (
            "it must begin with E (embedding), end with L (loss), and have nothing but t (layers) "
            "between"
        )
    elif "".join(stages).count("t") != num_layers:
        problem = f"it has {''.join(stages).count('t')} layers t, the model has {num_layers}"
    if problem:
        raise UsageError(
            f"layout.stages '{layout}' does not fit: {problem}. An even one is "
            f"'{_even(num_layers, num_stages)}'."
        )
    return [stage.count("t") for stage in stages]


def _expand(text: str) -> str:
    """Replace `(...)*n` from the inside out, then `x*n`."""
    _check_length(text, MAX_WRITTEN)
    while match := re.search(r"\(([^()]*)\)(?:\*(\d+))?", text):
        text = text[: match.start()] + _repeated(match[1], match[2]) + text[match.end() :]
        _check_length(text, MAX_EXPANDED)
    expanded, end = "", 0
    for match in _TOKEN.finditer(text):
        if match.start() != end:
            break
        expanded += _repeated(match[1], match[2])
        _check_length(expanded, MAX_EXPANDED)
        end = match.end()
    if end != len(text):
        rest = text[end : end + 60]
        raise UsageError(
            f"layout.stages: '{rest}' is not understood; use E, t, L, | and *n, as in 'Et*3|t*3L'."
        )
    return expanded


def _check_length(text: str, most: int) -> None:
    if len(text) > most:
        raise UsageError(
            f"layout.stages '{text[:60]}...' is too long: at most {most} characters; check its "
            "repeats."
        )


def _repeated(piece: str, digits: str | None) -> str:
    if digits is not None and (
        len(digits) > 4 or int(digits) < 1 or len(piece) * int(digits) > MAX_EXPANDED
    ):
        raise UsageError(
            f"layout.stages '{piece[:60]}': the repeat *{digits[:60]} must be between 1 and 9999, "
            f"and make at most {MAX_EXPANDED} characters."
        )
    return piece * int(digits or 1)


@cache
def _even(num_layers: int, num_stages: int) -> str:
    if num_stages <= num_layers:
        counts = _balanced(num_layers, num_stages, 0.0)
    else:
        counts = [1] * num_layers + [0] * (num_stages - num_layers)
    stages = [f"t*{count}" if count else "" for count in counts]
    return f"E{'|'.join(stages)}L"
