"""A quality classifier: logistic regression on hashed words and word pairs, or a fastText model
brought along.

The recipe is DCLM's (Li et al. 2024, 4.4): good pages against a sample of the crawl. Bag-of-n-grams
models of this kind are linear, so the trainer here is numpy's and exactly repeatable; one score is
one gather and one sum.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megallm.base import optional, rng
from megallm.base.errors import DataError, UsageError
from megallm.base.files import atomic_path, writing
from megallm.base.progress import Progress, quiet
from megallm.curate import readers
from megallm.curate.config import ClassifierConfig
from megallm.curate.document import KEEP, DocumentBatch, Verdict, drop
from megallm.curate.text import Analysis, sorted_set

BITS = 20  # of the hashed feature space
_BATCH = 64
_LEARNING_RATE = 0.5
_EPOCHS = 5
_HELD_OUT = 0.1
_MAX_CHARS = 20_000  # of a document in training


def features(analysis: Analysis, bits: int = BITS) -> tuple[np.ndarray, np.ndarray]:
    """Returns each document's set of hashed words and pairs, int64 laid end to end, and offsets
    [documents + 1].
    """
    words = analysis.words
    pairs, first = words.ngrams(2)
    hashes = np.concatenate([words.hashes, pairs])
    documents = np.concatenate([words.documents, words.documents[first]])
    packed = sorted_set(
        documents.astype(np.uint64) << np.uint64(bits) | hashes >> np.uint64(64 - bits)
    )
    offsets = np.searchsorted(
        packed, np.arange(len(analysis) + 1, dtype=np.uint64) << np.uint64(bits)
    )
    return (packed & np.uint64((1 << bits) - 1)).astype(np.int64), offsets


def _margins(
    weights: np.ndarray, bias: float, index: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    sums = np.zeros(len(offsets))
    np.cumsum(np.bincount(_rows(offsets), weights[index], minlength=len(offsets) - 1), out=sums[1:])
    return np.diff(sums) / np.sqrt(np.maximum(np.diff(offsets), 1)) + bias


def _rows(offsets: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))


class LinearModel:
    """Weights of the hashed features and a bias; a score is a probability of `good`."""

    def __init__(self, weights: np.ndarray, bias: float, about: dict[str, Any]) -> None:
        self.weights, self.bias, self.about = weights, bias, about

    def scores(self, analysis: Analysis) -> np.ndarray:
        """Returns the scores, float64 [documents]."""
        return _sigmoid(_margins(self.weights, self.bias, *features(analysis)))

    def save(self, path: str | Path) -> None:
        """Write one .npz file, whole or not at all; no pickle in it."""
        with writing(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                weights=self.weights.astype(np.float32),
                bias=self.bias,
                about=json.dumps(self.about),
            )

    @classmethod
    def load(cls, path: str | Path) -> LinearModel:
        """Errors: `DataError`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                model = cls(
                    file["weights"].astype(np.float64),
                    float(file["bias"]),
                    json.loads(str(file["about"])),
                )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} is not a classifier of `megallm curate train-classifier` and not a "
                f"fastText file: {error}."
            ) from error
        if model.weights.shape != (1 << BITS,):
            raise DataError(
                f"{path} has {model.weights.shape} weights, want {1 << BITS}; train it again."
            )
        return model


def train_classifier(
    good: Sequence[str],
    bad: Sequence[str],
    key: str = "text",
    seed: int = 0,
    progress: Progress = quiet,
) -> LinearModel:
    """Train on files of good and of bad documents; a tenth is held out and measured into `about`.

    Errors: `DataError` for files that cannot be read, `UsageError` when a side has fewer than ten
    documents.
    """
    progress("reading", 0, None)
    texts = [
        [text[:_MAX_CHARS] for text in readers.document_texts(side, key)] for side in (good, bad)
    ]
    for name, side in zip(("--good", "--bad"), texts, strict=True):
        if len(side) < 10:
            raise UsageError(
                f"{name} has {len(side)} documents; a classifier needs at least 10 of each side."
            )
    every = texts[0] + texts[1]
    labels = np.repeat([1.0, 0.0], [len(texts[0]), len(texts[1])])
    held = rng.uniform(rng.key_of(seed, "classifier", "held out"), 0, len(every)) < _HELD_OUT
    weights, bias = _fit([every[i] for i in np.flatnonzero(~held)], labels[~held], seed, progress)
    model = LinearModel(weights.astype(np.float32).astype(np.float64), bias, {})
    scores = np.concatenate(
        [model.scores(Analysis(part)) for part in _parts([every[i] for i in np.flatnonzero(held)])]
    )
    model.about = {"good": len(texts[0]), "bad": len(texts[1]), "seed": seed} | evaluate_classifier(
        scores, labels[held]
    )
    return model


