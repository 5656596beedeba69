"""Chat templates: which one a model has, and a conversation as the text that the model continues.
No torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megallm.base.errors import DataError
from megallm.convert.folder import read_json
from megallm.convert.tokenizer_files import MAX_TOKENIZER_BYTES
from megallm.data.text.tokenizer_folder import DEFINITION, SETTINGS, SPECIALS, extra_chat_templates

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": "..."}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_STOPS = ("<|im_end|>", "<|im_start|>")
MAX_TEMPLATE = 1 << 20  # bytes
WALL_SECONDS = 30.0
_CHILD = Path(__file__).with_name("template_child.py")
_JOINER = "\N{ZERO WIDTH SPACE}"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, where it came from, the texts that it may use, and texts that end an answer
    beside the ids.

    `specials` are the written forms of the tokenizer's special tokens; in what a person wrote they
    are broken up, so that a message cannot end itself or speak for the system.
    """

    source: str = CHATML
    origin: str = "the built-in ChatML template (the model's folder has none)"
    tokens: Mapping[str, str] = field(default_factory=dict)
    specials: tuple[str, ...] = ()
    stops: tuple[str, ...] = CHATML_STOPS

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the assistant begins to speak.

        Errors: DataError when the template fails, refuses the conversation, or needs too much time
        or memory.
        """
        safe = [
            dict(message) | {"content": self._defused(message["content"])} for message in messages
        ]
        variables = {
            "messages": safe,
            "add_generation_prompt": add_generation_prompt,
            **self.tokens,
        }
        job = json.dumps({"template": self.source, "variables": variables})
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_CHILD)], input=job, capture_output=True, text=True, encoding="utf-8",
                timeout=WALL_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{self._name} did not finish within {WALL_SECONDS:g} s.") from error
        if done.returncode < 0 or not done.stdout:
            ended = (
                f"signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip()[-200:]
            )
            raise DataError(f"{self._name} was ended ({ended}): it needs too much time or memory.")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise DataError(f"{self._name} refuses this conversation: {answer['error']}.")
        return answer["text"]

    @property
    def _name(self) -> str:
        return f"The chat template of {self.origin}"

    def _defused(self, text: str) -> str:
        for special in self.specials:
            text = text.replace(special, special[:1] + _JOINER + special[1:])
        return text


def find_template(folder: Path | None, special_texts: Iterable[str] = ()) -> ChatTemplate:
    """The template in a tokenizer's folder, else ChatML. Errors: DataError for one that cannot be
    read.

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
    return ChatTemplate(found, str(folder), tokens, specials, ())


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
    if not (folder / DEFINITION).is_file():
        return set()
    rows = read_json(folder / DEFINITION, MAX_TOKENIZER_BYTES).get("added_tokens")
    texts = {
        row.get("content") for row in rows or [] if isinstance(row, dict) and row.get("special")
    }
    return {text for text in texts if isinstance(text, str)}


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted((text for text in texts if len(text) > 1), key=len, reverse=True))


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
