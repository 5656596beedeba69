"""Reversible rules between our logical tensors and the tensors of another format. Pure.

A rule says what one tensor of theirs is made of: one or several matrices of ours, laid end to end
along the output dim or dealt out head by head, perhaps transposed, perhaps with rotary pairs side
by side. Rename, split, stack, merge, transpose and reorder are all of that form. Rules become
`TensorLink`s, boxes that hold the same numbers on both sides, and a link maps any box inside it
either way. So any piece of a tensor of one side can be filled from pieces of the other, and nothing
is ever made whole on the way.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from megallm.base.errors import InternalError
from megallm.checkpoint.plan import cover_problem
from megallm.parallel.shard import Box

_SOURCE = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<index>\d+(,\d+)*)\])?")


@dataclass(frozen=True)
class WeightRule:
    """`theirs` = the matrices `ours` end to end along dim 0 (the output dim), transposed when
    `transpose`.

    `name[i]` is one matrix of a stack, on either side, `name[i,j]` of a stack of stacks. `{n}` in
    the names stands for the layer number, `{x}` for that of an expert, `{d}` for a depth of
    multi-token prediction and `{m}` for the number of its block in their count of layers.

    With `by_head` every head has its share of each matrix of ours, one after another; keys and
    values have heads of their own number. With `interleave` the rows of the sources take turns.
    With `pairs` the last `rotated` rows (of every head) are rotary features that theirs keeps as
    neighbours `(x0, y0, x1, y1, ...)` and ours as halves `(x0, x1, ..., y0, y1, ...)`. A `copy`
    repeats what
    other rules hold: it is written, and may be absent. `where` names a tensor of ours without
    which, or with `!` before it with which, the rule is left out.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    by_head: bool = False
    interleave: bool = False
    pairs: bool = False
    copy: bool = False
    where: str = ""

    @property
    def of_head(self) -> bool:
        return self.ours[0].startswith("head.")

    def holds(self, ours: Container[str]) -> bool:
        """Returns whether a model with the tensors `ours` is one that the rule is for."""
        return not self.where or (self.where.removeprefix("!") in ours) != self.where.startswith(
            "!"
        )


def rule(theirs: str, *ours: str, **how: Any) -> WeightRule:
    """Returns one row of a table of rules; `how` are the switches of `WeightRule`."""
    return WeightRule(theirs, ours, **how)


@dataclass(frozen=True)
class Counts:
    """How often a rule is spelled out, and the sizes that reorder rows."""

    layers: int
    experts: int = 0
    depths: int = 0  # of multi-token prediction
    heads: int = 1
    kv_heads: int = 1
    rotated: int = 0  # rotary features of a head


