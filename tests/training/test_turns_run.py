"""`megallm grpo` and `ppo` with turns, partial rollouts and rewards of models: a run that is killed goes on as if it
had not been, and models reward alike at every layout."""

from __future__ import annotations

import contextlib
import io
import json
import string
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest

from megallm.base.config import load, replace
from megallm.base.errors import RewardError, UsageError
from megallm.engine.engine import Engine
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.rewards.samples import Completion
from megallm.run.console import Reporter
from megallm.run.phases import PhaseLine
from megallm.training import grpo, ppo
from megallm.training.model_rewards import RewardModel, open_judge
from megallm.training.reward_calls import FurtherReward, RewardCaller
from megallm.training.rl_config import GrpoConfig, PpoConfig
from megallm.training.scoring import ScoreRequest, open_scorer
from megallm.training.scoring import run as run_score
from megallm.training.validate import check
from tests.ranks import run_ranks
from tests.system.commands import megallm
from tests.training.preference_cases import MODEL, write_start
from tests.training.rl import Functions
from tests.training.test_grpo_run import Killed, answers_of, assert_close, made, rows_of
from tests.training.turns import FILE

BASE: dict[str, Any] = {"rl.replay.prompts": 0, "rl.replay.staleness": 0, "sampling.max_new_tokens": 16}
PARTIAL = BASE | {"sampling.partial.tokens": 2, "sampling.partial.staleness": 1, "optim.lr": 0.05}


def turns(name: str) -> dict[str, Any]:
    return {
        "turns.tools": f"['{FILE}:{name}']", "turns.calls": f"{FILE}:calls_any_{name}", "turns.tokens": 6,
        "turns.most": 2, "turns.reply": "'={result} '", "turns.workers": 1,
        "sampling.stop": json.dumps([*string.ascii_letters]),
    }  # fmt: skip


