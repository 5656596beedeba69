"""Whether the fields of a configuration go together, whatever its trainer is, checked before any
process starts. Pure.

`check` runs the rules of every section (`training/rules`) and those of the trainer, so that one
attempt shows everything that is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TypeVar

from megallm.base.config import get, raise_problems, replace
from megallm.base.errors import UsageError
from megallm.base.suggest import nearest
from megallm.convert.hf_config import agree, read_config
from megallm.models.config import CHOICES
from megallm.optim.config import CHOICES as OPTIM_CHOICES
from megallm.run.config import JobConfig
from megallm.training import starting
from megallm.training.kinds import rules_of
from megallm.training.rules import experts, files, layout, model, optim, precision, train
from megallm.training.rules.nearest import divisors, ratio
from megallm.training.rules.problem import WORLD, Facts, Problem, Rules, shown
from megallm.training.rules.ranges import RANGES

# Section -> its rules, in the order in which problems are told.
SECTIONS: dict[str, Rules] = {
    "run": files.RULES,
    "optim": optim.RULES,
    "layout": layout.RULES,
    "train": train.RULES,
    "experts": experts.RULES,
    "model": model.RULES,
    "precision": precision.RULES,
}
_OF_SIZES = ("world", "heads", "widths", "layers")
LAYOUT_RULES = (*_OF_SIZES, "batch", "sequence", "context", "schedule")
GivenConfig = TypeVar("Config", bound=JobConfig)


def check(
    config: GivenConfig,
    world: int | None = None,
    tokenizer_vocab: int | None = None,
    world_name: str = WORLD,
) -> GivenConfig:
    """Returns the configuration, of any trainer, with every inferred value filled in.

    `world` is the number of processes (None: what the layout asks for), `tokenizer_vocab` the
    tokenizer's size if known: it fills a missing `model.vocab_size`. `world_name` is the option
    that gave the number of processes. Errors: one `UsageError` that lists all problems.
    """
    problems = find_problems(config, world, tokenizer_vocab)
    hint = ""
    if world is not None and any(problem.rule in LAYOUT_RULES for problem in problems):
        close = nearest_layouts(config, world, tokenizer_vocab)
        if close:
            hint = (
                f"Layouts of {world} processes that fit: "
                f"{'; '.join(shown(grid) for grid in close)}."
            )
    raise_problems([str(problem).replace(WORLD, world_name) for problem in problems], hint)
    facts = _facts(config, world, tokenizer_vocab)
    inferred = {"model": facts.model, "layout.dp": facts.dp, "optim": config.optim.resolve()}
    return replace(config, inferred | rules_of(config).inferred(config))


def find_problems(
    config: JobConfig, world: int | None, tokenizer_vocab: int | None = None
) -> list[Problem]:
    """Returns all broken rules.

    Rules about the model's sizes are left out while the model itself cannot be resolved.
    """
    tables = (rules_of(config), *SECTIONS.values())
    problems = [*_ranges(config, world, tables), *_choices(config)]
    problems += [problem for table in tables for rule in table.given for problem in rule(config)]
    broken = {problem.key for problem in problems}
    try:
        facts = _facts(config, world, tokenizer_vocab)
    except UsageError as error:
        if not any(key.startswith("model.") for key in broken):
            problems.append(Problem("model", str(error)))
        return problems
    for table in (*tables[1:], tables[0]):
        for rule, needs in table.resolved.items():
            if not broken.intersection(needs):
                problems += rule(facts)
    return problems


def nearest_layouts(
    config: JobConfig, world: int, tokenizer_vocab: int | None = None
) -> list[dict[str, int]]:
    """Returns up to three layouts of `world` ranks that break no rule about layouts, the closest to
    the wish first.
    """
    wish, found = config.layout, []
    resolved = _facts(config, world, tokenizer_vocab).model
    resolved = resolved.described  # a folder is read once
    for tp in divisors(world):
        for pp, cp in product(divisors(world // tp), {1, wish.cp}):
            if world // tp // pp % cp:
                continue
            grid = {"layout.pp": pp, "layout.dp": world // tp // pp // cp, "layout.tp": tp}
            grid |= {"layout.cp": cp} if wish.cp > 1 else {}
            trial = replace(config, grid | {"layout.ep": 1, "model": resolved})
            broken = find_problems(trial, world, tokenizer_vocab)
            if not any(problem.rule in LAYOUT_RULES for problem in broken):
                found.append((ratio(tp, wish.tp) * ratio(pp, wish.pp) * ratio(cp, wish.cp), grid))
    return [grid for _, grid in sorted(found, key=lambda pair: pair[0])[:3]]


def _facts(config: JobConfig, world: int | None, tokenizer_vocab: int | None) -> Facts:
    given = config.model
    if given.hf is not None:
        given = agree(given, read_config(Path(given.hf)).model, f"model.hf {given.hf}")
    elif given.init is not None:
        given = agree(given, starting.model_of(given.init), f"model.init {given.init}")
    elif given.vocab_size is None and given.preset is None and tokenizer_vocab is not None:
        given = dataclasses.replace(given, vocab_size=tokenizer_vocab)
    return Facts(config, given.resolve(), world, tokenizer_vocab)


# Rules about single keys.


def _ranges(config: JobConfig, world: int | None, tables: tuple[Rules, ...]) -> Iterator[Problem]:
    if world is not None and world < 1:
        yield Problem("ranges", f"{WORLD} is {world}; it must be at least 1.", ({WORLD: 1},), WORLD)
    usual = type(config)()
    for ranges in (RANGES, *(table.ranges for table in tables)):
        for key, allowed in ranges.items():
            value = get(config, key)
            if value is None or isinstance(value, str):  # a word in place of a number: auto
                continue
            near = allowed.nearest(value, get(usual, key))
            if near != value:
                fixes = () if near is None else ({key: near},)
                yield Problem("ranges", f"{key} is {value}; it must be {allowed}.", fixes, key)


def _choices(config: JobConfig) -> Iterator[Problem]:
    tables = {f"model.{name}": values for name, values in CHOICES.items()}
    tables |= {f"optim.{name}": values for name, values in OPTIM_CHOICES.items()}
    for key, values in tables.items():
        value = get(config, key)
        if value is not None and value not in values:
            close = nearest(value, values, cutoff=0) or values[0]
            sentence = f"{key} is '{value}'; it must be one of {', '.join(values)}."
            yield Problem("choices", sentence, ({key: close},), key)
