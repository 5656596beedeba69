"""The held-out loss of a pretraining run."""

from __future__ import annotations

from megallm.base.errors import DataError
from megallm.data.batches import Share
from megallm.data.loader import to_tensors
from megallm.engine.engine import Engine, Loss
from megallm.training.config import PretrainConfig
from megallm.training.reading import first_held_out, held_out_readers
from megallm.training.trainer import Ledger


class HeldOut:
    """The mean loss over `eval.batches` global batches of the validation split.

    In the stream order they are always the first ones, in Megatron-LM's each evaluation reads the
    next ones.
    """

    def __init__(
        self, config: PretrainConfig, engine: Engine, ledger: Ledger, objective: Loss
    ) -> None:
        self.config, self.engine, train, data = config, engine, config.train, engine.mesh.data
        self.objective, self.ledger = objective, ledger  # says after which step the evaluation is
        share = Share(train.global_batch, train.micro_batch, data.size, data.rank)
        try:
            self.readers = held_out_readers(
                config, share
            )  # what cannot be read is said before the first step
        except DataError as error:
            raise DataError(f"{error} Or train without a held-out loss: eval.batches=0.") from error

    def loss(self) -> float | None:
        """Nats per token, None without held-out data; collective over the world."""
        if self.readers is None:
            return None
        reader, total, count = self.readers(), 0.0, 0
        first = first_held_out(self.config, self.ledger.step)
        for batch in range(first, first + self.config.eval.batches):
            micros = [to_tensors(arrays) for arrays in reader.batches(batch)]
            sums, counts = self.engine.evaluate(micros, self.objective)
            total, count = total + sums["loss"], count + counts["loss"]
        return total / count if count else None
