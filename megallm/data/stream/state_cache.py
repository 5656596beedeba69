"""States of a stream after some of its steps, kept in a file, so that no part of a plan is gone
through twice.

Where a window of packed rows begins hangs on all documents before it, so the first walk to a step
is as long as the way. It leaves bookmarks: whoever asks for that step again, or for one near it,
begins at the nearest bookmark.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megallm.base import files
from megallm.base.errors import CannotWrite
from megallm.data.stream.plan import StreamPlan
from megallm.data.stream.source import DocumentSource
from megallm.data.stream.stream import SCHEMA, Stream

FOLDER = "~/.cache/megallm/stream"
_ROWS = 4096  # between bookmarks, at first
_MOST = 1024  # bookmarks; then every second one goes


class StreamStateCache:
    """The bookmarks of one plan over these very files, with `global_batch` rows a step. A file that
    cannot be read or written is as good as none."""

    def __init__(
        self, plan: StreamPlan, sources: Mapping[str, DocumentSource], global_batch: int
    ) -> None:
        self._key = json.loads(
            json.dumps([SCHEMA, asdict(plan), global_batch, [*map(_identity, sources.values())]])
        )
        self._stride, self._marks, self._path = max(1, _ROWS // global_batch), {}, None
        with suppress(RuntimeError):  # nobody's home is known
            name = hashlib.blake2b(json.dumps(self._key).encode(), digest_size=16).hexdigest()
            self._path = Path(FOLDER).expanduser() / f"{name}.json"
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["of"] == self._key:
                self._stride = max(1, int(kept["stride"]))
                self._marks = {int(step): state for step, state in kept["marks"].items()}

    def walked(
        self, plan: StreamPlan, sources: Mapping[str, DocumentSource], steps: int, global_batch: int
    ) -> Stream:
        """Returns the stream after `steps` steps."""
        done = max((step for step in self._marks if step <= steps), default=0)
        stream = Stream(plan, sources, self._marks.get(done))
        for step in range(done + 1, steps + 1):
            stream.take(global_batch)
            if step % self._stride == 0 or step == steps:
                self._marks[step] = json.loads(json.dumps(stream.state()))
        if done < steps:
            self._save(steps)
        return stream

    def _save(self, asked: int) -> None:
        while len(self._marks) > _MOST:
            self._stride *= 2
            self._marks = {
                step: mark
                for step, mark in self._marks.items()
                if step % self._stride == 0 or step == asked
            }
        if self._path is not None:
            with suppress(OSError, CannotWrite):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                files.atomic_write_json(
                    self._path, {"of": self._key, "stride": self._stride, "marks": self._marks}
                )


def _identity(source: DocumentSource) -> list[Any]:
    """Returns what tells whether the files of a source are still the same."""
    found = os.stat(source.data.data_path)
    return [source.prefix, source.fingerprint, source.vocab_size, found.st_size, found.st_mtime_ns]
