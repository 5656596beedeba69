"""Offline reinforcement learning: answers that were sampled and rewarded before are learned without
sampling new ones.

raft trains the best answers of each prompt (rejection-sampling fine-tuning, arXiv 2304.06767), awr
all of them weighed by exp(advantage / beta) (arXiv 1910.00177), return each with its reward told in
the prompt (Decision Transformer, arXiv 2106.01345), ilql values of tokens (arXiv 2206.11871).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megallm.data.batches import Share
from megallm.data.chat.scored import advantages, keep_best, samples_of
from megallm.data.loader import Batch
from megallm.engine.engine import Engine, Loss, Mesh, Part
from megallm.engine.weights_copy import WeightsCopy
from megallm.losses.language import NextToken
from megallm.losses.offline import AdvantageWeighted, Ilql, at_last
from megallm.run.recorder import Recorder
from megallm.training.chat_run import ChatIdentity, ChatRun
from megallm.training.offline_config import OfflineConfig
from megallm.training.supervised import Evaluation, SupervisedTrainer, run_supervised
from megallm.training.trainer import Ledger, StepReport

TWINS = ("q1", "q2")


class OfflineIdentity(ChatIdentity):
    """What a checkpoint of `megallm offline` remembers."""

    KIND = "offline"
    config: OfflineConfig

    def own(self) -> dict[str, Any]:
        """Returns how answers are learned besides."""
        return super().own() | {"offline": dataclasses.asdict(self.config.offline)}


class OfflineTrainer(SupervisedTrainer):
    """Moves the target's Q after every step."""

    job: OfflineRun

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        report = super().step(step)
        if self.job.target is not None:
            self.job.target.mix(self.config.offline.polyak)
        return report


class OfflineRun(ChatRun):
    """Reads answers with their rewards."""

    identity = OfflineIdentity
    trainer = OfflineTrainer
    config: OfflineConfig
    target: WeightsCopy | None = None  # the twin Q of a while ago
    _advantages: tuple[np.ndarray, np.ndarray] | None = None  # samples, ascending, and theirs

    def loss(self) -> Loss:
        """Returns the loss of the algorithm."""
        options = self.config.offline
        if options.algorithm == "awr":
            value_coef = options.value_coef if options.advantage == "value" else 0.0
            return AdvantageWeighted(options.beta, options.max_weight, value_coef=value_coef)
        if options.algorithm == "ilql":
            return Ilql(options.gamma, options.tau, options.cql, options.nll)
        return NextToken(measured=("entropy", "mean_token_accuracy"))

    # Data

    def _read(self) -> None:
        super()._read()
        options, cache = self.config.offline, Path(self.config.run.dir) / "cache"
        if options.algorithm == "raft":
            best = options.keep, options.min_reward, cache
            self.rows = keep_best(self.rows, *best)
            if self.held_out is not None:
                self.held_out = keep_best(self.held_out, *best, valid=True)
        if options.algorithm == "awr" and options.advantage != "value":
            found = [rows.sources for rows in (self.rows, self.held_out) if rows is not None]
            made = [
                (samples_of(sources), advantages(sources, options.advantage == "prompt"))
                for sources in found
            ]
            samples, values = (np.concatenate(parts) for parts in zip(*made, strict=True))
            samples, places = np.unique(samples, return_index=True)
            self._advantages = samples, values[places]

    def complete(self, engine: Engine, batches: list[Batch]) -> list[Batch]:
        """Returns the microbatches with advantages, returns, or rewards and the target's Q;
        collective over the world.
        """
        wide = torch.float64 if engine.model.dtype == torch.float64 else torch.float32
        batches = [batch | {"returns": batch["reward"].to(wide)} for batch in batches]
        if self._advantages is not None:
            return [batch | {"advantages": self._look_up(batch).to(wide)} for batch in batches]
        if self.target is None:
            return batches
        with self.target.in_use():
            scores = engine.scores(batches, TWINS)
        return [
            batch
            | {"rewards": at_last("returns", batch), "target_q": torch.minimum(*found.values())}
            for batch, found in zip(batches, scores, strict=True)
        ]

    def _look_up(self, batch: Batch) -> Tensor:
        samples, values = self._advantages
        wanted = batch["samples"].numpy()
        places = np.searchsorted(samples, wanted).clip(max=len(samples) - 1)
        return torch.from_numpy(np.where(samples[places] == wanted, values[places], 0.0))

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns the held-out numbers; `val/loss` is the sum of the terms where none is of that
        name, like `train/loss`.
        """
        held_out, terms = super().evaluation(engine, share, ledger), ("q", "v", "cql", "nll")

        def evaluate() -> dict[str, float | None]:
            found = held_out()
            own = [found[f"val/{term}"] for term in terms if f"val/{term}" in found]
            return {"val/loss": None if None in own else sum(own), **found} if own else found

        return evaluate

    # The target

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the engine, and has the target's Q ready; collective over the world."""
        engine, begin = super().build(mesh, found)
        if self.config.critic == "q":
            self.target = WeightsCopy(engine, "critic.q")
            if found is not None:
                self.target.load(found)
        return engine, begin

    def parts(self, engine: Engine) -> Iterator[Part]:
        """Yields what this rank owns of a checkpoint, the target's Q too."""
        yield from super().parts(engine)
        for held in self.target.state() if self.target is not None else ():
            if held.owned:
                yield Part(held.name, held.shard.full, held.box.offset, held.tensor)

    def show(self, recorder: Recorder) -> None:
        """Say how answers are learned, beside what was read."""
        recorder.note(f"offline: {self.config.offline.algorithm}")
        super().show(recorder)

    def next_command(self) -> str:
        """Returns the command that decodes as the algorithm has it."""
        if self.config.critic == "q":
            return f'megallm generate --model {self.config.run.dir} --q-beta 4 --prompt "..."'
        return super().next_command()


def run(
    config: OfflineConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(OfflineRun(config), mesh, resume, own_log, allowed)
