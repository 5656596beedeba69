"""Environments as other trainers have them, in one form: recognised by their methods, and run in
a worker process, which keeps those of the episodes that it is asked about.

What an environment is, is a function of its episode's seed and of the actions so far: a process
that was lost is replaced by another, which repeats them.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.base.errors import UsageError
from megallm.rewards.signatures import Notes, imported, number, parse_spec
from megallm.rewards.tools import schema_of, unknown_tool

Told = dict[str, Any]
OWN = ("reset", "get_reward")  # methods of TRL's environments that are no tools
LONGEST = 1_000_000  # characters of a reply: encoding more holds the run up, and no answer has room

# The signatures, as they are shown.
FORMS = {
    "openrlhf": "class with reset(self, states) -> {observation} and step(self, states) -> {rewards, "
    "scores, environment_feedback, done, extra_logs}; both may be async",
    "gymnasium": "class with reset(self, seed=None) -> (observation, info) and step(self, action) -> "
    "(observation, reward, terminated, truncated, info)",
    "trl": "class with reset(self, **columns) -> str | None whose other public methods are tools, and "
    "perhaps get_reward(self) -> float",
}  # fmt: skip


@dataclass
class Live:
    """An environment of an episode: `done` actions of it have been taken."""

    instance: Any = None
    done: int = 0


@dataclass(frozen=True)
class Setting:
    """The environment and the tools of a run: `form` of `FORMS`, or "tools" without one."""

    form: str
    make: Callable[[], Any]
    tools: Mapping[str, Callable[..., Any]]
    methods: tuple[str, ...] = ()
    earns: bool = False  # whether it gives a reward of its own
    name: str = "environment"

    def described(self) -> Told:
        """Returns what the trainer is told."""
        schemas = [schema_of(tool) for tool in self.tools.values()]
        if self.methods:
            kind = type(self.make())
            schemas += [schema_of(vars_of(kind)[name]) for name in self.methods]
        return {"form": self.form, "earns": self.earns, "schemas": schemas, "name": self.name}


def vars_of(kind: type) -> dict[str, Any]:
    """Returns the members of a class and its bases, by name."""
    return {name: value for one in reversed(kind.__mro__) for name, value in vars(one).items()}


def setting_of(tools: Sequence[str], environment: str | None) -> Setting:
    """Returns what `turns.tools` and `turns.environment` name.

    Errors: UsageError with the accepted forms for an environment of none of them.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for spec in tools:
        target, options = parse_spec(spec)
        function = imported(target)
        if not callable(function) or options:
            raise UsageError(f"turns.tools names '{spec}', which is no function.")
        functions[function.__name__] = function
    if environment is None:
        return Setting("tools", lambda: None, functions)
    target, options = parse_spec(environment)
    factory = imported(target)
    if not callable(factory):
        raise UsageError(f"turns.environment names '{environment}', which is no class.")
    probe = factory(**options)
    members = vars_of(type(probe))
    form = _form(members)
    if form is None:
        told = "\n".join(f"  {name}: {shown}" for name, shown in FORMS.items())
        raise UsageError(
            f"turns.environment {target} has the methods "
            f"{', '.join(name for name in members if not name.startswith('_')) or 'none'}; "
            f"accepted are:\n{told}"
        )
    methods = tuple(
        name
        for name, value in members.items()
        if form == "trl"
        and inspect.isfunction(value)
        and not name.startswith("_")
        and name not in OWN
    )
    earns = form != "trl" or "get_reward" in members
    name = type(probe).__name__
    return Setting(form, lambda: factory(**options), functions, methods, earns, name)


def _form(members: Mapping[str, Any]) -> str | None:
    if not inspect.isfunction(members.get("reset")):
        return None
    step = members.get("step")
    if not inspect.isfunction(step):
        return "trl"
    names = list(inspect.signature(step).parameters)[1:]
    if names[:1] in (["states"], ["state_dict"], ["state"]):
        return "openrlhf"
    return "gymnasium" if names[:1] == ["action"] else "trl"


