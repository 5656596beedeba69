"""What policies of the tests meet between their turns: a game, tools, and those that misbehave."""

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
from megallm.training.replies import Limits, Replies
from megallm.training.reward_calls import environment_reward
from tests.training.rl import Words, trainer_of

FILE = Path(__file__)
TOOLS = (f"{FILE}:add",)
GAME = f"{FILE}:Guess"
LIMIT = 12


class Guess:
    """The digit that stands in the row, in two turns; a little luck, which the seed decides."""

    def __init__(self) -> None:
        self.turn = 0

    async def reset(self, states, **more):
        self.wanted = states["label"]
        return {"observation": states["observation"]}

    async def step(self, states, **more):
        import random

        self.turn += 1
        done = self.wanted in states["action_text"] or self.turn == 2
        return {"rewards": 1.0 * (self.wanted in states["action_text"]) + random.random() / 10,
                "scores": 0, "environment_feedback": "0+0=", "done": done,
                "extra_logs": {"turn": self.turn}}  # fmt: skip


class Board:
    """TRL's kind: methods are tools, and the reward is its own."""

    def reset(self, answer, **columns):
        self.total, self.answer = 0, int(answer)
        return "0+"

    def press(self, digit: int) -> int:
        """Adds a digit.

        Args:
            digit: from 0 to 9
        """
        self.total += digit
        return self.total

    def get_reward(self):
        return float(self.total == self.answer)


class Gym:
    def reset(self, seed=None):
        self.seed = seed
        return "+", {}

    def step(self, action):
        return "1", float(self.seed % 7), len(action) > 2, False, {}


def add(left: int, right: int) -> int:
    """Adds two numbers.

    Args:
        left: the first
        right: the second,
            which may be negative
    """
    return left + right


def hangs(left: int, right: int) -> int:
    import time

    time.sleep(60)
    return 0


def raises(left: int, right: int) -> int:
    raise ValueError("no sums today")


def junk(left: int, right: int) -> int:
    import os

    os._exit(3)


def killed(left: int, right: int) -> int:
    """Kills the trainer, once, in the middle of a call."""
    import os
    import signal

    marker = Path(os.environ["MARKER"])
    if marker.exists():
        marker.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return left + right


def _calls(text: str, name: str) -> list[dict[str, Any]]:
    """Any digit is a call: a model that has learned nothing makes some."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    return [{"name": name, "arguments": {"left": digits[0], "right": 1}}] if digits else []


def calls_add(text):
    return _calls(text, "add")


def calls_hangs(text):
    return _calls(text, "hangs")


def calls_raises(text):
    return _calls(text, "raises")


def calls_junk(text):
    return _calls(text, "junk")


def calls_killed(text):
    return _calls(text, "killed")


def calls_press(text):
    return [{"name": "press", "arguments": {"digit": int(letter)}} for letter in text if letter.isdigit()]


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
            writer = ReplyWriter(Letters(), None)
            replies = Replies(turns, environments, writer, parse, Limits(LIMIT, turns.most, seed=7))
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
