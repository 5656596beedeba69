"""The sections and configurations of `megallm dpo`, `kto` and `reward`. No torch.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.data.chat.formats import RowKind
from megallm.training.finetune import FinetuneConfig

ALONE = ("orpo", "simpo", "cpo")  # ways of training without a reference, never part of a mixture
PAIR_LOSSES = (
    "sigmoid", "sigmoid_norm", "cdpo", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair",
    "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", *ALONE,
)  # fmt: skip
SMOOTHED = ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired")
WITH_MARGIN = ("sigmoid", "sigmoid_norm", "cdpo", "robust", "hinge", "exo_pair", "discopop", "simpo", "cpo")
ReferenceKind = Literal["precomputed", "adapter_off", "frozen", "synced"]


@dataclass(frozen=True)
class ReferenceConfig:
    """The model that the policy is compared with: what training began with, or another one."""

    kind: ReferenceKind | None = None  # null: adapter_off where adapters start from the base, else precomputed
    model: str | None = None  # Hugging Face, run or step folder of another reference; null: what the run starts from
    alpha: float = 0.6  # synced: share by which it moves towards the policy (TR-DPO, arXiv 2404.09656); 1 replaces it
    every: int = 512  # synced: steps between two such moves


@dataclass(frozen=True)
class DpoOptions:
    """Which loss pairs are trained with; names are those of TRL's `loss_type`."""

    loss: str = "sigmoid"  # sigmoid (DPO), ipo, hinge, robust, ..., or orpo, simpo, cpo: see docs/preferences.md
    mixture: dict[str, float] = field(default_factory=dict)  # several losses with their weights, instead of loss
    beta: float | None = None  # scale of the log-ratios, tau of ipo; null: 0.1, of simpo 2.0
    label_smoothing: float = 0.0  # cdpo, robust, exo_pair, aot: share of the labels that are taken to be flipped
    rpo_alpha: float | None = None  # weight of the chosen answers' negative log-likelihood; null: 0, of orpo, cpo 1
    gamma: float | None = None  # margin of every pair beside those of the rows; null: 0, of simpo 1.0
    length_normalized: bool = False  # means over the tokens instead of sums
    reference_free: bool = False  # log-probs instead of log-ratios
    discopop_tau: float = 0.05  # discopop: temperature of its gate
    watch_steps: int = 20  # chosen log-probs that fall from these steps to the next as many are warned of; 0: never

    @property
    def losses(self) -> dict[str, float]:
        """Name -> weight."""
        return self.mixture or {self.loss: 1.0}

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with another model."""
        return not self.reference_free and not set(self.losses) & set(ALONE)


@dataclass(frozen=True)
class KtoOptions:
    """Kahneman-Tversky optimisation (arXiv 2402.01306) of answers that are good or bad."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"  # the second has no reference point (arXiv 2408.06266)
    beta: float = 0.1  # scale of the log-ratios
    desirable_weight: float = 1.0  # of good answers; weight x number of good ones should be 1 to 4/3 of that of the bad
    undesirable_weight: float = 1.0  # of bad answers
    watch_steps: int = 20  # as dpo.watch_steps


@dataclass(frozen=True)
class RewardOptions:
    """Bradley-Terry (arXiv 2203.02155): the score of a chosen answer above a rejected one's."""

    center: float = 0.0  # weight of (chosen + rejected)^2, which keeps scores around 0 (arXiv 2312.09244: 0.01)
    hidden_dropout: float = 0.0  # share dropped of embeddings and of outputs of attention and feed-forward layers
    ranked: bool = False  # all answers of a prompt in one row, each pair weighing 1 / number of pairs; else data.pairs


@dataclass(frozen=True)
class PreferenceConfig(FinetuneConfig):
    """What the trainers with a reference have in common."""

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


@dataclass(frozen=True)
class DpoConfig(PreferenceConfig):
    """Everything about one run of `megallm dpo`."""

    dpo: DpoOptions = field(default_factory=DpoOptions)

    @property
    def kind(self) -> RowKind:
        """Returns pairs of a chosen and a rejected answer."""
        return "preference"


@dataclass(frozen=True)
class KtoConfig(PreferenceConfig):
    """Everything about one run of `megallm kto`."""

    kto: KtoOptions = field(default_factory=KtoOptions)

    @property
    def kind(self) -> RowKind:
        """Returns single answers, each good or bad."""
        return "unpaired"


@dataclass(frozen=True)
class RewardModelConfig(FinetuneConfig):
    """Everything about one run of `megallm reward`; `model.head` is value."""

    reward: RewardOptions = field(default_factory=RewardOptions)

    @property
    def kind(self) -> RowKind:
        """Returns pairs, or all answers of a prompt with their ranks."""
        return "ranked" if self.reward.ranked else "reward"
