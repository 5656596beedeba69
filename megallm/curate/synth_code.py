"""Small Python functions with tests, put together from parts. The expected values come from our own
second form of each part, not from running the text, so a task whose text is wrong fails its
tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (what it says, the expression in the text, the same as a function of the element and k, name)
CodePart = tuple[str, str, Callable[[int, int], Any], str]
_MAPS: tuple[CodePart, ...] = (
    ("add {k} to each number", "x + {k}", lambda x, k: x + k, "add"),
    ("multiply each number by {k}", "x * {k}", lambda x, k: k * x, "scale"),
    (
        "replace each number by its remainder modulo {k}",
        "x % {k}",
        lambda x, k: x - x // k * k,
        "modulo",
    ),
    ("square each number", "x * x", lambda x, k: x**2, "square"),
    ("negate each number", "-x", lambda x, k: 0 - x, "negate"),
    ("subtract each number from {k}", "{k} - x", lambda x, k: -(x - k), "complement"),
)
_FILTERS: tuple[CodePart, ...] = (
    ("keep only the even numbers", "x % 2 == 0", lambda x, k: not x & 1, "even"),
    ("keep only the odd numbers", "x % 2 == 1", lambda x, k: bool(x & 1), "odd"),
    ("keep only the numbers greater than {k}", "x > {k}", lambda x, k: not x <= k, "above"),
    ("keep only the multiples of {k}", "x % {k} == 0", lambda x, k: x // k * k == x, "multiples"),
    (
        "keep only the numbers that differ from {k}",
        "x != {k}",
        lambda x, k: x < k or x > k,
        "without",
    ),
)
_ENDS: tuple[tuple[str, str, Callable[[list[int]], Any], str], ...] = (
    ("return their sum", "sum(numbers)", sum, "sum"),
    ("return how many there are", "len(numbers)", len, "count"),
    ("return the list sorted from small to large", "sorted(numbers)", sorted, "sorted"),
    (
        "return the largest one, or 0 when there is none",
        "max(numbers, default=0)",
        lambda items: sorted(items)[-1] if items else 0,
        "largest",
    ),
    (
        "return the list in reverse order",
        "list(reversed(numbers))",
        lambda items: items[::-1],
        "reversed",
    ),
    (
        "return the list without repeats, in order of first appearance",
        "list(dict.fromkeys(numbers))",
        lambda items: [item for place, item in enumerate(items) if item not in items[:place]],
        "unique",
    ),
)
_TESTS = 4


def code_task(chance: Any) -> tuple[str, str, str, str]:
    """Returns (prompt, function, asserts, template) of the numbers that `chance` (synth.Chance)
    gives.
    """
    steps = [
        ("if", chance.choice(_FILTERS), chance.between(2, 12)) for _ in range(chance.between(0, 1))
    ]
    steps += [
        ("map", chance.choice(_MAPS), chance.between(2, 12)) for _ in range(chance.between(1, 2))
    ]
    end = chance.choice(_ENDS)
    names = [part[3] + (f"_{k}" if "{k}" in part[1] else "") for _, part, k in steps]
    name = "_".join([*names, end[3]])
    lines = []
    for kind, part, k in steps:
        expression = part[1].format(k=k)
        inside = (
            f"x for x in numbers if {expression}"
            if kind == "if"
            else f"{expression} for x in numbers"
        )
        lines.append(f"    numbers = [{inside}]")
    source = "\n".join([f"def {name}(numbers):", *lines, f"    return {end[1]}"])
    said = ", then ".join([*(part[0].format(k=k) for _, part, k in steps), end[0]])
    prompt = (
        f"Write a Python function {name}(numbers) that takes a list of whole numbers. It should "
        f"{said}."
    )
    tests = []
    for size in range(_TESTS):
        values = [chance.between(-20, 40) for _ in range(2 * size)]
        tests.append(f"assert {name}({values}) == {end[2](_applied(steps, values))!r}")
    return prompt, source, "\n".join(tests), "/".join([*(part[3] for _, part, _ in steps), end[3]])


def _applied(steps: list[tuple[str, CodePart, int]], values: list[int]) -> list[int]:
    for kind, part, k in steps:
        results = [part[2](x, k) for x in values]
        values = (
            [x for x, result in zip(values, results, strict=True) if result]
            if kind == "if"
            else results
        )
    return values
