"""FAULTS row 78: trackers that are down, slow, refuse or raise change nothing; a run that goes on sends no step twice.

And row 90: what looks like a secret is in no file of a run.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import socket
import sqlite3
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megallm.base import optional
from megallm.base.redact import HIDDEN, redacted, redacted_text
from megallm.cli.main import main
from megallm.report.facts import read_run
from megallm.report.page import render_page
from megallm.run import tracker_process, trackers
from megallm.run.rows import Events
from megallm.run.trackers import Sent, TrackerProcess, Trackers
from tests.system.commands import TINY, megallm


def needs(name: str):
    return pytest.mark.skipif(not optional.available(name), reason=f"{name} is not installed")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with 3 rows."""
    path = tmp_path / "run"
    for name in ("logs", "checkpoints"):
        (path / name).mkdir(parents=True)
    (path / "run.yaml").write_text(json.dumps({"train": {"steps": 9}, "data": {"api_key": "Sesame"}}))
    add_rows(path, 1, 3)
    return path


def add_rows(path: Path, first: int, last: int) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            row = {"step": step, "train/loss": 1.0 / step, "note": "text", "val/none": None, "a/flag": True}
            file.write(json.dumps(row) + "\n")


class Kept:
    """A tracker in memory."""

    def __init__(self):
        self.steps, self.fails = [], False

    def send(self, step, values):
        if self.fails:
            raise ConnectionError("down")
        assert set(values) == {"train/loss"}, "numbers alone"
        self.steps.append(step)

    def close(self):
        pass


def test_each_step_is_sent_once_through_rewinds_failures_and_half_lines(run):
    tracker, sent = Kept(), Sent(run, "x")
    with (run / "metrics.jsonl").open("rb") as file:
        tracker_process.send_new(tracker, file, sent)
        with (run / "metrics.jsonl").open("a") as more:
            more.write('{"step": 4, "train/lo')
        tracker_process.send_new(tracker, file, sent)
        assert tracker.steps == [1, 2, 3]
        with (run / "metrics.jsonl").open("a") as more:
            more.write('ss": 0.5}\nno json\n[]\n')
        tracker_process.send_new(tracker, file, sent)
    assert tracker.steps == [1, 2, 3, 4] and Sent(run, "x").step == 4
    (run / "metrics.jsonl").write_text("")  # resumed from step 2: rows 3 and 4 come again
    add_rows(run, 1, 6)
    tracker.fails = True
    with (run / "metrics.jsonl").open("rb") as file, pytest.raises(ConnectionError):
        tracker_process.send_new(tracker, file, Sent(run, "x"))
    tracker.fails = False
    with (run / "metrics.jsonl").open("rb") as file:
        tracker_process.send_new(tracker, file, Sent(run, "x"))
    assert tracker.steps == [1, 2, 3, 4, 5, 6]


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers 403 to everything."""

    def do_GET(self):
        body = b'{"error_code": "PERMISSION_DENIED", "message": "no access for you"}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def refusing():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent():
    """A real socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs("mlflow")
def test_a_backend_that_never_answers_costs_a_run_nothing_but_the_wait_at_its_end(run, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0)
    with silent() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        sink = Trackers(["mlflow", "tensorboard", "mlflow"], run, "p")
        (process,) = sink.processes
        pid, begin = process._process.pid, time.monotonic()
        for step in range(1000):
            sink.add({"step": step})
        assert time.monotonic() - begin < 1.0, "a row costs a look at whether the process lives"
        begin = time.monotonic()
        sink.close()
        assert time.monotonic() - begin < 6.0
    assert not alive(pid) and "did not take everything within 1 s" in caplog.text
    assert Sent(run, "mlflow").step == 0, "so the next start sends it"


@needs("mlflow")
def test_a_backend_that_refuses_is_told_once_and_tried_again(run, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "FIRST_PAUSE", 0.05)
    with refusing() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        process = TrackerProcess("mlflow", run, "p")
        pids, deadline = {process._process.pid}, time.monotonic() + 90
        while len(pids) < 2 and time.monotonic() < deadline:
            process.add({"step": 1})
            pids.add(process._process.pid)
            time.sleep(0.05)
        process.finish()
        process.wait(60)
    assert len(pids) == 2 and caplog.text.count("the run goes on and tries again later") == 1
    assert "no access for you" in caplog.text or "403" in caplog.text, caplog.text


def test_a_library_that_is_not_there_or_breaks_is_told_and_left_out(run, monkeypatch, caplog):
    monkeypatch.setattr(optional, "available", lambda name: False)
    sink = Trackers(["wandb"], run, "p")
    sink.add({"step": 1})
    sink.close()
    assert "the package wandb is not installed: pip install 'megallm[trackers]'" in caplog.text
    assert sink.processes[0]._process is None


