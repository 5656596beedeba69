"""The one record of how a parameter is laid out: logical shape, split, partial gradients, start.

Initialisation, gradient reduction, clipping, checkpoints and conversion all read this record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol

from megallm.parallel.layout import AXES, Layout


@dataclass(frozen=True)
class Init:
    """How a parameter starts: `normal` with `std`, `uniform` between `-value` and `value`, or the
    constant `value`.
    """

    kind: str = "constant"
    std: float = 0.0
    value: float = 0.0


def normal(std: float) -> Init:
    return Init("normal", std=std)


def uniform_init(bound: float) -> Init:
    return Init("uniform", value=bound)


def constant(value: float) -> Init:
    return Init("constant", value=value)


@dataclass(frozen=True)
class Box:
    """An axis-aligned piece of a logical tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """Returns the common box, or None when nothing is shared."""
        begin = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        end = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(e <= b for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))

    def slices(self, inside: Box | None = None) -> tuple[slice, ...]:
        """Returns slices of this box, counted from the origin of `inside` (default: the logical
        tensor).
        """
        origin = inside.offset if inside else (0,) * len(self.offset)
        return tuple(
            slice(o - s, o - s + n) for o, n, s in zip(self.offset, self.shape, origin, strict=True)
        )


def piece(total: int, size: int, rank: int) -> tuple[int, int]:
    """Returns the half-open range of `total` items that `rank` of `size` holds; the first pieces
    are longer by one.
    """
    base, extra = divmod(total, size)
    begin = rank * base + min(rank, extra)
    return begin, begin + base + (rank < extra)


@dataclass(frozen=True)
class Shard:
    """Layout of one parameter.

    `split` maps a dim to the axis it is divided over; `partial` names axes over which its
    *gradient* is a partial sum that still has to be added up; `decay` says whether weight decay
    applies.
    """

    full: tuple[int, ...]
    split: Mapping[int, str] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    init: Init = Init()
    decay: bool = True

    @property
    def expert(self) -> bool:
        """Whether the parameter is divided over expert-parallel ranks, and so replicated over edp,
        not dp, cp, tp.
        """
        return "ep" in self.split.values()

    def box(self, layout: Layout, coords: Mapping[str, int]) -> Box:
        """Returns the piece of the logical tensor that the rank at `coords` holds."""
        offset, shape = [], []
        for dim, total in enumerate(self.full):
            axis = self.split.get(dim)
            begin, end = (
                (0, total) if axis is None else piece(total, layout.size(axis), coords[axis])
            )
            offset.append(begin)
            shape.append(end - begin)
        return Box(tuple(offset), tuple(shape))

    def owned(self, coords: Mapping[str, int], first_stage: bool = True) -> bool:
        """Returns whether this rank is the one owner of its piece: coordinate 0 on every axis that
        replicates it.

        `first_stage` is False on the later holders of a tied parameter; pp itself never replicates.
        An expert's piece is replicated over edp, the axis beside ep.
        """
        divided = set(self.split.values())
        axes = (
            ("edp",)
            if self.expert
            else [axis for axis in AXES if axis != "pp" and axis not in divided]
        )
        return first_stage and all(coords[axis] == 0 for axis in axes)


class StateTensor(NamedTuple):
    """This rank's box of one logical tensor of the state of a run, as a view that can be read and
    written.

    `owned` says whether this rank answers for it: each logical element has one owner. A tensor of
    the `optimizer` is left out where only weights are wanted; an `optional` one starts afresh where
    a checkpoint lacks it or has another shape.
    """

    name: str
    shard: Shard
    box: Box
    tensor: Any
    owned: bool
    optimizer: bool = False
    optional: bool = False


class StateProvider(Protocol):
    """Owns a part of the state: `state()` yields every tensor of it that this rank holds, in a
    fixed order.
    """

    def state(self) -> Iterator[StateTensor]: ...


class WeightSource(Protocol):
    """Weights by logical name, to read from: `info` returns the full shape and the dtype of a
    tensor, `read_into` fills a tensor of any dtype with the box of its shape at `offset`.
    """

    def names(self) -> list[str]: ...

    def info(self, name: str) -> tuple[tuple[int, ...], Any]: ...

    def read_into(self, name: str, offset: Sequence[int], tensor: Any) -> None: ...


class Entry(NamedTuple):
    """A parameter of this rank: logical name, the parameter, its record, and the earliest local
    stage that holds it.
    """

    name: str
    param: Any
    shard: Shard
    stage: int


def named_shards(model: Any) -> Iterator[tuple[str, Any, Shard]]:
    """Walk `(logical name, parameter, shard)` over a model; a parameter without a record is an
    error.

    Blocks sit in a `ModuleDict` keyed by global layer number, so the module path is the logical
    name.
    """
    yield from _walk(model, "")


def _walk(module: Any, path: str) -> Iterator[tuple[str, Any, Shard]]:
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        if name not in module.shards:
            raise KeyError(
                f"{type(module).__name__} at '{path}' has a parameter '{name}' without a Shard "
                "record."
            )
        yield f"{path}.{name}".lstrip("."), parameter, module.shards[name]
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}".lstrip("."))
