"""The configuration of every trainer on conversations, and what can be known of its files before
any process starts. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from megallm.base.errors import DataError, MegallmError
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import RowKind, detect_format
from megallm.data.chat.prepare import files_of, template_of
from megallm.data.chat.records import records
from megallm.data.text import tokenizer
from megallm.peft.config import PeftConfig
from megallm.run.config import JobConfig


@dataclass(frozen=True)
class FinetuneConfig(JobConfig):
    """The sections of every run, conversations, adapters, and what is frozen."""

    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    freeze: tuple[str, ...] = ()  # parameters that are not trained, by logical name: embedding.*, layers.[0-3].*

    @property
    def kind(self) -> RowKind:
        """Returns what the rows of its files are read as."""
        raise NotImplementedError


@dataclass(frozen=True)
class SftOptions:
    """What supervised fine-tuning adds to the loss and to the model while it is trained."""

    dft: bool = False  # each token's loss times its own probability (dynamic fine-tuning, arXiv 2508.05629)
    hidden_dropout: float = 0.0  # share dropped of embeddings and of outputs of attention and feed-forward layers
    neftune_alpha: float = 0.0  # NEFTune (arXiv 2310.05914): noise on embeddings, alpha / sqrt(tokens x features)


KINDS_OF_HEADS: dict[str, RowKind] = {
    "classification": "classification",
    "value": "regression",
}


@dataclass(frozen=True)
class SftConfig(FinetuneConfig):
    """Everything about one run of `megallm sft`; a classification or value head makes it one of
    labelled rows.
    """

    sft: SftOptions = field(default_factory=SftOptions)

    @property
    def kind(self) -> RowKind:
        """Returns the kind that belongs to the head of the resolved model."""
        return KINDS_OF_HEADS.get(self.model.head or "lm", "sft")


def chat_vocab(config: FinetuneConfig) -> int | None:
    """Returns the size of `data.tokenizer`; None where the model comes with its own."""
    model, spec = config.model, config.data.tokenizer
    if spec is None or model.hf is not None or model.init is not None:
        return None
    return tokenizer.load(spec).vocab_size


def check_chat_files(config: FinetuneConfig) -> None:
    """Looks as far as the first row of each file tells; the ranks read all rows before the first
    step. The configuration is checked and resolved. Errors: one `DataError` that lists what is
    missing or of another kind.
    """
    problems = list(chat_file_problems(config))
    if problems:
        head = [] if len(problems) == 1 else [f"{len(problems)} problems with the files:"]
        raise DataError("\n  ".join([*head, *problems]))


def chat_file_problems(config: FinetuneConfig) -> Iterator[str]:
    """Yields a sentence for each file, tokenizer and template that training could not use."""
    data = config.data
    try:
        words = tokenizer.load(data.tokenizer)
        template_of(data, words)
    except MegallmError as error:
        yield str(error)
    for sources in (data.sources, data.valid_sources):
        try:
            names = files_of(sources)
        except DataError as error:
            yield str(error)
            continue
        for name in names:
            try:
                with closing(records(name)) as rows:
                    first = next(rows, None)
                if first is not None and first.row is not None:
                    detect_format(name, first.row, config.kind)
            except DataError as error:
                yield str(error)
