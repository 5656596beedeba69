"""Sequence packing: how pieces of documents fill rows of one length: windowed best fit, or
concatenation cut into chunks. Pure.

Best fit never cuts what fits into a row (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830): documents longer than a row are cut into full rows and a rest, then
the rests and the shorter documents, longest first, each go where the least room is left over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def split_document(length: int, capacity: int) -> list[tuple[int, int]]:
    """Returns [begin, end) of full rows of a document of `length` tokens and of its rest; [] for an
    empty one.
    """
    return [(begin, min(begin + capacity, length)) for begin in range(0, length, capacity)]


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns rows of indices into `sizes` (each 1 to capacity), best fit decreasing; ties in the
    order given.

    O(n log n) comparisons: the rows that still have room are kept sorted by it.
    """
    wrong = [size for size in sizes if not 1 <= size <= capacity]
    if wrong:
        raise ValueError(f"A piece of {wrong[0]} tokens cannot be packed into rows of {capacity}.")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        at = bisect_left(open_rows, (size, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > size:
            insort(open_rows, (room - size, row))
    return rows


def concatenate(lengths: Sequence[int], capacity: int) -> list[list[tuple[int, int, int]]]:
    """Returns rows of (index, begin, end): everything back to back, cut every `capacity` tokens;
    the last may be short.
    """
    rows: list[list[tuple[int, int, int]]] = []
    room = 0
    for index, length in enumerate(lengths):
        begin = 0
        while begin < length:
            if room == 0:
                rows.append([])
                room = capacity
            end = min(begin + room, length)
            rows[-1].append((index, begin, end))
            room -= end - begin
            begin = end
    return rows
