"""The rewards of the table: values of the papers, and those of TRL 1.16 recorded as figures."""

from __future__ import annotations

import json
import shutil

import pytest

from megallm.base.errors import DataError, UsageError
from megallm.base.optional import available
from megallm.cli.main import main
from megallm.rewards import table
from megallm.rewards.code import extracted, row_tests
from megallm.rewards.samples import Completion
from megallm.rewards.sandbox import CodeTests
from megallm.rewards.signatures import Notes
from megallm.rewards.table import find, judged, known

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def reward(spec, completion="", ids=(), **columns):
    (found,) = find(spec).run([Completion(columns.get("prompt", ""), completion, (), ids, columns)], Notes())
    return found


def test_format():
    for text, expected in [
        ("<think>\na\n</think>\nb", 1.0), ("<think>\na\nb", 0.0), ("x <think>a</think>b", 0.0),
        ("<think>a<think>b</think>c", 0.0), ("", 0.0),
    ]:  # fmt: skip
        assert reward("think_format", text) == reward("think_format_reward", text) == expected


def test_lengths_and_repetition():
    overlong = "get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)"
    for length, expected in [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (500, -1)]:
        assert reward(overlong, ids=[1] * length) == expected
    assert reward("soft_overlong(max_completion_len=10, soft_punish_cache=0)", ids=[1] * 10) == 0
    assert reward("soft_overlong(max_completion_len=10, soft_punish_cache=0)", ids=[1] * 11) == -1
    two = "get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)"
    assert reward(two, ids=[1, 2, 3, 4]) == 0 and reward(two, ids=[5] * 5) == -0.75
    assert reward("repetition_penalty", ids=[1, 2]) == reward("repetition_penalty", ids=[]) == 0


def test_exact_match_and_regex():
    assert reward("exact_match", " 42\n", answer=42) == 1 and reward("exact_match", "41", answer="42") == 0
    assert reward("exact_match(after='####')", "so #### 7", solution="6 + 1 #### 7") == 1
    assert reward("exact_match(after='####')", "7", solution="6 + 1 #### 7") == 0
    assert reward("exact_match(ignore_case=True)", "Paris", ground_truth="PARIS") == 1
    assert reward("exact_match", "4", reward_model='{"ground_truth": "4"}') == 1
    assert reward(r"regex(pattern=r'\d+ apples')", "3 apples") == 1 and reward("regex(pattern='[0-9]')", "no") == 0
    numbers = r"regex(pattern=r'(\d+)', group=1)"
    assert reward(numbers, "first 3 then 12", answer=12) == 1 and reward(numbers, "12 or 3", answer=12) == 0
    with pytest.raises(DataError, match="needs the right answer in a column.*the row has other"):
        reward("exact_match", "x", other=1)
    with pytest.raises(UsageError, match="pattern '\\(' of the reward 'regex' is wrong"):
        find("regex(pattern='(')")
    with pytest.raises(UsageError, match="names no reward function"):  # an escape that Python does not know
        find(r"regex(pattern='\d')")


@pytest.mark.skipif(not available("math_verify"), reason="math-verify is not installed")
def test_accuracy():
    third = r"\frac{1}{3}"
    assert reward("accuracy", r"My answer is \boxed{\frac{1}{3}}", solution=third) == 1
    assert reward("accuracy_reward", r"\boxed{0.333}", solution=third) == 0
    assert reward("accuracy", r"\boxed{2/6}", solution=third) == 1
    assert reward("accuracy", "nothing", solution=third) == 0
    assert reward("accuracy", r"\boxed{1}", solution="no mathematics") is None
    after = "reasoning_accuracy_reward"
    assert reward(after, r"a</think> \boxed{\frac{1}{3}}", solution=third) == 1
    assert reward(after, r"\boxed{\frac{1}{3}}", solution=third) == 0
    cosine = "get_cosine_scaled_reward(max_len=100)"
    assert reward(cosine, r"\boxed{\frac{1}{3}}", [1] * 50, solution=third) == pytest.approx(0.75)
    assert reward(cosine, r"\boxed{\frac{1}{2}}", [1] * 50, solution=third) == pytest.approx(-0.75)
    assert reward(cosine, r"\boxed{\frac{1}{3}}", [1] * 500, solution=third) == pytest.approx(0.5)
    assert reward(cosine, r"\boxed{\frac{1}{2}}", [], solution=third) == pytest.approx(-1.0)


@pytest.mark.skipif(not available("reasoning_gym"), reason="reasoning-gym is not installed")
def test_reasoning_gym():
    import reasoning_gym

    row = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    answer, metadata = row["answer"], json.dumps(row["metadata"])
    assert reward("reasoning_gym", f"So <answer>{answer}</answer>", answer=answer, metadata=metadata) == 1
    assert reward("reasoning_gym", answer, answer=answer, metadata=row["metadata"]) == 1
    assert reward("reasoning_gym", "<answer>x</answer>", answer=answer, metadata=metadata) < 0.5
    with pytest.raises(DataError, match="source_dataset"):
        reward("reasoning_gym", "x", answer=answer)


