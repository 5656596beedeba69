"""The process that writes the shards of a rank while it trains on. No torch: it starts in a moment.

It maps the memory that the rank has filled with a whole shard file, and answers each line of JSON
on its standard input with one on its standard output: the hashes of the pieces, or why there are
none.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megallm.base.errors import CannotWrite, Diverged, MegallmError
from megallm.base.files import writing
from megallm.base.stopping import die_with, stop_signals
from megallm.checkpoint.manifest import digest
from megallm.checkpoint.shard_file import ShardWriter

# Where the exponent of numbers stands that are not finite: (integers of the width, mask).
_EXPONENTS = {
    "float64": ("<u8", 0x7FF0000000000000),
    "float32": ("<u4", 0x7F800000),
    "bfloat16": ("<u2", 0x7F80),
    "float16": ("<u2", 0x7C00),
}
_CHUNK = 1 << 20  # bytes that are looked at together, so that they stay in the cache


def is_finite(data: memoryview, dtype: str) -> bool:
    """Returns whether all numbers in `data` are finite; those of other types than floats always
    are.
    """
    if dtype not in _EXPONENTS:
        return True
    integers, mask = _EXPONENTS[dtype]
    for begin in range(0, len(data), _CHUNK):
        bits = np.frombuffer(data[begin : begin + _CHUNK], integers)
        if ((bits & bits.dtype.type(mask)) == mask).any():
            return False
    return True


def write_job(job: dict[str, Any], memory: memoryview) -> dict[str, Any]:
    """Write one shard file and sync it; returns the hashes of its pieces in order.

    Errors: `CannotWrite`; `Diverged` for a number that is not finite, before anything is written.
    """
    pieces = [(name, dtype, memory[begin:end]) for name, dtype, begin, end in job["pieces"]]
    for name, dtype, data in pieces:
        if not is_finite(data, dtype):
            raise Diverged(f"The state after step {job['step']} is not finite, as in {name}.")
    path = Path(job["path"])
    with writing(path):
        path.parent.mkdir(exist_ok=True)  # on a network file system it may not be visible here yet
        with ShardWriter(path) as file:
            file.write(memory[: job["header_bytes"]])
            digests = []
            for _, _, data in pieces:
                digests.append(digest(data))
                file.write(data)
    return {"digests": digests}


def reply_to(line: str, fd: int) -> dict[str, Any]:
    """Returns the reply to one line: what `write_job` gives, or the error and its kind."""
    job = json.loads(line)
    try:
        return write_job(job, memoryview(mmap.mmap(fd, job["nbytes"], prot=mmap.PROT_READ)))
    except MegallmError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except OSError as error:
        reason = f"the memory of the checkpoint cannot be read: {error.strerror}"
        return {"error": f"Cannot write {job['path']}: {reason}.", "kind": CannotWrite.__name__}


def main() -> None:
    """Answer until standard input ends; dies with the rank. Signals of the run are not its own."""
    fd, parent = map(int, sys.argv[1:])
    die_with(parent)
    for number in (*stop_signals(), signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(reply_to(line, fd)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
