"""`megallm schedule`: the grid, the JSON, the files, and a sentence with exit code 2 for everything impossible."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.cli import main as cli
from megallm.cli.schedule import parse_cost
from megallm.parallel.schedule import SCHEDULES
from megallm.parallel.simulate import Cost

ROOT = Path(__file__).parents[2]


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main(["schedule", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_grid_of_1f1b(capsys):
    code, out, err = call(capsys, "--kind", "1f1b", "--pp", 2, "--micros", 3)
    assert (code, err) == (0, "")
    assert out == (
        "time     0  1  2  3  4  5  6  7  8  9  10 11 12\n"
        "rank 0   F0 F1       B0--- F2 B1---    B2---\n"
        "rank 1      F0 B0--- F1 B1--- F2 B2---\n"
        "\n"
        "F3 forward, B3 backward of microbatch 3; - goes on; blank: the rank waits\n"
        "1f1b: 2 ranks, 3 microbatches; bubble 33.3%, idle 25.0%\n"
        "makespan 12, work of the busiest rank 9\n"
        "peak live activations (microbatch, stage) by rank: 2 1\n"
    )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_json_and_trace_and_pictures(kind, capsys, tmp_path):
    names = {option: tmp_path / f"out.{option}" for option in ("json", "trace")}
    drawn = tmp_path / "out.svg"
    words = ["--kind", kind, "--pp", 3, "--micros", 6, "--json", names["json"], "--trace", names["trace"]]
    code, out, _ = call(capsys, *words, "--draw", drawn)
    assert code == 0
    found = json.loads(names["json"].read_text())
    assert found.keys() == {"ranks", "makespan", "bubble_fraction", "idle_fraction", "peak_live"}
    ops = {"forward": "F", "zb-h1": "FBW", "zb-v": "FBW"}.get(kind, "FB")
    stages = 6 if kind in ("interleaved", "zb-v") else 3
    actions = [slot for row in found["ranks"] for slot in row]
    assert len(found["ranks"]) == len(found["peak_live"]) == 3
    assert sorted((slot["op"], slot["micro"], slot["stage"]) for slot in actions) == sorted(
        (op, micro, stage) for op in ops for micro in range(6) for stage in range(stages)
    )
    assert found["makespan"] == max(slot["end"] for slot in actions)
    assert min(slot["start"] for slot in actions) == 0
    rows = "\n".join(line for line in out.splitlines() if line.startswith("rank "))
    labels = re.findall(r"[FBW]\d+[ab]?(?=[- \n])", rows + "\n")
    assert len(labels) == len(actions)  # the grid shows each
    assert drawn.read_text().count("<title>") == len(actions)
    assert sum(event["ph"] == "X" for event in json.loads(names["trace"].read_text())["traceEvents"]) == len(actions)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("columns", [40, 80, 132])
def test_the_grid_fits_the_terminal_and_has_a_legend(kind, columns, capsys, monkeypatch):
    """Issue R, C.23: it was over 200 columns wide, without a legend."""
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = call(capsys, "--kind", kind, "--pp", 4, "--micros", 16)
    rows = [line for line in out.splitlines() if line.startswith(("rank ", "time "))]
    assert code == 0 and rows and max(map(len, rows)) <= columns
    assert "F3 forward" in out and "of microbatch 3; - goes on; blank: the rank waits" in out
    assert ("W3 weight gradient" in out) == kind.startswith("zb") and ("B3" in out) == (kind != "forward")
    assert ("model chunk of the rank" in out) == (kind in ("interleaved", "zb-v"))
    labels = re.findall(r"[FBW]\d+", " ".join(row[9:] for row in rows if row.startswith("rank ")))
    ops = {"forward": 1, "zb-h1": 3, "zb-v": 3}.get(kind, 2)
    assert len(labels) == ops * 4 * 16 * (2 if kind in ("interleaved", "zb-v") else 1)  # none is cut in two


def test_the_picture_calls_microbatches_microbatches(capsys, tmp_path):
    """Issue R, C.23: the legend said `(number: chunk)` beside boxes whose numbers are microbatches."""
    for kind, chunks in (("zb-v", True), ("1f1b", False)):
        assert call(capsys, "--kind", kind, "--pp", 2, "--micros", 4, "--draw", tmp_path / f"{kind}.svg")[0] == 0
        text = (tmp_path / f"{kind}.svg").read_text()
        assert "number in a box: microbatch" in text and "number: chunk" not in text
        assert ("shade: model chunk of the rank, from 0 (dark) to 1 (light)" in text) == chunks


def test_closed_form_with_costs(capsys, tmp_path):
    words = ["--kind", "1f1b", "--pp", 4, "--micros", 8, "--cost", "F=2,B=3,W=0.5", "--json", tmp_path / "a.json"]
    assert call(capsys, *words)[0] == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["makespan"] == 11 * 5.5 and found["bubble_fraction"] == 3 / 8
    assert found["peak_live"] == [4, 3, 2, 1]


def test_torch_is_not_imported(tmp_path):
    words = ["schedule", "--kind", "zb-v", "--pp", "2", "--micros", "4", "--draw", str(tmp_path / "a.png")]
    code = "import sys; sys.modules['torch'] = None\nfrom megallm.cli.main import main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}raise SystemExit(main({words!r}))"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_terminal_gets_colours_in_bands_of_its_width(capsys, monkeypatch):
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "60", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, out, _ = call(capsys, "--kind", "interleaved", "--pp", 2, "--micros", 8)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert code == 0 and plain != out
    bands = [line for line in plain.splitlines() if line.startswith("rank 1")]
    assert len(bands) > 3 and all(len(line) <= 60 for line in bands)
    whole = "".join(line[9:] + " " * (60 - len(line)) for line in bands)
    assert len(re.findall(r"[FB]\d[ab]", whole)) == 32


def test_costs_far_apart_still_make_a_grid(capsys):
    code, out, _ = call(capsys, "--kind", "zb-h1", "--pp", 2, "--micros", 4, "--cost", "F=1000,B=0.001,W=0")
    assert code == 0 and max(map(len, out.splitlines())) < 300


def test_a_grid_nobody_can_read_is_left_out(capsys):
    code, out, _ = call(capsys, "--kind", "gpipe", "--pp", 8, "--micros", 1000)
    assert code == 0 and "grid of 16000 boxes is left out" in out and len(out.splitlines()) < 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--kind 2f2b --pp 2 --micros 2", "invalid choice: '2f2b'"),
        ("--kind 1f1b --micros 2", "required: --pp"),
        ("--kind 1f1b --pp two --micros 2", "invalid int value: 'two'"),
        ("--kind 1f1b --pp 0 --micros 2", "--pp is 0; it must be at least 1"),
        ("--kind 1f1b --pp -3 --micros 2", "--pp is -3"),
        ("--kind 1f1b --pp 2 --micros 0", "--micros is 0"),
        ("--kind interleaved --pp 2 --micros 2 --chunks 0", "--chunks is 0"),
        ("--kind interleaved --pp 2 --micros 2 --group 0", "--group is 0"),
        ("--kind 1f1b --pp 2 --micros 2 --chunks 2", "1f1b has 1 chunk"),
        ("--kind zb-v --pp 2 --micros 2 --chunks 3", "zb-v has 2 chunk"),
        ("--kind 1f1b --pp 1000000 --micros 1000000", "at most 200000"),
        ("--kind interleaved --pp 6 --chunks 3 --micros 12 --group 4", "deadlocks: rank 0 waits to run F5@6 for F5@5"),
        ("--kind 1f1b --pp 2 --micros 2 --cost F=x", "'F=x' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --cost F=1,Q=2", "'Q=2' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --cost F", "'F' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --cost F=0", "'F=0' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --cost B=-1", "'B=-1' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --cost B=nan", "'B=nan' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --cost B=inf", "'B=inf' is not understood"),
        ("--kind 1f1b --pp 2 --micros 2 --draw a.pdf", "ends in .svg or .png"),
        ("--kind 1f1b --pp 2 --micros 2 --drew a.svg", "Did you mean '--draw'?"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words.split(), "--json", "a.json")
    assert (code, out) == (2, "")
    assert err.startswith("megallm: error: ") and says in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--draw", "--trace"])
def test_a_folder_that_is_not_there(option, capsys, tmp_path):
    name = tmp_path / "missing" / "a.svg"
    code, _, err = call(capsys, "--kind", "1f1b", "--pp", 2, "--micros", 2, option, name)
    assert code == 73 and str(name) in err and "create it first" in err


def test_costs():
    assert parse_cost("") == Cost() == parse_cost("F=1,B=1,W=1,M=0")
    assert parse_cost("W=0,F=2.5,M=1e-3") == Cost(2.5, 1.0, 0.0, 1e-3)
