"""bench/gpu_kernels.py: every row runs and is right, here by the emulation at small sizes; on a GPU by the kernels."""

from __future__ import annotations

import pytest
import torch

from bench.gpu_kernels import CASES, SIZES, TOLERANCE, difference, limits, measure
from megallm.ops.kernels import KERNELS
from tests.ops.emulated import Counted, emulated

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_row_takes_a_kernel_and_is_right(case):
    KERNELS.loaded["cpu"] = counted = Counted()
    try:
        assert difference(case, SIZES["tiny"], CPU) <= TOLERANCE
    finally:
        del KERNELS.loaded["cpu"]
    assert counted.names, "no kernel was taken"


def test_a_row_is_measured():
    with emulated():
        row = measure(CASES[0], "tiny", CPU, 1, limits(CPU, 1, full=False))
    assert row.microseconds > 0 and row.torch_microseconds > 0 and row.rate > 0 and row.error <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu(case, monkeypatch):
    monkeypatch.setattr(KERNELS, "mode", "native")
    assert difference(case, SIZES["tiny"], torch.device("cuda")) <= TOLERANCE
