"""`megallm distill`: live and stored teachers, the student's own answers, resume, and what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megallm.base.config import replace
from megallm.base.errors import DataError, InternalError, UsageError
from megallm.engine import distillation
from megallm.models.config import ModelConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training import distill, store_teacher
from megallm.training.distill import DistillRun
from megallm.training.distill_config import DistillConfig
from megallm.training.supervised import run_supervised
from megallm.training.validate import check
from tests.ranks import run_ranks
from tests.training.preference_cases import metrics, weights, worst, write_rows, write_start

BIG = ModelConfig(
    family="llama", num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=2, vocab_size=257, max_positions=512,
    init_std=0.2,
).resolve()  # fmt: skip
ROWS = [{"prompt": f"{i * i}+{i}=", "completion": f"{i * i + i}." + "!" * (i % 3)} for i in range(12)]
SHORT = {"distill.max_new_tokens": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    student, teacher = write_start(folder / "student"), write_start(folder / "teacher", BIG, 4)
    return folder, student, teacher, write_rows(folder / "rows.jsonl", ROWS)


def config_of(folder: Path, place: tuple, **values: Any) -> DistillConfig:
    """A checked configuration of a small run in float64 with a live teacher."""
    _, student, teacher, source = place
    base = {
        "run.dir": str(folder), "train.steps": 3, "train.global_batch": 4, "train.micro_batch": 2,
        "train.precision": "fp64", "optim.warmup_steps": 0, "optim.lr": 1e-2, "model.init": student,
        "data.tokenizer": "bytes", "data.sources": {source: None}, "data.seq_len": 24,
        "teacher.model": teacher, "distill.lmbda": 0.0, "checkpoint.every": 0, "log.plot": False, "eval.batches": 0,
    }  # fmt: skip
    layout = Layout(**{axis: values.get(f"layout.{axis}", 1) for axis in ("pp", "dp", "cp", "tp")})
    return check(replace(DistillConfig(), base | SHORT | values), layout.world)


def train(name: str, place: tuple, **values: Any) -> Path:
    config = config_of(place[0] / name, place, **values)
    grid = config.layout.grid()
    run_supervised(DistillRun(config), Mesh.single() if grid.world == 1 else Mesh.start(grid), "auto")
    return Path(config.run.dir)


LORA = {"teacher.model": None, "peft.method": "lora", "peft.dim": 4}
KINDS = {
    "live": {"data.valid_sources": "held out", "eval.batches": 9},
    "forward-nll": {"distill.beta": 0.0, "distill.nll": 0.3},
    "stored": {"teacher.kind": "stored", "teacher.top_k": 7, "data.packing": True, "data.seq_len": 32},
    "on-policy": {"distill.lmbda": 1.0, "distill.beta": 1.0},
    "reward": {"distill.loss": "reverse_kl_reward", "distill.lmbda": None},
    "adapter_off": LORA | {"distill.lmbda": 0.5, "distill.nll": 0.5},
}
LAYOUTS = {
    "tp2-pp2": {"layout.tp": 2, "layout.pp": 2},
    "cp2-dp2-zero3": {"layout.cp": 2, "layout.dp": 2, "zero.stage": 3, "train.micro_batch": 1},
}


def values_of(name: str, place: tuple) -> dict[str, Any]:
    return {key: {place[3]: None} if value == "held out" else value for key, value in KINDS[name].items()}


OTHERS = {
    "tp2-pp2": {"teacher.layout": {"cp": 2}},
    "cp2-dp2-zero3": {"teacher.layout": {"tp": 2, "pp": 2}, "train.global_batch": 4},
}


def test_a_quantised_student_learns_from_its_own_base(place):
    """The teacher that is named is not in 4 bit, so that the first divergence is above 0."""
    own = {"teacher.model": place[1], "peft.method": "lora", "peft.dim": 4, "train.steps": 1}
    rows = metrics(train("own-nf4", place, **own, **{"peft.quantize": "nf4"}))
    assert rows[0]["train/loss"] > 1e-4


def on_ranks(place: tuple) -> None:
    for title, name in (("tp2-pp2", "reward"), ("cp2-dp2-zero3", "live")):
        given = values_of(name, place) | LAYOUTS[title] | OTHERS[title]
        train(f"{name}-apart", place, **given)
    train("on-policy-apart", place, **values_of("on-policy", place), **LAYOUTS["tp2-pp2"], **OTHERS["tp2-pp2"])
    for number, name in enumerate(KINDS):
        title = list(LAYOUTS)[number % 2]
        train(f"{name}-{title}", place, **values_of(name, place), **LAYOUTS[title])


@pytest.fixture(scope="module")
def trained(place):
    run_ranks(4, on_ranks, place, timeout=300)
    return {name: train(name, place, **values_of(name, place)) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_every_layout_gives_the_same_run(place, trained, name):
    title = list(LAYOUTS)[list(KINDS).index(name) % 2]
    rows = metrics(trained[name])
    for mine, theirs in zip(metrics(place[0] / f"{name}-{title}"), rows, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-9)
    assert worst(weights(place[0] / f"{name}-{title}", 3), weights(trained[name], 3)) < 1e-6


@pytest.mark.parametrize("name", ["live", "on-policy", "reward"])
def test_a_teacher_may_have_another_layout(place, trained, name):
    for mine, theirs in zip(metrics(place[0] / f"{name}-apart"), metrics(trained[name]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-9)


def test_what_the_rows_of_metrics_say(trained):
    live, nll, reward = (metrics(trained[name]) for name in ("live", "forward-nll", "reward"))
    assert live[-1]["train/loss"] < live[0]["train/loss"] and live[-1]["val/loss"] > 0
    assert nll[0]["train/nll_loss"] > 0
    told = {"distill/reverse_kl", "completions/mean_length", "completions/clipped_ratio"}
    assert all(told <= row.keys() for row in reward)
    assert reward[0]["distill/reverse_kl"] > 0


def test_a_student_that_is_its_teacher_learns_nothing(place, trained, monkeypatch):
    """The first divergence is 0, on given answers and its own, and as a reward; anything else ends the run."""
    assert abs(metrics(trained["adapter_off"])[0]["train/loss"]) < 1e-12
    own = {"teacher.model": place[1], "train.steps": 1}
    for name, values in (("same", {}), ("same-reward", KINDS["reward"]), ("same-own", KINDS["on-policy"])):
        row = metrics(train(name, place, **own, **values))[0]
        assert abs(row.get("distill/reverse_kl", row["train/loss"])) < 1e-12
    with monkeypatch.context() as patch:
        patch.setattr(distill, "hidden_states", lambda teacher, batches, student: [
            batch | {"teacher_hidden": batch["teacher_hidden"] * 1.01}
            for batch in distillation.hidden_states(teacher, batches, student)
        ])  # fmt: skip
        with pytest.raises(InternalError, match="it must be 0"):
            train("other", place, **own)


def test_all_of_the_vocabulary_stored_is_the_live_teacher(place, trained):
    stored = {"teacher.kind": "stored", "teacher.top_k": 257, "teacher.tail": "renormalize"}
    run = train("everything", place, **stored)
    for mine, theirs in zip(metrics(run), metrics(trained["live"]), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-9)


def test_a_store_made_before_needs_no_teacher(place):
    store = str(place[0] / "store")
    stored = {"teacher.kind": "stored", "teacher.store": store, "teacher.top_k": 7}
    made = config_of(place[0] / "storing", place, **stored)
    store_teacher.run(made, Mesh.single(), "auto")
    with pytest.raises(UsageError, match="holds a store already"):
        store_teacher.run(made, Mesh.single(), "auto")
    with pytest.raises(UsageError, match="which is not given"):
        store_teacher.run(replace(made, {"teacher.model": None}), Mesh.single(), "auto")
    values = {"teacher.model": None, "teacher.store": store}
    run = train("from-store", place, **values)
    assert metrics(run)[0]["train/loss"] > 0
    with pytest.raises(UsageError, match="at the temperature 0.9, and distill.temperature is 1"):
        train("hotter", place, **values, **{"distill.temperature": 1.0})
    more = write_rows(place[0] / "more.jsonl", [{"prompt": "a", "completion": "b"}, *ROWS])
    words = r"more.jsonl:1: teacher.store .*store holds nothing of this row, nor of 12 others"
    with pytest.raises(DataError, match=words):
        train("others", place, **values, **{"data.sources": {more: None}})


def test_what_is_refused(place, tmp_path):
    stored = {"teacher.kind": "stored"}
    for values, words in (
        ({"teacher.model": None}, "has no adapters to switch off"),
        (stored | {"distill.lmbda": 0.5}, "of the student's own answers nothing is stored"),
        ({"distill.loss": "reverse_kl_reward", "distill.lmbda": 0.5}, "rewards the student's own answers"),
        ({"distill.beta": 1.5}, "distill.beta is 1.5; it must be"),
        ({"teacher.layout": {"dp": 2}}, "it takes tp, pp, cp, ep with sizes of at least 1"),
        ({"peft.method": "prompt"}, "moves tokens to other places"),
    ):
        with pytest.raises(UsageError, match=words):
            config_of(tmp_path, place, **values)
    small = write_start(tmp_path / "small", replace(BIG, {"vocab_size": 300}), 4)
    with pytest.raises(UsageError, match="The student has 257 tokens and its teacher 300"):
        train("other-vocabulary", place, **{"teacher.model": small})


def test_a_teacher_of_another_tokenizer_is_refused(place, tmp_path, monkeypatch):
    from megallm.training.rules import distill as rules

    class Other:
        def __init__(self, spec: str) -> None:
            self.fingerprint = spec

    monkeypatch.setattr(rules, "tokenizer_of_model", lambda model: f"of-{model.init}")
    monkeypatch.setattr(rules.tokenizer, "load", Other)
    problems = list(rules.same_tokenizer(replace(DistillConfig(), {"teacher.model": "T", "data.tokenizer": "S"})))
    assert "is another one than the student's (S)" in str(problems[0])
    assert not list(rules.same_tokenizer(replace(DistillConfig(), {"teacher.model": "T", "data.tokenizer": "of-T"})))


def test_bad_rows_are_named(place):
    bad = write_rows(place[0] / "bad.jsonl", [ROWS[0], {"prompt": "a"}])
    with pytest.raises(DataError, match="bad.jsonl:2: "):
        train("bad", place, **{"data.sources": {bad: None}})


PROGRAM = """
import os, signal, sys
from pathlib import Path
from megallm.engine.engine import Engine
from megallm.inference.generator import Generator
from tests.training.test_distill_runs import train
where, place, values = eval(sys.argv[1])
place = (Path(place[0]), *place[1:])
calls = 0
def dying(real):
    def call(self, *args, **named):
        global calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **named)
    return call
owner, name = (Generator, "generate") if where == "rollout" else (Engine, "train_step")
setattr(owner, name, dying(getattr(owner, name)))
train("killed-" + where, place, **values)
"""


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_a_run_killed_inside_an_on_policy_step_goes_on_bit_for_bit(place, where):
    values = {"distill.lmbda": 0.8, "train.steps": 6, "checkpoint.every": 1}
    name = f"killed-{where}"
    given = repr((where, tuple(map(str, place)), values))
    program = PROGRAM
    command, root = [sys.executable, "-c", program, given], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert 0 < len(metrics(place[0] / name)) < 6
    whole = train(f"whole-{where}", place, **values)
    train(name, place, **values)
    assert metrics(place[0] / name) == metrics(whole)
    assert {row["distill/on_policy"] for row in metrics(whole)} == {0.0, 1.0}
    assert worst(weights(place[0] / name, 6), weights(whole, 6)) == 0
