"""Toxic text: how dense are listed words, and what a trained score says of the passages with them.

Words are matched whole, so that a town's name is safe, and a listed word inside an allowed phrase
does not count. Words that have a harmless sense, too, count only in the company of words that have
none, or of many of their own kind: a page on titmice, retarded potentials or dog breeding has one
or two of them, again and again. The score (alt-profanity-check, a linear model) is asked only about
documents with enough words that count.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megallm.base import optional
from megallm.base.errors import DataError
from megallm.curate.config import ToxicityConfig
from megallm.curate.document import KEEP, DocumentBatch, Verdict, drop
from megallm.curate.external import contains
from megallm.curate.text import Analysis, Pieces

# Rotated by 13 letters, so that reading this file offends nobody. Words that are always rude.
_WORDS = codecs.decode(
    "shpx shpxf shpxrq shpxre shpxref shpxva shpxvat shpxsnpr zbgureshpxre zbgureshpxref "
    "zbgureshpxvat pyhfgreshpx fuvg fuvgf fuvggl ohyyfuvg qvcfuvg fuvgurnq phag phagf nffubyr "
    "nffubyrf nefrubyr nefrubyrf gjng gjngf jnaxre jnaxref pbpxfhpxre pbpxfhpxref oybjwbo "
    "oybjwbof unaqwbo unaqwbof wvmm phzfubg phzfubgf tnatonat tnatonatf pernzcvr ohxxnxr "
    "qrrcguebng gvggvrf qbhpuront qbhpurontf avttre avttref avttn avttnf jrgonpx jrgonpxf enturnq "
    "enturnqf enjqbt fpurvffr fpurvßr nefpuybpu nefpuyöpure svpxra sbgmr jvpufre uherafbua "
    "anmvfpujrva fpuynzcr chgnva zreqr raphyé raphyre pbaaneq pbaaneqf pbaanffr fnybcr fnybcrf "
    "zvreqn wbqre pnoeóa pnoebarf znevpóa znevpbarf tvyvcbyynf uvwbchgn pnmmb inssnaphyb "
    "fgebamb fgebamn zvapuvn pnenyub ohprgn ivnqb xhejn fxhejlfla cvreqbyvć fcvreqnynw ",
    "rot13",
).split()
# Words that are rude, or names of birds, dogs and people, terms of physics, words of other
# languages and of old books. They count as often as words of the list above stand beside them, or
# where _DIVERSE different ones meet.
_TWO_SENSES = codecs.decode(
    "pbpx pbpxf qvpx qvpxf chffl chffvrf gvg gvgf ovgpu ovgpurf fyhg fyhgf juber juberf jubevat "
    "cevpx cevpxf ubeal uneqpber cbea cbeab cbeauho qvyqb qvyqbf betnfz betnfzf cvff cvffrq snt "
    "sntf snttbg snttbgf ergneq ergneqf ergneqrq fcvp fcvpf puvax puvaxf tbbx tbbxf genaal "
    "genaavrf cbyyn pbba pbbaf qlxr qlxrf phzzvat xvxr xvxrf zvys zvysf chgn chgnf "
    "avdhr sbqre xhgnf puhw ",
    "rot13",
).split()
_DIVERSE = 4
_STEM_CHARS = 3  # tell the words of two senses apart, with their plurals
# Harmless phrases, by listed word: names, birds, plants, idioms, technical terms.
ALLOWED = (
    "moby dick", "dick cheney", "dick van dyke", "dick tracy", "philip k dick", "dick francis", "spotted dick",
    "cock crow", "cock crew", "cock crows", "the cock crowed", "cock a doodle", "cock of the walk", "cock and bull",
    "stop cock", "ball cock", "black cock", "weather cock", "cock robin", "cock fight", "cock pit",
    "pussy cat", "pussy willow", "pussy willows", "pussy riot", "puss in boots", "tit for tat", "blue tits",
    "great tits", "coal tits", "hardcore unlocking", "hardcore punk", "hard core", "soft hardcore", "hardcore mode",
    "flame retarded", "retarded growth", "retarded potential", "retarded time", "retarded green",
    "son of a bitch stew", "chink in the armour", "chink in the armor", "chinks in the armour", "chink of light",
    "spic and span", "whore of babylon", "played the whore", "the great whore", "an whore", "a whore", "piss pot",
    "gates of babylon", "take a prick", "pin pricks", "needle pricks", "kicked against the pricks",
    "kick against the pricks", "stack canary",
)  # fmt: skip
_PASSAGE_CHARS = 160
_MAX_PASSAGES = 8


def read_phrases(path: str, section: str) -> list[str]:
    """Returns phrases of a file, one a line. Errors: `DataError`."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{section}: {path} cannot be read as UTF-8 text: {error}.") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def phrase_tables(phrases: Iterable[str]) -> dict[int, np.ndarray]:
    """Returns sorted hashes of phrases by their number of words."""
    out: dict[int, list[int]] = {}
    for phrase in phrases:
        words = Analysis([phrase]).words
        if len(words):
            out.setdefault(len(words), []).append(
                int(words.ngrams_at(np.zeros(1, np.int64), len(words))[0])
            )
    return {size: np.unique(np.array(hashes, np.uint64)) for size, hashes in out.items()}


