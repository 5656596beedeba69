"""Experts and further tokens in FP8: each expert a linear of its own, idle ones too. Layouts: the oracle's rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.ops.grouped_gemm import Runs
from megallm.ops.low_precision import RECIPES, Fp8Options
from megallm.optim.config import ZeroConfig
from megallm.oracle.compare import run_row
from megallm.oracle.table import row_named
from megallm.parallel.fp8 import HISTORY, Fp8Linear, Fp8Linears, fp8_grouped_linear, fp8_linear
from megallm.parallel.layout import Layout
from megallm.parallel.linear import WeightGradQueue, compute_weight_grads
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import batches, engine_of, equal, share, state_of
from tests.ranks import pool, run_ranks

WHOLE: dict[str, Any] = {"tokens": (), "in": (), "out": ()}
WIDE, NARROW = 160, 48  # in and out: blocks of 128 are ragged
SIZES = [[3, 5, 130], [0, 7, 0], [0, 0, 0]]
DELAYED = Fp8Options("delayed", history=3)
MODEL = ModelConfig(
    num_layers=2, hidden_size=24, ffn_hidden_size=40, num_heads=4, num_kv_heads=2, vocab_size=61, max_positions=64,
    init_std=0.1, moe={"num_experts": 4, "ffn_hidden_size": 12, "aux_coef": 0.0, "selection_bias": True},
).resolve()  # fmt: skip


def numbers(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw).mul_(torch.exp(torch.randn(rows, 1, generator=draw))).to(dtype)


def grouped(
    state: Fp8Linear, sizes: list[int], weight_grads: WeightGradQueue | None = None, loud: float = 1.0
) -> list[Tensor]:
    """Output and both gradients; the last expert's rows are `loud` times larger."""
    x, dy = numbers(sum(sizes), WIDE, 1), numbers(sum(sizes), NARROW, 2)
    x[sum(sizes[:-1]) :] *= loud
    weight = numbers(len(sizes) * NARROW, WIDE, 3).view(len(sizes), NARROW, WIDE)
    x.requires_grad_(), weight.requires_grad_()
    y = fp8_grouped_linear(x, weight, Runs.of(sizes, x.device), state, weight_grads)
    y.backward(dy)
    if weight_grads is not None:
        assert weight.grad is None, "put off"
        compute_weight_grads(weight_grads.take())
    return [y.detach(), x.grad, weight.grad]


def one_by_one(recipe: str, sizes: list[int]) -> list[Tensor]:
    """The same by a dense FP8 linear for each expert."""
    found: list[list[Tensor]] = [[], [], []]
    x, dy = numbers(sum(sizes), WIDE, 1), numbers(sum(sizes), NARROW, 2)
    weights = numbers(len(sizes) * NARROW, WIDE, 3).view(len(sizes), NARROW, WIDE)
    for rows, gradient, weight in zip(x.split(sizes), dy.split(sizes), weights, strict=True):
        rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        y = fp8_linear(rows, weight, None, Fp8Linear(Fp8Options(recipe), WHOLE, Mesh.single(), 0), None)
        y.backward(gradient)
        for place, value in zip(found, (y.detach(), rows.grad, weight.grad), strict=True):
            place.append(value)
    return [torch.cat(found[0]), torch.cat(found[1]), torch.stack(found[2])]


def state_for(recipe: str, experts: int = 3) -> Fp8Linear:
    return Fp8Linear(Fp8Options(recipe, history=3 if recipe == "delayed" else 16), WHOLE, Mesh.single(), experts)


