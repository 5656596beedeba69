"""One step of the engine: accumulation, recompute, evaluation, masked ranks and gradients that are not finite."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import ClassVar
from weakref import finalize

import pytest
import torch
from torch import Tensor

from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.losses.terms import Terms
from megallm.models.config import ModelConfig
from megallm.oracle import reference
from megallm.parallel import vocab
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import (
    MODEL,
    SEEN,
    Batch,
    batches,
    engine_of,
    equal,
    gradients_of,
    layouts,
    share,
    state_of,
    worst,
)
from tests.ranks import run_ranks

# --- accumulation --------------------------------------------------------------------------------------------------


def gradients_by_micro(micros: list[Batch]) -> list[dict[str, Tensor]]:
    """The bf16 gradients of each microbatch alone, divided by the count of all: what the engine adds up."""
    count = sum(int(batch["mask"].sum()) for batch in micros)

    @dataclass(frozen=True)
    class Share:
        """NextToken that one microbatch divides by everybody's count."""

        needs, temperature = ("log_prob",), 1.0

        def counts(self, batch: Batch) -> dict[str, Tensor]:
            return {"loss": torch.tensor(count)}

        def __call__(self, outputs: dict[str, Tensor], batch: Batch) -> Terms:
            return NextToken()(outputs, batch)

    found = []
    for batch in micros:
        engine = engine_of(precision="bf16")
        engine.train_step([batch], Share(), 0.0)
        found.append(gradients_of(state_of(engine)))
    return found


def test_64_microbatches_in_bf16_add_up_as_in_fp32():
    micros = batches(64, rows=1)
    engine = engine_of(precision="bf16")
    engine.train_step(micros, NextToken(), 0.0)
    ours, each = gradients_of(state_of(engine)), gradients_by_micro(micros)
    assert all(torch.equal(x, x.bfloat16().float()) for grads in each for x in grads.values()), "they are bf16 numbers"
    wide = {name: sum(grads[name].double() for grads in each) for name in ours}
    assert worst(ours, wide) <= 1e-5
    narrow = {name: sum_narrow([grads[name] for grads in each]) for name in ours}
    assert worst(narrow, wide) > 1e-3, "the control: adding in bf16 is far outside"


def sum_narrow(terms: list[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0], dtype=torch.bfloat16)
    for term in terms:
        total += term.bfloat16()
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_the_embedding_add_up_to_the_gradient_of_the_whole(tied, monkeypatch):
    """A CPU is given the rows that were read alone; some are read twice and most of them by another microbatch."""
    model, micros = replace(MODEL, tie_embeddings=tied), batches(3)
    assert len(micros[0]["tokens"].unique()) < micros[0]["tokens"].numel()

    def found() -> dict[str, Tensor]:
        engine = engine_of(model=model)
        engine.train_step(micros, NextToken(), 0.0)
        return gradients_of(state_of(engine))

    rows = found()
    monkeypatch.setattr(vocab, "look_up", torch.nn.functional.embedding)
    whole = found()
    assert worst(rows, whole) <= 1e-13
    monkeypatch.setattr(vocab, "look_up", lambda tokens, weight: weight[tokens].detach())
    assert worst(found(), whole) > 0.1, "the control: without it"


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_that_stands_everywhere_keeps_its_gradient_in_bf16(tied, monkeypatch):
    """Half of 2,048 tokens are the same one: its gradients, added one by one in bf16, soon are too small to count."""
    model, batch = replace(MODEL, tie_embeddings=tied, max_positions=2048), batches(1, rows=1, tokens=2048)[0]
    draw = torch.Generator().manual_seed(1)
    batch["tokens"][torch.rand(1, 2048, generator=draw) < 0.5] = 3

    def found(precision: str) -> Tensor:
        engine = engine_of(model=model, precision=precision)
        engine.train_step([batch], NextToken(), 0.0)
        return gradients_of(state_of(engine))["embedding.weight"].double()

    exact = found("fp64")
    error = float((found("bf16") - exact).norm() / exact.norm())
    monkeypatch.setattr(vocab, "look_up", torch.nn.functional.embedding)
    narrow = float((found("bf16") - exact).norm() / exact.norm())
    assert error < 0.02 and narrow > 5 * error, (error, narrow)


def test_microbatches_of_one_row_equal_one_batch():
    whole = batches(1, rows=6)[0]
    rows = [{key: x[i : i + 1] for key, x in whole.items()} for i in range(6)]
    found = []
    for micros in ([whole], rows):
        engine = engine_of()
        stats = engine.train_step(micros, NextToken(), 0.01)
        found.append((stats.loss, stats.grad_norm, state_of(engine)))
    (loss, norm, state), (other_loss, other_norm, other_state) = found
    assert other_loss == pytest.approx(loss, rel=1e-13) and other_norm == pytest.approx(norm, rel=1e-13)
    assert worst(gradients_of(other_state), gradients_of(state)) <= 1e-12


# --- recompute -----------------------------------------------------------------------------------------------------