def phrase_hits(
    words: Pieces, tables: dict[int, np.ndarray], near: np.ndarray | None = None
) -> np.ndarray:
    """Returns which words stand in a phrase of the tables, bool [words]; `near`: look only at
    phrases around these words.
    """
    out = np.zeros(len(words), bool)
    for size, table in tables.items():
        if near is None:
            hashes, first = words.ngrams(size)
        else:
            first = np.unique((near[:, None] - np.arange(size)).ravel())
            first = first[(first >= 0) & (first + size <= len(words))]
            first = first[words.documents[first] == words.documents[first + size - 1]]
            hashes = words.ngrams_at(first, size)
        found = first[contains(table, hashes)]
        for k in range(size):
            out[found + k] = True
    return out


class Toxicity:
    """The step `toxicity`: drops `toxic_words` by density and `toxic_score` by the trained
    score.
    """

    name = "toxicity"

    def __init__(self, config: ToxicityConfig) -> None:
        self.config = config
        self.marks = {"toxicity.word_density": (config.max_density,)}
        two_senses = () if config.words else _TWO_SENSES
        own = read_phrases(config.words, "toxicity.words") if config.words else _WORDS
        self._listed = phrase_tables([*own, *two_senses])
        stems = {word: word[:_STEM_CHARS] for word in two_senses}
        numbers = {stem: number for number, stem in enumerate(sorted(set(stems.values())))}
        hashes = {int(phrase_tables([word])[1][0]): numbers[stem] for word, stem in stems.items()}
        self._two_senses = np.array(sorted(hashes), np.uint64)
        self._stems = np.array([hashes[key] for key in sorted(hashes)], np.int64)
        extra = read_phrases(config.allow, "toxicity.allow") if config.allow else []
        self._allowed = phrase_tables([*ALLOWED, *extra])
        if config.score:
            optional.check_installed("profanity_check", "set toxicity.score=false")

    def matches(self, words: Pieces) -> np.ndarray:
        """Returns the numbers of the words that are listed and not inside an allowed phrase."""
        found = np.flatnonzero(phrase_hits(words, self._listed))
        return found[~phrase_hits(words, self._allowed, found)[found]] if len(found) else found

    def _counted(self, hashes: np.ndarray, owners: np.ndarray, size: int) -> np.ndarray:
        """Returns how many listed words count in each of `size` documents; every match has its hash
        and its document in `hashes` and `owners`."""
        unsure = contains(self._two_senses, hashes)
        sure = np.bincount(owners[~unsure], minlength=size)
        others = np.bincount(owners[unsure], minlength=size)
        stems = self._stems[np.searchsorted(self._two_senses, hashes[unsure])]
        pairs = np.unique(np.stack([owners[unsure], stems], axis=1), axis=0)
        different = np.bincount(pairs[:, 0], minlength=size)
        return sure + np.where(different >= _DIVERSE, others, np.minimum(others, sure))

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        analysis, rows = batch.shared_analysis()
        words = analysis.words
        place = np.full(len(analysis), -1)  # of each analysed document in our batch
        place[rows] = np.arange(len(batch))
        found = self.matches(words)
        found = found[place[words.documents[found]] >= 0]
        owners = place[words.documents[found]]
        counts = self._counted(words.ngrams_at(found, 1), owners, len(batch))
        density = counts / np.maximum(words.counts[rows], 1)
        batch.record("toxicity.word_density", density)
        enough = counts >= self.config.min_matches
        asked = enough[owners]
        scores = self._scores(analysis, words.begin[found[asked]], owners[asked], len(batch))
        verdicts = []
        for row in range(len(batch)):
            note = {"matches": int(counts[row]), "density": round(float(density[row]), 5)}
            if enough[row] and density[row] > self.config.max_density:
                verdicts.append(drop("toxic_words", **note))
            elif row in scores and scores[row] > self.config.max_score:
                verdicts.append(drop("toxic_score", **note, score=round(scores[row], 4)))
            else:
                verdicts.append(KEEP)
        return verdicts

    def _scores(
        self, analysis: Analysis, places: np.ndarray, rows: np.ndarray, size: int
    ) -> dict[int, float]:
        """Returns the mean score of the passages around the first listed words of each document:
        `places` in the analysis, `rows` in our batch of `size`."""
        if not self.config.score or not len(rows):
            return {}
        # Imported only here: it takes two seconds, and most shards never ask.
        predict = optional.need("profanity_check", "set toxicity.score=false").predict_prob
        passages, owners = [], []
        taken = np.zeros(size, np.int64)
        for at, row in zip(places.tolist(), rows.tolist(), strict=True):
            if taken[row] < _MAX_PASSAGES:
                taken[row] += 1
                begin, end = analysis.around(at, _PASSAGE_CHARS)
                passages.append(analysis.text(begin, end))
                owners.append(row)
        values = np.asarray(predict(passages))
        totals = np.bincount(owners, values, minlength=size) / np.maximum(taken, 1)
        return {row: float(totals[row]) for row in np.flatnonzero(taken).tolist()}
