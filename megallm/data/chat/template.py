"""Chat templates: which one a tokenizer has, and conversations as the text that a model continues.
Pure.

A template is rendered in a child process with limits (`template_child`); `Renderer` keeps one child
for any number of conversations.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megallm.base.errors import DataError
from megallm.data.text.tokenizer_folder import (
    DEFINITION,
    SETTINGS,
    SPECIALS,
    extra_chat_templates,
    read_optional_json,
)

Message = Mapping[str, Any]  # {"role": ..., "content": "...", "tool_calls": [...], ...}
MessagePrefix = tuple[int, bool]  # so many messages, and whether the assistant is to speak next

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_STOPS = ("<|im_end|>", "<|im_start|>")
MAX_TEMPLATE = 1 << 20  # bytes
WALL_SECONDS = 30.0  # of a conversation
_CHILD = Path(__file__).with_name("template_child.py")
_JOINER = "\N{ZERO WIDTH SPACE}"
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, where it came from, the texts that it may use, and texts that end an answer
    beside the ids.

    `specials` are the written forms of the tokenizer's special tokens; in what a person wrote they
    are broken up, so that a message cannot end itself or speak for the system. `built_in` says that
    the tokenizer has no template of its own.
    """

    source: str = CHATML
    origin: str = "the built-in ChatML template (the model's folder has none)"
    tokens: Mapping[str, str] = field(default_factory=dict)
    specials: tuple[str, ...] = ()
    stops: tuple[str, ...] = CHATML_STOPS
    built_in: bool = True

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Returns the conversation as text, up to where the assistant begins to speak.

        Errors: DataError when the template fails, refuses the conversation, or needs too much time
        or memory.
        """
        with Renderer(self) as renderer:
            return renderer.texts(messages, [(len(messages), add_generation_prompt)])[0]

    def defused(self, value: Any) -> Any:
        """Returns the same value with the special tokens in all of its texts broken up."""
        if isinstance(value, str):
            for special in self.specials:
                value = value.replace(special, special[:1] + _JOINER + special[1:])
            return value
        if isinstance(value, Mapping):
            return {key: self.defused(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.defused(item) for item in value]
        return value


class Renderer:
    """One child process that renders conversations with one template; a context manager.

    `date` is what a template's `strftime_now` says (YYYY-MM-DD), None for the clock. A conversation
    at which the child ended is a DataError, and the next one gets a new child.
    """

    def __init__(self, template: ChatTemplate, date: str | None = None) -> None:
        self.template, self.date = template, date
        self._child: subprocess.Popen[bytes] | None = None
        self._held = b""

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def texts(
        self,
        messages: Sequence[Message],
        cuts: Sequence[MessagePrefix],
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Returns the text of the first n messages for each cut (n, whether the assistant is to
        speak next).

        `options` are further variables of the template (`chat_template_kwargs`). Errors: DataError.
        """
        safe = [{**self.template.defused(message), "role": message["role"]} for message in messages]
        variables = {
            **self.template.tokens, "tools": self.template.defused(tools), "documents": None,
            **(options or {}), "messages": safe,
        }  # fmt: skip
        return self._ask({"variables": variables, "cuts": list(cuts)})["texts"]

    @property
    def alive(self) -> bool:
        """Whether a child waits for the next conversation."""
        return self._child is not None

    def close(self) -> None:
        """End the child; safe to call twice."""
        child, self._child, self._held = self._child, None, b""
        if child is not None:
            child.kill()
            with suppress(OSError):  # what was not written yet is nobody's any more
                child.stdin.close()
            child.stdout.close()
            child.wait()

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            os.set_blocking(self._child.stdin.fileno(), False)
            self._checked({"template": self.template.source, "date": self.date})
        return self._checked(job)

    def _checked(self, job: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._exchange((json.dumps(job) + "\n").encode())
        if "error" in answer:
            if self._child is not None and "template" in job:
                self.close()  # it holds no template, and would take the next job for one
            raise DataError(f"{self._name} refuses this conversation: {answer['error']}.")
        return answer

    def _exchange(self, data: bytes) -> dict[str, Any]:
        """One line to the child, and one back; both pipes at once, so that neither waits for the
        other.
        """
        child, until = self._child, time.monotonic() + WALL_SECONDS
        begin, parts = 0, [self._held]
        while b"\n" not in parts[-1]:
            left = until - time.monotonic()
            writing = [child.stdin] if begin < len(data) else []
            readable, writable, _ = select.select([child.stdout], writing, [], max(left, 0))
            if left <= 0:
                self.close()
                raise DataError(f"{self._name} did not finish within {WALL_SECONDS:g} s.")
            if writable:
                with suppress(BrokenPipeError, BlockingIOError):
                    begin += os.write(child.stdin.fileno(), data[begin : begin + _READ_BYTES])
            if readable:
                parts.append(os.read(child.stdout.fileno(), _READ_BYTES))
                if not parts[-1]:
                    raise self._ended()
        line, _, self._held = b"".join(parts).partition(b"\n")
        return json.loads(line)

    def _ended(self) -> DataError:
        code = self._child.wait()
        self.close()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return DataError(f"{self._name} was ended ({how}): it needs too much time or memory.")

    @property
    def _name(self) -> str:
        return f"The chat template of {self.template.origin}"


def find_template(folder: Path | None, special_texts: Iterable[str] = ()) -> ChatTemplate:
    """Returns the template in a tokenizer's folder, else ChatML. Errors: DataError for one that
    cannot be read.

    `special_texts` are written forms of special tokens beside those of the folder's tokenizer.json.
    """
    if folder is None or not folder.is_dir():
        return ChatTemplate()
    settings = _json(folder / SETTINGS)
    tokens = {key: text for key, text in _tokens(folder, settings).items() if text}
    specials = _longest_first({*_specials(folder), *special_texts})
    found = _source(folder, settings)
    if found is None:
        return ChatTemplate(tokens=tokens, specials=tuple(sorted({*specials, *CHATML_STOPS})))
    if len(found.encode()) > MAX_TEMPLATE:
        raise DataError(
            f"The chat template of {folder} is larger than {MAX_TEMPLATE} bytes; none is."
        )
    stops = CHATML_STOPS if found == CHATML else ()
    specials = tuple(sorted({*specials, *stops})) if stops else specials
    return ChatTemplate(found, str(folder), tokens, specials, stops, built_in=False)


def _source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json or of chat_template.json.

    Of several with names it is `default`, or the only one. Errors: DataError when none of several
    is.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    value = settings.get("chat_template") or _json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    named = {path.stem: _read(path) for path in extra_chat_templates(folder)}
    named |= value if isinstance(value, dict) else {}
    found = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    if (value is not None and not isinstance(value, dict)) or (
        found is not None and not isinstance(found, str)
    ):
        raise DataError(f"{folder / SETTINGS} has a chat_template that is no text.")
    if named and found is None:
        names = ", ".join(sorted(map(str, named)))
        raise DataError(
            f"{folder} has the chat templates {names}, of which none is the default: call the one "
            f"to use `default` where chat_template lists them, or save it as {path.name}."
        )
    return found


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_TEMPLATE + 1).decode("utf-8", errors="replace")


def _tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... as texts, for templates that write them."""
    found: dict[str, str] = {}
    for source in (_json(folder / SPECIALS), settings):
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = source.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def _specials(folder: Path) -> set[str]:
    """Written forms of the special tokens of the folder's tokenizer.json."""
    rows = (read_optional_json(folder / DEFINITION) or {}).get("added_tokens")
    texts = {
        row.get("content") for row in rows or [] if isinstance(row, dict) and row.get("special")
    }
    return {text for text in texts if isinstance(text, str)}


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted((text for text in texts if len(text) > 1), key=len, reverse=True))


def _json(path: Path) -> dict[str, Any]:
    return read_optional_json(path) or {}
