"""Perplexity per word under an n-gram model (as in CCNet, Wenzek et al. 2020), or under any scorer
of the user's.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megallm.base import optional
from megallm.base.errors import DataError, UsageError
from megallm.curate.arpa import ArpaModel
from megallm.curate.config import PerplexityConfig
from megallm.curate.document import KEEP, DocumentBatch, Verdict, drop
from megallm.curate.kneser_ney import sentences
from megallm.curate.language import sample_windows

Scorer = Callable[[list[str]], Sequence[float]]


def ngram_scorer(path: str) -> Scorer:
    """Returns perplexity per word (the end of each line counts as one) of texts; 1 for a text
    without words.

    kenlm reads ARPA and its own binary files; without kenlm ARPA files are read in Python.
    """
    if not Path(path).is_file():
        raise DataError(
            f"perplexity.model: {path} does not exist; `megallm curate train-lm` makes one."
        )
    if optional.available("kenlm"):
        kenlm = optional.need("kenlm", "give an ARPA file")
        try:
            score = kenlm.Model(str(path)).score
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"perplexity.model: {path} cannot be read by kenlm: {error}."
            ) from error
    else:
        score = ArpaModel(path).score

    def perplexities(texts: list[str]) -> list[float]:
        out = []
        for text in texts:
            lines = sentences(text)
            words = sum(line.count(" ") + 2 for line in lines)
            out.append(10.0 ** (-sum(score(line) for line in lines) / words) if words else 1.0)
        return out

    return perplexities


def load_scorer(spec: str) -> Scorer:
    """Returns the function of `file.py:function`. Errors: `UsageError`."""
    path, colon, name = spec.rpartition(":")
    if not colon or not Path(path).is_file():
        raise UsageError(
            f"perplexity.scorer is '{spec}'; it must be file.py:function with a file that exists."
        )
    module_spec = importlib.util.spec_from_file_location(f"megallm_scorer_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(
            f"perplexity.scorer: {path} is not a Python file; its name must end in .py."
        )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # boundary: whatever the user's file raises
        raise UsageError(f"perplexity.scorer: {path} cannot be loaded: {_told(error)}.") from error
    function = vars(module).get(name)
    if not callable(function):
        raise UsageError(f"perplexity.scorer: {path} has no function '{name}'.")
    return function


def _told(error: BaseException) -> str:
    """Returns the error of a user's file, with the line where it came from."""
    places = traceback.extract_tb(error.__traceback__)
    where = f" at {places[-1].filename}:{places[-1].lineno}" if places else ""
    return f"{type(error).__name__}: {error}{where}"


class Perplexity:
    """The step `perplexity`: drops `perplexity_high` and `perplexity_low`."""

    name = "perplexity"

    def __init__(self, config: PerplexityConfig) -> None:
        self.config = config
        self.marks = {"perplexity.per_word": (config.min_perplexity, config.max_perplexity)}
        self._score = (
            load_scorer(config.scorer) if config.scorer else ngram_scorer(config.model or "")
        )

    def _values(self, texts: list[str]) -> np.ndarray:
        """Perplexities, float64 [texts]; infinite ones become the largest number. Errors:
        `UsageError`, `DataError`.
        """
        try:
            found = self._score(texts)
        except Exception as error:  # boundary: whatever the user's function raises
            raise UsageError(
                f"perplexity.scorer {self.config.scorer} failed: {_told(error)}."
            ) from error
        try:
            values = np.asarray(list(found), np.float64)
        except (TypeError, ValueError):
            values = np.full(1, np.nan)
        if values.shape != (len(texts),) or np.isnan(values).any():
            raise DataError(
                f"perplexity.scorer {self.config.scorer} returned {str(found)[:80]} for "
                f"{len(texts)} texts; it must return one number a text, and none that is NaN."
            )
        return np.nan_to_num(values)

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        texts = [
            sample_windows(document.text, self.config.sample_chars) for document in batch.documents
        ]
        values = self._values(texts)
        batch.record("perplexity.per_word", values)
        verdicts = []
        for value in values.tolist():
            if value > self.config.max_perplexity:
                verdicts.append(drop("perplexity_high", perplexity=round(value, 2)))
            elif value < self.config.min_perplexity:
                verdicts.append(drop("perplexity_low", perplexity=round(value, 2)))
            else:
                verdicts.append(KEEP)
        return verdicts
