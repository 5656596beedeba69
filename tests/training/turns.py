"""Trainers whose policies meet the tools and games of `games` between their turns."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megallm.data.chat.replies import ReplyWriter
from megallm.parallel.mesh import Mesh
from megallm.rewards.config import TurnsConfig
from megallm.rewards.episodes import Environments
from megallm.rewards.tools import parser_of
from megallm.training.replies import Replies, TurnLimits
from megallm.training.reward_calls import environment_reward
from tests.training.rl import Words, trainer_of

FILE = Path(__file__).with_name("games.py")
TOOLS = (f"{FILE}:add",)
GAME = f"{FILE}:Guess"
LIMIT = 12


class Letters(Words):
    """Letters that a tool may say, as ids."""

    def encode(self, text, special=False):
        return super().encode("".join(each for each in text if each in "0123456789+=. ")) or [13]


def game(**changes: Any) -> TurnsConfig:
    return TurnsConfig(environment=GAME, tokens=3, workers=1, **changes)


def tools(name: str = "add", **changes: Any) -> TurnsConfig:
    return TurnsConfig(
        **{"tools": (f"{FILE}:{name}",), "calls": f"{FILE}:calls_{name}", "reply": "={result}+", "tokens": 5,
           "workers": 1, "most": 3} | changes
    )  # fmt: skip


@contextmanager
def playing(turns: TurnsConfig, mesh: Mesh | None = None, engine: Any = None, **options: Any):
    """A trainer whose answers have turns; its rewards are those of sums and of the environment."""
    mesh = mesh or Mesh.single()
    options = {"sampling.max_new_tokens": LIMIT, "rl.algorithm": "dapo"} | options
    trainer = trainer_of(mesh, engine, **options)
    with Environments(turns) if mesh.rank == 0 else _nothing() as environments:
        replies = None
        if environments is not None:
            parse = parser_of(turns.calls, "")
            limits = TurnLimits(options["sampling.max_new_tokens"], turns.most, seed=7)
            writer = ReplyWriter(Letters(), None)
            replies = Replies(turns, environments, writer, parse, limits)
        trainer.rollouts.let_reply(replies, turns.tokens)
        if turns.environment:
            further = environment_reward("game", turns.weight)
            scorer = trainer.rollouts.scorer
            scorer.further.append(further)
            scorer.names.append("game")
            scorer.weights.append(turns.weight)
        kept: list[Any] = []
        trainer.feeds = dataclasses.replace(
            trainer.feeds, tell=lambda step, drawn, rewards: kept.append((drawn, list(rewards)))
        )
        yield trainer, kept


@contextmanager
def _nothing():
    yield None


def told(kept: list[Any]) -> list[Any]:
    """What was sampled and earned, as plain data."""
    return [
        [[one.id, one.tokens, one.mask, one.reason] for one in drawn.answers] + [rewards, drawn.extras]
        for drawn, rewards in kept
    ]


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
