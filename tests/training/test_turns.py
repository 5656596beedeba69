"""Answers of several turns, with tools and environments: the same at every layout, trained where the policy has
sampled and nowhere else, and what happens when a tool misbehaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from megallm.base.errors import InternalError, RewardError, UsageError
from megallm.inference.scheduler import Scheduler
from megallm.losses.advantage import gae
from megallm.models.sections import MoeConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.rewards.config import TurnsConfig
from megallm.rewards.environments import FORMS
from megallm.rewards.episodes import Act, Environments
from megallm.rewards.tools import ToolCall, hermes, llama3, parser_of, schema_of
from megallm.training.advantages import Credit, advantages_of
from tests.engine.tiny import engine_of
from tests.ranks import run_ranks
from tests.training import games
from tests.training.rl import MODEL, OPTIM
from tests.training.turns import FILE, as_json, game, playing, told, tools

MOE = MoeConfig(num_experts=4, ffn_hidden_size=14, shared_ffn_hidden_size=10)
LAYOUTS = {
    "tp2": (Layout(tp=2), False, 0),
    "pp2": (Layout(pp=2), False, 0),
    "dp2 zero3": (Layout(dp=2), False, 3),
    "ep2": (Layout(dp=2, ep=2), True, 0),
}
OPTIONS = {"train.global_batch": 12, "train.micro_batch": 3, "eval.batches": 0}


def train(layout: Layout, moe: bool, zero: int, config: TurnsConfig, options: dict[str, Any]) -> list[Any]:
    mesh = Mesh.start(layout)
    model = dataclasses.replace(MODEL, moe=MOE).resolve() if moe else MODEL
    engine = engine_of(mesh, model=model, optim=OPTIM, zero=zero)
    with playing(config, mesh, engine, **OPTIONS | options) as (trainer, kept):
        reports = [trainer.step(step) for step in (1, 2, 3)]
    return as_json([told(kept), [[one.losses["train/loss"], one.stats.grad_norm] for one in reports]])


CASES = {
    "game": (game(), {}),
    "tools, in pieces": (tools(), {"sampling.partial.tokens": 2}),
}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, bool], list[Any]]:
    return {(case, moe): train(Layout(), moe, 0, *CASES[case]) for case in CASES for moe in (False, True)}


@pytest.mark.parametrize(("name", "case"), [
    ("tp2", "tools, in pieces"), ("pp2", "game"), ("dp2 zero3", "tools, in pieces"), ("ep2", "game"),
])  # fmt: skip
def test_the_same_answers_at_every_layout(alone, name, case):
    layout, moe, zero = LAYOUTS[name]
    said, numbers = alone[case, moe]
    for result in run_ranks(layout.world, train, layout, moe, zero, *CASES[case]):
        assert result[0] == said, "the same tokens, rewards and words of the environment"
        np.testing.assert_allclose(result[1], numbers, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_answers_have_turns_and_replies(alone, case):
    answers = [one for step in alone[case, False][0] for one in step[:-2]]
    assert any(False in mask for _, _, mask, _ in answers), "something has replied"
    assert all(mask[0] and mask[-1] for _, _, mask, _ in answers), "and the policy has the last word"
    extras = [one for step in alone[case, False][0] for one in step[-1]]
    assert {one["turns"] for one in extras} >= {1, 2}
    roles = {message["role"] for one in extras for message in one["messages"]}
    assert roles == {"assistant", "user" if case == "game" else "tool"}


def test_the_environment_earns_beside_the_functions(alone):
    with playing(game(weight=2.0), **OPTIONS) as (trainer, kept):
        metrics = trainer.step(1).metrics
    drawn, rewards = kept[0]
    assert drawn.table.shape == (12, 3) and metrics["rewards/game/mean"] > 0
    assert rewards == pytest.approx((np.nan_to_num(drawn.table) @ [1.0, 0.1, 2.0]).tolist())
    assert metrics["rl/turns_mean"] > 1 and metrics["rl/environment_tokens"] > 0
    drawn_tokens = [sum(one.mask) for one in drawn.answers]
    assert metrics["rl/response_tokens"] == pytest.approx(np.mean(drawn_tokens))


# The cache


def test_blocks_are_kept_between_turns_and_give_the_same_tokens(monkeypatch, alone):
    resumed: list[int] = []
    resume = Scheduler.resume

    def counted(self, request):
        found = resume(self, request)
        resumed.append(found)
        return found

    monkeypatch.setattr(Scheduler, "resume", counted)
    assert train(Layout(), False, 0, *CASES["game"]) == alone["game", False]
    assert any(resumed)
    monkeypatch.setattr(Scheduler, "resume", lambda self, request: False)
    said, numbers = train(Layout(), False, 0, *CASES["game"])
    assert said == alone["game", False][0], "prefilled again they are the same"
    np.testing.assert_allclose(numbers, alone["game", False][1], rtol=1e-9)


# What must hold


def test_tokens_of_a_tool_in_the_mask_stop_the_run(monkeypatch):
    with playing(tools(), **OPTIONS) as (trainer, _):
        grow = trainer.rollouts.runner._grow

        def wrong(one, sample):
            one.mask = [True] * len(one.mask)
            return grow(one, sample)

        monkeypatch.setattr(trainer.rollouts.runner, "_grow", wrong)
        with pytest.raises(InternalError, match="tokens are to be trained on rank 0, but the policy has sampled"):
            trainer.step(1)
    assert InternalError.exit_code == 70


def test_replies_have_no_gradient():
    """Other numbers at the tokens of a tool change nothing."""
    losses = []
    for value in (0.0, 5.0):
        with playing(game(), **OPTIONS | {"rl.algorithm": "gspo"}) as (trainer, _):
            score = trainer._score

            def spoilt(fresh, again, score=score, value=value):
                figures = score(fresh, again)
                for one in fresh:
                    one.old = [x if mine else value for x, mine in zip(one.old, one.sampled, strict=True)]
                return figures

            trainer._score = spoilt
            report = trainer.step(1)
            losses.append([report.losses["train/loss"], report.stats.grad_norm])
    assert losses[0] == losses[1]


def test_advantages_skip_replies():
    mask = [True, True, False, False, True]
    credit = Credit(np.array([[1.0], [0.0]]), np.ones(1), np.zeros(2), [0, 1], [5, 2], None, [mask, [True, True]])
    assert credit.mask.tolist() == [mask, [True, True, False, False, False]]
    made = advantages_of(credit, "reinforce_plus_plus")
    assert made[0][2] == made[0][3] == 0 and made[0][4] != 0
    rewards, values = np.array([[0, 0, 9, 9, 1.0]]), np.array([[0.1, 0.2, 7, 7, 0.4]])
    kept = np.array([mask])
    whole, _ = gae(rewards, values, kept, gamma=0.9, lam=0.8)
    short, _ = gae(rewards[kept][None], values[kept][None], np.ones((1, 3), bool), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(whole[kept], short[0])


# Tools and environments that misbehave


@pytest.mark.parametrize(("name", "said", "seconds"), [
    ("hangs", "it took longer than 0.3 seconds", 0.3),
    ("raises", "ValueError: no sums today", 20),
    ("junk", "it ended its process with exit status 3", 20),
    ("endless", "it said 2000000 characters; 1000000 are the most", 20),
    ("garbled", "UnicodeEncodeError", 20),
])  # fmt: skip
def test_a_tool_that_fails_is_told_or_ends(name, said, seconds):
    options = {**OPTIONS, "train.global_batch": 4, "sampling.group": 4, "sampling.max_new_tokens": 60}
    options |= {"sampling.group": 2, "train.global_batch": 2} if name != "raises" else {}
    with playing(tools(name, timeout_seconds=seconds, most=2), **options) as (trainer, kept):
        report = trainer.step(1)
    drawn, _ = kept[0]
    replies = [m["content"] for one in drawn.extras for m in one["messages"] if m["role"] == "tool"]
    assert replies and all(said in text for text in replies)
    assert any(said in text for _, text in report.warnings)
    if name != "raises":
        return
    with playing(tools(name, timeout_seconds=seconds, on_error="end"), **options) as (trainer, kept):
        trainer.step(1)
    assert "error" in {one.reason for one in kept[0][0].answers}
    with (
        playing(tools(name, timeout_seconds=seconds, on_error="stop"), **options) as (trainer, _),
        pytest.raises(RewardError, match="A tool failed in turn 1 of the answer .* turns.on_error=tell or end"),
    ):
        trainer.step(1)


def test_an_environment_is_made_again_from_what_was_done(tmp_path):
    config = TurnsConfig(environment=f"{FILE}:Board", workers=2)
    row = {"answer": "3"}
    request = {"key": "a", "seed": 5, "row": row, "text": "", "gold": "3"}
    press = {"do": "calls", "calls": [{"name": "press", "arguments": {"digit": 1}}], "wrong": [None]}
    wrong = {"do": "calls", "calls": [{"name": "press", "arguments": {"digits": 1}},
                                      {"name": "pres", "arguments": {}}], "wrong": [None, None]}  # fmt: skip
    with Environments(config) as environments:
        assert environments.form == "trl" and environments.earns and environments.name == "Board"
        assert environments.schemas[0]["function"]["parameters"]["required"] == ["digit"]
        actions: list[dict[str, Any]] = []
        for action in ({"do": "reset"}, press, press, wrong):
            actions = [*actions, action]
            act = Act(1, request | {"actions": actions})
            environments.run([act])
        assert "missing a required argument: 'digit'" in act.answer["results"][0]["error"]
        assert "there is no tool 'pres'; there are: press" in act.answer["results"][1]["error"]
        environments._workers[1].end()  # as a machine does that has no memory left
        environments._workers[1] = environments._started()
        environments._known[1] = {}
        again = [Act(1, request | {"actions": [*actions, press]}), Act(2, request | {"key": "b", "actions": actions})]
        environments.run(again)
        assert again[0].answer == {"results": [{"result": "3"}]}
        last = Act(1, request | {"actions": [*actions, press, {"do": "finish"}]})
        environments.run([last])
        assert last.answer == {"reward": 1.0}


def test_forms_are_recognised():
    assert {*FORMS} == {"openrlhf", "gymnasium", "trl"}
    for name, form in (("Guess", "openrlhf"), ("Gym", "gymnasium"), ("Board", "trl")):
        with Environments(TurnsConfig(environment=f"{FILE}:{name}", workers=1)) as found:
            assert found.form == form
    with pytest.raises(UsageError, match="accepted are:\n  openrlhf: class with reset"):
        Environments(TurnsConfig(environment="collections:OrderedDict"))
    with pytest.raises(UsageError, match="has no 'ad'"):
        Environments(TurnsConfig(tools=(f"{FILE}:ad",)))


def test_seeds_decide_what_environments_draw():
    with Environments(TurnsConfig(environment=f"{FILE}:Guess", workers=1)) as found:
        def luck(key, seed):
            request = {"key": key, "seed": seed, "row": {}, "text": "", "gold": "3"}
            step = {"do": "step", "text": "1", "before": ""}
            acts = [Act(0, request | {"actions": [{"do": "reset"}]}),
                    Act(0, request | {"actions": [{"do": "reset"}, step]})]  # fmt: skip
            found.run(acts)
            return acts[1].answer["reward"]

        assert luck("a", 1) == luck("b", 1) != luck("c", 2)


# How calls are written


def test_calls_are_read_as_templates_write_them():
    text = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"left": 1}}\n</tool_call>'
    text += '<tool_call>{"name": 3}</tool_call>'
    first, second = hermes(text)
    assert first == ToolCall("add", {"left": 1}) and "no JSON object with the name" in second.error
    assert hermes("<tool_call>{oops</tool_call>")[0].error.startswith("the call is no JSON")
    assert hermes("1 + 1 is 2") == [] == llama3("1 + 1 is 2") == llama3('{"a": 1}')
    call = '{"name": "add", "parameters": {"left": 1}}'
    assert llama3(f"<|python_tag|>{call}<|eot_id|>") == [ToolCall("add", {"left": 1})]
    assert len(llama3(f"{call}; {call}")) == 2
    assert llama3('{"name": "add", ')[0].error.startswith("the call is no JSON")
    assert parser_of(None, "... <tool_call> ...") is hermes and parser_of(None, "ipython") is llama3
    with pytest.raises(UsageError, match="turns.calls is 'hermez'.* It takes hermes, llama3"):
        parser_of("hermez", "")


def test_schemas_come_from_hints_and_docstrings():
    made = schema_of(games.add)["function"]
    assert made["name"] == "add" and made["description"] == "Adds two numbers."
    assert made["parameters"] == {
        "type": "object", "required": ["left", "right"],
        "properties": {"left": {"type": "integer", "description": "the first"},
                       "right": {"type": "integer", "description": "the second, which may be negative"}},
    }  # fmt: skip
