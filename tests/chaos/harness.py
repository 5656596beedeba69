"""Runs that are disturbed on purpose, and the run that nobody disturbs, which they must end like."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megallm.launch.board import HeartbeatBoard, open_board
from tests.system.commands import Done, Started, dump, losses_of, make_corpus, megallm, start, write_config

STEPS, EVERY = 24, 2
HANG_SECONDS, LAUNCH_SECONDS = 2.0, 400.0
LAYOUTS: dict[str, dict[str, int]] = {
    "dp2 tp2": {"dp": 2, "tp": 2},
    "pp2 dp2": {"pp": 2, "dp": 2},
    "cp2 tp2": {"cp": 2, "tp": 2},
    "dp4": {"dp": 4},
}


@dataclass(frozen=True)
class Scene:
    """A folder with a corpus, where runs of one length live."""

    folder: Path
    corpus: str
    steps: int = STEPS

    def config(self, name: str, layout: str, **sections: Any) -> Path:
        """The configuration of a run called `name` at a layout."""
        given = {
            "run": {"dir": name}, "layout": LAYOUTS[layout], "train": {"steps": self.steps},
            "checkpoint": {"every": EVERY, "keep": 3}, "launch": {"hang_seconds": HANG_SECONDS},
        }  # fmt: skip
        for section, values in sections.items():
            given[section] = given.get(section, {}) | values
        return write_config(self.folder / f"{name}.yaml", self.corpus, **given)

    def quiet(self, layout: str) -> Path:
        """The run that nobody disturbs."""
        return quiet_run(self, layout)[0]

    def launch(self, name: str, layout: str, faults: Sequence[str] = (), **sections: Any) -> tuple[Path, Done]:
        """A run under `megallm launch` with faults, to its end."""
        with fault_variable(faults):
            config = self.config(name, layout, **sections)
            done = megallm("launch", "pretrain", config, cwd=self.folder, timeout=LAUNCH_SECONDS)
        return self.folder / name, done

    def begin(self, name: str, layout: str, **sections: Any):
        """The same, to be watched while it runs."""
        return start("launch", "pretrain", self.config(name, layout, **sections), cwd=self.folder)

    def check_same(self, run: Path, layout: str) -> None:
        """The final state and every loss are those of the quiet run, bit for bit."""
        quiet, theirs = quiet_run(self, layout)
        ours = dump(run)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        assert losses_of(run) == losses_of(quiet)


@cache
def quiet_run(scene: Scene, layout: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The run that nobody disturbs, and its final state."""
    name = f"quiet-{layout.replace(' ', '-')}"
    done = megallm("pretrain", scene.config(name, layout), cwd=scene.folder)
    assert done.code == 0, done.err
    return scene.folder / name, dump(scene.folder / name)


@contextmanager
def fault_variable(faults: Sequence[str]):
    """Have the commands inside struck by faults."""
    before = os.environ.pop("MEGALLM_FAULT", None)
    if faults:
        os.environ["MEGALLM_FAULT"] = ";".join(faults)
    try:
        yield
    finally:
        os.environ.pop("MEGALLM_FAULT", None)
        if before is not None:
            os.environ["MEGALLM_FAULT"] = before


def scene_in(folder: Path, steps: int = STEPS) -> Scene:
    """A new scene."""
    folder.mkdir(parents=True, exist_ok=True)
    return Scene(folder, make_corpus(folder), steps)


def events_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of a run, of some kinds."""
    path = run / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [row for row in rows if not kinds or row["event"] in kinds]


def fault(kind: str, rank: int, step: int, phase: str, attempt: int | str = 0) -> str:
    """The text of one fault."""
    return f"rank={rank},step={step},phase={phase},kind={kind},attempt={attempt}"


def wait_for_phase(
    launcher: int, running: Started, rank: int, phase: str, step: int, seconds: float = 60.0
) -> HeartbeatBoard | None:
    """The board once `rank` is in `phase` of `step` or later; None when the command ended before."""
    end = time.monotonic() + seconds
    while running.running and time.monotonic() < end:
        try:
            board = open_board(launcher)
        except OSError:
            time.sleep(0.005)
            continue
        for _ in range(200):
            state = board.read(rank)
            if state.beats > 2 and state.step >= step and state.phase == phase:
                return board
            time.sleep(0.0005)
        board.close()
    return None
