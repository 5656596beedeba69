"""The process that runs reward functions: told what to load, then asked for rewards.

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
from typing import Any, BinaryIO

from megallm.base.errors import DataError, MegallmError, UsageError
from megallm.base.stopping import die_with
from megallm.rewards.signatures import Adapted, Notes
from megallm.rewards.table import find

MAX_TEXT = 2000  # characters of an error


def load(specs: list[str]) -> tuple[list[Adapted], dict[str, Any]]:
    """Returns the functions, and the answer that describes them."""
    functions = []
    try:
        functions = [find(spec) for spec in specs]
    except MegallmError as error:
        return [], {"usage": str(error)}
    described = [{"form": function.form, "each": function.each} for function in functions]
    return functions, {"functions": described}


def rewards(function: Adapted, samples: list[Any], step: int) -> dict[str, Any]:
    """Returns the answer to one call of a function: rewards and notes, or what went wrong."""
    notes = Notes(step)
    try:
        found = function.run(samples, notes)
    except UsageError as error:
        return {"usage": str(error)}
    except DataError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than reward.memory_gib"}
    except BaseException as error:  # the boundary of the function: an exit is a failure as well
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}"[:MAX_TEXT]
        own = isinstance(error, ValueError) and last.filename.endswith("signatures.py")
        return {"error": str(error) if own else f"{said} ({last.filename}:{last.lineno})"}
    return {"rewards": found, "extras": notes.extras, "metrics": notes.metrics}


def answer_requests(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the trainer closes."""
    functions: list[Adapted] = []
    while True:
        try:
            request = pickle.load(requests)  # from the trainer: our own process
        except EOFError:
            return
        if request[0] == "load":
            functions, answer = load(request[1])
        else:
            _, at, samples, step = request
            answer = rewards(functions[at], samples, step)
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
