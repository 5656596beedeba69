"""Rules about the sources of a run: their weights, validation data of its own, placeholders.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.base.paths import is_placeholder
from megallm.data.megatron.order import parse_split
from megallm.training.config import PretrainConfig

Fault = tuple[str, str, tuple[dict[str, Any], ...]]  # (rule, sentence, remedies)

def source_faults(config: PretrainConfig) -> Iterator[Fault]:
    """What is wrong with `data.sources`, `data.valid_sources` and what goes with them."""
    data = config.data
    if not data.sources:
        yield (
            "sources",
            "data.sources is empty; give at least one, such as data.sources.PREFIX=1.",
            (),
        )
    for name, sources in (
        ("data.sources", data.sources),
        ("data.valid_sources", data.valid_sources),
    ):
        for prefix, weight in sources.items():
            if weight is not None and weight <= 0:
                yield (
                    "sources",
                    f"{name}.{prefix} is {weight}; a weight must be greater than 0.",
                    (),
                )
        bare = [prefix for prefix, weight in sources.items() if weight is None]
        filled = {name: {prefix: weight or 1.0 for prefix, weight in sources.items()}}
        if bare and len(bare) < len(sources):
            sentence = (
                f"{name}.{bare[0]} has no weight, but others have: give all of them one, or none."
            )
            yield "sources", sentence, (filled,)
        elif bare and data.order != "megatron":
            sentence = f"{name}.{bare[0]} has no weight, which data.order {data.order} needs (megatron: by size)."
            yield "sources", sentence, (filled,)
    yield from _only_megatron(config)
    yield from _own_validation(config)


def _only_megatron(config: PretrainConfig) -> Iterator[Fault]:
    data, train = config.data, config.train
    for key, value in (("data.samples", data.samples), ("data.surplus", data.surplus)):
        if value is not None and data.order != "megatron":
            yield (
                "samples",
                f"{key} is {value}, which data.order {data.order} does not read.",
                ({key: None},),
            )
    needed = (train.stop_at or train.steps) * train.global_batch
    if data.order == "megatron" and data.samples is not None and data.samples < needed:
        sentence = f"data.samples is {data.samples}, but the run reads {needed}."
        yield "samples", sentence, ({"data.samples": needed}, {"data.samples": None})


def _own_validation(config: PretrainConfig) -> Iterator[Fault]:
    data = config.data
    try:
        whole = parse_split(data.split)[0] == 1
    except UsageError:
        return  # said by the rule of data.split
    if data.valid_sources and not whole:
        sentence = f"data.valid_sources is validation data of its own, but data.split '{data.split}' also keeps a "
        sentence += "part of data.sources from training."
        yield "valid_sources", sentence, ({"data.split": "100,0,0"}, {"data.valid_sources": {}})


def placeholder_faults(config: PretrainConfig) -> Iterator[Fault]:
    """Paths that a script's author left to be filled in; a file that is really called so is
    none.
    """
    paths = [
        ("run.dir", config.run.dir),
        ("data.tokenizer", config.data.tokenizer),
        ("model.hf", config.model.hf),
    ]
    paths += [("data.sources", prefix) for prefix in config.data.sources]
    paths += [("data.valid_sources", prefix) for prefix in config.data.valid_sources]
    for key, path in paths:
        if (
            path
            and is_placeholder(path)
            and not any(Path(f"{path}{end}").exists() for end in ("", ".idx"))
        ):
            yield (
                "placeholder",
                f"{key} {path} stands for something that is to be filled in; give the real one.",
                (),
            )
