"""Which kind of rows a file holds, found by its columns, and each row as an `Example`. Pure.

The names of columns are those of TRL, LLaMA-Factory (Alpaca, ShareGPT), ms-swift, verl and
reasoning-gym.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from megallm.base.errors import DataError
from megallm.data.chat.messages import (
    BadRow,
    Messages,
    is_messages,
    messages_of,
    options_of,
    parsed,
    text_of,
    tools_of,
)

_LARGEST = 1e38  # of numbers of rows, which are kept and computed with in 32 bits

RowKind = Literal[
    "sft", "preference", "reward", "ranked", "unpaired", "scored", "prompts", "classification",
    "regression",
]  # fmt: skip
PAIRED = ("preference", "reward")
LABELLED = ("classification", "regression")
_PROMPTS = (
    "prompt",
    "instruction",
    "question",
    "messages",
    "conversations",
)  # beside chosen, rejected
Talk = str | Messages  # a plain text, or messages


@dataclass(frozen=True)
class Example:
    """A prompt and the answers to it: one to learn, two of a pair (chosen, rejected), several with
    their `ranks` (0 the best; equal answers have the same), or none.

    A whole conversation, or a text, is an answer to the empty prompt.
    """

    prompt: Talk
    answers: tuple[Talk, ...] = ()
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    margin: float = 0.0
    label: float | None = None
    ranks: tuple[int, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowReading:
    """How rows become examples: `strings` plain or messages, `pairs` of several completions; the
    text `condition` is put before the prompts of scored rows, whose rewards `edges` divide.
    """

    kind: RowKind
    strings: str = "plain"
    pairs: str = "best_worst"
    condition: str = ""
    edges: tuple[float, ...] = ()


RawRow = Mapping[str, Any]
Builder = Callable[[RawRow], list[Example]]


@dataclass(frozen=True)
class RowFormat:
    """Rows that have all columns `needed` (of alternatives a|b one); `natural` says what they
    hold.
    """

    name: str
    needed: tuple[str, ...]
    natural: Literal["conversation", "pair", "several", "prompt"]
    build: Builder

    def missing(self, row: RawRow) -> list[str]:
        """Returns the needed columns that a row does not have, or has empty."""
        return [
            names
            for names in self.needed
            if all(row.get(name) is None for name in names.split("|"))
        ]


def _first(row: RawRow, *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _talk(value: Any, what: str) -> Talk:
    return messages_of(value, what) if is_messages(value) else text_of(value, what)


def _answer(value: Any, what: str) -> Talk:
    """An answer to a prompt: messages with a word of the assistant, or a text that is not empty."""
    found = _talk(value, what)
    if isinstance(found, str):
        if not found.strip():
            raise BadRow(f"{what} is empty")
    elif not any(message["role"] == "assistant" for message in found):
        raise BadRow(f"{what} has no message of the assistant, so there is nothing to learn")
    return found


def _system(row: RawRow) -> Messages:
    system = row.get("system")
    text = "" if system is None else text_of(system, "system")
    return ({"role": "system", "content": text},) if text else ()


def _messages(row: RawRow) -> list[Example]:
    name = next(
        key for key in ("messages", "conversations", "conversation") if row.get(key) is not None
    )
    return [Example((), (_system(row) + messages_of(row[name], name),))]


def _text(row: RawRow) -> list[Example]:
    return [Example("", (_answer(row["text"], "text"),))]


def _prompt_completion(row: RawRow) -> list[Example]:
    name = "completion" if row.get("completion") is not None else "response"
    return [Example(_talk(row["prompt"], "prompt"), (_answer(row[name], name),))]


def _instruction(row: RawRow) -> Messages:
    history: list[dict[str, Any]] = []
    for turn in row.get("history") or ():
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise BadRow("history must hold pairs of a question and its answer")
        for role, said in zip(("user", "assistant"), turn, strict=True):
            history.append({"role": role, "content": text_of(said, "history")})
    asked = text_of(row["instruction"], "instruction")
    more = row.get("input")
    more = "" if more is None else text_of(more, "input")
    asked = f"{asked}\n{more}" if more and asked else asked or more
    return (*_system(row), *history, {"role": "user", "content": asked})


def _spoken(value: Any, what: str) -> Messages:
    """An answer as messages, also where it is a text."""
    found = _answer(value, what)
    return ({"role": "assistant", "content": found},) if isinstance(found, str) else found


def _alpaca(row: RawRow) -> list[Example]:
    return [Example((), (_instruction(row) + _spoken(row["output"], "output"),))]


def _alpaca_prompt(row: RawRow) -> list[Example]:
    return [Example(_instruction(row))]


def _question(row: RawRow) -> list[Example]:
    asked = (*_system(row), {"role": "user", "content": text_of(row["question"], "question")})
    return [Example((), (asked + _spoken(row["answer"], "answer"),))]


def _pair(row: RawRow) -> list[Example]:
    """Explicit prompt, or the beginning that both conversations have in common."""
    name = next((key for key in _PROMPTS if row.get(key) is not None), None)
    chosen, rejected = (_answer(row[key], key) for key in ("chosen", "rejected"))
    if name is None:
        return [Example(*_divided(chosen, rejected))]
    if name == "instruction":
        prompt: Talk = _instruction(row)
    elif name in ("messages", "conversations"):
        prompt = _system(row) + messages_of(row[name], name)
    else:
        prompt = _talk(row[name], name)
    if isinstance(prompt, str):
        prompt = _said_again(prompt, chosen, rejected) or prompt
    if not isinstance(prompt, str):  # the answers may still begin with it
        size = len(prompt)
        chosen, rejected = (
            talk[size:] if not isinstance(talk, str) and talk[:size] == prompt else talk
            for talk in (_spoken(chosen, "chosen"), _spoken(rejected, "rejected"))
        )
    return [Example(prompt, (chosen, rejected))]


def _said_again(prompt: str, chosen: Talk, rejected: Talk) -> Messages:
    """The messages with which both answers begin, up to the user's that is the prompt, perhaps
    after the system's (as in UltraFeedback); empty where they do not.
    """
    if isinstance(chosen, str) or isinstance(rejected, str):
        return ()
    size = 2 if chosen[0]["role"] == "system" else 1
    asked = chosen[:size]
    same = asked == rejected[:size] and asked[-1]["role"] == "user"
    return asked if same and asked[-1]["content"] == prompt else ()


def _divided(chosen: Talk, rejected: Talk) -> tuple[Talk, tuple[Talk, Talk]]:
    """(common beginning, what is left of both)."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected are not alike: one is a text, one messages")
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    if isinstance(chosen, str):
        size -= size > 0 and chosen[size - 1] == " "  # a space belongs to the word after it
    else:  # what comes last is an answer, also where both are the same
        size = min(size, len(chosen) - 1, len(rejected) - 1)
    if not size:
        raise BadRow("chosen and rejected have no common beginning, which would be their prompt")
    left = chosen[size:], rejected[size:]
    for name, talk in zip(("chosen", "rejected"), left, strict=True):
        said = (
            talk.strip()
            if isinstance(talk, str)
            else [one for one in talk if one["role"] == "assistant"]
        )
        if not said:
            raise BadRow(f"nothing of the assistant is left of {name} after the common beginning")
    return chosen[:size], left


