"""Training of a reward model on pairs, or on all ranked answers of a prompt (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megallm.data.batches import Share
from megallm.engine.engine import Engine, Loss, Mesh
from megallm.losses.reward import BradleyTerry, RankedReward
from megallm.training.chat_run import ChatIdentity, ChatRun
from megallm.training.preference_config import RewardModelConfig
from megallm.training.supervised import Evaluation, SupervisedTrainer, run_supervised
from megallm.training.trainer import Ledger, StepReport, finite

_NEGATED = "negated_min_reward"  # as the loss has it: the engine keeps the largest of a number
_OF_A_STEP = (_NEGATED, "max_reward")


class RewardIdentity(ChatIdentity):
    """What a checkpoint of `megallm reward` remembers."""

    KIND = "reward"
    config: RewardModelConfig

    def own(self) -> dict[str, Any]:
        """Returns the loss besides."""
        options = self.config.reward
        return super().own() | {"reward": {"center": options.center, "ranked": options.ranked}}


class RewardTrainer(SupervisedTrainer):
    """Reports scores under the names that TRL gives them."""

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        report = super().step(step)
        found = {name: finite(value) for name, value in report.stats.metrics.items()}
        least = found.pop(_NEGATED)
        found["min_reward"] = None if least is None else -least
        own = {f"train/{name}": value for name, value in found.items() if "/" not in name}
        kept = {name: value for name, value in found.items() if "/" in name}  # the routers'
        metrics = {name: x for name, x in report.metrics.items() if name != "train/tokens"}
        return replace(report, stats=replace(report.stats, metrics=kept), metrics=metrics | own)


class RewardRun(ChatRun):
    """Reads pairs, or prompts with ranked answers; the value of the last token is the score."""

    identity = RewardIdentity
    trainer = RewardTrainer
    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig) -> None:
        self.hidden_dropout = config.reward.hidden_dropout
        super().__init__(config)

    def loss(self) -> Loss:
        """Returns the loss of scores."""
        options = self.config.reward
        return (RankedReward if options.ranked else BradleyTerry)(options.center)

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns held-out loss, accuracy, margin and mean score."""
        held_out = super().evaluation(engine, share, ledger)

        def evaluate() -> dict[str, float | None]:
            found = held_out()
            return {name: x for name, x in found.items() if name[4:] not in _OF_A_STEP}

        return evaluate

    def next_command(self) -> str:
        """Returns the command that scores answers."""
        return f"megallm score --model {Path(self.config.run.dir)} --input F.jsonl --output G.jsonl"


def run(
    config: RewardModelConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(RewardRun(config), mesh, resume, own_log, allowed)
