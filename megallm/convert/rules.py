"""Reversible rules between our logical tensors and the tensors of another format. Pure.

A rule says what one tensor of theirs is made of: one or several matrices of ours, laid end to end along the
output dim, perhaps transposed. Rename, split, stack, merge and transpose are all of that form. Rules become
`Link`s, boxes that hold the same numbers on both sides, and a link maps any box inside it either way. So any piece
of a tensor of one side can be filled from pieces of the other, and nothing is ever made whole on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megallm.base.errors import InternalError
from megallm.checkpoint.plan import cover_problem
from megallm.parallel.shard import Box

_SOURCE = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True)
class Rule:
    """`theirs` = the matrices `ours` end to end along dim 0 (the output dim), transposed when `transpose`.

    `name[i]` is one matrix of a stack. `{n}` in the names stands for the layer number.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False


def rule(theirs: str, *ours: str, transpose: bool = False) -> Rule:
    """One row of a table of rules."""
    return Rule(theirs, ours, transpose)


@dataclass(frozen=True)
class Link:
    """Two boxes that hold the same numbers: `ours_box` of the tensor `ours`, `theirs_box` of the tensor `theirs`.

    Ours may have leading stack dims of size 1 that theirs lacks; with `transpose` the last two dims change places.
    """

    ours: str
    ours_box: Box
    theirs: str
    theirs_box: Box
    transpose: bool = False

    @property
    def stack_dims(self) -> int:
        """Leading dims of ours that theirs does not have."""
        return len(self.ours_box.shape) - len(self.theirs_box.shape)

    def to_theirs(self, box: Box) -> Box:
        """The box of theirs that holds `box`, which lies inside `ours_box`."""
        k = self.stack_dims
        offset = [o - start for o, start in zip(box.offset[k:], self.ours_box.offset[k:], strict=True)]
        shape = list(box.shape[k:])
        if self.transpose:
            offset.reverse()
            shape.reverse()
        return Box(tuple(o + s for o, s in zip(offset, self.theirs_box.offset, strict=True)), tuple(shape))

    def to_ours(self, box: Box) -> Box:
        """The box of ours that holds `box`, which lies inside `theirs_box`; the inverse of `to_theirs`."""
        k = self.stack_dims
        offset = [o - start for o, start in zip(box.offset, self.theirs_box.offset, strict=True)]
        shape = list(box.shape)
        if self.transpose:
            offset.reverse()
            shape.reverse()
        inner = (o + s for o, s in zip(offset, self.ours_box.offset[k:], strict=True))
        return Box((*self.ours_box.offset[:k], *inner), (*self.ours_box.shape[:k], *shape))


@dataclass(frozen=True)
class Bridge:
    """All links of a model, from both sides, and the full shape of each tensor on each side."""

    ours: Mapping[str, tuple[int, ...]]
    theirs: Mapping[str, tuple[int, ...]]
    by_ours: Mapping[str, Sequence[Link]]
    by_theirs: Mapping[str, Sequence[Link]]


def plan_bridge(rules: Iterable[Rule], ours: Mapping[str, tuple[int, ...]], num_layers: int) -> Bridge:
    """Apply `rules` to a model whose logical tensors have the full shapes `ours`.

    A rule none of whose sources the model has is left out (a bias that is off). Errors: InternalError when the rules
    do not hold every element of every tensor, on both sides, exactly once.
    """
    links: list[Link] = []
    theirs: dict[str, tuple[int, ...]] = {}
    for each in _expand(rules, num_layers):
        sources = [_parse(text) for text in each.ours]
        present = [name in ours for name, _ in sources]
        if not any(present):
            continue
        if not all(present):
            raise InternalError(f"The rule of {each.theirs} needs {', '.join(each.ours)}; some are lacking.")
        if each.theirs in theirs:
            raise InternalError(f"Two rules make {each.theirs}.")
        theirs[each.theirs], made = _links(each, sources, ours)
        links += made
    bridge = Bridge(ours, theirs, _grouped(links, "ours", ours), _grouped(links, "theirs", theirs))
    _check_cover(ours, {name: [link.ours_box for link in found] for name, found in bridge.by_ours.items()})
    _check_cover(theirs, {name: [link.theirs_box for link in found] for name, found in bridge.by_theirs.items()})
    return bridge


def _expand(rules: Iterable[Rule], num_layers: int) -> Iterable[Rule]:
    for each in rules:
        if "{n}" not in each.theirs:
            yield each
            continue
        for n in range(num_layers):
            layer = str(n)
            ours = tuple(name.replace("{n}", layer) for name in each.ours)
            yield Rule(each.theirs.replace("{n}", layer), ours, each.transpose)


def _parse(text: str) -> tuple[str, int | None]:
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise InternalError(f"A rule names {text!r}; write a tensor name, or name[i] for one matrix of a stack.")
    return match["name"], None if match["index"] is None else int(match["index"])


def _links(
    each: Rule, sources: list[tuple[str, int | None]], ours: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], list[Link]]:
    """The full shape of the rule's tensor, and one link per source."""
    made, rows, columns = [], 0, ()
    for name, index in sources:
        full = ours[name]
        stack = () if index is None else (index,)
        matrix = full[len(stack) :]
        if made and matrix[1:] != columns:
            raise InternalError(f"The parts of {each.theirs} are {columns} and {matrix[1:]} wide: they do not join.")
        columns = matrix[1:]
        ours_box = Box((*stack, *(0 for _ in matrix)), (*(1 for _ in stack), *matrix))
        offset, shape = (rows, *(0 for _ in columns)), matrix
        if each.transpose:
            offset, shape = offset[::-1], shape[::-1]
        made.append(Link(name, ours_box, each.theirs, Box(offset, shape), each.transpose))
        rows += matrix[0]
    full_theirs = (rows, *columns)
    return full_theirs[::-1] if each.transpose else full_theirs, made


def _grouped(links: list[Link], side: str, names: Mapping[str, tuple[int, ...]]) -> dict[str, list[Link]]:
    groups: dict[str, list[Link]] = {name: [] for name in names}
    for link in links:
        groups[link.ours if side == "ours" else link.theirs].append(link)
    return groups


def _check_cover(shapes: Mapping[str, tuple[int, ...]], boxes: Mapping[str, list[Box]]) -> None:
    for name, full in shapes.items():
        problem = cover_problem(full, boxes[name])
        if problem is not None:
            raise InternalError(f"The conversion rules do not hold {name} of shape {full} exactly once: {problem}.")
