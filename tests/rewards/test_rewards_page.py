"""docs/rewards.md runs as it stands; the verbs that show and try rewards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.cli.main import main
from megallm.rewards.table import known

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
ROWS = [
    {"prompt": "2 + 2?", "completion": "4", "answer": "4"},
    {"prompt": [{"role": "user", "content": "3 + 3?"}], "completion": [{"role": "assistant", "content": "5\x1b[2J"}],
     "answer": "6"},
]  # fmt: skip


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_snippet_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == re.search(r"# (\('exact_match.*)", code)[1]


def test_the_page_names_every_reward():
    assert not [name for name in known() if f"`{name}" not in PAGE]


def test_try(tmp_path, capfd):
    file = write(tmp_path / "rows.jsonl", ROWS)
    own = tmp_path / "mine.py"
    own.write_text("def f(completions, **columns): return [None if one == '4' else 0.5 for one in completions]")
    assert main(["rewards", "try", "exact_match", f"{own}:f", "--input", file]) == 0
    said = capfd.readouterr().out
    assert "   0  exact_match 1, f none  |  4\n" in said and "   1  exact_match 0, f 0.5  |  5" in said
    assert "\x1b" not in said
    assert "exact_match: mean 0.5, standard deviation 0.5, 2 rows\nf: mean 0.5" in said
    assert main(["rewards", "try", "repetition_penalty", "--input", file, "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[1]) == {"row": 1, "repetition_penalty": 0.0}


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_try_code_of_the_page(tmp_path, capfd):
    (row,) = re.findall(r'^\{"prompt.*test_list.*$', PAGE, re.MULTILINE)
    assert main(["rewards", "try", "code", "--input", write(tmp_path / "rows.jsonl", [json.loads(row)])]) == 0
    assert "code 1  |" in capfd.readouterr().out


def test_what_cannot_be_tried(tmp_path, capfd):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": "y"}])
    for words, code, said in [
        (["exact_match", "--input", file], 65, "needs the right answer in a column"),
        (["exakt_match", "--input", file], 2, "Did you mean 'exact_match'"),
        (["exact_match", "--input", str(tmp_path / "no")], 2, "cannot be read"),
        (["exact_match", "--input", write(tmp_path / "bad.jsonl", [{"prompt": 1}])], 65, "bad.jsonl:1: a row needs"),
        (["exact_match", "--input", write(tmp_path / "none.jsonl", [])], 65, "has no row"),
    ]:
        assert main(["rewards", "try", *words]) == code
        assert said in " ".join(capfd.readouterr().err.split())


def test_list(capfd):
    assert main(["rewards", "list"]) == 0
    said = capfd.readouterr().out
    assert all(name in said for name in known()) and "compute_score(data_source" in said
    assert "soft_overlong(max_completion_len: int, soft_punish_cache: int)" in said
