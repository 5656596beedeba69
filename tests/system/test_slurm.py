"""`megallm launch --slurm` on a real Slurm and torchrun between two hosts (namespaces); skipped loudly otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megallm.launch.slurm import SlurmJob, write_script
from tests.cluster.slurm import (
    CLUSTER,
    ENVIRONMENT,
    LIMIT_SECONDS,
    Cluster,
    NotInTime,
    again_if_late,
    missing,
    running_cluster,
    shell,
    until,
)  # fmt: skip
from tests.system.commands import ROOT, losses_of, make_corpus, megallm, write_config

STEPS = 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


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


def launch(cluster: Cluster, config: Path, name: str, *options: str) -> tuple[str, Path, Path]:
    """A job of one rank on each of two nodes: (job, run folder, its output)."""
    run = config.parent / name
    out = shell(sys.executable, "-m", "megallm", "launch", "--slurm", "--nodes", "2", *options, "pretrain", config,
                f"run.dir={run}", environment=cluster.environment)  # fmt: skip
    job = out.partition("job ")[2].split()[0]
    output = run / f"logs/slurm-{job}.out"
    until(lambda: len(losses_of(run)) >= 10, "the beginning of the run", lambda: _text(output))
    return job, run, output


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "no output yet"


@again_if_late
def test_a_preempted_job_goes_on_where_it_was(cluster, attempt, config, quiet):
    """Direct srun: a job of a higher priority takes the nodes; ours saves, is queued again and loses nothing."""
    job, run, output = launch(cluster, config, f"preempted{attempt}")
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
    job, run, output = launch(cluster, config, f"usr1{attempt}", "--launcher", "torchrun")
    cluster.call("scancel", "--signal=USR1", job)
    until(lambda: "queued again" in output.read_text(), "queueing again", output.read_text)
    assert losses_of(run)[-1][0] < STEPS
    cluster.wait(job, output)
    assert losses_of(run) == quiet
    assert cluster.field(job, "Restarts") == "1" and "saved; queued again" in output.read_text()


@again_if_late
def test_a_job_that_fails_is_not_queued_again(cluster, attempt, config):
    """Negative control: a mistake in the script's words ends the job with its own exit code."""
    run = config.parent / f"typo{attempt}"
    job = SlurmJob(["pretrain", str(config), "layout.tq=2"], run, ROOT, sys.executable, nodes=2)
    number, output = cluster.submit(write_script(job)), run / "logs"
    until(lambda: cluster.field(number, "JobState") == "FAILED", "the failure")
    assert cluster.field(number, "ExitCode") == "2:0" and cluster.field(number, "Restarts") == "0"
    assert "Did you mean 'layout.tp'?" in (output / f"slurm-{number}.out").read_text()


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
