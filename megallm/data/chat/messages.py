"""One conversation: messages as they stand in a data set, checked and brought into one shape. Pure.

A message is {"role", "content", and where it has them "tool_calls", "name", "tool_call_id",
"reasoning_content", ..., "loss"}, with a role of `ROLES`; tool calls have OpenAI's shape with their
arguments as an object, which is what templates expect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from megallm.data.text.readers import is_utf8, type_name

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "function": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # ShareGPT's and ms-swift's roles of a call
_WRITTEN = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"')  # messages in a cell of CSV
LOSS = "loss"  # of a message: whether it may be trained; no template sees it

Messages = tuple[dict[str, Any], ...]


class BadRow(Exception):
    """This row cannot be used; the text is the reason, a clause without a full stop."""


def parsed(value: Any, what: str) -> Any:
    """Returns a value that some files (CSV, Arrow) keep as JSON text, else the value itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} looks like JSON but is none: {str(error)[:120]}") from None


def text_of(value: Any, what: str) -> str:
    """Returns a text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise BadRow(f"{what} is a {type_name(value)}, want a string")
    if not is_utf8(value):
        raise BadRow(f"{what} holds a lone surrogate, which UTF-8 cannot hold")
    return value


def messages_of(value: Any, what: str) -> Messages:
    """Returns a list of messages (or JSON text of one), checked."""
    value = parsed(value, what)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"{what} is a {type_name(value)}, want a list of messages")
    if not value:
        raise BadRow(f"{what} is an empty list, want messages")
    return tuple(_message(item, f"{what}[{number}]") for number, item in enumerate(value))


def is_messages(value: Any) -> bool:
    """Returns whether a column's value is meant as messages and not as a plain text."""
    if isinstance(value, str):  # an answer may be JSON, but hardly of this
        return _WRITTEN.match(value) is not None
    return isinstance(value, (list, tuple, Mapping))


def _message(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"{what} is a {type_name(value)}, want an object with role and content")
    found = {key: item for key, item in value.items() if item is not None}
    said = found.pop("from", found.get("role"))
    if said is None:
        raise BadRow(f"{what} has no role; it has {', '.join(found) or 'nothing'}")
    role = _ALIASES.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        raise BadRow(f"{what} has the role {str(said)[:40]!r}; accepted: {', '.join(ROLES)}")
    content = found.pop("value", found.pop("content", None))
    message: dict[str, Any] = {"role": role, "content": ""}
    if said in _CALLS:
        message["tool_calls"] = _calls(content, what)
    elif content is not None:
        message["content"] = _content(content, f"{what}.content")
    if found.get("tool_calls"):
        message["tool_calls"] = _calls(found["tool_calls"], f"{what}.tool_calls")
    if role == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
        raise BadRow(f"{what} is an answer of the assistant without any text or tool call")
    loss = _loss(found, what)
    if loss is not None:
        message[LOSS] = loss
    rest = found.keys() - {"role", "content", "tool_calls", "loss", "loss_scale"}
    return message | {key: found[key] for key in found if key in rest}


def _content(value: Any, what: str) -> str:
    """A text, or parts of texts joined."""
    if isinstance(value, (list, tuple)):
        parts = []
        for part in value:
            if isinstance(part, Mapping) and part.get("type", "text") != "text":
                raise BadRow(
                    f"{what} has a part of type {str(part['type'])[:40]!r}, only text is read"
                )
            parts.append(text_of(part.get("text") if isinstance(part, Mapping) else part, what))
        return "".join(parts)
    return text_of(value, what)


def _calls(value: Any, what: str) -> list[dict[str, Any]]:
    value = parsed(value, what)
    calls = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        one = parsed(one, what)
        body = one.get("function", one) if isinstance(one, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise BadRow(f"{what} has a tool call without the name of a function")
        arguments = body.get("arguments", body.get("parameters", {}))
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # what is no JSON stays a text
                arguments = json.loads(arguments)
        kept = {key: one[key] for key in ("id", "type") if isinstance(one.get(key), str)}
        calls.append(
            {"type": "function", **kept, "function": {"name": body["name"], "arguments": arguments}}
        )
    if not calls:
        raise BadRow(f"{what} holds no tool call")
    return calls


def _loss(found: Mapping[str, Any], what: str) -> bool | None:
    """ms-swift's `loss` (yes or no) and `loss_scale`, of which 0 and 1 are read."""
    for key in ("loss", "loss_scale"):
        value = found.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise BadRow(f"{what} has {key} {str(value)[:40]!r}; accepted: true, false, 0, 1")
    return None


def tools_of(value: Any) -> list[Any] | None:
    """Returns the tools of a conversation: a list of JSON schemas, or JSON text of it."""
    value = parsed(value, "tools")
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"tools is a {type_name(value)}, want a list of JSON schemas")
    tools = [parsed(tool, "tools") for tool in value]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools holds something else than JSON schemas")
    return tools


def options_of(value: Any) -> dict[str, Any]:
    """Returns `chat_template_kwargs` of a row: further variables of its template."""
    value = parsed(value, "chat_template_kwargs")
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(f"chat_template_kwargs is a {type_name(value)}, want an object")
    return {key: item for key, item in value.items() if item is not None}


def template_messages(messages: Messages) -> list[dict[str, Any]]:
    """Returns the messages as a template sees them."""
    return [{key: item for key, item in one.items() if key != LOSS} for one in messages]
