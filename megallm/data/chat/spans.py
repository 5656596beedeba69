"""Which characters of a rendered conversation are trained, by rendering its beginnings. Pure.

Stock templates do not mark the assistant's words, so each turn is found between two renderings: of
what comes before it, with the words that ask the assistant to speak, and of what comes before it
and the turn itself. The end of the turn, the token after which a model stops, is trained too.

Some templates write a turn otherwise when others follow it (Qwen3 drops the thinking of past
answers). A turn that the whole conversation does not hold as it was said is trained in a text of
its own, which ends with it: one conversation then makes several rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megallm.base.errors import DataError
from megallm.data.chat.messages import LOSS, BadRow, Messages, template_messages
from megallm.data.chat.template import Renderer

MAX_FAILURES = 3  # conversations at which a template may be ended

CharSpan = tuple[int, int]  # characters [begin, end)


@dataclass(frozen=True)
class Passage:
    """A text, and the spans of it that are trained, ascending; `special`: written special tokens
    become their ids.
    """

    text: str
    spans: tuple[CharSpan, ...]


class Speaker:
    """Renders conversations and finds the assistant's turns in them.

    `ends` are the written forms of tokens that may end a turn: the tokenizer's special tokens and
    the template's stop texts.
    """

    def __init__(self, renderer: Renderer, ends: Sequence[str]) -> None:
        self.renderer = renderer
        self.ends = tuple(sorted({end for end in ends if end.strip()}, key=len, reverse=True))
        self._failures = 0

    def prompt(
        self, messages: Messages, tools: Any = None, options: Mapping[str, Any] | None = None
    ) -> str:
        """Returns the text after which the assistant speaks."""
        return self._texts(messages, [(len(messages), True)], tools, options)[0]

    def passages(
        self,
        messages: Messages,
        first: int,
        train_on: str,
        tools: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Passage]:
        """Returns the texts that train the assistant's turns from message `first` on; most often
        one.

        train_on: "assistant_only" all of these turns, "completion_only" the last of them when
        `first` is 0 (a conversation without a prompt of its own), "all" every character. A message
        may say by its `loss` that it is not trained. Errors: BadRow.
        """
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if train_on == "completion_only" and not first:
            turns = turns[-1:]
        wanted = [i for i in turns if messages[i].get(LOSS, True)]
        whole = (len(messages), False)
        if train_on == "all" and len(wanted) == len(turns):
            text = self._texts(messages, [whole], tools, options)[0]
            return [Passage(text, ((0, len(text)),))]
        looked_at = turns if train_on == "all" else wanted
        cuts = [cut for i in looked_at for cut in ((i, True), (i + 1, False))]
        texts = self._texts(messages, [*cuts, whole], tools, options)
        said = {i: (texts[2 * n], texts[2 * n + 1]) for n, i in enumerate(looked_at)}
        for i, (before, after) in said.items():
            self._check(before, after, i, bool(messages[i].get("tool_calls")))
        if train_on == "all":
            return [self._all_but(texts[-1], [said[i] for i in turns if i not in wanted])]
        if not wanted:
            raise BadRow("nothing of this conversation is to be trained")
        return self._covering(texts[-1], said)

    def _covering(self, whole: str, said: Mapping[int, tuple[str, str]]) -> list[Passage]:
        """Passages that hold every turn as it was said: the whole text, then those of the turns
        that it does not hold, the later first.
        """
        left, made = dict(said), []
        for text in [whole, *(said[i][1] for i in sorted(said, reverse=True))]:
            spans = {i: self._span(text, *both) for i, both in left.items()}
            held = {i: span for i, span in spans.items() if span is not None}
            if held:
                made.append(Passage(text, tuple(held[i] for i in sorted(held))))
                left = {i: both for i, both in left.items() if i not in held}
        return made

    def _all_but(self, whole: str, untrained: Sequence[tuple[str, str]]) -> Passage:
        at, spans = 0, []
        for before, after in untrained:
            found = self._span(whole, before, after)
            if found is None:
                raise BadRow(
                    "a turn that is not to be trained is written otherwise in the whole "
                    "conversation, so train_on all cannot leave it out"
                )
            spans.append((at, found[0]))
            at = found[1]
        return Passage(
            whole, tuple(span for span in (*spans, (at, len(whole))) if span[0] < span[1])
        )

    def _check(self, before: str, after: str, turn: int, calls: bool) -> None:
        """Errors: BadRow for a template with which the words of a turn cannot be told."""
        if not after.startswith(before):
            at = next(
                (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
                len(after),
            )
            raise BadRow(
                f"the chat template is not prefix-preserving: the text before messages[{turn}], "
                "which asks the assistant to speak, is not how the text with its answer begins "
                f"(they part at character {at}: {before[at : at + 20]!r} and "
                f"{after[at : at + 20]!r}), so its words cannot be told. Use a template that "
                "writes the generation prompt as the answer begins"
            )
        if self._span(after, before, after) is None:
            raise BadRow(
                f"the chat template ends the turn messages[{turn}] without a special token (its "
                f"text ends with {after[-30:]!r}): a model trained on it would never learn to "
                "stop. Use a template that writes the end of each of the assistant's turns"
            )

        if not self._words(after[len(before) :]):
            raise BadRow(
                f"the chat template writes nothing of messages[{turn}]"
                f"{', whose tool calls it does not know' if calls else ''}: only its end would be "
                "trained. Use a template that writes it"
            )

    def _span(self, text: str, before: str, after: str) -> CharSpan | None:
        """Where `text` holds what was said between `before` and `after`, up to the end of turn;
        None where it does not.
        """
        if not text.startswith(before):
            return None
        said, begin = after[len(before) :], len(before)
        if text.startswith(after):
            common = len(said)
        else:
            rest = text[begin : begin + len(said)]
            common = next(
                (i for i, (a, b) in enumerate(zip(said, rest, strict=False)) if a != b), len(rest)
            )
        end = max((self._last(said, mark, common) for mark in self.ends), default=0)
        return (begin, begin + end) if end and not self._words(said[end:]) else None

    def _last(self, said: str, mark: str, common: int) -> int:
        at = said.rfind(mark, 0, common)
        return at + len(mark) if at >= 0 else 0

    def _words(self, text: str) -> str:
        """What is left of a text without ends of turns and spaces."""
        for mark in self.ends:
            text = text.replace(mark, "")
        return text.strip()

    def _texts(
        self, messages: Messages, cuts: list, tools: Any, options: Mapping[str, Any] | None
    ) -> list[str]:
        try:
            return self.renderer.texts(template_messages(messages), cuts, tools, options)
        except DataError as error:
            self._failures += not self.renderer.alive
            if self._failures >= MAX_FAILURES:
                raise DataError(
                    f"{error} So it was with {self._failures} conversations."
                ) from error
            raise BadRow(str(error).removesuffix(".")) from None
