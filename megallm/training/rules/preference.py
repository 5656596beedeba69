"""Rules about what the trainers on preferences compare, and with which loss. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

from megallm.base.suggest import nearest
from megallm.training.preference_config import (
    ALONE,
    PAIR_LOSSES,
    SMOOTHED,
    WITH_MARGIN,
    DpoConfig,
    PreferenceConfig,
    RewardModelConfig,
)
from megallm.training.rules import finetune
from megallm.training.rules.problem import Facts, Problem, Rules
from megallm.training.rules.ranges import COUNT, NOT_NEGATIVE, SHARE, Range


def losses(config: DpoConfig) -> Iterator[Problem]:
    """Yields losses that there are not, and mixtures of what cannot be mixed."""
    options, names = config.dpo, tuple(config.dpo.losses)
    key = "dpo.mixture" if options.mixture else "dpo.loss"
    for name in names:
        if name not in PAIR_LOSSES:
            close = nearest(name, PAIR_LOSSES, cutoff=0) or PAIR_LOSSES[0]
            sentence = f"{key} names '{name}'; it must be one of {', '.join(PAIR_LOSSES)}."
            fixes = ({"dpo.loss": close},) if not options.mixture else ()
            yield Problem("losses", sentence, fixes, key)
    for name, weight in options.mixture.items():
        if not 0 < weight < inf:
            sentence = f"dpo.mixture weighs {name} with {weight}; it must be a finite number above "
            yield Problem("mixture", f"{sentence}0.", ({"dpo.mixture": {}},))
    if options.mixture and set(names) & set(ALONE):
        sentence = f"dpo.mixture has one of {', '.join(ALONE)}, which stand alone: take dpo.loss."
        yield Problem("losses", sentence)


def loss_options(config: DpoConfig) -> Iterator[Problem]:
    """Yields options that the chosen losses do not read, or cannot do without."""
    dpo, names = config.dpo, set(config.dpo.losses)
    if dpo.label_smoothing and not names & set(SMOOTHED):
        sentence = f"dpo.label_smoothing has no effect on {', '.join(sorted(names))}; it is for "
        sentence += f"{', '.join(SMOOTHED)}."
        yield Problem("smoothing", sentence, ({"dpo.label_smoothing": 0.0},))
    if "exo_pair" in names and not dpo.label_smoothing:
        sentence = "dpo.loss exo_pair needs a dpo.label_smoothing above 0."
        yield Problem("smoothing", sentence, ({"dpo.label_smoothing": 0.001},))
    if dpo.gamma and not names & set(WITH_MARGIN):
        sentence = f"dpo.gamma has no effect on {', '.join(sorted(names))}; losses with a margin "
        sentence += f"are {', '.join(WITH_MARGIN)}."
        yield Problem("gamma", sentence, ({"dpo.gamma": None},))
    usual = type(dpo)().discopop_tau
    if dpo.discopop_tau != usual and "discopop" not in names:
        sentence = f"dpo.discopop_tau has no effect on {', '.join(sorted(names))}; it is for "
        sentence += "discopop."
        yield Problem("discopop_tau", sentence, ({"dpo.discopop_tau": usual},))


def reference_of_pairs(config: DpoConfig) -> Iterator[Problem]:
    """Yields a reference that the loss does not use, or one that cannot be had."""
    if config.dpo.needs_reference:
        yield from reference(config)
    elif config.reference.kind is not None or config.reference.model is not None:
        sentence = f"dpo.loss {', '.join(config.dpo.losses)} has no reference: leave the section "
        sentence += "reference out."
        yield Problem("reference", sentence, ({"reference.kind": None, "reference.model": None},))


def reference(config: PreferenceConfig) -> Iterator[Problem]:
    """Yields a reference that cannot be had."""
    given, peft, model = config.reference, config.peft, config.model
    if model.hf is None and model.init is None and given.model is None:
        sentence = "The policy is compared with the model that it starts from, and none is named: "
        yield Problem("reference", f"{sentence}give model.hf or model.init.")
    if given.kind == "adapter_off":
        why = ""
        if peft.method == "none":
            why = "peft.method is none: there is no adapter to switch off"
        elif peft.modules_to_save:
            why = "peft.modules_to_save trains parts of the base itself"
        elif peft.adapter is not None:
            why = "peft.adapter starts from an adapter, without which the model is another one"
        if why:
            fixes = ({"reference.kind": "precomputed"},)
            yield Problem("reference", f"reference.kind is adapter_off, but {why}.", fixes)
    usual = type(given)()
    for key in ("alpha", "every"):
        if given.kind != "synced" and vars(given)[key] != vars(usual)[key]:
            sentence = f"reference.{key} is {vars(given)[key]}, which moves a reference of the "
            sentence += f"kind synced; reference.kind is {given.kind or 'null'}, which stays."
            fixes = ({f"reference.{key}": vars(usual)[key]}, {"reference.kind": "synced"})
            yield Problem("reference", sentence, fixes)
    if given.kind in ("adapter_off", "synced") and given.model is not None:
        sentence = f"reference.kind {given.kind} takes the run's own model; reference.model names "
        fixes = ({"reference.model": None}, {"reference.kind": "precomputed"})
        yield Problem("reference", f"{sentence}another one.", fixes)


def language_model(facts: Facts) -> Iterator[Problem]:
    """Yields a model that gives no probabilities of the next token."""
    if facts.model.head != "lm" or not facts.model.causal:
        sentence = f"model.head is {facts.model.head} and model.causal {facts.model.causal}; "
        sentence += "preferences are learned by causal language models."
        yield Problem("objective", sentence, ({"model.head": "lm", "model.causal": True},))


def value_head(facts: Facts) -> Iterator[Problem]:
    """Yields a model that gives no score."""
    if facts.model.head != "value":
        sentence = f"model.head is {facts.model.head}; megallm reward trains a score."
        yield Problem("objective", sentence, ({"model.head": "value"},))


def shared_pairs(facts: Facts) -> Iterator[Problem]:
    """Yields pairs that are to share their prompt in a model that cannot."""
    yield from finetune.shared_prefix(
        facts, "data.shared_prefix", facts.config.data.shared_prefix
    )


def pairs_of_ranked(config: RewardModelConfig) -> Iterator[Problem]:
    """Yields a way to take pairs that ranked answers do not have."""
    if config.reward.ranked and config.data.pairs != type(config.data)().pairs:
        sentence = "data.pairs is all, which reward.ranked does not read: it compares all answers."
        yield Problem("pairs", sentence, ({"data.pairs": "best_worst"}, {"reward.ranked": False}))


def inferred_of_reward(config: RewardModelConfig) -> dict[str, Any]:
    """Returns what every trainer fills in; beside adapters the head is trained in full, which a
    language model has no weights for.
    """
    found = finetune.chat_inferred(config)
    if config.peft.method != "none" and not config.peft.modules_to_save:
        found["peft.modules_to_save"] = ("head",)
    return found


_SHARE = Range(low=0, high=1)
_REFERENCE = {"reference.alpha": _SHARE, "reference.every": COUNT}
_SHARED = {shared_pairs: ("data.shared_prefix", "model.causal", "model.moe.capacity")}
_MODEL = finetune.RESOLVED | {language_model: ("model.head", "model.causal")}
DPO = Rules(
    (*finetune.GIVEN, losses, loss_options, reference_of_pairs),
    _MODEL | _SHARED,
    finetune.RANGES
    | _REFERENCE
    | {
        "dpo.beta": Range(above=0, high=1e6),
        "dpo.label_smoothing": Range(low=0, high=0.499),
        "dpo.rpo_alpha": NOT_NEGATIVE,
        "dpo.gamma": Range(low=-1e6, high=1e6),
        "dpo.discopop_tau": Range(above=0, high=1e6),
        "dpo.watch_steps": NOT_NEGATIVE,
    },
    finetune.chat_inferred,
)
KTO = Rules(
    (*finetune.GIVEN, reference),
    _MODEL,
    finetune.RANGES
    | _REFERENCE
    | {
        "kto.beta": Range(above=0, high=1e6),
        "kto.desirable_weight": NOT_NEGATIVE,
        "kto.undesirable_weight": NOT_NEGATIVE,
        "kto.watch_steps": NOT_NEGATIVE,
    },
    finetune.chat_inferred,
)
REWARD = Rules(
    (*finetune.GIVEN, pairs_of_ranked),
    finetune.RESOLVED | {value_head: ("model.head",)} | _SHARED,
    finetune.RANGES | {"reward.center": NOT_NEGATIVE, "reward.hidden_dropout": SHARE},
    inferred_of_reward,
)
