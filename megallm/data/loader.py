"""Batches for the model, made one or two steps ahead by a thread. The only file of `data` with
torch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from megallm.data.batches import Arrays

Batch = dict[str, torch.Tensor]
OF_DOCUMENTS = ("cu_seqlens", "prefix_of")  # of a packed row: where they end, what is before them


def to_tensors(arrays: Arrays, pin: bool = False) -> Batch:
    """Returns the same memory as tensors; `pin` copies all but those of documents to pinned memory
    (these are read on the CPU).
    """
    batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {
        name: x.pin_memory() if pin and name not in OF_DOCUMENTS else x
        for name, x in batch.items()
    }


class Loader:
    """Iterate `(step, [batch, ...])` for steps first_step <= step < last_step, which `read` makes
    in this order.

    `prefetch` steps are made ahead by a thread. An error of the thread is raised where its step
    would have come. Close it, or use it as a context manager; `wait_seconds` is how long the
    consumer has waited for data in all.
    """

    def __init__(
        self,
        read: Callable[[int], list[Arrays]],
        first_step: int,
        last_step: int,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        self.wait_seconds = 0.0
        self._read, self._pin = read, pin
        self._steps = iter(range(first_step, last_step))
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: deque[Future[tuple[int, list[Batch]]]] = deque()
        for step in islice(self._steps, max(prefetch, 1)):
            self._ahead.append(self._thread.submit(self._make, step))

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        if not self._ahead:
            self.close()
            raise StopIteration
        begin = time.monotonic()
        future = self._ahead.popleft()
        error = future.exception()
        self.wait_seconds += time.monotonic() - begin
        if error is not None:
            self.close()
            raise error
        for step in islice(self._steps, 1):
            self._ahead.append(self._thread.submit(self._make, step))
        return future.result()

    def close(self) -> None:
        """Stop the thread, wait for it and drop what it has made; safe to call twice."""
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, step: int) -> tuple[int, list[Batch]]:
        if self._stop.is_set():
            return step, []
        return step, [to_tensors(arrays, self._pin) for arrays in self._read(step)]
