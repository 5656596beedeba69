"""Frequent short words of some languages: running text has them, lists and tables do not."""

from __future__ import annotations

from functools import cache

import numpy as np

from megallm.base import extension
from megallm.curate.text import Analysis

STOP_WORDS = {
    "en": "the be to of and that have with is in for it as was on are",
    "de": "der die das und ist nicht mit von zu den ein eine im für auf sich",
    "fr": "le la les de des et est un une dans que pour qui pas sur du",
    "es": "el la los las de y que en un una es por con para no se",
    "it": "il la di e che un una per non con del della sono si le gli",
    "pt": "o a os as de e que em um uma para com não por se do da",
    "nl": "de het een en van is dat niet te op met voor zijn die aan",
    "pl": "i w na z do się nie to jest że od jak lub dla po",
    "ru": "и в не на что с по это для как из или от а к если",
    "sv": "och att det i en som är på för med av den inte om",
    "da": "og at det i en er som på for med af den ikke til",
    "cs": "a je v na se že to s z do pro jako nebo by",
    "tr": "ve bir bu da de için ile olarak daha çok olan gibi",
    "fi": "ja on ei se että ovat oli tai kuin mutta voi joka",
}


_FILTER_BITS = 16


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted hashes of all stop words, the languages of each as bits, and a filter over the high
    bits of a hash.
    """
    hashes = [Analysis([line]).words.hashes for line in STOP_WORDS.values()]
    every = np.unique(np.concatenate(hashes))
    languages = np.zeros(len(every), np.int64)
    for number, own in enumerate(hashes):
        languages[np.searchsorted(every, own)] |= 1 << number
    some = np.zeros(1 << _FILTER_BITS, bool)
    some[every >> np.uint64(64 - _FILTER_BITS)] = True
    return every, languages, some


def counts(analysis: Analysis, languages: list[str | None]) -> np.ndarray:
    """Returns how many different stop words of its language (English, where none is given) each
    document has; -1 where we know none, int64 [documents]."""
    every, bits, some = _tables()
    numbers = {name: number for number, name in enumerate(STOP_WORDS)}
    own = np.array([numbers.get(name or "en", -1) for name in languages], np.int64)
    words = analysis.words
    native = extension.index()
    if native is not None:
        return native.stop_words(words.hashes, words.offsets, every, bits, own)
    found = np.flatnonzero(some[words.hashes >> np.uint64(64 - _FILTER_BITS)])
    hashes, documents = words.hashes[found], words.documents[found]
    place = np.minimum(np.searchsorted(every, hashes), len(every) - 1)
    right = (
        (every[place] == hashes)
        & (own[documents] >= 0)
        & ((bits[place] >> np.maximum(own[documents], 0)) & 1 > 0)
    )
    pairs = np.unique(documents[right] * len(every) + place[right])
    out = np.bincount(pairs // len(every), minlength=len(analysis))
    return np.where(own < 0, -1, out)
