"""Dashboards of other people: W&B, MLflow, trackio; `console.TensorBoard` writes its own files.

metrics.jsonl is the truth and the spool: a process beside rank 0 reads it and sends what its
library has not had yet, at its own pace. Training hands nothing over and waits for nothing but, at
its end, `CLOSE_SECONDS`. A library that raises ends its process, which is told once and started
again with the next row after a pause; one that hangs is ended with the run. What was sent is kept
in RUN/trackers/NAME.json, so that a run which goes on sends no step twice.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from megallm.base import optional
from megallm.run.console import MetricRow

CLOSE_SECONDS = 10.0
FIRST_PAUSE, MAX_PAUSE = 1.0, 300.0  # seconds until a process that ended is started again
PROCESSES = ("wandb", "mlflow", "trackio")

log = logging.getLogger(__name__)


class TrackerProcess:
    """Sees to it that the process of one tracker lives; it never raises."""

    def __init__(self, name: str, run: Path, project: str) -> None:
        self.name, self.run, self.project = name, run, project
        self.path = run / "logs" / f"tracker-{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._pause, self._not_before, self._told = FIRST_PAUSE, 0.0, False
        self.off = not optional.available(name)
        if self.off:
            row = optional.library(name)
            log.warning("%s is off: the package %s is not installed: %s.", name, name, row.install)
        self._start()

    def add(self, row: MetricRow) -> None:
        """Start the process again when it has ended and its pause is over; the file has the row."""
        process = self._process
        if process is None or process.poll() is not None:
            self._ended(process)
            self._start()

    def finish(self) -> None:
        """Tell the process that the run has ended, without waiting for it."""
        self.off = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Let the process send what is left, for at most so long."""
        process = self._process
        if process is None:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            log.warning(
                "%s did not take everything within %.0f s: metrics.jsonl has it, and the next "
                "start of this run sends it.",
                self.name,
                CLOSE_SECONDS,
            )
        else:
            if process.returncode:
                self._ended(process)

    def _start(self) -> None:
        if self.off or time.monotonic() < self._not_before:
            return
        command = [sys.executable, "-m", "megallm.run.tracker_process", self.name]
        command += [str(self.run), self.project, str(os.getpid())]
        try:
            with self.path.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            self._process = None
            log.warning("%s cannot be started: %s.", self.name, error)
        self._not_before = time.monotonic() + self._pause
        self._pause = min(MAX_PAUSE, 4 * self._pause)

    def _ended(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is None or self._told:
            return
        self._told = True
        log.warning(
            "%s ended with status %s, the run goes on and tries again later: %s",
            self.name,
            process.returncode,
            last_line(self.path) or f"see {self.path}",
        )


def last_line(path: Path) -> str:
    """Returns the last line of a log that says something, shortened."""
    try:
        lines = path.read_bytes()[-8192:].decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


class Trackers:
    """A sink for all trackers of a run: none of them can stop it or keep it waiting."""

    def __init__(self, names: Iterable[str], run: Path, project: str) -> None:
        chosen = [name for name in dict.fromkeys(names) if name in PROCESSES]
        self.processes = [TrackerProcess(name, run, project) for name in chosen]

    def add(self, row: MetricRow) -> None:
        for process in self.processes:
            process.add(row)

    def close(self) -> None:
        """Let all of them send what is left, together for at most `CLOSE_SECONDS`."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self.processes:
            process.finish()
        for process in self.processes:
            process.wait(max(0.0, deadline - time.monotonic()))


class Sent:
    """RUN/trackers/NAME.json: the last step that a tracker has had, and the names it goes by."""

    def __init__(self, run: Path, name: str) -> None:
        self.path = run / "trackers" / f"{name}.json"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.step = int(found.get("step", 0)) if isinstance(found, dict) else 0
        self.id = str(found.get("id", "")) if isinstance(found, dict) else ""

    def keep(self, step: int, identity: str) -> None:
        """Write down that everything up to `step` was sent (raises OSError)."""
        self.step, self.id = step, identity
        self.path.parent.mkdir(exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, "id": identity}), encoding="utf-8")
        os.replace(temporary, self.path)
