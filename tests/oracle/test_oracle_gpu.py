"""The oracle's rows on GPUs, over nccl: every row whose ranks can have a GPU each (`pytest -m gpu`)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.oracle.compare import run_row
from megallm.oracle.run import device_for
from megallm.oracle.table import CONTROLS, ROWS, Row, row_named
from tests.ranks import pool


def _need(row: Row) -> None:
    have = torch.cuda.device_count()
    if have < row.layout.world:
        pytest.skip(f"{row.name} needs {row.layout.world} GPUs, this machine has {have}: nothing was compared")


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_on_gpus(row: Row) -> None:
    _need(row)
    verdict = run_row(pool(), row, device="cuda")
    assert verdict.passed, verdict.failures


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONTROLS)
def test_a_reduction_left_out_is_noticed_on_gpus(name: str) -> None:
    row = row_named(CONTROLS[name])
    _need(row)
    assert not run_row(pool(), row, frozenset({name}), "cuda").passed


def test_a_row_runs_on_gpus_when_each_rank_can_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: 2))
    two, four = row_named("tp2"), row_named("tp4-sp-two-kv")
    assert [device_for(two, wanted) for wanted in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert device_for(four, "auto") == "cpu"
    with pytest.raises(UsageError, match="4 ranks, and 2 are here"):
        device_for(four, "cuda")
