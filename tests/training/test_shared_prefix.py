"""Rows in which answers share their prompt train the same as plain rows, at every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.data.shared_prefix import PrefixSharing, RowCost, Sized, causal, shared_row
from megallm.engine.engine import Engine
from megallm.losses.policy import policy_loss
from megallm.losses.scores import Value
from megallm.models.config import ModelConfig
from megallm.models.sections import MoeConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from megallm.training.responses import Response, ResponseRows
from megallm.training.shared_prefix import product_cost, sharing_of
from tests.engine.tiny import SEEN, config_of
from tests.ranks import run_ranks
from tests.training.rl import MODEL as TOY
from tests.training.rl import trainer_of

MODEL = ModelConfig(
    family="llama", num_layers=2, hidden_size=24, ffn_hidden_size=40, num_heads=4, num_kv_heads=2, vocab_size=31,
    max_positions=64, init_std=0.1,
).resolve()  # fmt: skip
MODELS: dict[str, ModelConfig] = {
    "dense": MODEL,
    "four": dataclasses.replace(MODEL, num_layers=4).resolve(),
    "window": dataclasses.replace(MODEL, sliding_window=5).resolve(),
    "learned": dataclasses.replace(MODEL, positions="learned").resolve(),
    "moe": dataclasses.replace(
        MODEL, moe=MoeConfig(num_experts=4, ffn_hidden_size=14, aux_coef=0.1, z_coef=0.01)
    ).resolve(),
    "value": dataclasses.replace(MODEL, head="value").resolve(),
}
ALWAYS = PrefixSharing(always=True)


def answers(step: int) -> list[Response]:
    """Groups of several sizes, of prompts down to one token."""
    draw = np.random.default_rng(step)
    made: list[Response] = []
    for group, (length, count) in enumerate(((9, 4), (1, 2), (5, 3), (12, 1), (7, 2))):
        prompt = draw.integers(0, 31, length).tolist()
        for _ in range(count):
            tokens = draw.integers(0, 31, draw.integers(1, 7)).tolist()
            old = (-3.4 + 0.1 * draw.standard_normal(len(tokens))).tolist()
            one = Response(len(made), group, step, prompt, tokens, old, "stop", 0)
            one.advantages = [float(draw.standard_normal())] * len(tokens)
            one.old, one.reference = old, (np.array(old) + 0.1).tolist()
            one.values, one.returns = (draw.standard_normal((2, len(tokens)))).tolist()
            made.append(one)
    return made


LOSSES = {
    "grpo": policy_loss("grpo", beta=0.1, entropy_coef=0.02, temperature=0.8),
    "gspo": policy_loss("gspo", low=0.3, high=0.4),
    "dapo": policy_loss("dapo"),
    "value": Value(0.2),
}


def trained(
    layout: Layout | None, model: str, loss: str, sharing: PrefixSharing | None, options: dict[str, Any]
) -> tuple[list[float], list[tuple[str, tuple[int, ...], Tensor]], list[list[float]]]:
    """Losses of three steps, the state after them in boxes, and what `scores` says of the answers."""
    mesh = Mesh.single() if layout is None else Mesh.start(layout)
    options = dict(options)
    peft = options.pop("peft", None)
    prepare = prepare_adapters(PeftConfig(**peft), MODELS[model]) if peft else None
    packing = options.pop("packing", False)
    engine = Engine.build(config_of(MODELS[model], SEEN, **options), mesh, prepare)
    grid = mesh.layout
    rows = ResponseRows(engine, 6, 2 * grid.cp * grid.tp, packing, torch.float64, sharing)
    names = {"targets": "returns", "old_values": "values"} if loss == "value" else None
    said = []
    for step in range(3):
        batches = rows.batches(answers(step), names)
        assert all(("prefix_of" in batch) == (sharing is not None) for batch in batches)
        said.append(engine.train_step(batches, LOSSES[loss], 1e-2).loss)
    score = engine.values if loss == "value" else engine.log_probs
    scored = rows.scores(answers(3), score)
    return said, [(part.name, tuple(part.offset), part.tensor.clone()) for part in engine.parts()], scored


def gap(found: Any, said: list[float], state: dict[str, Tensor], scored: list[list[float]]) -> float:
    """The largest difference, beside the largest number."""
    worst = float(np.abs(np.array(found[0]) / said - 1).max())
    for name, offset, tensor in found[1]:
        whole = state[name]
        part = whole[tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))]
        worst = max(worst, float((part - tensor).abs().max() / whole.abs().max().clamp(min=1e-30)))
    pairs = zip(found[2], scored, strict=True)
    return max(worst, max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs))


PLAIN: dict[tuple[str, str, str], Any] = {}


def plain(model: str, loss: str, options: dict[str, Any]) -> Any:
    """The same in plain rows on one process."""
    peft = {key: value for key, value in options.items() if key == "peft"}
    key = model, loss, str(peft)
    if key not in PLAIN:
        said, parts, scored = trained(None, model, loss, None, peft)
        PLAIN[key] = said, {name: tensor for name, _, tensor in parts}, scored
    return PLAIN[key]


LORA = {"peft": {"method": "lora", "dim": 3, "alpha": 5.0}}
CASES: dict[str, tuple[Layout | None, str, str, dict[str, Any]]] = {
    "alone": (None, "dense", "grpo", {}),
    "gspo": (None, "dense", "gspo", {}),
    "value": (None, "value", "value", {}),
    "window": (None, "window", "dapo", {}),
    "learned positions": (None, "learned", "grpo", {}),
    "lora": (None, "dense", "grpo", LORA),
    "prefix": (None, "dense", "grpo", {"peft": {"method": "prefix", "virtual_tokens": 3, "hidden": 5}}),
    "prompt": (None, "dense", "grpo", {"peft": {"method": "prompt", "virtual_tokens": 3, "hidden": 5}}),
    "experts": (None, "moe", "grpo", {}),
    "recompute": (None, "dense", "dapo", {"recompute": "full"}),
    "tp4": (Layout(tp=4), "dense", "grpo", {}),
    "tp2 sp": (Layout(tp=2), "dense", "gspo", {"sp": True}),
    "cp2 ring": (Layout(cp=2), "dense", "gspo", {}),
    "cp2 ring window": (Layout(cp=2), "window", "dapo", {}),
    "cp2 ulysses": (Layout(cp=2), "dense", "grpo", {"cp_kind": "ulysses"}),
    "cp2 all-gather prompt": (Layout(cp=2), "dense", "grpo", {
        "cp_kind": "allgather", "peft": {"method": "prompt", "virtual_tokens": 3, "hidden": 5}}),
    "cp2 tp2 sp lora": (Layout(cp=2, tp=2), "dense", "grpo", {"sp": True} | LORA),
    "interleaved": (Layout(pp=2), "four", "grpo", {"schedule": "interleaved", "chunks": 2}),
    "zb-v": (Layout(pp=2), "four", "dapo", {"schedule": "zb-v", "chunks": 2, "recompute": "full"}),
    "dp2 zero3": (Layout(dp=2), "dense", "grpo", {"zero": 3, "recompute": "full"}),
    "dp2 value": (Layout(dp=2), "value", "value", {"zero": 1}),
    "ep2": (Layout(dp=2, ep=2), "moe", "grpo", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_as_plain_rows_train(name: str) -> None:
    layout, model, loss, options = CASES[name]
    want = plain(model, loss, options)
    if layout is None:
        results = [trained(None, model, loss, ALWAYS, options)]
    else:
        axes = {a: getattr(layout, a) for a in ("pp", "cp", "tp", "ep", "dp") if getattr(layout, a) > 1}
        results = run_ranks(layout.world, trained, layout, model, loss, ALWAYS, options)
        assert axes
    for found in results:
        assert gap(found, *want) < 1e-9


def test_answers_that_see_each_other_or_stand_elsewhere_are_noticed() -> None:
    """Negative controls of the comparison above."""
    want = plain("dense", "grpo", {})
    engine = Engine.build(config_of(MODEL, SEEN), Mesh.single())
    rows = ResponseRows(engine, 6, 2, False, torch.float64, ALWAYS)
    (batch, *_), (right, *_) = rows.batches(answers(0)), rows.batches(answers(0))
    before = batch["prefix_of"]
    batch["prefix_of"] = torch.where(before >= 0, torch.arange(len(before), dtype=torch.int32) - 1, before)
    moved = right | {"positions": right["positions"] + (right["mask"] & (right["positions"] > 8))}
    scored = [engine.log_probs([each])[0] for each in (right, batch, moved)]
    assert all((other - scored[0]).abs().max() > 1e-5 for other in scored[1:])
    assert np.isfinite(want[0]).all()


RUNS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "two updates": (Layout(), {"rl.updates": 2, "rl.kl.loss": 0.1, "rl.algorithm": "dapo"}),
    "recomputed, dp2": (Layout(dp=2), {"rl.recompute": True, "rl.algorithm": "gspo"}),
}


def run(layout: Layout, sharing: str, options: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """Losses and norms of two steps of GRPO, and what was saved."""
    mesh = Mesh.single() if layout.world == 1 else Mesh.start(layout)
    other = Engine.build(config_of(TOY), mesh)
    given = {"train.micro_batch": 8, "rl.shared_prefix": sharing} | options
    trainer = trainer_of(mesh, reference=lambda: nullcontext(other), **given)
    reports = [trainer.step(step) for step in (1, 2)]
    numbers = [[one.losses["train/loss"], one.stats.grad_norm, one.metrics["entropy"]] for one in reports]
    return numbers, [one.metrics["perf/shared_prefix_saving"] for one in reports]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(name: str) -> None:
    layout, options = RUNS[name]
    plain_numbers, nothing = run(Layout(), "off", options)
    results = [run(layout, "on", options)] if layout.world == 1 else run_ranks(layout.world, run, layout, "on", options)
    for numbers, saved in results:
        np.testing.assert_allclose(numbers, plain_numbers, rtol=1e-9, atol=1e-12)
        assert min(saved) > 0.1 and nothing == [0.0, 0.0]


# The plan


def test_a_row_says_where_everything_stands() -> None:
    row = shared_row([Sized(9, 4, "a"), Sized(6, 4, "a"), Sized(5, 0, "b"), Sized(5, 0, "b"), Sized(7, 6, "c")])
    assert row.ends == (0, 4, 9, 11, 16, 21, 28) and row.prefix_of == (-1, 0, 0, -1, -1, -1)
    assert [tuple(one) for one in row.places] == [(4, 4), (9, 4), (11, 0), (16, 0), (21, 0)]
    assert row.cost == RowCost(28, causal(4) + causal(5) + 20 + causal(2) + 8 + 2 * causal(5) + causal(7))
    made = row.of_documents(30)
    assert made["positions"][0].tolist() == [
        *range(4), *range(4, 9), *range(4, 6), *range(5), *range(5), *range(7), 0, 0
    ]  # fmt: skip
    assert made["cu_seqlens"].tolist()[-2:] == [28, 30] and made["prefix_of"].tolist() == [-1, 0, 0, -1, -1, -1, -1]
    assert shared_row([]).of_documents(4)["cu_seqlens"].tolist() == [0, 4]


def drawn(prompt: int, sizes: Sequence[int]) -> list[Response]:
    return [Response(i, 0, 1, [1] * prompt, [2] * n, [0.0] * n, "stop", 0) for i, n in enumerate(sizes)]


@pytest.mark.parametrize(("packing", "sharing"), [(False, None), (True, None), (False, ALWAYS)])
def test_padding_needs_no_position_that_no_answer_has(packing: bool, sharing: PrefixSharing | None) -> None:
    """Learned positions end with the longest prompt and answer; rows are longer."""
    model = dataclasses.replace(MODELS["learned"], max_positions=11).resolve()
    engine = Engine.build(config_of(model, SEEN), Mesh.single())
    rows = ResponseRows(engine, 4, 8, packing, torch.float64, sharing)
    found = drawn(9, [3] * 5)
    batches = rows.batches(found)
    assert [int(batch["positions"].max()) for batch in batches] == [10, 10]
    assert {batch["tokens"].shape[1] for batch in batches} <= {16, 24, 48}
    alone = [rows.scores([one], engine.log_probs)[0] for one in found]
    np.testing.assert_allclose(rows.scores(found, engine.log_probs), alone, rtol=1e-12)


def test_auto_shares_where_it_is_cheaper() -> None:
    engine = Engine.build(config_of(MODEL, SEEN), Mesh.single())
    auto = sharing_of("auto", MODEL, "rl.shared_prefix")
    rows = ResponseRows(engine, 4, 1, True, torch.float64, auto)
    shape = rows.shape(drawn(50, [10] * 4))
    assert shape.shared and shape.length == 49 + 40 and shape.saved == pytest.approx(1 - 89 / 236)
    assert not rows.shape(drawn(50, [200])).shared, "a prompt with one answer"
    assert not rows.shape(drawn(1, [10] * 4)).shared, "nothing to share"
    uneven = drawn(3, [9] * 4) + [dataclasses.replace(one, prompt=[one.id + 3]) for one in drawn(1, [13] * 4)]
    assert not rows.shape(uneven).shared, "another microbatch is as long, so that nothing is saved"
    always = ResponseRows(engine, 4, 1, True, torch.float64, ALWAYS)
    assert always.shape(uneven).shared
    padded = ResponseRows(engine, 4, 1, False, torch.float64, auto)
    assert padded.shape(drawn(3, [2, 40])).shared


def test_models_that_cannot_share_say_why() -> None:
    capacity = dataclasses.replace(MODELS["moe"], moe=MoeConfig(num_experts=4, capacity=1.5)).resolve()
    assert sharing_of("off", MODEL, "x") is None and sharing_of("auto", capacity, "x") is None
    with pytest.raises(UsageError, match="rl.shared_prefix is on, but model.moe.capacity counts"):
        sharing_of("on", capacity, "rl.shared_prefix")
    assert 0 < product_cost(MODEL) < 1
