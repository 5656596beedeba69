"""Resharding of checkpoints, as pure geometry: flat ranges as boxes, boxes as pieces, and which
pieces a read needs.

Nothing here knows files or torch: a box is a pair (offset, shape) inside a logical tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from megallm.base.errors import CheckpointError
from megallm.parallel.shard import Box

MAX_PIECE_BYTES = 64 * 2**20

Slices = tuple[slice, ...]


def boxes_of_range(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """Returns the flat half-open range `[begin, end)` of a tensor in C order, as boxes in that same
    order.

    A tensor of n >= 1 dims needs at most 2n - 1 boxes: a partial head and tail per dim, and one
    whole middle. Each box is contiguous in the flat order, so the holder of a flat buffer cuts it
    up one box after the other. Errors: ValueError when the range is not inside the tensor.
    """
    shape = tuple(shape)
    if not 0 <= begin <= end <= prod(shape):
        raise ValueError(
            f"The flat range [{begin}, {end}) does not lie inside a tensor of shape {shape}."
        )
    return _range_boxes((), shape, begin, end)


def _range_boxes(
    prefix: tuple[int, ...], shape: tuple[int, ...], begin: int, end: int
) -> list[Box]:
    """Boxes of `[begin, end)` of the sub-tensor `shape` that sits at the leading indices
    `prefix`.
    """
    if begin == end:
        return []
    leading = (1,) * len(prefix)
    if len(shape) == 0:
        return [Box(prefix, leading)]
    row = prod(shape[1:])
    first, head = divmod(begin, row)
    last, tail = divmod(end, row)
    if first == last:  # inside one row
        return _range_boxes((*prefix, first), shape[1:], head, tail)
    boxes = []
    if head:
        boxes += _range_boxes((*prefix, first), shape[1:], head, row)
        first += 1
    if last > first:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((*prefix, first, *zeros), (*leading, last - first, *shape[1:])))
    if tail:
        boxes += _range_boxes((*prefix, last), shape[1:], 0, tail)
    return boxes


def split_box(box: Box, itemsize: int, max_bytes: int = MAX_PIECE_BYTES) -> list[Box]:
    """Cut a box along its leading dims into boxes of at most `max_bytes` bytes, in C order.

    An empty box gives no pieces. Errors: ValueError when one element is larger than `max_bytes`.
    """
    limit = max_bytes // itemsize
    if limit < 1:
        raise ValueError(
            f"A piece of {max_bytes} bytes cannot hold one element of {itemsize} bytes."
        )
    if box.size == 0:
        return []
    if box.size <= limit:
        return [box]
    dim, row = 0, box.size // box.shape[0]
    while row > limit:
        dim += 1
        row //= box.shape[dim]
    pieces = []
    step = limit // row
    for index in _indices(box.shape[:dim]):
        start = tuple(o + i for o, i in zip(box.offset, index, strict=False))
        for begin in range(0, box.shape[dim], step):
            count = min(step, box.shape[dim] - begin)
            offset = (*start, box.offset[dim] + begin, *box.offset[dim + 1 :])
            pieces.append(Box(offset, (*(1,) * dim, count, *box.shape[dim + 1 :])))
    return pieces


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices


def plan_reads(target: Box, pieces: Sequence[Box]) -> list[tuple[int, Slices, Slices]]:
    """Returns what to copy to fill `target`: `(piece index, slices into that piece, slices into the
    target)`.

    `pieces` are disjoint boxes of the same tensor (see `cover_problem`).
    Errors: `CheckpointError` when they do not hold every element of `target`.
    """
    reads, found = [], 0
    for index, held in enumerate(pieces):
        common = held.intersect(target)
        if common is not None:
            reads.append((index, common.slices(held), common.slices(target)))
            found += common.size
    if found != target.size:
        raise CheckpointError(
            f"The pieces hold {found} of the {target.size} elements asked for at offset "
            f"{target.offset}, shape {target.shape}."
        )
    return reads


def cover_problem(full: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Returns why `boxes` do not hold every element of a tensor of shape `full` exactly once; None
    when they do.
    """
    full = tuple(full)
    for box in boxes:
        problem = outside_problem(full, box)
        if problem is not None:
            return problem
        if box.size == 0:
            return f"the piece at {box.offset} is empty"
    overlap = _overlap(boxes)
    if overlap is not None:
        first, second = overlap
        return f"the pieces at {first.offset} and {second.offset} overlap"
    held = sum(box.size for box in boxes)
    if held != prod(full):
        return f"the pieces hold {held} of {prod(full)} elements"
    return None


def outside_problem(full: Sequence[int], box: Box) -> str | None:
    """Returns why `box` is no part of a tensor of shape `full`; None when it is (an empty box may
    be).
    """
    if len(box.offset) != len(full) or len(box.shape) != len(full):
        return (
            f"a piece at {box.offset} of shape {box.shape} has another number of dims than "
            f"{tuple(full)}"
        )
    if any(
        o < 0 or n < 0 or o + n > f for o, n, f in zip(box.offset, box.shape, full, strict=True)
    ):
        return f"a piece at {box.offset} of shape {box.shape} does not lie inside {tuple(full)}"
    return None


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Returns two boxes that share an element: a sweep along the dim that tells the boxes apart
    best.
    """
    if len(boxes) < 2:
        return None
    dims = range(len(boxes[0].offset))
    dim = max(dims, key=lambda d: len({box.offset[d] for box in boxes}), default=None)
    if dim is None:  # several pieces of a scalar
        return boxes[0], boxes[1]
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offset[dim]):
        active = [held for held in active if held.offset[dim] + held.shape[dim] > box.offset[dim]]
        for held in active:
            if held.intersect(box) is not None:
                return held, box
        active.append(box)
    return None
