"""Batches for the model, made one or two steps ahead by a thread. The only file of `data` with torch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from megallm.data.pretrain import SampleDataset

Batch = dict[str, torch.Tensor]
Rows = list[list[int]]


def make_batch(samples: list[np.ndarray]) -> Batch:
    """{"tokens", "labels", "positions": int64 [B, T], "mask": bool [B, T]} of B samples of T + 1 tokens."""
    both = torch.from_numpy(np.stack(samples))
    rows, length = both.shape[0], both.shape[1] - 1
    return {
        "tokens": both[:, :-1].contiguous(),
        "labels": both[:, 1:].contiguous(),
        "positions": torch.arange(length).expand(rows, length).contiguous(),
        "mask": torch.ones(rows, length, dtype=torch.bool),
    }


class Loader:
    """Iterate `(step, [batch, ...])` for steps first_step <= step < last_step.

    rows_of_step(step) gives the sample numbers of each microbatch (`sampler.micro_rows`). `prefetch`
    steps are made ahead. An error of the thread is raised where its step would have come. Close it, or
    use it as a context manager; `wait_seconds` is how long the consumer has waited for data in all.
    """

    def __init__(
        self, dataset: SampleDataset, rows_of_step: Callable[[int], Rows], first_step: int, last_step: int,
        prefetch: int = 2, pin: bool = False,
    ) -> None:  # fmt: skip
        self.wait_seconds = 0.0
        self._dataset, self._rows_of_step, self._pin = dataset, rows_of_step, pin
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
        batches = []
        for rows in self._rows_of_step(step):
            if self._stop.is_set():
                break
            batch = make_batch([self._dataset.sample(row) for row in rows])
            batches.append({k: v.pin_memory() for k, v in batch.items()} if self._pin else batch)
        return step, batches
