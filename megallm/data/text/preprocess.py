"""Raw text files to indexed datasets: `megallm preprocess`.

The parent cuts files into chunks and writes results in the order of the chunks; workers parse and
tokenise. So the output is byte-identical whatever the number of workers, and memory is bounded by a
few chunks each. Work in progress lies in `OUTPUT.partial`; final names appear at the end. A run
that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megallm.base import files
from megallm.base.errors import CannotWrite, DataError, UsageError
from megallm.data.indexed import meta, provenance
from megallm.data.indexed.dataset import IndexedWriter, dtype_for, indexed_files, publish
from megallm.data.text import accelerated, readers, textfile, tokenizer
from megallm.data.text.encode import Encoded, EncodeJob, choose_encoder, encode_chunk
from megallm.data.text.partial import PartialOutput, pending, remove_stale_outputs
from megallm.data.text.workers import Workers

FORMAT = 2  # of the work in progress: a change makes what an older megallm left unusable
_POLICIES = ("stop", "skip")
_SAVE_SECONDS = 5.0  # between records of what is done
_REJECT_LINES = 1000  # before the share of rejected lines says anything


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read and how; it writes `OUTPUT_KEY_document.{bin,idx,meta.json,tokenizer/}` for each
    key.

    backend: `accelerated.BACKENDS`; max_reject_percent: of lines that may be rejected under the
    policy "skip"; overwrite: whether datasets of these names are replaced.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    add_special_tokens: bool = False
    workers: int = 1
    on_error: str = "stop"
    split_text: str = "file"
    max_document_mib: int = 64
    backend: str = accelerated.AUTO
    max_reject_percent: float = 100.0
    overwrite: bool = True

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers} must be at least 1.")
        if self.on_error not in _POLICIES:
            raise UsageError(
                f"--on-error {self.on_error} is unknown; accepted: {', '.join(_POLICIES)}."
            )
        if not 0 <= self.max_reject_percent <= 100:
            raise UsageError(
                f"--max-reject-percent {self.max_reject_percent} must be between 0 and 100."
            )

    def read_options(self) -> readers.ReadOptions:
        return readers.ReadOptions(
            tuple(self.json_keys), self.split_text, self.max_document_mib << 20
        )

    def prefix(self, key: str) -> str:
        return f"{self.output}_{key}_document"

    def outputs(self) -> list[str]:
        """Returns every file that a run may write."""
        found = [path for key in self.json_keys for path in indexed_files(self.prefix(key))]
        return [*found, f"{self.output}.rejects.jsonl"]


@dataclass
class Stats:
    """Counts of a run; `empty` and `tokens` per key, `lines` of text or rows of Parquet.

    backend: what tokenised; by_tokenizers: texts that gigatoken left to `tokenizers`; resumed:
    chunks that an earlier, killed run had done.
    """

    lines: int = 0
    blank: int = 0
    documents: int = 0
    rejected: int = 0
    characters: int = 0
    empty: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    by_tokenizers: int = 0
    resumed: int = 0


def run(
    config: PreprocessConfig, progress: Callable[[Stats], None] | None = None, again: bool = False
) -> Stats:
    """Tokenise `config.inputs`; `progress` is called with the counts so far after every chunk.

    again: whether datasets of this very run may be there already, which are then left as they are.

    Errors: `DataError` (`file:line: reason` under the policy "stop"; no usable text under both),
    `UsageError`, `CannotWrite`: nothing is left. After Ctrl-C, SIGTERM, SIGKILL or `InternalError`
    when a worker dies nothing has a final name, and what is done stays in `OUTPUT.partial`.
    """
    options = config.read_options()
    readers.check_inputs(config.inputs)
    plain, backend = choose_encoder(config.tokenizer, config.backend)
    identity = _identity(config, plain, backend)
    if not (config.overwrite or pending(config.output, identity)):
        if again and (done := _done_before(config, identity)) is not None:
            return done
        files.check_new(*config.outputs())
    before, behind = around(config, plain)
    job = EncodeJob(
        config.tokenizer, options, dtype_for(plain.vocab_size).str, before, behind, backend
    )
    with files.writing(config.output):
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    remove_stale_outputs(config.output)
    with _stopped_by_sigterm(), ExitStack() as stack:
        work = stack.enter_context(PartialOutput(config.output, identity))
        stats = _publish(config, work)  # of a run that was killed while it published
        if stats is not None:
            stack.callback(work.remove)
            return stats
        try:
            output = _Output(config, job, work, stack, _digest(identity))
            results = stack.enter_context(closing(_encoded(config, job, output.place)))
            for chunk, encoded in results:
                output.add(chunk, encoded)
                if progress is not None:
                    progress(output.stats)
            output.commit(plain)
        except (DataError, UsageError, CannotWrite):
            stack.callback(work.remove)
            raise
        stack.callback(work.remove)
    return output.stats


def run_shards(
    config: PreprocessConfig,
    shards: int,
    only: int | None = None,
    progress: Callable[[Stats], None] | None = None,
) -> list[Stats]:
    """Returns the same into `OUTPUT-00000-of-00008` and so on: whole files in order, about equally
    many bytes in each.

    only: the number of one shard, so that several machines can share the work. Errors: as `run`.
    """
    if not 1 <= shards <= len(config.inputs):
        raise UsageError(
            f"--shards {shards} needs 1 to {len(config.inputs)}: a shard holds whole files."
        )
    if only is not None and not 0 <= only < shards:
        raise UsageError(f"--shard {only} must be 0 to {shards - 1}.")
    readers.check_inputs(config.inputs)
    found = []
    for number, inputs in enumerate(divide(config.inputs, shards)):
        if only in (None, number):
            output = f"{config.output}-{number:05d}-of-{shards:05d}"
            one = PreprocessConfig(**{**vars(config), "inputs": inputs, "output": output})
            found.append(run(one, progress, again=True))
    return found


def divide(inputs: tuple[str, ...], shards: int) -> list[tuple[str, ...]]:
    """Returns consecutive files for each shard, at least one, ends where the running sum of sizes
    is nearest to equal parts.
    """
    sizes = np.array([max(1, os.path.getsize(name)) for name in inputs], np.float64)
    ends = np.cumsum(sizes)
    groups, begin = [], 0
    for shard in range(1, shards + 1):
        wanted = ends[-1] * shard / shards
        end = len(inputs) if shard == shards else int(np.argmin(np.abs(ends - wanted))) + 1
        end = min(max(end, begin + 1), len(inputs) - (shards - shard))
        groups.append(inputs[begin:end])
        begin = end
    return groups


def around(
    config: PreprocessConfig, plain: tokenizer.Encoder
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns ids before and behind each text: of the tokenizer's template, and the end of a
    document where that has it not.

    Errors: `UsageError` when a template is wanted and there is none.
    """
    before, behind = plain.template if config.add_special_tokens else ([], [])
    if config.add_special_tokens and not (before or behind):
        raise UsageError(
            f"--add-special-tokens: the template of {config.tokenizer} puts nothing around a text. "
            "Leave the option out, or use a tokenizer.json whose post_processor does."
        )
    if config.append_eod and behind[-1:] != [plain.eod]:
        behind = [*behind, plain.eod]
    return tuple(before), tuple(behind)


