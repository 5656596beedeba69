"""Dividing an indexed dataset, and figures about it; both stream through it in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from megallm.base import rng
from megallm.base.errors import UsageError
from megallm.base.progress import Progress, quiet
from megallm.data.indexed import meta, provenance
from megallm.data.indexed.dataset import IndexedDataset, IndexedWriter
from megallm.data.stream import packing

_AT_ONCE = 1 << 20  # documents or tokens looked at together
_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
_SAMPLE = 20_000  # documents of which the packing figures are made


def parse_shares(text: str) -> list[float]:
    """Returns the numbers of "98,1,1". Errors: `UsageError`."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        raise UsageError(
            f"--shares {text} is not usable: give numbers >= 0 separated by commas, such as 98,1,1."
        )
    return shares


def split_dataset(
    prefix: str | os.PathLike[str],
    output: str,
    shares: Sequence[float],
    seed: int | None = None,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Write the documents of a dataset to `OUTPUT-0`, `OUTPUT-1`, ...; counts of each.

    Without a seed each part is a stretch of the file; with one, document d goes where the number d
    of the seed's stream falls, so a document that is added later moves none. The order inside a
    part is that of the file.
    """
    data = IndexedDataset(prefix)
    total, ends = data.num_documents, np.cumsum(np.asarray(shares) / sum(shares))
    found = []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(f"{output}-{part}", data.dtype))
            for part in range(len(shares))
        ]
        edges = np.round(ends * total).astype(np.int64)
        side_car = meta.read_meta(prefix)
        joined = [provenance.MergedProvenance() for _ in shares]
        for low in range(0, total, _AT_ONCE):
            numbers = np.arange(low, min(low + _AT_ONCE, total))
            if seed is None:
                part_of = np.searchsorted(edges, numbers, side="right")
            else:
                draws = rng.uniform(rng.key_of(seed, "split"), low, len(numbers))
                part_of = np.searchsorted(ends, draws, side="right")
            part_of = np.minimum(part_of, len(shares) - 1)
            runs = np.flatnonzero(np.diff(part_of, prepend=-1, append=-1))
            for begin, end in zip(runs[:-1].tolist(), runs[1:].tolist(), strict=True):
                progress("dividing", low + begin, total, "documents")
                writers[part_of[begin]].add_documents(data, low + begin, low + end)
                joined[part_of[begin]].add((side_car or {}).get("origins"), low + begin, low + end)
        for writer, lines in zip(writers, joined, strict=True):
            counts = {
                "documents": writer.num_documents, "sequences": writer.num_sequences, "tokens": writer.num_tokens,
            }  # fmt: skip
            kept = {"split_from": os.fspath(prefix), "origins": lines.origins(), **counts}
            same = {
                key: side_car[key]
                for key in ("tokenizer", "add_special_tokens")
                if key in (side_car or ())
            }
            writer.commit({**same, **kept} if side_car else None, meta.kept_tokenizer(prefix))
            found.append({"prefix": writer.prefix, **counts})
    return found


def stats(
    prefix: str | os.PathLike[str], seq_len: int = 2048, progress: Progress = quiet
) -> dict[str, Any]:
    """Returns figures about a dataset: counts, lengths of documents, how full rows of `seq_len`
    get, most frequent ids.
    """
    if seq_len < 1:
        raise UsageError(f"--seq-len {seq_len} must be at least 1.")
    data = IndexedDataset(prefix)
    lengths = np.empty(data.num_documents, np.int64)
    for low in range(0, data.num_documents, _AT_ONCE):
        numbers = np.arange(low, min(low + _AT_ONCE, data.num_documents) + 1)
        lengths[low : low + _AT_ONCE] = np.diff(data.document_starts(numbers))
    counts: np.ndarray = np.zeros(0, np.int64)
    for low in range(0, data.num_tokens, _AT_ONCE):
        progress("counting", low, data.num_tokens, "tokens")
        more = np.bincount(data.tokens(low, min(_AT_ONCE, data.num_tokens - low)))
        counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
        counts[: len(more)] += more
    top = np.argsort(-counts, kind="stable")[:10]
    full = lengths[lengths > 0]
    quantiles = (
        np.percentile(full, _PERCENTILES, method="lower").astype(int).tolist() if full.size else []
    )
    return {
        "prefix": data.prefix, "dtype": data.dtype.name, "documents": data.num_documents, "sequences": len(data),
        "tokens": data.num_tokens, "empty_documents": int((lengths == 0).sum()),
        "shortest": int(full.min(initial=2**62)) if full.size else 0, "longest": int(full.max(initial=0)),
        "mean_length": round(float(full.mean()), 2) if full.size else 0.0,
        "length_percentiles": dict(zip(map(str, _PERCENTILES), quantiles, strict=False)),
        "different_tokens": int((counts > 0).sum()),
        "most_frequent": {int(i): int(counts[i]) for i in top if counts[i]},
        "tokenizer": (meta.read_meta(prefix) or {}).get("tokenizer"), **_packing(full, seq_len),
    }  # fmt: skip


def _packing(lengths: np.ndarray, seq_len: int) -> dict[str, Any]:
    """Of a sample: how full rows get by best fit, and how many documents that fit into a row each
    way cuts.
    """
    places = np.linspace(0, max(0, len(lengths) - 1), min(_SAMPLE, len(lengths))).astype(int)
    some = lengths[places].tolist()
    sizes = [
        end - begin for length in some for begin, end in packing.split_document(length, seq_len)
    ]
    rows = packing.best_fit(sizes, seq_len)
    chunks = packing.concatenate(some, seq_len)
    fits = sum(length <= seq_len for length in some)
    cut = {
        i for row in chunks for i, low, high in row if some[i] <= seq_len and high - low < some[i]
    }
    return {
        "seq_len": seq_len, "best_fit_fill": round(sum(some) / max(1, len(rows) * seq_len), 4),
        "concat_cuts_fraction": round(len(cut) / max(1, fits), 4), "longer_than_a_row": len(some) - fits,
    }  # fmt: skip
