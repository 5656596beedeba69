"""Row 76: a rank without enough memory says what it needs; the first setting that it names fits under that limit."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.base.device import bytes_refused
from megallm.training.memory import GIB
from tests.system.commands import ROOT, make_corpus, write_config

FOR_THE_MODEL = int(0.4 * GIB)
BEFORE = """
import megallm.launch.group, megallm.training.pretrain
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def limit() -> int:
    """What the interpreter and its libraries take, and some for the model."""
    command = [sys.executable, "-c", BEFORE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout) * 1024 + FOR_THE_MODEL


def train(folder: Path, corpus: str, limit: int, *settings: str) -> subprocess.CompletedProcess[str]:
    """One step under the limit of memory."""
    config = write_config(
        folder / "c.yaml", corpus, model={"hidden_size": 128, "ffn_hidden_size": 384, "num_layers": 4},
        data={"seq_len": 256}, train={"steps": 1, "global_batch": 32, "micro_batch": 32}, checkpoint={"every": 0},
        optim={"warmup_steps": 0},
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "megallm", "launch", "pretrain", str(config), *settings], cwd=folder, text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip


def test_row_76_the_first_setting_that_is_named_fits(tmp_path, corpus, limit):
    done = train(tmp_path, corpus, limit)
    assert done.returncode == 2 and "Rank 0 is out of memory: it needs" in done.stderr, done.stderr
    rows = re.findall(r"^    (\S.*?)   \(about ([\d.]+) GiB\)", done.stderr, re.MULTILINE)
    assert len(rows) == 3, done.stderr
    fits = train(tmp_path, corpus, limit, *rows[0][0].split())
    assert fits.returncode == 0, (rows[0], fits.stderr)


def test_errors_that_are_about_memory():
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes. Error code 12"
    assert bytes_refused(RuntimeError(said)) == 1024
    assert bytes_refused(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")) == int(2.5 * GIB)
    assert bytes_refused(MemoryError()) == 0 and bytes_refused(RuntimeError("shapes differ")) is None
