"""Synthetic tasks with known answers: arithmetic, code with tests, templates over facts that the
task itself states.

Task i of a kind is a pure function of (seed, kind, i), so any range can be made anywhere. Every row
says where it comes from. Tasks that repeat each other, or a text to be avoided (training or
evaluation sets), are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megallm.base import rng
from megallm.base.errors import UsageError
from megallm.curate.decontaminate import avoid_texts
from megallm.curate.exact import text_key
from megallm.curate.synth_code import code_task
from megallm.curate.text import lowered

VERSION = 1
_ATTEMPTS = 50  # kinds with few different tasks run dry: then say so
_NAMES = (
    "Ana",
    "Ben",
    "Chen",
    "Dara",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mira",
    "Noor",
)
_THINGS = (
    "apples",
    "books",
    "coins",
    "stamps",
    "pencils",
    "tickets",
    "marbles",
    "shells",
    "cards",
    "bricks",
)
_PLACES = ("kitchen", "library", "garden", "office", "station", "market", "museum", "harbour")


class Chance:
    """Small integers of one keyed stream."""

    def __init__(self, seed: int, kind: str, index: int) -> None:
        self._key, self._used = rng.key_of(seed, "synth", kind, index), 0

    def below(self, bound: int) -> int:
        """Returns a whole number from 0 to bound - 1 (the bias is below bound / 2^64)."""
        value = int(rng.bits(self._key, self._used, 1)[0])
        self._used += 1
        return value % bound

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def choice(self, options: Any) -> Any:
        return options[self.below(len(options))]


@dataclass(frozen=True)
class Task:
    """A prompt with its one right answer, the template it was made by, and for code the asserts
    that check it.
    """

    prompt: str
    answer: str
    template: str
    tests: str = ""


def arithmetic_task(chance: Chance) -> Task:
    """Make whole-number sums, products, division with rest, brackets, or a column of additions."""
    template = chance.choice(("sum", "difference", "product", "division", "brackets", "column"))
    digits = chance.between(1, 6)
    a, b, c = (chance.between(0, 10**digits - 1) for _ in range(3))
    if template == "division":
        b = chance.between(1, 10 ** max(1, digits - 2))
        return Task(
            f"Divide {a} by {b}. Give the quotient and the remainder.",
            f"{a // b} remainder {a % b}",
            template,
        )
    if template == "column":
        values = [chance.between(0, 10**digits - 1) for _ in range(chance.between(3, 8))]
        return Task(
            "Add these numbers:\n" + "\n".join(map(str, values)), str(sum(values)), template
        )
    expression, value = {
        "sum": (f"{a} + {b}", a + b),
        "difference": (f"{a} - {b}", a - b),
        "product": (f"{a % 1000} * {b % 1000}", (a % 1000) * (b % 1000)),
        "brackets": (f"({a} + {b}) * {c % 100} - {a % 100}", (a + b) * (c % 100) - a % 100),
    }[template]
    return Task(f"What is {expression}?", str(value), template)


def template_task(chance: Chance) -> Task:
    """Make word problems, ordering, places of things: the facts stand in the prompt."""
    template = chance.choice(("transfer", "order", "place"))
    names = _different(chance, _NAMES, 3)
    if template == "transfer":
        thing, start = chance.choice(_THINGS), [chance.between(5, 60) for _ in range(2)]
        given = chance.between(1, start[0] - 1)
        prompt = (
            f"{names[0]} has {start[0]} {thing} and {names[1]} has {start[1]}. {names[0]} gives "
            f"{given} of them to {names[1]}. How many {thing} does {names[1]} have now?"
        )
        return Task(prompt, str(start[1] + given), template)
    if template == "order":
        heights = sorted({chance.between(120, 199) for _ in range(12)})[:3]
        pairs = [(names[k], heights[k]) for k in range(3)]
        said = ", ".join(f"{name} is {height} cm tall" for name, height in _shuffled(chance, pairs))
        return Task(
            f"{said}. Name them from the shortest to the tallest.",
            ", ".join(name for name, _ in pairs),
            template,
        )
    places = _different(chance, _PLACES, 3)
    things = _different(chance, _THINGS, 3)
    facts = ". ".join(
        f"The {thing} are in the {place}" for thing, place in zip(things, places, strict=True)
    )
    asked = chance.below(3)
    moved = chance.choice(_PLACES)
    prompt = (
        f"{facts}. {names[0]} takes the {things[asked]} to the {moved}. Where are the "
        f"{things[asked]} now?"
    )
    return Task(prompt, f"in the {moved}", template)


def _different(chance: Chance, options: tuple[str, ...], count: int) -> list[str]:
    return _shuffled(chance, list(options))[:count]


def _shuffled(chance: Chance, items: list[Any]) -> list[Any]:
    items = list(items)
    for k in range(len(items) - 1, 0, -1):
        j = chance.below(k + 1)
        items[k], items[j] = items[j], items[k]
    return items


def _code(chance: Chance) -> Task:
    prompt, answer, tests, template = code_task(chance)
    return Task(prompt, answer, template, tests)


KINDS: dict[str, Callable[[Chance], Task]] = {
    "arithmetic": arithmetic_task,
    "code": _code,
    "template": template_task,
}


def generate(
    kinds: Iterable[str], count: int, seed: int, avoid: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields `count` rows {id, text, prompt, answer, tests, source, provenance}, the kinds in turn.

    `avoid` are JSONL or text files; a task is left out when its prompt is a line or a text of them,
    or its text or an earlier task's. Errors: `UsageError` for an unknown kind or when a kind has no
    new tasks left.
    """
    chosen = list(kinds)
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown or not chosen:
        raise UsageError(
            f"--kind {','.join(unknown) or 'none'}: the kinds are: {', '.join(KINDS)}."
        )
    seen = {
        text_key(lowered(part))
        for text in avoid_texts(avoid)
        for part in {text, *text.split("\n")}
        if part.strip()
    }
    at = dict.fromkeys(chosen, 0)
    for number in range(count):
        kind = chosen[number % len(chosen)]
        for _ in range(_ATTEMPTS):
            index = at[kind]
            at[kind] += 1
            task = KINDS[kind](Chance(seed, kind, index))
            keys = {
                text_key(lowered(task.prompt)),
                text_key(lowered(f"{task.prompt}\n{task.answer}")),
            }
            if not keys & seen:
                break
        else:
            raise UsageError(
                f"{_ATTEMPTS} {kind} tasks in a row were repeats or to be avoided; ask for fewer "
                f"than {count}."
            )
        seen |= keys
        provenance = {
            "generator": "megallm synth",
            "version": VERSION,
            "kind": kind,
            "template": task.template,
        }
        row = {
            "id": f"synth/{kind}/{seed}/{index}",
            "text": f"{task.prompt}\n{task.answer}",
            "prompt": task.prompt,
        }
        row |= {"answer": task.answer} | ({"tests": task.tests} if task.tests else {})
        yield row | {
            "source": f"synth/{kind}",
            "provenance": provenance | {"seed": seed, "index": index},
        }


def dump_row(row: dict[str, Any]) -> str:
    """Returns one line of the output."""
    return json.dumps(row, ensure_ascii=False) + "\n"
