"""Who may write a run folder: `RUN/LOCK`, the lease of the job that runs. No torch.

Every write into the run folder asks the lease first: a job that was frozen for long finds at its
next write that another one took the folder over, and ends.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megallm.base.errors import CannotWrite, LeaseLost
from megallm.base.files import writing
from megallm.run.runfolder import RunFolder

log = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
STALE_SECONDS = 300.0  # a lease of another host without a heartbeat for so long is taken over


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder. `machine` is boot id and pid namespace: where `pid` means
    something.
    """

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
        return Holder(
            socket.gethostname(), os.getpid(), start, _machine(), since, secrets.token_hex(8)
        )


class Lease:
    """The right to write a run folder: `LOCK`, kept alive by a thread that touches it.

    Errors of construction: `CannotWrite` when another job holds the folder. A lease whose process
    is gone from this machine is taken over at once; one of another machine after `stale_seconds`
    without a heartbeat, by the clock of the file system. Use it as a context manager, or call
    `release`.
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
        self._thread = threading.Thread(
            target=self._keep_beating, args=(beat_seconds,), daemon=True, name="lease"
        )
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
                raise CannotWrite(
                    f"The run folder {self.path.parent} was just taken by another job."
                ) from error
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
            who = (
                f"host {holder.host}, process {holder.pid}, since {holder.since}"
                if holder
                else "an unknown job"
            )
            raise CannotWrite(
                f"The run folder {self.path.parent} is held by {who} (last sign of life "
                f"{silent:.0f} s ago). Stop that job, or choose another run.dir. A lease of a dead "
                f"job on another machine is taken over after {stale_seconds:.0f} s."
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
        except OSError as error:
            # a stale network file handle, a full disk: try again at the next beat
            log.debug("heartbeat of %s failed: %s", self.path, error)

    def _mine(self) -> bool:
        """Returns whether LOCK still names this job; an unreadable one counts as ours, a missing
        one does not.
        """
        holder = read_holder(self.path)
        return self.path.exists() if holder is None else holder.token == self.holder.token

    def check(self) -> None:
        """Call it before every write. Errors: `LeaseLost` when another job took the folder over.

        It reads LOCK (some 20 microseconds): a process that was frozen writes before its heartbeat
        wakes up.
        """
        if not self.lost and not self._mine():
            self.lost = True
        if self.lost:
            holder = read_holder(self.path)
            who = "another job, which has ended meanwhile"
            if holder is not None and holder.token != self.holder.token:
                who = f"host {holder.host}, process {holder.pid}, since {holder.since}"
            raise LeaseLost(
                f"The run folder {self.path.parent} was taken over by {who}: this job was silent "
                "for too long. It stops and writes nothing more there; the new one goes on from "
                "the newest checkpoint."
            )

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
    """Returns who holds a LOCK; None when it is gone or unreadable."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_taken(folder: RunFolder) -> bool:
    """Returns whether a job that this process did not start holds a run's folder."""
    holder = read_holder(folder.lock)
    if holder is None or holder.is_here and not holder.runs:
        return False
    if not holder.is_here:
        return True
    try:
        words = Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return False
    return int(words[1]) != os.getpid() and holder.pid != os.getpid()


def held_by(folder: RunFolder, pid: int) -> bool:
    """Returns whether process `pid` of this machine may write: it holds the LOCK, or nobody
    does.
    """
    holder = read_holder(folder.lock)
    return not folder.lock.exists() if holder is None else holder.is_here and holder.pid == pid


def drop_dead_lease(folder: RunFolder) -> None:
    """Remove the LOCK of a process of this machine that was killed: a job elsewhere would wait
    until it is stale.
    """
    with suppress(OSError), _alone(folder.path):
        holder = read_holder(folder.lock)
        if holder is not None and holder.is_here and not holder.runs:
            folder.lock.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job of this host at a time looks at the LOCK (where the file system has locks on
    folders).
    """
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
    """Returns when a process of this machine started, in clock ticks since boot; None when it is
    gone or a zombie.

    Together with the pid this names a process for good: pids are used again, start times are not.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
