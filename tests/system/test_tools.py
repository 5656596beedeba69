"""The thin commands for those who look in tools/: short, and equal to the verbs behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.commands import ROOT, megallm

NAMES = ("preprocess_data", "merge_datasets", "convert_checkpoint")


def tool(name: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, words)], cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_they_are_thin(name):
    lines = (ROOT / f"tools/{name}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith(("#", '"""'))]) <= 40


def test_data_from_raw_text_to_a_merged_dataset(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"document {name}"}) + "\n")
        done = tool("preprocess_data", "--input", f"{name}.jsonl", "--output-prefix", name,
                    "--tokenizer-model", "bytes", "--append-eod", "--workers", "1", "--log-interval", "10",
                    cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = tool("merge_datasets", "--input", ".", "--output-prefix", "whole", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["documents"] == 2, done.stderr
    whole = b"".join((tmp_path / f"{name}_text_document.bin").read_bytes() for name in "ab")
    assert (tmp_path / "whole.bin").read_bytes() == whole
    assert megallm("data", "verify", "whole", cwd=tmp_path).code == 0
    again = megallm("preprocess", "--input", "a.jsonl", "--output", "v", "--tokenizer", "bytes", "--append-eod",
                    cwd=tmp_path)  # fmt: skip
    assert again.code == 0
    assert (tmp_path / "v_text_document.idx").read_bytes() == (tmp_path / "a_text_document.idx").read_bytes()


@pytest.mark.parametrize(
    ("name", "words", "code", "sentence"),
    [
        ("preprocess_data", ["--input", "x", "--output-prefix", "y", "--tokenizer-type", "GPT2BPETokenizer"], 2,
         "Hugging Face tokenizer.json"),
        ("merge_datasets", ["--input", ".", "--output-prefix", "y"], 2, "no .idx file"),
        ("merge_datasets", ["--input", "missing", "--output-prefix", "y"], 65, "missing"),
        ("convert_checkpoint", ["--loader", "mcore", "--saver", "hf", "--load-dir", "x", "--save-dir", "y"], 2,
         "megallm converts between"),
        ("convert_checkpoint", ["--loader", "hf", "--saver", "hf", "--load-dir", "x", "--save-dir", "y"], 2,
         "megallm converts between"),
        ("convert_checkpoint", ["--loader", "hf", "--saver", "megallm", "--load-dir", "none", "--save-dir", "y"], 2,
         "none"),
    ],
)  # fmt: skip
def test_mistakes_have_a_sentence(name, words, code, sentence, tmp_path):
    done = tool(name, *words, cwd=tmp_path)
    assert done.returncode == code and sentence in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
