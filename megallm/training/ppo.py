"""`megallm ppo`: a policy and its critic, two engines on one mesh (PPO, arXiv 1707.06347)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine, Mesh, Part, StepStats
from megallm.losses.advantage import Floats, gae, whiten
from megallm.losses.scores import Value
from megallm.optim.lr import learning_rate
from megallm.training.advantages import Credit
from megallm.training.grpo import GrpoIdentity, GrpoRun, PolicyTrainer, run_policy
from megallm.training.responses import Response
from megallm.training.rl_config import PpoConfig
from megallm.training.starting import check_source
from megallm.training.trainer import StepReport
from megallm.training.weights import build_engine

PREFIX = "optim.critic."  # of its tensors in a checkpoint: nothing that a reader of weights takes
NAMES = {"targets": "returns", "old_values": "values"}


class CriticState:
    """The critic's tensors in a checkpoint of the run, under the names that its engine knows."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader

    @property
    def meta(self) -> dict[str, Any]:
        """Returns the meta that belongs to the critic's engine."""
        return {"engine": self.reader.meta["engine"]["critic"]}

    def names(self) -> list[str]:
        """Returns the names of its tensors."""
        names = self.reader.names()
        return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns the shape and the dtype of a tensor."""
        return self.reader.info(PREFIX + name)

    def read_into(self, name: str, offset: Sequence[int], tensor: torch.Tensor) -> None:
        """Fill `tensor` with the box at `offset`."""
        self.reader.read_into(PREFIX + name, offset, tensor)


class PpoTrainer(PolicyTrainer):
    """Trains the critic on the returns of the same answers, after the policy in each update.

    Advantages are those of generalised advantage estimation over the answers' tokens, whitened over
    the whole step. An answer that was cut is worth beyond its end what the critic says of it.
    """

    config: PpoConfig

    def __init__(self, job: PpoRun, *args: Any) -> None:
        super().__init__(job, *args)
        critic, optim = job.config.critic, job.config.optim
        self.critic, self.value_loss = job.critic, Value(critic.clip)
        self.critic_optim = dataclasses.replace(optim, lr=critic.lr or optim.lr)
        self._value_losses: list[StepStats] = []
        self._explained = 0.0

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        self._value_losses = []
        report = super().step(step)
        losses = [each.losses["loss"] for each in self._value_losses]
        figures = {
            "loss/value_avg": sum(losses) / len(losses),
            "val_func/explained_variance": self._explained,
            "critic/grad_norm": self._value_losses[-1].grad_norm,
        }
        return dataclasses.replace(report, metrics={**report.metrics, **figures})

    def advantages(self, credit: Credit, fresh: list[Response]) -> list[list[float]]:
        """Returns the advantage of each token, and gives answers their values and returns."""
        options = self.config.critic
        read = [
            dataclasses.replace(one, tokens=[*one.tokens, 0], mask=[*one.sampled, True])
            for one in fresh
        ]
        values = self.rows.scores(read, self.critic.values)
        mask = credit.mask
        table, ends = np.zeros(mask.shape), np.zeros(len(fresh))
        for i, (answer, given) in enumerate(zip(fresh, values, strict=True)):
            answer.values = given[:-1]
            table[i, : len(given) - 1] = given[:-1]
            ends[i] = given[-1] if answer.truncated else 0.0
        rewards = self._token_rewards(credit, mask)
        made, returns = gae(rewards, table, mask, ends, gamma=options.gamma, lam=options.lam)
        for answer, row in zip(fresh, returns, strict=True):
            answer.returns = row[: len(answer.tokens)].tolist()
        spread = float(returns[mask].var())
        left = float((returns - table)[mask].var())
        self._explained = 1 - left / spread if spread > 0 else 0.0
        white = whiten(made, mask)
        return [row[:size].tolist() for row, size in zip(white, credit.tokens, strict=True)]

    def _token_rewards(self, credit: Credit, mask: Floats) -> Floats:
        """Each token's reward `[n, longest]`: the answer's at its last one, less the divergence."""
        bound = self.config.critic.reward_clip
        given = np.nan_to_num(credit.rewards)
        rewards = np.zeros(mask.shape)
        for i, size in enumerate(credit.tokens):
            if credit.penalties is not None:
                rewards[i, :size] -= credit.penalties[i]
            last = int(np.flatnonzero(mask[i])[-1])
            rewards[i, last] += given[i] if bound is None else np.clip(given[i], -bound, bound)
        return rewards

    def update(self, step: int, chosen: list[Response], lr: float) -> StepStats:
        """Train one update of the policy and one of the critic; in the first
        `critic.warmup_steps` steps the policy rests.
        """
        rests = step <= self.config.critic.warmup_steps
        stats = super().update(step, chosen, 0.0 if rests else lr)
        rate = learning_rate(self.critic_optim, step, self.config.train.steps)
        batches = self.rows.batches(chosen, NAMES)
        self._value_losses.append(self.critic.train_step(batches, self.value_loss, rate))
        return stats

    def state(self) -> Iterator[Part]:
        """Yields what this rank owns of the state, of both engines."""
        yield from super().state()
        for part in self.critic.parts():
            yield dataclasses.replace(part, name=PREFIX + part.name)

    def counters(self) -> dict[str, Any]:
        """Returns what belongs to both engines' state besides tensors."""
        return super().counters() | {"critic": self.critic.counters()}


class PpoIdentity(GrpoIdentity):
    """What a checkpoint of `megallm ppo` remembers."""

    KIND = "ppo"
    config: PpoConfig

    def own(self) -> dict[str, Any]:
        """Returns what advantages are made of too."""
        critic = self.config.critic
        return super().own() | {"critic": {"gamma": critic.gamma, "lam": critic.lam}}


class PpoRun(GrpoRun):
    """Reads prompts; has a critic beside the policy."""

    identity = PpoIdentity
    config: PpoConfig
    critic: Engine

    @property
    def trainer(self) -> type[PolicyTrainer]:
        """Returns what makes the steps."""
        return PpoTrainer

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the policy's engine, and has reference and critic ready; collective over the
        world.
        """
        engine, begin = super().build(mesh, found)
        given, config = self.config.critic.model, self.config
        model = dataclasses.replace(config.model, head="value")
        if given is not None:
            check_source("critic.model", given)
            place = "hf" if (Path(given) / "config.json").is_file() else "init"
            model = dataclasses.replace(model, hf=None, init=None, **{place: given})
        config = dataclasses.replace(config, model=model)
        if found is None:
            self.critic, told = build_engine(config.engine, mesh, None)
            return engine, f"{begin} (critic: {told})"
        self.critic = Engine(config.engine, mesh)
        with CheckpointReader(found) as reader:
            self.critic.load(CriticState(reader))
        return engine, begin


def run(
    config: PpoConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `grpo.run_policy`."""
    run_policy(PpoRun(config), mesh, resume, own_log, allowed)
