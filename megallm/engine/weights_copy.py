"""A second set of the weights that are trained, in the same shards as the first: no second model
and no gradients, only what ZeRO leaves of one copy on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.engine.state import Piece, pieces, read_state
from megallm.parallel.shard import StateTensor

PREFIX = "optim.reference."  # of its tensors in a checkpoint


class WeightsCopy:
    """The master weights of an engine as they were when it was made, in the masters' dtype; where
    a `prefix` is given those of the parameters alone whose names begin with it.
    """

    def __init__(self, engine: Engine, prefix: str = "") -> None:
        self.engine, self.prefix = engine, prefix
        self.held = [piece.tensor.detach().clone() for piece in self._masters()]

    def _masters(self) -> Iterator[Piece]:
        """The weights that are trained: what neighbours share a bucket with them is none of it."""
        parameters = self.engine.parameters
        masters = {bucket.index: bucket.master for bucket in parameters.trainable}
        found = pieces(parameters, masters)
        yield from (piece for piece in found if piece.name.startswith(self.prefix))

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
        for piece, held in zip(self._masters(), self.held, strict=True):
            before = piece.tensor.clone()
            piece.tensor.copy_(held)
            held.copy_(before)
        self.engine.model.fp8.loaded()
        parameters.publish(frozen=False)

    def mix(self, alpha: float) -> None:
        """Move the copy by the share `alpha` towards the weights that are trained; 1 replaces
        it.
        """
        for piece, held in zip(self._masters(), self.held, strict=True):
            held.copy_(piece.tensor) if alpha == 1 else held.lerp_(piece.tensor, alpha)

    def state(self) -> Iterator[StateTensor]:
        """Yields the copy as boxes of logical tensors, for checkpoints."""
        for (name, shard, box, _), held in zip(self._masters(), self.held, strict=True):
            owned = self.engine.parameters.owns(name)
            yield StateTensor(f"{PREFIX}{name}", shard, box, held, owned, optimizer=True)

    def load(self, step: Path) -> None:
        """Fill the copy from a checkpoint written at any layout. Errors: CheckpointError for one
        without a copy.
        """
        with CheckpointReader(step) as reader:
            for held in self.state():
                read_state(reader, held)