def _identity(config: PreprocessConfig, plain: tokenizer.Encoder, backend: str) -> dict[str, Any]:
    """Returns what decides the bytes of the output."""
    inputs = []
    for name in config.inputs:
        found = os.stat(name)
        once = (
            secrets.token_hex(8) if textfile.is_stream(name) else ""
        )  # what was in a pipe is gone
        inputs.append([name, found.st_size, found.st_mtime_ns, once])
    fixed = (
        "json_keys",
        "append_eod",
        "add_special_tokens",
        "on_error",
        "split_text",
        "max_document_mib",
    )
    chosen = {key: vars(config)[key] for key in fixed}
    made_by = {"tokenizer": plain.fingerprint, "encoded_by": accelerated.libraries(plain, backend)}
    return {"format": FORMAT, "inputs": inputs, **made_by, "cut": readers.CHUNK_BYTES, **chosen}


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _done_before(config: PreprocessConfig, identity: dict[str, Any]) -> Stats | None:
    """The counts of datasets that this very run made, as its side-cars tell them; None where one is
    missing.
    """
    found = Stats(backend="done before")
    for key in config.json_keys:
        side_car = (
            meta.read_meta(config.prefix(key))
            if os.path.exists(f"{config.prefix(key)}.idx")
            else None
        )
        if side_car is None or side_car.get("made_from") != _digest(identity):
            return None
        found.documents, found.rejected = side_car["documents"], side_car["rejected"]
        found.tokens[key], found.empty[key] = side_car["tokens"], side_car["empty_documents"]
        found.outputs[key] = config.prefix(key)
    return found


