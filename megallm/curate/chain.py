"""The chain: steps that judge batches, and the work on one shard between two global decisions.

A local step looks at documents one by one. A global step (exact, near) compares all of them: it
signs them at the end of a segment, decides once, and the next segment begins with applying the
decision. A shard's work depends on the configuration, its input and the decisions only, never on
who does it or when.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import zstandard

from megallm.base import config as configs
from megallm.base import extension
from megallm.base.errors import DataError
from megallm.base.files import temporary_name, writing
from megallm.curate import readers
from megallm.curate.config import GLOBAL, CurateConfig
from megallm.curate.document import KEEP, Document, DocumentBatch, Verdict, apply_spans, drop, edit
from megallm.curate.exact import Exact, Signatures
from megallm.curate.near import Near
from megallm.curate.stats import CurationStats
from megallm.curate.steps import build_step

BATCH_CHARS = 1 << 18
BATCH_DOCUMENTS = 512
DOCUMENTS, LEDGER, STATS, KEPT = "documents.zst", "ledger.jsonl", "tally.json", "kept.jsonl.gz"
READ = "read"
# What UTF-8 cannot hold (lone surrogates, in names of files and of keys) is written as its JSON
# escape.
ESCAPED = "backslashreplace"


# What json.dumps(ensure_ascii=False) writes; json.dumps makes a new encoder at every call.
_as_json = json.JSONEncoder(ensure_ascii=False).encode


class LocalStep(Protocol):
    """Judges documents by themselves. `marks` are the limits that the report draws into the
    histograms.
    """

    name: str
    marks: dict[str, tuple[float, ...]]

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        """Returns one verdict a document. The step may record metrics on the batch and add to a
        document's `meta`.
        """
        ...


class GlobalStep(Protocol):
    """Judges documents by comparison with all others."""

    name: str

    def sign(self, batch: DocumentBatch, shard: int, out: Signatures) -> None: ...

    def resolve(
        self, shards: Sequence[Path], scratch: Path, memory_bytes: int, gone: np.ndarray
    ) -> dict[int, dict[str, np.ndarray]]:
        """Returns decisions by shard; `gone` are the sorted numbers of documents that a step
        decided before drops.
        """
        ...

    def dropped(self, decisions: dict[int, dict[str, np.ndarray]]) -> np.ndarray:
        """Returns the numbers of the documents that decisions drop, sorted."""
        ...

    def judge(
        self, batch: DocumentBatch, decisions: dict[str, np.ndarray], name_of: dict[int, str]
    ) -> list[Verdict]: ...


@dataclass(frozen=True)
class ChainSegment:
    """Steps between two global decisions: apply `begin`, run `local`, sign for `end` (the last has
    none).
    """

    begin: tuple[str, ...]
    local: tuple[str, ...]
    end: tuple[str, ...]


def chain_segments(config: CurateConfig) -> list[ChainSegment]:
    """Cut the chain at its global steps; neighbours are decided together when the first only
    drops.
    """
    out: list[ChainSegment] = []
    begin: tuple[str, ...] = ()
    local: list[str] = []
    edits = {"exact"} if config.exact.paragraph or config.exact.line else set()
    for name in config.steps:
        if name not in GLOBAL:
            local.append(name)
        elif begin and not local and not edits & set(begin):
            out[-1] = replace(out[-1], end=(*begin, name))
            begin = (*begin, name)
        else:
            out.append(ChainSegment(begin, tuple(local), (name,)))
            begin, local = (name,), []
    return [*out, ChainSegment(begin, tuple(local), ())]


@dataclass(frozen=True)
class Chain:
    """The steps of a configuration, built once a process."""

    config: CurateConfig
    segments: tuple[ChainSegment, ...]
    local: dict[str, LocalStep] = field(default_factory=dict)
    glob: dict[str, GlobalStep] = field(default_factory=dict)


def build_chain(config: CurateConfig) -> Chain:
    """Load every model that the steps need. Errors: `UsageError`, `DataError`."""
    local = {name: build_step(name, config) for name in config.steps if name not in GLOBAL}
    glob: dict[str, GlobalStep] = {"exact": Exact(config.exact), "near": Near(config.near)}
    return Chain(config, tuple(chain_segments(config)), local, glob)


@lru_cache(maxsize=2)
def chain_of(config_yaml: str) -> Chain:
    """Returns `build_chain`, remembered: a worker builds its chain at its first shard."""
    return build_chain(configs.loads(CurateConfig, config_yaml))


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs for one shard of one segment; `target` is the folder that it
    makes.
    """

    config_yaml: str
    segment: int
    shard: int
    target: Path
    units: tuple[readers.Unit, ...] = ()
    source: Path | None = None  # the folder of the segment before
    decisions: Path | None = None  # the folder of this shard's decisions


