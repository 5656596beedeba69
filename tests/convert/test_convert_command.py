"""The command: what it prints, how it ends, how much memory it takes, and what a kill leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.cli.main import main
from megallm.convert import families
from megallm.data.text.tokenizer_folder import TOKENIZER_FORMS
from tests.convert.test_convert_parity import broken, swap_gate_and_up
from tests.convert.tiny import MEASURING, case, make

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LLAMA = case("llama", "LlamaConfig")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "hf", LLAMA)


def test_it_prints_one_json_object(folder, tmp_path, capsys):
    words = ["convert", "--to", "megallm", "--input", str(folder), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "output": str(tmp_path / "out"), "family": "llama", "dtype": "float32", "tensors": 24, "bytes": 4 * 27_168,
        "notes": [f"{folder} has no {TOKENIZER_FORMS}; the result has no tokenizer"],
    }  # fmt: skip
    assert "note: " in captured.err
    assert (tmp_path / "out/model.yaml").read_text().startswith("model:\n  family: llama\n  num_layers: 3\n")
    assert main(words) == 2 and "nothing is overwritten unasked" in capsys.readouterr().err


def test_verification_that_fails_prints_the_error_and_exits_70(folder, tmp_path, capsys, monkeypatch):
    words = ["convert", "--to", "megallm", "--input", str(folder), "--output", str(tmp_path / "out"), "--verify"]
    monkeypatch.setitem(families.FAMILIES, "llama", broken("llama", swap_gate_and_up))
    assert main(words) == 70
    captured = capsys.readouterr()
    assert json.loads(captured.out)["max_rel_error"] > 1e-3
    assert "differ from those of transformers" in captured.err
    assert not list(tmp_path.glob("out*"))


def test_without_transformers_verify_says_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ["convert", "--to", "megallm", "--input", str(folder), "--output", str(tmp_path / "out")]
    assert main([*words, "--verify"]) == 2
    assert "pip install transformers" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--to", "hf", "--input", "nowhere", "--output", "o"], 2, "is not a folder"),
        (["--to", "hf", "--input", "hf", "--output", "o"], 2, "is a Hugging Face folder already"),
        (["--to", "megallm", "--input", ".", "--output", "o"], 2, "no Hugging Face folder"),
        (["--to", "hf", "--input", ".", "--output", "o"], 74, "no valid checkpoint"),
        (["--to", "hf", "--input", ".", "--output", "no/way/o"], 73, "a folder on the way to it does not exist"),
        (["--to", "megallm", "--input", "hf", "--output", "o", "--dtype", "fp16"], 2, "is fp64, fp32, bf16"),
        (["--to", "gguf", "--input", "hf", "--output", "o"], 2, "invalid choice: 'gguf'"),
        (["--to", "hf", "--input", "hf", "--output", "o", "--max-shard-gib", "0"], 2, "must be greater than 0"),
    ],
)
def test_wrong_use(folder, tmp_path, capsys, monkeypatch, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == code
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("o*"))


MEASURE = (
    MEASURING
    + """
import torch
from megallm.convert.convert import ConvertRequest, run
from megallm.convert.weights import HfReader
torch.set_num_threads(1)
run(ConvertRequest("megallm", sys.argv[1], sys.argv[3] + "-warm"))
run(ConvertRequest("hf", sys.argv[3] + "-warm", sys.argv[3] + "-warm-back"))
streamed = []
for output in (sys.argv[3], sys.argv[3] + "-again"):
    before = begin()
    done = run(ConvertRequest("megallm", sys.argv[2], output, dtype=sys.argv[4]))
    run(ConvertRequest("hf", output, output + "-back"))
    streamed.append(kib("VmHWM") - before)
before = begin()
with HfReader(sys.argv[2]) as reader:  # negative control: everything at once is seen
    whole = [torch.empty(reader.info(name)[0]) for name in reader.names()]
    for name, tensor in zip(reader.names(), whole):
        reader.read_into(name, (0,) * tensor.dim(), tensor)
print(min(streamed) * 1024, done["bytes"], (kib("VmHWM") - before) * 1024)
"""
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_that_of_one_tensor(folder, tmp_path, dtype):
    """A model of 79 MB with a largest logical tensor of 8 MiB (a stack): both ways take less than three of those.

    In the better of two runs: what an allocator happens to hold differs by several MiB from run to run.
    """
    large = case("llama", "LlamaConfig", hidden_size=512, intermediate_size=2048, num_hidden_layers=5)
    make(tmp_path / "large", large, shard="30MB")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "large"), str(tmp_path / "out"), dtype],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, total, whole = map(int, done.stdout.split())
    assert total > 39e6 and whole > 55e6 and grown < 24 * 2**20, (grown, total, whole)


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_a_kill_leaves_nothing_at_the_final_name(folder, tmp_path, delay):
    """SIGKILL once the temporary folder is there; afterwards the same command works."""
    large = case("llama", "LlamaConfig", hidden_size=512, intermediate_size=2048, num_hidden_layers=5)
    make(tmp_path / "large", large)
    words = [sys.executable, "-m", "megallm", "convert", "--to", "megallm", "--input", str(tmp_path / "large"),
             "--output", str(tmp_path / "out")]  # fmt: skip
    running = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.tmp-*")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    running.kill()
    running.wait()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob("out.tmp-*")
    again = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0 and f"{left}: left by a conversion that was killed" in again.stderr
    assert (tmp_path / "out/checkpoints/step-00000000/manifest.json").exists()
