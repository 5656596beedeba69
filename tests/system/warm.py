"""Starts `megallm` commands from a process that has imported torch: each saves the two seconds of CPU of that import.

A command is a process of its own, forked like the ranks of a run, with the environment, folder, output and session it
was asked for, and it ends as an interpreter does. The server imports, forks and does nothing else. For every command
it forks a keeper, which tells the process id, waits, and tells how it ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]


# --- the client ----------------------------------------------------------------------------------------------------


class Command:
    """A started command with the part of subprocess.Popen that tests use."""

    def __init__(self, words: list[str], cwd: Path, environment: dict[str, str], output: Path, errors: Path | None):
        self._wire = socket.socket(socket.AF_UNIX)
        self._wire.connect(_server())
        request = {"words": words, "cwd": str(cwd), "environment": environment, "output": str(output)}
        request |= {"errors": errors and str(errors)}
        self._wire.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._wire.makefile()
        self.returncode: int | None = None
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        return self._result(0.0)

    def wait(self, timeout: float) -> int:
        code = self._result(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _result(self, timeout: float) -> int | None:
        if self.returncode is None:
            self._wire.settimeout(max(timeout, 1e-4))
            try:
                self.returncode = int(self._wire.recv(64))  # one short message: it arrives whole
            except TimeoutError:
                return None
            self._wire.close()
        return self.returncode


@cache
def _server() -> str:
    """The address of this process's server, which ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="megallm-warm-")
    address = f"{folder.name}/socket"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.system.warm", address], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the server of commands ended with {server.wait()}")

    def end() -> None:
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return address


# --- the server ----------------------------------------------------------------------------------------------------


def serve(address: str) -> list[str]:
    """Serve until stdin ends, and return the words of the command in a process that is to be one."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    gc.collect()
    gc.freeze()  # what is imported stays shared between processes, also while they end
    os.write(1, b"ready\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's to wait for
    if os.fork() == 0:
        os.read(0, 1)  # the end of the pytest that started us
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    while True:
        wire, _ = listener.accept()
        if os.fork():
            wire.close()
            continue
        listener.close()
        request = json.loads(wire.makefile().readline())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():
            _keep(pid, wire)
        wire.close()
        return _become(request)


def _keep(pid: int, wire: socket.socket) -> NoReturn:
    """Tell the command's process id, and its exit code when it has one."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.setsid()
    try:
        wire.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        wire.sendall(str(code).encode())
    except BrokenPipeError:  # the test did not want to know
        pass
    os._exit(0)


def _become(request: dict[str, Any]) -> list[str]:
    """Take the place of the command: session, folder, environment, output."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    errors = output if request["errors"] is None else os.open(request["errors"], os.O_WRONLY | os.O_CREAT, 0o644)
    for opened, number in ((null, 0), (output, 1), (errors, 2)):
        os.dup2(opened, number)
        os.set_inheritable(number, True)
    for opened in {null, output, errors}:
        os.close(opened)
    return request["words"]


if __name__ == "__main__":
    import safetensors.torch  # noqa: F401
    import torch.distributed  # noqa: F401

    from megallm.cli.main import main

    sys.argv[1:] = serve(sys.argv[1])
    if hook := os.environ.get("MEGALLM_TEST_HOOK"):  # module:function, called in the command before it begins
        module, _, name = hook.partition(":")
        vars(importlib.import_module(module))[name]()
    sys.argv[0] = str(ROOT / "megallm/__main__.py")
    sys.exit(main())
