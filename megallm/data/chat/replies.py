"""What stands between two turns of the assistant, as token ids. Pure.

A conversation that goes on is never written anew: what follows is its ids so far, and those of the
reply with the words that ask the assistant to speak. Both are found between two renderings of a
short conversation, behind the token that ends a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megallm.base.errors import DataError
from megallm.data.chat.spans import Speaker
from megallm.data.chat.template import Message
from megallm.data.text.tokenizer import Tokenizer

_NAMED = {"type": "function", "function": {"name": "tool", "arguments": {}}}


class ReplyWriter:
    """Writes prompts and replies with the template of `speaker`."""

    def __init__(self, words: Tokenizer, speaker: Speaker) -> None:
        self.words, self.speaker = words, speaker

    def prompt(
        self, messages: Sequence[Message], tools: Any, options: Mapping[str, Any] | None = None
    ) -> str:
        """Returns the text after which the assistant speaks."""
        return self.speaker.prompt(tuple(dict(one) for one in messages), tools, options)

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text with the special tokens that are written in it."""
        return self.words.encode(text, special=True)

    def reply(self, messages: Sequence[Message]) -> str:
        """Returns the text that follows the end of the assistant's turn: messages of tools or of
        the user, and the words that ask the assistant to speak.

        Errors: DataError for a template that does not write them behind the turn.
        """
        role = messages[0]["role"]
        turn: dict[str, Any] = {"role": "assistant", "content": "dummy"}
        if role == "tool":
            called = {"name": messages[0].get("name", "tool"), "arguments": {}}
            turn = {**turn, "content": "", "tool_calls": [_NAMED | {"function": called}]}
        talk = [{"role": "user", "content": "dummy"}, turn]
        renderer = self.speaker.renderer
        cuts = [(2, False), (2 + len(messages), True)]
        before, after = renderer.texts([*talk, *messages], cuts)
        end = max((before.rfind(mark) + len(mark), mark) for mark in self._ends(before))[0]
        if not end or not after.startswith(before[:end]):
            raise DataError(
                f"The chat template writes no reply of the role {role} behind the end of the "
                "assistant's turn, which an answer of several turns needs: use a template for "
                "tools (data.template)."
            )
        said = after[end:]
        if not all(str(one["content"])[:20].strip() in said for one in messages):
            raise DataError(
                f"The chat template leaves out what messages of the role {role} say: use a "
                "template for tools (data.template)."
            )
        return said

    def _ends(self, text: str) -> list[str]:
        return [mark for mark in self.speaker.ends if mark in text] or [""]
