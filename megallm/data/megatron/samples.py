"""Pretraining samples: one or several indexed datasets, split, ordered and blended as Megatron-LM
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megallm.base.errors import DataError, UsageError
from megallm.data.indexed.dataset import IndexedDataset, check_tokens
from megallm.data.megatron import blend, order


@dataclass(frozen=True)
class DocumentSpan:
    """A stretch of one document that a sample reads: positions begin to end of `document` in
    `prefix`.
    """

    prefix: str
    document: int
    begin: int
    end: int


class SampleDataset(Protocol):
    """What the loader needs: `sample(i)` is int64 [seq_len + 1] for i in range(len)."""

    def __len__(self) -> int: ...

    def sample(self, i: int) -> np.ndarray: ...

    def spans(self, i: int) -> list[DocumentSpan]: ...

    def where(self, i: int) -> dict[str, Any]: ...


class SourceSplit:
    """One split of one indexed dataset in Megatron's order; see `order.Order` for the arrays."""

    def __init__(
        self,
        data: IndexedDataset,
        arrays: order.Order,
        seq_len: int,
        vocab_size: int | None,
        epochs: int = 1,
    ) -> None:
        self.data, self.order, self.seq_len, self.vocab_size = data, arrays, seq_len, vocab_size
        self.epochs = epochs  # passes over the split that `arrays` holds

    def __len__(self) -> int:
        return len(self.order)

    def sample(self, i: int) -> np.ndarray:
        """Returns tokens of item i, int64 [seq_len + 1]. Errors: `DataError` for an id outside the
        vocabulary.
        """
        out = np.empty(self.seq_len + 1, np.int64)
        at = 0
        for sequence, offset, length in self._pieces(i):
            tokens = self.data.get(sequence, offset, length)
            if self.vocab_size is not None:
                check_tokens(
                    self.data, self.data.token_index(sequence, offset), tokens, self.vocab_size
                )
            out[at : at + length] = tokens
            at += length
        return out

    def spans(self, i: int) -> list[DocumentSpan]:
        """Returns the documents that item i reads, in order."""
        out = []
        for sequence, offset, length in self._pieces(i):
            if length:
                document, begin = self.data.place_of(self.data.token_index(sequence, offset))
                out.append(DocumentSpan(self.data.prefix, document, begin, begin + length))
        return out

    def where(self, i: int) -> dict[str, Any]:
        """Returns {source, epoch, spans}; the epoch is how often the shuffled list had been gone
        through before item i.
        """
        first = int(self.order.sample[int(self.order.shuffle[_checked(i, len(self))])][0])
        epoch = first // max(1, len(self.order.document) // self.epochs)
        spans = [[span.document, span.begin, span.end] for span in self.spans(i)]
        return {"source": self.data.prefix, "epoch": epoch, "spans": spans}

    def _pieces(self, i: int) -> list[tuple[int, int, int]]:
        """(sequence, offset, length) of the stretches of item i."""
        j = int(self.order.shuffle[_checked(i, len(self))])
        (first, begin), (last, end) = (
            self.order.sample[j].tolist(),
            self.order.sample[j + 1].tolist(),
        )
        sequences = self.order.document[first : last + 1].tolist()
        if first == last:
            return [(sequences[0], begin, end + 1 - begin)]
        lengths = [int(self.data.lengths[sequence]) for sequence in sequences]
        middle = [(s, 0, n) for s, n in zip(sequences[1:-1], lengths[1:-1], strict=True)]
        return [(sequences[0], begin, lengths[0] - begin), *middle, (sequences[-1], 0, end + 1)]


class Blend:
    """A mixture: item i is sample `sample_of[i]` of source `source_of[i]`."""

    def __init__(
        self, sources: list[SourceSplit], source_of: np.ndarray, sample_of: np.ndarray
    ) -> None:
        self.sources, self.source_of, self.sample_of = sources, source_of, sample_of

    def __len__(self) -> int:
        return len(self.source_of)

    def sample(self, i: int) -> np.ndarray:
        """Returns tokens of item i, int64 [seq_len + 1]."""
        return self.sources[self.source_of[_checked(i, len(self))]].sample(int(self.sample_of[i]))

    def spans(self, i: int) -> list[DocumentSpan]:
        """Returns the documents that item i reads, in order."""
        return self.sources[self.source_of[_checked(i, len(self))]].spans(int(self.sample_of[i]))

    def where(self, i: int) -> dict[str, Any]:
        """Returns {source, epoch, spans} of item i."""
        return self.sources[self.source_of[_checked(i, len(self))]].where(int(self.sample_of[i]))


def _checked(i: int, length: int) -> int:
    if not 0 <= i < length:
        raise IndexError(f"There is no sample {i}: the split has {length}.")
    return i


