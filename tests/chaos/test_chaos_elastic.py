"""Rows 32-34 of the fault matrix: fewer ranks go on with the same global batch and order of data, and all come back."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallm.base.config import load
from megallm.base.errors import UsageError
from megallm.cli.elastic import layout_for
from megallm.launch.elastic import BatchRule, LayoutSizes, choose_layout, valid_worlds
from megallm.training.config import PretrainConfig
from megallm.training.validate import check
from tests.cluster.slurm import Cluster, missing, running_cluster, shell, until
from tests.system.commands import losses_of, make_corpus, megallm, start, write_config

STEPS = 120  # long enough that a new checkpoint is seen before the end
TREE = {"steps": STEPS, "global_batch": 8, "micro_batch": 1, "determinism": "tree"}
PLAIN = {"steps": STEPS, "global_batch": 12, "micro_batch": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def written(folder: Path, corpus: str, **sections: Any) -> Path:
    return write_config(
        folder / "c.yaml", corpus, **{"run": {"dir": "run"}, "checkpoint": {"every": 3, "keep": 9}} | sections
    )


# --- which layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "ranks", "batch", "expected"),
    [
        (LayoutSizes(dp=4), 3, 12, LayoutSizes(dp=3)),
        (LayoutSizes(dp=4), 3, 8, LayoutSizes(dp=2)),  # 8 samples are no 3 equal shares
        (LayoutSizes(dp=4), 4, 8, LayoutSizes(dp=4)),  # they are back
        (LayoutSizes(pp=2, dp=2, tp=2), 7, 8, LayoutSizes(pp=2, dp=1, tp=2)),  # row 34: 8 -> 7
        (LayoutSizes(pp=2, dp=4, tp=2), 15, 12, LayoutSizes(pp=2, dp=3, tp=2)),
        (LayoutSizes(pp=2, dp=1, cp=2, tp=2), 7, 8, LayoutSizes(pp=2, dp=1, cp=1, tp=2)),  # no replica: cp gives way
        (LayoutSizes(pp=4, dp=1, tp=2), 5, 8, LayoutSizes(pp=2, dp=1, tp=2)),  # then pp
        (LayoutSizes(tp=4, dp=1), 3, 8, LayoutSizes(tp=2, dp=1)),  # then tp
        (LayoutSizes(dp=4, ep=4), 3, 12, LayoutSizes(dp=3, ep=1)),
        (LayoutSizes(dp=8, ep=4), 7, 24, LayoutSizes(dp=6, ep=2)),
    ],
)  # fmt: skip
def test_row_34_the_next_layout(wish, ranks, batch, expected):
    assert choose_layout(wish, ranks, BatchRule(batch)) == expected


def test_row_34_a_world_that_cannot_be_is_refused_with_those_that_can():
    with pytest.raises(UsageError, match=r"7 ranks are left, .* 7 to 7 ranks fits: .* ranks that fit: 1, 2, 4, 8"):
        choose_layout(LayoutSizes(dp=8), 7, BatchRule(8), least=7)
    with pytest.raises(UsageError, match=r"0 ranks are left"):
        choose_layout(LayoutSizes(dp=8), 0, BatchRule(8))
    assert valid_worlds(LayoutSizes(dp=4, tp=2), BatchRule(12)) == [1, 2, 3, 4, 6, 8]


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 4), st.integers(1, 40), st.integers(1, 48))
def test_row_34_a_chosen_layout_always_fits(pp, dp, tp, ranks, batch):
    wish, rule = LayoutSizes(pp=pp, dp=dp, tp=tp), BatchRule(batch)
    try:
        found = choose_layout(wish, ranks, rule)
    except UsageError:
        assert rule(LayoutSizes()) != ""  # one rank with one replica is the last resort
        return
    assert found.world <= ranks and found.dp <= dp and not rule(found)
    assert found.dp * rule.microbatches(found.dp) == batch, "the global batch stays"
    kept = [size for size in range(1, dp + 1) if size * pp * tp <= ranks and batch % size == 0]
    if kept:
        assert found == LayoutSizes(pp=pp, dp=max(kept), tp=tp), "what divides the model stays while a replica fits"


def test_row_34_the_rules_of_the_configuration_decide(tmp_path, corpus):
    """Not the batch alone: a vocabulary, heads, layers, ZeRO and the tree have a say."""
    config = load(PretrainConfig, written(tmp_path, corpus, train=TREE, layout={"tp": 2}))
    sizes, words = layout_for("pretrain", config, 7, 1, 8)
    assert (sizes, words) == (LayoutSizes(dp=2, tp=2), ["layout.dp=2"])
    sizes, words = layout_for("pretrain", config, 1, 1, 8)
    assert (sizes, words) == (LayoutSizes(), ["layout.dp=1", "layout.tp=1"])
    for ranks in range(1, 9):
        sizes, words = layout_for("pretrain", config, ranks, 1, 8)
        check(load(PretrainConfig, tmp_path / "c.yaml", words), sizes.world)  # UsageError if it did not fit


# --- with processes --------------------------------------------------------------------------------------------------


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event", row.get("kind")) == kind]


def quiet(folder: Path, config: Path, *words: str) -> list[tuple[int, float]]:
    done = megallm("pretrain", config, "run.dir=quiet", *words, cwd=folder)
    assert done.code == 0, done.err
    return losses_of(folder / "quiet")


def elastic(folder: Path, config: Path, fault: str, *options: str) -> str:
    running = start("launch", "--min-ranks", "1", "--max-ranks", "4", *options, "pretrain", config, cwd=folder,
                    imported=True, MEGALLM_FAULT=fault)  # fmt: skip
    try:
        done = running.wait()
    finally:
        running.kill_all()
    assert done.code == 0, done.out
    return done.out


@pytest.mark.parametrize("train", [TREE, PLAIN], ids=["tree", "plain"])
def test_rows_32_33_a_place_is_lost_and_comes_back(tmp_path, corpus, train):
    """Rank 3 dies in step 5 twice: fewer ranks go on; at the next checkpoint all four do. Bitwise with the tree."""
    config, run = written(tmp_path, corpus, train=train), tmp_path / "run"
    strike = "rank=3,step=5,phase=backward,kind=kill,attempt="
    said = elastic(tmp_path, config, f"{strike}0;{strike}1")
    fewer = 2 if train is TREE else 3
    assert f"goes on with {fewer} of 4 ranks (layout.dp={fewer})" in said
    assert "a new checkpoint; all 4 ranks again" in said
    ours, theirs = losses_of(run), quiet(tmp_path, config)
    assert [step for step, _ in ours] == list(range(1, STEPS + 1))
    if train is TREE:
        assert ours == theirs
    worst = max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert worst <= 1e-6, worst


# --- on a real Slurm -------------------------------------------------------------------------------------------------


def lose_node(cluster: Cluster, name: str) -> None:
    """SIGKILL to everything of a virtual node: its slurmd, and the steps with their ranks below it."""
    daemon = int((cluster.folder / f"slurmd-{name}.pid").read_text())
    steps = [pid for pid in _processes() if _environment_of(pid).get("SLURMD_NODENAME") == name]
    for pid in (daemon, *_step_daemons(name), *steps):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _environment_of(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.partition("=")[::2] for pair in text.split("\0"))


def _step_daemons(name: str) -> set[int]:
    """The slurmstepds of a node: the parents of what runs there."""
    found = set()
    for pid in _processes():
        if _environment_of(pid).get("SLURMD_NODENAME") != name:
            continue
        with suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.add(parent)
    return found


@pytest.mark.slow
def test_rows_32_33_a_node_of_slurm_goes_down_and_comes_back(tmp_path, corpus):
    """Three nodes, two after one was lost, three again: every step once, the losses of a quiet run to 1e-6."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    steps = 120
    config = written(tmp_path, corpus, train=PLAIN | {"steps": steps}, checkpoint={"every": 5, "keep": 3})
    run = tmp_path / "run"
    with running_cluster(tmp_path / "slurm", 3) as cluster:
        environment = cluster.environment | {"CHECK_SECONDS": "1"}
        words = ("launch", "--slurm", "--nodes", "3", "--min-nodes", "2", "pretrain", config, f"run.dir={run}")
        job = shell(sys.executable, "-m", "megallm", *words, environment=environment).partition("job ")[2].split()[0]
        output = run / f"logs/slurm-{job}.out"

        def said(text: str) -> bool:
            return output.exists() and text in output.read_text()

        def told() -> str:
            return output.read_text() if output.exists() else cluster.log.read_text()

        until(lambda: len(losses_of(run)) >= 12, "the beginning", told)
        lose_node(cluster, "n3")
        until(lambda: said("2 nodes, 2 ranks layout.dp=2"), "the start on two nodes", told)
        until(lambda: said("resumed at step"), "going on with two ranks", told)
        shell("slurmd", "-f", cluster.folder / "slurm.conf", "-N", "n3", environment=environment)
        until(lambda: said("3 nodes can be had again"), "the node that came back", told)
        cluster.wait(job, output)
    text = output.read_text()
    assert text.count("3 nodes, 3 ranks") == 2, text
    ours, theirs = losses_of(run), quiet(tmp_path, config, "train.stop_at=40")
    assert [step for step, _ in ours] == list(range(1, steps + 1))
    assert max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours[:40], theirs, strict=True)) <= 1e-5
