"""The page and the terminal view of a run: every number comes from its files, every text is escaped."""

import io
import json
import re
import time
from html.parser import HTMLParser

import pytest
from rich.console import Console

from megallm.base.errors import UsageError
from megallm.cli.main import main
from megallm.report import chart
from megallm.report.facts import read_run
from megallm.report.goodput import AGAIN, DATA, DOWN, OTHER, SAVING, TRAINING, attempts, goodput
from megallm.report.page import render_page
from megallm.report.watch import sparkline, watch
from megallm.run.lease import Lease
from megallm.run.runfolder import RunFolder

BAD = "<script>alert(1)</script>\x1b[31m"


def row(step: int, at: float, **more) -> dict:
    times = {"perf/step_seconds": 1.0, "perf/data_wait_seconds": 0.25, "perf/unix_time": at}
    return {"step": step, "train/loss": 5.0 / step, "train/grad_norm": 1.0, **times, **more}


def write(path, rows, events, config=None, samples=()):
    path.mkdir(exist_ok=True)
    config = {"train": {"steps": 10}, "layout": {"schedule": "1f1b"}} if config is None else config
    (path / "run.yaml").write_text(json.dumps(config))
    layout = {"pp": 2, "dp": 2, "cp": 1, "tp": 2, "ep": 1}
    (path / "env.json").write_text(json.dumps({"layout": layout, "host": BAD}))
    for name, lines in (("metrics", rows), ("events", events), ("rollouts", samples)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "checkpoints").mkdir(exist_ok=True)
    return path


def two_attempts(path):
    """Killed after step 5 while step 3 was saved; went on 20 s later."""
    rows = [row(step, 1000.0 + step) for step in (1, 2, 3)] + [row(step, 1027.0 + step) for step in (4, 5, 6)]
    events = [
        {"time": 1000.0, "event": "started", "step": 0},
        {"time": 1003.5, "event": "saved", "step": 3, "ckpt/stall_seconds": 0.5},
        {"time": 1026.0, "event": "resumed", "step": 3, "lost_steps": 2, "lost_until": 1006.0},
        {"time": 1034.0, "event": "stopped", "reason": BAD},
    ]
    return write(path, rows, events, samples=[{"step": 6, "prompt": BAD, "answer": "4", "reward": 1.0}])


def test_the_ledger_sums_to_the_time_between_the_first_and_last_sign_of_life(tmp_path):
    facts = read_run(two_attempts(tmp_path / "run"))
    spent = goodput(facts.events, facts.rows)
    assert spent.wall == 34.0 and sum(spent.seconds.values()) == pytest.approx(spent.wall)
    assert spent.seconds == pytest.approx(
        {TRAINING: 4.5, DATA: 1.5, SAVING: 0.5, AGAIN: 3.0, DOWN: 20.0, OTHER: 4.5}
    )
    assert spent.fraction == pytest.approx(4.5 / 34)
    first, second = attempts(facts.events, facts.rows)
    assert (first.began, first.ended, first.last_step) == (1000.0, 1006.0, 3)
    assert (second.first_step, second.last_step, second.lost_steps) == (3, 6, 2)


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_a_clock_that_jumps_makes_no_part_negative(tmp_path, shift):
    facts = read_run(two_attempts(tmp_path / "run"))
    events = [dict(event, time=event["time"] + shift * (i > 1)) for i, event in enumerate(facts.events)]
    spent = goodput(events, facts.rows)
    assert min(spent.seconds.values()) >= 0 and sum(spent.seconds.values()) == pytest.approx(spent.wall)


class Outline(HTMLParser):
    """Tags, and what would be fetched or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not [name for name, _ in attrs if name.startswith("on")]


def test_the_page_runs_and_fetches_nothing_and_shows_all(tmp_path):
    run = two_attempts(tmp_path / BAD.replace("/", "")[:20])
    (run / "plots").mkdir()
    (run / "plots" / "pipeline.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'>{BAD[:25]}</svg>")
    page = render_page(read_run(run))
    outline = Outline(page)
    assert "script" not in outline.tags and outline.tags.count("svg") >= 4
    assert outline.sources and all(source.startswith("data:image/") for source in outline.sources)
    assert "\x1b" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    layout = ("rank 7", "pp=2 x dp=2 x tp=2, schedule 1f1b")
    for words in ("6 of 10", "gradient norm", "4 to 6", "answer: 4", "20.0 s", "58.8%", "lost_until", *layout):
        assert words in page, words


def test_a_run_that_has_not_begun_and_damaged_files_have_a_page_too(tmp_path):
    run = write(tmp_path / "run", [], [], config={})
    (run / "env.json").write_text("{")
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": null}\n{"step": 2, "tra')
    page = render_page(read_run(run))
    assert "The run has not started." in page and "unknown" in page
    assert "No step has been recorded." in page


def test_what_is_no_run_folder_is_told(tmp_path, capsys):
    with pytest.raises(UsageError, match="is no run folder: it has no run.yaml"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 2 and "no run folder" in capsys.readouterr().err


def test_the_verbs(tmp_path, capsys):
    run = two_attempts(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "<h2>Curves</h2>" in (run / "report.html").read_text()
    assert main(["watch", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "stopped after step 6" in shown and "goodput 13.2%" in shown and "\x1b[31m" not in shown


def test_who_trains_is_told_and_watching_ends_with_the_run(tmp_path):
    run = two_attempts(tmp_path / "run")
    with Lease(RunFolder(run)) as lease:
        assert read_run(run).state == f"running on {lease.holder.host}, process {lease.holder.pid}"
        looks = []
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=90, color_system=None)
        watch(str(run), console, 0.01, lambda: looks.append(time.monotonic()) or len(looks) > 3)
        assert len(looks) == 4 and "running on" in stream.getvalue()
    assert read_run(run).state == "stopped after step 6"


def test_curves_keep_their_ends_and_range():
    points = [(step, float(step % 7)) for step in range(5000)] + [(5000, float("nan"))]
    drawn = chart.bin_points(points, 100)
    assert len(drawn) == 100 and min(b.low for b in drawn) == 0 and max(b.high for b in drawn) == 6
    assert sum(b.mean for b in drawn) / 100 == pytest.approx(3.0, abs=0.01)
    svg = chart.line_chart("a < b", {"x & y": points})
    assert "a &lt; b" in svg and "x &amp; y" in svg and not re.search(r"nan|inf", svg)
    assert chart.line_chart("none", {"x": [(1, float("nan"))]}) == ""
    assert chart.round_ticks(0.0, 10.0) == [0, 5, 10] or len(chart.round_ticks(0.0, 10.0)) in range(3, 8)
    assert chart.line_chart("one", {"x": [(3, 2.0)]}).count("circle") == 1


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0] * 5, 3) == "▁▁▁" and sparkline([], 5) == ""
