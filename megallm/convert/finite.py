"""Every number that a conversion writes is finite, looked at in the same pass that writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint.io import DTYPE_NAMES


def check_finite(
    block: Tensor, name: str, offset: Sequence[int], original: Callable[[tuple[int, ...]], float]
) -> None:
    """Refuse a block of the tensor `name`, at `offset`, that holds an infinity or a NaN.

    `original` gives the number at a position in float64, before it was rounded to the block's
    dtype. Errors: CheckpointError when it was not finite either, UsageError when only the block's
    dtype cannot hold it.
    """
    if torch.isfinite(block.sum(dtype=torch.promote_types(block.dtype, torch.float32))):
        return  # one pass without a copy; a sum that overflows says nothing yet
    wrong = torch.isfinite(block).logical_not().nonzero()
    if not len(wrong):
        return
    inside = tuple(wrong[0].tolist())
    place = tuple(begin + at for begin, at in zip(offset, inside, strict=True))
    value, where = original(place), f"{name} at {list(place)}"
    if isfinite(value):
        word = DTYPE_NAMES[block.dtype]
        raise UsageError(
            f"{where} is {value:g}, which {word} cannot hold (its largest is "
            f"{torch.finfo(block.dtype).max:g}): choose a --dtype with more range, such as bf16 or "
            "fp32."
        )
    raise CheckpointError(
        f"{where} is {value}: a weight that is not finite makes every answer so. The run that made "
        "it diverged, or the file is damaged; convert an earlier checkpoint."
    )
