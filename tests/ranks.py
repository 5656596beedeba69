"""`run_ranks(n, fn, *args)`: the tests' door to a pool of gloo ranks that lives as long as pytest."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache
from typing import Any

from megallm.oracle.pool import Pool


@cache
def pool() -> Pool:
    """The one pool of this test run."""
    made = Pool()
    atexit.register(made.close)
    return made


def run_ranks(
    n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, device: str = "cpu"
) -> list[Any]:
    """Call `fn(*args)` on `n` ranks of a fresh gloo world; the list of results by rank. On the device
    "emulated" by nccl's rules (`megallm.oracle.emulated_nccl`).

    `fn` is a module-level function; inside it `torch.distributed` is initialised.
    """
    return pool().run(n, fn, *args, timeout=timeout, device=device)
