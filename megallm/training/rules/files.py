"""Rules about paths. Pure, but for looking whether a file is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from megallm.base.paths import is_placeholder
from megallm.run.config import JobConfig
from megallm.training.rules.problem import Problem, Rules


def placeholders(paths: Iterable[tuple[str, str | None]]) -> Iterator[Problem]:
    """Yields (key, path) that a script's author left to be filled in; a file that is really called
    so is none.
    """
    for key, path in paths:
        there = path and any(Path(f"{path}{end}").exists() for end in ("", ".idx"))
        if path and is_placeholder(path) and not there:
            sentence = f"{key} {path} stands for something that is to be filled in; give the real "
            yield Problem("placeholder", f"{sentence}one.")


def unfilled_paths(config: JobConfig) -> Iterator[Problem]:
    """Yields the placeholders among the paths that every trainer has."""
    model = config.model
    paths = [("run.dir", config.run.dir), ("model.hf", model.hf), ("model.init", model.init)]
    yield from placeholders(paths)


def two_starts(config: JobConfig) -> Iterator[Problem]:
    """Yields two folders that the first weights would come from."""
    if config.model.hf is not None and config.model.init is not None:
        sentence = "model.hf and model.init both name the weights to start from: keep one."
        fixes = ({"model.init": None}, {"model.hf": None})
        yield Problem("starts", sentence, fixes, "model.init")


RULES = Rules(given=(unfilled_paths, two_starts))
