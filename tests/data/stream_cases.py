"""Small corpora and plans for the tests of the stream, and the check that every token is read exactly once."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from megallm.data.indexed.dataset import IndexedWriter
from megallm.data.stream.plan import Reading, StreamPlan, StreamSegment
from megallm.data.stream.source import DocumentSource, PackedRow
from megallm.data.stream.stream import Stream


def write(prefix: Path, documents: list[np.ndarray], dtype: str = "<u2") -> str:
    """A dataset of one sequence per document; an empty document has none."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for tokens in documents:
            full = len(tokens) > 0
            writer.add(np.asarray(tokens, dtype), np.array([len(tokens)] * full, np.int32), np.array([int(full)]))
        writer.commit()
    return str(prefix)


def corpora(folder: Path, seed: int = 0) -> dict[str, str]:
    """Three sources: short documents with empty ones among them, ragged ones, and one longer than any window."""
    random = np.random.RandomState(seed)
    lengths = {
        "short": random.randint(0, 60, 150), "ragged": random.lognormal(3, 1, 90).astype(int), "long": [3000],
    }  # fmt: skip
    return {
        name: write(folder / name, [random.randint(1, 250, n).astype("<u2") for n in sizes])
        for name, sizes in lengths.items()
    }


def changing_plan(sources: dict[str, str], packing: str) -> StreamPlan:
    """Weights, lengths and windows that change on the way; one source rests for a while."""
    a, b, c = sources["short"], sources["ragged"], sources["long"]
    first = {a: 0.5, b: 0.3, c: 0.2}
    return StreamPlan(
        (
            StreamSegment(0, first, Reading(32, packing, 16)),
            StreamSegment(3000, {a: 0.2, b: 0.3, c: 0.5}, Reading(64, packing, 16)),
            StreamSegment(7000, {a: 0.3, c: 0.7}, Reading(16, packing, 8)),
            StreamSegment(9000, first, Reading(128, packing, 8)),
        ),
        seed=3,
    )


def sources_of(plan: StreamPlan) -> dict[str, DocumentSource]:
    return {prefix: DocumentSource(prefix, plan) for prefix in plan.prefixes}


def check_exactly_once(sources: dict[str, DocumentSource], rows: list[PackedRow]) -> dict[str, int]:
    """Every token of every epoch that was finished stands in exactly one row; returns the finished epochs."""
    spans = defaultdict(list)
    newest = dict.fromkeys([*sources, *(row.prefix for row in rows)], 0)
    for row in rows:
        newest[row.prefix] = max(newest[row.prefix], row.epoch)
        for document, begin, end in row.spans:
            spans[row.prefix, row.epoch, document].append((begin, end))
    for (prefix, epoch, document), found in spans.items():
        at = 0
        for begin, end in sorted(found):
            assert begin >= at, f"{prefix}, epoch {epoch}, document {document}: tokens {begin} to {at} are read twice"
            assert begin == at or epoch == newest[prefix], f"{prefix}, epoch {epoch}, document {document}: hole at {at}"
            at = end
    for prefix, source in sources.items():
        for epoch in range(newest[prefix]):
            for document in range(source.first, source.first + source.count):
                length = len(source.data.document(document))
                read = sum(end - begin for begin, end in spans[prefix, epoch, document])
                assert read == length, f"{prefix}, epoch {epoch}, document {document}: {read} of {length} tokens read"
    return newest


def through_json(stream: Stream) -> dict:
    """The state as a checkpoint brings it back."""
    return json.loads(json.dumps(stream.state()))
