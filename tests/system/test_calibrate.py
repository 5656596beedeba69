"""Issue R, C.24: examples/01_pretrain says at its start how long it will take on this machine."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.base.config import replace
from megallm.training.config import PretrainConfig
from tests.system.commands import ROOT, write_config

SCRIPT = ROOT / "examples/01_pretrain/calibrate.py"
estimate = runpy.run_path(str(SCRIPT))["estimate"]


@pytest.mark.parametrize(
    ("done", "every", "left", "seconds"),
    [(0, 80, 320, 320 * 0.5 + 5 * 24 / 6 + 40), (160, 80, 160, 160 * 0.5 + 3 * 24 / 6 + 40),
     (0, 0, 320, 320 * 0.5 + 24 / 6 + 40)],
)  # fmt: skip
def test_the_estimate_is_steps_held_out_losses_and_starts(done, every, left, seconds):
    config = replace(PretrainConfig(), {"train.steps": 320, "eval.every": every, "eval.batches": 24})
    assert estimate(config, done, 0.5, 10.0) == (left, pytest.approx(seconds))


def test_it_is_asked_before_anything_long_and_with_the_same_settings():
    script = (ROOT / "examples/01_pretrain/run.sh").read_text()
    (call,) = re.findall(r"^\$python \$here/calibrate\.py (.*)$", script, re.MULTILINE)
    (train,) = re.findall(r"^\$megallm pretrain (.*)$", script, re.MULTILINE)
    assert call == train
    at = [script.index(part) for part in ('say "1/6', "precision=(train", "calibrate.py", 'say "2/6', 'say "5/6')]
    assert at == sorted(at)


def calibrate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_it_measures_a_few_steps_of_the_run_itself(tmp_path):
    """The data of the run need not be there yet, nothing is left behind, and a finished run is not measured."""
    config = write_config(tmp_path / "c.yaml", "nowhere_text_document")
    done = calibrate(tmp_path, str(config), "train.steps=2000")
    assert done.returncode == 0, done.stderr
    said = r"This will take about \d+ (seconds|minutes) on this machine: 2000 steps of \d+\.\d\d s, measured just now"
    assert re.match(said, done.stdout) and [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 12}\n{"step": 13')
    assert "was trained before" in calibrate(tmp_path, str(config)).stdout


def test_what_cannot_be_measured_is_said_and_stops_nothing(tmp_path):
    config = write_config(tmp_path / "c.yaml", "nowhere_text_document", layout={"tp": 3})
    done = calibrate(tmp_path, str(config))
    assert done.returncode == 0 and "could not be measured" in done.stderr and "layout.tp 3" in done.stderr
