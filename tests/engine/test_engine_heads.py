"""Heads learn what they are for, through `Engine` alone, at a layout that splits everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megallm.data.masking import MaskRule
from megallm.data.objective import MLM, TokenMasker
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine, Loss
from megallm.losses.language import Accuracy, NextToken
from megallm.losses.reward import BradleyTerry
from megallm.losses.scores import Regression
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.ranks import run_ranks

TOKENS, VOCABULARY, CLASSES = 8, 20, 3
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 64, "vocab_size": VOCABULARY}
TASKS: dict[str, tuple[dict, Loss]] = {
    "classes": ({"family": "bert", "max_positions": 8, "head": "classification", "num_labels": CLASSES}, NextToken()),
    "regression": ({"family": "bert", "max_positions": 8, "head": "value", "pooler": True}, Regression()),
    "reward": ({"family": "llama", "head": "value"}, BradleyTerry()),
}
Batch = dict[str, Tensor]


def batch_of(task: str, seed: int, rows: int = 16) -> Batch:
    """Rows whose answer is told by one token somewhere among others: 0, 1 or 2.

    Classes and numbers are read at the first token, rewards at the last; of a pair the larger number is chosen.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CLASSES, VOCABULARY, (rows, TOKENS), generator=draw)
    answer = torch.randint(CLASSES, (rows,), generator=draw)
    if task == "reward":
        answer = torch.tensor([2, 0]).repeat(rows // 2) - torch.randint(
            2, (rows // 2,), generator=draw
        ).repeat_interleave(2)
        answer = answer.clamp(min=0)
    tokens[torch.arange(rows), torch.randint(1, TOKENS - 1, (rows,), generator=draw)] = answer
    mask = torch.zeros(rows, TOKENS, dtype=torch.bool)
    mask[:, -1 if task == "reward" else 0] = True
    whole = answer[:, None].expand(rows, TOKENS)
    return {
        "tokens": tokens, "labels": whole.contiguous(), "mask": mask, "targets": whole.to(torch.float32),
        "positions": torch.arange(TOKENS).expand(rows, TOKENS).contiguous(),
    }  # fmt: skip


def train(task: str, layout: Layout, sp: bool, steps: int) -> tuple[list[float], dict[str, float]]:
    """One rank: some steps; the losses, and what `evaluate` says of rows that were not trained on."""
    fields, loss = TASKS[task]
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    model = ModelConfig(**(SIZES | fields)).resolve()
    config = EngineConfig(model, LayoutConfig(sp=sp), optim=OptimConfig(weight_decay=0.0))
    engine = Engine.build(config, mesh)
    share = 16 // mesh.data.size

    def mine(batch: Batch) -> list[Batch]:
        return [{name: x[mesh.data.rank * share : (mesh.data.rank + 1) * share] for name, x in batch.items()}]

    losses = [engine.train_step(mine(batch_of(task, step)), loss, 3e-3).loss for step in range(steps)]
    sums, counts = engine.evaluate(mine(batch_of(task, 1000)), loss)
    found = {"loss": sums["loss"] / counts["loss"]}
    if task == "classes":
        sums, counts = engine.evaluate(mine(batch_of(task, 1000)), Accuracy())
        found["accuracy"] = sums["accuracy"] / counts["accuracy"]
    return losses, found


@pytest.mark.parametrize("task", TASKS)
def test_a_head_learns_its_task_and_the_layout_does_not_matter(task):
    losses, found = train(task, Layout(), False, 60)
    guess = {"classes": 1.1, "regression": 0.66, "reward": 0.69}[task]
    assert losses[0] > 0.7 * guess and found["loss"] < 0.3 * guess, (losses[0], found)
    if task == "classes":
        assert found["accuracy"] > 0.9
    _, early = train(task, Layout(), False, 4)
    for other, told in run_ranks(4, train, task, Layout(tp=2, dp=2), True, 4):
        assert other == pytest.approx(losses[:4], rel=1e-4)
        assert told == pytest.approx(early, rel=1e-3)


def test_the_example_of_the_page_runs(capsys):
    text = (Path(__file__).parents[2] / "docs/encoders.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/encoders.md", "exec"), {})
    loss, counts = capsys.readouterr().out.split(" ", 1)
    assert 0.1 < float(loss) < 3 and counts.strip() == "{'loss': 2}"


def test_an_encoder_finds_hidden_tokens_on_both_sides():
    """Four random tokens again and again: what is hidden stands four places before or after it too."""
    size, hide = VOCABULARY, TokenMasker(MLM, MaskRule(VOCABULARY, VOCABULARY, (VOCABULARY,)), seed=3)
    model = ModelConfig(
        family="bert", num_layers=2, hidden_size=64, num_heads=4, ffn_hidden_size=128, vocab_size=size + 1,
        max_positions=16,
    ).resolve()  # fmt: skip
    engine = Engine.build(EngineConfig(model=model, optim=OptimConfig(weight_decay=0.0)), Mesh.single())
    draw = np.random.RandomState(0)
    losses = []
    for step in range(250):
        rows = [hide(np.tile(draw.randint(0, size, 4), 4).astype(np.int64), step, row) for row in range(64)]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        batch["positions"] = torch.arange(16).expand(64, 16)
        losses.append(engine.train_step([batch], NextToken(), 2e-3 * min(1, step / 50)).loss)
    assert losses[0] > 2.9 > 0.3 > sum(losses[-20:]) / 20, losses[::25]
