"""Reward functions in processes: what fails is named or has the stated reward, and nothing stalls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megallm.base.errors import RewardError, UsageError
from megallm.base.optional import available
from megallm.losses.advantage import combine_rewards
from megallm.rewards import workers
from megallm.rewards.config import RewardConfig
from megallm.rewards.samples import Completion
from megallm.rewards.workers import build

OWN = '''
import os, signal, sys, time

def length(completions, **columns):
    print("what is printed is no reward")
    return [float(len(one)) for one in completions]

def acts(completion, **columns):
    if completion == "raise":
        raise KeyError("x")
    if completion == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "exit":
        sys.exit(0)
    if completion == "leave":
        os._exit(3)
    if completion == "memory":
        bytearray(4 << 30)
    if completion == "nan":
        return float("nan")
    return {"score": 1.0, "seen": completion}

def short(completions, **columns):
    return [1.0]

def slow(completion, **columns):
    time.sleep(0.2 if completion == "a" else 0)
    return float(ord(completion[0]))

def children(completion, **columns):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    open(columns["file"], "w").write(str(child.pid))
    time.sleep(1000)

def where(completion, **columns):
    return float(os.getpid())
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "own_rewards.py"
    file.write_text(OWN)
    return file


def said(*texts, **columns):
    return [Completion("p", text, (), (1,) * len(text), columns) for text in texts]


BAD = {
    "raise": "KeyError: 'x' .*own_rewards.py:10", "hang": "took longer than 2 seconds", "die": "killed by SIGKILL",
    "exit": "SystemExit: 0", "leave": "ended its process with exit status 3", "memory": "more memory than",
    "nan": "returned nan",
}  # fmt: skip


def test_what_a_function_may_do(own):
    """One call holds every failure; the others' rewards are right, in order, and the same again."""
    texts = ["a", *BAD, "b"]
    functions = {f"{own}:length": 0.5, f"{own}:acts": 2.0, "think_format": 1.0}
    config = RewardConfig(functions, on_error="none", timeout_seconds=2, memory_gib=1)
    with build(config) as rewards:
        assert rewards.names == ("length", "acts", "think_format") and rewards.weights == (0.5, 2.0, 1.0)
        begun = time.monotonic()
        table = rewards(said(*texts))
        assert table == [[len(t), None if t in BAD else 1.0, 0.0] for t in texts]
        assert [failure.samples for failure in rewards.failures] == [(at,) for at in range(1, len(BAD) + 1)]
        for failure, (name, expected) in zip(rewards.failures, BAD.items(), strict=True):
            told = str(failure)
            assert re.search(expected, told), (name, told)
            assert told.startswith(f"The reward function 'acts' failed on sample {texts.index(name)}: ")
        assert rewards.extras["seen"] == ["a", *[None] * len(BAD), "b"]
        assert time.monotonic() - begun < 300
        assert rewards(said("a", "bb")) == [[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]] and rewards.failures == []
        total = combine_rewards(table, rewards.weights)
        assert total.tolist() == [0.5 * len(t) + 2.0 * (t not in BAD) for t in texts]
        assert rewards([]) == []


def test_policies(own):
    functions = {f"{own}:acts": 1.0}
    with build(RewardConfig(functions, on_error="zero")) as rewards:
        assert rewards(said("a", "raise")) == [[1.0], [0.0]]
    with build(RewardConfig(functions, workers=3)) as rewards:
        for _ in range(3):  # the first in the order of samples, whichever ends first
            with pytest.raises(RewardError, match="'acts' failed on sample 1: it returned nan.*on_error=zero"):
                rewards(said("a", "nan", "raise", "exit"))
        assert rewards(said("a")) == [[1.0]]
    assert RewardError.exit_code == 65


def test_a_list_of_the_wrong_length_and_the_size_of_a_call(own):
    functions = {f"{own}:short": 1.0}
    told = "its call with samples 0 to 2: it returned 1 rewards for 3"
    with build(RewardConfig(functions)) as rewards, pytest.raises(RewardError, match=told):
        rewards(said("a", "b", "c"))
    with build(RewardConfig(functions, call_size=1)) as rewards:
        assert rewards(said("a", "b", "c")) == [[1.0]] * 3


def test_order_and_processes(own):
    with build(RewardConfig({f"{own}:slow": 1.0, f"{own}:where": 1.0}, workers=2)) as rewards:
        table = rewards(said(*"abcab"))
        assert [row[0] for row in table] == [97.0, 98.0, 99.0, 97.0, 98.0]
        processes = {row[1] for row in table}
        assert 1 <= len(processes) <= 2 and os.getpid() not in processes
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_what_a_function_started_ends_with_it(own, tmp_path):
    file = tmp_path / "pid"
    config = RewardConfig({f"{own}:children": 1.0}, timeout_seconds=3, on_error="none")
    with build(config) as rewards:
        assert rewards(said("a", file=str(file))) == [[None]]
    assert gone(int(file.read_text()))


