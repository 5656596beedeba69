"""What tools and environments say between the turns of an answer: asked on one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.base.errors import RewardError
from megallm.base.rng import key_of
from megallm.data.chat.messages import messages_of
from megallm.data.chat.replies import ReplyWriter
from megallm.rewards.config import TurnsConfig
from megallm.rewards.episodes import Act, Environments
from megallm.rewards.samples import Completion
from megallm.rewards.tools import CallParser, ToolCall

TurnMessage = dict[str, Any]
# Columns that hold a prompt; the last four are conversations however they are written.
PROMPTS = ("prompt", "messages", "question", "instruction", "conversations")


def prompt_of(row: Mapping[str, Any]) -> Any:
    """Returns the prompt as it stands in its row: a text, or messages."""
    found = (row[name] for name in PROMPTS if row.get(name) is not None)
    return next(found, "")


def talk_of(row: Mapping[str, Any], strings: str) -> str | list[TurnMessage]:
    """Returns the prompt as it is answered: a plain text, or messages that a template writes."""
    prompt = prompt_of(row)
    if isinstance(prompt, str):
        if row.get("prompt") is not None and strings == "plain":
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    talk = [dict(one) for one in messages_of(prompt, "prompt")]
    return talk[:-1] if talk[-1]["role"] == "assistant" else talk


@dataclass
class Episode:
    """One answer of one or more turns, as it grows; its lists and numbers are what JSON holds.

    `tokens` are those of all turns and of what was said between them, `mask` False at the latter,
    whose `log_probs` are 0; `versions` are those of the weights that drew a token, and `drawn`
    counts what the generator gave. `begin` is where the turn begins that is not finished. `actions`
    are all that its environment was asked, `earned` what that has given so far (None: nothing).
    `reason` is empty until it ends: that of the last turn, or "turns" or "error".
    """

    id: int
    group: int
    step: int
    prompt: list[int]
    row: Mapping[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    drawn: int = 0
    begin: int = 0
    turns: int = 0
    text: str = ""
    messages: list[TurnMessage] = field(default_factory=list)
    actions: list[dict[str, Any]] = field(default_factory=list)
    earned: float | None = None
    extras: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def version(self) -> int:
        """Returns that of the weights that drew its first token."""
        return self.versions[0]


@dataclass(frozen=True)
class TurnLimits:
    """Tokens of an answer behind its prompt, and turns; how prompts that are texts are read, and
    the seed of the run.
    """

    tokens: int
    turns: int
    strings: str = "plain"
    seed: int = 0


class Replies:
    """Opens episodes and answers their turns, with the environments of this process.

    An environment is keyed by the seed and the episode's id. What it says is written behind the
    ids so far; nothing is encoded again. Errors: RewardError for a tool or an environment that
    fails under `turns.on_error` stop, and for one that cannot begin.
    """

    def __init__(
        self,
        config: TurnsConfig,
        environments: Environments,
        writer: ReplyWriter,
        parse: CallParser,
        limits: TurnLimits,
    ) -> None:
        self.config, self.environments, self.writer = config, environments, writer
        self.parse, self.limits = parse, limits

    def open(self, episodes: Sequence[Episode], kind: str) -> None:
        """Begin the environment of each episode, and write its prompt with the tools and with what
        the environment begins with. `kind` tells episodes of the same id apart.
        """
        for one in episodes:
            one.actions = [{"do": "reset"}]
        for one, act in zip(episodes, self._asked(episodes, kind), strict=True):
            if "error" in act.answer:
                raise RewardError(self._failed(one, act.answer["error"]))
            self._write_prompt(one, act.answer)

    def _write_prompt(self, one: Episode, answer: Mapping[str, Any]) -> None:
        talk, added = self._talk(one), answer.get("added")
        one.text = self._text_of(talk, one.row)
        said = answer.get("prompt", one.text)
        if isinstance(talk, str) and added:
            one.prompt = [*one.prompt, *self.writer.ids(added)]
            one.text += added
        elif isinstance(talk, list) and (added or self._tools(one.row) != one.row.get("tools")):
            last = talk[-1]
            talk = [*talk[:-1], last | {"content": str(last["content"]) + (added or "")}]
            one.text = self.writer.prompt(talk, self._tools(one.row))
            one.prompt = self.writer.ids(one.text)
        elif said != one.text:
            one.text, one.prompt = said, self.writer.ids(said)

    def _tools(self, row: Mapping[str, Any]) -> Any:
        """What a prompt tells of tools: what its row does, else those that there are."""
        return row.get("tools") or self.environments.schemas or None

    def _talk(self, one: Episode) -> str | list[TurnMessage]:
        return talk_of(one.row, self.limits.strings)

    def _text_of(self, talk: str | list[TurnMessage], row: Mapping[str, Any]) -> str:
        return talk if isinstance(talk, str) else self.writer.prompt(talk, row.get("tools"))

    def answer(self, episodes: Sequence[Episode], texts: Sequence[str], kind: str) -> None:
        """Take the finished turns `texts` of episodes: their tools are called or their environment
        steps, what that says is added, or the episode ends. A turn that was cut calls no tool.
        """
        asked: list[Episode] = []
        for one, text in zip(episodes, texts, strict=True):
            one.turns += 1
            cut = one.reason == "length"
            calls = self.parse(text) if self._by_calls and not cut else []
            message: TurnMessage = {"role": "assistant", "content": text}
            if calls:
                message["tool_calls"] = [call.message for call in calls if call.error is None]
            one.messages.append(message)
            before, one.text = one.text, one.text + text
            if self._by_calls and not calls:
                continue
            one.actions.append(self._action(text, before, calls))
            asked.append(one)
        for one, act in zip(asked, self._asked(asked, kind), strict=True):
            if "dead" in act.answer:
                one.actions[-1]["lost"] = True
            self._take(one, act.answer)
        self._finish([one for one in episodes if one.reason], kind)

    @property
    def _by_calls(self) -> bool:
        """Whether an answer goes on because it calls tools, not because its environment says so."""
        return self.environments.form in ("tools", "trl")

    def _action(self, text: str, before: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        if not self._by_calls:
            return {"do": "step", "text": text, "before": before}
        made = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
        wrong = [call.error for call in calls]
        return {"do": "calls", "calls": made, "wrong": wrong}

    def _take(self, one: Episode, answer: Mapping[str, Any]) -> None:
        """What came of an action."""
        action, ended = one.actions[-1], one.reason
        one.reason = ""
        if action["do"] == "calls":
            self._take_results(one, action, answer)
            return
        if "error" in answer:
            self._note(one, answer["error"])
            one.reason = "error"
            return
        one.earned = (one.earned or 0.0) + (answer["reward"] or 0.0)
        one.extras |= answer.get("extras", {})
        raw = answer.get("raw")
        said = answer["said"] if raw is None else raw
        if answer["done"]:
            one.messages += [{"role": "user", "content": said}] if said else []
            one.reason = ended
            return
        reply = [{"role": "user", "content": said}]
        if raw is not None or isinstance(self._talk(one), str):
            self._go_on(one, reply, self.writer.ids(said))
        else:
            self._go_on(one, reply, self.writer.ids(self.writer.reply(reply)))

    def _take_results(
        self, one: Episode, action: Mapping[str, Any], answer: Mapping[str, Any]
    ) -> None:
        failed = {"error": answer["error"]} if "error" in answer else None
        results = [failed or each for each in answer.get("results", action["calls"])]
        said: list[TurnMessage] = []
        for call, wrong, result in zip(action["calls"], action["wrong"], results, strict=True):
            error = wrong or result.get("error")
            if error is not None:
                self._note(one, f"{call['name'] or 'a call'}: {error}")
                if self.config.on_error == "end":
                    one.reason = "error"
                    return
            content = result["result"] if error is None else str({"error": error})
            said.append({"role": "tool", "name": call["name"] or "tool", "content": content})
        if isinstance(self._talk(one), str):
            written = [self.config.reply.replace("{result}", each["content"]) for each in said]
            ids = self.writer.words.encode("".join(written))
        else:
            ids = self.writer.ids(self.writer.reply(said))
        self._go_on(one, said, ids)

    def _go_on(self, one: Episode, said: Sequence[TurnMessage], ids: Sequence[int]) -> None:
        """Add a reply, where there is room for it and for what the policy says to it."""
        if one.turns >= self.limits.turns:
            one.reason = "turns"
        elif len(one.tokens) + len(ids) >= self.limits.tokens:
            one.reason = "length"
        else:
            one.messages += said
            one.text += "".join(each["content"] for each in said)
            one.tokens += ids
            one.log_probs += [0.0] * len(ids)
            one.mask += [False] * len(ids)
            one.versions += [one.versions[-1]] * len(ids)
            one.begin = len(one.tokens)

    def _finish(self, episodes: Sequence[Episode], kind: str) -> None:
        """Ask environments that ended for the reward that they own, and let go of them."""
        if self.environments.form == "tools":
            return
        for one in episodes:
            one.actions.append({"do": "finish"})
        for one, act in zip(episodes, self._asked(episodes, kind), strict=True):
            if "error" in act.answer:
                self._note(one, act.answer["error"])
            elif "reward" in act.answer:
                one.earned = act.answer["reward"]

    def _note(self, one: Episode, error: str) -> None:
        if self.config.on_error == "stop":
            raise RewardError(
                f"{self._failed(one, error)} With turns.on_error=tell or end the run goes on."
            )
        one.failures.append(self._failed(one, error))

    def _failed(self, one: Episode, error: str) -> str:
        name = "A tool" if self.environments.form == "tools" else f"{self.environments.name}"
        return f"{name} failed in turn {one.turns} of the answer {one.id}: {error}."

    def _asked(self, episodes: Sequence[Episode], kind: str) -> list[Act]:
        acts = []
        for one in episodes:
            gold = Completion("", "", columns=one.row).gold()
            text = self._text_of(self._talk(one), one.row) if len(one.actions) == 1 else one.text
            request = {
                "key": f"{kind}-{one.id}", "seed": key_of(self.limits.seed, "environment", one.id),
                "row": dict(one.row), "text": text, "gold": gold, "actions": one.actions,
            }  # fmt: skip
            acts.append(Act(one.id, request))
        self.environments.run(acts)
        return acts
