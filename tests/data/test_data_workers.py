"""The ordered map: order, errors in their place, deaths seen at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megallm.base.errors import DataError, InternalError
from megallm.data.text.workers import Workers


def work(item):
    kind, value = item
    if kind == "sleep":
        time.sleep(value)
    elif kind == "bad":
        raise DataError(f"item {value} is bad")
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "bug":
        raise ZeroDivisionError
    elif kind == "big":
        return b"x" * value
    return value


def test_results_come_in_order_and_workers_stay_busy():
    items = [("sleep", 0.2), *(("value", i) for i in range(40)), ("big", 3_000_000)]
    with Workers(3, work) as workers:
        got = list(workers.map(iter(items)))
    assert [item for item, _ in got] == items and [r for _, r in got[1:41]] == list(range(40))
    assert len(got[-1][1]) == 3_000_000


def test_items_are_taken_only_so_far_ahead():
    taken = []

    def items():
        for i in range(200):
            taken.append(i)
            yield ("sleep", 0.3) if i == 0 else ("value", i)

    with Workers(2, work) as workers:
        next(workers.map(items()))
    assert len(taken) <= 9


def test_an_error_is_raised_in_its_place():
    with Workers(2, work) as workers:
        got = []
        with pytest.raises(DataError, match="item 7 is bad"):
            for _, result in workers.map([("sleep", 0.1), ("value", 1), ("bad", 7), ("bad", 8)]):
                got.append(result)
    assert got == [0.1, 1]


@pytest.mark.parametrize("kind, how", [("die", "killed by signal 9"), ("bug", "exit status 1")])
def test_death_is_seen_at_once(kind, how):
    begin = time.monotonic()
    with pytest.raises(InternalError, match=how), Workers(2, work) as workers:
        list(workers.map([("sleep", 0.01), (kind, 0), ("value", 2)]))
    assert time.monotonic() - begin < 60  # not at all without it


def test_killed_in_the_middle_of_a_result():
    """The case that hangs ProcessPoolExecutor: half a result is in the pipe when the worker dies."""
    # more items than may be ahead of a slow first one, so that not all can be done before the kill
    with pytest.raises(InternalError, match="killed by signal 9"), Workers(2, work) as workers:
        results = workers.map([("value", 0)] + [("big", 5_000_000)] * 20)
        next(results)
        time.sleep(0.3)  # both workers now block on a full pipe
        for process in workers._processes.values():
            process.kill()
        list(results)
