"""`megallm report` in a real browser (Debian's chromium-headless-shell): curves are drawn, nothing is fetched.

tests/install_facilities.sh installs the browser where it can; without one these tests are skipped and say so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megallm.report import chart
from megallm.report.facts import read_run
from megallm.report.page import render_page
from tests.report.test_report import BAD, row, two_attempts, write

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: the report is not looked at (apt-get install chromium-headless-shell)"
)
LIMIT_SECONDS = 90.0  # two on an idle machine


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its picture (rows, columns, 3 colours), its console, what it asked the network."""

    picture: np.ndarray
    console: list[str]
    requests: list[str]
    dom: str


def look(page: str, folder: Path, dom: bool = False) -> Seen:
    """Open a page in a browser of its own, which has its own profile and ends with the call."""
    folder.mkdir()
    (folder / "page.html").write_text(page, encoding="utf-8")
    net, picture = folder / "net.json", folder / "page.png"
    common = [BROWSER, "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
              "--enable-logging=stderr", "--window-size=1100,3000"]  # fmt: skip
    address = (folder / "page.html").as_uri()
    if "headless-shell" not in str(BROWSER):
        common.append("--headless")
    shot = [*common, f"--log-net-log={net}", f"--screenshot={picture}", address]
    told = subprocess.run(shot, capture_output=True, text=True, timeout=LIMIT_SECONDS).stderr
    assert picture.exists(), told[-2000:]
    text = ""
    if dom:
        dumped = [*common, "--dump-dom", address]
        text = subprocess.run(dumped, capture_output=True, text=True, timeout=LIMIT_SECONDS).stdout
    events = json.loads(net.read_text())["events"]
    urls = [event["params"]["url"] for event in events if "url" in (event.get("params") or {})]
    requests = [url for url in urls if not url.startswith(("file:", "data:"))]
    console = [line for line in told.splitlines() if ":CONSOLE" in line]
    return Seen(imread(picture)[:, :, :3], console, requests, text)


def pixels(picture: np.ndarray, colour: str) -> int:
    """How many pixels are of a colour such as #0072b2, anti-aliased ones left out."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return int((np.abs(picture - wanted).max(axis=2) < 0.02).sum())


def long_run(path: Path):
    rows = [row(step, 1000.0 + step, **{"val/loss": 6.0 / step}) for step in range(1, 200)]
    return write(path, rows, [{"time": 1000.0, "event": "started", "step": 0}])


def test_the_page_is_drawn_without_an_error_or_a_request(tmp_path):
    seen = look(render_page(read_run(long_run(tmp_path / "run"))), tmp_path / "look")
    assert seen.picture.shape[0] == 3000 and seen.picture.std() > 0.05, "not one colour"
    for colour in chart.COLOURS[:2]:  # the curves of training and of what was held out, and parts of the time
        assert pixels(seen.picture, colour) > 200, colour
    assert seen.console == [] and seen.requests == []
    empty = look(render_page(read_run(write(tmp_path / "none", [], [], config={}))), tmp_path / "empty")
    assert all(pixels(empty.picture, colour) < 20 for colour in chart.COLOURS[:2]), "the control: no curve, no colour"
    assert empty.console == [] and empty.requests == []


def test_hostile_texts_are_texts_in_a_browser_too(tmp_path):
    """Row 88: names, reasons and samples with markup and escapes; pictures of a run with scripts in them."""
    run = two_attempts(tmp_path / "x<img src=http:..127.0.0.1:9.y onerror=alert(1)>")
    (run / "plots").mkdir()
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script><image href='http://127.0.0.1:9/z'/></svg>"
    (run / "plots" / "pipeline.svg").write_text(svg)
    seen = look(render_page(read_run(run)), tmp_path / "look", dom=True)
    assert seen.console == [] and seen.requests == []
    assert "<script" not in seen.dom and BAD[:8] not in seen.dom and "&lt;script&gt;" in seen.dom


def test_a_page_that_runs_and_fetches_is_noticed(tmp_path):
    """The control: a blocked script is an error on the console, a picture from elsewhere a request."""
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src *\">"
    page = f"<!doctype html>{policy}<script>alert(1)</script><img src='http://127.0.0.1:9/x.png'>"
    seen = look(page, tmp_path / "look")
    assert any("Content Security Policy" in line for line in seen.console)
    assert any(url.startswith("http://127.0.0.1:9/") for url in seen.requests)
