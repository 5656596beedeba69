"""What policies of the tests meet between their turns: a game, tools, and those that misbehave. No torch: worker
processes import it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any


class Guess:
    """The digit that stands in the row, in two turns; a little luck, which the seed decides."""

    def __init__(self) -> None:
        self.turn = 0

    async def reset(self, states, **more):
        self.wanted = states["label"]
        return {"observation": states["observation"]}

    async def step(self, states, **more):
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
    time.sleep(60)
    return 0


def raises(left: int, right: int) -> int:
    raise ValueError("no sums today")


def junk(left: int, right: int) -> int:
    os._exit(3)


def endless(left: int, right: int) -> str:
    return "1" * 2_000_000


def garbled(left: int, right: int) -> str:
    return "1\ud800"


def killed(left: int, right: int) -> int:
    """Kills the trainer, once, in the middle of a call."""
    marker = Path("kill")
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


def calls_endless(text):
    return _calls(text, "endless")


def calls_garbled(text):
    return _calls(text, "garbled")


def calls_killed(text):
    return _calls(text, "killed")


def calls_press(text):
    return [{"name": "press", "arguments": {"digit": int(letter)}} for letter in text if letter.isdigit()]


def calls_any_killed(text):
    """Some answers are calls, whatever they say."""
    return [{"name": "killed", "arguments": {"left": len(text), "right": 1}}] * (sum(map(ord, text)) % 2)
