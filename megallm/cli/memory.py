"""A rank that runs out of memory says how much it needs, and which settings would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megallm.base.errors import OutOfMemory
from megallm.launch.environment import RankEnv
from megallm.run.config import JobConfig
from megallm.training.memory import explain


@contextmanager
def explained_memory(config: JobConfig, env: RankEnv, device: Any) -> Iterator[None]:
    """Turn a failed allocation inside the context into `OutOfMemory`; `device` is torch's."""
    from megallm.base.device import bytes_refused, memory_use

    before, limit = memory_use(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        refused = bytes_refused(error)
        if refused is None:
            raise
        needed = memory_use(device)[0] + refused - before
        sentence = explain(config, needed, limit - before, env.world, env.rank)
        raise OutOfMemory(sentence) from error