def run_shard(job: ShardJob) -> Path:
    """Do one shard and publish its folder whole. Errors: `DataError` for a bad line when
    input.on_error is stop.
    """
    chain = chain_of(job.config_yaml)
    temporary = temporary_name(job.target)
    with writing(job.target):
        temporary.mkdir(parents=True)
        try:
            _ShardRun(chain, job, temporary).run()
            temporary.replace(job.target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return job.target


class _ShardRun:
    """One pass of documents through one segment."""

    def __init__(self, chain: Chain, job: ShardJob, folder: Path) -> None:
        self.chain, self.job, self.folder = chain, job, folder
        self.segment = chain.segments[job.segment]
        self.stats, self.signatures = CurationStats(_redactor(chain)), Signatures()
        self.ledger: list[tuple[int, str]] = []
        self.decisions, self.names = load_decisions(job.decisions)

    def run(self) -> None:
        last = not self.segment.end
        with _writer(self.folder, last, self.chain.config.gzip_level) as out:
            for documents in batches(self._documents()):
                batch = self._judge(DocumentBatch(documents))
                self._sign(batch)
                for document in batch.documents:
                    out.write(kept_row(document) if last else b"".join(_dumped(document)))
                    if last:
                        self._keep(document)
        self.signatures.save(self.folder)
        with open(self.folder / LEDGER, "w", encoding="utf-8", errors=ESCAPED) as file:
            file.writelines(f"{index}\t{row}\n" for index, row in sorted(self.ledger))
        (self.folder / STATS).write_text(json.dumps(self.stats.to_json()), "utf-8")

    def _documents(self) -> Iterator[Document]:
        if self.job.source is not None:
            yield from _load(self.job.source / DOCUMENTS)
            return
        index = 0
        started = time.process_time()
        for unit in self.job.units:
            for item in readers.parse_unit(unit, self.chain.config.input):
                if isinstance(item, readers.Reject):
                    self._reject(item, index)
                elif not item.text.strip():
                    self.stats.add("documents", 1)
                    self._write_ledger(index, ledger_row(item, "drop", READ, "empty"))
                    self.stats.note(READ, [item], [drop("empty")])
                else:
                    item.index = index
                    self.stats.add("documents", 1)
                    self.stats.add("characters", len(item.text))
                    self.stats.note(READ, [item], [KEEP])
                    self.stats.spend(READ, time.process_time() - started)
                    yield item
                    started = time.process_time()
                index += 1

    def _reject(self, item: readers.Reject, index: int) -> None:
        if item.whole and self.chain.config.input.on_bad_file == "stop":
            raise DataError(
                f"{item.file}:{item.line}: {item.reason.rstrip('.')}. Mend or remove the file, or "
                "set input.on_bad_file=skip to keep what was read of it and go on."
            )
        if not item.whole and self.chain.config.input.on_error == "stop":
            raise DataError(
                f"{item.file}:{item.line}: {item.reason}. Mend it, or set input.on_error=skip to "
                "leave such lines out."
            )
        self.stats.add("files_rejected" if item.whole else "lines_rejected", 1)
        row = {"id": None, "file": item.file, "line": item.line, "action": "reject"}
        self._write_ledger(index, row | {"step": READ, "reason": item.reason, "spans": []})

    def _judge(self, batch: DocumentBatch) -> DocumentBatch:
        for name in self.segment.begin:
            if not len(batch):
                break
            started = time.process_time()
            verdicts = self.chain.glob[name].judge(batch, self.decisions, self.names)
            batch = self._take(name, batch, verdicts, started)
        for name in self.segment.local:
            if not len(batch):
                break
            started = time.process_time()
            batch = self._take(name, batch, self.chain.local[name].judge(batch), started)
        return batch

    def _take(
        self, step: str, batch: DocumentBatch, verdicts: list[Verdict], started: float
    ) -> DocumentBatch:
        self.stats.note(step, batch.documents, verdicts)
        self.stats.note_metrics(batch.metrics)
        batch.metrics.clear()
        for document, verdict in zip(batch.documents, verdicts, strict=True):
            if verdict.action == "edit":
                document.edits += [
                    [span.begin, span.end, span.reason, step] for span in verdict.spans
                ]
            elif verdict.action == "drop":
                self._write_ledger(
                    document.index, ledger_row(document, "drop", step, verdict.reason, verdict.note)
                )
        batch = batch.after(verdicts)
        self.stats.spend(step, time.process_time() - started)
        return batch

    def _sign(self, batch: DocumentBatch) -> None:
        for name in self.segment.end if len(batch) else ():
            started = time.process_time()
            self.chain.glob[name].sign(batch, self.job.shard, self.signatures)
            self.stats.spend(f"{name} sign", time.process_time() - started)
        if self.segment.end:
            self.signatures.ids.update(
                {document.index: document.id for document in batch.documents}
            )

    def _keep(self, document: Document) -> None:
        self.stats.add("kept", 1)
        self.stats.add("characters_kept", len(document.text))
        steps = list(dict.fromkeys(span[3] for span in document.edits))
        reasons = list(dict.fromkeys(span[2] for span in document.edits))
        action = "edit" if document.edits else "keep"
        self._write_ledger(
            document.index, ledger_row(document, action, "+".join(steps), "+".join(reasons))
        )

    def _write_ledger(self, index: int, row: dict[str, Any]) -> None:
        self.ledger.append((index, _as_json(row)))


def _redactor(chain: Chain) -> Callable[[str], str] | None:
    """Returns what takes personal data out of the report's excerpts; None when the chain does not
    look for it.
    """
    step = chain.local.get("pii")
    return None if step is None else lambda text: apply_spans(text, edit(step.find(text)).spans)


def ledger_row(
    document: Document, action: str, step: str, reason: str, note: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns one row of ledger.jsonl; spans are [begin, end, reason, step] in the text as that
    step saw it.
    """
    row = {
        "id": document.id, "file": document.file, "line": document.line, "action": action, "step": step,
        "reason": reason, "spans": document.edits,
    }  # fmt: skip
    return row | ({"note": note} if note else {})


def kept_row(document: Document) -> bytes:
    """Returns one line of kept/*.jsonl.gz: {"id", "text", "file", "line"} and what is kept beside.
    """
    beside = {"file": document.file, "line": document.line}
    beside |= {
        key: value for key, value in document.meta.items() if key not in ("id", "text", *beside)
    }
    native = extension.index()
    return b'{"id": %b, "text": %b, %b\n' % (
        _as_json(document.id).encode(errors=ESCAPED),
        _as_json(document.text).encode()
        if native is None
        else native.quote(document.text.encode()),
        _as_json(beside).encode(errors=ESCAPED)[1:],
    )


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields up to BATCH_DOCUMENTS documents and, beyond the first, BATCH_CHARS characters at once.
    """
    held: list[Document] = []
    size = 0
    for document in documents:
        if held and (size + len(document.text) > BATCH_CHARS or len(held) >= BATCH_DOCUMENTS):
            yield held
            held, size = [], 0
        held.append(document)
        size += len(document.text)
    if held:
        yield held


def _dumped(document: Document) -> tuple[bytes, bytes]:
    """Returns a line of JSON that ends with the size of the text, and the text as it is."""
    text = document.text.encode()
    head = [
        document.index,
        document.id,
        document.file,
        document.line,
        document.meta,
        document.edits,
        len(text),
    ]
    return json.dumps(head).encode() + b"\n", text


def _load(path: Path) -> Iterator[Document]:
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        lines = io.BufferedReader(stream, 1 << 18)
        while head := lines.readline():
            index, name, origin, number, meta, edits, size = json.loads(head)
            yield Document(name, lines.read(size).decode(), origin, number, index, meta, edits)


class _writer:
    """The file that a segment writes: compressed documents for the next segment, or what is
    kept.
    """

    def __init__(self, folder: Path, last: bool, level: int) -> None:
        self._raw = open(folder / (KEPT if last else DOCUMENTS), "wb")  # noqa: SIM115 (closed in __exit__)
        if last:
            packed: Any = gzip.GzipFile("", "wb", level, self._raw, mtime=0)
        else:
            packed = zstandard.ZstdCompressor(level=1).stream_writer(self._raw, closefd=False)
        self._file = io.BufferedWriter(packed, 1 << 18)

    def __enter__(self) -> BinaryIO:
        return self._file

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._raw.close()


def save_decisions(folder: Path, decisions: dict[str, np.ndarray], names: dict[int, str]) -> None:
    """Write what `resolve` decided for one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    for level, rows in decisions.items():
        np.save(folder / f"{level}.npy", rows, allow_pickle=False)
    (folder / "names.json").write_text(json.dumps(names), "utf-8")


def load_decisions(folder: Path | None) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Returns what `save_decisions` wrote."""
    if folder is None:
        return {}, {}
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    names = json.loads((folder / "names.json").read_text("utf-8"))
    return arrays, {int(number): name for number, name in names.items()}