def test_a_process_that_cannot_be_started_is_told(run, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(optional, "available", lambda name: True)
    monkeypatch.setattr(subprocess, "Popen", full)
    sink = Trackers(["wandb"], run, "p")
    sink.add({"step": 1})
    sink.close()
    assert "wandb cannot be started" in caplog.text


def send_all(run: Path, names: list[str], monkeypatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 90.0)
    Trackers(names, run, "p").close()


REAL = [name for name in ("wandb", "mlflow", "trackio") if optional.available(name)]


@pytest.mark.skipif(not REAL, reason="none of wandb, mlflow and trackio is installed")
def test_the_real_libraries_get_every_step_once_over_two_starts(run, monkeypatch, caplog, tmp_path):
    for key, value in (("WANDB_MODE", "offline"), ("TRACKIO_DIR", str(tmp_path / "trackio"))):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    send_all(run, REAL, monkeypatch)
    (run / "metrics.jsonl").write_text("")
    add_rows(run, 1, 5)  # resumed from step 1
    send_all(run, REAL, monkeypatch)
    logs = "".join((run / "logs" / f"tracker-{name}.log").read_text() for name in REAL)
    assert [Sent(run, name).step for name in REAL] == [5] * len(REAL), caplog.text + logs
    assert caplog.text == ""
    if "mlflow" in REAL:
        (path,) = run.glob("mlruns/*/*/metrics/train/loss")
        assert [int(line.split()[2]) for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
        assert b"Sesame" not in b"".join(p.read_bytes() for p in run.glob("mlruns/*/*/params/**/*") if p.is_file())
    if "trackio" in REAL:
        with sqlite3.connect(next((tmp_path / "trackio").glob("p.db"))) as database:
            steps = [row[0] for row in database.execute("select step from metrics order by step")]
        assert steps == [1, 2, 3, 4, 5]
    if "wandb" in REAL:
        files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == 2 and all(b"train/loss" in file.read_bytes() for file in files)
        assert not any(b"Sesame" in file.read_bytes() for file in files)


@needs("mlflow")
def test_a_whole_run_beside_a_dead_backend_ends_well(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("".join(f"line {i} of some text\n" for i in range(100)))
    words = ("--input", "t.txt", "--output", "t", "--tokenizer", "bytes", "--append-eod", "--split-text", "lines")
    monkeypatch.chdir(tmp_path)
    assert main(["preprocess", *words]) == 0
    config = TINY | {"data": TINY["data"] | {"sources": {"t_text_document": 1}}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    with silent() as address:
        for key, value in (("MLFLOW_TRACKING_URI", address), ("WANDB_BASE_URL", address), ("WANDB_API_KEY", "a" * 40)):
            monkeypatch.setenv(key, value)
        done = megallm("pretrain", "c.yaml", "train.steps=6", "log.trackers=[mlflow,wandb]", "launch.hang_seconds=3",
                       cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "mlflow did not take everything within 10 s" in done.out + done.err
    steps = sum(row["perf/step_seconds"] for row in rows)
    assert rows[-1]["perf/unix_time"] - rows[0]["perf/unix_time"] < steps + 5, "between steps nothing waited"


SECRETS = [
    {"reward": {"api_key": "Sesame"}}, {"url": "https://me:Sesame@host/x"}, {"a": ["hf_SesameSesameSesameSesame"]},
    {"auth_token": "Sesame"}, {"x": {"password": "Sesame"}}, {"u": "http://h/?a=1&token=Sesame&b=2"},
    {"h": "Bearer SesameSesameSesame"}, {"wandb_api_key": "Sesame"}, {"secret": "Sesame"},
]  # fmt: skip


@pytest.mark.parametrize("config", SECRETS)
def test_secrets_are_in_no_file_of_a_run_and_not_in_its_report(run, config):
    assert "Sesame" not in json.dumps(redacted(config)) and HIDDEN in json.dumps(redacted(config))
    (run / "run.yaml").write_text(json.dumps(config))
    (run / "env.json").write_text(json.dumps({"more": config}))
    events = Events(run / "events.jsonl")
    events.add("started", step=0)
    events.add("changed", changes=[config])
    events.close()
    assert "Sesame" not in (run / "events.jsonl").read_text()
    assert "Sesame" not in render_page(read_run(run))


def test_what_is_no_secret_stays():
    for value in ({"tokens": 5, "token_ids": [1], "tokenizer": "bytes", "max_tokens": "9", "key": "a", "lr": 0.1},
                  ["https://host/path@x", "user:name", "s3://bucket/key", "a=b&tokens=3"], None, 1.5):  # fmt: skip
        assert redacted(value) == value
    assert redacted_text("see https://me:you@host") == f"see https://{HIDDEN}@host"


def test_secrets_are_not_on_the_log_line():
    from megallm.run.console import Reporter

    stream = io.StringIO()
    reporter = Reporter(stream, 10)
    reporter.note("cannot reach https://me:Sesame@host\x1b[31m")
    reporter.close()
    assert "Sesame" not in stream.getvalue() and "\x1b" not in stream.getvalue()
