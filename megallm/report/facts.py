"""What lies in a run folder, read without disturbing the run. No torch."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megallm.base.errors import UsageError
from megallm.run.console import MetricRow
from megallm.run.lease import STALE_SECONDS, Holder, read_holder
from megallm.run.rows import read_rows
from megallm.run.runfolder import RunFolder

MAX_SAMPLES = 12
SAMPLE_FILES = ("rollouts.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report shows; `rows` and `events` in the order of their files."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: Sequence[MetricRow]
    events: Sequence[MetricRow]
    checkpoints: tuple[int, ...]  # steps, the newest first
    holder: Holder | None  # who trains now
    samples: Sequence[MetricRow]

    @property
    def steps(self) -> int:
        """Number of steps that the run is to have."""
        return int(self.config.get("train", {}).get("steps", 0))

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def state(self) -> str:
        """Returns in a word or two whether the run goes on, and else how it ended."""
        if self.holder is not None:
            return f"running on {self.holder.host}, process {self.holder.pid}"
        if self.steps and self.step >= self.steps:
            return "finished"
        last = next((e for e in reversed(self.events) if e["event"] in ENDINGS), None)
        return (
            f"{last['event']} after step {self.step}" if last else f"ended after step {self.step}"
        )


ENDINGS = ("stopped", "preempted", "interrupted", "diverged")


def read_run(path: str | os.PathLike[str]) -> RunFacts:
    """Returns what the run folder `path` holds now. Errors: UsageError when it is no run folder."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UsageError(
            f"{folder.path} is no run folder: it has no run.yaml. Name the run.dir of a run."
        )
    return RunFacts(
        folder.path,
        _mapping(folder.config, yaml.safe_load),
        _mapping(folder.environment, json.loads),
        [row for row in read_rows(folder.metrics) if type(row.get("step")) is int],
        [row for row in read_rows(folder.events) if isinstance(row.get("event"), str)],
        tuple(sorted(_steps(folder.checkpoints), reverse=True)),
        _holder(folder),
        _samples(folder.path),
    )


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = parse(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _steps(checkpoints: Path) -> Iterator[int]:
    with suppress(OSError):
        for entry in os.scandir(checkpoints):
            number = entry.name.removeprefix("step-")
            if number.isdigit() and number != entry.name:
                yield int(number)


def _holder(folder: RunFolder) -> Holder | None:
    """Who holds the folder and lives; on another machine, who showed a sign of life lately."""
    holder = read_holder(folder.lock)
    if holder is None:
        return None
    if holder.is_here:
        return holder if holder.runs else None
    with suppress(OSError):
        if time.time() - folder.lock.stat().st_mtime < STALE_SECONDS:
            return holder
    return None


def _samples(path: Path) -> list[MetricRow]:
    """The last rows of the file of samples, if the run has one."""
    found: deque[MetricRow] = deque(maxlen=MAX_SAMPLES)
    for name in SAMPLE_FILES:
        found.extend(read_rows(path / name))
        if found:
            break
    return list(found)
