"""RUN/samples.jsonl: which rows every data rank really read, one JSON object a line, none twice
after a resume.

All replicas append to one file, each a step's rows with one write, so lines of several never mix
(on a local disk or any file system whose appends are atomic; NFS is not one).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megallm.base.files import atomic_path, writing


def truncate_log(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`: what came after was undone by the resume. Errors:
    `CannotWrite`.
    """
    with writing(path):
        if step == 0 or not path.exists():
            path.unlink(missing_ok=True)
            return
        with path.open("rb") as old, atomic_path(path) as temporary, temporary.open("wb") as new:
            new.writelines(line for line in old if _keeps(line, step))


def _keeps(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class SampleLog:
    """Appends rows; a context manager. Errors: `CannotWrite`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def append(self, rows: Iterable[dict[str, Any]], durable: bool) -> None:
        """Add rows with one write; `durable` syncs them and all before."""
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        with writing(self.path):
            while data:
                data = data[os.write(self._fd, data) :]
            if durable:
                os.fsync(self._fd)

    def writing(
        self,
        steps: Iterable[tuple[int, Any]],
        rows: Callable[[int], list[dict[str, Any]]],
        durable: Callable[[int], bool],
    ) -> Iterator[tuple[int, Any]]:
        """Yields the same steps, each after its rows were written."""
        for step, batches in steps:
            self.append(rows(step), durable(step))
            yield step, batches
