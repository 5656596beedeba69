"""Wide arithmetic: at least fp32, and float64 where the model is float64."""

from __future__ import annotations

import torch
from torch import Tensor

MODEL_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MODEL_DTYPES["fp8"] = (
    torch.bfloat16
)  # what FP8 linears take and give, and what everything else computes in


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Returns `x` in at least fp32. A bare `.float()` would be a downcast in the float64 oracle."""
    return x.to(wide_dtype(x.dtype))
