"""Megatron-LM's sample order: which tokens sample i of one source covers, as three index arrays.

Pure: lengths and integers in, arrays out. The arrays are rebuilt by every process rather than
cached on disk: 10M sequences and 10M samples take about a second, and no cache can be torn, stale
or raced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megallm.base import extension
from megallm.base.errors import DataError, UsageError

SPLITS = ("train", "valid", "test")
_OVERLAP = 1  # a sample holds seq_len + 1 tokens: the last label is the next sample's first token
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Order:
    """Index arrays of one source.

    document: int32 [E * sequences], the sequences in shuffled order.
    sample: int32 or int64 [n + 1, 2], rows (position in `document`, token offset in that sequence).
    shuffle: uint32 or int64 [n]; item i is sample shuffle[i] and covers the tokens from
    sample[shuffle[i]] to sample[shuffle[i] + 1] inclusive.
    """

    document: np.ndarray
    sample: np.ndarray
    shuffle: np.ndarray

    def __len__(self) -> int:
        return len(self.shuffle)


def parse_split(text: str) -> tuple[float, float, float]:
    """Returns the fractions of "90,5,5" (train, valid, test): float64, missing ones 0, normalised
    to sum 1.
    """
    try:
        parts = [float(part) for part in re.split(r"[,/]", text)]
    except ValueError:
        parts = []
    if (
        not 1 <= len(parts) <= len(SPLITS)
        or not all(0 <= p < float("inf") for p in parts)
        or sum(parts) <= 0
    ):
        raise UsageError(
            f"data.split '{text}' is not usable: give one to three numbers >= 0 separated by "
            "commas (train,valid,test), for example 90,5,5."
        )
    parts += [0.0] * (len(SPLITS) - len(parts))
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


def split_range(text: str, which: str, num_sequences: int) -> tuple[int, int]:
    """Returns the half-open range of sequences that split `which` of `text` holds."""
    if which not in SPLITS:
        raise UsageError(f"There is no split '{which}'; accepted: {', '.join(SPLITS)}.")
    ends = [0.0]
    for fraction in parse_split(text):
        ends.append(ends[-1] + fraction)
    at = SPLITS.index(which)
    return int(round(ends[at] * float(num_sequences))), int(
        round(ends[at + 1] * float(num_sequences))
    )


def num_epochs(tokens: int, num_samples: int | None, seq_len: int) -> int:
    """Returns the smallest number of passes over `tokens` tokens that gives `num_samples` samples
    (None: one pass).
    """
    if num_samples is None:
        return 1
    return max(1, -(-(num_samples * seq_len + _OVERLAP) // tokens))


def build_order(
    lengths: np.ndarray,
    sequences: Sequence[int] | np.ndarray,
    num_samples: int | None,
    seq_len: int,
    seed: int,
    native: bool | None = None,
) -> Order:
    """Returns index arrays for at least `num_samples` samples (None: one epoch) out of `sequences`.

    lengths: int32 [all sequences of the file], tokens; sequences: indices into it.
    Errors: `DataError` when the sequences cannot fill a single sample.
    """
    sequences = np.asarray(sequences, dtype=np.int32)
    tokens = int(lengths[sequences].sum(dtype=np.int64))
    if tokens == 0 or (num_samples is None and tokens < seq_len + _OVERLAP):
        raise DataError(
            f"{len(sequences)} sequences with {tokens} tokens cannot fill one sample of {seq_len} "
            "+ 1 tokens: use a larger split, more data or a smaller data.seq_len."
        )
    epochs = num_epochs(tokens, num_samples, seq_len)
    before_last = _samples_before_last_epoch(tokens, epochs, num_samples, seq_len)
    random = np.random.RandomState(seed)
    document = _shuffled_documents(sequences, epochs, before_last is not None, random)
    n = (epochs * tokens - _OVERLAP) // seq_len
    sample = build_sample_index(lengths, document, seq_len, n, native)
    return Order(document, sample, _shuffled_samples(n, before_last, random))


def _samples_before_last_epoch(
    tokens: int, epochs: int, num_samples: int | None, seq_len: int
) -> int | None:
    """Number of samples to shuffle apart from the final epoch's, or None to shuffle all together.

    The final epoch stands apart when less than 80 % of it will be read.
    """
    if num_samples is None or epochs == 1:
        return None
    before_last = ((epochs - 1) * tokens - _OVERLAP) // seq_len
    per_epoch = (tokens - _OVERLAP) // seq_len
    return before_last if num_samples - before_last < int(0.80 * per_epoch) else None


def _shuffled_documents(
    sequences: np.ndarray, epochs: int, last_apart: bool, random: np.random.RandomState
) -> np.ndarray:
    if last_apart:
        first = _shuffled_documents(sequences, epochs - 1, False, random)
        return np.concatenate((first, _shuffled_documents(sequences, 1, False, random)))
    document = np.tile(sequences, epochs)
    random.shuffle(document)
    return document


def _shuffled_samples(n: int, before_last: int | None, random: np.random.RandomState) -> np.ndarray:
    shuffle = np.arange(n, dtype=np.uint32 if n < 2**32 - 2 else np.int64)
    if before_last is None:
        random.shuffle(shuffle)
    else:
        random.shuffle(shuffle[:before_last])
        random.shuffle(shuffle[before_last:])
    return shuffle


def build_sample_index(
    lengths: np.ndarray,
    document: np.ndarray,
    seq_len: int,
    num_samples: int,
    native: bool | None = None,
) -> np.ndarray:
    """Returns where each sample begins: [num_samples + 1, 2], int32 unless a count passes 2^31 - 1.

    `native` as in `base.extension.index`.
    """
    wide = max(len(document), int(lengths.max(initial=0))) > _INT32_MAX
    module = extension.index(native)
    if module is not None:
        lengths = np.require(lengths, np.int32, ["C", "A"])  # a view of an .idx file is not aligned
        return module.build_sample_index(lengths, document, seq_len, num_samples, wide)
    ends = np.cumsum(lengths[document], dtype=np.int64)
    first = np.arange(num_samples + 1, dtype=np.int64) * seq_len
    at = np.searchsorted(ends, first, side="right")
    out = np.empty((num_samples + 1, 2), dtype=np.int64 if wide else np.int32)
    out[:, 0] = at
    out[:, 1] = first - np.where(at > 0, ends[at - 1], 0)
    out[0] = 0
    return out