def _swift_pair(row: RawRow) -> list[Example]:
    """ms-swift: messages are chosen; the last answer, or all messages, of the rejected ones."""
    chosen = _system(row) + messages_of(row["messages"], "messages")
    if row.get("rejected_messages") is not None:
        rejected = _system(row) + messages_of(row["rejected_messages"], "rejected_messages")
    else:
        rejected = chosen[:-1] + _spoken(row["rejected_response"], "rejected_response")
    if chosen[-1]["role"] != "assistant":
        raise BadRow("the last of messages is not the assistant's, so nothing is chosen")
    return [Example(*_divided(chosen, rejected))]


def _several(row: RawRow) -> list[Example]:
    """Several answers with scores (or ranks, 1 the best); `fitted` makes pairs of them."""
    answers = parsed(row["completions"], "completions")
    scores = parsed(_first(row, "scores", "rewards", "labels", "ranks"), "scores")
    if not isinstance(answers, (list, tuple)) or not isinstance(scores, (list, tuple)):
        raise BadRow("several completions need scores, rewards, labels or ranks: a list of numbers")
    if len(answers) != len(scores) or len(answers) < 2:
        raise BadRow(
            f"{len(answers)} completions with {len(scores)} scores; want as many, at least 2"
        )
    prompt = _talk(row["prompt"], "prompt")
    made = [Example(prompt, (_answer(one, f"completions[{i}]"),)) for i, one in enumerate(answers)]
    sign = 1 if _first(row, "scores", "rewards", "labels") is not None else -1  # rank 1 is the best
    found = [
        sign * number_of(float(one) if isinstance(one, bool) else one, "scores") for one in scores
    ]
    return [replace(one, label=score) for one, score in zip(made, found, strict=True)]