def gone(pid):
    for _ in range(600):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_workers_end_with_a_killed_trainer(own):
    text = f"""
import sys
from megallm.rewards.config import RewardConfig
from megallm.rewards.samples import Completion
from megallm.rewards.workers import build
rewards = build(RewardConfig({{"{own}:where": 1.0}}))
print(int(rewards([Completion("p", "a")])[0][0]), flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        worker = int(trainer.stdout.readline())
        os.kill(worker, 0)
        trainer.send_signal(signal.SIGKILL)
    assert gone(worker)


def test_without_a_deadline_a_hanging_function_holds_the_run_up(own, monkeypatch):
    """The control of the time limit: the same call is still waiting after it."""
    monkeypatch.setattr(workers.Worker, "send", unlimited)
    config = RewardConfig({f"{own}:acts": 1.0}, timeout_seconds=0.5, on_error="none")
    with build(config) as rewards:
        signal.signal(signal.SIGALRM, _alarm)
        signal.setitimer(signal.ITIMER_REAL, 5)
        with pytest.raises(TimeoutError):
            rewards(said("hang"))
        assert rewards(said("a")) == [[1.0]]  # what was interrupted answers no later call


def unlimited(self, message, seconds, send=workers.Worker.send):
    send(self, message, 1e6)


def _alarm(number, frame):
    raise TimeoutError


def test_functions_of_the_trainer(own):
    def model(samples):
        return [float(len(sample.completion)) for sample in samples]

    config = RewardConfig({"reward_model": 1.0, "judge(most=5)": 0.5, f"{own}:length": 1.0})
    given = {"reward_model": model, "judge": lambda prompts: ["Rating: 4"] * len(prompts)}
    with build(config, given) as rewards:
        assert rewards.names == ("reward_model", "judge", "length")
        assert rewards(said("a", "bb")) == [[1.0, 0.8, 1.0], [2.0, 0.8, 2.0]]
    with pytest.raises(UsageError, match="'reward_model' needs a model, which this trainer does not give"):
        build(RewardConfig({"reward_model": 1.0}))
    given = {"reward_model": lambda samples: [1.0]}
    short = pytest.raises(RewardError, match="returned 1 rewards for 2 samples")
    with build(RewardConfig({"reward_model": 1.0}), given) as rewards, short:
        rewards(said("a", "b"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "reward.functions is empty"), ({"functions": {"acuracy": 1.0}}, "Did you mean 'accuracy'"),
        ({"functions": {"x.py:f": 1.0}}, "x.py: there is no such file"),
        ({"functions": {"math:sqrt": 1.0}}, "no known signature"),
        ({"functions": {"think_format": float("nan")}}, "a weight is a finite number"),
        ({"functions": {"think_format": 1.0}, "workers": 0}, "at least 1"),
        ({"functions": {"think_format": 1.0}, "timeout_seconds": 0}, "must be above 0"),
    ],
)  # fmt: skip
def test_what_is_refused_before_the_first_sample(settings, expected):
    with pytest.raises(UsageError, match=expected):
        build(RewardConfig(**settings))


def test_a_lacking_column_stops_whatever_the_policy(own, tmp_path):
    file = tmp_path / "needs.py"
    file.write_text("def f(completions, difficulty): return difficulty")
    lacking = pytest.raises(UsageError, match="needs difficulty, and the rows have no such column")
    with build(RewardConfig({f"{file}:f": 1.0}, on_error="zero")) as rewards, lacking:
        rewards(said("a"))


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.skipif(not available("reasoning_gym"), reason="reasoning-gym is not installed")
@pytest.mark.parametrize("walls", [True, False])
def test_what_evaluates_answers_is_confined(tmp_path, monkeypatch, walls):
    """sympy's parse_expr, which scorers of reasoning-gym use, is eval: with the walls it may not write."""
    import reasoning_gym

    if not walls:
        monkeypatch.setattr(workers, "confined", lambda: ["env"])
    row = reasoning_gym.create_dataset("countdown", size=1, seed=1)[0]
    file = tmp_path / "written"
    columns = {"answer": row["answer"], "metadata": row["metadata"]}
    texts = f"<answer>{row['metadata']['expression']}</answer>", f"<answer>open('{file}', 'w')</answer>"
    with build(RewardConfig({"reasoning_gym": 1.0}, workers=1, on_error="zero")) as rewards:
        assert rewards(said(*texts, **columns))[0] == [1.0]
        assert file.exists() != walls


def test_code_without_a_sandbox_is_refused_at_the_beginning(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("code", "reasoning_gym"):
        with pytest.raises(UsageError, match="bwrap is not on the PATH"):
            build(RewardConfig({name: 1.0}))
