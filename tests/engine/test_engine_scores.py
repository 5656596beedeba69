"""Forward-only scores come back in the caller's order on every rank of any layout; items are shared and joined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.losses.language import NextToken
from megallm.optim.config import ZeroConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.pipeline import Pipeline
from tests.engine.tiny import MODEL, batches, engine_of, share
from tests.ranks import run_ranks

FOUR = {"num_layers": 4}
CASES = {
    "tp2-sp": (Layout(tp=2), {"sp": True}),
    "pp2-1f1b": (Layout(pp=2), {}),
    "pp2-interleaved": (Layout(pp=2), {"schedule": "interleaved", "chunks": 2, "model": FOUR}),
    "pp2-zb-v": (Layout(pp=2), {"schedule": "zb-v", "chunks": 2, "model": FOUR}),
    "cp2": (Layout(cp=2), {}),
    "dp2-zero3": (Layout(dp=2), {"zero": ZeroConfig(3)}),
    "dp2-pp2": (Layout(dp=2, pp=2), {}),
}


def trained(mesh: Mesh, changes: dict):
    """An engine after one step, so that stale weights would show."""
    changes = dict(changes)
    model = replace(MODEL, **changes.pop("model", {}))
    engine = engine_of(mesh, model=model, **changes)
    engine.train_step(share(batches(4, tokens=16), mesh), NextToken(), 0.01)
    return engine


def scored(layout: Layout, changes: dict) -> list[Tensor]:
    mesh = Mesh.start(layout)
    engine = trained(mesh, changes)
    return engine.log_probs(share(batches(4, tokens=16, seed=7), mesh))


@pytest.mark.parametrize("case", CASES)
def test_log_probs_equal_those_of_one_process_on_every_rank(case):
    layout, changes = CASES[case]
    whole = trained(Mesh.single(), {"model": changes.get("model", {})}).log_probs(batches(4, tokens=16, seed=7))
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in whole)
    for rank, mine in enumerate(run_ranks(layout.world, scored, layout, changes)):
        each = 4 // layout.dp
        theirs = whole[layout.coords(rank)["dp"] * each :][:each]
        assert len(mine) == each
        for ours, reference in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_results_in_another_order_would_be_noticed(monkeypatch):
    """The control: microbatches differ, so a mixed-up order shows."""
    original = Pipeline.run

    def reversed_results(self, *args, **kwargs):
        run = original(self, *args, **kwargs)
        run.results = dict(zip(run.results, reversed(run.results.values()), strict=True))
        return run

    engine = trained(Mesh.single(), {})
    right = engine.log_probs(batches(2, tokens=16))
    monkeypatch.setattr(Pipeline, "run", reversed_results)
    assert not torch.allclose(engine.log_probs(batches(2, tokens=16))[0], right[0])


def test_an_output_that_the_head_does_not_have_is_named():
    engine = engine_of()
    with pytest.raises(UsageError, match="scores wants value; the head model.head=lm gives log_prob"):
        engine.values(batches(1))


def shared(layout: Layout, count: int) -> tuple[list, list]:
    engine = engine_of(Mesh.start(layout))
    items = [{"id": i, "text": "x" * i} for i in range(count)]
    return engine.mine(items), engine.all(engine.mine(items))


@pytest.mark.parametrize(("layout", "count"), [(Layout(dp=2, tp=2), 5), (Layout(dp=3), 2), (Layout(), 3)], ids=str)
def test_items_are_shared_by_data_rank_and_come_back_in_order(layout, count):
    results = run_ranks(layout.world, shared, layout, count)
    everything = [{"id": i, "text": "x" * i} for i in range(count)]
    assert all(joined == everything for _, joined in results)
    by_replica = {layout.coords(rank)["dp"]: mine for rank, (mine, _) in enumerate(results)}
    assert [item for replica in sorted(by_replica) for item in by_replica[replica]] == everything
    assert all(mine == by_replica[layout.coords(rank)["dp"]] for rank, (mine, _) in enumerate(results))
