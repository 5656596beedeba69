"""Orthogonalisation of matrices by Newton-Schulz iterations, as in Muon (Jordan 2024; arXiv
2502.16982).
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # a x + b x^3 + c x^5, steepest at 0: singular values end near 1, not at it
EPS = 1e-7


def orthogonalized(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Returns each matrix of `x` `[..., rows, columns]` with its singular values brought near 1; a
    new tensor of `dtype`.

    X / |X| goes through `steps` iterations X <- a X + (b A + c A^2) X with A = X X^T, on the
    shorter side. bf16 is enough: the polynomial does not converge, it only has to leave no singular
    value small.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = x.to(dtype).mT if tall else x.to(dtype)
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=EPS)
    flat = y.flatten(0, -3) if y.dim() > 2 else y
    flat = (
        flat[0] if flat.dim() == 3 and len(flat) == 1 else flat
    )  # one matrix: the batched kernels are slower
    multiply_add = torch.addmm if flat.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = flat @ flat.mT
        gram = multiply_add(gram, gram, gram, beta=b, alpha=c)
        flat = multiply_add(flat, gram, flat, beta=a)
    y = flat.view(y.shape)
    return y.mT if tall else y
