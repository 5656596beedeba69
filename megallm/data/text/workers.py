"""An ordered map over worker processes that survives nothing silently.

Each worker has a pipe of its own, so one that is killed in the middle of a result ends that pipe
and is seen at once. (`concurrent.futures.ProcessPoolExecutor` shares one pipe among all and hangs
for ever then.)
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megallm.base.errors import InternalError, MegallmError

_AHEAD = 4  # results per worker that may wait for an earlier one: bounds the memory
_PR_SET_PDEATHSIG = 1


class Workers:
    """`count` processes that call `function(item)`; a context manager that ends them at once on
    leaving.

    `function` and items must be picklable. A `MegallmError` of the function is raised where its
    result would have come; any other exception ends the worker with its traceback. Workers die with
    their parent.
    """

    def __init__(self, count: int, function: Callable[[Any], Any]) -> None:
        # A forked worker is there in milliseconds, but forking next to other threads may copy a
        # held lock.
        context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, function, os.getpid()), daemon=True
                )
                process.start()
                theirs.close()  # now only the worker holds this end, so its death closes the pipe
                self._processes[ours] = process
        except OSError as error:
            self.close()
            raise InternalError(
                f"Worker processes cannot be started: {error}. Use fewer --workers."
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are doing; safe to call twice."""
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()
        self._processes.clear()

    def map(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (item, function(item)) in the order of the items. Errors: `InternalError` when a
        worker dies.
        """
        source = iter(enumerate(items))
        idle, busy = list(self._processes), set()
        given: dict[int, Any] = {}
        results: dict[int, Any] = {}
        turn, exhausted = 0, False
        while True:
            while idle and not exhausted and len(given) < _AHEAD * len(self._processes):
                number, item = next(source, (-1, None))
                exhausted = number < 0
                if not exhausted:
                    given[number] = item
                    busy.add(self._send(idle.pop(), (number, item)))
            while turn in results:
                result = results.pop(turn)
                if isinstance(result, MegallmError):
                    raise result
                yield given.pop(turn), result
                turn += 1
            if busy:
                for connection in wait(busy):
                    number, result = self._receive(connection)
                    results[number] = result
                    busy.remove(connection)
                    idle.append(connection)
            elif exhausted:
                return

    def _send(self, connection: Connection, message: Any) -> Connection:
        try:
            connection.send(message)
        except OSError as error:
            raise self._dead(connection) from error
        return connection

    def _receive(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead(connection) from error

    def _dead(self, connection: Connection) -> InternalError:
        process = self._processes[connection]
        process.join(5)
        code = process.exitcode
        how = (
            f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        )
        return InternalError(
            f"A worker process died ({how}). A kill that nobody asked for mostly means that memory "
            "ran out: use fewer --workers."
        )


def _serve(connection: Connection, function: Callable[[Any], Any], parent: int) -> None:
    """The life of a worker. Signals are the parent's business, and nobody outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be asked to say so
        return
    while True:
        try:
            number, item = connection.recv()
        except EOFError:
            return
        try:
            result = function(item)
        except MegallmError as error:
            result = error
        connection.send((number, result))
