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
from megallm.data.shared_prefix import Cost, Sharing, Sized, causal, lay_out
from megallm.losses.policy import policy_loss
from megallm.losses.scores import Value
from megallm.models.config import ModelConfig
from megallm.models.sections import MoeConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from megallm.engine.engine import Engine
from megallm.training.responses import Response, ResponseRows
from megallm.training.shared_prefix import product_cost, sharing_of
from tests.engine.tiny import SEEN, config_of, state_of
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
ALWAYS = Sharing(always=True)


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
    layout: Layout | None, model: str, loss: str, sharing: Sharing | None, options: dict[str, Any]
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
