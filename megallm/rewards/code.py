"""The reward of Python code by its tests, in the sandbox; the forms of tests in datasets."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from megallm.base.errors import DataError
from megallm.rewards.samples import Completion, from_json_text
from megallm.rewards.sandbox import CodeTests, Judgement, Limits, judge, judge_programs

_FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
COLUMNS = """
  test or tests: a text with asserts, test_ functions, or check(candidate) with the column entry_point (HumanEval)
  test_list: a list of assert statements, with test_setup_code (MBPP)
  input_output: {"inputs": [...], "outputs": [...], "fn_name": null or a name} (APPS, TACO)
  test_cases: [{"input": ..., "output": ..., "fn_name": null or a name}, ...]
  verification_info or reward_model.ground_truth: one of these in a mapping or JSON text"""


def extracted(sample: Completion) -> str:
    """Returns the code of an answer: its last fenced block, else all of it; behind the prompt's own
    code where that begins the function to be completed (HumanEval).
    """
    blocks = _FENCE.findall(sample.completion)
    text = blocks[-1] if blocks else sample.completion
    entry = sample.column("entry_point")
    start = sample.column("starter_code") or sample.prompt_text
    if entry and f"def {entry}" not in text and f"def {entry}" in start:
        return f"{start}{text}"
    return text


def row_tests(columns: dict[str, Any]) -> CodeTests | list[tuple[str, str]]:
    """Returns the tests of a row: those of a function, or (input, output) pairs of a program.

    Errors: DataError, which shows the accepted columns, for a row without tests.
    """
    entry = columns.get("entry_point")
    setup = "\n".join([*(columns.get("test_imports") or []), columns.get("test_setup_code") or ""])
    statements = from_json_text(columns.get("test_list"))
    if isinstance(statements, list) and statements:
        return CodeTests(statements=statements, entry_point=entry, setup=setup)
    for name in ("test", "tests"):
        value = columns.get(name)
        listed = from_json_text(value)
        if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed):
            return CodeTests(statements=listed, entry_point=entry, setup=setup)
        if isinstance(value, str) and value.strip():
            listed = _asserts(value)
            if listed:
                return CodeTests(statements=listed, entry_point=entry, setup=setup)
            return CodeTests(text=value, entry_point=entry, setup=setup)
    both = from_json_text(columns.get("input_output"))
    if isinstance(both, dict) and "inputs" not in columns:
        columns = columns | both
    if columns.get("inputs") and len(columns["inputs"]) == len(columns.get("outputs") or ()):
        return _pairs(
            list(zip(columns["inputs"], columns["outputs"], strict=True)), columns.get("fn_name")
        )
    cases = from_json_text(columns.get("test_cases"))
    if isinstance(cases, list) and cases:
        pairs = [(case["input"], case["output"]) for case in cases]
        return _pairs(pairs, cases[0].get("fn_name"))
    for name, key in (
        ("verification_info", None),
        ("reward_model", "ground_truth"),
        ("ground_truth", None),
    ):
        inner = from_json_text(columns.get(name))
        inner = from_json_text(inner.get(key)) if key and isinstance(inner, dict) else inner
        if isinstance(inner, dict):
            return row_tests(inner)
    raise DataError(
        f"the reward 'code' finds no tests in the columns {', '.join(columns)}. "
        f"Accepted are:{COLUMNS}"
    )


def _asserts(text: str) -> list[str]:
    """Returns the statements of a text that is asserts alone, so that each counts; else none."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return []
    return (
        [ast.unparse(one) for one in body]
        if all(isinstance(one, ast.Assert) for one in body)
        else []
    )


def _pairs(
    pairs: Sequence[tuple[Any, Any]], function: str | None
) -> CodeTests | list[tuple[str, str]]:
    if function is None:
        return [(_text(given), _text(wanted)) for given, wanted in pairs]
    calls = [(_arguments(given), from_json_text(wanted)) for given, wanted in pairs]
    return CodeTests(calls=calls, entry_point=function)


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    """Returns the arguments of a call; a text holds one JSON value a line."""
    if isinstance(value, str):
        return [json.loads(line) for line in value.splitlines() if line.strip()]
    return value if isinstance(value, list) else [value]


def code(
    fraction: bool = False,
    cpu_seconds: int = 5,
    wall_seconds: float = 30.0,
    memory_mib: int = 512,
) -> Callable[[Completion], float]:
    """Returns 1 where all tests pass, else 0; with `fraction` the share that passes.

    The limits are those of each process in the sandbox.
    """
    limits = Limits(
        cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_bytes=memory_mib << 20
    )

    def score(sample: Completion) -> float:
        found = verdict(sample, limits)
        return found.passed / found.total if fraction else float(found.ok)

    return score


def verdict(sample: Completion, limits: Limits) -> Judgement:
    """Returns what the tests of the sample's row say about the code of its answer."""
    tests = row_tests(dict(sample.columns))
    text = extracted(sample)
    if isinstance(tests, CodeTests):
        return judge(text, tests, limits)
    return judge_programs(text, tests, limits)