class _Output:
    """The files of a run: one writer per key, the rejected lines, and the record of what is done.

    `place` is (file, chunks done of it): where the input goes on.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        job: EncodeJob,
        work: PartialOutput,
        stack: ExitStack,
        made_from: str,
    ) -> None:
        self.config, self._work, keys = config, work, config.json_keys
        self._made_from = made_from
        self.stats = Stats(
            empty=dict.fromkeys(keys, 0),
            tokens=dict.fromkeys(keys, 0),
            outputs={key: config.prefix(key) for key in keys},
        )
        saved = work.state or {}
        self.place: list[int] = saved.get("place", [0, 0])
        self._next_line: int = saved.get("next_line", 1)
        self._runs: list[list[int]] = saved.get("runs", [])
        self._first_reject: str = saved.get("first_reject", "")
        vars(self.stats).update(
            saved.get("stats", {}), backend=job.backend, resumed=saved.get("chunks", 0)
        )
        self._chunks = self.stats.resumed
        dtype, done = np.dtype(job.dtype), saved.get("done", dict.fromkeys(keys, (0, 0, 0)))
        self._writers = {
            key: stack.enter_context(
                IndexedWriter(config.prefix(key), dtype, work.folder, done[key])
            )
            for key in keys
        }
        self._rejects: BinaryIO | None = None
        if config.on_error == "skip":
            path = work.folder / "rejects.jsonl"
            with files.writing(path):
                size = saved.get("rejects", 0)
                self._rejects = stack.enter_context(path.open("r+b" if size else "wb"))
                self._rejects.truncate(size)
                self._rejects.seek(size)
        self._saved_at = time.monotonic()

    def add(self, chunk: tuple[int, readers.Chunk], encoded: Encoded) -> None:
        """Write one chunk. Errors: `DataError` for a rejected line under the policy "stop", or for
        too many.
        """
        file, _ = chunk
        if file != self.place[0]:
            self.place, self._next_line = [file, 0], 1
        first, name = self._next_line, self.config.inputs[file]
        self._next_line += encoded.parsed.lines
        for line, reason in encoded.parsed.rejects:
            self._reject(name, first + line, reason)
        self._remember(file, first + encoded.lines)
        stats = self.stats
        stats.lines += encoded.parsed.lines
        stats.blank += encoded.parsed.blank
        stats.documents += len(encoded.lines)
        stats.characters += encoded.characters
        stats.by_tokenizers += encoded.by_tokenizers
        for (key, writer), column in zip(self._writers.items(), encoded.columns, strict=True):
            writer.add(*column)
            stats.empty[key] += int((column[2] == 0).sum())
            stats.tokens[key] += len(column[0])
        self.place[1] += 1
        self._chunks += 1
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Record what is done, once it is durable."""
        done = {key: writer.sync() for key, writer in self._writers.items()}
        size = 0
        if self._rejects is not None:
            with files.writing(f"{self.config.output}.rejects.jsonl"):
                self._rejects.flush()
                os.fsync(self._rejects.fileno())
            size = self._rejects.tell()
        self._work.save({
            "place": self.place, "next_line": self._next_line, "chunks": self._chunks, "done": done, "rejects": size,
            "stats": vars(self.stats), "runs": self._runs, "first_reject": self._first_reject,
        })  # fmt: skip
        self._saved_at = time.monotonic()

    def commit(self, encoder: tokenizer.Encoder) -> None:
        """Publish everything: first all is made ready and noted, then it is moved, so that a run
        that is killed in between can finish. Errors: `DataError` when no text gave any token, or
        too many lines were rejected."""
        stats, config = self.stats, self.config
        why = (
            f" The first of {stats.rejected} rejected: {self._first_reject}."
            if stats.rejected
            else ""
        )
        if not any(stats.tokens.values()):
            raise DataError(
                f"There is no usable text in {', '.join(config.inputs)}: {stats.lines} lines, "
                f"{stats.documents} documents, all of them empty.{why}"
            )
        self._check_rejects(1)
        made_by = {
            "kind": encoder.kind, "fingerprint": encoder.fingerprint,
            "vocab_size": encoder.vocab_size, "eod": encoder.eod if config.append_eod else None,
            "encoded_by": accelerated.libraries(encoder, stats.backend),
        }  # fmt: skip
        if self._rejects is not None:
            with files.writing(f"{config.output}.rejects.jsonl"):
                self._rejects.close()
                files.fsync_file(self._work.folder / "rejects.jsonl")
        lines = (
            {"files": list(config.inputs), "runs": self._runs}
            if len(self._runs) <= provenance.MAX_RUNS
            else None
        )
        prepared = {}
        for key, writer in self._writers.items():
            prepared[config.prefix(key)] = writer.prepare({
                "tokenizer": made_by, "documents": writer.num_documents, "sequences": writer.num_sequences,
                "tokens": writer.num_tokens, "empty_documents": stats.empty[key], "rejected": stats.rejected,
                "json_key": key, "append_eod": config.append_eod, "add_special_tokens": config.add_special_tokens,
                "inputs": [Path(name).name for name in config.inputs], "origins": lines,
                "made_from": self._made_from,
            }, config.tokenizer)  # fmt: skip
        self._work.save({"publish": prepared, "stats": vars(stats)})
        _publish(config, self._work)

    def _remember(self, file: int, lines: np.ndarray) -> None:
        """Note [document, file, line] wherever documents do not stand on consecutive lines."""
        if len(self._runs) > provenance.MAX_RUNS or not len(lines):
            return
        before = self.stats.documents
        breaks = np.flatnonzero(np.diff(lines) != 1) + 1
        for at in [0, *breaks.tolist()]:
            provenance.append(self._runs, before + at, file, int(lines[at]))

    def _reject(self, name: str, line: int, reason: str) -> None:
        if self._rejects is None:
            raise readers.rejected(name, line, reason)
        self.stats.rejected += 1
        self._first_reject = self._first_reject or f"{name}:{line}: {reason}"
        row = json.dumps({"file": name, "line": line, "reason": reason}, ensure_ascii=False) + "\n"
        with files.writing(f"{self.config.output}.rejects.jsonl"):
            self._rejects.write(
                row.encode(errors="backslashreplace")
            )  # a lone surrogate as its JSON escape
        self._check_rejects(_REJECT_LINES)

    def _check_rejects(self, least_lines: int) -> None:
        stats, percent = self.stats, self.config.max_reject_percent
        if (
            percent < 100
            and stats.lines >= least_lines
            and stats.rejected * 100 > percent * stats.lines
        ):
            raise DataError(
                f"{stats.rejected} of {stats.lines} lines were rejected, more than "
                f"--max-reject-percent {percent:g}; the first: {self._first_reject}."
            )


