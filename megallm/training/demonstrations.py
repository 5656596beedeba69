"""Demonstrations that are trained beside answers of the policy: the side stream of CHORD and of
PPO-ptx.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megallm.data.chat.rows import SftRow
from megallm.losses.chord import Chord, mu_schedule
from megallm.losses.policy import Policy
from megallm.training.responses import Response
from megallm.training.rl_config import ExpertConfig
from megallm.training.rollout import Prompts

NOBODY = -1  # the id, group and step of what nobody has sampled


class Demonstrations:
    """Rows of a stream of their own, `config.batch` for each update, and the loss in which they
    stand beside answers. What it needs to go on is how many draws there were, and the stream's
    state: `ledger` is both, empty at the beginning.
    """

    def __init__(self, config: ExpertConfig, rows: Prompts, ledger: Mapping[str, Any]) -> None:
        self.config, self.rows, self.draws = config, rows, int(ledger.get("draws", 0))

    def draw(self) -> list[Response]:
        """Returns the demonstrations of the next update, the same on every rank."""
        self.draws += 1
        return [demonstration_of(row) for _, row in self.rows.examples(self.draws)]

    def weight(self, step: int) -> float:
        """Returns mu at a step, numbered from 1."""
        given = self.config
        valley = given.mu_peak if given.mu_valley is None else given.mu_valley
        return mu_schedule(
            step - 1, given.mu_peak, valley, given.mu_warmup_steps, given.mu_decay_steps
        )

    def loss(self, policy: Policy, step: int) -> Chord:
        """Returns the loss of an update of a step, numbered from 1."""
        return Chord(policy, self.weight(step), self.config.phi, self.config.mix == "ptx")

    def ledger(self) -> dict[str, Any]:
        """Returns what a checkpoint remembers."""
        return {"draws": self.draws, "stream": self.rows.state_after(self.draws)}


def demonstration_of(row: SftRow) -> Response:
    """Returns a sequence as an answer to its first token, of which the trained ones count; nobody
    has sampled it, so it has no log-probs.
    """
    ids, trained = row.ids.tolist(), row.trained.tolist()
    return Response(
        NOBODY, NOBODY, NOBODY, ids[:1], ids[1:], [], "end", NOBODY, demonstrated=trained[1:]
    )
