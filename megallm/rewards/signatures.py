"""Reward functions as other trainers call them, in one form: recognised by their parameters."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from megallm.base.errors import UsageError
from megallm.rewards.samples import Completion, from_json_text

Rewards = list[float | None]


@dataclass
class Notes:
    """What functions say besides rewards in one call: columns of the sample table, and metrics."""

    step: int = 0
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapted:
    """A reward function in our form. `each`: it takes one sample a call, else a list."""

    form: str
    each: bool
    run: Callable[[Sequence[Completion], Notes], Rewards]


@dataclass(frozen=True)
class Form:
    """A signature: how it is shown and recognised, and the arguments of a call."""

    shown: str
    known: Callable[[list[str]], bool]
    arguments: Callable[[Sequence[Completion], Notes, bool], dict[str, Any]]
    each: bool


def _columns(samples: Sequence[Completion]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    return {name: [sample.columns.get(name) for sample in samples] for name in names}


def _trl(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    said = [
        sample.completion if texts or isinstance(sample.prompt, str) else sample.messages
        for sample in samples
    ]
    state = SimpleNamespace(global_step=notes.step)
    return _columns(samples) | {
        "prompts": [sample.prompt for sample in samples], "completions": said,
        "prompt_ids": [list(sample.prompt_ids) for sample in samples],
        "completion_ids": [list(sample.completion_ids) for sample in samples],
        "trainer_state": state,
        "log_extra": lambda name, values: notes.extras.__setitem__(name, list(values)),
        "log_metric": lambda name, value: notes.metrics.__setitem__(name, float(value)),
    }  # fmt: skip


def _areal(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    (one,) = samples
    return {
        "answer": one.gold(), **one.columns, "prompt": one.prompt_text, "completions": one.completion,
        "prompt_ids": list(one.prompt_ids), "completion_ids": list(one.completion_ids),
    }  # fmt: skip


def _verl(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    (one,) = samples
    return {
        "data_source": one.column("data_source"), "solution_str": one.completion,
        "ground_truth": one.gold(), "extra_info": from_json_text(one.column("extra_info")) or {},
    }  # fmt: skip


def _verl_batch(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    rows = [_verl([sample], notes, texts) for sample in samples]
    plural = {"data_source": "data_sources", "solution_str": "solution_strs",
              "ground_truth": "ground_truths", "extra_info": "extra_infos"}  # fmt: skip
    return {name: [row[key] for row in rows] for key, name in plural.items()}


def _openrlhf(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    return {
        "queries": [sample.prompt_text + sample.completion for sample in samples],
        "prompts": [sample.prompt_text for sample in samples],
        "labels": [sample.gold() for sample in samples],
    }


def _slime_sample(sample: Completion) -> SimpleNamespace:
    status = "truncated" if sample.reason == "length" else "completed"
    tokens = [*sample.prompt_ids, *sample.completion_ids]
    return SimpleNamespace(
        prompt=sample.prompt,
        response=sample.completion,
        label=sample.gold(),
        tokens=tokens,
        response_length=len(sample.completion_ids),
        status=SimpleNamespace(value=status),
        metadata=from_json_text(sample.column("metadata")) or {},
        reward=None,
    )


def _slime(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    return {"args": SimpleNamespace(), "sample": _slime_sample(samples[0])}


def _slime_batch(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    return {"args": SimpleNamespace(), "samples": [_slime_sample(sample) for sample in samples]}


def _plain(samples: Sequence[Completion], notes: Notes, texts: bool) -> dict[str, Any]:
    (one,) = samples
    return {
        **one.columns, "prompt": one.prompt, "completion": one.completion,
        "prompt_ids": list(one.prompt_ids), "completion_ids": list(one.completion_ids),
    }  # fmt: skip


# The first that is recognised; names are those of the parameters.
FORMS: dict[str, Form] = {
    "areal": Form("f(prompt, completions, prompt_ids, completion_ids, answer, **columns) -> float",
                  lambda names: {"prompt", "completions"} <= set(names), _areal, True),
    "verl": Form("compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict",
                 lambda names: {"solution_str", "ground_truth"} <= set(names), _verl, True),
    "verl batch": Form("compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> list",
                       lambda names: {"solution_strs", "ground_truths"} <= set(names), _verl_batch, False),
    "openrlhf": Form("reward_func(queries, prompts, labels) -> dict | tensor",
                     lambda names: "queries" in names, _openrlhf, False),
    "slime": Form("async custom_rm(args, sample, **kwargs) -> float",
                  lambda names: names[:2] == ["args", "sample"], _slime, True),
    "slime batch": Form("async custom_rm(args, samples, **kwargs) -> list",
                        lambda names: names[:2] == ["args", "samples"], _slime_batch, False),
    "trl": Form("f(prompts, completions, completion_ids, **columns) -> list (also async, also a class with "
                "__call__(self, completions, **columns) as in ms-swift)",
                lambda names: bool({"completions", "completion_ids"} & set(names[:3])) and "completion" not in names,
                _trl, False),
    "one answer": Form("f(completion, prompt, **columns) -> float",
                       lambda names: "completion" in names, _plain, True),
}  # fmt: skip


def accepted() -> str:
    """Returns the accepted signatures, a line each."""
    return "\n".join(f"  {name}: {form.shown}" for name, form in FORMS.items())


def adapt(
    function: Any, name: str = "the reward function", options: dict[str, Any] | None = None
) -> Adapted:
    """Returns a reward function of any known signature in our form, `options` filled in; a class is
    instantiated with them.

    Errors: UsageError with the accepted signatures for an unknown one.
    """
    if not callable(function):
        raise UsageError(f"{name} is {type(function).__name__}, not a function.")
    is_class = inspect.isclass(function)
    try:
        if is_class:
            function = function(**options or {})
        elif options:
            inspect.signature(function).bind_partial(**options)
            function = functools.partial(function, **options)
    except TypeError as error:
        raise UsageError(f"{name} with the options {options or {}}: {error}.") from error
    parameters = inspect.signature(function).parameters
    filled = options or {}
    names = [
        one for one, at in parameters.items() if at.kind is not at.VAR_KEYWORD and one not in filled
    ]
    form_name = next((key for key, form in FORMS.items() if form.known(names)), None)
    if form_name is None:
        raise UsageError(
            f"{name} has the parameters ({', '.join(map(str, parameters.values()))}), which is no "
            f"known signature of a reward function. Accepted are:\n{accepted()}"
        )
    form = FORMS[form_name]

    def run(samples: Sequence[Completion], notes: Notes) -> Rewards:
        given = form.arguments(samples, notes, is_class)
        result = function(**_chosen(parameters, given, name))
        if isinstance(result, Awaitable):
            result = asyncio.run(_awaited(result))
        if form.each:
            return [number(result, notes)]
        return numbers(result, len(samples), notes)

    return Adapted(form_name, form.each, run)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _chosen(parameters: Any, given: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the arguments that the function takes: all by name, where it has **columns."""
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    lacking = [
        key
        for key, one in parameters.items()
        if key not in given
        and one.default is one.empty
        and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    if lacking:
        raise UsageError(
            f"{name} needs {', '.join(lacking)}, and the rows have no such column; it can have: "
            f"{', '.join(given)}."
        )
    return {key: value for key, value in given.items() if open_ended or key in parameters}


def number(value: Any, notes: Notes) -> float | None:
    """Returns one reward; of a mapping its `score`, whose other numbers become metrics.

    Errors: ValueError for what is no finite number.
    """
    if isinstance(value, dict):
        key = next((key for key in ("score", "reward", "rewards", "scores") if key in value), None)
        if key is None:
            raise ValueError(f"it returned a mapping without 'score' or 'reward': {list(value)}")
        for name, other in value.items():
            if name != key:
                notes.extras.setdefault(name, []).append(other)
        value = value[key]
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"it returned {type(value).__name__} {str(value)[:80]!r}, not a number"
        ) from error
    if not math.isfinite(found):
        raise ValueError(f"it returned {found}, which is no finite number")
    return found


