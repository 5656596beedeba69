"""The configuration of a pretraining run: the sections of every run (`run.config`) and its
data. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megallm.run.config import JobConfig
from megallm.training import other_names


@dataclass(frozen=True)
class FimConfig:
    """Fill in the middle (arXiv 2207.14255), in the stream order."""

    rate: float = 0.0  # share of the documents that are rearranged
    spm: float = 0.5  # share of those in the form suffix, prefix, middle; the rest are prefix, suffix, middle
    form: Literal["document", "context"] = "document"  # rearrange whole documents, or what a row holds of them
    tokens: tuple[str, str, str] | None = None  # names or ids of prefix, suffix, middle; null: those well known


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens the objectives mlm and diffusion hide (BERT, arXiv 1810.04805; LLaDA, arXiv
    2502.09992).
    """

    token: str | None = None  # name or id of the mask token; null: the tokenizer's [MASK] or <mask>
    rate: float = 0.15  # mlm: share of the tokens to predict
    masked: float = 0.8  # mlm: share of those that become the mask token
    random: float = 0.1  # mlm: share of those that become a random token; the rest stay
    whole_word: bool = False  # mlm: choose whole words


@dataclass(frozen=True)
class SegmentConfig:
    """A stretch of the stream; null: as in `data`. The last one holds to the end."""

    until_tokens: int | None = None  # places of rows (tokens and padding) read when the next segment begins
    sources: dict[str, float] | None = None  # prefix of data.sources -> weight; the others rest
    seq_len: int | None = None  # tokens per sample
    fim_rate: float | None = None  # share of the documents that are rearranged
    packing: Literal["best_fit", "concat"] | None = None  # no cut of what fits, or back to back in chunks


@dataclass(frozen=True)
class DataConfig:
    """Which tokens are read, and in which order."""

    sources: dict[str, float | None] = field(default_factory=dict)  # prefix of .bin/.idx -> weight (null: by size)
    valid_sources: dict[str, float | None] = field(default_factory=dict)  # validation data of its own, read whole
    split: str = "969,30,1"  # shares of train, validation and test
    seq_len: int = 1024  # tokens per sample
    order: Literal["megatron", "stream"] = "stream"  # stream: packed documents, exactly once; megatron: its samples
    samples: int | None = None  # megatron: samples that its order is made for; null: train.steps x train.global_batch
    surplus: float | None = None  # megatron: share built of a source beyond its own; null: 0.005, for one alone 0
    seed: int | None = None  # of the sample order; null: run.seed
    tokenizer: str | None = None  # tokenizer folder or 'bytes'; null: what the sources were made with
    log_samples: bool = False  # append what each rank consumed to RUN/samples.jsonl
    packing: Literal["best_fit", "concat"] = "best_fit"  # stream: no cut of what fits, or back to back in chunks
    window: int = 256  # stream: rows packed and shuffled together
    document_masks: bool = True  # stream: documents of a row do not see each other
    objective: Literal["next_token", "mlm", "diffusion"] = "next_token"  # the last two: model.causal false
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    fim: FimConfig = field(default_factory=FimConfig)
    segments: tuple[SegmentConfig, ...] = ()  # stream: changes of weights, length, ... on the way

    @property
    def prefixes(self) -> list[str]:
        """Every dataset that the run reads, training data first."""
        return list(dict.fromkeys([*self.sources, *self.valid_sources]))


@dataclass(frozen=True)
class PretrainConfig(JobConfig):
    """Everything about one pretraining run."""

    OTHER_NAMES: ClassVar[Mapping[str, str]] = other_names.KEYS

    data: DataConfig = field(default_factory=DataConfig)