def _publish(config: PreprocessConfig, work: PartialOutput) -> Stats | None:
    """Move what is ready to its final names; None when nothing is ready yet."""
    state = work.state or {}
    if "publish" not in state:
        return None
    rejects = work.folder / "rejects.jsonl"
    with files.writing(f"{config.output}.rejects.jsonl"):
        if rejects.exists():
            os.replace(rejects, f"{config.output}.rejects.jsonl")
    for prefix, prepared in state["publish"].items():
        publish(prefix, prepared)
    return Stats(**state["stats"])


def _encoded(
    config: PreprocessConfig, job: EncodeJob, place: list[int]
) -> Iterator[tuple[tuple[int, readers.Chunk], Encoded]]:
    """Yields every chunk from `place` on, with the number of its file, in order; tokenised here or
    by workers.
    """
    first, done = place

    def every() -> Iterator[tuple[int, readers.Chunk]]:
        for file in range(first, len(config.inputs)):
            skipped = done if file == first else 0
            for chunk in itertools.islice(
                readers.chunks(config.inputs[file], job.options), skipped, None
            ):
                yield file, chunk

    encode = partial(_encode_numbered, job)
    if config.workers == 1:
        for item in every():
            yield item, encode(item)
        return
    with Workers(config.workers, encode) as workers:
        yield from workers.map(every())


def _encode_numbered(job: EncodeJob, item: tuple[int, readers.Chunk]) -> Encoded:
    return encode_chunk(job, item[1])


class _Terminated(BaseException):
    """SIGTERM came; carried through every cleanup of the run."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, so that it cleans up, and then have its usual
    effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # once is enough: the cleanup is not to be interrupted
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
