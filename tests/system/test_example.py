"""What examples/01_pretrain says at its start about the time it will take."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.system.commands import ROOT

FOLDER = "examples/01_pretrain"


def estimate(*settings: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, f"{FOLDER}/estimate.py", f"{FOLDER}/config.yaml", *settings]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_time_is_told_and_grows_with_the_steps():
    """Issue 24; four times the steps, between two and eight times the minutes: a measurement, not a constant."""
    minutes = []
    for steps in (2000, 8000):
        done = estimate(f"train.steps={steps}", "train.precision=fp32")
        assert done.returncode == 0, done.stderr
        words = rf"{steps} steps will take about ([\d.]+) minutes on the \d+ cores? used here.*\n"
        said = re.fullmatch(words, done.stdout)
        assert said, done.stdout
        minutes.append(float(said[1]))
    assert 2 < minutes[1] / minutes[0] < 8


def test_a_wrong_setting_is_a_sentence_before_anything_is_prepared():
    done = estimate("train.stepz=3")
    assert done.returncode == 2 and "train.steps" in done.stderr and "Traceback" not in done.stderr


def test_run_sh_tells_it_between_installation_and_preparation():
    text = (ROOT / FOLDER / "run.sh").read_text()
    order = ["tools/install.sh", "estimate.py", "corpus.py $here", "5/6"]
    assert sorted(order, key=text.index) == order
