"""fp16: the loss scale, and an overflow on one rank that every rank skips."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megallm.base.errors import Diverged
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.ops.low_precision import LossScaleOptions
from megallm.optim.config import ZeroConfig
from megallm.optim.scaler import LARGEST, LossScaler
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import MODEL, batches, engine_of, equal, gradients_of, share, state_of, worst
from tests.ranks import run_ranks

CPU = torch.device("cpu")
FULL = torch.tensor(False)  # a step that had gradients
OPTIONS = LossScaleOptions(initial=1024.0, growth_steps=2, minimum=1.0)
LAYOUTS = {
    "dp2": (Layout(dp=2), 0),
    "tp2": (Layout(tp=2), 0),
    "pp2": (Layout(pp=2), 0),
    "zero2": (Layout(dp=2), 2),
    "zero3": (Layout(dp=2), 3),
}


def walk(options: LossScaleOptions, finite: list[bool]) -> list[float]:
    """The scale of each step, and the one after the last."""
    scaler = LossScaler(options, CPU)
    return [float(scaler.advance(torch.tensor(good), FULL)) for good in finite] + [float(scaler.scale)]


def test_the_scale_halves_at_an_overflow_and_doubles_after_steps_without():
    assert walk(OPTIONS, [True, True, True, False, True, True]) == [1024, 1024, 2048, 2048, 1024, 1024, 2048]
    assert walk(OPTIONS, [True, False, True, True]) == [1024, 1024, 512, 512, 1024], (
        "an overflow starts the count again"
    )
    assert walk(LossScaleOptions(LARGEST, 1), [True, True])[-1] == LARGEST


def test_overflows_in_a_row_at_the_minimum_are_an_error():
    bad, good = torch.tensor(False), torch.tensor(True)
    scaler = LossScaler(LossScaleOptions(initial=2.0, minimum=1.0, overflows=2), CPU)
    for finite in (bad, bad, good, bad):  # one halving; one overflow at the minimum; none; one again
        scaler.advance(finite, FULL)
        scaler.check()
        assert scaler.scale >= 1
    again = LossScaler(LossScaleOptions(initial=2.0, minimum=1.0, overflows=2), CPU)
    again.restore(scaler.counters())
    again.advance(bad, FULL)
    with pytest.raises(Diverged, match=r"train.loss_scale.minimum 1, .* 2 times in a row there"):
        again.check()


def half(mesh: Mesh | None = None, **changes: object) -> Engine:
    return engine_of(mesh, precision="fp16", loss_scale=OPTIONS, **changes)


def test_gradients_are_those_of_fp32_and_do_not_depend_on_the_scale():
    micros, found = batches(2), []
    for scale in (1024.0, 4096.0):
        engine = engine_of(precision="fp16", loss_scale=LossScaleOptions(initial=scale))
        stats = engine.train_step(micros, NextToken(), 0.0)
        found.append((stats.grad_norm, gradients_of(state_of(engine))))
        assert stats.loss_scale == scale and not stats.skipped
    engine = engine_of(precision="fp32")
    stats = engine.train_step(micros, NextToken(), 0.0)
    assert worst(found[0][1], gradients_of(state_of(engine))) < 0.02
    assert found[0][0] == pytest.approx(stats.grad_norm, rel=5e-3)
    assert found[1][0] == pytest.approx(found[0][0], rel=5e-3), "unscaled before the norm is reported"


def inject(engine: Engine, rank: int) -> list[Tensor]:
    """On one rank put an infinity into the gradient of one weight; returns the hook's handle."""
    if engine.mesh.rank != rank:
        return []
    name, param = next((n, p) for n, p in engine.parameters.params.items() if p.dim() > 1)
    return [param.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf))]


def held(engine: Engine) -> list[Tensor]:
    """Copies of all that this rank holds: master weights, weights, and the optimizer's state."""
    flat = [x for bucket in engine.parameters.flat for x in (bucket.master, bucket.weights)]
    return [x.clone() for x in flat + [x for state in engine.optimizer.states.values() for x in state.values()]]


