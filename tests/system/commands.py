"""Real `megallm` commands for the system tests: run to the end, watched, or killed from outside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.system import warm

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120.0  # nothing here takes more than a few seconds on an idle machine; a hang ends the test

TINY: dict[str, Any] = {
    "run": {"dir": "run", "seed": 3},
    "model": {
        "family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4,
        "num_kv_heads": 2, "vocab_size": 257, "tie_embeddings": True,
    },
    "data": {"sources": {}, "split": "90,10,0", "seq_len": 32},
    "train": {"steps": 12, "global_batch": 4, "micro_batch": 1},
    "optim": {"lr": 0.003, "warmup_steps": 5},
    "checkpoint": {"every": 3, "keep": 3},
    "eval": {"batches": 0},
    "log": {"plot": False},
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def megallm(*words: str | Path, cwd: Path, timeout: float = LIMIT_SECONDS) -> Done:
    """Run one command to its end, in a process that need not import torch first."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "out"), Path(folder, "err")
        command = warm.Command([*map(str, words)], cwd, _environment(), output, errors)
        try:
            code = command.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill_group(command.pid)
            raise
        return Done(code, output.read_text(), errors.read_text(), time.monotonic() - begin)


@dataclass
class Started:
    """A command that runs; the launcher is a session leader, its ranks are its children."""

    process: subprocess.Popen | warm.Command
    output: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in the order of their numbers: each leads a process group of its own.

        A verb that may take long starts them from a child of the process that was started (`cli.supervise`).
        """
        level = [self.process.pid]
        while level:
            children = sorted(child for pid in level for child in _children(pid))
            ranks = [pid for pid in children if _leads_a_group(pid)]
            if ranks:
                return ranks
            level = children
        return []

    def kill_all(self) -> None:
        """SIGKILL to the launcher and every rank, as the end of a node would."""
        for pid in [self.process.pid, *self.ranks()]:
            _kill(pid, signal.SIGKILL)

    def kill_launcher(self) -> None:
        """SIGKILL to the launcher alone: its ranks must not outlive it."""
        _kill(self.process.pid, signal.SIGKILL)

    def kill_rank(self, number: int) -> None:
        """SIGKILL to one rank alone: the launcher must end the others."""
        ranks = self.ranks()
        if ranks:
            _kill(ranks[number % len(ranks)], signal.SIGKILL)

    def wait(self, timeout: float = LIMIT_SECONDS) -> Done:
        """Until the launcher and everything it started are gone."""
        begin, ranks = time.monotonic(), self.ranks()
        code = self.process.wait(timeout)
        while any(_alive(pid) for pid in ranks):
            assert time.monotonic() - begin < timeout, f"ranks {ranks} outlive their launcher"
            time.sleep(0.01)
        text = self.output.read_text(errors="replace")
        return Done(code, text, text, time.monotonic() - begin)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _leads_a_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def start(*words: str | Path, cwd: Path, imported: bool = False, **variables: str) -> Started:
    """Start one command with its output in a file; `imported` when its imports are not a part of the test."""
    output, environment = cwd / f"output-{time.monotonic_ns()}.txt", _environment() | variables
    if imported:
        return Started(warm.Command([*map(str, words)], cwd, environment, output, None), output)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "megallm", *map(str, words)],
            cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Started(process, output)


def wait_for(condition: Callable[[], Any], running: Started, timeout: float = LIMIT_SECONDS) -> bool:
    """Poll until `condition` holds (True) or the command has ended without it (False)."""
    begin = time.monotonic()
    while running.running:
        if condition():
            return True
        assert time.monotonic() - begin < timeout, f"nothing happened: {running.output.read_text(errors='replace')}"
        time.sleep(0.001)
    return bool(condition())


def make_corpus(folder: Path, seed: int = 0, documents: int = 200) -> str:
    """A small corpus of made-up words, tokenised to bytes by `megallm preprocess`; the prefix of its files."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(documents)]
    source = folder / "text.jsonl"
    source.write_text("".join(f"{row}\n" for row in rows))
    done = megallm("preprocess", "--input", source, "--output", folder / "d", "--tokenizer", "bytes", "--append-eod",
                   "--overwrite", cwd=folder)  # fmt: skip
    assert done.code == 0, done.err
    return str(folder / "d_text_document")


def write_config(path: Path, prefix: str, **sections: dict[str, Any]) -> Path:
    """`TINY` with some sections changed, reading `prefix`, as YAML at `path`."""
    config = {key: dict(value) for key, value in TINY.items()}
    for name, values in sections.items():
        config.setdefault(name, {}).update(values)
    config["data"]["sources"] = config["data"]["sources"] or {prefix: 1.0}
    path.write_text(yaml.safe_dump(config))
    return path


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a half-written last line does not count."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses_of(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row."""
    return [(row["step"], row["train/loss"]) for row in rows_of(run)]


def dump(run: Path) -> dict[str, Tensor]:
    """The newest checkpoint as `megallm ckpt dump` writes it."""
    target = run.parent / f"{run.name}-dump.safetensors"
    done = megallm("ckpt", "dump", run, "--output", target, "--overwrite", cwd=run.parent)
    assert done.code == 0, done.err
    return load_file(target)


def listing(folder: Path, ignore: Sequence[str] = ()) -> dict[str, int]:
    """Every file below `folder` and its size."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files if path.name not in ignore}