# --- the grouped product -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_grads", [False, True], ids=["at once", "put off"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_expert_is_a_dense_linear_bit_for_bit(recipe, sizes, weight_grads):
    ours = grouped(state_for(recipe), sizes, WeightGradQueue() if weight_grads else None)
    for mine, theirs in zip(ours, one_by_one(recipe, sizes), strict=True):
        assert torch.equal(mine, theirs) and mine.isfinite().all()
    assert all(not ours[2][e].any() for e, size in enumerate(sizes) if not size)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_given_to_the_wrong_expert_is_noticed(recipe):
    ours, wrong = (grouped(state_for(recipe), sizes) for sizes in ([3, 5, 130], [4, 4, 130]))
    assert not torch.equal(ours[0][:8], wrong[0][:8]) and torch.equal(ours[0][8:], wrong[0][8:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_one_expert_gets_changes_no_bit_of_another(recipe):
    quiet, loud = grouped(state_for(recipe), [4, 4, 8]), grouped(state_for(recipe), [4, 4, 8], loud=1e6)
    assert torch.equal(quiet[0][:8], loud[0][:8]) and torch.equal(quiet[2][:2], loud[2][:2])
    assert not torch.equal(quiet[0][8:], loud[0][8:])


def test_one_scale_for_all_experts_would_be_noticed():
    """The control: the loud expert's scale leaves nothing of a quiet one's rows."""
    x = torch.cat((numbers(8, WIDE, 1), 1e6 * numbers(8, WIDE, 2)))
    state = Fp8Linear(Fp8Options("tensorwise"), WHOLE, Mesh.single(), 0)
    together = fp8_linear(x, numbers(NARROW, WIDE, 3), None, state, None)
    assert not together[:8].any()


# --- delayed scales of experts -------------------------------------------------------------------------------------


def after_an_update(state: Fp8Linear) -> None:
    Fp8Linears({"x": state}, Mesh.single()).commit()


def test_an_idle_expert_keeps_its_history_and_the_others_move():
    state = state_for("delayed")
    grouped(state, [4, 4, 8], loud=100.0)
    first = state.seen.clone()
    after_an_update(state)
    assert state.complete and torch.equal(state.history[..., 0], first) and len(set(first[:, 0].tolist())) == 3
    grouped(state, [5, 0, 8])
    assert state.seen[1].tolist() == [0.0, float(first[1, 1]), 0.0], "the weight is there all the same"
    after_an_update(state)
    moved = state.history[..., 1] > 0
    assert moved.tolist() == [[True, True, True], [False, True, False], [True, True, True]]
    assert torch.equal(state.history[1, :, 0], first[1])
    found = state.store("x", [torch.ones(2, WIDE)] * 3)
    for expert, stored in enumerate(found):
        assert float(stored.inverse) == pytest.approx(float(state.history[expert, 0].max()) / 448.0)


def test_an_expert_without_a_history_scales_itself_beside_those_that_have_one():
    state = state_for("delayed")
    grouped(state, [4, 0, 8])
    after_an_update(state)
    assert not state.complete
    first, second, _ = state.store("x", [torch.full((2, WIDE), 0.5)] * 3)
    assert float(second.inverse) == pytest.approx(0.5 / 448.0)
    assert float(first.inverse) == pytest.approx(float(state.history[0, 0, 0]) / 448.0) != float(second.inverse)


def test_what_is_not_finite_in_one_expert_is_entered_for_none_but_the_others():
    state = state_for("delayed")
    state.advance(torch.tensor([[1.0, 1.0, math.inf], [2.0, 2.0, 2.0], [math.nan, 3.0, 3.0]]))
    assert state.history[..., 0].tolist() == [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 3.0, 3.0]]


# --- in an engine --------------------------------------------------------------------------------------------------


def test_which_linears_are_in_fp8():
    """Routers, norms, gates and the head never are; bf16_first and bf16_last count layers, not further tokens."""
    moe = {"num_experts": 4, "ffn_hidden_size": 12, "shared_ffn_hidden_size": 8, "shared_gate": True, "first_dense": 2}
    model = ModelConfig(num_layers=4, hidden_size=24, ffn_hidden_size=40, num_heads=4, vocab_size=61, moe=moe,
                        mtp={"depth": 1}).resolve()  # fmt: skip
    engine = engine_of(model=model, precision="fp8", fp8=Fp8Options(bf16_first=1, bf16_last=1))
    attention = {"attention.q", "attention.kv", "attention.o"}
    experts = {f"moe.{part}.{name}" for part in ("experts", "shared") for name in ("gate_up", "down")}
    wanted = {f"layers.1.{name}.weight" for name in attention | {"mlp.gate_up", "mlp.down"}}
    wanted |= {f"layers.2.{name}.weight" for name in attention | experts}
    wanted |= {f"mtp.0.block.{name}.weight" for name in attention | experts} | {"mtp.0.projection.weight"}
    assert set(engine.model.fp8.linears) == wanted


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_what_bf16_learns_with_experts(recipe):
    def losses(**precision: Any) -> list[float]:
        engine = engine_of(model=MODEL, **precision)
        return [engine.train_step(batches(2, seed=7), NextToken(), 0.01).loss for _ in range(12)]

    plain, ours = losses(precision="bf16"), losses(precision="fp8", fp8=Fp8Options(recipe))
    assert ours[0] == pytest.approx(plain[0], abs=0.02) and ours != plain
    assert plain[-1] < plain[0] - 0.3, "there is something to learn"
    assert ours[-1] == pytest.approx(plain[-1], abs=0.1)


def train_idle(layout: Layout, recipe: str, stage: int) -> tuple[list[float], bool, dict[str, Tensor]]:
    """Norms of two steps with all tokens on expert 0 and then on all; whether weights are finite; histories."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, model=MODEL, precision="fp8", fp8=Fp8Options(recipe), zero=ZeroConfig(stage))
    norms = []
    for step, by in enumerate((100.0, 0.0)):
        for _, bias in engine.model.selection_biases():
            bias.zero_()
            bias[:2] = by
        norms.append(engine.train_step(share(batches(4, seed=step), mesh), NextToken(), 0.01).grad_norm)
    finite = all(bool(piece.tensor.isfinite().all()) for piece in engine.masters())
    return norms, finite, {name: h.clone() for name, h, _ in engine.model.fp8.histories() if ".experts." in name}


@pytest.mark.parametrize(("recipe", "stage"), [("delayed", 0), ("delayed", 3), ("rowwise", 2), ("blockwise", 0)])
def test_idle_experts_hang_no_rank_and_spoil_nothing(recipe, stage):
    """dp=2, tp=2, ep=2: in the first step no token goes to the experts of ep rank 1."""
    results = run_ranks(4, train_idle, Layout(dp=2, tp=2, ep=2), recipe, stage, timeout=60)
    for rank, (norms, finite, histories) in enumerate(results):
        assert finite and all(math.isfinite(norm) and norm > 0 for norm in norms)
        assert norms == results[0][0]
        for name, history in histories.items():
            entered = (history > 0).sum(-1)  # steps, by expert and operand
            assert history.isfinite().all() and (entered[:, 1] == 2).all()
            assert (entered[:, 0] == (1 if rank % 2 else 2)).all(), f"{name} of rank {rank}: {entered.tolist()}"
            assert torch.equal(history, results[rank % 2][2][name]), "the ranks that hold an expert agree"


def test_a_history_of_each_rank_for_itself_would_be_noticed():
    """dp=2 with all experts on both: nothing but the histories is reduced. Unbroken it is a row of the oracle."""
    verdict = run_row(pool(), row_named("fp8-moe-delayed-replicated"), frozenset({"fp8.expert_amax"}))
    assert verdict.problem is None and not verdict.passed


def test_recomputation_changes_no_bit():
    def state(recompute: str) -> dict[str, Tensor]:
        engine = engine_of(model=MODEL, precision="fp8", fp8=DELAYED, recompute=recompute)
        for step in range(3):
            engine.train_step(batches(2, seed=step), NextToken(), 0.01)
        return state_of(engine)

    plain = state("none")
    assert equal(state("full"), plain) and equal(state("selective"), plain)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def train_and_save(layout: Layout, root: str) -> dict[str, Tensor]:
    """What this rank holds of the experts' histories after two steps that it saved."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, model=MODEL, precision="fp32", fp8=DELAYED)
    for step in range(2):
        engine.train_step(share(batches(4, seed=step), mesh), NextToken(), 0.01)
    store.save(root, 2, list(engine.parts()), {"engine": engine.counters()}, mesh)
    return {name: h.clone() for name, h, shard in engine.model.fp8.histories() if shard.expert}


def test_histories_are_saved_by_expert_and_loaded_at_another_layout(tmp_path):
    results = run_ranks(4, train_and_save, Layout(dp=2, tp=2, ep=2), str(tmp_path))
    folder, _ = store.latest(tmp_path)
    engine = engine_of(model=MODEL, precision="fp32", fp8=DELAYED)
    with CheckpointReader(folder) as reader:
        name = "layers.1.moe.experts.down.weight"
        assert tuple(reader.info(f"{HISTORY}{name}")[0]) == (4, 3, 3)
        engine.load(reader)
    assert all(linear.complete for linear in engine.model.fp8.linears.values())
    loaded = {name: h for name, h, shard in engine.model.fp8.histories() if shard.expert}
    assert loaded.keys() == results[0].keys() and len(loaded) == 4
    for name, history in loaded.items():
        assert torch.equal(history, torch.cat((results[0][name], results[1][name])))
        assert not torch.equal(history[:2], history[2:])


def test_resume_takes_up_the_experts_histories_bit_for_bit(tmp_path):
    def steps(engine: Engine, first: int, last: int) -> dict[str, Tensor]:
        for step in range(first, last):
            engine.train_step(batches(1, seed=step), NextToken(), 0.01)
        return state_of(engine)

    straight, first, second, without = (engine_of(model=MODEL, precision="fp8", fp8=DELAYED) for _ in range(4))
    whole = steps(straight, 0, 4)
    steps(first, 0, 2)
    folder = store.save(tmp_path, 2, list(first.parts()), {"engine": first.counters()}, Mesh.single())
    with CheckpointReader(folder) as reader:
        second.load(reader)
        without.load(reader)
    for name, history, shard in without.model.fp8.histories():
        if shard.expert:
            history.zero_()
            without.model.fp8.linears[name].complete = False
    assert equal(steps(second, 2, 4), whole)
    assert not equal(steps(without, 2, 4), whole), "the control: the experts' histories matter"
