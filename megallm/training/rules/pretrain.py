"""Rules about what a pre-training run reads: sources, split, segments, objective. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megallm.base.errors import UsageError
from megallm.data import objective
from megallm.data.megatron.order import parse_split
from megallm.data.stream.plan import CONCAT, CONTEXT
from megallm.models.config import VOCABULARY_HEADS
from megallm.training.config import MaskingConfig, PretrainConfig, SegmentConfig
from megallm.training.reading import uses_fim
from megallm.training.rules.files import placeholders
from megallm.training.rules.layout import row_length
from megallm.training.rules.problem import Facts, Problem, Rules
from megallm.training.rules.ranges import COUNT, SEED, Range


def sources(config: PretrainConfig) -> Iterator[Problem]:
    """Yields what is wrong with `data.sources`, `data.valid_sources` and what goes with them."""
    data = config.data
    if not data.sources:
        yield Problem(
            "sources",
            "data.sources is empty; give at least one, such as data.sources.PREFIX=1.",
            (),
        )
    for name, prefixes in (
        ("data.sources", data.sources),
        ("data.valid_sources", data.valid_sources),
    ):
        for prefix, weight in prefixes.items():
            if weight is not None and weight <= 0:
                yield Problem(
                    "sources", f"{name}.{prefix} is {weight}; a weight must be greater than 0.", ()
                )
        bare = [prefix for prefix, weight in prefixes.items() if weight is None]
        filled = {name: {prefix: weight or 1.0 for prefix, weight in prefixes.items()}}
        if bare and len(bare) < len(prefixes):
            sentence = (
                f"{name}.{bare[0]} has no weight, but others have: give all of them one, or none."
            )
            yield Problem("sources", sentence, (filled,))
        elif bare and data.order != "megatron":
            sentence = (
                f"{name}.{bare[0]} has no weight, which data.order {data.order} needs "
                "(megatron: by size)."
            )
            yield Problem("sources", sentence, (filled,))
    yield from _only_megatron(config)
    yield from _own_validation(config)


def _only_megatron(config: PretrainConfig) -> Iterator[Problem]:
    data, train = config.data, config.train
    for key, value in (("data.samples", data.samples), ("data.surplus", data.surplus)):
        if value is not None and data.order != "megatron":
            yield Problem(
                "samples",
                f"{key} is {value}, which data.order {data.order} does not read.",
                ({key: None},),
            )
    needed = (train.stop_at or train.steps) * train.global_batch
    if data.order == "megatron" and data.samples is not None and data.samples < needed:
        sentence = f"data.samples is {data.samples}, but the run reads {needed}."
        yield Problem("samples", sentence, ({"data.samples": needed}, {"data.samples": None}))


def _own_validation(config: PretrainConfig) -> Iterator[Problem]:
    data = config.data
    try:
        whole = parse_split(data.split)[0] == 1
    except UsageError:
        return  # said by the rule of data.split
    if data.valid_sources and not whole:
        sentence = (
            "data.valid_sources is validation data of its own, but data.split "
            f"'{data.split}' also keeps a "
        )
        sentence += "part of data.sources from training."
        yield Problem(
            "valid_sources", sentence, ({"data.split": "100,0,0"}, {"data.valid_sources": {}})
        )


def unfilled_data(config: PretrainConfig) -> Iterator[Problem]:
    """Yields paths of the data that a script's author left to be filled in."""
    data = config.data
    sources = [("data.sources", prefix) for prefix in data.sources]
    sources += [("data.valid_sources", prefix) for prefix in data.valid_sources]
    yield from placeholders([("data.tokenizer", data.tokenizer), *sources])