def _prompt(row: RawRow) -> list[Example]:
    return [Example(_talk(row["prompt"], "prompt"))]


FORMATS = (
    RowFormat("several completions", ("prompt", "completions"), "several", _several),
    RowFormat("preference", ("chosen", "rejected"), "pair", _pair),
    RowFormat("ms-swift preference", ("messages", "rejected_messages|rejected_response"), "pair", _swift_pair),
    RowFormat("messages", ("messages|conversation",), "conversation", _messages),
    RowFormat("ShareGPT", ("conversations",), "conversation", _messages),
    RowFormat("prompt-completion", ("prompt", "completion|response"), "conversation", _prompt_completion),
    RowFormat("verl", ("prompt", "reward_model"), "prompt", _prompt),
    RowFormat("prompt-only", ("prompt",), "prompt", _prompt),
    RowFormat("Alpaca", ("instruction", "output"), "conversation", _alpaca),
    RowFormat("Alpaca prompts", ("instruction",), "prompt", _alpaca_prompt),
    RowFormat("question-answer", ("question", "answer"), "conversation", _question),
    RowFormat("text", ("text",), "conversation", _text),
)  # fmt: skip
_ACCEPTED: dict[str, tuple[str, ...]] = {
    "sft": ("conversation",), "preference": ("pair", "several"), "reward": ("pair", "several"),
    "ranked": ("pair", "several"),
    "unpaired": ("conversation", "pair"), "scored": ("conversation", "several"), "prompts": ("prompt", "conversation"),
    "classification": ("conversation", "prompt"), "regression": ("conversation", "prompt"),
}  # fmt: skip


def detect_format(name: str, row: RawRow, kind: RowKind) -> tuple[RowFormat, str]:
    """Returns the format of the rows of file `name`, whose first is `row`, and a line that says so.

    Errors: DataError when the columns are none that we know, or hold nothing of this kind.
    """
    has = ", ".join(list(row)[:12])
    found = next((form for form in FORMATS if not form.missing(row)), None)
    if found is None:
        known = "; ".join(f"{form.name} ({', '.join(form.needed)})" for form in FORMATS)
        raise DataError(
            f"{name}: the columns {has} are of no kind of rows that is known. Known: {known}."
        )
    label = ""
    if kind in ("unpaired", "scored", *LABELLED) and found.natural not in ("pair", "several"):
        label = "reward" if kind == "scored" else "label"
    if found.natural not in _ACCEPTED[kind] or (label and row.get(label) is None):
        more = f" and {label}" if label else ""
        wanted = "; ".join(
            f"{form.name} ({', '.join(form.needed)}{more})"
            for form in FORMATS
            if form.natural in _ACCEPTED[kind]
        )
        raise DataError(
            f"{name} holds {found.name} rows (columns {has}), but {kind} rows are needed: {wanted}."
        )
    used = [key for names in found.needed for key in names.split("|") if row.get(key) is not None]
    prompt = ""
    if found.name == "preference":
        explicit = _first(row, *_PROMPTS) is not None
        prompt = " with explicit prompt" if explicit else " with implicit prompt"
    used += [key for key in ("label", "reward", "margin", "tools") if row.get(key) is not None]
    return found, f"{name}: {found.name} rows{prompt} (columns {', '.join(used)})"


