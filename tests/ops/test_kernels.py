"""The CUDA kernels, emulated on a CPU: values and gradients beside the same operation in float64, at odd sizes, of no
rows, at addresses that are no multiple of 16 bytes. A race, a stray address, bits that depend on the order of threads
end a test: see `test_emulation.py`."""

from __future__ import annotations

import pytest
import torch

from megallm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.ops.emulated import TOLERANCES, error

EPS = 1e-5
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def check(function, inputs, dtypes, operations, offset=0):
    worst, names = error(function, inputs, dtypes, offset)
    assert worst <= TOLERANCES[dtypes[0]], worst
    assert set(operations) <= set(names), "no kernel was taken"


# Short rows take a warp each, long ones a block; the longest do not fit into its registers.
@DTYPES
@pytest.mark.parametrize(("rows", "width", "offset"), [(5, 64, 0), (3, 33, 0), (2, 7, 0), (0, 8, 0), (3, 16, 1), (2, 1160, 0)])
def test_norms(rows, width, offset, dtype):
    x, residual, weight, bias = normal(rows, width), normal(rows, width) + 1, normal(width) + 1, normal(width)
    both = ["norm", "norm_backward"]
    for narrow in {dtype, torch.float32}:  # of the weight
        check(lambda x, w: rms_norm(x, w, EPS), [x, weight], [dtype, narrow], both, offset)
        check(lambda x, w, b: layer_norm(x, w, b, EPS), [x, weight, bias], [dtype, narrow, narrow], both, offset)
    check(lambda x, r, w: add_rms_norm(x, r, w, EPS), [x, residual, weight], [dtype] * 3, both, offset)
    check(lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), [x, residual, weight, bias], [dtype] * 4, both, offset)


def test_norms_of_rows_that_no_block_keeps():
    x, weight = normal(2, 4100), normal(4100)  # one element a pack: the address is odd
    check(lambda x, w: rms_norm(x, w, EPS), [x, weight], [torch.float32] * 2, ["norm_backward"], offset=1)
    check(lambda x, w: layer_norm(x, w, None, EPS), [x, weight], [torch.float32] * 2, ["norm_backward"], offset=1)
