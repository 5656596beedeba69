"""FP8 linears in an engine: caches, histories, layouts, checkpoints. The oracle's `fp8` rows have current scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.ops.low_precision import RECIPES, Fp8Options
from megallm.optim.config import ZeroConfig
from megallm.parallel.fp8 import Fp8Linear
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import MODEL, batches, engine_of, equal, share, state_of, worst
from tests.ranks import run_ranks

DELAYED = Fp8Options("delayed", history=3)
FOUR_KV = replace(MODEL, num_kv_heads=4)  # tp=2 holds whole kv heads
WIDE = ModelConfig(
    family="llama", num_layers=1, hidden_size=256, ffn_hidden_size=256, num_heads=4, num_kv_heads=4, head_size=64,
    vocab_size=61, max_positions=64, init_std=0.1,
).resolve()  # fmt: skip


def fp8_engine(recipe: str, mesh: Mesh | None = None, precision: str = "fp8", **changes: Any) -> Engine:
    return engine_of(mesh, precision=precision, fp8=Fp8Options(recipe), **changes)


def losses(engine: Engine, steps: int, lr: float = 0.01) -> list[float]:
    return [engine.train_step(batches(2, seed=7), NextToken(), lr).loss for _ in range(steps)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_what_bf16_learns(recipe):
    plain, ours = losses(engine_of(precision="bf16"), 12), losses(fp8_engine(recipe), 12)
    assert ours[0] == pytest.approx(plain[0], abs=0.02) and ours != plain
    assert plain[-1] < plain[0] - 0.3, "there is something to learn"
    assert ours[-1] == pytest.approx(plain[-1], abs=0.1)


def test_first_and_last_layers_stay_in_bf16_by_option():
    model = replace(MODEL, num_layers=4)

    def layers(options: Fp8Options) -> set[str]:
        return {name.split(".")[1] for name in engine_of(model=model, precision="fp8", fp8=options).model.fp8.linears}

    assert layers(Fp8Options()) == {"0", "1", "2", "3"}
    assert layers(Fp8Options(bf16_first=1, bf16_last=2)) == {"1"}
    names = set(engine_of(model=model, precision="fp8", fp8=Fp8Options(bf16_first=3)).model.fp8.linears)
    assert names == {f"layers.3.{n}.weight" for n in ("attention.q", "attention.kv", "attention.o")} | {
        "layers.3.mlp.gate_up.weight",
        "layers.3.mlp.down.weight",
    }


# --- the weights' cache --------------------------------------------------------------------------------------------


def count_stores(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = Fp8Linear.store

    def store_and_note(self: Fp8Linear, name: str, *args: Any, **rest: Any) -> Any:
        seen.append(name)
        return original(self, name, *args, **rest)

    monkeypatch.setattr(Fp8Linear, "store", store_and_note)
    return seen


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_are_stored_once_a_step_and_never_kept_under_zero_3(stage, monkeypatch):
    engine = fp8_engine("tensorwise", zero=ZeroConfig(stage=stage))
    seen = count_stores(engine, monkeypatch)
    engine.train_step(batches(3), NextToken(), 0.01)
    linears = len(engine.model.fp8.linears)
    assert seen.count("weight") == 2 * linears * (3 if stage == 3 else 1), "once for each direction"
    assert not any(linear.weight for linear in engine.model.fp8.linears.values()), "the commit forgets them"


def test_a_cache_that_outlives_an_update_is_noticed(monkeypatch):
    right = losses(fp8_engine("tensorwise"), 4, lr=0.05)
    monkeypatch.setattr(Fp8Linear, "forget", lambda self: None)
    stale = losses(fp8_engine("tensorwise"), 4, lr=0.05)
    assert stale[0] == right[0] and stale[1:] != right[1:]


# --- delayed scales ------------------------------------------------------------------------------------------------


def test_history_holds_steps_and_its_largest_gives_the_scale():
    engine = engine_of(precision="fp8", fp8=DELAYED)
    linear = engine.model.fp8.linears["layers.0.mlp.down.weight"]
    assert not linear.complete
    seen = []
    for step in range(4):
        engine.train_step(batches(2, seed=step), NextToken(), 0.01)
        seen.append(linear.history[:, 0].clone())
    assert torch.equal(linear.history, torch.stack(seen[:0:-1], 1)), "newest first, the oldest gone"
    assert (linear.history > 0).all() and linear.complete
    (used,) = linear.store("x", [torch.full((2, 40), 0.01)])
    assert float(used.inverse) == pytest.approx(float(linear.history[0].max()) / 448.0)


def test_evaluation_and_numbers_that_are_not_finite_leave_the_history_alone():
    engine = engine_of(precision="fp8", fp8=DELAYED)
    engine.train_step(batches(1), NextToken(), 0.01)
    linear = engine.model.fp8.linears["layers.0.mlp.down.weight"]
    before = linear.history.clone()
    engine.evaluate(batches(1, seed=3), NextToken())
    assert not linear.seen[[0, 2]].any(), "a forward pass without a backward pass is no step"
    linear.advance(torch.tensor([float("inf"), float("nan"), 0.0]))
    assert torch.equal(linear.history, before)


def test_gradients_that_no_step_has_entered_scale_themselves():
    """After a first step without labels there is a history of inputs and weights, and none of gradients."""
    engines = [engine_of(precision="fp8", fp8=DELAYED) for _ in range(2)]
    nothing = [batch | {"mask": torch.zeros_like(batch["mask"])} for batch in batches(1)]
    engines[1].train_step(nothing, NextToken(), 0.0)
    linear = engines[1].model.fp8.linears["layers.0.mlp.down.weight"]
    assert linear.history[:2, 0].all() and not linear.history[2].any() and not linear.complete
    fresh, later = ([engine.train_step(batches(1), NextToken(), 0.0).grad_norm, engine] for engine in engines)
    assert later[0] == fresh[0]
    for ours, theirs in zip(later[1].gradients(), fresh[1].gradients(), strict=True):
        assert torch.equal(ours.tensor, theirs.tensor), ours.name


def history_of(layout: Layout, micros: int, recompute: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """(losses, histories, state) after three steps in fp32 around FP8 linears."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = engine_of(mesh, model=FOUR_KV, precision="fp32", fp8=DELAYED, recompute=recompute)
    found = [engine.train_step(share(batches(micros, seed=step), mesh), NextToken(), 0.01).loss for step in range(3)]
    return found, {n: h.clone() for n, h, _ in engine.model.fp8.histories()}, state_of(engine)