def number_of(value: Any, what: str) -> float:
    """Returns a number that 32 bits hold, also where CSV keeps it as text."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not abs(value) <= _LARGEST:
        raise BadRow(f"{what} is {str(value)[:40]!r}, want a number (at most {_LARGEST:.0e})")
    return float(value)


def _label(value: Any, kind: RowKind) -> float:
    if kind == "unpaired":
        known = {"true": True, "1": True, "false": False, "0": False}
        found = known.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(found, bool) and found not in (0, 1):
            raise BadRow(f"label is {str(value)[:40]!r}, want true (good) or false (bad)")
        return float(found)
    found = number_of(value, "label")
    if kind == "classification" and (found < 0 or found != int(found)):
        raise BadRow(f"label is {found:g}, want the number of a class, from 0")
    return found


def _check_columns(form: RowFormat, row: RawRow) -> None:
    lost = form.missing(row)
    if lost:
        raise BadRow(
            f"the column {' and '.join(lost)} is missing or null; the rows of this file are "
            f"{form.name} rows, "
            f"this one has {', '.join(list(row)[:12]) or 'none'}"
        )


def examples(form: RowFormat, row: RawRow, reading: RowReading) -> list[Example]:
    """Returns the examples of a row. Errors: BadRow."""
    _check_columns(form, row)
    made = _fitted(form, form.build(row), reading, row)
    if reading.condition:
        made = [_conditioned(one, reading) for one in made]
    common: dict[str, Any] = {}
    if row.get("margin") is not None:
        common["margin"] = number_of(row["margin"], "margin")
    if reading.kind == "prompts":
        common["columns"] = json.loads(json.dumps(row, default=str))
    return _spoken_alike([replace(one, **common) for one in made], row, reading.strings)


def answers_of(form: RowFormat, row: RawRow, strings: str = "plain") -> list[Example]:
    """Returns every answer of a row, in the row's order, as an example of its own: two of a pair.
    Errors: BadRow.
    """
    _check_columns(form, row)
    if form.natural == "several":  # which need no scores here
        row = {**row, "scores": [0.0] * len(parsed(row["completions"], "completions"))}
    made = [replace(one, answers=(answer,)) for one in form.build(row) for answer in one.answers]
    if not made:
        raise BadRow("the row has a prompt and no answer to it")
    return _spoken_alike(made, row, strings)


def _spoken_alike(made: Iterable[Example], row: RawRow, strings: str) -> list[Example]:
    """The examples with the row's tools, prompts and answers both texts or both messages."""
    common = {
        "tools": tools_of(row.get("tools")),
        "options": options_of(row.get("chat_template_kwargs")),
    }
    made = [replace(one, **common) for one in made]
    return [*map(_as_messages, made)] if strings == "messages" else [*map(_alike, made)]


def _fitted(
    form: RowFormat, made: list[Example], reading: RowReading, row: RawRow
) -> list[Example]:
    """The examples as the kind of reading needs them."""
    kind, natural = reading.kind, form.natural
    if natural == "several" and kind == "scored":
        return made
    if natural == "several":
        return _ranked(made) if kind == "ranked" else _pairs(made, reading.pairs)
    if kind == "ranked":
        return [replace(one, ranks=(0, 1)) for one in made]
    if kind == "prompts":
        return [_asked(one) for one in made]
    if kind == "unpaired" and natural == "pair":
        return [
            replace(one, answers=(answer,), label=label)
            for one in made
            for answer, label in zip(one.answers, (1.0, 0.0), strict=True)
        ]
    if kind in ("sft", "unpaired", "scored") and natural == "conversation":
        for one in made:
            if not isinstance(one.answers[0], str) and not _speaks(one.answers[0]):
                raise BadRow("the conversation has no message of the assistant: nothing to learn")
    if kind == "scored":
        if row.get("reward") is None:
            raise BadRow("the column reward is missing or null")
        reward = number_of(row["reward"], "reward")
        return [replace(one, label=reward, **_last_answer(one)) for one in made]
    if kind in ("unpaired", *LABELLED):
        if row.get("label") is None:
            raise BadRow("the column label is missing or null")
        made = [replace(one, label=_label(row["label"], kind)) for one in made]
        if kind == "unpaired":
            made = [replace(one, **_last_answer(one)) for one in made]
    return made


