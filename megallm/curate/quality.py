"""Quality rules with reason codes: Gopher (Rae et al. 2021, A.1.1), C4 (Raffel et al. 2020, 2.2),
FineWeb (Penedo et al. 2024, 3.6) and, for code, StarCoder (Li et al. 2023, 3.1).

All rules are rows of one table: a metric and its limit in each profile. Metrics are arrays over the
batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from megallm.base import extension, suggest
from megallm.base.errors import UsageError
from megallm.curate import repetition, stopwords
from megallm.curate.config import QualityConfig
from megallm.curate.document import KEEP, DocumentBatch, TextSpan, Verdict, drop, edit
from megallm.curate.folding import LETTER, SOLO
from megallm.curate.text import Analysis, Pieces, lowered, segment_sums

NONE = None


@dataclass(frozen=True)
class QualityRule:
    """Drop when `metric` is below (or above) the limit of the profile; None: the profile does not
    have the rule.
    """

    reason: str
    metric: str
    below: bool
    web: float | None
    docs: float | None
    code: float | None


RULES = (
    QualityRule("too_few_words", "words", True, 50, 20, 10),
    QualityRule("too_many_words", "words", False, 100_000, 1_000_000, 200_000),
    QualityRule("mean_word_length_low", "mean_word_length", True, 3.0, 2.5, NONE),
    QualityRule("mean_word_length_high", "mean_word_length", False, 10.0, 12.0, NONE),
    QualityRule("symbol_words", "symbol_word_ratio", False, 0.1, NONE, NONE),
    QualityRule("bullet_lines", "bullet_line_share", False, 0.9, 0.95, NONE),
    QualityRule("ellipsis_lines", "ellipsis_line_share", False, 0.3, 0.3, NONE),
    QualityRule("alphabetic_words", "alphabetic_word_share", True, 0.8, 0.6, NONE),
    QualityRule("stop_words", "stop_words", True, 2, 2, NONE),
    QualityRule("dup_lines", "dup_line_share", False, 0.3, 0.45, 0.6),
    QualityRule("dup_line_chars", "dup_line_char_share", False, 0.2, 0.35, 0.5),
    QualityRule("dup_paragraphs", "dup_paragraph_share", False, 0.3, 0.45, NONE),
    QualityRule("dup_paragraph_chars", "dup_paragraph_char_share", False, 0.2, 0.35, NONE),
    QualityRule("top_2gram", "top_2gram", False, 0.20, 0.25, NONE),
    QualityRule("top_3gram", "top_3gram", False, 0.18, 0.22, NONE),
    QualityRule("top_4gram", "top_4gram", False, 0.16, 0.20, NONE),
    QualityRule("dup_5gram", "dup_5gram", False, 0.15, 0.45, NONE),
    QualityRule("dup_6gram", "dup_6gram", False, 0.14, 0.42, NONE),
    QualityRule("dup_7gram", "dup_7gram", False, 0.13, 0.39, NONE),
    QualityRule("dup_8gram", "dup_8gram", False, 0.12, 0.36, NONE),
    QualityRule("dup_9gram", "dup_9gram", False, 0.11, 0.33, NONE),
    QualityRule("dup_10gram", "dup_10gram", False, 0.10, 0.30, 0.60),
    QualityRule("lorem_ipsum", "lorem_ipsum", False, 0, 0, NONE),
    QualityRule("curly_bracket", "curly_brackets", False, 0, NONE, NONE),
    QualityRule("few_sentences", "sentences", True, 3, NONE, NONE),
    QualityRule("line_punctuation", "punctuated_line_share", True, 0.12, NONE, NONE),
    QualityRule("short_lines", "short_line_share", False, 0.67, NONE, NONE),
    QualityRule("newlines", "newlines_per_word", False, 0.3, NONE, NONE),
    QualityRule("long_line", "longest_line", False, NONE, NONE, 1000),
    QualityRule("mean_line_length", "mean_line_length", False, NONE, NONE, 100),
    QualityRule("alphanumeric_chars", "alphanumeric_share", True, NONE, 0.3, 0.25),
    QualityRule("digits", "digit_share", False, 0.5, 0.6, 0.5),
    QualityRule("encoded_data", "longest_word", False, 200, 400, 200),
    QualityRule("generated_code", "generated", False, NONE, NONE, 0),
)
_WORD_RULES = {
    "mean_word_length_low",
    "mean_word_length_high",
}  # say nothing where characters are words
_TERMINAL = np.array([ord(char) for char in ".!?\"'”’。！？…:;।؟"], np.uint32)
_BULLETS = np.array([ord(char) for char in "-*•‣◦▪·–●○"], np.uint32)
_SHORT_LINE_CHARS = 30
_CODE_HEAD_CHARS = 600
_GENERATED = re.compile(
    r"\b(?:auto[- ]?generated|generated (?:by|from|code)|do not (?:edit|modify))\b", re.IGNORECASE
)
# Whoever subscribes to one of these signs up for nothing.
_BELIEVED = (
    r" to (?:\w+ ){1,4}(?:views?|ideas?|theor(?:y|ies)|notions?|beliefs?|opinions?|philosoph(?:y|ies)"
    r"|schools?|doctrines?|principles?|faiths?|values?|ideals?|hypothes[ei]s)\b"
)
# Lists are matched by whole words: "Interior design in Berlin" asks nobody to sign in.
_BOILERPLATE = re.compile(
    r"\b(?:"
    # Wherever they stand in a short line.
    r"(?<!\bin )terms of (?:use|service)|privacy (?:policy|notice)"
    r"|cookies? (?:policy|settings|preferences|notice|consent)|use(?:s|d)? (?:of )?cookies"
    r"|(?:accept|reject|allow|manage|enable|disable|decline)(?: \w+)? cookies"
    r"|all rights reserved"
    r"|(?:enable|activate|requires?|supports?|turn on|without|need) javascript"
    r"|javascript (?:is |must |needs |has |seems |to )?(?:be |to be |been |not )*"
    r"(?:enabled|disabled|required|supported)"
    r"|(?:please|to|or|and|must|already|can|then|you|not|first) "
    r"(?!(?-i:(?:sign|log) in [A-Z]))(?:sign in|sign up|log ?in|subscribe)(?!" + _BELIEVED + ")"
    r")\b"
    # Where a line or a part of it begins; "Neon sign in Berlin" and "Cars powered by gas" stay.
    r"|(?:^|[|\u00b7\u2022\u00bb\u2013\u2014\u00a9,;:?!)\]]|\d{4}| [-/>])[ \t]*(?:powered by\b"
    r"|(?:sign in|sign up|log ?in|subscribe)(?![\w-])[ \t]*(?=$|[^\w\s]"
    r"|(?:to|with|here|or|now|for|using|as|via|if|by|and|today|free|page|required)\b))"
    r"|[|\u00b7\u2022][ \t]*cookies[ \t]*$|\bcookies[ \t]*[|\u00b7\u2022]",
    re.IGNORECASE,
)
# What a line must hold to be looked at: the expression alone takes twenty times as long.
_BOILERPLATE_HINTS = (
    "javascript", "cookie", "terms of ", "privacy ", "rights reserved", "powered by", "sign in",
    "sign up", "log in",
    "login", "subscribe",
)  # fmt: skip
_LOREM = re.compile(r"\blorem ipsum\b", re.IGNORECASE)
_BOILERPLATE_MAX_WORDS = 12  # longer lines are prose that happens to speak of it


def measure(
    analysis: Analysis,
    texts: Sequence[str],
    languages: list[str | None],
    wanted: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns every metric of every document, float64 [documents]; those that search the texts anew
    only when `wanted`.
    """
    words, lines = analysis.words, analysis.lines
    num_words, num_lines = words.counts, lines.counts
    ink = analysis.characters[0]
    out = _word_metrics(analysis, num_words) | _line_metrics(analysis, lines, num_lines)
    out["stop_words"] = stopwords.counts(analysis, languages)
    out["dup_line_share"], out["dup_line_char_share"] = repetition.duplicate_pieces(lines, ink)
    paragraphs = repetition.duplicate_pieces(analysis.paragraphs, ink)
    out["dup_paragraph_share"], out["dup_paragraph_char_share"] = paragraphs
    out |= repetition.word_repetition(analysis)
    out["newlines_per_word"] = analysis.newlines / np.maximum(num_words, 1)
    for name, search in _SEARCHES.items():
        if wanted is None or name in wanted:
            out[name] = np.array([search(text) for text in texts])
    return {name: np.asarray(values, np.float64) for name, values in out.items()}


