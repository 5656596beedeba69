"""Losses of pairs, single answers and policies through the engine: the same steps at every layout and split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megallm.losses import terms
from megallm.losses.policy import first_update_fault, policy_loss
from megallm.losses.preference import Kto, Preference
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import Batch, engine_of, share
from tests.ranks import run_ranks

if "Loss" not in vars(terms):
    pytest.skip("the engine of this tree does not take Terms yet", allow_module_level=True)

SEQUENCES, TOKENS = 4, 12
LOSSES = {
    "dpo": Preference(beta=0.5, nll=0.3),
    "ipo": Preference("ipo", beta=0.5),
    "kto": Kto(beta=0.5),
    "grpo": policy_loss("grpo", beta=0.1, entropy_coef=0.01),
    "dapo": policy_loss("dapo"),
    "gspo": policy_loss("gspo", low=0.1, high=0.1),
}
FIRST = {"dpo": math.log(2), "ipo": 1.0, "kto": 0.5}


def batch_of(reference: torch.Tensor | None = None) -> Batch:
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(61, (SEQUENCES, TOKENS + 1), generator=draw)
    places = torch.arange(TOKENS)
    lengths = torch.tensor([5, 8, 3, 6])
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "positions": places.expand(SEQUENCES, TOKENS).contiguous(),
        "mask": (places >= 3) & (places < 3 + lengths[:, None]),
        "advantages": torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=torch.float64),
        "desirable": torch.tensor([True, False, False, True]),
        "reference_point": torch.zeros(SEQUENCES, dtype=torch.float64),
    }
    if reference is not None:
        batch |= {"ref_log_probs": reference, "old_log_probs": reference}
    return batch


def rows(batch: Batch, begin: int, end: int) -> Batch:
    return {name: x[begin:end].contiguous() for name, x in batch.items()}


def as_documents(batch: Batch) -> Batch:
    whole = {name: x.reshape(1, -1) if x.dim() == 2 else x for name, x in batch.items()}
    return whole | {"cu_seqlens": torch.arange(0, SEQUENCES * TOKENS + 1, TOKENS, dtype=torch.int32)}


@dataclass(frozen=True)
class Steps:
    """What two steps of each loss give; the reference is the policy before the first."""

    reports: dict[str, list[dict[str, float]]]


def steps(mesh: Mesh | None, micros: list[Batch], names: tuple[str, ...], **options: Any) -> Steps:
    found = {}
    for name in names:
        engine = engine_of(mesh, **options)
        loss = LOSSES[name]
        stats = [engine.train_step(micros, loss, lr=1e-2) for _ in range(2)]
        found[name] = [{"total": s.loss, "norm": s.grad_norm} | s.losses | s.metrics for s in stats]
        # Where policy and reference are equal, which of two answers is ahead is a matter of rounding.
        found[name][0].pop("rewards/accuracies", None)
    return Steps(found)


@pytest.fixture(scope="module")
def batch() -> Batch:
    reference = engine_of().log_probs([batch_of()])
    return batch_of(reference if isinstance(reference, torch.Tensor) else torch.cat(list(reference)))


@pytest.fixture(scope="module")
def one(batch) -> Steps:
    return steps(None, [batch], tuple(LOSSES))


def same(ours: Steps, theirs: Steps) -> None:
    for name, reports in ours.reports.items():
        for report, want in zip(reports, theirs.reports[name], strict=True):
            assert report == pytest.approx(want, rel=1e-9, abs=1e-12), name


def test_the_first_step_shows_what_it_must(one):
    for name, want in FIRST.items():
        assert one.reports[name][0]["loss"] == pytest.approx(want) == LOSSES[name].first_loss()
        assert one.reports[name][1]["loss"] != pytest.approx(want)
    for name in ("grpo", "dapo", "gspo"):
        first, second = one.reports[name]
        assert first_update_fault(first, reference_is_policy=True) is None
        assert "In the first update" in first_update_fault(second)


def test_split_and_packed(one, batch):
    names = tuple(LOSSES)
    same(steps(None, [rows(batch, 0, 2), rows(batch, 2, 4)], names), one)
    same(steps(None, [as_documents(batch)], names), one)
    with pytest.raises(ValueError, match="has 1 sequences; a chosen and a rejected one belong"):
        steps(None, [rows(batch, 0, 1), rows(batch, 1, 4)], ("dpo",))
    singles = ("kto", "grpo", "dapo", "gspo")  # a pair stays in one microbatch
    same(steps(None, [rows(batch, 0, 1), rows(batch, 1, 4)], singles), one)


def of_rank(layout: Layout, batch: Batch) -> Steps:
    mesh = Mesh.start(layout)
    micros = [rows(batch, 0, 2), rows(batch, 2, 4)]
    return steps(mesh, share(micros, mesh), ("dpo", "kto", "gspo"))


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2, pp=2), Layout(cp=2)], ids=str)
def test_layouts(one, batch, layout):
    for ours in run_ranks(layout.world, of_rank, layout, batch):
        same(ours, one)
