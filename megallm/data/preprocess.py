"""Raw text files to indexed datasets: `megallm preprocess`.

The parent cuts files into chunks and writes results in the order of the chunks; workers parse and
tokenise. So the output is byte-identical whatever the number of workers, and memory is bounded by a
few chunks each. Everything is written under temporary names and published at the end.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TextIO

import numpy as np

from megallm.base import files
from megallm.base.errors import DataError, UsageError
from megallm.data import readers, tokenizer
from megallm.data.indexed import IndexedWriter, dtype_for
from megallm.data.workers import Workers

_POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read and how; it writes `OUTPUT_KEY_document.{bin,idx,meta.json}` for each key."""

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    on_error: str = "stop"
    split_text: str = "file"
    max_document_mib: int = 64

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers} must be at least 1.")
        if self.on_error not in _POLICIES:
            raise UsageError(f"--on-error {self.on_error} is unknown; accepted: {', '.join(_POLICIES)}.")

    def read_options(self) -> readers.ReadOptions:
        return readers.ReadOptions(tuple(self.json_keys), self.split_text, self.max_document_mib << 20)

    def prefix(self, key: str) -> str:
        return f"{self.output}_{key}_document"


@dataclass
class Stats:
    """Counts of a run; `empty` and `tokens` per key, `lines` of text or rows of Parquet."""

    lines: int = 0
    blank: int = 0
    documents: int = 0
    rejected: int = 0
    characters: int = 0
    empty: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know beside the chunk."""

    tokenizer: str
    options: readers.ReadOptions
    dtype: str
    eod: int | None


@dataclass
class _Encoded:
    """A tokenised chunk; per key (tokens, lengths of the sequences, sequences of each document)."""

    parsed: readers.Parsed
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    characters: int


def run(config: PreprocessConfig, progress: Callable[[Stats], None] | None = None) -> Stats:
    """Tokenise `config.inputs`; `progress` is called with the counts so far after every chunk.

    Errors: `DataError` (`file:line: reason` under the policy "stop"; no usable text under both),
    `UsageError`, `CannotWrite`, `InternalError` when a worker dies. On every error, Ctrl-C and SIGTERM
    nothing is left under any name.
    """
    options = config.read_options()
    readers.check_inputs(config.inputs)
    _encoder.cache_clear()
    encoder = _encoder(config.tokenizer)
    job = _Job(config.tokenizer, options, dtype_for(encoder.vocab_size).str, encoder.eod if config.append_eod else None)
    with files.writing(config.output):
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with _stopped_by_sigterm(), ExitStack() as stack:
        output = _Output(config, np.dtype(job.dtype), stack)
        results = stack.enter_context(closing(_encoded(config, job)))
        for chunk, encoded in results:
            output.add(chunk, encoded)
            if progress is not None:
                progress(output.stats)
        output.commit(encoder)
    return output.stats


class _Output:
    """The files of a run: one writer per key, and the rejected lines."""

    def __init__(self, config: PreprocessConfig, dtype: np.dtype, stack: ExitStack) -> None:
        self.config = config
        keys = config.json_keys
        self.stats = Stats(
            empty=dict.fromkeys(keys, 0), tokens=dict.fromkeys(keys, 0),
            outputs={key: config.prefix(key) for key in keys},
        )  # fmt: skip
        self._rejects: TextIO | None = None
        if config.on_error == "skip":
            path = f"{config.output}.rejects.jsonl"
            with files.writing(path):
                temporary = stack.enter_context(files.atomic_path(path))
                self._rejects = stack.enter_context(temporary.open("w", encoding="utf-8"))
        self._writers = {key: stack.enter_context(IndexedWriter(config.prefix(key), dtype)) for key in keys}
        self._first_line: dict[str, int] = {}
        self._first_reject = ""

    def add(self, chunk: readers.Chunk, encoded: _Encoded) -> None:
        """Write one chunk. Errors: `DataError` for a rejected line under the policy "stop"."""
        first = self._first_line.get(chunk.file, 1)
        self._first_line[chunk.file] = first + encoded.parsed.lines
        for line, reason in encoded.parsed.rejects:
            self._reject(chunk.file, first + line, reason)
        stats = self.stats
        stats.lines += encoded.parsed.lines
        stats.blank += encoded.parsed.blank
        stats.documents += len(encoded.parsed.documents)
        stats.characters += encoded.characters
        for (key, writer), column in zip(self._writers.items(), encoded.columns, strict=True):
            writer.add(*column)
            stats.empty[key] += int((column[2] == 0).sum())
            stats.tokens[key] += len(column[0])

    def commit(self, encoder: tokenizer.Encoder) -> None:
        """Publish everything. Errors: `DataError` when no text gave any token."""
        stats, config = self.stats, self.config
        if not any(stats.tokens.values()):
            why = f" The first of {stats.rejected} rejected: {self._first_reject}." if stats.rejected else ""
            raise DataError(
                f"There is no usable text in {', '.join(config.inputs)}: {stats.lines} lines, "
                f"{stats.documents} documents, all of them empty.{why}"
            )
        made_by = {
            "kind": encoder.kind, "fingerprint": encoder.fingerprint,
            "vocab_size": encoder.vocab_size, "eod": encoder.eod if config.append_eod else None,
        }  # fmt: skip
        if self._rejects is not None:
            with files.writing(f"{config.output}.rejects.jsonl"):
                self._rejects.flush()
        for key, writer in self._writers.items():
            writer.commit({
                "tokenizer": made_by, "documents": writer.num_documents, "sequences": writer.num_sequences,
                "tokens": writer.num_tokens, "empty_documents": stats.empty[key], "rejected": stats.rejected,
                "json_key": key, "append_eod": config.append_eod, "inputs": [Path(name).name for name in config.inputs],
            })  # fmt: skip

    def _reject(self, name: str, line: int, reason: str) -> None:
        if self._rejects is None:
            raise readers.rejected(name, line, reason)
        self.stats.rejected += 1
        self._first_reject = self._first_reject or f"{name}:{line}: {reason}"
        with files.writing(f"{self.config.output}.rejects.jsonl"):
            self._rejects.write(json.dumps({"file": name, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


@cache
def _encoder(spec: str) -> tokenizer.Encoder:
    """The tokenizer of this process; a forked worker inherits the parent's."""
    return tokenizer.load(spec)


