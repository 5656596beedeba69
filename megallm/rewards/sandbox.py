"""Model-written Python in bubblewrap, and the verdict of its tests. Fails closed, and Linux only.

Each process has its own namespaces (user, pid, network, ipc, mount), an empty read-only root with
the C library and Python's standard library, a small tmpfs at /tmp, the uid of nobody, no
capabilities, a seccomp filter (`seccomp`) and hard rlimits; this process measures wall time and
output. Without bubblewrap, user namespaces or a seccomp table nothing runs at all.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from megallm.base.errors import DataError, InternalError, UsageError
from megallm.rewards import seccomp

_CHILD = Path(__file__).with_name("sandboxed.py")
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_NOBODY = "65534"
_PR_SET_CHILD_SUBREAPER = 36
_GONE_SECONDS = 30.0  # for the kernel to take away what was killed
_KILLED = {128 + number for number in (signal.SIGXCPU, signal.SIGKILL)}  # at the CPU limit
INSTALL = (
    "install it (Debian, Ubuntu: `apt-get install bubblewrap`, 0.8 or newer) and allow user "
    "namespaces (`sysctl kernel.unprivileged_userns_clone=1`, on Ubuntu also "
    "`kernel.apparmor_restrict_unprivileged_userns=0`; in Docker `--security-opt seccomp=unconfined`)"
)


@dataclass(frozen=True)
class Limits:
    """What one process of the sandbox may use. The CPU limit decides; wall time is for sleepers."""

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_bytes: int = 512 << 20  # address space; /tmp has a tenth of it
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64
    tasks: int = (
        64  # processes and threads; binds every user but root, for whom seccomp forbids processes
    )

    def resources(self) -> dict[str, int]:
        """Returns hard limits by the names of the module `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_seconds, "RLIMIT_AS": self.memory_bytes, "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files, "RLIMIT_NPROC": self.tasks, "RLIMIT_CORE": 0,
        }  # fmt: skip


@dataclass(frozen=True)
class CodeTests:
    """The tests of a function: one of a text, statements, or calls with what they give.

    `text`: asserts, functions `test_...`, or `check(candidate)` for `entry_point` (HumanEval).
    `statements`: each is a test (MBPP). `calls`: pairs (arguments, result) of `entry_point`.
    `setup` runs before.
    """

    text: str | None = None
    statements: Sequence[str] | None = None
    calls: Sequence[tuple[Sequence[Any], Any]] | None = None
    entry_point: str | None = None
    setup: str = ""

    def job(self) -> dict[str, Any]:
        """Returns what is set."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Judgement:
    """How many tests passed, and the first thing that went wrong."""

    passed: int
    total: int
    error: str = ""
    output: str = ""

    @property
    def ok(self) -> bool:
        """True when there are tests and all passed."""
        return 0 < self.total == self.passed


@dataclass(frozen=True)
class ProgramEnd:
    """How a process ended: its exit status (None: stopped by us, for `error`) and its output."""

    status: int | None
    output: str
    errors: str
    error: str = ""


def run_program(code: str, text: str = "", limits: Limits | None = None) -> ProgramEnd:
    """Returns how a program ends that reads `text` from its standard input.

    Errors: UsageError where there is no sandbox.
    """
    limits = limits or Limits()
    check_sandbox()
    with ExitStack() as stack:
        box = _Box(stack, "program", {"code": code}, limits, text=text)
        error = _wait([box], limits, box)
        return box.ending(error)


def judge_programs(
    code: str, cases: Sequence[tuple[str, str]], limits: Limits | None = None
) -> Judgement:
    """Returns how many (input, output) pairs a program satisfies: it ends with status 0, and its
    lines are those expected but for white space at their ends.
    """
    limits = limits or Limits()
    passed, told, shown = 0, "", ""
    deadline = time.monotonic() + limits.wall_seconds  # of all together
    for text, expected in cases:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        ending = run_program(code, text, replace(limits, wall_seconds=left))
        right = ending.status == 0 and _lines(ending.output) == _lines(expected)
        passed += right
        if not right and not told:
            told = ending.error or (
                f"prints {ending.output[:200]!r} instead of {expected[:200]!r}"
                if ending.status == 0
                else f"exit status {ending.status}: {ending.errors[-300:]}"
            )
            shown = ending.output
    return Judgement(passed, len(cases), told, shown)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def judge(code: str, tests: CodeTests, limits: Limits | None = None) -> Judgement:
    """Returns the verdict of `tests` on `code`, from a process that never runs the code.

    Errors: UsageError where there is no sandbox; DataError for tests that cannot be run so.
    """
    limits = limits or Limits()
    check_sandbox()
    with ExitStack() as stack:
        questions, answers, verdict = (_pipe(stack) for _ in range(3))
        tested = _Box(stack, "serve", {"code": code}, limits, (questions[0], answers[1]))
        ends = (answers[0], questions[1], verdict[1])
        asking = _Box(stack, "judge", tests.job(), limits, ends)
        for end in (*questions, *answers, verdict[1]):
            end.close()
        error = _wait([tested, asking], limits, asking)
        line = verdict[0].read(1 << 16) if not error else b""
        if not line:
            error = error or f"the tests gave no verdict: {asking.ending('').errors[-300:]}"
            return Judgement(0, 1, error, tested.ending(error).output)
        said = json.loads(line)
        if said["unsupported"]:
            raise DataError(f"These tests cannot be run apart from the code: {said['error']}.")
        if said["ended"]:
            with suppress(subprocess.TimeoutExpired):
                tested.process.wait(timeout=1.0)
        found = tested.ending("")
        told = f"{said['error']} {found.error}".strip() if said["ended"] else said["error"]
        return Judgement(said["passed"], said["total"], told, found.output)


def check_sandbox() -> None:
    """Raises UsageError, which says why and what to do, where code cannot be confined."""
    error = _unavailable(shutil.which("bwrap"))
    if error:
        raise UsageError(
            f"Model-written code is run in bubblewrap only, and {error}: {INSTALL}. It is never "
            "run without a sandbox."
        )


@functools.cache
def _unavailable(bwrap: str | None) -> str:
    """Returns why there is no sandbox, "" when a trial run in it worked."""
    if platform.machine() not in seccomp.MACHINES:
        return f"there is no table of system calls for {platform.machine()}"
    if bwrap is None:
        return "bwrap is not on the PATH"
    trial = Limits()
    with ExitStack() as stack:
        box = _Box(stack, "program", {"code": "print(6 * 7)"}, trial)
        _wait([box], trial, box, check=False)
        ending = box.ending("")
    said = " ".join(ending.errors.split())[-300:]
    return "" if ending.output == "42\n" else f"bwrap does not work here ({said})"


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    inward, outward = os.pipe()
    ends = os.fdopen(inward, "rb", 0), os.fdopen(outward, "wb", 0)
    for end in ends:
        stack.callback(end.close)
    return ends


def _file(stack: ExitStack, content: bytes) -> IO[bytes]:
    file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


class _Box:
    """A process in the sandbox; leaving the stack kills all of it and waits until it is gone."""

    def __init__(
        self,
        stack: ExitStack,
        role: str,
        job: Mapping[str, Any],
        limits: Limits,
        files: Sequence[IO[bytes]] = (),
        text: str = "",
    ) -> None:
        _ADOPTING.enter()
        stack.callback(_ADOPTING.leave)
        whole = _file(stack, json.dumps({**job, "limits": limits.resources()}).encode())
        filters = _file(stack, seccomp.build_filter(platform.machine()))
        status, self.started = _pipe(stack), _pipe(stack)
        passed = [whole, self.started[1], *files]
        words = [*command(limits, filters.fileno(), status[1].fileno()), role]
        self.streams = {"output": bytearray(), "errors": bytearray()}
        self.process = subprocess.Popen(
            [*words, *(str(file.fileno()) for file in passed)],
            stdin=_file(stack, text.encode()),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[file.fileno() for file in (*passed, filters, status[1])],
        )
        self.init: int | None = None
        stack.callback(self.end)
        for end in (status[1], self.started[1]):
            end.close()
        with suppress(ValueError, ProcessLookupError):  # no line: bubblewrap itself failed
            self.init = os.pidfd_open(json.loads(_line(status[0]))["child-pid"])

    def end(self) -> None:
        """Ends every process of the sandbox, by the first one of its pid namespace."""
        if self.process.poll() is None:
            self.process.kill()  # with --die-with-parent it takes the namespace with it
        self.process.wait()
        if self.init is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init, signal.SIGKILL)
            with selectors.DefaultSelector() as gone:
                gone.register(self.init, selectors.EVENT_READ)
                if not gone.select(_GONE_SECONDS):
                    raise InternalError("A process of the sandbox does not end after SIGKILL.")
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.init, os.WEXITED)
            os.close(self.init)
            self.init = None
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()

    def check_started(self) -> None:
        """Raises InternalError when the tested code was not reached: that is no verdict on it."""
        if self.started[0].read(1) != b"S":
            said = " ".join(self.streams["errors"].decode("utf-8", "replace").split())[-300:]
            raise InternalError(f"The sandbox did not start: {said or 'bubblewrap said nothing'}.")

    def ending(self, error: str) -> ProgramEnd:
        """Returns how it ended."""
        output, errors = (
            bytes(stream).decode("utf-8", "replace") for stream in self.streams.values()
        )
        status = None if error else self.process.poll()
        if status in _KILLED or (status == 1 and "MemoryError" in errors[-2000:]):
            error = "out of memory" if status == 1 else "over its CPU time"
        return ProgramEnd(status, output, errors, error)


class _Adopting:
    """Makes this process the parent of what bubblewrap leaves behind, while a sandbox lives:
    without it the first process of each stays a zombie in a container whose own first process reaps
    nothing. Afterwards the orphans of others are theirs again.
    """

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def enter(self) -> None:
        """Begins with the first sandbox."""
        with self.lock:
            self.count += 1
            self._set(True)

    def leave(self) -> None:
        """Ends with the last one."""
        with self.lock:
            self.count -= 1
            self._set(self.count > 0)

    def _set(self, on: bool) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


_ADOPTING = _Adopting()


def _line(file: IO[bytes]) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = file.read(1)
        if not piece:
            break
        line += piece
    return line


def _wait(boxes: Sequence[_Box], limits: Limits, last: _Box, check: bool = True) -> str:
    """Read what the boxes write until `last` has ended; why it was stopped before, else ""."""
    deadline = time.monotonic() + limits.wall_seconds
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        over = os.pidfd_open(last.process.pid)
        stack.callback(os.close, over)
        selector.register(over, selectors.EVENT_READ)
        for box in boxes:
            for name, stream in (("output", box.process.stdout), ("errors", box.process.stderr)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, box.streams[name])
        ended = False
        while not ended:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return f"over {limits.wall_seconds:g} seconds"
            ended = any(key.fileobj == over for key, _ in ready)
            for key in list(selector.get_map().values()) if ended else [key for key, _ in ready]:
                if key.data is not None and not _read(selector, key, limits.output_bytes):
                    return f"more than {limits.output_bytes} bytes of output"
            if time.monotonic() > deadline:
                return f"over {limits.wall_seconds:g} seconds"
    if check:
        for box in boxes:
            box.check_started()
    return ""


def _read(selector: selectors.BaseSelector, key: selectors.SelectorKey, most: int) -> bool:
    """Read what is there; False when it is too much."""
    while True:
        try:
            piece = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return True
        if not piece:
            selector.unregister(key.fileobj)
            return True
        key.data.extend(piece)
        if len(key.data) > most:
            return False


def confined() -> list[str]:
    """Returns the words before a command that may read the file system and nothing more: no
    network, no writing, no process of others.
    """
    words = [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
        "--ro-bind",
        "/",
        "/",
    ]
    words += ["--dev", "/dev", "--proc", "/proc", "--size", str(64 << 20), "--tmpfs", "/dev/shm"]
    return [*words, "--setenv", "TMPDIR", "/dev/shm", "--setenv", "MPLCONFIGDIR", "/dev/shm"]


def command(limits: Limits, filter_file: int, status_file: int) -> list[str]:
    """Returns the words that start Python in the sandbox, up to the arguments of `sandboxed`."""
    python = os.path.realpath(sys.executable)
    library = os.path.join(os.path.realpath(sys.base_prefix), "lib")
    words = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    words += ["--cap-drop", "ALL", "--uid", _NOBODY, "--gid", _NOBODY, "--hostname", "sandbox"]
    words += ["--clearenv", "--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/tmp"]
    for folder in _SYSTEM:
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    words += ["--ro-bind", library, library, "--ro-bind", python, python]
    words += ["--ro-bind", str(_CHILD), "/sandboxed.py"]
    for device in ("null", "zero", "urandom"):
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    words += ["--size", str(limits.memory_bytes // 10), "--tmpfs", "/tmp", "--remount-ro", "/"]
    words += ["--chdir", "/tmp", "--seccomp", str(filter_file)]
    words += ["--json-status-fd", str(status_file)]
    return [*words, python, "-I", "-S", "-B", "/sandboxed.py"]
