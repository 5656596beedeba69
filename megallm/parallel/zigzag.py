"""Which tokens a context-parallel rank holds, and how its ranks exchange keys. Pure.

A row of T tokens is cut into `2 cp` chunks; rank i holds chunks i and `2 cp - 1 - i`, the front one
first. Early tokens see few keys and late ones many, so every rank has the same amount of causal
attention (striped and zigzag orders: arXiv 2311.09431; Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from math import gcd

from megallm.base.errors import UsageError
from megallm.ops.tiles import Span

KINDS = ("ring", "ulysses", "allgather", "hybrid")


def spans(length: int, size: int, rank: int) -> tuple[Span, ...]:
    """Returns the runs of tokens of one rank of `size`, with where it stores them; two that touch
    are one.
    """
    chunk = length // (2 * size)
    front, back = rank * chunk, (2 * size - 1 - rank) * chunk
    if front + chunk == back:
        return (Span(front, back + chunk, 0),)
    return Span(front, front + chunk, 0), Span(back, back + chunk, chunk)


def rank_order(size: int) -> list[int]:
    """Returns the chunks as the ranks hold them, rank after rank: `[0, 3, 1, 2]` for two ranks."""
    return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


def natural_order(size: int) -> list[int]:
    """Returns where in `rank_order` each chunk of the row is: the inverse permutation."""
    order = rank_order(size)
    return [order.index(chunk) for chunk in range(2 * size)]


def check_length(length: int, size: int) -> None:
    """Raises UsageError when a row of `length` tokens cannot be cut into `2 size` chunks."""
    if size > 1 and length % (2 * size):
        raise UsageError(
            f"a row of {length} tokens cannot be split over layout.cp {size}: it takes a multiple "
            f"of 2 cp = {2 * size}, such as {max(1, length // (2 * size)) * 2 * size}."
        )


def ulysses_degree(kind: str, cp: int, heads: int, wanted: int | None = None) -> int:
    """Returns how many neighbouring cp ranks exchange heads for tokens; `cp / degree` of them then
    exchange keys.

    `heads` are the query heads of a tensor-parallel rank. `wanted` is the degree of a hybrid;
    without it, the largest one that leaves a ring. Raises UsageError when the heads or cp do not
    divide.
    """
    if kind not in KINDS:
        raise UsageError(f"layout.cp_kind is '{kind}'; it must be one of {', '.join(KINDS)}.")
    if kind in ("ring", "allgather") or cp == 1:
        return 1
    if kind == "ulysses":
        degree = cp
    else:
        fitting = hybrid_degrees(cp, heads)
        degree = wanted or (fitting[-1] if fitting else 0)
        if degree not in fitting:
            raise UsageError(
                f"layout.cp_kind hybrid splits layout.cp {cp} into a ring of groups that exchange "
                "heads. The size of a group, "
                f"layout.cp_ulysses{'' if wanted is None else f' {wanted}'}, must divide cp and "
                f"the {heads} query heads of a rank and leave a ring of more than one group; here "
                f"that is {fitting or 'no number'}."
            )
    if heads % degree:
        raise UsageError(
            f"layout.cp_kind {kind} divides the {heads} query heads of a rank over {degree} ranks, "
            f"which does not go: take a cp that divides {heads}, or layout.cp_kind ring or "
            "allgather, which do not split heads."
        )
    return degree


def hybrid_degrees(cp: int, heads: int) -> list[int]:
    """Returns Ulysses degrees with which a hybrid of `cp` ranks works, ascending; empty when there
    is none.
    """
    common = gcd(cp, heads)
    return [degree for degree in range(2, cp) if common % degree == 0]
