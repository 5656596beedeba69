"""Each trainer's signature is recognised and called with what that trainer would pass."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from megallm.base.errors import UsageError
from megallm.rewards.samples import Completion
from megallm.rewards.signatures import FORMS, Notes, adapt, imported, parse_spec

SAMPLES = [
    Completion("1+1=", "2", (1, 2), (3,), {"solution": "2", "data_source": "sums", "extra_info": '{"level": 1}'}),
    Completion("2+2=", "five", (1, 2), (4, 5), {"solution": "4", "metadata": {"k": 1}}, reason="length"),
]
TALKS = [Completion([{"role": "user", "content": "Hi"}], "Ho", (), (), {})]


def run(function, samples=SAMPLES, step=0):
    notes, found = Notes(step), adapt(function)
    if found.each:
        return [found.run([sample], notes)[0] for sample in samples], found.form, notes
    return found.run(samples, notes), found.form, notes


def trl(prompts, completions, solution, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("seen", completions)
    log_metric("mean", len(completions))
    assert completion_ids == [[3], [4, 5]] and trainer_state.global_step == 7 and "data_source" in kwargs
    return [float(one == gold) if gold != "4" else None for one, gold in zip(completions, solution, strict=True)]


async def trl_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(one)) for one in completions]


class Orm:
    def __init__(self, args=None, **kwargs):
        pass

    def __call__(self, completions, solution, **kwargs):
        return [float(one == gold) for one, gold in zip(completions, solution, strict=True)]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "level": extra_info.get("level", 0), "source": data_source}


def verl_batch(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    return [float(a == b) for a, b in zip(solution_strs, ground_truths, strict=True)]


def openrlhf(queries, prompts, labels, **kwargs):
    assert queries == ["1+1=2", "2+2=five"] and prompts == ["1+1=", "2+2="]
    return {"rewards": np.array([1.0, 0.5]), "scores": np.array([1.0, 0.0]), "extra_logs": {"half": np.ones(2)}}


async def slime(args, sample, **kwargs):
    return float(sample.response == sample.label) + 10 * (sample.status.value == "truncated") + sample.response_length


async def slime_batch(args, samples, **kwargs):
    return [float(len(sample.tokens)) for sample in samples]


def areal(prompt, completions, prompt_ids, completion_ids, answer, **kwargs):
    return float(completions == answer) + len(completion_ids)


def one_answer(completion, solution):
    return completion == solution


CASES = [
    (trl, "trl", [1.0, None]), (trl_async, "trl", [1.0, 4.0]), (Orm, "trl", [1.0, 0.0]), (verl, "verl", [1.0, 0.0]),
    (verl_batch, "verl batch", [1.0, 0.0]), (openrlhf, "openrlhf", [1.0, 0.5]), (slime, "slime", [2.0, 12.0]),
    (slime_batch, "slime batch", [3.0, 4.0]), (areal, "areal", [2.0, 2.0]), (one_answer, "one answer", [1.0, 0.0]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "form", "expected"), CASES)
def test_a_signature_is_recognised(function, form, expected):
    found, named, notes = run(function, step=7)
    assert (found, named) == (expected, form)
    if function is trl:
        assert notes.extras == {"seen": ["2", "five"]} and notes.metrics == {"mean": 2.0}
    if function is verl:
        assert notes.extras == {"level": [1, 0], "source": ["sums", None]}
    if function is openrlhf:
        assert notes.extras == {"half": [1.0, 1.0]}


def test_every_form_has_a_case():
    assert {form for _, form, _ in CASES} == FORMS.keys()


def test_conversations_are_messages_for_trl_and_texts_for_swift():
    said = []
    run(lambda completions, **kwargs: [said.append(one) or 1.0 for one in completions], TALKS)
    assert said == [[{"role": "assistant", "content": "Ho"}]]

    class Seen:
        def __call__(self, completions, **kwargs):
            return [float(completions == ["Ho"])]

    assert run(Seen, TALKS)[0] == [1.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda a, b: 0, r"no known signature of a reward function. Accepted are:\n(.*\n)*.*compute_score"),
        (3, "is int, not a function"),
        (type("Needs", (), {"__init__": lambda self, size: None, "__call__": trl_async}), "missing 1 required"),
    ],
)
def test_what_is_no_reward_function(function, said):
    with pytest.raises(UsageError, match=said):
        adapt(function)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1.0], "returned 1 rewards for 2 samples"), ([1.0, float("nan")], "returned nan"),
        ([1.0, float("-inf")], "returned -inf"), (["x", 1.0], "returned str 'x', not a number"),
        (1.0, "returned float, not a list of 2"), ({"a": 1}, "without 'rewards'"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_rewards(result, said):
    with pytest.raises(ValueError, match=said):
        run(lambda completions, **kwargs: result)


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="needs difficulty, and the rows have no such column.*data_source"):
        run(lambda completions, difficulty: [1.0, 1.0])


def test_options_and_files(tmp_path):
    assert parse_spec("a/b.py:f(x=1, y='(2)')") == ("a/b.py:f", {"x": 1, "y": "(2)"})
    assert parse_spec("accuracy") == ("accuracy", {})
    for bad in ("f(1)", "f(x=open('y'))", "f(x=1", "f(**x)", "(x=1)"):
        with pytest.raises(UsageError, match="names no reward function"):
            parse_spec(bad)
    file = tmp_path / "own.py"
    file.write_text("import beside_it\ndef f(completion, scale): return scale * len(completion)\nTHREE = 3\n")
    (tmp_path / "beside_it.py").write_text("")
    found = adapt(imported(f"{file}:f"), "f", {"scale": 3})
    assert found.run(SAMPLES[1:], Notes()) == [12.0]
    with pytest.raises(UsageError, match="unexpected keyword argument 'size'"):
        adapt(imported(f"{file}:f"), "f", {"size": 3})
    with pytest.raises(UsageError, match="has no 'g'; it has f"):
        imported(f"{file}:g")
    with pytest.raises(UsageError, match="no such file"):
        imported(f"{tmp_path}/other.py:f")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(UsageError, match="broken.py fails when it is imported: ZeroDivisionError"):
        imported(f"{broken}:f")
    with pytest.raises(UsageError, match="cannot be imported"):
        imported("no_such_module_here:f")
    assert imported("math:sqrt")(4) == 2
