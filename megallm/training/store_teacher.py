"""`megallm distill --store`: the teacher's log-probs of every row, and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallm.base.errors import UsageError
from megallm.engine.engine import Mesh
from megallm.training.distill import DistillRun
from megallm.training.distill_config import DistillConfig
from megallm.training.teacher_store import META


def run(
    config: DistillConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Write `teacher.store` of a checked and resolved configuration; collective over the world.
    Errors: UsageError where there is no teacher, or a store already.
    """
    folder = Path(config.teacher.store)
    if config.teacher.model is None:
        raise UsageError("--store writes what teacher.model says, which is not given.")
    if mesh.broadcast_json((folder / META).exists()):
        raise UsageError(f"--store {folder} holds a store already: remove it, or name another.")
    job = DistillRun(config)
    job.read_data(mesh)
    job.make_store(folder, mesh)
