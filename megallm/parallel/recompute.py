"""Activation recomputation (arXiv 1604.06174): nothing random runs inside a block, so no RNG state is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

MODES = ("none", "selective", "full")


def recompute(wanted: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """Call `function(*inputs)`; when wanted, keep only its inputs and run it again in the backward pass."""
    if not wanted or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
