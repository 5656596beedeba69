"""RMSNorm (arXiv 1910.07467) and LayerNorm over the last dim; statistics and products are wide."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megallm.ops.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, `[..., D]` in the dtype of `x`."""
    return F.rms_norm(wide(x), weight.shape, wide(weight), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias`, `[..., D]` in the dtype of `x`."""
    return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps).to(x.dtype)
