"""The run folder: who holds it, and the files a person and a dashboard read. No torch.

RUN/run.yaml        resolved configuration          RUN/logs/rank-*.log
RUN/env.json        versions, commit, layout        RUN/checkpoints/
RUN/metrics.jsonl   one row a step: the truth       RUN/plots/
RUN/events.jsonl    saves, restarts, skips          RUN/LOCK   lease of the job that runs

Logs never stop training: a row that cannot be written is kept in memory, told once, and written when there is
space again.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megallm.base.errors import CannotWrite, InternalError
from megallm.base.files import atomic_path, atomic_write_json, atomic_write_text, cannot_write, writing

log = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
STALE_SECONDS = 300.0  # a lease of another host without a heartbeat for so long is taken over
_MAX_PENDING = 100_000  # rows kept in memory while the disk is full


class RunFolder:
    """The paths of one run folder, and its small files. Only rank 0 writes anything but its own log."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "run.yaml"
        self.environment = self.path / "env.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.plots = self.path / "plots"
        self.lock = self.path / "LOCK"

    def prepare(self) -> None:
        """Make the folders and prove that they can be written. Errors: `CannotWrite`, before any work is done."""
        with writing(self.path):
            for folder in (self.path, self.checkpoints, self.logs, self.plots):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".write-test-{os.getpid()}-{secrets.token_hex(4)}"
                try:
                    probe.write_bytes(b"megallm")
                finally:
                    probe.unlink(missing_ok=True)

    def log_path(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def write_config(self, text: str) -> None:
        """run.yaml: the resolved configuration. Errors: `CannotWrite`."""
        atomic_write_text(self.config, text)

    def write_environment(self, extra: Mapping[str, Any]) -> None:
        """env.json: host, versions and commit, and what the caller adds (layout, world, backend, ...)."""
        atomic_write_json(self.environment, {**describe_environment(), **extra})


def describe_environment() -> dict[str, Any]:
    """Host, Python, versions of the packages that matter (None when absent), and the commit of this checkout."""
    versions: dict[str, str | None] = {}
    for name in ("megallm", "torch", "numpy", "safetensors", "tokenizers", "xxhash", "pyyaml"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with `+` when files differ; None when it is installed."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


# --- the lease -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder. `machine` is boot id and pid namespace: where `pid` means something."""

    host: str
    pid: int
    process_start: int
    machine: str
    since: str
    token: str

    @property
    def is_here(self) -> bool:
        """Its process can be seen from this one."""
        return self.machine == _machine() and self.host == socket.gethostname()

    @property
    def runs(self) -> bool:
        """Its process lives; only for one that `is_here`."""
        return _process_start(self.pid) == self.process_start

    @staticmethod
    def me() -> Holder:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        start = _process_start(os.getpid()) or 0
        return Holder(socket.gethostname(), os.getpid(), start, _machine(), since, secrets.token_hex(8))


class Lease:
    """The right to write a run folder: `LOCK`, kept alive by a thread that touches it.

    Errors of construction: `CannotWrite` when another job holds the folder. A lease whose process is gone from
    this machine is taken over at once; one of another machine after `stale_seconds` without a heartbeat, by the
    clock of the file system. Use it as a context manager, or call `release`.
    """

    def __init__(
        self,
        folder: RunFolder,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        holder: Holder | None = None,
    ) -> None:
        self.path = folder.lock
        self.holder = holder or Holder.me()
        self.lost = False
        with writing(self.path):
            self._acquire(stale_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, args=(beat_seconds,), daemon=True, name="lease")
        self._thread.start()

    def _acquire(self, stale_seconds: float) -> None:
        """Put our LOCK in place, or raise."""
        clock = self.path.with_name(f"LOCK.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            clock.touch()  # its time is the file system's now, whatever the clocks of the hosts say
            now = clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)
        with _alone(self.path.parent):
            if self.path.exists():
                self._check_dead(now, stale_seconds)
                self.path.unlink(missing_ok=True)
            try:
                fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileExistsError as error:
                raise CannotWrite(f"The run folder {self.path.parent} was just taken by another job.") from error
            try:
                with os.fdopen(fd, "w", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(self.holder)) + "\n")
            except OSError:  # a full disk: a LOCK that names nobody would keep everybody out
                self.path.unlink(missing_ok=True)
                raise

    def _check_dead(self, now: float, stale_seconds: float) -> None:
        holder = read_holder(self.path)
        try:
            silent = max(0.0, now - self.path.stat().st_mtime)
        except FileNotFoundError:
            return
        alive = silent <= stale_seconds if holder is None or not holder.is_here else holder.runs
        if alive:
            who = f"host {holder.host}, process {holder.pid}, since {holder.since}" if holder else "an unknown job"
            raise CannotWrite(
                f"The run folder {self.path.parent} is held by {who} (last sign of life {silent:.0f} s ago). "
                f"Stop that job, or choose another run.dir. A lease of a dead job on another machine is taken over "
                f"after {stale_seconds:.0f} s."
            )

    def _keep_beating(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            self.beat()

    def beat(self) -> None:
        """Show that this job lives; notes when the lease went to somebody else."""
        try:
            if self._mine():
                os.utime(self.path)
            else:
                self.lost = True
        except OSError as error:  # a stale network file handle, a full disk: try again at the next beat
            log.debug("heartbeat of %s failed: %s", self.path, error)

    def _mine(self) -> bool:
        """Whether LOCK still names this job; an unreadable one counts as ours, a missing one does not."""
        holder = read_holder(self.path)
        return self.path.exists() if holder is None else holder.token == self.holder.token

    def check(self) -> None:
        """Errors: `CannotWrite` when another job took the folder over (this one was silent for too long)."""
        if self.lost:
            holder = read_holder(self.path)
            who = f"host {holder.host}, process {holder.pid}" if holder else "someone"
            raise CannotWrite(f"The run folder {self.path.parent} was taken over by {who}; this job stops writing.")

    def release(self) -> None:
        """Give the folder back; harmless when the lease is lost."""
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if self._mine():
                self.path.unlink()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def read_holder(path: Path) -> Holder | None:
    """Who holds a LOCK; None when it is gone or unreadable."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def drop_dead_lease(folder: RunFolder) -> None:
    """Remove the LOCK of a process of this machine that was killed: a job elsewhere would wait until it is stale."""
    with suppress(OSError), _alone(folder.path):
        holder = read_holder(folder.lock)
        if holder is not None and holder.is_here and not holder.runs:
            folder.lock.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job of this host at a time looks at the LOCK (where the file system has locks on folders)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _machine() -> str:
    """Boot id and pid namespace; two processes that agree about it can see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None when it is gone or a zombie.

    Together with the pid this names a process for good: pids are used again, start times are not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# --- rows of JSON --------------------------------------------------------------------------------------------------


class JsonLines:
    """A file of one JSON object a line, appended whole lines at a time.

    A half-written last line (a crash) is dropped on opening. Floats round-trip exactly; JSON has no NaN or
    infinity, they become null. Errors: `CannotWrite` on opening only; `append` never fails on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)
        self._warned = False
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _whole_lines(self._fd)
            os.ftruncate(self._fd, self._size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; on a full disk keep it and try again with the next one."""
        self._pending.append(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
        self.flush()

    def flush(self) -> bool:
        """Write what is pending; True when nothing is left."""
        try:
            while self._pending:
                line = self._pending[0]
                if os.write(self._fd, line) != len(line):
                    raise OSError(errno.ENOSPC, "short write")
                self._size += len(line)
                self._pending.popleft()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
            if not self._warned:
                log.warning(
                    "%s Rows are kept in memory and written when it works again.", cannot_write(self.path, error)
                )
            self._warned = True
            return False
        self._warned = False
        return True

    def sync(self) -> None:
        """Make the rows durable; call it before a checkpoint that counts on them. Never fails."""
        if self.flush():
            with suppress(OSError):
                os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1


class Metrics(JsonLines):
    """metrics.jsonl: rows in order of `step`, each step once.

    On resume at step s (`resume=s`) the rows of later steps are cut, atomically; s = 0 starts empty.
    """

    def __init__(self, path: Path, resume: int) -> None:
        self.last_step = rewind(path, resume)
        super().__init__(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the row of one step. Errors: InternalError when its step is not above the last one."""
        if row["step"] <= self.last_step:
            raise InternalError(f"metrics.jsonl already has step {self.last_step}; a row of step {row['step']} came.")
        self.last_step = row["step"]
        super().append(row)


class Events(JsonLines):
    """events.jsonl: what happened, when: `{"time": seconds since 1970, "event": kind, ...}`."""

    def add(self, kind: str, **fields: Any) -> None:
        self.append({"time": time.time(), "event": kind, **fields})


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file; a half-written or damaged line is passed over, a missing file has none."""
    try:
        with open(path, "rb") as file:
            for line in file:
                row = _parse(line)
                if row is not None:
                    yield row
    except FileNotFoundError:
        return


def rewind(path: Path, step: int) -> int:
    """Cut the rows of a metrics file that are later than `step`, damaged, or out of order; atomic.

    Returns the last step that is left, 0 without any. The file is written again only when something goes.
    Errors: `CannotWrite`.
    """
    if not path.exists():
        return 0
    with writing(path), open(path, "rb") as file:
        kept, last, total = _ranges_to_keep(file, step)
        if sum(end - begin for begin, end in kept) != total:
            with atomic_path(path) as temporary, temporary.open("wb") as copy:
                for begin, end in kept:
                    _copy_range(file, copy, begin, end)
    return last


def _ranges_to_keep(file: BinaryIO, step: int) -> tuple[list[tuple[int, int]], int, int]:
    """Byte ranges of the rows that stay, the last step among them, and the size of the file."""
    kept: list[tuple[int, int]] = []
    last = begin = 0
    for line in file:
        end = begin + len(line)
        number = _step_of(line)
        if number is not None and last < number <= step:
            last = number
            if kept and kept[-1][1] == begin:
                kept[-1] = (kept[-1][0], end)
            else:
                kept.append((begin, end))
        begin = end
    return kept, last, begin


def _copy_range(source: BinaryIO, target: BinaryIO, begin: int, end: int) -> None:
    source.seek(begin)
    while begin < end:
        data = source.read(min(end - begin, 1 << 20))
        target.write(data)
        begin += len(data)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: bytes) -> int | None:
    row = _parse(line)
    step = None if row is None else row.get("step")
    return step if type(step) is int else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _whole_lines(fd: int) -> int:
    """The size of a file up to and with its last newline."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - 65536)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
