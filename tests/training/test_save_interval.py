"""checkpoint.every=auto: the interval of Young and Daly from what saves cost and how often the run failed."""

from __future__ import annotations

import json
import math
import time

import pytest

from megallm.base.config import loads, to_yaml
from megallm.base.errors import UsageError
from megallm.run.interval import (
    DEFAULT_RANK_HOURS,
    MAX_COST,
    MAX_SECONDS,
    PROBE_STEPS,
    FailureRate,
    failure_rate,
    plan_interval,
)
from megallm.training.config import PretrainConfig
from tests.system.commands import TINY, megallm


def test_the_interval_loses_least():
    """No other interval wastes less by the model of the formula: stall / T + T / 2 M."""
    stall, mtbf, step = 0.5, 3600.0, 0.01
    found = plan_interval(stall, step, FailureRate(7200.0, 2), 8)
    assert found.mtbf_seconds == mtbf and found.seconds == pytest.approx(math.sqrt(2 * stall * mtbf), rel=1e-3)

    def waste(seconds: float) -> float:
        return stall / seconds + seconds / (2 * mtbf)

    assert all(waste(found.seconds) <= waste(found.seconds * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_it_is_bounded():
    often = plan_interval(1.0, 0.1, FailureRate(10.0, 10), 1)
    assert often.seconds == pytest.approx(1.0 / MAX_COST), "saving never costs more than its share"
    assert plan_interval(60.0, 1.0, FailureRate(0.0, 0), 1).seconds == MAX_SECONDS
    assert plan_interval(1e-6, 100.0, FailureRate(1.0, 1), 1).steps == 1


def test_without_failures_the_default_is_that_of_so_many_ranks():
    rate = FailureRate(60.0, 0)
    assert rate.mtbf(16_384) == pytest.approx(3.09 * 3600)
    assert rate.mtbf(1) == DEFAULT_RANK_HOURS * 3600
    assert FailureRate(1e12, 0).mtbf(1) == 1e12, "a run that has lived for longer knows better"
    assert "none seen, a default" in str(plan_interval(0.1, 0.1, rate, 2))


def event(time: float, kind: str, **more) -> dict:
    return {"time": time, "event": kind, **more}


@pytest.mark.parametrize(
    ("events", "now", "seconds", "failures"),
    [
        ([], 5.0, 0.0, 0),
        ([event(0, "started")], 50.0, 50.0, 0),
        ([event(0, "started"), event(20, "saved"), event(30, "resumed", lost_steps=2, lost_until=25.0)], 40, 35.0, 1),
        ([event(0, "started"), event(9, "stopped"), event(10, "resumed")], 12.0, 11.0, 1),
        ([event(0, "started"), event(8, "preempted"), event(9, "stopped"), event(10, "resumed")], 12.0, 11.0, 0),
        ([event(0, "started"), event(8, "saved"), event(10, "resumed")], 12.0, 10.0, 0),
    ],
)
def test_failures_are_those_that_events_tell_of(events, now, seconds, failures):
    assert failure_rate(events, now) == FailureRate(seconds, failures)


def test_the_word_is_read_written_and_nothing_else_is():
    config = loads(PretrainConfig, "checkpoint: {every: auto}")
    assert config.checkpoint.every == "auto" and config.checkpoint.may_follow(3)
    assert loads(PretrainConfig, to_yaml(config)) == config
    assert loads(PretrainConfig, "checkpoint: {every: 7}").checkpoint.every == 7
    with pytest.raises(UsageError, match="checkpoint.every is 'often'; it must be an integer such as 8 or 'auto'"):
        loads(PretrainConfig, "checkpoint: {every: often}")


def test_a_run_finds_its_interval_and_changes_it_after_failures(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"line {i} of some text\n" for i in range(300)))
    words = ("--input", "t.txt", "--output", "t", "--tokenizer", "bytes", "--append-eod", "--split-text", "lines")
    assert megallm("preprocess", *words, cwd=tmp_path).code == 0
    config = TINY | {"data": TINY["data"] | {"sources": {"t_text_document": 1}}, "checkpoint": {"every": "auto"}}
    (tmp_path / "c.yaml").write_text(json.dumps(config | {"train": TINY["train"] | {"steps": 400}}))
    done = megallm("pretrain", "c.yaml", "train.stop_at=8", cwd=tmp_path)
    assert done.code == 0, done.err
    path = tmp_path / "run" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    (first,) = [one for one in events if one["event"] == "save_interval"]
    assert first["step"] == PROBE_STEPS and first["failures"] == 0 and first["seconds"] <= MAX_SECONDS * 1.1
    assert [one["step"] for one in events if one["event"] == "saved"] == [PROBE_STEPS, 8]
    assert "saving every" in done.out and "none seen" in done.out

    now = time.time()
    with path.open("a") as file:
        for age in (4, 3, 2, 1):
            file.write(json.dumps(event(now - age, "resumed", step=8, lost_steps=3, lost_until=now - age)) + "\n")
    done = megallm("pretrain", "c.yaml", "train.stop_at=60", cwd=tmp_path)
    assert done.code == 0, done.err
    events = [json.loads(line) for line in path.read_text().splitlines()]
    last = [one for one in events if one["event"] == "save_interval"][-1]
    saved = [one["step"] for one in events if one["event"] == "saved" and one["step"] > 8]
    assert last["failures"] >= 4 and last["steps"] < first["steps"] and saved[0] == 8 + PROBE_STEPS
    assert len(saved) > 2, "it fails often, so it saves often"