def _encode_chunk(job: _Job, chunk: readers.Chunk) -> _Encoded:
    """Parse and tokenise: all the work that is worth dividing."""
    parsed = readers.parse(chunk, job.options)
    encoder, columns, characters = _encoder(job.tokenizer), [], 0
    for column in range(len(job.options.keys)):
        ids = encoder.encode_batch([texts[column] for _, texts in parsed.documents])
        columns.append(_join(ids, np.dtype(job.dtype), job.eod))
        characters += sum(len(texts[column]) for _, texts in parsed.documents)
    parsed.documents = [(line, ()) for line, _ in parsed.documents]
    return _Encoded(parsed, columns, characters)


def _join(
    ids: Sequence[np.ndarray], dtype: np.dtype, eod: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens back to back, lengths of the sequences, sequences of each document); an empty text has none."""
    lengths = np.fromiter((len(one) for one in ids), np.int64, len(ids))
    per_document = (lengths > 0).astype(np.uint8)
    parts = [one for one in ids if len(one)]
    if eod is not None:
        end = np.array([eod], dtype)
        parts = [part for one in parts for part in (one, end)]
        lengths += lengths > 0
    tokens = np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)
    return tokens, lengths[lengths > 0].astype(np.int32), per_document


def _encoded(config: PreprocessConfig, job: _Job) -> Iterator[tuple[readers.Chunk, _Encoded]]:
    """Every chunk of every file in order, tokenised here or by workers."""
    every = (chunk for name in config.inputs for chunk in readers.chunks(name, job.options))
    encode = partial(_encode_chunk, job)
    if config.workers == 1:
        for chunk in every:
            yield chunk, encode(chunk)
        return
    with Workers(config.workers, encode) as workers:
        yield from workers.map(every)


class _Terminated(BaseException):
    """SIGTERM came; carried through every cleanup of the run."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, so that it cleans up, and then have its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the cleanup is not to be interrupted
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop) or signal.SIG_DFL
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, previous)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)