@pytest.mark.parametrize(
    ("layout", "recompute"), [(Layout(tp=2), "none"), (Layout(dp=2), "none"), (Layout(), "full")], ids=str
)
def test_delayed_scales_are_the_same_at_any_layout_and_with_recomputation(layout, recompute):
    loss, history, _ = history_of(Layout(), 2, "none")
    for other_loss, other, _ in run_ranks(layout.world, history_of, layout, 2, recompute):
        assert other_loss == pytest.approx(loss, rel=1e-4)
        for name, values in history.items():
            torch.testing.assert_close(other[name], values, rtol=0.05, atol=1e-6)
            torch.testing.assert_close(other[name][:, -1], values[:, -1], rtol=2e-5, atol=1e-7)  # of the first step


def test_resume_takes_up_histories_bit_for_bit(tmp_path):
    def steps(engine: Engine, numbers: range) -> None:
        for step in numbers:
            engine.train_step(batches(1, seed=step), NextToken(), 0.01)

    straight, first = (engine_of(precision="fp8", fp8=DELAYED) for _ in range(2))
    steps(straight, range(5))
    steps(first, range(3))
    folder = store.save(tmp_path, 3, list(first.parts()), {"engine": first.counters()}, Mesh.single())
    second, without = (engine_of(precision="fp8", fp8=DELAYED) for _ in range(2))
    with CheckpointReader(folder) as reader:
        second.load(reader)
        without.load(reader)
    for linear in without.model.fp8.linears.values():
        linear.history.zero_()
        linear.complete = False
    steps(second, range(3, 5))
    steps(without, range(3, 5))
    assert equal(state_of(second), state_of(straight))
    assert not equal(state_of(without), state_of(straight)), "the control: histories matter"


# --- blocks --------------------------------------------------------------------------------------------------------


def blockwise(layout: Layout) -> dict[str, Tensor]:
    """State after one step in fp32 around blockwise linears whose shards are whole blocks."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = engine_of(mesh, model=WIDE, precision="fp32", fp8=Fp8Options("blockwise"))
    engine.train_step(batches(1, rows=2, tokens=64), NextToken(), 0.01)
    return {f"{piece.name} {piece.box}": piece.tensor.clone() for piece in engine.gradients()} | {
        "": torch.tensor([float(engine.parameters.squared_norm())])
    }


def test_blocks_that_shards_do_not_cut_give_the_same_numbers():
    whole = blockwise(Layout())[""]
    for found in run_ranks(2, blockwise, Layout(tp=2)):
        torch.testing.assert_close(found[""], whole, rtol=1e-4, atol=0)
    assert worst({"norm": whole * 1.01}, {"norm": whole}) > 1e-4