def numbers(value: Any, count: int, notes: Notes) -> Rewards:
    """Returns `count` rewards from a list, an array, a tensor or OpenRLHF's mapping.

    Errors: ValueError for another number of them, or for what is no finite number or None.
    """
    if isinstance(value, dict):
        key = next((key for key in ("rewards", "reward", "scores") if key in value), None)
        if key is None:
            raise ValueError(f"it returned a mapping without 'rewards': {list(value)}")
        for name, other in (value.get("extra_logs") or {}).items():
            notes.extras[name] = list(other)
        value = value[key]
    try:
        found = list(value)
    except TypeError as error:
        raise ValueError(
            f"it returned {type(value).__name__}, not a list of {count} numbers"
        ) from error
    if len(found) != count:
        raise ValueError(f"it returned {len(found)} rewards for {count} samples")
    return [number(one, notes) for one in found]


# From a text to a function.

_SPEC = re.compile(r"(?P<target>[^()]+?)\s*(?:\((?P<options>.*)\))?\s*", re.DOTALL)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Returns what `name(option=value, ...)` names, and its options; values are Python literals.

    Errors: UsageError for a text of another form.
    """
    match = _SPEC.fullmatch(spec)
    try:
        if match is None:
            raise ValueError(spec)
        with warnings.catch_warnings(action="error"):  # an unknown escape
            call = ast.parse(f"f({match['options'] or ''})", mode="eval").body
        if (
            not isinstance(call, ast.Call)
            or call.args
            or any(one.arg is None for one in call.keywords)
        ):
            raise ValueError(spec)
        return match["target"], {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"'{spec}' names no reward function: write name, file.py:function or "
            "package.module:function, with options as (key=value, ...) and backslashes as r'...'."
        ) from error


def imported(target: str) -> Any:
    """Returns the object that `file.py:name` or `package.module:name` names.

    Errors: UsageError when there is no such file, module or name, or when importing it fails.
    """
    place, colon, name = target.rpartition(":")
    if not colon:
        raise UsageError(
            f"'{target}' is no reward of the table, no file.py:function and no "
            "package.module:function."
        )
    module = _file_module(Path(place)) if place.endswith(".py") else _module(place)
    if name not in vars(module):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        ]
        raise UsageError(f"{place} has no '{name}'; it has {', '.join(known) or 'no function'}.")
    return vars(module)[name]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"The module {name} cannot be imported: {error}.") from error


@functools.cache
def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; it was to hold a reward function.")
    sys.path.insert(0, str(path.resolve().parent))  # what stands beside it can be imported
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the boundary of the user's file
        raise UsageError(
            f"{path} fails when it is imported: {type(error).__name__}: {error}."
        ) from error
    return module
