"""Rules about what `megallm offline` learns from answers with rewards. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.training.offline_config import OfflineConfig, OfflineOptions
from megallm.training.rules import finetune
from megallm.training.rules.preference import language_model
from megallm.training.rules.problem import Facts, Problem, Rules
from megallm.training.rules.ranges import COUNT, NOT_NEGATIVE, Range

# Which algorithm reads a setting.
_READ_BY = {
    "keep": "raft", "min_reward": "raft",
    "advantage": "awr", "beta": "awr", "max_weight": "awr", "value_coef": "awr",
    "gamma": "ilql", "tau": "ilql", "cql": "ilql", "nll": "ilql", "polyak": "ilql",
}  # fmt: skip


def offline_options(config: OfflineConfig) -> Iterator[Problem]:
    """Yields settings that another algorithm reads."""
    given, usual = vars(config.offline), vars(OfflineOptions())
    for name, algorithm in _READ_BY.items():
        if given[name] != usual[name] and config.offline.algorithm != algorithm:
            sentence = f"offline.{name} is {given[name]}, which offline.algorithm {algorithm} "
            sentence += f"reads; it is {config.offline.algorithm}."
            fixes = ({f"offline.{name}": usual[name]}, {"offline.algorithm": algorithm})
            yield Problem("offline", sentence, fixes)


def condition(config: OfflineConfig) -> Iterator[Problem]:
    """Yields return-conditioned training without a condition, and the other way round."""
    wanted = config.offline.algorithm == "return"
    if wanted and not config.data.condition:
        sentence = "offline.algorithm return tells the model the reward of an answer: give "
        yield Problem("condition", f'{sentence}data.condition, such as "reward {{reward}}: ".')
    if config.data.condition and not wanted:
        sentence = f"offline.algorithm {config.offline.algorithm} has no data.condition."
        yield Problem("condition", sentence, ({"offline.algorithm": "return"},))


def critic(facts: Facts) -> Iterator[Problem]:
    """Yields a model that lacks the values beside its head that the algorithm trains."""
    config, has = facts.config, facts.model.critic
    enough = {None: (None, "value", "q"), "value": ("value", "q"), "q": ("q",)}
    if has not in enough[config.critic]:
        sentence = f"model.critic is {has or 'null'}; offline.algorithm {config.offline.algorithm} "
        sentence += f"trains {config.critic}."
        yield Problem("critic", sentence, ({"model.critic": config.critic},))


OFFLINE = Rules(
    (*finetune.GIVEN, offline_options, condition),
    finetune.RESOLVED
    | {language_model: ("model.head", "model.causal"), critic: ("model.critic",)},
    finetune.RANGES
    | {
        "offline.keep": COUNT,
        "offline.beta": Range(above=0),
        "offline.max_weight": Range(above=0),
        "offline.value_coef": Range(above=0),
        "offline.gamma": Range(low=0, high=1),
        "offline.tau": Range(above=0, below=1),
        "offline.cql": NOT_NEGATIVE,
        "offline.nll": NOT_NEGATIVE,
        "offline.polyak": Range(above=0, high=1),
    },
    finetune.chat_inferred,
)