@dataclass(frozen=True)
class TensorLink:
    """Two boxes that hold the same numbers: `ours_box` of the tensor `ours`, `theirs_box` of the
    tensor `theirs`.

    Either may have leading stack dims of size 1; with `transpose` the last two dims change places.
    `theirs_box` has every `step`th row from its offset on (column, with `transpose`).
    """

    ours: str
    ours_box: Box
    theirs: str
    theirs_box: Box
    transpose: bool = False
    step: int = 1
    dims: int = 0  # of what lies in the stack, a vector or a matrix; 0: as many as fit both sides

    @property
    def _dims(self) -> int:
        return self.dims or min(2, len(self.ours_box.shape), len(self.theirs_box.shape))

    @property
    def stack_dims(self) -> int:
        """Leading dims of ours, before the matrix or vector."""
        return len(self.ours_box.shape) - self._dims

    @property
    def their_stack_dims(self) -> int:
        """Returns the same of theirs."""
        return len(self.theirs_box.shape) - self._dims

    def to_theirs(self, box: Box) -> Box:
        """Returns the box of theirs, of every `step`th row, that holds `box`, which lies inside
        `ours_box`.
        """
        k, j = self.stack_dims, self.their_stack_dims
        offset = [
            o - start for o, start in zip(box.offset[k:], self.ours_box.offset[k:], strict=True)
        ]
        shape = list(box.shape[k:])
        if self.transpose:
            offset.reverse()
            shape.reverse()
        offset[-1 if self.transpose else 0] *= self.step
        inner = (o + s for o, s in zip(offset, self.theirs_box.offset[j:], strict=True))
        return Box((*self.theirs_box.offset[:j], *inner), (*self.theirs_box.shape[:j], *shape))

    @property
    def steps(self) -> tuple[int, int]:
        """Returns the steps of rows and columns of theirs."""
        return (1, self.step) if self.transpose else (self.step, 1)

    def part_in(self, box: Box) -> tuple[Box, tuple[slice, ...]] | None:
        """Returns what of this link lies in `box` of theirs (all its rows): the box of ours, and
        where in `box` it stands.
        """
        k, j = self.stack_dims, self.their_stack_dims
        offset, shape, slices = [], [], []
        rows = zip(
            self.theirs_box.offset, self.theirs_box.shape, box.offset, box.shape, strict=True
        )
        for dim, (start, count, begin, length) in enumerate(rows):
            step = self.step if dim == j + self.transpose else 1
            first = max(0, -((start - begin) // step))
            last = min(count, -((start - begin - length) // step))
            if first >= last:
                return None
            at = start + first * step - begin
            slices.append(slice(at, at + (last - first - 1) * step + 1, step))
            if dim >= j:
                offset.append(first)
                shape.append(last - first)
        if self.transpose:
            offset.reverse()
            shape.reverse()
        inner = (o + s for o, s in zip(offset, self.ours_box.offset[k:], strict=True))
        return Box((*self.ours_box.offset[:k], *inner), (*self.ours_box.shape[:k], *shape)), tuple(
            slices
        )


@dataclass(frozen=True)
class Bridge:
    """All links of a model, from both sides, and the full shape of each tensor on each side.

    `copies` are tensors of theirs that repeat others; `by_ours` never reads them.
    """

    ours: Mapping[str, tuple[int, ...]]
    theirs: Mapping[str, tuple[int, ...]]
    by_ours: Mapping[str, Sequence[TensorLink]]
    by_theirs: Mapping[str, Sequence[TensorLink]]
    copies: frozenset[str] = frozenset()


def plan_bridge(
    rules: Iterable[WeightRule], ours: Mapping[str, tuple[int, ...]], counts: Counts
) -> Bridge:
    """Apply `rules` to a model whose logical tensors have the full shapes `ours`.

    A rule none of whose sources the model has is left out (a bias that is off). Errors:
    InternalError when the rules do not hold every element of every tensor, on both sides, exactly
    once.
    """
    links: list[TensorLink] = []
    theirs: dict[str, tuple[int, ...]] = {}
    copies = set()
    for each in expand(rules, counts):
        sources = [parse(text) for text in each.ours]
        present = [name in ours for name, _ in sources]
        if not any(present) or not each.holds(ours):
            continue
        if not all(present):
            raise InternalError(
                f"The rule of {each.theirs} needs {', '.join(each.ours)}; some are lacking."
            )
        name, stack = parse(each.theirs)
        if name in theirs and not stack:
            raise InternalError(f"Two rules make {each.theirs}.")
        full, made = _links(
            each, name, stack, [(text, at, ours[text]) for text, at in sources], counts
        )
        known = theirs.get(name, full)
        theirs[name] = tuple(max(pair) for pair in zip(known, full, strict=True))
        links += made
        copies |= {name} if each.copy else set()
    own = [link for link in links if link.theirs not in copies]
    bridge = Bridge(
        ours,
        theirs,
        _grouped(own, "ours", ours),
        _grouped(links, "theirs", theirs),
        frozenset(copies),
    )
    for name, full in ours.items():
        _check_cover(name, full, [(link.ours_box, 1, 0, 0) for link in bridge.by_ours[name]])
    for name, full in theirs.items():
        found = bridge.by_theirs[name]
        spread = [
            (link.theirs_box, link.step, link.their_stack_dims, int(link.transpose))
            for link in found
        ]
        _check_cover(name, full, spread)
    return bridge


def expand(rules: Iterable[WeightRule], counts: Counts) -> Iterator[WeightRule]:
    """Yields rules with numbers in place of {n}, {x}, {m} and {d}; the blocks of further tokens
    follow the layers.
    """
    for each in rules:
        if "{m}" in each.theirs:
            for depth in range(counts.depths):
                yield _named(_named(each, "{m}", str(counts.layers + depth)), "{d}", str(depth))
            continue
        layers = range(counts.layers + counts.depths) if "{n}" in each.theirs else (None,)
        experts = range(counts.experts) if "{x}" in each.theirs else (None,)
        for n in layers:
            here = each if n is None else _of_layer(each, n, counts.layers)
            for x in experts:
                yield here if x is None else _named(here, "{x}", str(x))


def _of_layer(each: WeightRule, n: int, layers: int) -> WeightRule:
    if n >= layers:
        block = f"mtp.{n - layers}.block."
        ours = tuple(name.replace("layers.{n}.", block) for name in each.ours)
        each = replace(each, ours=ours, where=each.where.replace("layers.{n}.", block))
    return _named(each, "{n}", str(n))


def _named(each: WeightRule, place: str, number: str) -> WeightRule:
    ours = tuple(name.replace(place, number) for name in each.ours)
    return replace(
        each,
        theirs=each.theirs.replace(place, number),
        ours=ours,
        where=each.where.replace(place, number),
    )


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """Returns the tensor and the place in its stack of `name` or `name[i]`, as a rule writes it."""
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise InternalError(
            f"A rule names {text!r}; write a tensor name, or name[i] for one matrix of a stack."
        )
    return match["name"], () if match["index"] is None else tuple(
        map(int, match["index"].split(","))
    )


SourceTensor = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, place in its stack, full shape


def _links(
    each: WeightRule,
    theirs: str,
    their_stack: tuple[int, ...],
    sources: list[SourceTensor],
    counts: Counts,
) -> tuple[tuple[int, ...], list[TensorLink]]:
    """Returns the full shape of the rule's tensor as far as this rule tells, and its links."""
    made, rows, columns = [], 0, None
    heads = counts.kv_heads if ".kv." in sources[0][0] else counts.heads
    step = len(sources) if each.interleave else 1
    for head in range(heads if each.by_head else 1):
        for place, (name, stack, full) in enumerate(sources):
            matrix = full[len(stack) :]
            if columns not in (None, matrix[1:]):
                raise InternalError(
                    f"The parts of {each.theirs} are {columns} and {matrix[1:]} wide: they do not "
                    "join."
                )
            columns = matrix[1:]
            count, uneven = divmod(matrix[0], heads if each.by_head else 1)
            if uneven:
                raise InternalError(
                    f"{name} of {matrix[0]} rows has no equal share for {heads} heads."
                )
            last = name == sources[-1][0]
            paired = counts.rotated if each.pairs and last else 0
            runs = [(0, count, place - rows, step)] if each.interleave else _runs(count, paired)
            for begin, length, at, every in runs:
                ours_box = Box(
                    (*stack, head * count + begin, *(0 for _ in columns)),
                    (*(1 for _ in stack), length, *columns),
                )
                offset, shape = (rows + at, *(0 for _ in columns)), (length, *columns)
                if each.transpose:
                    offset, shape = offset[::-1], shape[::-1]
                box = Box((*their_stack, *offset), (*(1 for _ in their_stack), *shape))
                how = each.transpose, every, len(matrix)
                made.append(TensorLink(name, ours_box, theirs, box, *how))
            rows += count
    matrix = (rows, *columns)[::-1] if each.transpose else (rows, *columns)
    return (*(i + 1 for i in their_stack), *matrix), made


def _runs(count: int, paired: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of rows of one share: (begin in ours, rows, begin in theirs, step in theirs)."""
    plain = count - paired
    if plain:
        yield 0, plain, 0, 1
    for half in range(2 if paired else 0):
        yield plain + half * paired // 2, paired // 2, plain + half, 2


def _grouped(
    links: list[TensorLink], side: str, names: Mapping[str, tuple[int, ...]]
) -> dict[str, list[TensorLink]]:
    groups: dict[str, list[TensorLink]] = {name: [] for name in names}
    for link in links:
        groups[link.ours if side == "ours" else link.theirs].append(link)
    return groups


Held = Sequence[tuple[Box, int, int, int]]  # a box, its step, stack dims, and the dim of the step


def _check_cover(name: str, full: tuple[int, ...], held: Held) -> None:
    """Every element of a tensor is held once."""
    spread = any(step > 1 for _, step, *_ in held)
    problem = _rows_problem(full, held) if spread else cover_problem(full, [h[0] for h in held])
    if problem is not None:
        raise InternalError(
            f"The conversion rules do not hold {name} of shape {full} exactly once: {problem}."
        )


def _rows_problem(full: tuple[int, ...], held: Held) -> str | None:
    """Returns the same for boxes of whole rows (or columns) of the matrices of a stack, some of
    every few of them.
    """
    seen: dict[tuple[int, ...], bytearray] = {}
    stack_dims = held[0][2]
    for box, step, stack, axis in held:
        dim = stack + axis
        begin, count = box.offset[dim], box.shape[dim]
        others = [d for d in range(stack, len(full)) if d != dim]
        whole = stack == stack_dims and all(box.shape[d] == full[d] for d in others)
        if not whole or begin + (count - 1) * step >= full[dim]:
            return f"the rows at {box.offset} are not whole rows of it"
        mine = seen.setdefault(tuple(box.offset[:stack]), bytearray(full[dim]))
        rows = slice(begin, begin + (count - 1) * step + 1, step)
        if any(mine[rows]):
            return f"rows from {begin} on are held twice"
        mine[rows] = bytes([1]) * count
    for rows in seen.values():
        if not all(rows):
            return f"row {rows.index(0)} is not held"
    if len(seen) < prod(full[:stack_dims]):
        return "some matrices of it are not held"
    return None