@dataclass(frozen=True)
class SampleOptions:
    """How samples are cut and drawn.

    surplus: samples built of each source beyond its share, as a part of it. None: Megatron-LM's
    0.005, and none for a source alone. There `--data-path A` has none either, but
    `--data-path 1.0 A` has.
    """

    seq_len: int
    seed: int
    surplus: float | None = None
    vocab_size: int | None = None  # tokens that are read are checked against it


def build_samples(
    sources: Mapping[str, float | None],
    split: str,
    which: str,
    num_samples: int | None,
    how: SampleOptions,
) -> SourceSplit | Blend:
    """Returns the samples of split `which` ("train", "valid", "test") of a corpus, in Megatron's
    order.

    sources: prefix -> weight, or None for all of them: several are then one epoch of each, drawn in
    proportion to their sizes. split: "90,5,5"; num_samples: how many will be read (None: one epoch
    of each source, all of it). The result may hold more samples than asked, as Megatron's does.
    Errors: `DataError` for missing, damaged or too small files, `UsageError` for split and weights.
    """
    if how.seq_len < 1 or (num_samples is not None and num_samples < 0):
        raise UsageError(
            "data.seq_len must be >= 1 and the number of samples >= 0; "
            f"got {how.seq_len} and {num_samples}."
        )
    if not sources:
        raise UsageError("data.sources is empty: give at least one PREFIX: WEIGHT.")
    if None in sources.values():
        return _build_unweighted(sources, split, which, num_samples, how)
    weights = blend.normalise(list(sources.values()))
    if num_samples is None or (len(sources) == 1 and how.surplus is None):
        built = [_build_source(prefix, split, which, num_samples, how) for prefix in sources]
        return _all_of(built)
    surplus = blend.SURPLUS if how.surplus is None else how.surplus
    sizes = blend.source_sizes(weights, num_samples, surplus)
    pairs = zip(sources, sizes, strict=True)
    built = [_build_source(prefix, split, which, size, how) for prefix, size in pairs]
    # Megatron-LM divides the weights by their sum twice: a last bit may change, and so who wins a
    # tie.
    total = sum(blend.source_sizes(weights, num_samples, 0.0))
    return _blended(built, blend.normalise(weights), total, "raise data.surplus, such as tenfold")


def _build_unweighted(
    sources: Mapping[str, float | None],
    split: str,
    which: str,
    num_samples: int | None,
    how: SampleOptions,
) -> SourceSplit | Blend:
    given = [prefix for prefix, weight in sources.items() if weight is not None]
    if given:
        raise UsageError(
            f"data.sources has a weight for {given[0]}, but none for others: give all of them one, "
            "or none."
        )
    if len(sources) == 1:
        return _build_source(*sources, split, which, num_samples, how)
    built = [_build_source(prefix, split, which, None, how) for prefix in sources]
    lengths = [len(source) for source in built]
    if num_samples is None:
        return _all_of(built)
    if num_samples > sum(lengths):
        raise DataError(
            f"data.sources without weights are read once: split '{which}' of {split} holds "
            f"{sum(lengths)} samples, and {num_samples} are wanted. Give each source a weight, or "
            "ask for fewer steps (or evaluations)."
        )
    return _blended(built, blend.normalise(lengths), num_samples, "give each source a weight")


def _build_source(
    prefix: str, split: str, which: str, num_samples: int | None, how: SampleOptions
) -> SourceSplit:
    data = IndexedDataset(prefix)
    sequences = np.arange(*order.split_range(split, which, len(data)), dtype=np.int32)
    try:
        arrays = order.build_order(data.lengths, sequences, num_samples, how.seq_len, how.seed)
    except DataError as error:
        raise DataError(f"{prefix}, split '{which}' of {split}: {error}") from None
    epochs = max(1, len(arrays.document) // max(1, len(sequences)))
    return SourceSplit(data, arrays, how.seq_len, how.vocab_size, epochs)


def _all_of(built: list[SourceSplit]) -> SourceSplit | Blend:
    if len(built) == 1:
        return built[0]
    return Blend(built, *blend.exhaustive([len(source) for source in built]))


def _blended(
    built: list[SourceSplit], weights: np.ndarray, size: int, remedy: str
) -> SourceSplit | Blend:
    """Returns a blend of `size` items; `remedy` is for one that takes more of a source than was
    built.

    Megatron-LM refuses that too. Errors: `DataError`.
    """
    if len(built) == 1:
        return built[0]
    drawn = Blend(built, *blend.blend(weights, size))
    counts = np.bincount(drawn.source_of, minlength=len(built)).tolist()
    for source, taken in zip(built, counts, strict=True):
        if taken > len(source):
            raise DataError(
                f"{source.data.prefix}: the blend takes {taken} samples of it, but {len(source)} "
                f"were built: {remedy}."
            )
    return drawn
