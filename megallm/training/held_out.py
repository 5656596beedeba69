"""The held-out numbers of a run."""

from __future__ import annotations

from collections.abc import Callable

from megallm.base.stopping import StepAbandoned
from megallm.data.batches import BatchReader
from megallm.data.loader import Batch, to_tensors
from megallm.engine.engine import Engine, Loss


def _as_they_are(engine: Engine, batches: list[Batch]) -> list[Batch]:
    return batches


class HeldOut:
    """The mean of every term of a loss over a number of global batches of held-out data.

    `open_reader` returns what reads them from their beginning (None without held-out data), `first`
    the number, from 1, of the first batch of this evaluation; `complete` is that of
    `SupervisedRun`.
    """

    def __init__(
        self,
        engine: Engine,
        loss: Loss,
        open_reader: Callable[[], BatchReader] | None,
        batches: int,
        first: Callable[[], int] = lambda: 1,
        complete: Callable[[Engine, list[Batch]], list[Batch]] = _as_they_are,
    ) -> None:
        self.engine, self.loss, self.batches, self.complete = engine, loss, batches, complete
        self.open_reader, self.first = open_reader, first

    def __call__(self) -> dict[str, float | None]:
        """Returns `val/TERM` in the unit of the term, such as nats per token for `val/loss`; None
        without held-out data. Collective over the world. Raises StepAbandoned when the run is asked
        to stop meanwhile.
        """
        if self.open_reader is None:
            return {"val/loss": None}
        reader, first = self.open_reader(), self.first()
        totals: dict[str, float] = {}
        numbers: dict[str, float] = {}
        for batch in range(first, first + self.batches):
            if self.engine.mesh.largest(self.engine.request()):
                raise StepAbandoned
            micros = [to_tensors(arrays) for arrays in reader.batches(batch)]
            micros = self.complete(self.engine, micros)
            sums, counts = self.engine.evaluate(micros, self.loss)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
                numbers[name] = numbers.get(name, 0) + counts[name]
        return {
            f"val/{name}": total / numbers[name] if numbers[name] else None
            for name, total in totals.items()
        }
