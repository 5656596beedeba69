"""`python -m bench`: every comparison that it lists is there, takes its quick words, and is kept as JSON."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
entry = importlib.import_module("bench.__main__")


@pytest.mark.parametrize("name", entry.BENCHES)
def test_options_are_those_of_the_file(name):
    bench = entry.BENCHES[name]
    source = ROOT / "bench" / bench.file
    if not source.is_file():
        assert name not in re.findall(r"^  (\w+) ", entry.listing(), re.MULTILINE)
        return
    text, given = source.read_text(), set(re.findall(r"--[\w-]+", bench.quick))
    known = set(re.findall(r"--[\w-]+", text)) | {f"--{word}" for word in re.findall(r'"(\w+)": \d', text)}
    assert given <= known and (not bench.rounds or "--rounds" in known)
    assert not bench.needs or bench.needs in known


def test_what_is_printed_is_kept(tmp_path, capsys):
    output = tmp_path / "figures.json"
    words = [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"]
    assert entry.run(words, output) == 3
    kept = json.loads(output.read_text())
    assert kept["lines"] == ["one", "two"] and kept["exit"] == 3 and kept["machine"]["cores"]
    assert capsys.readouterr().out == "one\ntwo\n"


def test_quick_words_and_further_options():
    words = entry.command("head", None, True, ["--ways", "fused"])
    assert words[-4:] == ["--rounds", "2", "--ways", "fused"] and "--tokens" in words
    assert entry.command("data", 5, False, []) == [sys.executable, str(ROOT / "bench" / "data.py")]


def test_it_lists_without_a_name_and_names_what_is_missing():
    run = [sys.executable, "-m", "bench"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "generation" in done.stdout
    done = subprocess.run([*run, "data"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "data needs --tokenizer" in done.stderr
