"""A second set of the weights that are trained, in the same shards as the first: no second model
and no gradients, only what ZeRO leaves of one copy on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.engine.state import pieces, read_state
from megallm.parallel.shard import StateTensor

PREFIX = "optim.reference."  # of its tensors in a checkpoint


class WeightsCopy:
    """The master weights of an engine as they were when it was made, in the masters' dtype; those
    of one `unit` of the model alone where it is named.
    """

    def __init__(self, engine: Engine, unit: str | None = None) -> None:
        self.engine = engine
        self.buckets = [
            bucket
            for bucket in engine.parameters.trainable
            if unit is None or bucket.plan.units == {unit}
        ]
        self.flats = {bucket.index: bucket.master.detach().clone() for bucket in self.buckets}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the engine compute with the copy inside the context; collective over the world."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        parameters = self.engine.parameters
        parameters.wait_and_reshard()
        for bucket in self.buckets:
            held = self.flats[bucket.index]
            before = bucket.master.clone()
            bucket.master.copy_(held)
            held.copy_(before)
        self.engine.model.fp8.loaded()
        parameters.publish(frozen=False)

    def mix(self, alpha: float) -> None:
        """Move the copy by the share `alpha` towards the weights that are trained; 1 replaces
        it.
        """
        for bucket in self.buckets:
            held = self.flats[bucket.index]
            held.copy_(bucket.master) if alpha == 1 else held.lerp_(bucket.master, alpha)

    def state(self) -> Iterator[StateTensor]:
        """Yields the copy as boxes of logical tensors, for checkpoints."""
        parameters = self.engine.parameters
        for name, shard, box, tensor in pieces(parameters, self.flats):
            owned = parameters.owns(name)
            yield StateTensor(f"{PREFIX}{name}", shard, box, tensor, owned, optimizer=True)

    def load(self, step: Path) -> None:
        """Fill the copy from a checkpoint written at any layout. Errors: CheckpointError for one
        without a copy.
        """
        with CheckpointReader(step) as reader:
            for held in self.state():
                read_state(reader, held)