def run(config: GrpoConfig, resume: str = "auto", mesh: Mesh | None = None) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        (ppo if isinstance(config, PpoConfig) else grpo).run(config, mesh or Mesh.single(), resume)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    """Turns and pieces together, undisturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    run(made(folder, **PARTIAL | turns("killed") | {"train.steps": 4}), "never")
    return folder


def test_answers_are_carried_over_steps(quiet):
    rows, answers = rows_of(quiet), answers_of(quiet)
    assert rows[0]["rl/age_max"] == 0 and max(row["rl/age_max"] for row in rows) == 2, "two updates a step"
    assert all(row["rl/age_max"] <= 2 for row in rows), "staleness 1"
    assert any(0 < row["rl/stale_fraction"] < 1 for row in rows)
    assert rows[0]["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-9)
    assert max(row["sampling/importance_sampling_ratio/max"] for row in rows) > 1.001
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-9 for row in rows)
    assert len({one["id"] for one in answers}) == len(answers) == 4 * 8
    groups: dict[tuple[int, int], int] = {}
    for one in answers:
        groups[one["step"], one["id"] // 4] = groups.get((one["step"], one["id"] // 4), 0) + 1
    assert set(groups.values()) == {4}, "whole groups are trained"
    assert {one["turns"] for one in answers} == {1, 2}
    assert any("tool" in str(one["messages"]) for one in answers)


def test_killed_inside_a_tool_call(quiet, tmp_path):
    """SIGKILL to the rank while a tool is at work, with answers of the step before half done."""
    marker = tmp_path / "kill"
    values = PARTIAL | turns("killed") | {"train.steps": 4}
    words = [f"{key}={value}" for key, value in values.items()]
    run(made(tmp_path, **values | {"train.stop_at": 2}))
    marker.write_text("")
    killed = megallm("grpo", "grpo.yaml", *words, cwd=tmp_path)
    assert killed.code != 0 and not marker.exists() and len(rows_of(tmp_path)) == 2, killed.err
    run(made(tmp_path, **values), "must")
    ours, theirs = rows_of(tmp_path), rows_of(quiet)
    assert [row | {"val/reward": 0} for row in ours[2:]] == [row | {"val/reward": 0} for row in theirs[2:]]
    assert answers_of(tmp_path) == answers_of(quiet)


def test_killed_between_the_updates(quiet, tmp_path, monkeypatch):
    calls, step = [], Engine.train_step

    def killed(engine, *args):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return step(engine, *args)

    config = made(tmp_path, **PARTIAL | turns("killed") | {"train.steps": 4})
    monkeypatch.setattr(Engine, "train_step", killed)
    with pytest.raises(Killed):
        run(config)
    run(config, "must")
    assert rows_of(tmp_path) == rows_of(quiet)
    assert answers_of(tmp_path) == answers_of(quiet)


def test_ppo_skips_replies(tmp_path):
    made(tmp_path)
    words = [f"{k}={v}" for k, v in (BASE | turns("killed") | {"train.steps": 2, "critic.lr": 0.01}).items()]
    config = check(load(PpoConfig, tmp_path / "grpo.yaml", words))
    run(config)
    assert all(row["loss/value_avg"] > 0 for row in rows_of(tmp_path))


# Rewards of models


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    model = changed(MODEL, head="value", tie_embeddings=False)
    return write_start(tmp_path_factory.mktemp("models") / "reward", model)


def model_run(folder: str, reward_model: str, layout: Layout, kind: type = GrpoConfig) -> None:
    words = [f"{k}={v}" for k, v in BASE.items()]
    config = load(kind, Path(folder) / "grpo.yaml", [*words, "train.steps=2", "eval.batches=0"])
    rewards = {"reward_model": 0.5, "judge": 0.25}
    config = replace(config, {
        "reward.functions": rewards, "reward_model.model": reward_model, "judge.pattern": r"(\d)", "judge.most": 9.0,
        "judge.template": "{prompt}{completion}", "judge.max_new_tokens": 8, "layout.tp": layout.tp,
        "layout.pp": layout.pp, "layout.dp": layout.dp, "zero.stage": 3 if layout.dp > 1 else 0,
        "model.init": str(Path(folder) / "start"),
    })  # fmt: skip
    nothing = dict.fromkeys(("num_layers", "hidden_size", "num_heads", "family", "max_positions"))
    config = changed(config, model=changed(config.model, vocab_size=None, **nothing))
    run(check(config), "never", Mesh.start(layout) if layout.world > 1 else Mesh.single())


@pytest.fixture(scope="module")
def rewarded(reward_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewarded")
    made(folder)
    write_start(folder / "start")
    model_run(str(folder), reward_model, Layout())
    return folder


def test_a_model_and_a_judge_reward(rewarded, reward_model, tmp_path):
    answers = answers_of(rewarded)
    assert {*answers[0]["rewards"]} == {"reward_model", "judge"}
    judged = [one["rewards"]["judge"] for one in answers]
    assert all(each is None or 0 <= each <= 1 for each in judged) and len({*judged}) > 1
    one = answers[0]
    total = 0.5 * one["rewards"]["reward_model"] + 0.25 * (one["rewards"]["judge"] or 0)
    assert one["reward"] == pytest.approx(total)
    whole = [each for each in answers if each["reason"] == "end" and each["answer"].isascii()]
    rows = [{"prompt": each["prompt"], "completion": each["answer"]} for each in whole]
    if rows:  # `megallm score` says the same of the texts
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_score(ScoreRequest(reward_model, str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")), Mesh.single())
        scored = [json.loads(line)["reward"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert scored == pytest.approx([each["rewards"]["reward_model"] for each in whole])


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2)])
def test_models_reward_alike_at_every_layout(rewarded, reward_model, tmp_path, layout):
    made(tmp_path)
    write_start(tmp_path / "start")
    run_ranks(2, model_run, str(tmp_path), reward_model, layout)
    for ours, theirs in zip(rows_of(tmp_path), rows_of(rewarded), strict=True):
        assert_close(ours, theirs)
    assert [one["answer"] for one in answers_of(tmp_path)] == [one["answer"] for one in answers_of(rewarded)]


def test_another_tokenizer_reads_the_text(reward_model, tmp_path):
    config = made(tmp_path)
    opened = open_scorer(reward_model, Mesh.single(), "fp64")
    scorer = RewardModel(opened, opened.words, config)
    samples = [Completion("1+1=", "2", [*b"1+1="], [*b"2", 256]), Completion("2+2=", "4!", [*b"2+2="], [*b"4!", 256])]
    same = scorer(samples)

    class Other:
        fingerprint = "another"

    assert RewardModel(opened, Other(), config)(samples) == pytest.approx(same)


def test_a_reward_model_of_few_learned_positions(tmp_path):
    """Positions for the longest answer are enough, padded rows or not; fewer are refused at once."""
    config = made(tmp_path, **BASE)
    for positions in (33, 31):
        model = changed(MODEL, head="value", tie_embeddings=False, positions="learned", max_positions=positions)
        opened = open_scorer(write_start(tmp_path / f"reward{positions}", model), Mesh.single(), "fp64")
        reward = RewardModel(opened, opened.words, config)
        if positions == 31:
            with pytest.raises(UsageError, match="has 31 positions; data.seq_len 16 and .* 16 need 32"):
                reward.check_length()
            continue
        reward.check_length()
        assert len(reward([Completion("1", "2", [49] * 17, [50] * 16), Completion("1", "2", [49], [50])])) == 2


def test_models_of_another_kind_are_refused(reward_model, tmp_path):
    start = write_start(tmp_path / "start")
    with pytest.raises(UsageError, match="reward_model.model .* has the head lm, which gives no score"):
        open_scorer(start, Mesh.single(), "fp64")
    config = replace(made(tmp_path), {"judge.model": reward_model})

    class Job:
        pass

    Job.config = config
    with pytest.raises(UsageError, match="judge.model .* has the head value; a judge answers in words"):
        open_judge(Job(), type("Policy", (), {"mesh": Mesh.single()})())


def test_a_reward_that_is_no_number_is_an_error_or_told():
    nan = FurtherReward("reward_model", 1.0, lambda samples: [float("nan"), 1.0, None])
    samples = [Completion("a", "b", columns={"answer": "1"})] * 3
    with pytest.raises(RewardError, match="The reward 'reward_model' failed on sample 0: it is nan"):
        RewardCaller(Mesh.single(), Functions, [nan]).score(samples, 1)
    told = RewardCaller(Mesh.single(), Functions, [changed(nan, on_error="zero")]).score(samples, 1)
    assert told.table[:2, -1].tolist() == [0.0, 1.0] and told.table[2, -1] != told.table[2, -1]
    assert "it is nan" in told.failures[0]


@pytest.mark.parametrize(("options", "said"), [
    ({"reward.functions": {"reward_model": 1.0}}, "the one needs the other"),
    ({"judge.model": "x"}, "reward.functions has no judge"),
    ({"judge.pattern": "x"}, "has 0 groups"),
    ({"turns.tokens": 999}, "more than sampling.max_new_tokens"),
    ({"turns.tools": ("a.py:f",), "turns.reply": ""}, "turns.reply does not hold"),
    ({"sampling.partial.tokens": 2, "sampling.resample": 1}, "leave one of the two out"),
    ({"sampling.partial.tokens": 2, "sampling.partial.staleness": 0}, "on-policy is sampling.partial.tokens 0"),
])  # fmt: skip
def test_what_does_not_go_together_is_said(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        check(replace(made(tmp_path), options))


# What a person sees


def test_phases_are_told_on_a_terminal(monkeypatch):
    said: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr("megallm.run.phases.time.monotonic", lambda: next(clock))
    line = PhaseLine(said.append, 20)
    line.enter(3, "rollout")
    line.expect(8)
    line.token(False)
    line.token(True)
    line.enter(3, "update")
    assert said == ["step 3/20 | rollout", "step 3/20 | rollout 0/8 | 1.0 tok/s", "step 3/20 | rollout 1/8 | 1.0 tok/s",
                    "step 3/20 | update"]  # fmt: skip
    plain = io.StringIO()
    Reporter(plain, 20).progress("step 3/20 | rollout")
    assert plain.getvalue() == "", "a file keeps the lines of steps alone"
