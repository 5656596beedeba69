"""Row 27 of the fault matrix: a network that parts two hosts ends both, and nobody else writes meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.slurm import CLUSTER, ENVIRONMENT
from tests.system.commands import losses_of, make_corpus, megallm, write_config

HOSTS, TIMEOUT_SECONDS, SLACK_SECONDS, STEPS = "mp", 6.0, 60.0, 400
SCRIPT = ["bash", str(CLUSTER / "two_hosts.sh")]


@pytest.fixture
def hosts() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("iptables") is None:
        pytest.skip("two hosts need root, iproute2 and iptables (tests/install_facilities.sh installs them)")
    environment = os.environ | {"HOSTS": HOSTS}
    made = subprocess.run([*SCRIPT, "up"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    yield
    subprocess.run([*SCRIPT, "down"], env=environment, timeout=60, check=False)


def on_host(rank: int, config: Path, *words: str) -> subprocess.Popen[str]:
    """A rank on a host of its own, started as torchrun starts one."""
    plain = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHON"}
    environment = plain | {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29700", "MEGALLM_COLLECTIVES": "gloo", "GLOO_SOCKET_IFNAME": f"{HOSTS}v{rank}",
    }  # fmt: skip
    return subprocess.Popen(
        ["ip", "netns", "exec", f"{HOSTS}{rank}", sys.executable, "-m", "megallm", "pretrain", str(config), *words],
        cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def part(action: str) -> None:
    for direction, flag in (("INPUT", "-i"), ("OUTPUT", "-o")):
        rule = ["iptables", action, direction, flag, f"{HOSTS}v0", "-j", "DROP"]
        subprocess.run(["ip", "netns", "exec", f"{HOSTS}0", *rule], check=True, timeout=30)


@pytest.mark.chaos
def test_row_27_parted_hosts_both_end_and_there_is_one_writer(hosts, tmp_path):
    config = write_config(
        tmp_path / "c.yaml", make_corpus(tmp_path), layout={"dp": 2}, train={"steps": STEPS, "global_batch": 4},
        checkpoint={"every": 4, "keep": 2}, launch={"timeout_seconds": TIMEOUT_SECONDS},
    )  # fmt: skip
    run = tmp_path / "run"
    ranks = [on_host(rank, config) for rank in range(2)]
    try:
        begin = time.monotonic()
        while len(losses_of(run)) < 6:
            assert all(rank.poll() is None for rank in ranks), [rank.communicate()[0] for rank in ranks]
            assert time.monotonic() - begin < 120, "nothing happened"
            time.sleep(0.05)
        part("-I")
        begin = time.monotonic()
        second = megallm("pretrain", config, "layout.dp=1", "train.stop_at=2", cwd=tmp_path)
        waited = time.monotonic() - begin
        assert second.code == 73 and "is held by" in second.err or waited > TIMEOUT_SECONDS, second.err
        said = [rank.communicate(timeout=TIMEOUT_SECONDS + SLACK_SECONDS)[0] for rank in ranks]
        assert time.monotonic() - begin < TIMEOUT_SECONDS + SLACK_SECONDS
        assert [rank.returncode for rank in ranks] == [69, 69], said
        assert "lost a peer" in said[1], said
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
    rows = losses_of(run)
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1)) and not (run / "LOCK").exists()
    end = len(rows) + 5
    again = megallm("pretrain", config, "layout.dp=1", f"train.stop_at={end}", "--resume", "must", cwd=tmp_path)
    quiet = megallm("pretrain", config, "layout.dp=1", f"train.stop_at={end}", "run.dir=quiet", cwd=tmp_path)
    assert again.code == quiet.code == 0, again.err
    ours, theirs = losses_of(run), losses_of(tmp_path / "quiet")
    assert [step for step, _ in ours] == list(range(1, end + 1))
    assert max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) <= 1e-5
