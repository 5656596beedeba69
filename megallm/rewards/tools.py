"""Tools that a model may call: their JSON schemas, and the calls that stand in an answer. Pure."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from megallm.base import suggest
from megallm.base.errors import UsageError
from megallm.rewards.signatures import imported

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARGUMENTS = re.compile(r"^[ \t]*(?:Args|Arguments|Parameters):[ \t]*\n", re.MULTILINE)
_SECTION = re.compile(r"^[ \t]*(?:Returns|Raises|Yields|Examples?):", re.MULTILINE)
_ARGUMENT = re.compile(r"^[ \t]*(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)$")


@dataclass(frozen=True)
class ToolCall:
    """A call that stands in an answer; `error` says why it cannot be made, None where it can."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def message(self) -> dict[str, Any]:
        """Returns the call as OpenAI writes it in a message."""
        named = {"name": self.name, "arguments": dict(self.arguments)}
        return {"type": "function", "function": named}


CallParser = Callable[[str], list[ToolCall]]


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the JSON schema of a tool, from its type hints and its docstring as Google writes
    them (`Args:`); a parameter without a hint may be anything.
    """
    told = inspect.getdoc(function) or ""
    said = _ARGUMENTS.split(told, maxsplit=1)
    hints = typing.get_type_hints(function)
    described = _described(said[1]) if len(said) > 1 else {}
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        properties[name] = _type_schema(hints.get(name, Any))
        if name in described:
            properties[name]["description"] = described[name]
        if parameter.default is parameter.empty:
            required.append(name)
    told = " ".join(_SECTION.split(said[0], maxsplit=1)[0].split())
    parameters = {"type": "object", "properties": properties, "required": required}
    named = {"name": function.__name__, "description": told, "parameters": parameters}
    return {"type": "function", "function": named}


def _described(text: str) -> dict[str, str]:
    """What a docstring says of each argument."""
    found: dict[str, str] = {}
    name = ""
    for line in _SECTION.split(text, maxsplit=1)[0].splitlines():
        match = _ARGUMENT.match(line)
        if match:
            name, found[match[1]] = match[1], match[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}"
    return found


def _type_schema(hint: Any) -> dict[str, Any]:
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        kinds = [_type_schema(part) for part in parts if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if origin is dict or hint is dict:
        return {"type": "object"}
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        items = [part for part in parts if part is not ...]
        return {"type": "array"} | ({"items": _type_schema(items[0])} if items else {})
    return {}


# How models write calls.


def _call(value: Any) -> ToolCall:
    """A call from the object that a model has written."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return ToolCall("", error="the call is no JSON object with the name of a tool")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        return ToolCall(value["name"], error="the arguments of the call are no JSON object")
    return ToolCall(value["name"], dict(arguments))


def hermes(text: str) -> list[ToolCall]:
    """Returns the calls between `<tool_call>` and `</tool_call>` (Hermes, Qwen)."""
    calls = []
    for part in re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL):
        try:
            calls.append(_call(json.loads(part)))
        except (ValueError, RecursionError) as error:
            calls.append(ToolCall("", error=f"the call is no JSON: {str(error)[:120]}"))
    return calls


def llama3(text: str) -> list[ToolCall]:
    """Returns the call of an answer that is a JSON object, or several with semicolons between
    (Llama 3): `{"name": ..., "parameters": {...}}`.
    """
    text = text.strip().removeprefix("<|python_tag|>").strip()
    text = re.sub(r"<\|(eot_id|eom_id|end_of_text)\|>\s*$", "", text)
    calls: list[ToolCall] = []
    while text.startswith("{"):
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError) as error:
            if '"name"' in text:
                calls.append(ToolCall("", error=f"the call is no JSON: {str(error)[:120]}"))
            break
        if not isinstance(value, Mapping) or "name" not in value:
            break  # an answer that is JSON, and no call
        calls.append(_call(value))
        text = text[end:].lstrip(" ;\n")
    return calls


PARSERS: dict[str, CallParser] = {"hermes": hermes, "llama3": llama3}


def parser_of(name: str | None, template: str) -> CallParser:
    """Returns what reads the calls of an answer: a row of `PARSERS`, a function of the user
    (`f(text) -> [{"name": ..., "arguments": {...}}]`), or with None what the chat template writes.

    Errors: UsageError for another name.
    """
    if name is None:
        llama = "<tool_call>" not in template and "ipython" in template
        return llama3 if llama else hermes
    if name in PARSERS:
        return PARSERS[name]
    if ":" not in name:
        raise UsageError(
            f"turns.calls is '{name}'.{suggest.did_you_mean(name, [*PARSERS])} It takes "
            f"{', '.join(PARSERS)}, or file.py:function."
        )
    function = imported(name)

    def parse(text: str) -> list[ToolCall]:
        try:
            return [_call(value) for value in function(text)]
        except Exception as error:  # the boundary of the user's parser
            said = f"{name} failed on the answer: {type(error).__name__}: {error}"
            return [ToolCall("", error=said)]

    return parse


def unknown_tool(name: str, tools: Sequence[str]) -> str:
    """Returns what a model is told that calls a tool which is not there."""
    return f"there is no tool '{name}'; there are: {', '.join(tools) or 'none'}"