def segments(config: PretrainConfig) -> Iterator[Problem]:
    """Yields what is wrong with `data.segments` and with what goes with the stream only."""
    data = config.data
    if data.order != "stream":
        for key, given in (("segments", data.segments), ("fim.rate", data.fim.rate)):
            if given:
                value = f" {given:g}" if key == "fim.rate" else ""
                sentence = f"data.{key}{value} needs data.order stream."
                yield Problem("segments", sentence, ({"data.order": "stream"},))
        return
    before = 0
    for number, segment in enumerate(data.segments):
        last = number + 1 == len(data.segments)
        for sentence in _segment(data.sources, f"data.segments[{number}]", segment, before, last):
            yield Problem("segments", sentence, ({"data.segments": ()},))
        before = segment.until_tokens or before
    packings = {data.packing, *(segment.packing for segment in data.segments)}
    if uses_fim(config) and data.fim.form == CONTEXT and CONCAT in packings:
        sentence = "data.fim.form context needs packing best_fit: rearranging changes lengths."
        yield Problem("segments", sentence, ({"data.fim.form": "document"},))


def _segment(
    known: Mapping[str, Any], name: str, segment: SegmentConfig, before: int, last: bool
) -> Iterator[str]:
    """Yields sentences about one segment, which begins after `before` tokens."""
    until, weights = segment.until_tokens, segment.sources
    if until is None and not last:
        yield f"{name} has no until_tokens, so the segments after it would never begin."
    elif until is not None and until <= before:
        yield (
            f"{name}.until_tokens is {until}; it must be greater than {before}, where the "
            "segment begins."
        )
    unknown = [prefix for prefix in weights or {} if prefix not in known]
    if unknown:
        yield f"{name}.sources names {unknown[0]}, which data.sources does not have."
    if weights is not None and not any(weight > 0 for weight in weights.values()):
        yield f"{name}.sources has no source with a weight above 0."
    if any(weight < 0 for weight in (weights or {}).values()):
        yield f"{name}.sources has a weight below 0."
    if segment.seq_len is not None and segment.seq_len < 1:
        yield f"{name}.seq_len is {segment.seq_len}; it must be at least 1."
    if segment.fim_rate is not None and not 0 <= segment.fim_rate <= 1:
        yield f"{name}.fim_rate is {segment.fim_rate:g}; it must be between 0 and 1."


def split(config: PretrainConfig) -> Iterator[Problem]:
    """Yields a split that leaves nothing to train on, or nothing for the held-out loss."""
    fixes: tuple[dict[str, Any], ...] = ({"data.split": _DEFAULTS.data.split},)
    try:
        train, valid, _ = parse_split(config.data.split)
    except UsageError as error:
        yield Problem("split", str(error), fixes)
        return
    if train == 0:
        yield Problem(
            "split", f"data.split '{config.data.split}' leaves nothing for training.", fixes
        )
    elif config.eval.batches > 0 and valid == 0 and not config.data.valid_sources:
        sentence = (
            f"data.split '{config.data.split}' leaves nothing for validation, but eval.batches is "
        )
        sentence += f"{config.eval.batches}: the held-out loss is wanted, at least at the end."
        yield Problem("split", sentence, ({"eval.batches": 0, "eval.every": 0}, *fixes))


def pretrain_sequence(facts: Facts) -> Iterator[Problem]:
    """Yields lengths of rows that the layout or the model's positions refuse."""
    data = facts.config.data
    yield from row_length(facts, data.seq_len)
    for number, segment in enumerate(data.segments):
        key = f"data.segments[{number}].seq_len"
        for problem in row_length(facts, segment.seq_len, key) if segment.seq_len else ():
            fixes = tuple(fix for fix in problem.fixes if key not in fix)
            yield dataclasses.replace(problem, fixes=fixes or ({"data.segments": ()},))


