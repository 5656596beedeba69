"""Every kind of training as a table: its configuration, its rules, and the module that runs it.

No torch: the module of a kind is imported by the ranks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megallm.run.config import JobConfig
from megallm.training import files, finetune, preference_config, reading
from megallm.training.config import PretrainConfig
from megallm.training.distill_config import DistillConfig
from megallm.training.offline_config import OfflineConfig
from megallm.training.rl_config import GrpoConfig, PpoConfig
from megallm.training.rules import distill, grpo, offline, pretrain
from megallm.training.rules import finetune as finetune_rules
from megallm.training.rules import preference as preference_rules
from megallm.training.rules.problem import Rules


@dataclass(frozen=True)
class Kind:
    """How one way to train is configured, checked and started.

    `module` has `run(config, mesh, resume, own_log, allowed)`. `tokenizer_vocab` returns the size
    of the data's tokenizer, None where it is not known; `check_files` raises a `DataError` for what
    is not there or cannot be used.
    """

    name: str
    config: type[JobConfig]
    module: str
    rules: Rules
    tokenizer_vocab: Callable[[Any], int | None]
    check_files: Callable[[Any], None]


_ROWS = (
    Kind(
        "pretrain",
        PretrainConfig,
        "megallm.training.pretrain",
        pretrain.RULES,
        reading.pretrain_tokenizer_vocab,
        files.check_pretrain_files,
    ),
    Kind(
        "sft",
        finetune.SftConfig,
        "megallm.training.sft",
        finetune_rules.SFT,
        finetune.chat_vocab,
        finetune.check_chat_files,
    ),
    *(
        Kind(
            name,
            config,
            f"megallm.training.{module}",
            rules,
            finetune.chat_vocab,
            finetune.check_chat_files,
        )
        for name, config, module, rules in (
            ("reward", preference_config.RewardModelConfig, "reward", preference_rules.REWARD),
            ("dpo", preference_config.DpoConfig, "preference", preference_rules.DPO),
            ("kto", preference_config.KtoConfig, "kto", preference_rules.KTO),
            ("offline", OfflineConfig, "offline", offline.OFFLINE),
            ("grpo", GrpoConfig, "grpo", grpo.RULES),
            ("ppo", PpoConfig, "ppo", grpo.PPO),
            ("distill", DistillConfig, "distill", distill.RULES),
        )
    ),
)
KINDS = {row.name: row for row in _ROWS}


def kind_of(config: JobConfig) -> Kind | None:
    """Returns the kind whose configuration this is; None for one without a row."""
    return next((row for row in KINDS.values() if row.config is type(config)), None)


def rules_of(config: JobConfig) -> Rules:
    """Returns the rules that a configuration's trainer adds to those of every trainer."""
    kind = kind_of(config)
    return Rules() if kind is None else kind.rules
