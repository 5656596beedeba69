"""Where the ranks are in their code: py-spy's stacks, or those that faulthandler writes."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SECONDS, MAX_LINES = 5.0, 40
WRITE_STACK = signal.SIGRTMIN + 7
_ANSWER_SECONDS = 0.3
ENTRY = "_joined"  # the function of the launcher that calls what the ranks run


class StackFile:
    """Memory into which a rank writes its stacks when it is asked to, whatever holds its GIL."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("megallm-stack")

    def answer(self) -> None:
        """Write the stacks of this process there from now on, when `WRITE_STACK` comes."""
        faulthandler.register(WRITE_STACK, self.fd, all_threads=True, chain=False)

    def ask(self, pid: int) -> str:
        """Returns what process `pid` wrote; nothing while it is stopped."""
        begin = os.fstat(self.fd).st_size
        with suppress(ProcessLookupError):
            os.kill(pid, WRITE_STACK)
        time.sleep(_ANSWER_SECONDS)
        return os.pread(self.fd, 1 << 16, begin).decode(errors="replace")

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)


def dump_stacks(pids: Mapping[int, int], files: Mapping[int, StackFile]) -> dict[str, str]:
    """Returns the stacks of processes (rank -> pid), by rank; within SECONDS, and without stopping
    any of them.
    """
    beside = Path(sys.executable).with_name("py-spy")
    program, found = shutil.which("py-spy") or shutil.which(beside), {}
    if program is not None:
        command = [program, "dump", "--nonblocking", "--pid"]
        running = {
            rank: subprocess.Popen(
                [*command, str(pid)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for rank, pid in pids.items()
        }
        deadline = time.monotonic() + SECONDS
        for rank, process in running.items():
            found[str(rank)] = _output(process, deadline)
    for rank, pid in pids.items():
        if not found.get(str(rank)) and rank in files:
            found[str(rank)] = _short(files[rank].ask(pid))
    return {rank: stack for rank, stack in found.items() if stack}


def _output(process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        out, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ""
    return _short(out.decode(errors="replace")) if process.returncode == 0 else ""


def _short(text: str) -> str:
    """The main thread's stack, which is where a hang is, up to the launcher; then what fits."""
    blocks = [block for block in text.strip().split("\n\n") if block.strip()]
    blocks.sort(key=lambda block: "MainThread" not in block and "Current thread" not in block)
    if not blocks:
        return ""
    lines = blocks[0].splitlines()
    own = next((n for n, line in enumerate(lines) if ENTRY in line), len(lines))
    return "\n".join([*lines[:own], *"\n".join(blocks[1:]).splitlines()][:MAX_LINES])