def _speaks_lorem(text: str) -> bool:
    return ("psum" in text or "PSUM" in text) and _LOREM.search(text) is not None


_SEARCHES: dict[str, Callable[[str], bool]] = {
    "lorem_ipsum": _speaks_lorem,
    "curly_brackets": lambda text: "{" in text,
    "generated": lambda text: _GENERATED.search(text[:_CODE_HEAD_CHARS]) is not None,
}


def _word_metrics(analysis: Analysis, num_words: np.ndarray) -> dict[str, np.ndarray]:
    words = analysis.words
    some = np.maximum(num_words, 1)
    classes = analysis.word_classes
    ink, in_words, digits, symbols, three_dots, sentences = analysis.characters
    return {
        "words": num_words,
        "solo_word_share": segment_sums((classes & SOLO) > 0, words.offsets) / some,
        "mean_word_length": words.extent[0] / some,
        "longest_word": words.extent[1],
        "alphabetic_word_share": segment_sums((classes & LETTER) > 0, words.offsets) / some,
        "symbol_word_ratio": (symbols + three_dots / 3) / some,
        "sentences": sentences,
        "alphanumeric_share": in_words / np.maximum(ink, 1),
        "digit_share": digits / np.maximum(ink, 1),
    }


def _line_metrics(
    analysis: Analysis, lines: Pieces, num_lines: np.ndarray
) -> dict[str, np.ndarray]:
    bullets, ellipses, punctuated, short = _line_marks(analysis, lines) / np.maximum(num_lines, 1)
    return {
        "bullet_line_share": bullets,
        "ellipsis_line_share": ellipses,
        "punctuated_line_share": punctuated,
        "short_line_share": short,
        "mean_line_length": lines.extent[0] / np.maximum(num_lines, 1),
        "longest_line": lines.extent[1],
    }