def test_names():
    assert {"accuracy", "code", "judge", "reward_model"} <= set(known())
    with pytest.raises(UsageError, match="no reward 'acuracy'. Did you mean 'accuracy'.*file.py:function"):
        find("acuracy")
    with pytest.raises(UsageError, match=r"takes \(max_completion_len.*missing a required argument"):
        find("soft_overlong")
    with pytest.raises(UsageError, match="unexpected keyword argument 'n'"):
        find("repetition_penalty(n=2)")


def test_judge():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return ["Rating: 3 ... Rating: 8", "none", "rating: 99"]

    samples = [Completion("Q{completion}", "A{prompt}", columns={"answer": "G"})] * 3
    assert judged(generate, "{prompt}|{completion}|{gold}")(samples) == [0.8, None, 1.0]
    assert asked[0] == "Q{completion}|A{prompt}|G"  # an answer fills in nothing
    assert "Rating: N" in table.JUDGE_PROMPT


def test_forms_of_code_tests():
    both = {"inputs": ["1\n2\n", "3"], "outputs": ["3", "3"]}
    pairs = [("1\n2\n", "3"), ("3", "3")]
    assert row_tests({"input_output": json.dumps(both)}) == row_tests(both) == pairs
    assert row_tests({"reward_model": {"style": "rule", "ground_truth": json.dumps(both)}}) == pairs
    cases = [{"input": "1", "output": "2", "type": "stdin_stdout"}]
    assert row_tests({"verification_info": json.dumps({"language": "python", "test_cases": cases})}) == [("1", "2")]
    named = {"fn_name": "f", "inputs": ["[1, 2]\n3", [[4], 5]], "outputs": ["6", 9]}
    assert row_tests({"input_output": named}) == CodeTests(calls=[([[1, 2], 3], 6), ([[4], 5], 9)], entry_point="f")
    mbpp = row_tests({"test_list": ["assert f(1)"], "test_setup_code": "import math", "test_imports": ["import re"]})
    assert mbpp == CodeTests(statements=["assert f(1)"], setup="import re\nimport math")
    human = {"test": "def check(c): ...", "entry_point": "f"}
    assert row_tests(human) == CodeTests(text="def check(c): ...", entry_point="f")
    asserts = CodeTests(statements=["assert f(1) == 2", "assert not f(2)"])
    assert row_tests({"tests": "assert f(1) == 2\nassert not f(2)"}) == asserts
    assert row_tests({"test": asserts.statements}) == asserts
    assert row_tests({"tests": "x = 1\nassert f(x)"}) == CodeTests(text="x = 1\nassert f(x)")
    with pytest.raises(DataError, match="(?s)no tests in the columns answer.*HumanEval"):
        row_tests({"answer": 3})


def test_code_is_found_in_an_answer():
    assert extracted(Completion("", "a\n```python\nx = 1\n```\nb\n```\ny = 2\n```\nc")) == "y = 2\n"
    assert extracted(Completion("", "```py\ncut off")) == "cut off" and extracted(Completion("", "z = 3")) == "z = 3"
    start = "def f(x):\n    '''Adds 1.'''\n"
    assert extracted(Completion(start, "    return x + 1", columns={"entry_point": "f"})).startswith(start)
    whole = "```python\ndef f(x): return 2\n```"
    assert extracted(Completion(start, whole, columns={"entry_point": "f"})) == "def f(x): return 2\n"


@needs_bwrap
def test_our_own_tasks(tmp_path):
    """`megallm synth` writes rows that `code` and `exact_match` score, their answers with 1."""
    file = tmp_path / "tasks.jsonl"
    assert main(["synth", "--kind", "code", "arithmetic", "--count", "4", "--output", str(file)]) == 0
    for row in map(json.loads, file.read_text().splitlines()):
        name = "code" if "tests" in row else "exact_match"
        assert reward(name, row["answer"], **row) == 1 and reward(name, "return 1", **row) == 0


@needs_bwrap
def test_code():
    columns = {"test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
    right, half = "```python\ndef f(x): return x + 1\n```", "```python\ndef f(x): return 2\n```"
    assert reward("code", right, **columns) == 1 and reward("code", half, **columns) == 0
    assert reward("code(fraction=True)", half, **columns) == 0.5
    both = {"inputs": ["1\n", "5"], "outputs": ["2", "6"]}
    assert reward("code", "print(int(input()) + 1)", input_output=both) == 1
    assert reward("code(fraction=True)", "print(6)", input_output=both) == 0.5
