"""The logical state of a rank, for checkpoints (parameters, master weights, optimizer state): which
boxes of which logical tensors its flat buffers hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from megallm.checkpoint.plan import boxes_of_range
from megallm.checkpoint.reader import CheckpointReader
from megallm.models.parallel_model import check_shape
from megallm.optim.optimizer import Optimizer
from megallm.optim.zero import ShardedParameters
from megallm.parallel.fp8 import HISTORY
from megallm.parallel.shard import Box, Shard, StateTensor

if TYPE_CHECKING:
    from megallm.engine.engine import Engine


class Piece(NamedTuple):
    """A box of the logical tensor `name`, as a view of a flat buffer."""

    name: str
    shard: Shard
    box: Box
    tensor: Tensor


def pieces(parameters: ShardedParameters, flats: Mapping[int, Tensor]) -> Iterator[Piece]:
    """Yields the pieces in buffers that hold, by the number of a bucket, this rank's range of it.
    """
    mesh = parameters.mesh
    for index, flat in flats.items():
        bucket = parameters.flat[index]
        bucket.settle()
        for cut in parameters.slices(bucket):
            name, place = cut.member.name, cut.place
            shard = parameters.shards[name]
            origin = shard.box(mesh.layout, mesh.coords).offset
            for box in boxes_of_range(parameters.shapes[name], cut.begin, cut.end):
                count = prod(box.shape)
                offset = tuple(a + b for a, b in zip(origin, box.offset, strict=True))
                yield Piece(
                    name, shard, Box(offset, box.shape), flat[place : place + count].view(box.shape)
                )
                place += count


class ParameterState:
    """Yields the weights, their wide masters and the optimizer's state that is shaped like them.

    A frozen parameter has weights alone.
    """

    def __init__(self, parameters: ShardedParameters, optimizer: Optimizer) -> None:
        self.parameters, self.optimizer = parameters, optimizer

    def state(self) -> Iterator[StateTensor]:
        """Yields everything of one kind after another, in the order of the buckets."""
        flat = self.parameters.flat
        yield from self._tensors("", {bucket.index: bucket.weights for bucket in flat}, False)
        masters = {
            bucket.index: bucket.master for bucket in flat if bucket.master is not bucket.weights
        }
        yield from self._tensors("optim.master.", masters, True)
        for name, flats in self.optimizer.states.items():
            yield from self._tensors(f"optim.{name}.", flats, True)

    def _tensors(
        self, prefix: str, flats: Mapping[int, Tensor], optimizer: bool
    ) -> Iterator[StateTensor]:
        for name, shard, box, tensor in pieces(self.parameters, flats):
            owned = self.parameters.owns(name)
            yield StateTensor(f"{prefix}{name}", shard, box, tensor, owned, optimizer)


def read_state(reader: CheckpointReader, held: StateTensor) -> None:
    """Fill a box that this rank holds from a checkpoint written at any layout; see
    `check_shape`.
    """
    check_shape(reader, held.name, held.shard.full)
    reader.read_into(held.name, held.box.offset, held.tensor)


def stored_parameters(names: Iterable[str]) -> set[str]:
    """Returns the parameters that have optimizer state among the tensors of a checkpoint."""
    return {
        parameter_of(name)
        for name in names
        if name.startswith("optim.") and not name.startswith(HISTORY)
    }


def parameter_of(name: str) -> str:
    """Returns the parameter that the tensor `optim.STATE.PARAMETER` belongs to."""
    return name.split(".", 2)[-1]


class Sizes(NamedTuple):
    """Numbers of parameters of the whole model, each once."""

    trained: int
    frozen: int

    @property
    def all(self) -> int:
        """Parameters, adapters included."""
        return self.trained + self.frozen


def count_params(engine: Engine) -> Sizes:
    """Returns how many parameters are trained and frozen; collective over the world."""
    mesh, counts = engine.mesh, [0, 0]
    for held in engine.masters():
        if engine.parameters.owns(held.name):
            counts[not engine.parameters.params[held.name].requires_grad] += held.tensor.numel()
    for weight in engine.model.quantized.values():
        counts[1] += weight.numel * weight.shard.owned(mesh.coords)
    told = mesh.broadcast_json(mesh.gather_json(counts))
    return Sizes(*(sum(column) for column in zip(*told, strict=True)))
