"""Rules about reinforcement learning: what is sampled, rewarded and compared. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megallm.training.rl_config import GrpoConfig, PpoConfig
from megallm.training.rules import finetune
from megallm.training.rules.nearest import multiples, nearest_fixes
from megallm.training.rules.problem import Facts, Problem, Rules
from megallm.training.rules.ranges import COUNT, NOT_NEGATIVE, Range


def reward_rules(config: GrpoConfig) -> Iterator[Problem]:
    """Yields what is wrong with the section `reward`."""
    for sentence in config.reward.faults(config.turns.environment is not None):
        yield Problem("reward", sentence)
    named = {spec.partition("(")[0].strip() for spec in config.reward.functions}
    if ("reward_model" in named) != (config.reward_model.model is not None):
        sentence = (
            "reward.functions names reward_model with its weight, and reward_model.model its folder: "
            "the one needs the other."
        )
        yield Problem("reward_model", sentence)
    judge = config.judge
    if judge.model is not None and "judge" not in named:
        yield Problem("judge", "judge.model is given, but reward.functions has no judge.")
    try:
        groups_of = re.compile(judge.pattern).groups
    except re.error as error:
        yield Problem("judge", f"judge.pattern {judge.pattern!r} is wrong: {error}.")
        return
    if groups_of != 1:
        sentence = f"judge.pattern {judge.pattern!r} has {groups_of} groups; the one is the rating."
        yield Problem("judge", sentence)


def turns(config: GrpoConfig) -> Iterator[Problem]:
    """Yields settings of answers of several turns, or of several steps, that do not go together."""
    partial, length = config.sampling.partial, config.sampling.max_new_tokens
    if config.turns.tokens > length:
        sentence = (
            f"turns.tokens {config.turns.tokens} is more than sampling.max_new_tokens {length}, "
            "which counts all turns of an answer."
        )
        yield Problem("turns", sentence, ({"turns.tokens": 0},))
    if config.turns.used and "{result}" not in config.turns.reply:
        yield Problem("turns", "turns.reply does not hold {result}, which is what a tool says.")
    if partial.tokens and config.sampling.resample:
        sentence = (
            "sampling.partial trains the groups that are whole first, and sampling.resample "
            "replaces some of them: leave one of the two out."
        )
        off = ({"sampling.resample": 0}, {"sampling.partial.tokens": 0})
        yield Problem("partial", sentence, off)
    if partial.tokens and partial.staleness < 1:
        sentence = (
            "sampling.partial.staleness 0 lets no answer go on in the next step: on-policy is "
            "sampling.partial.tokens 0."
        )
        yield Problem("partial", sentence, ({"sampling.partial.tokens": 0},))


def stops(config: GrpoConfig) -> Iterator[Problem]:
    """Yields a stop text that every answer holds from its first token on."""
    if "" in config.sampling.stop:
        kept = tuple(text for text in config.sampling.stop if text)
        sentence = "sampling.stop holds an empty text, which ends each answer at its first token."
        yield Problem("stop", sentence, ({"sampling.stop": kept},))


def groups(config: GrpoConfig) -> Iterator[Problem]:
    """Yields a step that is no whole number of groups."""
    train, group, updates = config.train, config.sampling.group, config.rl.updates
    if min(train.global_batch, group, updates) > 0 and train.global_batch * updates % group:
        sentence = (
            f"train.global_batch {train.global_batch} x rl.updates {updates} answers are no whole "
            f"number of groups of sampling.group {group}."
        )
        fixes = nearest_fixes(
            "train.global_batch", train.global_batch, multiples(train.global_batch, group)
        )
        yield Problem("groups", sentence, fixes)


def divergence(config: GrpoConfig) -> Iterator[Problem]:
    """Yields a KL divergence that counts twice, or settings of it that nothing reads."""
    kl = config.rl.kl
    if kl.loss > 0 and kl.reward > 0:
        sentence = (
            f"rl.kl.loss {kl.loss:g} and rl.kl.reward {kl.reward:g} both hold the policy at the "
            "reference: the divergence belongs into the loss or into the reward, not into both."
        )
        yield Problem("kl", sentence, ({"rl.kl.loss": 0.0}, {"rl.kl.reward": 0.0}))
    if kl.target is not None and not kl.reward > 0:
        sentence = "rl.kl.target steers rl.kl.reward, which is 0."
        yield Problem("kl", sentence, ({"rl.kl.target": None}, {"rl.kl.reward": 0.05}))
    if kl.reference is not None and not kl.used:
        sentence = "rl.kl.reference names a model that nothing is compared with."
        yield Problem("kl", sentence, ({"rl.kl.reference": None}, {"rl.kl.loss": 0.04}))


def old_answers(config: GrpoConfig) -> Iterator[Problem]:
    """Yields half of a replay buffer, and bounds of importance weights that cross."""
    replay = config.rl.replay
    if replay.low is not None and replay.low > replay.high:
        sentence = f"rl.replay.low {replay.low:g} is above rl.replay.high {replay.high:g}."
        yield Problem("replay", sentence, ({"rl.replay.low": None},))
    if (replay.staleness > 0) != (replay.prompts > 0):
        sentence = (
            f"rl.replay.staleness {replay.staleness} and rl.replay.prompts {replay.prompts}: "
            "answers of earlier steps need an age that they may have, and a number."
        )
        off = {"rl.replay.staleness": 0, "rl.replay.prompts": 0}
        yield Problem("replay", sentence, (off, {"rl.replay.staleness": 1, "rl.replay.prompts": 1}))


def alone(config: GrpoConfig) -> Iterator[Problem]:
    """Yields settings that do not go together."""
    rl, kl = config.rl, config.rl.kl
    added = {"rl.overlong_cache": rl.overlong_cache, "rl.kl.reward": kl.reward}
    added["rl.novelty.coefficient"] = rl.novelty.coefficient
    key = next((name for name, value in added.items() if value), None)
    if rl.advantage == "decoupled" and key is not None:
        sentence = (
            f"rl.advantage decoupled compares each reward alone; {key} is added to their sum."
        )
        yield Problem("advantage", sentence, ({key: 0}, {"rl.advantage": "group"}))
    if rl.overlong_cache > config.sampling.max_new_tokens:
        sentence = (
            f"rl.overlong_cache {rl.overlong_cache} is more than sampling.max_new_tokens "
            f"{config.sampling.max_new_tokens}, of whose end it is a part."
        )
        yield Problem("overlong", sentence, ({"rl.overlong_cache": 0},))
    if config.peft.dropout:
        sentence = (
            f"peft.dropout {config.peft.dropout:g}: the policy that is trained would be another one "
            "than that which has sampled."
        )
        yield Problem("dropout", sentence, ({"peft.dropout": 0.0},))
    if config.data.packing:
        sentence = "data.packing packs what is read; of sampled answers it is rl.packing."
        yield Problem("packing", sentence, ({"data.packing": False},))


def expert(config: GrpoConfig) -> Iterator[Problem]:
    """Yields weights of demonstrations that cannot be, and a share of the policy that is none."""
    given = config.expert
    if not given.sources:
        return
    for sentence in config.shown.faults():
        yield Problem("expert", sentence.replace("data.", "expert."))
    for key in ("mu_peak", "mu_valley"):
        value = vars(given)[key]
        if given.mix == "chord" and value is not None and value > 1:
            sentence = f"expert.{key} {value:g} leaves 1 - mu, less than nothing, to the policy."
            yield Problem("expert", sentence, ({f"expert.{key}": 1.0}, {"expert.mix": "ptx"}))


def without_critic(config: GrpoConfig) -> Iterator[Problem]:
    """Yields an algorithm whose advantages need a critic."""
    if config.rl.algorithm == "ppo":
        sentence = "rl.algorithm ppo needs a critic, which `megallm ppo` trains."
        yield Problem("algorithm", sentence, ({"rl.algorithm": "grpo"},))


def with_critic(config: PpoConfig) -> Iterator[Problem]:
    """Yields settings of other advantages than those of a critic."""
    rl = config.rl
    if rl.advantage is not None:
        sentence = f"rl.advantage {rl.advantage} takes the place of the critic's: leave it out."
        yield Problem("advantage", sentence, ({"rl.advantage": None},))
    if rl.replay.prompts:
        sentence = "rl.replay trains answers of other steps, of which the critic knows no values."
        off = {"rl.replay.staleness": 0, "rl.replay.prompts": 0}
        yield Problem("replay", sentence, (off,))


def language(facts: Facts) -> Iterator[Problem]:
    """Yields a model that writes no text, or none that is long enough."""
    config, model = facts.config, facts.model
    if model.head != "lm" or not model.causal:
        sentence = "megallm grpo trains language models: model.head lm, model.causal true."
        yield Problem("objective", sentence, ({"model.head": "lm", "model.causal": True},))
    longest = config.data.seq_len + config.sampling.max_new_tokens
    if longest > model.max_positions and model.positions == "learned":
        sentence = (
            f"data.seq_len {config.data.seq_len} of the longest prompt and sampling.max_new_tokens "
            f"{config.sampling.max_new_tokens} need {longest} positions; model.max_positions is "
            f"{model.max_positions}."
        )
        yield Problem("positions", sentence, ({"model.max_positions": longest},))


def shared_answers(facts: Facts) -> Iterator[Problem]:
    """Yields answers that are to share their prompt in a model that cannot."""
    yield from finetune.shared_prefix(facts, "rl.shared_prefix", facts.config.rl.shared_prefix)


def inferred(config: GrpoConfig) -> dict[str, Any]:
    """Returns what every trainer on conversations fills in."""
    return finetune.chat_inferred(config)


def going_back(config: GrpoConfig) -> Iterator[Problem]:
    """Yields policies that leave out batches, of which there are none: answers are made anew."""
    for key, usual in (("non_finite", "skip"), ("spike", "warn")):
        if vars(config.guard)[key] == "rollback":
            sentence = (
                f"guard.{key} rollback leaves out the batches of the steps that it takes back; "
                "answers that are sampled anew are in none. Skip the step, or stop."
            )
            yield Problem("rollback", sentence, ({f"guard.{key}": usual},))


_GIVEN = (
    *finetune.GIVEN, reward_rules, stops, groups, divergence, old_answers, alone, turns, expert,
    going_back,
)
RULES = Rules(
    (*_GIVEN, without_critic),
    finetune.RESOLVED
    | {language: ("model.head", "data.seq_len", "sampling.max_new_tokens", "model.max_positions")}
    | {shared_answers: ("rl.shared_prefix", "model.causal", "model.moe.capacity")},
    finetune.RANGES
    | {f"sampling.{name}": COUNT for name in ("group", "max_new_tokens", "batch")}
    | {f"rl.{name}": COUNT for name in ("updates", "epochs")}
    | {
        f"rl.{name}": NOT_NEGATIVE
        for name in ("low", "high", "opsm", "entropy_coef", "overlong_cache", "show")
    }
    | {f"rl.replay.{name}": NOT_NEGATIVE for name in ("staleness", "prompts", "low", "high")}
    | {f"sampling.partial.{name}": NOT_NEGATIVE for name in ("tokens", "staleness")}
    | {"turns.tokens": NOT_NEGATIVE, "turns.timeout_seconds": Range(above=0)}
    | {"turns.memory_gib": Range(above=0), "judge.most": Range(above=0)}
    | {f"{name}": COUNT for name in ("turns.most", "turns.workers", "reward_model.batch")}
    | {"judge.max_new_tokens": COUNT}
    | {f"rl.kl.{name}": NOT_NEGATIVE for name in ("loss", "reward")}
    | {f"rl.novelty.{name}": COUNT for name in ("width", "outputs", "updates")}
    | {"rl.novelty.coefficient": NOT_NEGATIVE, "rl.novelty.lr": Range(above=0)}
    | {"expert.batch": COUNT, "expert.mu_decay_steps": COUNT}
    | {f"expert.{name}": NOT_NEGATIVE for name in ("mu_peak", "mu_valley", "mu_warmup_steps")}
    | {"rl.kl.target": Range(above=0), "rl.kl.horizon": COUNT}
    | {"sampling.temperature": Range(above=0), "sampling.resample": Range(low=0, high=15)},
    inferred,
)
_CRITIC = {
    "critic.lr": Range(above=0),
    "critic.clip": Range(above=0),
    "critic.gamma": Range(above=0, high=1),
    "critic.lam": Range(low=0, high=1),
    "critic.reward_clip": Range(above=0),
    "critic.warmup_steps": NOT_NEGATIVE,
}
PPO = Rules((*_GIVEN, with_critic), RULES.resolved, {**RULES.ranges, **_CRITIC}, inferred)
