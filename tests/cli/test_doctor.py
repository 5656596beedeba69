"""`megallm doctor`: what it says, and that a broken gloo or a missing package is a failure."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from megallm.base import extension
from megallm.cli import doctor
from megallm.cli.main import main


def test_doctor_json(capfd):
    code = main(["doctor", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert code == 0 and found["ok"] and found["gloo"] == "ok"
    assert found["required"]["torch"] and found["cores"] >= 1
    assert found["extension"]["loaded"] == extension.status().loaded
    assert "detail" in found["extension"]
    assert found["backends"]["transformer_engine"]["key"] == "train.fp8.backend"
    assert set(found["backends"]) == {"transformer_engine", "flash_attn", "apex", "triton"}


def test_doctor_says_what_ranks_of_one_host_use(monkeypatch):
    monkeypatch.delenv("MEGALLM_COLLECTIVES", raising=False)
    monkeypatch.setattr(extension, "collectives", lambda: object())
    assert doctor._collectives() == "shared memory"
    monkeypatch.setattr(extension, "collectives", lambda: None)
    assert doctor._collectives().startswith("gloo (the extension")
    monkeypatch.setenv("MEGALLM_COLLECTIVES", "gloo")
    assert doctor._collectives() == "gloo (MEGALLM_COLLECTIVES=gloo)"


def test_doctor_fails_when_ranks_cannot_talk(capfd, monkeypatch):
    monkeypatch.setattr(doctor, "check_gloo", lambda: "rank 1 did not answer")
    assert main(["doctor"]) == 70
    assert "gloo between two ranks here: rank 1 did not answer" in capfd.readouterr().out


def test_doctor_says_whether_code_can_be_run(capfd, monkeypatch):
    monkeypatch.setattr(doctor, "check_gloo", lambda: "ok")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["doctor"]) == 0
    assert "sandbox for the reward 'code': Model-written code is run in bubblewrap only" in capfd.readouterr().out


def test_doctor_names_what_is_missing(capfd, monkeypatch):
    monkeypatch.setattr(doctor, "check_gloo", lambda: "ok")
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy", "no-such-package"))
    monkeypatch.setattr(doctor, "_gpus", list)
    assert main(["doctor"]) == 70
    assert "no-such-package      MISSING" in capfd.readouterr().out


def interrupting(env) -> None:
    if env.rank == 0:  # when the launcher waits; test_a_signal_inside_a_fork_is_heard_after_it has the other case
        time.sleep(0.5)
        # once: a second one could come when the launcher's handlers are gone
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(30)


def test_ctrl_c_while_ranks_are_tried_is_no_finding(monkeypatch):
    """It was reported as what is wrong with gloo, with exit code 70."""
    monkeypatch.setattr(doctor, "_sum", interrupting)
    begin, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            doctor.check_gloo()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 20


def test_the_start_up_of_a_layout_is_told_without_starting_anything(capfd):
    assert main(["doctor", "--startup", "tp=8,pp=8,dp=16"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("1024 ranks: at most 10 communicators a rank (")
    assert len(lines) == 11 and lines[1].split() == ["8", "tp"] and lines[6].split() == ["1024", "world"]
    assert main(["doctor", "--startup", "tp=2,pp=2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["world"] == 4
