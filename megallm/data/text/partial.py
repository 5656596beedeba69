"""The folder `OUTPUT.partial`: what a killed preprocessing had finished, so that the same command
goes on from there.

`state.json` names the chunks that are done and the sizes of the files that hold them; it is
replaced only after those are durable. Whatever lies behind the recorded sizes is cut off on
resuming, so the output is the same to the byte.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megallm.base import files
from megallm.base.errors import CannotWrite
from megallm.data.text.tokenizer_folder import TOKENIZER_SUFFIX

_STATE, _LOCK = "state.json", "lock"
_STALE_SECONDS = 3600.0  # a temporary file of a dead process, untouched for so long, is nobody's


class PartialOutput:
    """The folder of one output, held by one process at a time; a context manager.

    identity: what must be equal for the work to be of use (JSON); other work in the folder is
    thrown away. Leaving it keeps the folder, unless `remove` was called. Errors: `CannotWrite`.
    """

    def __init__(self, output: str, identity: Any) -> None:
        self.folder = Path(f"{output}.partial")
        self._identity = json.loads(json.dumps(identity))
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            sentence = (
                f"{self.folder} is in use by another process: wait for it, or choose another "
                "--output."
            )
            raise CannotWrite(sentence) from error
        self.state: dict[str, Any] | None = self._read()
        if self.state is None:
            self._empty()

    def __enter__(self) -> PartialOutput:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def save(self, state: dict[str, Any]) -> None:
        """Record what is done; the files it speaks of are durable already."""
        self.state = state
        files.atomic_write_json(self.folder / _STATE, {"identity": self._identity, "state": state})

    def remove(self) -> None:
        """Remove the folder: the work is published, or of no use."""
        with suppress(OSError):
            shutil.rmtree(self.folder)

    def _read(self) -> dict[str, Any] | None:
        try:
            saved = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            return saved["state"] if saved["identity"] == self._identity else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _empty(self) -> None:
        with files.writing(self.folder):
            for path in self.folder.iterdir():
                if path.is_dir():  # a tokenizer that was about to be published
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()


def pending(output: str, identity: Any) -> bool:
    """Returns whether this very work was killed while it gave its files their names, which running
    it again finishes.
    """
    try:
        saved = json.loads((Path(f"{output}.partial") / _STATE).read_text(encoding="utf-8"))
        return saved["identity"] == json.loads(json.dumps(identity)) and "publish" in saved["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_stale_outputs(output: str) -> list[str]:
    """Remove temporary files beside `output` whose process is gone and that nobody touched for an
    hour; their names.
    """
    swept = []
    base = Path(output)
    for path in (
        base.parent.glob(f"{base.name}[._]*{files.TEMPORARY}*") if base.parent.is_dir() else ()
    ):
        pid = path.name.rpartition(files.TEMPORARY)[2].partition("-")[0]
        with suppress(OSError):
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if not old or not pid.isdecimal() or Path(f"/proc/{pid}").exists():
                continue
            if path.is_file():
                path.unlink()
            elif f".{TOKENIZER_SUFFIX}{files.TEMPORARY}" in path.name:
                shutil.rmtree(path)
            else:
                continue
            swept.append(path.name)
    return swept
