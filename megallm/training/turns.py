"""The tools and the environment of a run, opened on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from megallm.data.chat.prepare import Prepared
from megallm.data.chat.replies import ReplyWriter
from megallm.data.chat.spans import Speaker
from megallm.data.chat.template import Renderer
from megallm.engine.engine import Mesh
from megallm.rewards.episodes import Environments
from megallm.rewards.tools import parser_of
from megallm.training.replies import Replies, TurnLimits
from megallm.training.reward_calls import FurtherReward, environment_reward, tell_all
from megallm.training.rl_config import GrpoConfig


@dataclass
class Turns:
    """What answers the policy's turns, on rank 0 (None elsewhere), and the reward that it gives."""

    replies: Replies | None = None
    rewards: list[FurtherReward] = field(default_factory=list)


@contextmanager
def open_turns(config: GrpoConfig, mesh: Mesh, rows: Prepared) -> Iterator[Turns]:
    """Yields the section `turns` at work; collective over the world.

    Errors: UsageError, on all ranks, for tools, environments and parsers that cannot be loaded.
    """
    turns = Turns()
    if not config.turns.used:
        yield turns
        return
    with ExitStack() as stack:

        def start() -> dict[str, Any]:
            environments = stack.enter_context(Environments(config.turns))
            renderer = stack.enter_context(Renderer(rows.template, rows.config.template_date))
            eos = rows.template.tokens.get("eos_token", "")
            ends = (*rows.words.special_texts, *rows.template.stops, eos)
            writer = ReplyWriter(rows.words, Speaker(renderer, ends))
            parse = parser_of(config.turns.calls, rows.template.source)
            length, strings = config.sampling.max_new_tokens, config.data.strings
            limits = TurnLimits(length, config.turns.most, strings, config.run.seed)
            turns.replies = Replies(config.turns, environments, writer, parse, limits)
            return {"name": environments.name, "earns": environments.earns}

        told = tell_all(mesh, start)
        if told["earns"]:
            turns.rewards.append(environment_reward(told["name"], config.turns.weight))
        yield turns
