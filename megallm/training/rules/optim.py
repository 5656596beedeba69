"""Rules about the optimizer and its schedule. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megallm.optim.config import CHOICES, GroupConfig, OptimConfig, unused
from megallm.optim.groups import pattern_problem
from megallm.run.config import JobConfig
from megallm.training.rules.problem import Problem, Rules


def optimizer(config: JobConfig) -> Iterator[Problem]:
    """Yields what is wrong with `optim` and with the steps that its schedule spans."""
    optim, steps = config.optim, config.train.steps
    if optim.betas is not None and not all(0 <= beta < 1 for beta in optim.betas):
        sentence = f"optim.betas are {list(optim.betas)}; each must be at least 0 and less than 1."
        yield Problem("betas", sentence, ({"optim.betas": None},))
    if optim.rule in CHOICES["rule"] and optim.schedule in CHOICES["schedule"]:
        yield from _unused_keys(optim)
        yield from _rates(optim.resolve())
    if steps >= 1 and optim.warmup_steps >= steps:
        sentence = f"optim.warmup_steps {optim.warmup_steps} must be less than train.steps {steps}."
        yield Problem(
            "warmup",
            sentence,
            ({"optim.warmup_steps": steps - 1}, {"train.steps": optim.warmup_steps + 1}),
        )
    stop_at = config.train.stop_at
    if stop_at is not None and stop_at > steps >= 1:
        sentence = f"train.stop_at {stop_at} lies beyond train.steps {steps}."
        yield Problem("stop_at", sentence, ({"train.stop_at": steps}, {"train.steps": stop_at}))
    for number, group in enumerate(optim.groups):
        yield from _group(optim.groups, number, group)


def _unused_keys(optim: OptimConfig) -> Iterator[Problem]:
    for key, who, reads in unused(optim):
        known = f"it reads {', '.join(reads)}" if reads else "it has no settings of its own"
        yield Problem(
            "unused",
            f"optim.{key} is given, but optim.{who} does not read it; {known}.",
            ({f"optim.{key}": None},),
        )


def _rates(optim: OptimConfig) -> Iterator[Problem]:
    """How the values of a resolved configuration go together."""
    if optim.min_lr > optim.lr > 0:
        sentence = f"optim.min_lr {optim.min_lr:g} is greater than optim.lr {optim.lr:g}."
        yield Problem("min_lr", sentence, ({"optim.min_lr": optim.lr}, {"optim.lr": optim.min_lr}))
    if optim.nesterov and optim.momentum == 0:
        sentence = "optim.nesterov looks ahead along a momentum, but optim.momentum is 0."
        yield Problem("nesterov", sentence, ({"optim.nesterov": False}, {"optim.momentum": 0.9}))


def _group(groups: tuple[GroupConfig, ...], number: int, group: GroupConfig) -> Iterator[Problem]:
    """Faults of one group; whether it matches anything is known when there is a model."""
    at = f"optim.groups[{number}]"
    trouble = pattern_problem(group.match)
    if trouble is not None:
        without = {"optim.groups": (*groups[:number], *groups[number + 1 :])}
        yield Problem("groups", f"{at}.match {trouble}.", (without,))
    for key, value in (("lr_scale", group.lr_scale), ("weight_decay", group.weight_decay)):
        if value is not None and value < 0:
            mended = dataclasses.replace(group, **{key: 0.0})
            remedy = {"optim.groups": (*groups[:number], mended, *groups[number + 1 :])}
            yield Problem("groups", f"{at}.{key} is {value:g}; it must be at least 0.", (remedy,))


RULES = Rules(given=(optimizer,))