def overflow_on_one_rank(layout: Layout, stage: int) -> list[tuple]:
    """(skipped, scale, weights before == after) of four steps; the second one overflows on rank 1."""
    mesh = Mesh.start(layout)
    engine = half(mesh, zero=ZeroConfig(stage=stage))
    rows = []
    for step in range(4):
        before = held(engine)
        handles = inject(engine, 1) if step == 1 else []
        stats = engine.train_step(share(batches(2, seed=step), mesh), NextToken(), 0.01)
        for handle in handles:
            handle.remove()
        rows.append(
            (
                stats.skipped,
                stats.loss_scale,
                all(map(torch.equal, before, held(engine))),
                math.isfinite(stats.grad_norm),
            )
        )
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_overflow_on_one_rank_is_skipped_on_all_and_the_scale_recovers(name):
    wanted = [
        (False, 1024.0, False, True),
        (True, 1024.0, True, False),
        (False, 512.0, False, True),
        (False, 512.0, False, True),
    ]
    for rows in run_ranks(2, overflow_on_one_rank, *LAYOUTS[name]):
        assert rows == wanted
    layout, stage = LAYOUTS[name]
    if name == "dp2":
        after = run_ranks(2, final_scale, layout)
        assert after == [1024.0, 1024.0], "two good steps later it has doubled"


def final_scale(layout: Layout) -> float:
    mesh = Mesh.start(layout)
    engine = half(mesh)
    for step in range(3):
        handles = inject(engine, 1) if step == 0 else []
        engine.train_step(share(batches(2, seed=step), mesh), NextToken(), 0.01)
        for handle in handles:
            handle.remove()
    return float(engine.scaler.scale)


def skip_alone(layout: Layout) -> list[bool]:
    """The control: a rank that decides by its own gradients does not agree with the others."""
    mesh = Mesh.start(layout, "cpu", frozenset(("clip.norm",)))
    engine = half(mesh)
    inject(engine, 1)
    return [engine.train_step(share(batches(2), mesh), NextToken(), 0.01).skipped]


def test_without_the_global_norm_ranks_disagree():
    assert run_ranks(2, skip_alone, Layout(tp=2)) == [[False], [True]]


def test_resume_takes_up_the_scale_bit_for_bit(tmp_path):
    def steps(engine: Engine, numbers: range) -> None:
        for step in numbers:
            engine.train_step(batches(1, seed=step), NextToken(), 0.01)

    straight = half()
    steps(straight, range(5))
    first = half()
    steps(first, range(3))
    meta = {"engine": first.counters()}
    assert meta["engine"]["loss_scale"] == 2048.0 and meta["engine"]["loss_scale_held"] == 1
    folder = store.save(tmp_path, 3, list(first.parts()), meta, Mesh.single())
    second = half()
    with CheckpointReader(folder) as reader:
        second.load(reader)
    steps(second, range(3, 5))
    assert equal(state_of(second), state_of(straight)) and second.counters() == straight.counters()


def router_gradients(initial: float, leave_out: bool = False) -> tuple[dict[str, Tensor], float]:
    """Gradients of a model with experts whose balancing losses enter beside the loss, in fp16."""
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "aux_coef": 0.1, "z_coef": 0.01}
    options = LossScaleOptions(initial=initial)
    engine = engine_of(model=replace(MODEL, moe=moe).resolve(), precision="fp16", loss_scale=options)
    if leave_out:
        begin = engine.model.routers.begin
        engine.model.routers.begin = lambda batches, scale: begin(batches, 1.0)
    stats = engine.train_step(batches(2), NextToken(), 0.0)
    return gradients_of(state_of(engine)), stats.grad_norm


def test_balancing_losses_of_experts_are_scaled_too():
    (small, norm), (large, other) = router_gradients(256.0), router_gradients(2048.0)
    assert other == pytest.approx(norm, rel=1e-4) and worst(small, large) < 0.01
    wrong, _ = router_gradients(2048.0, leave_out=True)
    routers = [name for name in small if "router" in name]
    assert routers and all(worst({"r": wrong[n]}, {"r": large[n]}) > 0.02 for n in routers), "the control"
