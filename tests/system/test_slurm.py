"""The Slurm and torchrun examples on a real Slurm and between two hosts (namespaces); skipped loudly otherwise."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import pytest

from tests.system.commands import ROOT, losses_of, make_corpus, megallm, write_config

CLUSTER = ROOT / "tests/cluster"
BATCH = ROOT / "examples/slurm/pretrain.sbatch"
STEPS, LIMIT_SECONDS = 200, 120.0
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
    """A running Slurm of two virtual nodes."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log/ctld.log"
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


def daemons() -> set[str]:
    """Command lines of Slurm's and munge's processes that run (not of zombies)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        name = Path(words[0].decode(errors="replace")).name
        if name in ("slurmctld", "slurmd", "munged", "slurmstepd:"):
            found.add(f"{folder.name} {name}")
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    before = daemons()
    try:
        shell("bash", CLUSTER / "slurm_up.sh", folder, "2")
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", str(CLUSTER / "slurm_down.sh"), str(folder)], timeout=60, check=False)
        until(lambda: daemons() <= before, "the end of the daemons", lambda: str(daemons()))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prefix = make_corpus(folder)
    return write_config(
        folder / "c.yaml", prefix, layout={"tp": 2}, train={"steps": STEPS, "global_batch": 4, "micro_batch": 1},
        checkpoint={"every": 50, "keep": 2}, optim={"lr": 0.003, "warmup_steps": 5},
    )  # fmt: skip


@pytest.fixture(scope="module")
def quiet(config) -> list[tuple[int, float]]:
    """(step, loss) of a run that nobody disturbed, started by megallm itself."""
    run = config.parent / "quiet"
    done = megallm("pretrain", config, f"run.dir={run}", cwd=config.parent)
    assert done.code == 0, done.err
    return losses_of(run)


def submit(cluster: Cluster, config: Path, name: str, launch: str) -> tuple[str, Path, Path]:
    """A job of one rank on each of two nodes: (job, run folder, its output)."""
    run, output = config.parent / name, config.parent / f"{name}.out"
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", f"--output={output}", BATCH, config, f"run.dir={run}", LAUNCH=launch
    )
    until(lambda: len(losses_of(run)) >= 10, "the beginning of the run", lambda: _text(output))
    return job, run, output


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "no output yet"


@again_if_late
def test_a_preempted_job_goes_on_where_it_was(cluster, attempt, config, quiet):
    """Direct srun: a job of a higher priority takes the nodes; ours saves, is queued again and loses nothing."""
    job, run, output = submit(cluster, config, f"preempted{attempt}", "srun")
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
    until(lambda: cluster.field(other, "JobState") == "COMPLETED", "the other job", output.read_text)
    assert losses_of(run)[-1][0] < STEPS, "it was over before it could be preempted"
    cluster.wait(job, output)
    assert losses_of(run) == quiet
    text = output.read_text()
    assert cluster.field(job, "Restarts") == "1" and "start 2" in text and "resumed at step" in text, text


@again_if_late
def test_a_job_whose_time_runs_out_queues_itself_again(cluster, attempt, config, quiet):
    """torchrun: SIGUSR1 (what --signal sends before the end) makes it save and leave with 75; the script requeues."""
    job, run, output = submit(cluster, config, f"usr1{attempt}", "torchrun")
    cluster.call("scancel", "--signal=USR1", job)
    until(lambda: "queued again" in output.read_text(), "queueing again", output.read_text)
    assert losses_of(run)[-1][0] < STEPS
    cluster.wait(job, output)
    assert losses_of(run) == quiet
    assert cluster.field(job, "Restarts") == "1" and "saved; queued again" in output.read_text()


@again_if_late
def test_a_job_that_fails_is_not_queued_again(cluster, attempt, config):
    """Negative control: a mistake in the configuration ends the job with its own exit code."""
    output = config.parent / f"typo{attempt}.out"
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", f"--output={output}", BATCH, config, "layout.tq=2")
    until(lambda: cluster.field(job, "JobState") == "FAILED", "the failure", lambda: _text(output))
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0"
    assert "Did you mean 'layout.tp'?" in output.read_text()


class Other:
    """A cluster that does, or does not, run jobs."""

    def __init__(self, folder: Path, well: bool) -> None:
        self.log, self.well = folder / "log", well
        self.log.write_text("why not")

    def runs_jobs(self) -> bool:
        return self.well


@pytest.mark.parametrize("well", [True, False])
def test_what_is_late_is_tried_again_once_where_slurm_runs_jobs(tmp_path, well):
    attempts = []

    @again_if_late
    def late(cluster, attempt):
        attempts.append(attempt)
        raise NotInTime("the end")

    with pytest.raises(NotInTime if well else pytest.skip.Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        late(cluster=Other(tmp_path, well))
    assert attempts == (["", "-again"] if well else [""])


def test_what_is_wrong_is_not_tried_again(tmp_path):
    attempts = []

    @again_if_late
    def wrong(cluster, attempt):
        attempts.append(attempt)
        raise AssertionError

    with pytest.raises(AssertionError):
        wrong(cluster=Other(tmp_path, True))
    assert attempts == [""]


# torchrun without Slurm.


def test_torchrun_on_one_host(config, quiet, tmp_path):
    run = tmp_path / "run"
    shell(ROOT / "examples/torchrun/one_host.sh", config, f"run.dir={run}", "train.stop_at=30",
          environment=ENVIRONMENT | {"RANKS": "2"}, timeout=LIMIT_SECONDS)  # fmt: skip
    assert losses_of(run) == quiet[:30]


@pytest.fixture
def hosts() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts need root and iproute2 (tests/install_facilities.sh installs it)")
    made = subprocess.run(["bash", str(CLUSTER / "two_hosts.sh"), "up"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    yield
    shell("bash", CLUSTER / "two_hosts.sh", "down")


def test_torchrun_on_two_hosts(hosts, config, quiet, tmp_path):
    run = tmp_path / "run"
    command = f"NODES=2 RANKS=1 {ROOT}/examples/torchrun/hosts.sh {config} run.dir={run} train.stop_at=30"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLOO_SOCKET_IFNAME"}
    shell("bash", CLUSTER / "two_hosts.sh", "run", command, environment=environment, timeout=LIMIT_SECONDS)
    assert losses_of(run) == quiet[:30]
