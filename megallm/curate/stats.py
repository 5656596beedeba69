"""Statistics of a curation run: documents and characters by step and reason, histograms of
metrics, a few examples.

The statistics are plain JSON; the sum of those of the shards in shard order does not depend on who
made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megallm.curate.document import Document, TextSpan, Verdict, apply_spans

EXAMPLES = 5  # kept for each step and reason
EXCERPT_CHARS = 400
_CONTEXT_CHARS = 80  # around the first edited span
_LOOKED_AT_CHARS = 20_000  # for personal data, before an excerpt is cut out of them
BINS = 40
_SHARES = (
    "_share",
    "gram",
    "_ratio",
    "score",
    "_density",
    "coverage",
)  # names that end so lie from 0 to 1
_LOG_TOP = 7.0  # the other histograms are of log10(1 + value), up to 10^7


@lru_cache(maxsize=256)
def bins_of(metric: str) -> np.ndarray:
    """Returns the edges of a metric's histogram, float64 [BINS + 1]."""
    if metric.endswith(_SHARES):
        return np.linspace(0, 1, BINS + 1)
    return np.power(10, np.linspace(0, _LOG_TOP, BINS + 1)) - 1


class CurationStats:
    """Counts of one shard, or of several added together; `redact` takes personal data out of
    examples.
    """

    def __init__(self, redact: Callable[[str], str] | None = None) -> None:
        self._redact = redact or str
        self.steps: dict[str, dict[str, Any]] = {}
        self.histograms: dict[str, np.ndarray] = {}  # int64 [BINS] each
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.totals = {
            "lines_rejected": 0,
            "documents": 0,
            "characters": 0,
            "kept": 0,
            "characters_kept": 0,
        }
        self.seconds: dict[str, float] = {}

    def note(self, step: str, documents: Sequence[Document], verdicts: Sequence[Verdict]) -> None:
        """Count a step's verdicts over the documents as they were before it."""
        row = self._row(step)
        row["in"] += len(documents)
        for document, verdict in zip(documents, verdicts, strict=True):
            if verdict.action == "keep":
                continue
            if verdict.action == "drop":
                self._add(row["dropped"], verdict.reason, 1)
                row["characters_dropped"] += len(document.text)
                reasons = {verdict.reason}
            else:
                row["edited_documents"] += 1
                for span in verdict.spans:
                    self._add(row["edited"], span.reason, 1)
                    row["characters_cut"] += span.end - span.begin - len(span.replacement)
                reasons = {span.reason for span in verdict.spans}
            for reason in sorted(reasons):
                self._example(step, reason, document, verdict)

    def _row(self, step: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"in": 0, "dropped": {}, "edited": {}, "edited_documents": 0}
        empty |= {"characters_dropped": 0, "characters_cut": 0}
        return self.steps.setdefault(step, empty)

    @staticmethod
    def _add(counts: dict[str, int], key: str, number: int) -> None:
        counts[key] = counts.get(key, 0) + number

    def _example(self, step: str, reason: str, document: Document, verdict: Verdict) -> None:
        held = self.examples.setdefault(f"{step}/{reason}", [])
        if len(held) >= EXAMPLES:
            return
        row: dict[str, Any] = {"id": document.id, "file": document.file, "line": document.line}
        if verdict.action == "drop":
            row["text"] = self._redact(document.text[:_LOOKED_AT_CHARS])[:EXCERPT_CHARS]
        else:
            span = next(span for span in verdict.spans if span.reason == reason)
            # Personal data must not come back in the report: replaced spans are shown as their
            # replacements only.
            before = self._context(
                document.text, verdict.spans, max(0, span.begin - _LOOKED_AT_CHARS), span.begin
            )
            after = self._context(
                document.text, verdict.spans, span.end, span.end + _LOOKED_AT_CHARS
            )
            cut = (
                ""
                if span.replacement
                else self._redact(document.text[span.begin : span.end][:_LOOKED_AT_CHARS])
            )
            row |= {
                "before": before[-_CONTEXT_CHARS:], "cut": cut[:EXCERPT_CHARS], "replacement": span.replacement,
                "after": after[:_CONTEXT_CHARS],
            }  # fmt: skip
        if verdict.note:
            row["note"] = verdict.note
        held.append(row)

    def _context(self, text: str, spans: Sequence[TextSpan], begin: int, end: int) -> str:
        """Returns the text from `begin` to `end` with what was replaced in it replaced."""
        inside = [
            TextSpan(
                max(span.begin, begin) - begin,
                min(span.end, end) - begin,
                span.reason,
                span.replacement,
            )
            for span in spans
            if span.replacement and span.begin < end and span.end > begin
        ]
        return self._redact(apply_spans(text[begin:end], inside))

    def note_metrics(self, metrics: dict[str, np.ndarray]) -> None:
        """Add one number a document to the histogram of each metric; what lies outside goes into
        the last bin.
        """
        for name, values in metrics.items():
            counts = np.bincount(
                np.searchsorted(bins_of(name)[1:-1], values, side="right"), minlength=BINS
            )
            held = self.histograms.get(name)
            self.histograms[name] = counts if held is None else held + counts

    def add(self, name: str, number: int) -> None:
        """Add to one of `totals`."""
        self.totals[name] = self.totals.get(name, 0) + number

    def spend(self, step: str, seconds: float) -> None:
        """Record the processor time of a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "totals": self.totals, "steps": self.steps,
            "histograms": {name: counts.tolist() for name, counts in self.histograms.items()},
            "examples": self.examples, "seconds": self.seconds,
        }  # fmt: skip


def add_up(shards: Iterable[dict[str, Any]]) -> CurationStats:
    """Returns the sum, in the order given; examples of the first come first."""
    out = CurationStats()
    for shard in shards:
        for name, number in shard["totals"].items():
            out.add(name, number)
        for step, row in shard["steps"].items():
            total = out._row(step)
            for name, value in row.items():
                if isinstance(value, dict):
                    for reason, number in value.items():
                        out._add(total[name], reason, number)
                else:
                    total[name] += value
        for name, counts in shard["histograms"].items():
            out.histograms[name] = out.histograms.get(name, 0) + np.array(counts, np.int64)
        for name, rows in shard["examples"].items():
            held_rows = out.examples.setdefault(name, [])
            held_rows += rows[: EXAMPLES - len(held_rows)]
        for step, seconds in shard["seconds"].items():
            out.spend(step, seconds)
    return out
