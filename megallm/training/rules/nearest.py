"""Values near a refused one that would be accepted. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def nearest_fixes(key: str, value: int, valid: Iterable[int]) -> tuple[dict[str, int], ...]:
    """Returns the valid values next below and next above `value`."""
    valid = sorted(candidate for candidate in valid if candidate >= 1)
    below = [candidate for candidate in valid if candidate < value][-1:]
    above = [candidate for candidate in valid if candidate > value][:1]
    return tuple({key: candidate} for candidate in below + above)


def divisors(value: int) -> list[int]:
    """Returns every divisor, ascending."""
    return [divisor for divisor in range(1, value + 1) if value % divisor == 0]


def multiples(value: int, unit: int) -> tuple[int, int]:
    """Returns the multiples of `unit` around `value`; the lower one may be 0."""
    return value // unit * unit, (value // unit + 1) * unit


def power_of_two(value: int) -> bool:
    """Returns whether a number is 1, 2, 4, ..."""
    return value >= 1 and value & (value - 1) == 0


def ratio(a: int, b: int) -> float:
    """Returns how far apart two sizes are, at least 1."""
    return max(a, b) / max(1, min(a, b))