def _conditioned(one: Example, reading: RowReading) -> Example:
    """The example whose prompt begins with the reward of the answer, or the bucket it falls in."""
    bucket = str(bisect_right(reading.edges, one.label))
    said = reading.condition.replace("{bucket}", bucket).replace("{reward}", f"{one.label:g}")
    if isinstance(one.prompt, str):
        return replace(one, prompt=said + one.prompt)
    place = next((i for i, talk in enumerate(one.prompt) if talk["role"] == "user"), None)
    if place is None or not isinstance(one.prompt[place]["content"], str):
        raise BadRow("the prompt has no text of the user, which data.condition could begin")
    asked = one.prompt[place] | {"content": said + one.prompt[place]["content"]}
    return replace(one, prompt=(*one.prompt[:place], asked, *one.prompt[place + 1 :]))


def _speaks(messages: Iterable[Mapping[str, Any]]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _last_answer(one: Example) -> dict[str, Any]:
    """A whole conversation as its last answer to all that came before."""
    said = one.answers[0]
    if one.prompt or isinstance(said, str):
        return {}
    if said[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with the assistant, so the label is of nothing")
    return {"prompt": said[:-1], "answers": (said[-1:],)}


def _asked(one: Example) -> Example:
    """A conversation up to its last answer, or a prompt as it stands."""
    prompt = one.prompt
    if not prompt and one.answers:
        said = one.answers[0]
        if isinstance(said, str):
            raise BadRow("a text has no prompt")
        last = max(
            (i for i, message in enumerate(said) if message["role"] == "assistant"),
            default=len(said),
        )
        prompt = said[:last]
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise BadRow("the prompt is empty")
    return replace(one, prompt=prompt, answers=())


def _pairs(made: list[Example], which: str) -> list[Example]:
    """Pairs of the better and the worse of several answers: all with different scores, or the best
    and the worst.
    """
    ranked = _sorted(made)
    couples = [(a, b) for a, b in combinations(ranked, 2) if a.label > b.label]
    if which == "best_worst":
        couples = [(ranked[0], ranked[-1])]
    return [Example(a.prompt, (a.answers[0], b.answers[0])) for a, b in couples]


def _ranked(made: list[Example]) -> list[Example]:
    """One example with all answers, the best first."""
    ranked = _sorted(made)
    scores = sorted({one.label for one in ranked}, reverse=True)
    ranks = tuple(scores.index(one.label) for one in ranked)
    return [Example(ranked[0].prompt, tuple(one.answers[0] for one in ranked), ranks=ranks)]


def _sorted(made: list[Example]) -> list[Example]:
    ranked = sorted(made, key=lambda one: -one.label)
    if ranked[0].label == ranked[-1].label:
        raise BadRow("all completions have the same score, so none is better than another")
    return ranked


def _alike(one: Example) -> Example:
    """A prompt of messages whose answers are texts has messages for answers too."""
    talks = (one.prompt, *one.answers)
    if one.answers and len({isinstance(talk, str) for talk in talks}) > 1:
        if isinstance(one.prompt, str) and one.prompt == "":
            return one
        return _as_messages(one)
    return one


def _as_messages(one: Example) -> Example:
    prompt, answers = one.prompt, one.answers
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},) if prompt else ()
        if not prompt and answers and isinstance(answers[0], str):
            return one  # a text, which is nobody's answer
    said = tuple(
        ({"role": "assistant", "content": talk},) if isinstance(talk, str) else talk
        for talk in answers
    )
    return replace(one, prompt=prompt, answers=said)
