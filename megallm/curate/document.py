"""What flows through the chain: documents, what a step says about one, and the spans it edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megallm.curate.text import Analysis

StepAction = Literal["keep", "drop", "edit"]


@dataclass(slots=True)
class Document:
    """One text with its origin: `line` counts from 1 in `file`; `index` is its place in its
    shard.
    """

    id: str
    text: str
    file: str
    line: int
    index: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    edits: list[list[Any]] = field(
        default_factory=list
    )  # [begin, end, reason, step] of every edit so far


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Code points [begin, end) of the text as the step saw it, and what stands there afterwards."""

    begin: int
    end: int
    reason: str
    replacement: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Keep, drop with a reason code, or edit with spans (in order, not overlapping); `note` goes
    into the ledger.
    """

    action: StepAction = "keep"
    reason: str = ""
    spans: tuple[TextSpan, ...] = ()
    note: dict[str, Any] = field(default_factory=dict)


KEEP = Verdict()


def drop(reason: str, **note: Any) -> Verdict:
    """Returns the verdict that removes the document."""
    return Verdict("drop", reason, note=note)


def edit(spans: Sequence[TextSpan]) -> Verdict:
    """Returns the verdict that replaces spans; no spans means keep. Overlaps are resolved in favour
    of the first, longest.
    """
    chosen: list[TextSpan] = []
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        if span.begin < span.end and (not chosen or span.begin >= chosen[-1].end):
            chosen.append(span)
    return Verdict("edit", chosen[0].reason, tuple(chosen)) if chosen else KEEP


def apply_spans(text: str, spans: Sequence[TextSpan]) -> str:
    """Returns the text after an edit."""
    pieces, at = [], 0
    for span in spans:
        pieces += [text[at : span.begin], span.replacement]
        at = span.end
    return "".join([*pieces, text[at:]])


class DocumentBatch:
    """Documents that steps see together, so that arithmetic over their characters is done once, in
    numpy.

    `metrics` collects one number a document under a name; the report draws them as histograms.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = list(documents)
        self.metrics: dict[str, np.ndarray] = {}
        self._wider: tuple[Analysis, np.ndarray] | None = (
            None  # of a batch that ours is a part of, and our rows
        )

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def analysis(self) -> Analysis:
        """Returns words, lines and paragraphs of all texts; made when a step first asks."""
        return Analysis([document.text for document in self.documents])

    def shared_analysis(self) -> tuple[Analysis, np.ndarray]:
        """Returns an analysis that holds our documents and perhaps dropped ones too, and the rows
        of ours in it: for steps that need not make a new one after a drop."""
        if self._wider is not None:
            return self._wider
        return self.analysis, np.arange(len(self))

    def record(self, name: str, values: np.ndarray | Sequence[float]) -> None:
        """Note one number for every document of the batch."""
        self.metrics[name] = np.asarray(values, np.float64)

    def after(self, verdicts: Sequence[Verdict]) -> DocumentBatch:
        """Returns the batch that the next step sees: dropped documents gone, spans replaced. Itself
        when all are kept.
        """
        if all(verdict.action == "keep" for verdict in verdicts):
            return self
        left, rows = [], []
        for row, (document, verdict) in enumerate(zip(self.documents, verdicts, strict=True)):
            if verdict.action == "edit":
                document.text = apply_spans(document.text, verdict.spans)
            if verdict.action != "drop":
                left.append(document)
                rows.append(row)
        batch = DocumentBatch(left)
        if all(verdict.action != "edit" for verdict in verdicts) and (
            "analysis" in vars(self) or self._wider
        ):
            analysis, ours = self.shared_analysis()
            batch._wider = analysis, ours[rows]
        return batch
