"""`megallm distill --store`: the teacher's log-probs of every row, and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallm.engine.engine import Mesh
from megallm.training.distill import DistillRun
from megallm.training.distill_config import DistillConfig


def run(
    config: DistillConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Write `teacher.store` of a checked and resolved configuration; collective over the world."""
    job = DistillRun(config)
    job.read_data(mesh)
    job.make_store(Path(config.teacher.store), mesh)