def _parts(texts: list[str]) -> Iterator[list[str]]:
    for begin in range(0, len(texts), _BATCH):
        yield texts[begin : begin + _BATCH]


def _fit(
    texts: list[str], labels: np.ndarray, seed: int, progress: Progress = quiet
) -> tuple[np.ndarray, float]:
    """AdaGrad (Duchi et al. 2011) over small batches in keyed order; both classes weigh the same in
    all.
    """
    weights, squares = np.zeros(1 << BITS), np.full(1 << BITS, 1e-8)
    bias, bias_square = 0.0, 1e-8
    balance = np.where(labels > 0, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    for epoch in range(_EPOCHS):
        order = rng.permutation(rng.key_of(seed, "classifier", "epoch", epoch), len(texts))
        for begin in range(0, len(texts), _BATCH):
            progress("learning", epoch * len(texts) + begin, _EPOCHS * len(texts), "documents")
            chosen = order[begin : begin + _BATCH]
            index, offsets = features(Analysis([texts[i] for i in chosen]))
            error = (
                (_sigmoid(_margins(weights, bias, index, offsets)) - labels[chosen])
                * balance[chosen]
                / len(chosen)
            )
            per_feature = (error / np.sqrt(np.maximum(np.diff(offsets), 1)))[_rows(offsets)]
            touched, place = np.unique(index, return_inverse=True)
            gradient = np.bincount(place, per_feature)
            squares[touched] += gradient**2
            weights[touched] -= _LEARNING_RATE * gradient / np.sqrt(squares[touched])
            bias_square += error.sum() ** 2
            bias -= _LEARNING_RATE * error.sum() / np.sqrt(bias_square)
    return weights, float(bias)


def evaluate_classifier(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns precision and recall of `good` at 0.5, and the area under the ROC curve
    (Mann-Whitney).
    """
    chosen, good = scores >= 0.5, labels > 0
    hits = int((chosen & good).sum())
    pairs = max(int(good.sum()) * int((~good).sum()), 1)
    order = np.argsort(np.concatenate([scores[good], scores[~good]]), kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(1, len(order) + 1)
    area = (rank[: int(good.sum())].sum() - good.sum() * (good.sum() + 1) / 2) / pairs
    return {
        "held_out": len(scores),
        "precision": round(hits / max(int(chosen.sum()), 1), 4),
        "recall": round(hits / max(int(good.sum()), 1), 4),
        "auc": round(float(area), 4),
    }


class Classifier:
    """The step `classifier`: notes `quality_score`, drops `low_quality_score`."""

    name = "classifier"

    def __init__(self, config: ClassifierConfig) -> None:
        self.config = config
        self.marks = {"classifier.score": (config.min_score,)}
        assert config.model is not None  # `config.check_config` asks for it
        self._linear = self._fasttext = None
        if config.model.endswith((".bin", ".ftz")):
            fasttext = optional.need("fasttext", "use a model of `megallm curate train-classifier`")
            try:
                self._fasttext = fasttext.load_model(config.model)
            except ValueError as error:
                raise DataError(
                    f"classifier.model: {config.model} cannot be loaded: {error}."
                ) from error
        else:
            self._linear = LinearModel.load(config.model)

    def _scores(self, batch: DocumentBatch) -> np.ndarray:
        if self._linear is not None:
            return self._linear.scores(batch.analysis)
        found = [
            self._fasttext.predict(document.text.replace("\n", " "), k=-1)
            for document in batch.documents
        ]
        return np.array(
            [dict(zip(*pair, strict=True)).get(self.config.label, 0.0) for pair in found]
        )

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        scores = self._scores(batch)
        batch.record("classifier.score", scores)
        verdicts = []
        for document, score in zip(batch.documents, scores.tolist(), strict=True):
            document.meta["quality_score"] = round(score, 4)
            low = score < self.config.min_score
            verdicts.append(drop("low_quality_score", score=round(score, 4)) if low else KEEP)
        return verdicts