def further(facts: Facts) -> Iterator[Problem]:
    """Yields a depth of multi-token prediction that reaches beyond a row."""
    depth, data = facts.model.mtp.depth, facts.config.data
    lengths = [data.seq_len] + [segment.seq_len for segment in data.segments if segment.seq_len]
    if depth >= min(lengths):
        sentence = (
            f"model.mtp.depth {depth} looks further ahead than a row of {min(lengths)} "
            "tokens reaches."
        )
        fixes: tuple[dict[str, Any], ...] = ({"model.mtp.depth": min(lengths) - 1},)
        yield Problem(
            "further", sentence, fixes + ({"data.seq_len": depth + 1},) * (len(lengths) == 1)
        )


def objectives(facts: Facts) -> Iterator[Problem]:
    """Yields what `data.objective` and the resolved model do not have in common."""
    config, model, data = facts.config, facts.model, facts.config.data
    ahead = data.objective == objective.NEXT_TOKEN
    if model.head not in VOCABULARY_HEADS:
        sentence = (
            f"model.head {model.head} gives no probabilities of tokens, which megallm "
            "pretrain learns."
        )
        yield Problem(
            "objective",
            sentence,
            ({"model.head": "lm" if ahead else "mlm", "model.num_labels": None},),
        )
    if ahead and not model.causal:
        sentence = (
            "model.causal is false: the model sees the next token, which "
            "data.objective next_token has it "
        )
        sentence += "predict. Hide tokens instead, or look back only."
        yield Problem("objective", sentence, ({"data.objective": "mlm"}, {"model.causal": True}))
    elif not ahead and model.causal:
        sentence = (
            f"data.objective {data.objective} hides tokens that both sides tell about, "
            "but model.causal is "
        )
        sentence += "true: the model looks back only."
        yield Problem(
            "objective", sentence, ({"model.causal": False}, {"data.objective": "next_token"})
        )
    if not ahead and uses_fim(config):
        sentence = (
            "data.fim.rate rearranges texts for data.objective next_token, not for "
            f"{data.objective}."
        )
        quiet = tuple(dataclasses.replace(segment, fim_rate=None) for segment in data.segments)
        yield Problem("objective", sentence, ({"data.fim.rate": 0.0, "data.segments": quiet},))
    masking, usual = data.masking, MaskingConfig()
    for name in () if data.objective == objective.MLM else vars(usual):
        given, default = getattr(masking, name), getattr(usual, name)
        if given != default and (ahead or name != "token"):
            sentence = (
                f"data.masking.{name} is {given}, which data.objective "
                f"{data.objective} does not read."
            )
            yield Problem("objective", sentence, ({f"data.masking.{name}": default},))
    if masking.masked + masking.random > 1:
        sentence = (
            f"data.masking.masked {masking.masked:g} and data.masking.random "
            f"{masking.random:g} are shares of "
        )
        sentence += "the same tokens: together at most 1."
        yield Problem(
            "objective", sentence, ({"data.masking.random": round(1 - masking.masked, 12)},)
        )


def inferred_pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Returns the seed of the data, which is the run's unless it has one of its own."""
    return {"data.seed": config.run.seed if config.data.seed is None else config.data.seed}


_DEFAULTS = PretrainConfig()
_MASKING = tuple(f"data.masking.{name}" for name in ("rate", "masked", "random"))
RULES = Rules(
    given=(split, sources, unfilled_data, segments),
    resolved={
        pretrain_sequence: ("layout.tp", "layout.cp", "data.seq_len", "model.max_positions"),
        further: ("model.mtp.depth", "data.seq_len"),
        objectives: (*_MASKING, "data.fim.rate", "model.head"),
    },
    ranges={
        "data.seed": SEED,
        "data.seq_len": COUNT,
        "data.window": COUNT,
        "data.samples": Range(low=1, high=10**15),
        "data.surplus": Range(low=0, high=1000),
        "data.masking.rate": Range(above=0, high=1),
        "data.masking.masked": Range(low=0, high=1),
        "data.masking.random": Range(low=0, high=1),
        "data.fim.rate": Range(low=0, high=1),
        "data.fim.spm": Range(low=0, high=1),
    },
    inferred=inferred_pretrain,
)