class Saved:
    """Bytes that autograd holds for the backward pass: the most at any time, parameters included alike in all modes."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> SimpleNamespace:
        size = tensor.numel() * tensor.itemsize
        self.now += size
        self.peak = max(self.peak, self.now)
        held = Held(tensor)
        finalize(held, self._drop, size)
        return held

    def _drop(self, size: int) -> None:
        self.now -= size


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_saves_fewer_bytes_and_changes_no_gradient(precision):
    model = replace(MODEL, num_layers=4, activation="swiglu").resolve()
    peaks, states, losses = {}, {}, {}
    for mode in ("none", "selective", "full"):
        engine = engine_of(model=model, precision=precision, recompute=mode)
        with Saved() as saved:
            stats = engine.train_step(batches(2, rows=2, tokens=32), NextToken(), 0.01)
        peaks[mode], states[mode], losses[mode] = saved.peak, state_of(engine), stats.loss
    assert 0 < peaks["full"] < peaks["selective"] < peaks["none"], peaks
    assert peaks["full"] < 0.5 * peaks["none"], peaks
    assert losses["none"] == losses["selective"] == losses["full"]
    assert equal(states["selective"], states["none"]) and equal(states["full"], states["none"])


# --- evaluation and masks ------------------------------------------------------------------------------------------


def evaluate_then_train(layout: Layout, seed: int) -> tuple[float, int, float]:
    mesh = Mesh.start(layout)
    engine, mine = engine_of(mesh, sp=layout.tp > 1), share(batches(4, seed=seed), mesh)
    before = state_of(engine)
    sums, counts = engine.evaluate(mine, NextToken())
    assert equal(state_of(engine), before), "evaluation changes nothing"
    return sums["loss"] / counts["loss"], counts["loss"], engine.train_step(mine, NextToken(), 0.1).loss


def reference_loss(seed: int) -> float:
    """The loss of all four microbatches by the oracle's independent decoder."""
    weights = {name: x for name, x in state_of(engine_of()).items() if not name.startswith("optim.")}
    whole = {key: torch.cat([batch[key] for batch in batches(4, seed=seed)]) for key in batches(1)[0]}
    return float(reference.masked_loss(asdict(MODEL), weights, whole))


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_evaluation_gives_the_training_loss_on_every_rank(layout):
    wanted = reference_loss(3)
    count = sum(int(batch["mask"].sum()) for batch in batches(4, seed=3))
    for held_out, seen, trained in run_ranks(layout.world, evaluate_then_train, layout, 3):
        assert held_out == trained == pytest.approx(wanted, rel=1e-12) and seen == count
    assert reference_loss(4) != pytest.approx(wanted, rel=1e-3)


def masked_rank(layout: Layout, all_masked: bool) -> tuple[float, float, bool]:
    mesh = Mesh.start(layout)
    engine, mine = engine_of(mesh), share(batches(4, seed=3), mesh)
    if mesh.data.rank == 1 or all_masked:
        for batch in mine:
            batch["mask"] = torch.zeros_like(batch["mask"])
    stats = engine.train_step(mine, NextToken(), 0.01)
    return stats.loss, stats.grad_norm, stats.skipped


def test_a_data_rank_without_a_token_that_counts():
    alone = engine_of().train_step(batches(4, seed=3)[:2], NextToken(), 0.01)
    for loss, norm, skipped in run_ranks(4, masked_rank, Layout(dp=2, pp=2), False):
        assert loss == pytest.approx(alone.loss, rel=1e-12) and norm == pytest.approx(alone.grad_norm, rel=1e-10)
        assert not skipped
    for loss, norm, skipped in run_ranks(2, masked_rank, Layout(dp=2), True):
        assert (loss, norm, skipped) == (0.0, 0.0, False), "nothing counts: no division by zero"


# --- gradients that are not finite ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned:
    """NextToken whose value is `value` times itself on this rank (NaN and infinity spoil its gradients)."""

    value: float
    needs: ClassVar[tuple[str, ...]] = ("log_prob",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return NextToken().counts(batch)

    def __call__(self, outputs: dict[str, Tensor], batch: Batch) -> Terms:
        return Terms({"loss": NextToken()(outputs, batch).losses["loss"] * self.value})


def poison_one_rank(layout: Layout, value: float, ignore: bool) -> tuple[list[bool], bool, bool]:
    """(skipped of three steps, weights and moments untouched by the poisoned one, end equals a run without it)."""
    mesh = Mesh.start(layout)
    poisoned = layout.world - 1  # in a pipeline the last stage is the only one that has a loss
    engine, quiet = engine_of(mesh), engine_of(mesh)
    if ignore:
        update = engine.optimizer.step
        engine.optimizer.step = lambda lr, skip: update(lr, torch.zeros_like(skip))
    first, second, third = (share(batches(4, seed=seed), mesh) for seed in range(3))
    skipped = [engine.train_step(first, NextToken(), 0.01).skipped]
    before = state_of(engine)
    skipped.append(engine.train_step(second, Poisoned(value if mesh.rank == poisoned else 1.0), 0.01).skipped)
    untouched = equal(state_of(engine), before)
    skipped.append(engine.train_step(third, NextToken(), 0.01).skipped)
    quiet.train_step(first, NextToken(), 0.01)
    quiet.train_step(third, NextToken(), 0.01)
    # A rank that owns nothing shows in the loss of all.
    same_loss = sums_of(engine, first) == sums_of(quiet, first)
    return skipped, untouched, same_loss and equal(state_of(engine), state_of(quiet))


def sums_of(engine: Engine, micros: list[Batch]) -> float:
    return engine.evaluate(micros, NextToken())[0]["loss"]


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(layout):
    for value in (math.nan, math.inf):
        for skipped, untouched, same in run_ranks(layout.world, poison_one_rank, layout, value, False):
            assert skipped == [False, True, False] and untouched and same


def test_updating_anyway_is_noticed():
    """The control: an engine that does not look at the norm spoils its weights."""
    results = run_ranks(2, poison_one_rank, Layout(dp=2), math.nan, True)
    assert not any(same for _, _, same in results)
    assert not all(untouched for _, untouched, _ in results)


def test_the_model_of_these_tests_has_what_they_rest_on():
    assert isinstance(MODEL, ModelConfig) and MODEL.tie_embeddings and MODEL.qk_norm and SEEN.betas[0] == 0
