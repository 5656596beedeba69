"""A real Slurm of virtual nodes on this machine, for tests (`slurm_up.sh`)."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import pytest

from tests.system.commands import ROOT

CLUSTER = ROOT / "tests/cluster"
LIMIT_SECONDS = 120.0
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
OVER = ("FAILED", "CANCELLED", "TIMEOUT")
ENVIRONMENT = os.environ | {
    "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo", "NO_COLOR": "1",
}  # fmt: skip


def missing() -> str:
    """Why there can be no Slurm here, or an empty text."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    lacking = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"not installed: {', '.join(lacking)} (tests/install_facilities.sh installs them)" if lacking else ""


def shell(*words: str | Path, environment: dict[str, str] | None = None, timeout: float = 60.0) -> str:
    done = subprocess.run(
        [str(word) for word in words], env=environment or ENVIRONMENT, cwd=ROOT, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class NotInTime(AssertionError):
    """Something of Slurm or of a job did not happen within LIMIT_SECONDS."""


def until(condition: Callable[[], object], what: str, more: Callable[[], str] = str) -> None:
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > LIMIT_SECONDS:
            raise NotInTime(f"{what} did not happen.\n{more()}")
        time.sleep(0.1)


class Cluster:
    """A running Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log/ctld.log"
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}

    def submit(self, *words: str | Path, **variables: str) -> str:
        out = shell("sbatch", "--parsable", *words, environment=self.environment | variables)
        return out.strip()

    def field(self, job: str, name: str) -> str:
        out = shell("scontrol", "show", "job", job, environment=self.environment)
        return out.partition(f"{name}=")[2].split()[0]

    def call(self, *words: str) -> None:
        shell(*words, environment=self.environment)

    def start_again(self, job: str) -> None:
        """A requeued job is held for two minutes; wait less, but not nothing: a start in the second in which the first
        one ended is refused and fails the job ("Job credential revoked": Slurm compares whole seconds)."""
        until(lambda: self.field(job, "JobState") in ("PENDING", "RUNNING", "COMPLETED"), "requeueing")
        if self.field(job, "JobState") == "PENDING":
            time.sleep(2)
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, job: str, output: Path) -> None:
        """Until the job has completed, started again when it is queued again."""

        def ended() -> bool:
            state = self.field(job, "JobState")
            if state == "PENDING" and self.field(job, "Reason") == "BeginTime":
                self.start_again(job)
            assert state not in OVER, f"{state}\n{output.read_text()}\n{self.log.read_text()}"
            return state == "COMPLETED"

        until(ended, "the end of the job", output.read_text)

    def runs_jobs(self) -> bool:
        """Whether a job that does nothing comes to its end, once all others are cancelled."""
        try:
            self.call("scancel", "--user=root")
            job = self.submit("--nodes=2", "--wrap=true", "--output=/dev/null")
            until(lambda: self.field(job, "JobState") == "COMPLETED", "the end of a job that does nothing")
        except (NotInTime, AssertionError, subprocess.TimeoutExpired):
            return False
        return True


def again_if_late(test: Callable[..., None]) -> Callable[..., None]:
    """The test once more where something took too long although Slurm runs jobs; skipped where it runs none."""

    @wraps(test)
    def attempts(cluster: Cluster, **fixtures) -> None:
        try:
            test(cluster, "", **fixtures)
        except NotInTime as late:
            if not cluster.runs_jobs():
                pytest.skip(f"Slurm's daemons no longer run jobs here: {cluster.log.read_text()[-2000:]}")
            warnings.warn(f"tried again: {late}", stacklevel=2)
            test(cluster, "-again", **fixtures)

    signature = inspect.signature(test)
    attempts.__signature__ = signature.replace(  # what pytest reads the fixtures from
        parameters=[parameter for name, parameter in signature.parameters.items() if name != "attempt"]
    )
    return attempts


def daemons(folder: Path) -> set[str]:
    """The processes of the cluster in a folder, and its munged, that run (not zombies)."""
    name, found = folder / "munge", set()
    own = [str(folder).encode(), name.read_text().strip().encode() if name.exists() else b"?"]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        program = Path(words.split(b"\0")[0].decode(errors="replace")).name
        if program in ("slurmctld", "slurmd", "munged") and any(word in words for word in own):
            found.add(f"{process.name} {program}")
    return found


@contextmanager
def running_cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """Slurm with its state in `folder`; its daemons end with the context."""
    try:
        shell("bash", CLUSTER / "slurm_up.sh", folder, str(nodes))
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", str(CLUSTER / "slurm_down.sh"), str(folder)], timeout=60, check=False)
        until(lambda: not daemons(folder), "the end of the daemons", lambda: str(daemons(folder)))
