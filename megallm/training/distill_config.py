"""The sections and the configuration of `megallm distill`. No torch.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.data.chat.formats import RowKind
from megallm.training.finetune import FinetuneConfig

TeacherKind = Literal["live", "stored", "adapter_off"]


@dataclass(frozen=True)
class TeacherConfig:
    """The model that is learned from, of the student's tokenizer."""

    kind: TeacherKind | None = None  # null: adapter_off where no model is named, stored where a store is, else live
    model: str | None = None  # Hugging Face, run or step folder
    layout: dict[str, int] = field(default_factory=dict)  # live: another one over the same ranks: {tp: 4, pp: 2}
    store: str | None = None  # stored: folder of its top k log-probs; null: made in cache/teacher of the run folder
    top_k: int = 64  # stored: likeliest tokens that are kept of each position
    tail: Literal["rest", "renormalize"] = "rest"  # stored: all other tokens as one class, or both sides without them


@dataclass(frozen=True)
class DistillOptions:
    """How the student is compared with its teacher, and on whose answers."""

    loss: Literal["jsd", "reverse_kl_reward"] = "jsd"  # divergence over the vocabulary, or a reward of sampled tokens
    beta: float = 0.5  # jsd: generalised Jensen-Shannon divergence (arXiv 2306.13649); 0: forward KL, 1: reverse KL
    temperature: float = 0.9  # of both distributions, and of the answers that are drawn
    lmbda: float | None = None  # share of the steps on the student's own answers; null: 0.5, stored 0, reward 1
    nll: float = 0.0  # jsd: weight of the negative log-likelihood of the labels beside the divergence
    max_new_tokens: int = 256  # longest answer that is drawn
    stop: tuple[str, ...] = ()  # texts that end an answer, beside the tokenizer's and the template's end
    batch: int = 64  # sequences that a data rank decodes together


@dataclass(frozen=True)
class DistillConfig(FinetuneConfig):
    """Everything about one run of `megallm distill`."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillOptions = field(default_factory=DistillOptions)

    @property
    def kind(self) -> RowKind:
        """Returns conversations: of the student's own answers only the prompts are read."""
        return "sft"

    @property
    def teacher_kind(self) -> TeacherKind:
        """Returns how the teacher is had."""
        given = self.teacher
        usual = "live" if given.model is not None else "adapter_off"
        return given.kind or ("stored" if given.store is not None else usual)

    @property
    def on_policy(self) -> float:
        """Returns the share of the steps whose answers the student draws."""
        if self.distill.lmbda is not None:
            return self.distill.lmbda
        if self.distill.loss == "reverse_kl_reward":
            return 1.0
        return 0.0 if self.teacher_kind == "stored" else 0.5
