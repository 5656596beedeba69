"""Rules about what a run on conversations reads and trains. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

from megallm.base.errors import MegallmError
from megallm.data.chat.formats import RowKind
from megallm.data.chat.reader import SHARED
from megallm.data.shared_prefix import SharedPrefix
from megallm.optim.groups import pattern_problem
from megallm.training.finetune import FinetuneConfig
from megallm.training.rules.files import placeholders
from megallm.training.rules.layout import row_length
from megallm.training.rules.problem import Facts, Problem, Rules
from megallm.training.rules.ranges import COUNT, SEED, SHARE, Range
from megallm.training.shared_prefix import obstacle
from megallm.training.starting import tokenizer_of_model

HEADS = ("lm", "classification", "value")
# The kinds of rows of which a value of the section `data` changes something.
_READ_BY: dict[tuple[str, Any], tuple[RowKind, ...]] = {
    ("shared_prefix", "on"): SHARED,
    ("pairs", "all"): ("preference", "reward", "ranked"),  # reward.ranked has a rule of its own
    ("train_on", "all"): ("sft", "prompts"),
}


def chat_sections(config: FinetuneConfig) -> Iterator[Problem]:
    """Yields what is wrong with the sections `data` and `peft` themselves, and with `freeze`."""
    for sentence in config.data.faults():
        yield Problem("chat_data", sentence)
    for sentence in config.peft.problems():
        yield Problem("peft", sentence)
    for pattern in config.freeze:
        problem = pattern_problem(pattern)
        if problem is not None:
            yield Problem("freeze", f"freeze: '{pattern}' {problem}.")


def unread(config: FinetuneConfig) -> Iterator[Problem]:
    """Yields settings of the section `data` that rows of this kind do not have."""
    for (name, value), kinds in _READ_BY.items():
        if vars(config.data)[name] == value and config.kind not in kinds:
            sentence = f"data.{name} is {value}, which rows of the kind {config.kind} do not read: "
            usual = vars(type(config.data)())[name]
            yield Problem("unread", f"{sentence}leave it out.", ({f"data.{name}": usual},))
    if config.data.condition and config.kind != "scored":
        sentence = "data.condition tells the reward of an answer, which rows of the kind "
        sentence += f"{config.kind} do not have: leave it and data.return_edges out."
        fix = {"data.condition": "", "data.return_edges": ()}
        yield Problem("unread", sentence, (fix,))


def unfilled_chat(config: FinetuneConfig) -> Iterator[Problem]:
    """Yields paths that a script's author left to be filled in."""
    data = config.data
    sources = [("data.sources", name) for name in data.sources]
    sources += [("data.valid_sources", name) for name in data.valid_sources]
    paths = [("data.tokenizer", data.tokenizer), ("peft.adapter", config.peft.adapter)]
    yield from placeholders([*paths, *sources])


def named_tokenizer(config: FinetuneConfig) -> Iterator[Problem]:
    """Yields a tokenizer that nobody names."""
    if config.data.tokenizer is not None:
        return
    try:
        found = tokenizer_of_model(config.model)
    except (MegallmError, OSError):
        return  # the rules of the model say what is wrong with its folder
    if found is None:
        where = config.model.hf or config.model.init
        lacks = f"{where} has none" if where else "no model.hf or model.init brings one"
        sentence = f"data.tokenizer is not given, and {lacks}: name a tokenizer's folder, or bytes."
        yield Problem("tokenizer", sentence)


def need_base(config: FinetuneConfig) -> Iterator[Problem]:
    """Yields adapters that have no trained model to stand beside."""
    model, method = config.model, config.peft.method
    if (method != "none" or config.peft.adapter) and model.hf is None and model.init is None:
        sentence = f"peft.method {method} trains beside a model that is there: give model.hf or "
        yield Problem("base", f"{sentence}model.init.", ({"peft.method": "none"},))


def chat_lengths(facts: Facts) -> Iterator[Problem]:
    """Yields lengths that the layout refuses for packed rows, and the model's positions for any."""
    data = facts.config.data
    for problem in row_length(facts, data.seq_len):
        if problem.rule == "positions" or data.packing:
            yield problem
    yield from virtual_positions(facts, "data.seq_len", data.seq_len)


def virtual_positions(facts: Facts, key: str, tokens: int) -> Iterator[Problem]:
    """Yields texts that fit the model's positions, but not behind the virtual tokens of prompt and
    P-tuning.
    """
    peft, most = facts.config.peft, facts.model.max_positions
    virtual = peft.virtual_tokens if peft.method in ("prompt", "p-tuning") else 0
    if tokens <= most < tokens + virtual and facts.model.rope_scaling != "dynamic":
        sentence = f"{key} {tokens} and the {virtual} virtual tokens of peft.method {peft.method} "
        sentence += f"before it need {tokens + virtual} positions; model.max_positions is {most}."
        fixes = () if most <= virtual else ({key: most - virtual},)
        yield Problem("positions", sentence, fixes)


def shared_prefix(facts: Facts, key: str, wanted: SharedPrefix) -> Iterator[Problem]:
    """Yields prompts that are to be shared in a model that cannot."""
    why = obstacle(facts.model) if wanted == "on" else None
    if why is not None:
        yield Problem("shared_prefix", f"{key} is on, but {why}.", ({key: "auto"},))


def objective(facts: Facts) -> Iterator[Problem]:
    """Yields a model that cannot learn what its rows teach, and options of another loss."""
    config, head = facts.config, facts.model.head
    if head not in HEADS:
        sentence = f"model.head is {head}; megallm sft trains lm, classification and value."
        yield Problem("objective", sentence, ({"model.head": "lm"},))
    elif head == "lm" and not facts.model.causal:
        sentence = "model.causal is false: the model sees the next token, which it is to predict."
        yield Problem("objective", sentence, ({"model.causal": True},))
    if config.sft.dft and head != "lm":
        sentence = f"sft.dft weighs the tokens of a language model; model.head is {head}."
        yield Problem("objective", sentence, ({"sft.dft": False},))


def chat_inferred(config: FinetuneConfig) -> dict[str, Any]:
    """Returns the seed of the data, the run's, and their tokenizer, the model's, where none is
    given.
    """
    data, found = config.data, {}
    if data.seed is None:
        found["data.seed"] = config.run.seed
    if data.tokenizer is None:
        found["data.tokenizer"] = tokenizer_of_model(config.model)
    return found


# Of every trainer on conversations; one of its own adds to them, as SFT does.
GIVEN = (chat_sections, unread, unfilled_chat, named_tokenizer, need_base)
RESOLVED = {chat_lengths: ("layout.tp", "layout.cp", "data.seq_len", "model.max_positions")}
RANGES = {"data.seed": SEED, "data.seq_len": COUNT, "data.window": COUNT}
SFT = Rules(
    GIVEN,
    RESOLVED | {objective: ("model.head",)},
    RANGES | {"sft.neftune_alpha": Range(low=0, below=inf), "sft.hidden_dropout": SHARE},
    chat_inferred,
)
