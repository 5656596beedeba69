"""Compare two systems honestly: ratios of interleaved rounds, not seconds (docs: the method of bench/).

Each system lives in processes of its own, one pinned to each core, and only one system works at a time. A round
runs A B B A, so drift of the machine hits both alike; its ratio is B's time over A's. The median over the rounds is
reported with a bootstrap 95 % interval. A system against itself (A/A) must give 1.00 within 3 %.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOISY = 0.03  # an A/A ratio this far from 1 makes the figures of a run doubtful


@dataclass(frozen=True)
class Ratio:
    """B's time over A's: above 1, A is faster."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def paired_ratio(rounds: Sequence[float], samples: int = 4000, seed: int = 0) -> Ratio:
    """The median of the rounds' ratios and its bootstrap 95 % interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(rounds, k=len(rounds))) for _ in range(samples))
    low, high = medians[round(0.025 * (samples - 1))], medians[round(0.975 * (samples - 1))]
    return Ratio(statistics.median(rounds), low, high, len(rounds))


def abba(a: Callable[[], float], b: Callable[[], float], rounds: int) -> list[float]:
    """Ratios (B + B) / (A + A) of rounds A B B A; the callables return seconds."""
    ratios = []
    for _ in range(rounds):
        first, second, third, fourth = a(), b(), b(), a()
        ratios.append((second + third) / (first + fourth))
    return ratios


class SystemFailed(Exception):
    """A system's process ended; the message is the end of its error output."""


class Workers:
    """One system: a process on each core, which obeys JSON lines.

    `command` is extended by `--rank R --core C --store FILE`. An answer that takes longer than `timeout` seconds, or
    a rank that ends, is a SystemFailed.
    """

    def __init__(
        self, command: list[str], cores: Sequence[int], folder: Path, env: dict[str, str], timeout: float = 600.0,
        python: str = sys.executable,
    ) -> None:  # fmt: skip
        self.timeout = timeout
        store = folder / f"store-{time.monotonic_ns()}"
        self.errors = [folder / f"{store.name}-rank-{rank}.txt" for rank in range(len(cores))]
        self.processes: list[subprocess.Popen[str]] = []
        for rank, core in enumerate(cores):
            words = [python, *command, "--rank", str(rank), "--core", str(core), "--store", str(store)]
            with open(self.errors[rank], "w") as stderr:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
                self.processes.append(subprocess.Popen(words, text=True, env={**os.environ, **env}, **pipes))

    def ask(self, **request: Any) -> list[dict[str, Any]]:
        """Send a request to all ranks; their answers, by rank."""
        try:
            for process in self.processes:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        except BrokenPipeError as error:
            raise SystemFailed(self._last_words()) from error
        deadline, answers = time.monotonic() + self.timeout, {}
        waiting = {process.stdout: rank for rank, process in enumerate(self.processes)}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise SystemFailed(f"no answer in {self.timeout:.0f} s; {self._last_words()}")
            for pipe in ready:  # one line a request, so that nothing is left in the pipe's buffer
                line = pipe.readline()
                if not line:
                    raise SystemFailed(self._last_words())
                answers[waiting.pop(pipe)] = json.loads(line)
        return [answers[rank] for rank in sorted(answers)]

    def _last_words(self) -> str:
        texts = [path.read_text().strip().splitlines() for path in self.errors]
        errors = [line for lines in texts for line in lines if re.match(r"\S*(Error|Exception|Lost|Usage)\b", line)]
        return (errors or [line for lines in texts for line in lines[-1:]] or ["no error output"])[-1]

    def close(self) -> None:
        """End the processes that this object started."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # what was still to be sent to a process that failed
                process.stdin.close()
            process.stdout.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peak_bytes() -> int:
    """The largest resident size this process ever had (Linux)."""
    return _status_kib("VmHWM") * 1024


def resident_bytes() -> int:
    """The resident size of this process now (Linux)."""
    return _status_kib("VmRSS") * 1024


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def machine() -> dict[str, Any]:
    """Where and when a figure was taken."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
    }
