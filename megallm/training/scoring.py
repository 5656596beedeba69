"""`megallm score`: the reward of every answer of a file, from a trained reward model at any
layout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megallm.base.errors import DataError, UsageError
from megallm.base.files import atomic_write_text
from megallm.data.chat.answers import Answers, read_answers
from megallm.data.chat.config import ChatDataConfig
from megallm.data.loader import Batch
from megallm.data.text import tokenizer
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine, Mesh
from megallm.inference.generate import find_place, find_tokenizer
from megallm.models.compute import ComputeConfig
from megallm.peft.adapted import AdaptedModel, open_adapted
from megallm.training.starting import check_source


@dataclass(frozen=True)
class ScoreRequest:
    """Which model scores which file. None: the tokenizer, template and precision of the model."""

    model: str
    input: str
    output: str
    adapter: str | None = None  # as `megallm generate` takes it
    tokenizer: str | None = None
    template: str | None = None
    strings: str = "plain"  # prompts and completions that are texts: plain, or messages
    precision: str | None = None
    batch: int = 16  # answers a data rank scores at once


def run(request: ScoreRequest, mesh: Mesh) -> int:
    """Write the rows of `request.input` to `request.output`, each with its `reward`, or `rewards`
    where it has several answers: chosen and rejected, or as the completions stand. Returns the
    number of answers; collective over the world.

    The file appears when it is whole. Errors: UsageError for a model without a score, DataError for
    rows.
    """
    with open_adapted(find_place(request.model, mesh), request.adapter, mesh) as opened:
        spec, folder = find_tokenizer(opened.reader, request.tokenizer)
        engine = load(opened, request, mesh)
    words = tokenizer.load(spec)
    known = engine.config.model
    config = ChatDataConfig(
        tokenizer=str(folder) if request.template is None and folder is not None else spec,
        template=request.template,
        strings=request.strings,
        seq_len=known.max_positions,
    )
    rows = read_answers(request.input, config, words)
    sequences = [ids for row in rows for ids in row.sequences]
    largest = max(int(ids.max(initial=0)) for ids in sequences)
    if largest >= known.vocab_size:
        raise DataError(
            f"{request.input} has the token {largest}, but the model has {known.vocab_size}: its "
            "tokenizer is another one. Give --tokenizer DIR."
        )
    rewards = score(engine, sequences, request.batch)
    if mesh.rank == 0:
        lines = (json.dumps(row, ensure_ascii=False) for row in scored(rows, rewards))
        atomic_write_text(Path(request.output), "".join(f"{line}\n" for line in lines))
    return len(sequences)


def load(opened: AdaptedModel, request: ScoreRequest, mesh: Mesh) -> Engine:
    """Returns an engine with the model's weights, nothing of it trained; collective over the
    world. Errors: UsageError for another head.
    """
    _check_head(opened, f"--model {request.model}")
    return _frozen(opened, request.precision or opened.reader.meta["precision"], mesh)


def _check_head(opened: AdaptedModel, given: str) -> None:
    if opened.model.head != "value":
        raise UsageError(
            f"{given} has the head {opened.model.head}, which gives no score; "
            "`megallm reward` trains one (model.head value, *ForSequenceClassification with one "
            "label)."
        )


def _frozen(opened: AdaptedModel, precision: str, mesh: Mesh) -> Engine:
    config = EngineConfig(opened.model, compute=ComputeConfig(precision))
    fill = opened.prepare_adapters

    def prepare(stage: Any) -> None:
        if fill is not None:
            fill(stage)
        stage.requires_grad_(False)

    engine = Engine(config, mesh, prepare)
    engine.fill(opened.source)
    return engine


@dataclass(frozen=True)
class OpenedFrozen:
    """A model that is not trained, with its tokenizer and what names that."""

    engine: Engine
    words: tokenizer.Tokenizer
    spec: str


def open_frozen(model: str, mesh: Mesh, precision: str, scores: bool = False) -> OpenedFrozen:
    """Returns the model of a run or a Hugging Face folder, with the adapter that the run holds, of
    any size; with `scores` one that gives scores. Collective over the world.

    Errors: UsageError for a model with another head than is wanted.
    """
    key = "reward_model.model" if scores else "judge.model"
    check_source(key, model)
    with open_adapted(find_place(model, mesh), None, mesh) as opened:
        if scores:
            _check_head(opened, f"{key} {model}")
        elif opened.model.head != "lm" or not opened.model.causal:
            raise UsageError(
                f"{key} {model} has the head {opened.model.head}; a judge answers in words."
            )
        spec, folder = find_tokenizer(opened.reader, None)
        engine = _frozen(opened, precision, mesh)
    return OpenedFrozen(engine, tokenizer.load(spec), spec if folder is None else str(folder))


open_scorer = partial(open_frozen, scores=True)


def score(engine: Engine, sequences: Sequence[np.ndarray], batch: int) -> list[float]:
    """Returns the value of the last token of each sequence, in their order, on every rank;
    collective over the world. Sequences of like length are computed together.
    """
    mesh, found = engine.mesh, np.zeros(len(sequences))
    multiple = 2 * mesh.cp.size * mesh.tp.size
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    size = batch * mesh.data.size
    for begin in range(0, len(order), size):
        group = order[begin : begin + size]
        length = -(-len(sequences[group[0]]) // multiple) * multiple
        mine = engine.mine(group)
        values = engine.values([_batch([sequences[i] for i in mine], batch, length)])[0]
        ends = [len(sequences[i]) - 1 for i in mine]
        told = [float(values[row, end]) for row, end in enumerate(ends)]
        found[group] = engine.all(told)
    return found.tolist()


def _batch(sequences: Sequence[np.ndarray], rows: int, length: int) -> Batch:
    tokens, mask, positions = torch.zeros((3, rows, length), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask[row, len(ids) - 1] = 1
        positions[row, : len(ids)] = torch.arange(len(ids))
    return {
        "tokens": tokens,
        "labels": torch.zeros_like(tokens),
        "positions": positions,
        "mask": mask.bool(),
    }


def scored(rows: Sequence[Answers], rewards: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the rows with their rewards."""
    left = iter(rewards)
    made = []
    for row in rows:
        own = [next(left) for _ in row.sequences]
        made.append(row.row | ({"rewards": own} if row.several else {"reward": own[0]}))
    return made
