"""A tiny policy that answers sums, and what it is trained with: toy words, prompts, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megallm.base.config import replace
from megallm.data.chat.rows import PromptRow
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.rewards.samples import Completion
from megallm.training.grpo_trainer import Feeds, GrpoTrainer
from megallm.training.reward_calls import Scorer
from megallm.training.rl_config import GrpoConfig
from megallm.training.rollout import Codec, Rollouts
from tests.engine.tiny import engine_of

LETTERS = "0123456789+=. "
MODEL = ModelConfig(
    family="llama", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2,
    vocab_size=len(LETTERS), max_positions=64, init_std=0.1,
).resolve()  # fmt: skip
OPTIM = OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, clip=1.0, schedule="constant")


class Words:
    """One character a token; a full stop ends a text."""

    eod = LETTERS.index(".")
    vocab_size = len(LETTERS)

    def token_id(self, token):
        return None

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)


class Sums:
    """Sums of two one-digit numbers, in an order of their own."""

    def __init__(self, count: int, first: int = 1) -> None:
        self.count, self.first = count, first

    def examples(self, step: int) -> list[tuple[int, Any]]:
        rows = []
        for i in range((step - 1) * self.count, step * self.count):
            a, b = (i * 7) % 5, (i * 3 + i // 5) % 5
            ids = np.array(Words().encode(f"{a}+{b}="), np.int32)
            rows.append((i, PromptRow(ids, {"prompt": f"{a}+{b}=", "answer": str(a + b)})))
        return rows

    def state_after(self, step: int) -> dict[str, Any]:
        return {"read": step * self.count}


class Functions:
    """Right answers earn 1, digits a little."""

    names, weights = ["right", "digits"], [1.0, 0.1]

    def __init__(self) -> None:
        self.failures, self.extras, self.metrics = [], {}, {}

    def __call__(self, samples: Sequence[Completion], step: int = 0) -> list[list[float | None]]:
        said = [(each.completion, each.columns["answer"]) for each in samples]
        return [[float(a == b), float(a.isdigit())] for a, b in said]

    def close(self) -> None:
        pass


def config_of(layout: Layout, **changes: Any) -> GrpoConfig:
    values = {
        "sampling.group": 4, "sampling.max_new_tokens": 3, "train.global_batch": 16,
        "train.micro_batch": 4, "train.precision": "fp64", "train.steps": 8, "layout.tp": layout.tp,
        "layout.cp": layout.cp, "run.seed": 7, "optim": OPTIM,
    }  # fmt: skip
    return replace(GrpoConfig(), values | changes)


def learn(engine: Engine, steps: int, dp: int = 1, rank: int = 0) -> None:
    """Teach the beginning of it: sums, some of them right."""
    import torch

    for step in range(steps):
        rows = [row for _, row in Sums(16).examples(step + 1)]
        texts = [row.ids.tolist() + Words().encode(f"{row.columns['answer']}.") for row in rows]
        length = max(map(len, texts))
        tokens = torch.tensor([each + [0] * (length - len(each)) for each in texts])
        mask = torch.zeros(len(texts), length - 1, dtype=torch.bool)
        for i, each in enumerate(texts):
            mask[i, 3 : len(each) - 1] = True
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}
        batch["positions"] = torch.arange(length - 1).expand_as(mask)
        share = {name: x[rank::dp].contiguous() for name, x in batch.items()}
        engine.train_step([share], NextToken(), 5e-3)


def trainer_of(
    mesh: Mesh | None = None, engine: Engine | None = None, functions: Any = Functions,
    reference: Any = None, ledger: dict[str, Any] | None = None, **changes: Any,
) -> GrpoTrainer:  # fmt: skip
    """A trainer in float64 on sums; changes are dotted keys of its configuration."""
    mesh = mesh or Mesh.single()
    config = config_of(mesh.layout, **changes)
    engine = engine or engine_of(mesh, model=MODEL, optim=OPTIM, precision=config.train.precision)
    scorer = Scorer(mesh, functions)
    rollouts = Rollouts(engine, config.sampling, Codec.of(Words(), ()), scorer, config.run.seed)
    feeds = Feeds(Sums(config.prompts), lambda: Sums(10))
    return GrpoTrainer(config, rollouts, feeds, reference, ledger or {}, {})
