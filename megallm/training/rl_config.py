"""The configuration of reinforcement learning: what is sampled, rewarded and trained. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import RowKind
from megallm.data.shared_prefix import SharedPrefix
from megallm.rewards.config import JudgeConfig, RewardConfig, RewardScorerConfig, TurnsConfig
from megallm.training.finetune import FinetuneConfig

Algorithm = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "sapo", "rloo", "reinforce",
    "reinforce_plus_plus", "ppo",
]  # fmt: skip
Estimator = Literal[
    "group", "batch", "none", "leave_one_out", "decoupled", "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]  # fmt: skip
Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask",
    "geometric_truncate", "geometric_mask",
]  # fmt: skip


@dataclass(frozen=True)
class PartialConfig:
    """Answers that grow over several steps; their tokens are weighed as rl.replay says."""

    tokens: int = 0  # tokens that all growing answers get before a step looks whether enough are done; 0: all of them
    staleness: int = 1  # steps after which an answer is trained at the latest


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn: from the policy itself; of top-k or top-p the log-probs would be
    others.
    """

    group: int = 8  # answers to each prompt
    max_new_tokens: int = 256  # longest answer
    temperature: float = 1.0  # of sampling, and of all log-probs that are trained
    stop: tuple[str, ...] = ()  # texts that end an answer, beside the tokenizer's and the template's end
    batch: int = 64  # sequences that a data rank decodes together
    partial: PartialConfig = field(default_factory=PartialConfig)
    resample: int = 0  # times that new prompts replace groups whose answers all earned the same (DAPO)


@dataclass(frozen=True)
class ReplayConfig:
    """Answers of earlier steps, trained again."""

    staleness: int = 0  # steps that an answer may be old; 0: on-policy, nothing is kept
    prompts: int = 0  # groups of earlier steps that are added to those of a step
    correction: Correction = "token_truncate"  # importance weights for what the policy of another step has drawn
    low: float | None = None  # lower bound of these weights
    high: float = 2.0  # upper bound: truncated to it, or masked above it


@dataclass(frozen=True)
class KlConfig:
    """The distance to the reference model; one of the coefficients at most is above 0."""

    loss: float = 0.0  # coefficient of the estimate in the loss
    reward: float = 0.0  # coefficient of k1, which is subtracted from the reward
    estimator: Literal["k2", "k3", "k3_is", "k1+", "k3+"] = "k3_is"  # in the loss
    target: float | None = None  # nats a sequence that the reward's coefficient is steered to (arXiv 1909.08593)
    horizon: int = 10_000  # answers in which it moves by a fifth at most
    reference: str | None = None  # a Hugging Face folder; null: without adapters, or the weights training starts from

    @property
    def used(self) -> bool:
        """Whether there is a reference model at all."""
        return self.loss > 0 or self.reward > 0


@dataclass(frozen=True)
class NoveltyConfig:
    """A reward for answers that are unlike those before (random network distillation, arXiv
    1810.12894), from the policy's final hidden states.
    """

    coefficient: float = 0.0  # of the reward, which is in deviations, beside those of functions; 0: none
    width: int = 128  # hidden features of the two networks
    outputs: int = 64  # numbers that one of them draws and the other one learns
    lr: float = 1e-3  # learning rate of the one that learns
    updates: int = 4  # times that it learns the answers of a draw


@dataclass(frozen=True)
class RlConfig:
    """What is learned from the rewards; null is what the paper of the algorithm has."""

    algorithm: Algorithm = "grpo"  # the loss (docs/losses.md)
    advantage: Estimator | None = None  # what an answer is compared with; null: of the algorithm
    updates: int = 1  # updates in which the answers of a step are trained, train.global_batch of them in each
    epochs: int = 1  # passes over the answers of a step
    packing: bool = False  # answers of a microbatch in one row, which do not see each other; else a row each, padded
    shared_prefix: SharedPrefix = "auto"  # a prompt once in a row, its answers behind it: where it is cheaper, on, off
    low: float | None = None  # a ratio is clipped below 1 - low
    high: float | None = None  # and above 1 + high
    dual_clip: float | None = None  # bound of the ratio for negative advantages
    entropy_coef: float = 0.0  # weight of the entropy that is added to the objective
    opsm: float | None = None  # nats a token after which a sequence of negative advantage is left out
    mask_truncated: bool = False  # answers that were cut at max_new_tokens are not trained
    overlong_cache: int = 0  # last tokens of max_new_tokens in which a penalty grows to 1 (DAPO); 0: none
    recompute: bool = False  # old log-probs from the trainer, not from the sampler
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)
    show: int = 1  # answers of a step that are shown; all are in RUN/rollouts.jsonl


@dataclass(frozen=True)
class ExpertConfig:
    """Demonstrations that are trained beside the answers, in one loss; rows as for `megallm sft`,
    read with the tokenizer, template and seq_len of the section `data` (CHORD, arXiv 2508.11408;
    PPO-ptx, arXiv 2203.02155).
    """

    sources: dict[str, float | None] = field(default_factory=dict)  # file or pattern -> weight; empty: none
    batch: int = 16  # demonstrations beside the answers of each update
    mix: Literal["chord", "ptx"] = "chord"  # (1 - mu) policy + mu NLL; or policy + mu NLL (PPO-ptx)
    mu_peak: float = 0.9  # mu after its warm-up; with ptx the coefficient, which may exceed 1
    mu_valley: float | None = 0.05  # mu at the end of its decay; null: mu_peak, it stays
    mu_warmup_steps: int = 0  # first steps, in which mu rises from 0
    mu_decay_steps: int = 200  # steps in which it falls, along a cosine
    phi: bool = False  # a demonstration's token weighs p (1 - p): CHORD-phi, with mu_peak 0.1 and mu_valley null


@dataclass(frozen=True)
class GrpoConfig(FinetuneConfig):
    """Everything about one run of `megallm grpo`: a step is a rollout and its updates."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_model: RewardScorerConfig = field(default_factory=RewardScorerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)

    @property
    def shown(self) -> ChatDataConfig:
        """Returns the section of the demonstrations."""
        return replace(self.data, sources=self.expert.sources, valid_sources={})

    @property
    def kind(self) -> RowKind:
        """Returns what the rows of its files are read as."""
        return "prompts"

    @property
    def reads(self) -> tuple[tuple[RowKind, dict[str, float | None]], ...]:
        """Returns all sources, and what the rows of their files are read as."""
        return (*super().reads, ("sft", self.expert.sources))

    @property
    def prompts(self) -> int:
        """Returns the number of prompts of a step."""
        return self.train.global_batch * self.rl.updates // self.sampling.group


@dataclass(frozen=True)
class CriticConfig:
    """The value model beside the policy, and what advantages are made of with it."""

    model: str | None = None  # folder or run that it starts from, such as a reward model; null: the policy's start
    lr: float | None = None  # its learning rate; null: optim.lr
    clip: float | None = 0.2  # values leave those of the rollout by at most that; null: as far as they like
    gamma: float = 1.0  # discount of a token
    lam: float = 0.95  # of generalised advantage estimation (arXiv 1506.02438)
    reward_clip: float | None = 10.0  # rewards are clipped to +- this
    warmup_steps: int = 0  # first steps in which only the critic is trained


@dataclass(frozen=True)
class PpoRlConfig(RlConfig):
    """What is learned from the rewards, with a critic."""

    algorithm: Algorithm = "ppo"  # the loss (docs/losses.md)


@dataclass(frozen=True)
class PpoConfig(GrpoConfig):
    """Everything about one run of `megallm ppo`."""

    rl: PpoRlConfig = field(default_factory=PpoRlConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
