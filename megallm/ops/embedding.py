"""Rows of a table, with a gradient of those that were read: a microbatch reads few of a large
table's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.precision import wide


def look_up(numbers: Tensor, table: Tensor) -> Tensor:
    """Returns rows `numbers` `[...]` of `table` `[V, D]`: `[..., D]`. Raises IndexError for a
    number outside the table.

    On a CPU the table's gradient is sparse: each row that was read, once (`optim.flat` adds them).
    On a GPU it is dense, since atomic additions of rows have no fixed order.
    """
    return (
        _Rows.apply(numbers, table) if table.device.type == "cpu" else F.embedding(numbers, table)
    )


class _Rows(torch.autograd.Function):
    """The gradients of a row that was read often are added wide: in bf16 a sum of thousands would
    stop growing.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, numbers: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.shape = table.shape
        return F.embedding(numbers, table)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        (numbers,) = ctx.saved_tensors
        values = wide(grad.flatten(0, -2))
        rows = torch.sparse_coo_tensor(
            numbers.flatten()[None], values, ctx.shape, check_invariants=False
        )
        return None, rows.coalesce().to(grad.dtype)
