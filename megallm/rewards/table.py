"""Rewards by name. Each row makes a function of one `Completion`; TRL's names are accepted too."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megallm.base import suggest
from megallm.base.errors import DataError, UsageError
from megallm.base.optional import need
from megallm.rewards import code, sandbox
from megallm.rewards.samples import GOLD, Completion, from_json_text
from megallm.rewards.signatures import Adapted, Notes, Rewards, adapt, imported, number, parse_spec

Score = Callable[[Completion], float | None]
JUDGE_PROMPT = """Rate how well the answer answers the question, from 0 (useless) to 10 (perfect).

Question:
{prompt}

Answer:
{completion}

Write the rating alone, as "Rating: N"."""


def accuracy(after: str | None = None) -> Score:
    """Returns 1 where math-verify finds the answer equal to the right one, else 0, and None where
    the right one is no mathematics (TRL's `accuracy_reward`).

    after: only what follows its last occurrence counts, such as </think>; without it 0.
    """
    math_verify = need("math_verify", "leave the reward 'accuracy' out")
    normalization = need(
        "latex2sympy2_extended", "leave the reward 'accuracy' out"
    ).NormalizationConfig
    latex = math_verify.LatexExtractionConfig(
        normalization_config=normalization(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )

    def score(sample: Completion) -> float | None:
        text = sample.completion
        if after is not None:
            head, found, text = text.rpartition(after)
            if not found:
                return 0.0
        gold = math_verify.parse(str(_gold(sample, "accuracy")))
        if not gold:
            return None
        answer = math_verify.parse(text, extraction_config=[latex], extraction_mode="first_match")
        return float(math_verify.verify(gold, answer))

    return score


def _gold(sample: Completion, name: str) -> Any:
    gold = sample.gold()
    if gold is None:
        raise DataError(
            f"the reward '{name}' needs the right answer in a column {', '.join(GOLD[:-1])} "
            f"or {GOLD[-1]}; the row has {', '.join(sample.columns) or 'no column'}"
        )
    return gold


def think_format() -> Score:
    """Returns 1 for one <think>...</think> at the beginning, else 0."""
    pattern = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
    return lambda sample: float(pattern.match(sample.completion) is not None)


def soft_overlong(max_completion_len: int, soft_punish_cache: int) -> Score:
    """Returns 0 up to max - cache tokens, -1 above max, linear between (DAPO, arXiv 2503.14476)."""

    def score(sample: Completion) -> float:
        over = len(sample.completion_ids) - (max_completion_len - soft_punish_cache)
        if over <= 0:
            return 0.0
        return -1.0 if over > soft_punish_cache else -over / soft_punish_cache

    return score


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> Score:
    """Returns `max_penalty` times the share of n-grams of tokens that are repeated (arXiv
    2502.03373, C.2).
    """

    def score(sample: Completion) -> float:
        ids = list(sample.completion_ids)
        grams = [tuple(ids[at : at + ngram_size]) for at in range(len(ids) - ngram_size + 1)]
        return (1 - len(set(grams)) / len(grams)) * max_penalty if grams else 0.0

    return score


def cosine_length(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Score:
    """Returns `accuracy` scaled by a cosine of the length in tokens: short right answers are worth
    most, short wrong ones least (arXiv 2502.03373, C.1).
    """
    right = accuracy()

    def score(sample: Completion) -> float | None:
        correct = right(sample)
        if correct is None:
            return None
        cosine = math.cos(min(len(sample.completion_ids) / max_len, 1.0) * math.pi)
        low, high = (
            (min_value_correct, max_value_correct)
            if correct
            else (max_value_wrong, min_value_wrong)
        )
        return low + 0.5 * (high - low) * (1.0 + cosine)

    return score


def exact_match(after: str | None = None, ignore_case: bool = False) -> Score:
    """Returns 1 where the answer is the right one but for white space around it, else 0.

    after: only what follows its last occurrence counts, such as "####" of GSM8K, on both sides.
    """

    def cut(text: str) -> str:
        text = (text if after is None else text.rpartition(after)[2]).strip()
        return text.casefold() if ignore_case else text

    def score(sample: Completion) -> float:
        if after is not None and after not in sample.completion:
            return 0.0
        return float(cut(sample.completion) == cut(str(_gold(sample, "exact_match"))))

    return score


def regex(pattern: str, group: int | None = None) -> Score:
    """Returns 1 where the pattern is found in the answer, else 0; with `group`, where that group of
    its last match is the right answer.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(
            f"The pattern {pattern!r} of the reward 'regex' is wrong: {error}."
        ) from error

    def score(sample: Completion) -> float:
        matches = list(compiled.finditer(sample.completion))
        if group is None or not matches:
            return float(bool(matches))
        return float(matches[-1].group(group).strip() == str(_gold(sample, "regex")).strip())

    return score


def reasoning_gym(tag: str = "answer") -> Score:
    """Returns the score that reasoning-gym gives, by the row's metadata.source_dataset, to what
    stands in the last <answer> of the text, else to all of it.
    """
    gym = need("reasoning_gym", "leave the reward 'reasoning_gym' out")
    extract = need("reasoning_gym.utils", "leave it out").extract_answer

    def score(sample: Completion) -> float:
        metadata = from_json_text(sample.column("metadata")) or {}
        name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        if name is None:
            raise DataError(
                "the reward 'reasoning_gym' needs the column metadata with source_dataset"
            )
        entry = {"question": sample.prompt_text, **sample.columns, "metadata": metadata}
        answer = extract(sample.completion, tag)
        return float(gym.get_score_answer_fn(name)(answer or sample.completion.strip(), entry))

    return score


@dataclass(frozen=True)
class RewardRow:
    """A reward of the table. `confined`: it evaluates what the model wrote, so its worker has
    neither network nor a file system to write to.
    """

    build: Callable[..., Score]
    confined: bool = False
    check: Callable[[], None] | None = None


TABLE: dict[str, RewardRow] = {
    "accuracy": RewardRow(accuracy),
    "think_format": RewardRow(think_format),
    "soft_overlong": RewardRow(soft_overlong),
    "repetition_penalty": RewardRow(repetition_penalty),
    "cosine_length": RewardRow(cosine_length),
    "exact_match": RewardRow(exact_match),
    "regex": RewardRow(regex),
    "reasoning_gym": RewardRow(
        reasoning_gym, confined=True, check=sandbox.check_sandbox
    ),  # sympy's parse_expr evaluates
    "code": RewardRow(code.code, check=sandbox.check_sandbox),
}
ALIASES = {  # TRL's names
    "accuracy_reward": "accuracy", "think_format_reward": "think_format",
    "reasoning_accuracy_reward": "accuracy(after='</think>')",
    "get_soft_overlong_punishment": "soft_overlong",
    "get_repetition_penalty_reward": "repetition_penalty", "get_cosine_scaled_reward": "cosine_length",
}  # fmt: skip
GIVEN = ("reward_model", "judge")  # functions of the trainer, which has the models


def known() -> tuple[str, ...]:
    """Returns all names of the table."""
    return (*TABLE, *GIVEN)


def resolved(spec: str) -> tuple[str, dict[str, Any]]:
    """Returns what a specification names, TRL's names as ours, and its options.

    Errors: UsageError for a name that is in no table and is no file.py:function.
    """
    target, options = parse_spec(spec)
    if target in ALIASES:
        target, more = parse_spec(ALIASES[target])
        options = more | options
    if ":" not in target and target not in known():
        raise UsageError(
            f"There is no reward '{target}'.{suggest.did_you_mean(target, [*known(), *ALIASES])} "
            f"The table has {', '.join(known())}; a function of yours is file.py:function or "
            "package.module:function."
        )
    return target, options


def find(spec: str) -> Adapted:
    """Returns the reward that a specification names: of the table, or an imported function.

    Errors: UsageError for an unknown name, signature or option, or a library that is not there.
    """
    target, options = resolved(spec)
    if target not in TABLE:
        return adapt(imported(target), target, options)
    build = TABLE[target].build
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        takes = inspect.signature(build).replace(return_annotation=inspect.Signature.empty)
        raise UsageError(f"The reward '{target}' takes {takes}: {error}.") from error
    score = build(**options)

    def run(samples: Sequence[Completion], notes: Notes) -> Rewards:
        return [number(score(sample), notes) for sample in samples]

    return Adapted("table", True, run)


def judged(
    generate: Callable[[list[str]], Sequence[str]],
    template: str = JUDGE_PROMPT,
    pattern: str = r"[Rr]ating:\s*(\d+(?:\.\d+)?)",
    most: float = 10.0,
) -> Callable[[Sequence[Completion]], Rewards]:
    """Returns the reward function of an LLM judge: `generate` answers the prompts, and the last
    match of `pattern` over `most` is the reward, from 0 to 1; None where the judge gave none.
    """

    def score(samples: Sequence[Completion]) -> Rewards:
        prompts = [_filled(template, sample) for sample in samples]
        found = [re.findall(pattern, text) for text in generate(prompts)]
        return [min(max(float(one[-1]) / most, 0.0), 1.0) if one else None for one in found]

    return score


def _filled(template: str, sample: Completion) -> str:
    """Fill a template in one pass: what an answer holds in braces stays what it is."""
    fields = {"prompt": sample.prompt_text, "completion": sample.completion, "gold": sample.gold()}
    return re.sub(
        r"\{(prompt|completion|gold)\}",
        lambda match: value if isinstance(value := fields[match[1]], str) else json.dumps(value),
        template,
    )
