"""Records where the time of some steps goes, on one rank (`megallm profile`)."""

from __future__ import annotations

import dataclasses
import json
import time
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megallm.base.files import atomic_write_text
from megallm.base.heartbeat import HEARTBEAT, ranks_of
from megallm.engine.engine import Mesh
from megallm.run.profile import COMPUTE, WAIT, RankProfile, StepSpan, device_parts, part_of

AXES = ("tp", "cp", "pp", "ep", "dp", "data", "grads", "expert_grads", "model", "world")


class Profiler:
    """A listener of the heartbeat: `warmup` steps unseen, `steps` measured, and one more under
    torch's profiler, whose overhead is so kept out of what is measured.
    """

    def __init__(self, mesh: Mesh, warmup: int, steps: int) -> None:
        self.mesh, self.warmup, self.measured = mesh, warmup, steps
        self.found, self.finished, self.steps = RankProfile(), False, 0
        self._axes: dict[int, str] = {}
        self._spans: list[StepSpan] | None = None  # of the step under way
        self._name, self._since, self._phase = "", 0.0, ""
        self._mark: record_function | None = None
        self._traffic: Counter[tuple[str, int]] = Counter()
        on_gpu = [ProfilerActivity.CUDA] if mesh.device.type == "cuda" else []
        self._torch = profile(activities=[ProfilerActivity.CPU, *on_gpu])
        self._offset = time.time() - time.monotonic()

    @property
    def _traces(self) -> bool:
        return self.steps == self.warmup + self.measured + 1

    def enter_step(self, now: float) -> None:
        """Begin a step."""
        self.steps += 1
        if self.steps <= self.warmup or self.finished:
            return
        if self._traces:
            self._torch.start()
            now = time.monotonic()
        self._spans, self._traffic = [], Counter()
        self._open("data", now)

    def enter(self, phase: str, now: float) -> None:
        """Begin a phase; `between` ends the step."""
        if self._spans is None:
            return
        self._close(now)
        self._phase = phase
        if phase == "between":
            self._end()
        else:
            self._open(phase, now)

    def issued(self, operation: str, slot: int, nbytes: int) -> None:
        """Count a collective."""
        name = f"{self._axis(slot)} {operation}"
        self._traffic[name, 0] += 1
        self._traffic[name, 1] += nbytes

    def wait(self, operation: str, slot: int, now: float) -> None:
        """Begin to wait."""
        if self._spans is not None:
            self._phase = self._name
            self._close(now)
            self._open(f"{WAIT} {self._axis(slot)} {operation}", now)

    def done(self, now: float) -> None:
        """Go on with the phase that the rank waited in."""
        if self._spans is not None:
            self._close(now)
            self._open(self._phase, now)

    def _open(self, name: str, now: float) -> None:
        self._name, self._since = name, now
        if self._traces:
            self._mark = record_function(f"megallm {name}")
            self._mark.__enter__()

    def _close(self, now: float) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        assert self._spans is not None
        self._spans.append(StepSpan(self._name, self._since + self._offset, now + self._offset))

    def _end(self) -> None:
        spans, self._spans = self._spans or [], None
        if not self._traces:
            self.found.steps.append(spans)
            for (name, place), value in self._traffic.items():
                self.found.traffic.setdefault(name, [0, 0])[place] = value
            return
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        self._torch.stop()
        self.finished = True
        self._read()

    def _axis(self, slot: int) -> str:
        """The axis of a group: the first one with its ranks; of two ranks that pass messages on,
        what they do that for.
        """
        if slot not in self._axes:
            purpose, *way, ranks = HEARTBEAT.group(slot).split(" ")
            same = [name for name in AXES if self.mesh.axes[name].ranks == ranks_of(ranks)]
            self._axes[slot] = purpose if way or not same else same[0]
        return self._axes[slot]

    def _read(self) -> None:
        """Sum the operations of the traced step inside spans of compute."""
        events = [event for event in self._torch.events() or () if event.device_type.name == "CPU"]
        marks = sorted(
            (event.time_range.start, event.time_range.end, event.name.removeprefix("megallm "))
            for event in events
            if event.name.startswith("megallm ")
        )
        starts = [begin for begin, _, _ in marks]
        computing = [mark for mark in marks if part_of(mark[2]) == COMPUTE]
        self.found.traced_compute = sum(end - begin for begin, end, _ in computing) * 1e-6
        total: Counter[str] = Counter()
        for event in events:
            place = bisect_right(starts, event.time_range.start) - 1
            if event.name.startswith("megallm ") or place < 0:
                continue
            _, end, name = marks[place]
            if event.time_range.start < end and part_of(name) == COMPUTE:
                total[event.name] += event.self_cpu_time_total * 1e-6
        self.found.operations = dict(total.most_common())
        if self.mesh.device.type == "cuda" and marks:
            kernels = [
                (event.name, event.time_range.start * 1e-6, event.time_range.end * 1e-6)
                for event in self._torch.events() or ()
                if event.device_type.name == "CUDA"
            ]
            ends = marks[0][0] * 1e-6, max(mark[1] for mark in marks) * 1e-6
            self.found.device = device_parts(kernels, *ends)

    def write(self, folder: Path) -> None:
        """Write this rank's files: trace-rank-N.json (Chrome) and rank-N.json."""
        rank = self.mesh.rank
        self._torch.export_chrome_trace(str(folder / f"trace-rank-{rank}.json"))
        text = json.dumps(dataclasses.asdict(self.found))
        atomic_write_text(folder / f"rank-{rank}.json", text)
