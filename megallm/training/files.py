"""Whether what a configuration names is there: data files, tokenizer, documents in each split. No
torch.

`megallm config` and `megallm pretrain` ask before any process starts; the ranks look closer.
"""

from __future__ import annotations

from collections.abc import Iterator

from megallm.base.errors import DataError, MegallmError
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.megatron.order import SPLITS, split_range
from megallm.data.stream.source import documents_of
from megallm.data.text import tokenizer
from megallm.training.config import PretrainConfig
from megallm.training.reading import check_tokenizers, tokenizer_of, tokenizer_warning


def check_pretrain_files(config: PretrainConfig) -> None:
    """Errors: one `DataError` that lists everything missing or unusable; the configuration is
    checked and resolved.
    """
    problems = list(pretrain_file_problems(config))
    if problems:
        lines = (
            problems
            if len(problems) == 1
            else [f"{len(problems)} problems with the files:", *problems]
        )
        raise DataError("\n  ".join(lines))


def pretrain_file_problems(config: PretrainConfig) -> Iterator[str]:
    """Yields a sentence for each dataset, split or tokenizer that training could not use."""
    whole = True
    for prefix in config.data.prefixes:
        try:
            data = IndexedDataset(prefix)
            if prefix in config.data.sources:
                yield from _empty_splits(config, data)
        except DataError as error:
            whole = False
            yield str(error)
    try:
        spec = tokenizer_of(config)
        if spec is not None:
            tokenizer.load(spec)
        if whole:
            check_tokenizers(config)
            tokenizer_warning(config)
    except MegallmError as error:
        yield str(error)


def _empty_splits(config: PretrainConfig, data: IndexedDataset) -> Iterator[str]:
    """Splits that will be read and hold nothing: no document in the stream, no sequence in
    Megatron's order.
    """
    split = config.data.split
    held_out = config.eval.batches and not config.data.valid_sources
    for which in SPLITS[:2] if held_out else SPLITS[:1]:
        try:
            low, high = split_range(split, which, len(data))
            if config.data.order == "stream":
                documents_of(data, split, which)
            elif low == high:
                raise DataError(
                    f"{data.prefix}: the split '{which}' of {split} holds none of the {len(data)} "
                    "sequences: give this source more, or the split a larger share."
                )
        except DataError as error:
            yield f"{error}" + (
                " Or train without a held-out loss: eval.batches=0." if which != SPLITS[0] else ""
            )