def _line_marks(analysis: Analysis, lines: Pieces) -> np.ndarray:
    """Lines of each document that begin with a bullet, end with an ellipsis, end a sentence, are
    short: int64 [4, documents]."""
    native = extension.index()
    if native is not None:
        return native.line_marks(
            analysis.codes,
            lines.begin,
            lines.end,
            lines.offsets,
            _BULLETS,
            _TERMINAL,
            _SHORT_LINE_CHARS,
        )
    first, last = analysis.codes[lines.begin], analysis.codes[lines.end - 1]
    ellipsis = last == ord("…")
    long = np.flatnonzero(lines.lengths >= 3)
    end = lines.end[long]
    ellipsis[long] |= (analysis.codes[end[:, None] - np.arange(1, 4)] == ord(".")).all(axis=1)
    flags = (
        np.isin(first, _BULLETS),
        ellipsis,
        np.isin(last, _TERMINAL),
        lines.lengths < _SHORT_LINE_CHARS,
    )
    return np.stack([segment_sums(flag, lines.offsets) for flag in flags])


class Quality:
    """The step `quality`: drops with the first rule that a document breaks; the web profile cuts
    boilerplate lines.
    """

    name = "quality"

    def __init__(self, config: QualityConfig) -> None:
        names = [rule.reason for rule in RULES]
        for given in (*config.limits, *config.off):
            if given not in names:
                hint = suggest.did_you_mean(given, names)
                raise UsageError(
                    f"quality: the rule '{given}' does not exist.{hint} The rules are: "
                    f"{', '.join(names)}."
                )
        self._cut = config.boilerplate_lines and config.profile == "web"
        self.limits: list[tuple[QualityRule, float]] = []
        for rule in RULES:
            limits = {"web": rule.web, "docs": rule.docs, "code": rule.code}
            limit = config.limits.get(rule.reason, limits[config.profile])
            if limit is not None and rule.reason not in config.off:
                self.limits.append((rule, limit))
        self.marks: dict[str, tuple[float, ...]] = {}
        for rule, limit in self.limits:
            name = f"quality.{rule.metric}"
            self.marks[name] = (*self.marks.get(name, ()), limit)

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        """Returns one verdict a document; the note of a drop has the value and the limit."""
        texts = [document.text for document in batch.documents]
        languages = [document.meta.get("language") for document in batch.documents]
        metrics = measure(
            batch.analysis, texts, languages, {rule.metric for rule, _ in self.limits}
        )
        for rule, _ in self.limits:
            batch.record(f"quality.{rule.metric}", metrics[rule.metric])
        broken = np.stack([self._breaks(rule, limit, metrics) for rule, limit in self.limits])
        verdicts = []
        for row, which in enumerate(broken.argmax(axis=0)):
            rule, limit = self.limits[which]
            if broken[which, row]:
                verdicts.append(
                    drop(rule.reason, value=round(float(metrics[rule.metric][row]), 4), limit=limit)
                )
            else:
                verdicts.append(edit(boilerplate_spans(texts[row])) if self._cut else KEEP)
        return verdicts

    def _breaks(
        self, rule: QualityRule, limit: float, metrics: dict[str, np.ndarray]
    ) -> np.ndarray:
        values = metrics[rule.metric]
        broken = values < limit if rule.below else values > limit
        if rule.metric == "stop_words":
            broken &= values >= 0  # we know no stop words of the language
        return broken & (metrics["solo_word_share"] < 0.3) if rule.reason in _WORD_RULES else broken


def boilerplate_spans(text: str) -> list[TextSpan]:
    """Returns short lines about cookies, JavaScript, terms and log-ins, each with the newline that
    ends it.
    """
    low, spans = lowered(text), []
    for hint in _BOILERPLATE_HINTS:
        at = low.find(hint)
        while at >= 0:
            begin = text.rfind("\n", 0, at) + 1
            end = text.find("\n", at) + 1 or len(text)
            line = text[begin:end].rstrip()
            short = len(line.split()) <= _BOILERPLATE_MAX_WORDS
            if short and not line.endswith((".", "!", "?", ":")) and _BOILERPLATE.search(line):
                spans.append(TextSpan(begin, end, "boilerplate_line"))
            at = low.find(hint, end)
    return spans
