"""`megallm grpo`: a run that is killed anywhere in a step goes on as if it had not been, and says what it does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megallm.base.config import load, replace
from megallm.base.errors import RewardError, UsageError
from megallm.cli.main import main
from megallm.engine.engine import Engine
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training import grpo, ppo
from megallm.training.collapse import CollapseMonitor
from megallm.training.kinds import KINDS
from megallm.training.rl_config import GrpoConfig, PpoConfig
from megallm.training.validate import check
from tests.ranks import run_ranks
from tests.system.commands import megallm

REWARDS = """
import os, signal
from pathlib import Path

def odd(prompts, completions, answer, number, **rest):
    marker = Path(__file__).with_name("kill")
    if marker.exists() and int(marker.read_text()) in number:
        marker.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(map(ord, text)) % 2) for text in completions]

def short(completions, completion_ids, **rest):
    return [None if len(ids) > 4 else 0.1 for ids in completion_ids]

def fails(completions, **rest):
    raise ValueError("it is broken")
"""


def made(folder: Path, **values: Any) -> GrpoConfig:
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{i}+{i * 7 % 10}=", "answer": "1", "number": i} for i in range(40)]
    for name, part in (("train", rows), ("valid", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    text = {
        "run": {"dir": str(folder / "run"), "seed": 4},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 257,
                  "max_positions": 64},
        "data": {"sources": {str(folder / "train.jsonl"): 1}, "valid_sources": {str(folder / "valid.jsonl"): 1},
                 "tokenizer": "bytes", "seq_len": 16},
        "reward": {"functions": {f"{folder}/rewards.py:odd": 1.0, f"{folder}/rewards.py:short": 0.5}},
        "sampling": {"group": 4, "max_new_tokens": 5},
        "rl": {"updates": 2, "replay": {"staleness": 2, "prompts": 1}},
        "train": {"steps": 5, "global_batch": 4, "micro_batch": 2, "precision": "fp64"},
        "optim": {"lr": 0.01}, "eval": {"batches": 1}, "checkpoint": {"every": 2}, "log": {"plot": False},
    }  # fmt: skip
    (folder / "grpo.yaml").write_text(yaml.safe_dump(text))
    return loaded(folder, values)


def loaded(folder: Path, values: dict[str, Any]) -> GrpoConfig:
    """The configuration of a folder whose files are there: what several ranks may read at once."""
    words = [f"{key}={value}" for key, value in values.items()]
    return check(load(GrpoConfig, folder / "grpo.yaml", words))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured, without times and memory."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: x for key, x in row.items() if not key.startswith(("perf/", "mem/"))} for row in rows
    ]


def answers_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    grpo.run(made(folder), Mesh.single(), "never")
    return folder


def test_what_a_run_leaves(quiet):
    rows, answers = rows_of(quiet), answers_of(quiet)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert 0 < rows[0]["reward"] < 1 and rows[0]["rl/reward_mean"] == rows[0]["reward"]
    assert {"reward_std", "frac_reward_zero_std", "entropy", "rewards/odd/mean", "completions/mean_length",
            "clip_ratio/region_mean", "rl/ess_fraction"} <= rows[0].keys()  # fmt: skip
    assert rows[-1]["val/reward"] is not None and len({row["reward"] for row in rows}) > 1
    assert len(answers) == 5 * 8 and len({one["id"] for one in answers}) == 40
    first = answers[0]
    parts = first["rewards"]
    assert first["reward"] == pytest.approx(parts["odd"] + 0.5 * (parts["short"] or 0))
    assert {one["version"] for one in answers if one["step"] == 2} == {2}, "two updates a step"


class Killed(BaseException):
    """Ends the run as SIGKILL would: nothing after it is done."""


@pytest.mark.parametrize("update", [5, 6])
def test_killed_before_an_update(quiet, tmp_path, monkeypatch, update):
    """Updates 5 and 6 are those of step 3: after its rollout, and between its updates."""
    calls, step = [], Engine.train_step

    def killed(engine, *args):
        calls.append(1)
        if len(calls) == update:
            raise Killed
        return step(engine, *args)

    config = made(tmp_path)
    monkeypatch.setattr(Engine, "train_step", killed)
    with pytest.raises(Killed):
        grpo.run(config, Mesh.single(), "auto")
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    grpo.run(config, Mesh.single(), "must")
    assert rows_of(tmp_path) == rows_of(quiet)
    assert answers_of(tmp_path) == answers_of(quiet)


def test_killed_inside_the_reward_function(quiet, tmp_path):
    """SIGKILL to the rank while it waits for the rewards of the last step."""
    made(tmp_path)
    asked = answers_of(quiet)[-1]["prompt"]
    (tmp_path / "kill").write_text(asked.partition("+")[0])
    killed = megallm("grpo", "grpo.yaml", cwd=tmp_path)
    assert killed.code != 0 and len(rows_of(tmp_path)) == 4, killed.err
    done = megallm("grpo", "grpo.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    assert rows_of(tmp_path) == rows_of(quiet)


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key, value in theirs.items():
        same = value == ours[key] or math.isclose(ours[key], value, rel_tol=1e-9, abs_tol=1e-10)
        assert same, (key, ours[key], value)


def on_ranks(folder: str, layout: Layout) -> None:
    config = loaded(Path(folder), {"layout.tp": layout.tp, "layout.dp": layout.dp, "zero.stage": 3})
    grpo.run(config, Mesh.start(layout), "must")


def test_it_goes_on_at_another_layout(quiet, tmp_path):
    grpo.run(made(tmp_path, **{"train.stop_at": 2}), Mesh.single(), "never")
    layout = Layout(dp=2)
    run_ranks(2, on_ranks, str(tmp_path), layout)
    for ours, theirs in zip(rows_of(tmp_path), rows_of(quiet), strict=True):
        assert ours.keys() >= theirs.keys()  # the one that stopped has evaluated too
        assert_close(ours, theirs)
    assert [one["answer"] for one in answers_of(tmp_path)] == [one["answer"] for one in answers_of(quiet)]


def test_adapters_have_the_base_as_their_reference(quiet, tmp_path):
    options = {"model.init": quiet / "run", "peft.method": "lora", "peft.dim": 2, "rl.kl.loss": 0.1, "train.steps": 2}
    options |= {"rl.replay.prompts": 0, "rl.replay.staleness": 0, "optim.lr": 0.1}
    options |= {"model.num_layers": "null", "model.hidden_size": "null", "model.num_heads": "null"}
    (tmp_path / "lora").mkdir()
    grpo.run(made(tmp_path / "lora", **options), Mesh.single(), "auto")
    (tmp_path / "full").mkdir()
    grpo.run(made(tmp_path / "full", **options | {"peft.method": "none", "optim.lr": 0.001}), Mesh.single(), "auto")
    for folder in (tmp_path / "lora", tmp_path / "full"):
        first, second = rows_of(folder)
        assert first["rl/kl"] > 0 and second["rl/kl"] > 0, "of the first update it is 0, or the run had stopped"
    assert (tmp_path / "lora" / "run" / "adapter" / "adapter_config.json").is_file()


def test_virtual_tokens_make_another_policy_than_the_reference_from_the_start(quiet, tmp_path):
    options = {"peft.method": "prompt", "peft.virtual_tokens": 2, "rl.kl.loss": 0.1, "train.steps": 1}
    grpo.run(made(tmp_path, **start_of(quiet), **options, **ON_POLICY), Mesh.single(), "auto")
    assert rows_of(tmp_path)[0]["rl/kl"] > 1e-4


# Rewards and rules


def test_a_reward_function_that_raises_ends_the_run_or_is_told(tmp_path):
    fails = {f"{tmp_path}/rewards.py:fails": 1.0}
    config = made(tmp_path, **{"train.steps": 1, "rl.replay.prompts": 0, "rl.replay.staleness": 0})
    config = replace(config, {"reward.functions": fails})
    with pytest.raises(RewardError, match="The reward function 'fails' failed on .*ValueError: it is broken"):
        grpo.run(config, Mesh.single(), "auto")
    grpo.run(replace(config, {"reward.on_error": "zero"}), Mesh.single(), "auto")
    assert rows_of(tmp_path)[0]["reward"] == 0
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert '"event": "reward_failed"' in events and "it is broken" in events


@pytest.mark.parametrize(("options", "said"), [
    ({"rl.kl.loss": 0.1, "rl.kl.reward": 0.1}, "not into both"),
    ({"sampling.group": 3}, "no whole number of groups of sampling.group 3"),
    ({"rl.kl.target": 1.0}, "steers rl.kl.reward, which is 0"),
    ({"rl.replay.staleness": 0}, "need an age that they may have"),
    ({"sampling.temperature": 0}, "sampling.temperature is 0"),
    ({"rl.advantage": "decoupled", "rl.overlong_cache": 2}, "compares each reward alone"),
    ({"data.packing": "true"}, "it is rl.packing"),
    ({"peft.dropout": 0.1, "peft.method": "lora"}, "another one than that which has sampled"),
    ({"model.head": "value"}, "trains language models"),
    ({"sampling.stop": "['']"}, "ends each answer at its first token"),
    ({"rl.replay.low": 3}, "rl.replay.low 3 is above rl.replay.high 2"),
    ({"rl.opsm": -1}, "rl.opsm is -1"),
])  # fmt: skip
def test_what_does_not_go_together_is_said(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        made(tmp_path, **options)


def test_bounds_that_the_algorithm_rules_out_are_no_internal_error(tmp_path):
    with pytest.raises(UsageError, match=r"rl.algorithm grpo: dual_clip is 0.5; it must be above 1 \+ high"):
        grpo.run(made(tmp_path, **{"rl.dual_clip": 0.5}), Mesh.single(), "never")


def test_no_reward_function_is_refused(tmp_path, capsys):
    made(tmp_path)
    assert main(["config", str(tmp_path / "grpo.yaml"), "--kind", "grpo", "reward.functions={}"]) == 2
    assert "reward.functions is empty" in capsys.readouterr().err
    assert KINDS["grpo"].module == grpo.__name__


# Collapse


def told(**figures: list[float]) -> list[tuple[int, str]]:
    monitor, said = CollapseMonitor(), []
    for step, values in enumerate(zip(*figures.values(), strict=True), start=1):
        row = {"step": step} | {key.replace("__", "/"): x for key, x in zip(figures, values, strict=True)}
        said += [(step, name) for name, _ in monitor.see(row)]
    return said


def test_collapse_is_noticed_once():
    assert told(entropy=[1.0] * 10) == []
    assert told(entropy=[1.0] * 5 + [0.01] * 20) == [(10, "entropy")]
    assert told(reward=[0.5] * 5 + [0.1] * 10) == [(7, "reward")]
    assert told(reward=[0.5] * 5 + [0.6] * 10) == []
    assert told(frac_reward_zero_std=[0.95] * 8) == [(5, "zero_std")]
    assert told(completions__mean_length=[40.0] * 5 + [3.0] * 10) == [(9, "short")]
    assert told(rl__ess_fraction=[1.0] * 5 + [0.2] * 6) == [(9, "ess")]
    assert told(completions__clipped_ratio=[0.0] * 5 + [1.0] * 60) == [(8, "truncated"), (58, "truncated")]


def test_a_run_without_rewards_is_warned_of(tmp_path, capsys):
    made(tmp_path)
    (tmp_path / "rewards.py").write_text("def odd(completions, **rest):\n    return [None] * len(completions)\n")
    only = {"reward.functions": "{" + f"{tmp_path}/rewards.py:odd: 1.0" + "}"}
    grpo.run(loaded(tmp_path, only | ON_POLICY | {"train.steps": 2, "eval.every": 0}), Mesh.single(), "never")
    assert rows_of(tmp_path)[0]["reward"] is None
    said = "".join(capsys.readouterr())
    assert said.count("no answer has a reward: every function returned None") == 1
    assert told(reward=[0.0] * 3) == []


# PPO

PPO = {"rl.algorithm": "ppo", "rl.replay.prompts": 0, "rl.replay.staleness": 0, "rl.kl.reward": 0.1}


ON_POLICY = {"rl.replay.prompts": 0, "rl.replay.staleness": 0}


def made_ppo(folder: Path, **values: Any) -> PpoConfig:
    made(folder, **ON_POLICY)
    return loaded_ppo(folder, values)


def loaded_ppo(folder: Path, values: dict[str, Any]) -> PpoConfig:
    """The configuration of a folder whose files are there."""
    words = [f"{key}={value}" for key, value in (PPO | values).items()]
    return check(load(PpoConfig, folder / "grpo.yaml", words))


@pytest.fixture(scope="module")
def quiet_ppo(quiet, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    ppo.run(made_ppo(folder, **start_of(quiet)), Mesh.single(), "never")
    return folder


def start_of(quiet: Path) -> dict[str, Any]:
    keys = ("num_layers", "hidden_size", "num_heads")
    return {"model.init": quiet / "run", **{f"model.{key}": "null" for key in keys}}


def test_ppo_trains_a_critic_and_goes_on_as_if_nothing_had_been(quiet, quiet_ppo, tmp_path):
    rows = rows_of(quiet_ppo)
    assert rows[-1]["loss/value_avg"] < rows[0]["loss/value_avg"]
    assert rows[0]["rl/kl"] == pytest.approx(0, abs=1e-12) and rows[-1]["rl/kl"] > 0
    ppo.run(made_ppo(tmp_path, **start_of(quiet), **{"train.stop_at": 2}), Mesh.single(), "never")
    ppo.run(made_ppo(tmp_path, **start_of(quiet)), Mesh.single(), "must")
    stopped = {key: x for row in rows_of(tmp_path)[:2] for key, x in row.items() if key.startswith("val/")}
    assert stopped
    ours = [{k: x for k, x in row.items() if k in other} for row, other in zip(rows_of(tmp_path), rows, strict=True)]
    assert ours == rows


def ppo_on_ranks(folder: str, quiet: str) -> None:
    more = {"layout.tp": 2, "train.steps": 5, "train.stop_at": 2}
    config = loaded_ppo(Path(folder), start_of(Path(quiet)) | more)
    ppo.run(config, Mesh.start(Layout(tp=2)), "never")


def test_ppo_is_the_same_at_another_layout(quiet, quiet_ppo, tmp_path):
    made(tmp_path, **ON_POLICY)
    run_ranks(2, ppo_on_ranks, str(tmp_path), str(quiet))
    for ours, theirs in zip(rows_of(tmp_path), rows_of(quiet_ppo), strict=False):
        assert_close(ours, theirs)


def test_the_critic_rests_on_rules(tmp_path):
    with pytest.raises(UsageError, match="needs a critic, which `megallm ppo` trains"):
        made(tmp_path, **{"rl.algorithm": "ppo"})
    with pytest.raises(UsageError, match="takes the place of the critic's"):
        made_ppo(tmp_path, **{"rl.advantage": "group"})
