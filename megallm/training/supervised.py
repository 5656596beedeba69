"""Training on batches that are known before: pre-training, fine-tuning, reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megallm.base.errors import InternalError
from megallm.checkpoint.io import Part
from megallm.engine.engine import Engine, Loss, StepStats
from megallm.models.sections import MtpConfig
from megallm.optim.lr import learning_rate
from megallm.parallel.pipeline import Batch
from megallm.run.config import JobConfig
from megallm.training.trainer import StepReport, finite


@dataclass
class Feed:
    """Where batches come from.

    `batches` yields (step, this data rank's microbatches) of the steps that are left;
    `wait_seconds` says how long the run has waited for them so far, `data_after` what the ledger's
    `data` is once a step is done. `seq_len` is that of the FLOPs of a token.
    """

    batches: Iterable[tuple[int, list[Batch]]]
    wait_seconds: Callable[[], float]
    data_after: Callable[[int], dict[str, Any]]
    seq_len: int


class SupervisedTrainer:
    """One update a step from the next batch; `held_out` returns the held-out loss, None without
    held-out data.
    """

    def __init__(
        self,
        config: JobConfig,
        engine: Engine,
        loss: Loss,
        feed: Feed,
        held_out: Callable[[], float | None],
        identity: dict[str, Any],
    ) -> None:
        self.config, self.engine, self.loss, self.feed = config, engine, loss, feed
        self.held_out, self.identity = held_out, identity
        self._batches, self._waited = iter(feed.batches), 0.0
        self._flops_of_token = config.model.num_flops(feed.seq_len)

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        number, batches = next(self._batches)
        if number != step:
            raise InternalError(f"The batches are those of step {number}, the loop is at {step}.")
        waited = self.feed.wait_seconds() - self._waited
        self._waited += waited
        lr = learning_rate(self.config.optim, step, self.config.train.steps)
        stats = self.engine.train_step(batches, self.loss, lr)
        tokens = sum(batch["tokens"].numel() for batch in batches) * self.engine.mesh.data.size
        return StepReport(
            stats,
            lr,
            self.config.train.global_batch,
            tokens,
            losses={"train/loss": stats.losses["loss"]},
            metrics={
                "train/tokens": stats.counts["loss"],
                **mtp_losses(stats, self.config.model.mtp),
            },
            flops=self._flops_of_token * tokens,
            wait_seconds=waited,
            data=self.feed.data_after(step),
        )

    def evaluate(self) -> dict[str, float | None]:
        """Returns `val/loss`."""
        return {"val/loss": self.held_out()}

    def state(self) -> Iterator[Part]:
        """Yields what this rank owns of weights and optimizer state."""
        return self.engine.parts()

    def counters(self) -> dict[str, Any]:
        """Returns what belongs to the engine's state besides tensors."""
        return self.engine.counters()


def mtp_losses(stats: StepStats, mtp: MtpConfig) -> dict[str, float | None]:
    """Returns `train/mtp_loss`: the mean over depths in nats per token, without its weight.

    Where there are several depths each one's loss is beside it.
    """
    terms = {
        name: value * mtp.depth / mtp.weight
        for name, value in stats.losses.items()
        if name.startswith("mtp_")
    }
    if not terms:
        return {}
    each = (
        {f"train/{name}_loss": finite(value) for name, value in terms.items()}
        if len(terms) > 1
        else {}
    )
    return {"train/mtp_loss": finite(sum(terms.values()) / len(terms))} | each
