"""The run folder: its paths and small files. No torch; see `lease` for who holds it and `rows` for
its logs.

RUN/run.yaml        resolved configuration          RUN/logs/rank-*.log
RUN/env.json        versions, commit, layout        RUN/checkpoints/
RUN/metrics.jsonl   one row a step: the truth       RUN/plots/
RUN/events.jsonl    saves, restarts, skips          RUN/LOCK   lease of the job that runs
RUN/replay/         batches that went wrong         RUN/data_ledger.json   batches left out
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megallm.base.config import to_dict
from megallm.base.files import atomic_write_json, atomic_write_text, writing
from megallm.base.redact import redacted


class RunFolder:
    """The paths of one run folder, and its small files. Only rank 0 writes anything but its own
    log.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "run.yaml"
        self.environment = self.path / "env.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.plots = self.path / "plots"
        self.lock = self.path / "LOCK"
        self.replays = self.path / "replay"
        self.data_ledger = self.path / "data_ledger.json"

    def prepare(self) -> None:
        """Make the folders and prove that they can be written. Errors: `CannotWrite`, before any
        work is done.
        """
        with writing(self.path):
            for folder in (self.path, self.checkpoints, self.logs, self.plots):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".write-test-{os.getpid()}-{secrets.token_hex(4)}"
                try:
                    probe.write_bytes(b"megallm")
                finally:
                    probe.unlink(missing_ok=True)

    def log_path(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def write_config(self, text: str) -> None:
        """Write run.yaml: the resolved configuration. Errors: `CannotWrite`."""
        atomic_write_text(self.config, text)

    def write_environment(self, extra: Mapping[str, Any]) -> bool:
        """Write env.json: host, versions and commit, and what the caller adds (layout, world,
        backend, ...). Returns whether, but for the host, it says what it said before; True where
        there was none.
        """
        now = {**describe_environment(), **extra}
        try:
            before = json.loads(self.environment.read_text(encoding="utf-8"))
        except FileNotFoundError:
            before = now
        except (OSError, ValueError):
            before = {}
        atomic_write_json(self.environment, now)
        return all(before.get(key) == now[key] for key in now if key != "host")


def shown_yaml(config: Any) -> str:
    """Returns a configuration as YAML without what looks like a secret."""
    return yaml.safe_dump(
        redacted(to_dict(config)), sort_keys=False, allow_unicode=True, width=120
    )


def describe_environment() -> dict[str, Any]:
    """Returns host, Python, versions of the packages that matter (None when absent), and the commit
    of this checkout.
    """
    versions: dict[str, str | None] = {}
    for name in ("megallm", "torch", "numpy", "safetensors", "tokenizers", "xxhash", "pyyaml"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Returns the commit of the checkout this package lies in, with `+` when files differ; None
    when it is installed.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
