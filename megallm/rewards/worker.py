"""The process that runs reward functions, tools and environments: told what to load, then asked.

Requests are pickles of the trainer, answers lines of JSON: nothing that a function returns is
unpickled by the trainer.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from megallm.base.errors import DataError, MegallmError, UsageError
from megallm.base.stopping import die_with
from megallm.rewards.environments import Host, setting_of
from megallm.rewards.signatures import Adapted, Notes
from megallm.rewards.table import find

MAX_TEXT = 2000  # characters of an error
_OURS = ("rewards/signatures.py", "rewards/environments.py")  # whose ValueErrors are clauses


def load(specs: list[str]) -> tuple[list[Adapted], dict[str, Any]]:
    """Returns the functions, and the answer that describes them."""
    functions = []
    try:
        functions = [find(spec) for spec in specs]
    except MegallmError as error:
        return [], {"usage": str(error)}
    described = [{"form": function.form, "each": function.each} for function in functions]
    return functions, {"functions": described}


def host(tools: list[str], environment: str | None) -> tuple[Host | None, dict[str, Any]]:
    """Returns what keeps the environments of episodes, and the answer that describes them."""
    try:
        setting = setting_of(tools, environment)
        return Host(setting), {"functions": [setting.described()]}
    except MegallmError as error:
        return None, {"usage": str(error)}
    except Exception as error:  # the boundary of the user's class
        return None, {"usage": f"{environment} cannot be made: {type(error).__name__}: {error}."}


def rewards(function: Adapted, samples: list[Any], step: int) -> dict[str, Any]:
    """Returns rewards and notes of one call of a function."""
    notes = Notes(step)
    found = function.run(samples, notes)
    return {"rewards": found, "extras": notes.extras, "metrics": notes.metrics}


def answered(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the answer to one call of what a user wrote, or what went wrong."""
    try:
        return ask()
    except UsageError as error:
        return {"usage": str(error)}
    except DataError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than its memory_gib"}
    except BaseException as error:  # the boundary of the function: an exit is a failure as well
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}"[:MAX_TEXT]
        own = isinstance(error, ValueError) and last.filename.endswith(_OURS)
        return {"error": str(error) if own else f"{said} ({last.filename}:{last.lineno})"}


def answer_requests(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the trainer closes."""
    functions: list[Adapted] = []
    episodes: Host | None = None
    while True:
        try:
            request = pickle.load(requests)  # from the trainer: our own process
        except EOFError:
            return
        if request[0] == "load":
            functions, answer = load(request[1])
        elif request[0] == "host":
            episodes, answer = host(*request[1:])
        elif request[0] == "act":
            answer = answered(partial(episodes.act, request[1]))
        else:
            _, at, samples, step = request
            answer = answered(partial(rewards, functions[at], samples, step))
        answers.write(json.dumps(answer, default=str).encode() + b"\n")
        answers.flush()


def main() -> None:
    number, memory, parent = map(int, sys.argv[1:])
    if parent:
        die_with(parent)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    os.dup2(2, 1)  # what a function prints is no result
    with socket.socket(fileno=number) as connection:
        answer_requests(connection.makefile("rb"), connection.makefile("wb"))


if __name__ == "__main__":
    main()