@dataclass
class Host:
    """The environments of a worker, by the key of their episode."""

    setting: Setting
    live: dict[str, Live] = field(default_factory=dict)

    def act(self, request: Mapping[str, Any]) -> Told:
        """Returns what comes of the last of `actions`; the others are repeated where this process
        has not seen them. `key`, `seed` and `row` are those of the episode.
        """
        key, actions = request["key"], request["actions"]
        if self.setting.form == "tools":  # functions remember nothing
            _seed(request["seed"], len(actions))
            return self._take(Live(), actions[-1], request)
        live = self.live.get(key)
        if live is None or live.done != len(actions) - 1:
            live = self.live[key] = Live()
        answer: Told = {}
        while live.done < len(actions):
            action = actions[live.done]
            _seed(request["seed"], live.done)
            if not action.get("lost"):  # it has ended a process: it is not tried again
                answer = self._take(live, action, request)
            live.done += 1
        if actions[-1]["do"] == "finish":
            del self.live[key]
        return answer

    def _take(self, live: Live, action: Mapping[str, Any], request: Mapping[str, Any]) -> Told:
        if action["do"] == "reset":
            live.instance = self.setting.make()
            return _RESETS[self.setting.form](live.instance, request)
        if action["do"] == "step":
            return _STEPS[self.setting.form](live.instance, action, request)
        if action["do"] == "calls":
            return {"results": [self._called(live.instance, call) for call in action["calls"]]}
        if self.setting.form == "trl" and self.setting.earns:
            return {"reward": number(_result(live.instance.get_reward()), Notes())}
        return {}

    def _called(self, instance: Any, call: Mapping[str, Any]) -> Told:
        """What a tool returns, or `error`."""
        name, known = call["name"], [*self.setting.tools, *self.setting.methods]
        if name not in known:
            return {"error": unknown_tool(name, known)}
        tool = self.setting.tools.get(name)
        if tool is None:
            tool = vars_of(type(instance))[name].__get__(instance)
        try:
            inspect.signature(tool).bind(**call["arguments"])
        except TypeError as error:
            return {"error": f"{name}{inspect.signature(tool)}: {error}"}
        try:
            return {"result": _text(str(_result(tool(**call["arguments"]))))}
        except Exception as error:  # the boundary of a tool: the model is told
            return {"error": f"{type(error).__name__}: {error}"}


def _seed(seed: int, turn: int) -> None:
    """Make draws of the libraries that environments use a function of episode and turn."""
    random.seed(f"{seed} {turn}")
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def _result(value: Any) -> Any:
    return asyncio.run(_awaited(value)) if isinstance(value, Awaitable) else value


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _chosen(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a method takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return dict(given)
    return {one.name: given[one.name] for one in parameters if one.name in given}


# How an episode begins, by form: the text of a prompt of its own, or one that is added to it.


def _reset_nothing(instance: Any, request: Mapping[str, Any]) -> Told:
    return {}


def _reset_openrlhf(instance: Any, request: Mapping[str, Any]) -> Told:
    states = {"observation": request["text"], "prompt": request["text"], "label": request["gold"]}
    found = _result(instance.reset(states))
    return {"prompt": _text(found["observation"])}


def _reset_gymnasium(instance: Any, request: Mapping[str, Any]) -> Told:
    given = {**request["row"], "seed": request["seed"] % 2**32}
    found = _result(instance.reset(**_chosen(instance.reset, given)))
    observation = found[0] if isinstance(found, tuple) else found
    return {"added": None if observation is None else _text(observation)}


def _reset_trl(instance: Any, request: Mapping[str, Any]) -> Told:
    found = _result(instance.reset(**_chosen(instance.reset, request["row"])))
    return {"added": None if found is None else _text(found)}


# What an environment says to an answer, by form.


def _step_openrlhf(
    instance: Any, action: Mapping[str, Any], request: Mapping[str, Any]
) -> Told:
    states = {"observation_text": action["before"], "action_text": action["text"],
              "label": request["gold"], "sampling_params": None}  # fmt: skip
    found = _result(instance.step(states))
    logs = {name: number(value, Notes()) for name, value in (found.get("extra_logs") or {}).items()}
    return {
        "raw": _text(found.get("environment_feedback") or ""),
        "reward": number(found["rewards"], Notes()),
        "done": bool(found["done"]),
        "extras": logs,
    }


def _step_gymnasium(
    instance: Any, action: Mapping[str, Any], request: Mapping[str, Any]
) -> Told:
    observation, reward, terminated, truncated, *_ = _result(instance.step(action["text"]))
    said, done = _text(observation), bool(terminated or truncated)
    return {"said": said, "reward": number(reward, Notes()), "done": done}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it said {type(value).__name__} {str(value)[:80]!r}, not a text")
    if len(value) > LONGEST:
        raise ValueError(f"it said {len(value)} characters; {LONGEST} are the most")
    value.encode("utf-8")
    return value


_RESETS = {"tools": _reset_nothing, "openrlhf": _reset_openrlhf, "gymnasium": _reset_gymnasium,
           "trl": _reset_trl}  # fmt: skip
_STEPS = {"openrlhf": _step_openrlhf, "gymnasium": _step_gymnasium}
